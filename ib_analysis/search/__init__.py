"""Which plan is best? From a model and a budget to an allocation."""
