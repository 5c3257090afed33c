"""The only door to the validation tokens: a token is handed out after its loss is recorded.

The rules of the score (reference 1.2; README, "Legal evaluation"): the distribution for a token
depends on the artifact and the tokens before it, its loss is recorded before anything learns from
it, and every token is scored exactly once. `Scorer` owns the tokens. Who evaluates names rows and
the targets that they score; the scorer shows the model those rows, up to their last target and no
further, records the losses, and gives text back only where every loss is recorded. Breaking the
order raises RuleError; so does scoring a target twice, or never.

Inside a row the model sees the row's earlier tokens, as any causal model must. That it looks at no
later ones, and gives one normalised distribution, is a property of the model, checked apart from
any text in trainer/evaluate/distribution_check.py.

Target i is token i + 1. Shapes: B rows of one forward pass, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.data.documents import document_starts
from trainer.data.shards import Tokens
from trainer.distributed import Group
from trainer.errors import RuleError
from trainer.evaluate.ngram_cache import NgramCache
from trainer.evaluate.target_bytes import CountBytes, target_bytes
from trainer.evaluate.tilt import Tilt
from trainer.evaluate.windows import Rows, cut_rows

Spans = Sequence[tuple[int, int]]
"""Ranges [first, end) of targets."""


class LossModel(Protocol):
    """What evaluation needs of a model; GPT and its compiled form have it."""

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        """[B, T] fp32 nats of each target for reduction "none"; for targets of shape [B, T, K], K
        tokens for each place, [B, T, K]."""
        ...


class Ask(Protocol):
    """How a model is asked for the nats of targets, in one forward pass."""

    def __call__(
        self, model: LossModel, x_BT: Tensor, y_BT: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For the first rows, as many as `indices` has: the nats as the model gives them, which may
        be learned from, and those that count, where what the text before a target says is mixed in
        (its distribution must be fixed before the target is looked at)."""
        ...


