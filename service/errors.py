"""Errors of the service, each refining a standard one.

    SweepError
    +-- UsageError (ValueError)        asked wrongly: exit code 2
    +-- StorageError (OSError)         the Optuna storage cannot be opened or used
    +-- RunnerError (RuntimeError)     a runner cannot start or place a trial
    +-- StudyBusyError (RuntimeError)  another driver works on this study

Every message names the thing, what is wrong with it, and what to do.
"""


class SweepError(Exception):
    """Root of everything the service raises on purpose."""


class UsageError(SweepError, ValueError):
    """The command or call was asked wrongly."""


class StorageError(SweepError, OSError):
    """The Optuna storage cannot be opened or used."""


class RunnerError(SweepError, RuntimeError):
    """A runner cannot start or place a trial."""


class StudyBusyError(SweepError, RuntimeError):
    """Another driver works on this study."""
