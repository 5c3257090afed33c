"""The ways to make a score, chosen by evaluate.ttt in one visible table.

Plain and sliding evaluation leave the weights alone (trainer/evaluate/bits_per_byte.py); the others
adapt to what they have scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from trainer.config import EvaluateConfig
from trainer.evaluate import bits_per_byte
from trainer.evaluate.chunk_training import prime_chunks, score_in_chunks
from trainer.evaluate.document_training import DocumentPass
from trainer.evaluate.scorer import EvalResult
from trainer.evaluate.subject import Subject

NUM_GRAPHS = 64
"""Graphs that one compiled model may hold: rows of several lengths, with and without gradients."""


class Method(NamedTuple):
    """A way to make a score. Both run on every rank together."""

    score: Callable[[Subject, EvaluateConfig], EvalResult]
    """Changes the weights where it adapts."""
    prime: Callable[[Subject, EvaluateConfig], None]
    """Compiles all that `score` needs and sees no validation token; changes nothing."""


def _score_plain(subject: Subject, config: EvaluateConfig) -> EvalResult:
    return bits_per_byte.evaluate(
        subject.forward, subject.dataset, subject.byte_table, config, subject.group
    )


def _prime_plain(subject: Subject, config: EvaluateConfig) -> None:
    bits_per_byte.prime(subject.forward, subject.dataset, config, subject.group)


METHODS: dict[str, Method] = {
    "off": Method(_score_plain, _prime_plain),
    "chunks": Method(score_in_chunks, prime_chunks),
    "documents": Method(
        lambda subject, config: DocumentPass.of(subject, config).run(),
        lambda subject, config: DocumentPass.of(subject, config).prime(),
    ),
}


def score(subject: Subject, config: EvaluateConfig) -> EvalResult:
    """Bits per byte of the subject's weights; training leaves them changed."""
    return METHODS[config.ttt].score(subject, config)


def prime_score(subject: Subject, config: EvaluateConfig) -> None:
    """Compile what this run's score and its diagnostics need. Raises RuleError when what is scored
    is no distribution given the tokens before."""
    if subject.forward is not subject.model:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, NUM_GRAPHS)
    if config.ttt != "off" and (config.prequant or config.stages):
        METHODS["off"].prime(subject, config.plain())
    METHODS[config.ttt].prime(subject, config)
