"""The normalised n-gram tilt: a token that followed the same context before is raised, and the
distribution normalised again (parameter-golf #1145, #1514, #2135). Legal on the golf tracks.

Where the last W = tilt_order - 1 tokens occurred earlier in the validation text, the hint h is the
token that followed them most often (of several, the one that first had as many) and pi its share of
those times. Where pi >= tilt_threshold,

    p'(v) = p(v) exp(beta [v = h]) / (1 + p(h) (exp(beta) - 1))

which sums to one over the vocabulary. For target y, in nats:

    loss' = loss - beta [y = h] + ln(1 + p(h) (exp(beta) - 1))

h depends on the tokens before the target and on nothing else. The published "within-word" and
"word-start" experts choose by the class of the target itself and are not built.

Counting left to right is written as sorting, O(N log N): contexts are brought together by a 64-bit
hash, and members of a group are compared token by token, so a match is exact. One core takes half
a second for 3 million tokens and half a minute for 62 million; memory is about 35 bytes a token.
Rank 0 counts for all, inside the evaluation clock.

Shapes: N targets, target i being token i + 1; B rows of one forward pass, T evaluate.seq_len.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.shards import Tokens
from trainer.data.window_hash import MULTIPLIER, window_hashes
from trainer.distributed import Group
from trainer.evaluate.ngram_cache import count_earlier

if TYPE_CHECKING:
    from trainer.evaluate.bits_per_byte import LossModel

NO_HINT = -1


@dataclass(frozen=True)
class Tilt:
    """The hints for a validation text, and how far a hint is raised."""

    hints: Tensor
    """[N] int32 on the device; NO_HINT where there is none."""
    beta: float

    @classmethod
    def of(cls, tokens: Tokens, config: EvaluateConfig, group: Group) -> Tilt:
        """Runs on every rank together, inside the evaluation clock.

        Args:
            tokens: the N + 1 validation tokens that are inputs or targets.
        """
        hints_N = torch.empty(len(tokens) - 1, dtype=torch.int32, device=group.device)
        if group.is_main:
            found = hints(tokens, config.tilt_order, config.tilt_threshold)
            hints_N.copy_(torch.from_numpy(found))
        return cls(group.broadcast_(hints_N), config.tilt_beta)

    def of_targets(self, indices: Tensor) -> Tensor:
        """The hints for the targets with these indices, int64 of their shape; NO_HINT beyond the
        text."""
        last = len(self.hints) - 1
        hints = self.hints[indices.clamp(max=last)].long()
        return torch.where(indices <= last, hints, NO_HINT)

    def score(
        self, model: LossModel, x_BT: Tensor, y_BT: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Nats as the model gives them, from which an evaluation that trains may learn, and tilted
        nats, fp64, which count; of the targets with these indices, [rows that hold a window, T], in
        one forward pass. Those rows are the first ones of x_BT and y_BT."""
        num_rows, hints = len(indices), self.of_targets(indices)
        pairs_BT2 = torch.stack([y_BT, y_BT], dim=-1)
        pairs_BT2[:num_rows, :, 1] = hints.clamp(min=0)
        nats = model(x_BT, pairs_BT2, reduction="none")[:num_rows]
        fixed = nats.detach()
        changed = tilted(fixed[..., 0], fixed[..., 1], y_BT[:num_rows], hints, self.beta)
        return nats[..., 0], changed


def tilted(loss: Tensor, hint_loss: Tensor, targets: Tensor, hints: Tensor, beta: float) -> Tensor:
    """Nats of the targets under p', fp64.

    Args:
        loss: -ln p(target).
        hint_loss: -ln p(hint); anything where there is no hint.
        targets: tokens.
        hints: tokens, or NO_HINT.
    """
    loss = loss.double()
    log_z = torch.log1p(torch.exp(-hint_loss.double()) * math.expm1(beta))
    changed = torch.where(targets == hints, loss - beta, loss) + log_z
    return torch.where(hints == NO_HINT, loss, changed)


def hints(tokens: Tokens, order: int, threshold: float) -> NDArray[np.int32]:
    """[N] the hint for each target, or NO_HINT. Each depends on the tokens before its target."""
    width = order - 1
    found = np.full(len(tokens) - 1, NO_HINT, dtype=np.int32)
    if len(tokens) <= width:
        return found
    starts, is_first = _repeated_contexts(tokens[:-1], width)
    following = tokens[starts + width]
    best, share = _best_before(following, is_first)
    speaks = ~is_first & (share >= threshold)
    found[starts[speaks] + width - 1] = following[best[speaks]]
    return found


def _repeated_contexts(tokens: Tokens, width: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the contexts of `width` tokens begin that may occur more than once: equal ones side by
    side, in the order of the text; and which of them is the first of its kind."""
    for attempt in itertools.count():
        keys = window_hashes(tokens, width, multiplier=MULTIPLIER + 2 * attempt)
        starts = _with_company(keys)
        keys = keys[starts]
        order = np.argsort(keys, kind="stable")
        starts, keys = starts[order], keys[order]
        is_first = np.ones(len(keys), dtype=np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
        firsts = starts[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
        if all(
            np.array_equal(tokens[starts + place], tokens[firsts + place]) for place in range(width)
        ):
            break
        # Two contexts with one hash, once in thousands of texts: take another hash.
    return starts, is_first


def _with_company(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Ascending places of each key whose high bits occur again, key after key. Sorting key and
    place as one number is several times faster than finding the order of all keys."""
    low = np.uint64((1 << len(keys).bit_length()) - 1)
    packed = keys & ~low
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    alike = (packed[1:] ^ packed[:-1]) <= low
    has_company = np.zeros(len(keys), dtype=np.bool_)
    has_company[1:] = alike
    has_company[:-1] |= alike
    return (packed[has_company] & low).astype(np.int64)


def _best_before(
    following: Tokens, is_first: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each member of a group of one context, in the order of the text: the place of an earlier
    member with the most frequent following token so far, and that token's share so far. Undefined
    for the first of a group."""
    places = np.arange(len(following))
    group = np.cumsum(is_first) - 1
    first_place = np.maximum.accumulate(np.where(is_first, places, 0))
    count = 1 + count_earlier(group * 65536 + following)
    # A running maximum within groups: each group's counts lie above all those of the one before.
    floor = group * (len(following) + 1)
    most = np.maximum.accumulate(count + floor) - floor
    most_before = np.zeros_like(most)
    most_before[1:] = np.where(is_first[1:], 0, most[:-1])
    leader = np.maximum.accumulate(np.where(count > most_before, places, 0))
    best = np.zeros_like(leader)
    best[1:] = leader[:-1]
    return best, most_before / np.maximum(places - first_place, 1)