def ask_model(
    model: LossModel, x_BT: Tensor, y_BT: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """The model's own nats count."""
    nats_BT = model(x_BT, y_BT, reduction="none")[: len(indices)]
    return nats_BT, nats_BT.detach()


@dataclass(frozen=True)
class EvalResult:
    """The score of a model on a validation set."""

    val_loss: float
    """Nats per token."""
    val_bpb: float
    """Bits per byte of text."""
    num_tokens: int
    num_bytes: int


class Scorer:
    """One pass over the first `num_targets` targets of a text. Every rank has one, with a share of
    the rows of its own; `settle` and `result` are for all ranks together.

    Args:
        tokens: the validation tokens; num_targets + 1 of them are used.
        pad: longest row that will be asked for.
        count_bytes: the denominator of bits per byte.
        ask: how losses come from the model.
    """

    def __init__(
        self,
        tokens: Tokens,
        num_targets: int,
        pad: int,
        count_bytes: CountBytes,
        group: Group,
        ask: Ask = ask_model,
    ) -> None:
        self.num_targets = num_targets
        self._tokens = np.concatenate([tokens[: num_targets + 1], np.zeros(pad, tokens.dtype)])
        self._count_bytes = count_bytes
        self._group = group
        self._ask = ask
        self._claimed = np.zeros(num_targets, np.int8)
        self._known = np.zeros(num_targets + 1, bool)
        self._known[0] = True
        self._sums = torch.zeros(3, dtype=torch.float64, device=group.device)

    def score(self, model: LossModel, rows: Rows, num_rows: int) -> Tensor:
        """Show the model the rows, filled up to `num_rows` with zeros, and record the losses.

        Returns: [rows, T] nats as the model gave them, 0 where a row does not count: what may be
            learned from, now that it is recorded.
        Raises: RuleError when a target has been scored before, or is none.
        """
        self._claim(rows)
        x_BT, y_BT = cut_rows(self._tokens, rows, num_rows, self._group.device)
        indices_BT = rows.targets(self._group.device)
        nats_BT, counting_BT = self._ask(model, x_BT, y_BT, indices_BT)
        counted_BT = rows.counted(self._group.device)
        bytes_BT = self._count_bytes(x_BT[: len(rows)], y_BT[: len(rows)], indices_BT)
        self._record(counting_BT, bytes_BT, indices_BT, counted_BT)
        return torch.where(counted_BT, nats_BT, 0.0)

    def settle(self, spans: Spans) -> None:
        """Open these targets' tokens to `text`, on all ranks. Raises RuleError, on all, when one of
        them has no recorded loss, or more than one."""
        own = np.concatenate([self._claimed[first:end] for first, end in spans])
        times = self._group.sum_counts(own)
        if (times != 1).any():
            raise RuleError(
                f"{(times == 0).sum()} targets of {len(times)} have no recorded loss yet and "
                f"{(times > 1).sum()} have several; score each once before learning from it"
            )
        for first, end in spans:
            self._known[first + 1 : end + 1] = True

    def text(self, first: int, end: int) -> Tensor:
        """The tokens first .. end, int64 on the CPU: the inputs and targets of the targets in
        [first, end). Raises RuleError unless all of them are settled."""
        if not (0 <= first < end <= self.num_targets and self._known[first : end + 1].all()):
            raise RuleError(
                f"tokens {first} to {end} were asked for before every loss there was recorded and "
                "settled; score them first"
            )
        return torch.from_numpy(self._tokens[first : end + 1].astype(np.int64))

    def documents(self, bos_id: int) -> list[tuple[int, int]]:
        """[first, end) targets of each document; its first input is its BOS, its last target the
        next one's. For evaluation that treats documents as independent texts: where they begin is
        then part of the question, and these BOS may be read at any time."""
        starts = document_starts(self._tokens[: self.num_targets], bos_id)
        self._known[starts] = True
        ends = np.append(starts[1:], self.num_targets)
        return [(int(first), int(end)) for first, end in zip(starts, ends, strict=True)]

    def result(self) -> EvalResult:
        """The score over all ranks. Raises RuleError unless every target was scored once."""
        self._group.all_reduce_sum_(self._sums)
        nats, num_tokens, num_bytes = self._sums.tolist()
        if num_tokens != self.num_targets:
            raise RuleError(
                f"{int(num_tokens)} targets were scored of {self.num_targets}; each counts once"
            )
        val_loss = nats / num_tokens
        val_bpb = val_loss / math.log(2) * (num_tokens / num_bytes)
        return EvalResult(val_loss, val_bpb, int(num_tokens), int(num_bytes))

    def _claim(self, rows: Rows) -> None:
        for first, end in rows.spans():
            if first < 0 or end > self.num_targets or self._claimed[first:end].any():
                raise RuleError(
                    f"targets {first} to {end - 1} were scored before, or are none; one pass only"
                )
            self._claimed[first:end] = 1

    def _record(
        self, nats_BT: Tensor, bytes_BT: Tensor, indices_BT: Tensor, counted_BT: Tensor
    ) -> None:
        self._sums[0] += torch.where(counted_BT, nats_BT.double(), 0.0).sum()
        self._sums[1] += counted_BT.sum()
        self._sums[2] += torch.where(counted_BT, bytes_BT, 0).sum()


def open_scorer(
    dataset: Dataset, byte_table: ByteTable, config: EvaluateConfig, group: Group
) -> Scorer:
    """A fresh pass over the targets that every evaluation at evaluate.seq_len scores. What is
    counted in the text beforehand is counted here, inside the evaluation clock."""
    num_targets, pad = dataset.num_scored_tokens(config.seq_len), config.seq_len
    tokens = dataset.read_val()
    count_bytes = target_bytes(dataset, byte_table, group.device)
    ask: Ask = ask_model
    if config.tilt_beta > 0:
        ask = Tilt.of(tokens[: num_targets + 1], config, group).score
    if config.ngram_weight > 0:
        padded = np.concatenate([tokens[: num_targets + 1], np.zeros(pad, tokens.dtype)])
        cache = NgramCache.of(padded, num_targets, config, group.device)
        ask = partial(_ask_and_mix, cache)
    return Scorer(tokens, num_targets, pad, count_bytes, group, ask)


def _ask_and_mix(
    cache: NgramCache, model: LossModel, x_BT: Tensor, y_BT: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    nats_BT, counting_BT = ask_model(model, x_BT, y_BT, indices)
    return nats_BT, cache.mix(counting_BT, indices)


def as_asked(model: LossModel, config: EvaluateConfig) -> LossModel:
    """The model as `score` runs it, so that priming compiles that graph and no other."""
    if config.tilt_beta == 0:
        return model

    def ask_for_two(
        tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        pairs_BT2 = torch.stack([targets_BT, targets_BT], dim=-1)
        return model(tokens_BT, pairs_BT2, reduction=reduction)[..., 0]

    return ask_for_two
