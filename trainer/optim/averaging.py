"""Averages of the weights along a run, in fp32: EMA, SWA, LAWA.

The average replaces the weights before they are quantised. All forms start at a share of the
budget, not at a step. Sums are fp32 whatever the weights are: a bf16 shadow of an exponential
average with decay 0.9965 never moves, since its increments are below bf16's resolution
(parameter-golf #1894 reported EMA as harmful for that reason).

None of this is a collective: weights are the same on all ranks, and so are their averages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.config import AverageConfig


class WeightAverage:
    """Call `update` after every step and `result` at the end."""

    def __init__(self, config: AverageConfig, state: Mapping[str, Tensor]) -> None:
        """
        Args:
            state: the model's live state (`state_dict()`); its tensors are read at every update.
        """
        self._config = config
        self._live = {name: value for name, value in state.items() if value.is_floating_point()}
        self._steps = 0
        self.num_updates = 0
        """Steps or snapshots that the average holds."""

    def update(self, progress: float) -> None:
        """Take in the weights after a step.

        Args:
            progress: share of the budget at which that step began; the same on all ranks.
        """
        if progress < self._config.start:
            return
        # The first snapshot lies one interval after the start, as in the published loops.
        self._steps += 1
        if self._steps % self._interval == 0:
            self._take(self._current())
            self.num_updates += 1

    def result(self) -> dict[str, Tensor]:
        """The average by name, each in its weight's dtype. Call it when num_updates > 0."""
        averages = self._averages(self._current())
        return {
            name: average.to(value.dtype)
            for (name, value), average in zip(self._live.items(), averages, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """All that further updates need, for load_state_dict; later updates may change it."""
        state = {name: held for name, held in vars(self).items() if name not in _FIXED}
        return {name: list(v) if isinstance(v, deque) else v for name, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of state_dict; takes the tensors as its own."""
        for name, held in state.items():
            before = getattr(self, name, None)
            kept = deque(held, before.maxlen) if isinstance(before, deque) else held
            setattr(self, name, kept)

    @property
    def _interval(self) -> int:
        return self._config.interval

    def _current(self) -> list[Tensor]:
        return [value.detach() for value in self._live.values()]

    def _take(self, weights: list[Tensor]) -> None:
        raise NotImplementedError

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        """fp32 averages, given the weights of now."""
        raise NotImplementedError


class Ema(WeightAverage):
    """e <- decay e + (1 - decay) w after every step. At the start e = w; that is, the initial
    weights where the average starts with the run."""

    def __init__(self, config: AverageConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        self._shadow = [] if config.start > 0 else [_fp32_copy(w) for w in self._current()]

    @property
    def _interval(self) -> int:
        return 1

    def _take(self, weights: list[Tensor]) -> None:
        if not self._shadow:
            self._shadow = [_fp32_copy(weight) for weight in weights]
        else:
            now = [weight.float() for weight in weights]
            torch._foreach_lerp_(self._shadow, now, 1 - self._config.decay)

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        return self._shadow


class Swa(WeightAverage):
    """Mean of the weights at every interval-th step (Izmailov et al.,
    https://arxiv.org/abs/1803.05407)."""

    def _take(self, weights: list[Tensor]) -> None:
        if not self.num_updates:
            self._sum = [_fp32_copy(weight) for weight in weights]
        else:
            torch._foreach_add_(self._sum, [weight.float() for weight in weights])

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        return [total / self.num_updates for total in self._sum]


class Lawa(WeightAverage):
    """Mean of the last `keep` snapshots and of the final weights (Kaddour,
    https://arxiv.org/abs/2209.14981; parameter-golf #675 keeps all, #1212 ten).

    Snapshots are copies on the weights' device, 4 bytes a weight each. Final weights that are a
    snapshot already count once.
    """

    def __init__(self, config: AverageConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        self._snapshots: deque[list[Tensor]] = deque(maxlen=config.keep or None)

    def _take(self, weights: list[Tensor]) -> None:
        self._snapshots.append([_fp32_copy(weight) for weight in weights])

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        sets = list(self._snapshots)
        if self._steps % self._interval:
            sets.append([weight.float() for weight in weights])
        return [torch.stack(column).mean(0) for column in zip(*sets, strict=True)]


class PublishedEma(Ema):
    """EMA whose shadow of the token embedding is bf16 (parameter-golf #1894), for replays.

    Both steps round, e <- decay e and e <- e + (1 - decay) w: differences below about 2^-9 / (1 -
    decay) of an element are lost. Everything else is averaged in fp32.
    """

    def __init__(self, config: AverageConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        self._place = list(self._live).index(EMBEDDING)
        self._rounded = self._current()[self._place].bfloat16()

    def _take(self, weights: list[Tensor]) -> None:
        now = weights[self._place].bfloat16()
        if not self.num_updates and self._config.start > 0:
            self._rounded = now
        else:
            self._rounded.mul_(self._config.decay).add_(now, alpha=1 - self._config.decay)
        super()._take(weights)

    def _averages(self, weights: list[Tensor]) -> list[Tensor]:
        averages = list(super()._averages(weights))
        averages[self._place] = self._rounded.float()
        return averages


_FIXED = ("_config", "_live")
EMBEDDING = "tok_emb.weight"
AVERAGES: dict[str, type[WeightAverage]] = {"ema": Ema, "swa": Swa, "lawa": Lawa}
"""By average.kind."""


def build_average(config: AverageConfig, state: Mapping[str, Tensor]) -> WeightAverage | None:
    """The average of a run over a model's live state; None when switched off."""
    if config.kind == "ema" and config.shadow == "bfloat16_embedding":
        return PublishedEma(config, state)
    return None if config.kind == "none" else AVERAGES[config.kind](config, state)


def _fp32_copy(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True)
