"""What does a plan lose? Prompts replayed under many plans at once, measured against the full cache."""
