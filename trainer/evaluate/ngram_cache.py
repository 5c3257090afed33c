"""The hashed n-gram cache of #659 and #675. ILLEGAL on the golf tracks: see trainer/legality.py.

Counts of (context, target) among the tokens before the target; where a context was seen often
enough and the target often enough after it,

    p'(target) = (1 - weight) p(target) + weight count(context, target) / count(context)

Only the target's probability is changed and the gate looks at the target, so p' is no distribution:
probabilities of all tokens would not sum to 1. It is here to replay what was published. #675 also
counted tokens anew in every overlapping window; here each is counted once.

Counting one token after another is written as sorting: the count of a key before position t is the
rank of t among equal keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.shards import Tokens

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, 2^64 over the golden ratio: spreads keys over the high bits."""


@dataclass(frozen=True)
class NgramCache:
    """What the cache says of every target, computed from the tokens before it."""

    shares: Tensor
    """[N + T] fp64: count(context, target) / count(context), 0 where the cache is silent."""
    weight: float
    never_lower: bool

    @classmethod
    def of(
        cls, padded: Tokens, num_targets: int, config: EvaluateConfig, device: torch.device
    ) -> NgramCache:
        """Takes seconds for 10 million tokens; inside the evaluation clock.

        Args:
            padded: the validation tokens and as many zeros as a window has.
        """
        shares = np.zeros(len(padded))
        shares[:num_targets] = _shares(padded[: num_targets + 1], config)
        return cls(
            torch.from_numpy(shares).to(device), config.ngram_weight, config.ngram_never_lower
        )

    def mix(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Nats of the targets after mixing, fp64; both arguments of one shape, `targets` the
        index of each."""
        shares = self.shares[targets]
        losses = losses.double()
        mixed = -torch.log((1 - self.weight) * torch.exp(-losses) + self.weight * shares)
        if self.never_lower:
            mixed = torch.minimum(mixed, losses)
        return torch.where(shares > 0, mixed, losses)


def _shares(tokens: Tokens, config: EvaluateConfig) -> NDArray[np.float64]:
    """[N] of the N + 1 tokens' targets."""
    width = config.ngram_order - 1
    shares = np.zeros(len(tokens) - 1)
    if len(tokens) <= width:
        return shares
    buckets = np.uint64(config.ngram_buckets)
    count = len(tokens) - width
    context = np.zeros(count, dtype=np.uint64)
    for place in range(width):
        context = _hash(context, tokens[place : place + count])
    pair = _hash(context, tokens[width:])
    seen = count_earlier(context % buckets)
    together = np.minimum(count_earlier(pair % buckets), seen)
    share = together / np.maximum(seen, 1)
    speaks = (seen >= config.ngram_min_count) & (share >= config.ngram_min_confidence)
    shares[width - 1 :] = np.where(speaks, share, 0.0)
    return shares


def _hash(key: NDArray[np.uint64], tokens: Tokens) -> NDArray[np.uint64]:
    """The key of a sequence that is one token longer."""
    mixed = (key + tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def count_earlier(keys: NDArray[np.uint64] | NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each key occurs before its place."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    places = np.arange(len(keys))
    first_place = np.maximum.accumulate(np.where(is_first, places, 0))
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = places - first_place
    return counts
