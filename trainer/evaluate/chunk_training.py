"""Score-first test-time training by chunks (parameter-golf #461, #549, #1413, #1493, #1894).

The targets are cut into chunks. All windows whose scored targets begin in a chunk are scored; then,
unless it is the last chunk, SGD goes over the chunk's text. Every loss in it is recorded by then:
`Scorer` hands it out no earlier. Windows are those of plain or sliding evaluation, so with a
learning rate of 0 this is that evaluation.

Shapes: B rows of one forward pass, T evaluate.seq_len.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch

from trainer.config import EvaluateConfig
from trainer.evaluate.row_sgd import RowSgd, cosine, trained_parameters
from trainer.evaluate.scorer import EvalResult
from trainer.evaluate.subject import Subject, gradients_of
from trainer.evaluate.windows import Windows, num_windows


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """Which windows are scored when, and what is trained on after."""

    windows: Windows
    """Of the whole text; a chunk's share of a rank is cut from it."""
    chunk_tokens: int

    @property
    def num_chunks(self) -> int:
        """Chunks, the last maybe shorter."""
        return math.ceil(self.windows.num_targets / self.chunk_tokens)

    def targets(self, chunk: int) -> tuple[int, int]:
        """[first, end) targets of a chunk."""
        first = chunk * self.chunk_tokens
        return first, min(first + self.chunk_tokens, self.windows.num_targets)

    def share(self, chunk: int, rank: int, size: int) -> Windows:
        """The windows of a chunk that a rank scores."""
        first, end = self._first_window(chunk), self._first_window(chunk + 1)
        count = end - first
        return dataclasses.replace(
            self.windows,
            first=first + count * rank // size,
            end=first + count * (rank + 1) // size,
        )

    def _first_window(self, chunk: int) -> int:
        """The first window whose scored targets begin in or after the chunk: window 0 scores from
        target 0 on, window i from i s + T - s."""
        windows = self.windows
        if chunk == 0:
            return 0
        reach = chunk * self.chunk_tokens - (windows.seq_len - windows.stride)
        return min(max(1, math.ceil(reach / windows.stride)), windows.end)


def plan_chunks(num_targets: int, config: EvaluateConfig, num_ranks: int) -> ChunkPlan:
    """One shape of forward pass for all chunks, as small as the fullest chunk allows."""
    seq_len, stride = config.seq_len, config.stride or config.seq_len
    count = num_windows(num_targets, seq_len, stride)
    windows = Windows(seq_len, stride, num_targets, 0, count, batch_rows=1)
    plan = ChunkPlan(windows, config.ttt_chunk_tokens)
    shares = (plan.share(chunk, 0, 1) for chunk in range(plan.num_chunks))
    fullest = math.ceil(max(share.end - share.first for share in shares) / num_ranks)
    rows = min(config.batch_tokens // seq_len, fullest)
    return dataclasses.replace(plan, windows=dataclasses.replace(windows, batch_rows=rows))


def score_in_chunks(subject: Subject, config: EvaluateConfig) -> EvalResult:
    """Bits per byte with training on what is scored; changes the weights. Runs on every rank
    together; any number of ranks gives the same number, but for rounding."""
    group, plan = subject.group, _plan(subject, config)
    scorer = subject.scorer(config)
    with gradients_of(subject.model, trained_parameters(subject.model, config)):
        sgd = _sgd(subject, config)
        for chunk in range(plan.num_chunks):
            share = plan.share(chunk, group.rank, group.size)
            with torch.inference_mode():
                for batch in range(share.num_batches):
                    scorer.score(subject.forward, share.batch(batch), share.batch_rows)
            if chunk + 1 == plan.num_chunks:
                break
            first, end = plan.targets(chunk)
            scorer.settle([(first, end)])
            lr = config.ttt_lr * cosine(chunk, plan.num_chunks)
            sgd.train(scorer.text(first, end), lr, config.ttt_epochs)
    return scorer.result()


def prime_chunks(subject: Subject, config: EvaluateConfig) -> None:
    """Compile every graph of `score_in_chunks` on random tokens, and check the scoring one."""
    with gradients_of(subject.model, trained_parameters(subject.model, config)):
        with torch.inference_mode():
            rows = _plan(subject, config).windows.batch_rows
            subject.check(subject.forward, config, rows)
        _sgd(subject, config).prime(subject.model.config.vocab_size)


def _plan(subject: Subject, config: EvaluateConfig) -> ChunkPlan:
    num_targets = subject.dataset.num_scored_tokens(config.seq_len)
    return plan_chunks(num_targets, config, subject.group.size)


def _sgd(subject: Subject, config: EvaluateConfig) -> RowSgd:
    return RowSgd(
        partial(subject.forward, reduction="none"),
        trained_parameters(subject.model, config),
        config,
        subject.micro_batch_tokens,
        subject.group,
    )
