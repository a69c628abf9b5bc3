"""The exceptions of the package: each is also the built-in that a caller would expect. And one warning."""

__all__ = [
    "CheckpointError",
    "DerivativeError",
    "DetachedError",
    "DivergedError",
    "InvalidTypeError",
    "InvalidValueError",
    "LearningWarning",
    "NoCompletedTrialError",
    "SolveError",
    "StorageError",
    "TuneImplicitError",
]


class TuneImplicitError(Exception):
    """Base of every exception that this package raises on purpose."""


class InvalidValueError(TuneImplicitError, ValueError):
    """An argument, a setting or a result of the caller's own function has a value it must not have."""


class DetachedError(InvalidValueError):
    """A loss does not depend on what it is to be differentiated in."""


class DerivativeError(InvalidValueError):
    """A loss uses what torch cannot differentiate, or not as often as needed."""


class InvalidTypeError(TuneImplicitError, TypeError):
    """An argument, a setting or a result of the caller's own function has the wrong type."""


class CheckpointError(TuneImplicitError, ValueError):
    """A checkpoint cannot be loaded: another format, or another problem's shapes."""


class StorageError(TuneImplicitError, OSError):
    """A storage of trials cannot be opened."""


class NoCompletedTrialError(TuneImplicitError, ValueError):
    """A search has no completed trial, and so no best one."""


class DivergedError(TuneImplicitError, ArithmeticError):
    """The numbers of a trial left the finite range, so that it has no result to compare."""


class SolveError(TuneImplicitError, ArithmeticError):
    """A hypergradient's linear system could not be solved, and the settings ask to raise then."""


class LearningWarning(UserWarning):
    """A trial ended, but did not learn as it should have."""
