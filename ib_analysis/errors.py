"""Errors of this package. Each message says what was wrong, where, and what to do."""


class IBAnalysisError(Exception):
    """Base of every error that this package raises on purpose."""


class BudgetError(IBAnalysisError, ValueError):
    """A budget without a unit, out of range, or below what sinks, window and metadata need."""


class UnsupportedModelError(IBAnalysisError, ValueError):
    """A model, or one of its layers, whose cache cannot be read or compressed."""


class ProfileMismatchError(IBAnalysisError, ValueError):
    """A profile or an allocation of another model or another format version."""


class CalibrationError(IBAnalysisError, ValueError):
    """Prompts or activations that cannot be measured."""


class CorruptFileError(IBAnalysisError, ValueError):
    """A truncated or edited file."""


class ModelNotFoundError(IBAnalysisError, OSError):
    """No model at the name or path given."""


class UnknownNameError(IBAnalysisError, ValueError):
    """A scorer, an objective, an estimator or a task that does not exist."""


class EstimatorError(IBAnalysisError, ValueError):
    """Samples from which an estimator can say nothing: NaN, constant, too few, or of the wrong kind."""
