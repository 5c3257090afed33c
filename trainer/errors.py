"""Errors of the trainer, each refining a standard one so that callers may catch either.

    TrainerError
    +-- ConfigError (ValueError)        a setting is unknown, mistyped, or breaks a rule
    +-- DataError (ValueError)          a shard, tokenizer or data set is not what it should be
    +-- ArtifactError (ValueError)      an artifact cannot be written, read or decoded
    +-- BackendError (RuntimeError)     a backend was asked for by name and is not here
    +-- RuleError (RuntimeError)        an evaluation broke a rule of the score; stops the run

Every message names the thing, what is wrong with it, and what to do. All classes take one string,
so they survive pickling across Ray.
"""


class TrainerError(Exception):
    """Root of everything the trainer raises on purpose."""


class ConfigError(TrainerError, ValueError):
    """A setting is unknown, has the wrong type, or breaks a rule; lists every fault found."""


class DataError(TrainerError, ValueError):
    """A shard, tokenizer or data set is not what it should be."""


class ArtifactError(TrainerError, ValueError):
    """An artifact cannot be written, read or decoded."""


class BackendError(TrainerError, RuntimeError):
    """A backend was requested by name and cannot run here."""


class RuleError(TrainerError, RuntimeError):
    """An evaluation read a token before its loss was recorded, scored one twice or not at all, or
    scored with something that is no distribution given the tokens before it."""
