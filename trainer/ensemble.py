"""Checkpoints of one run, scored together: the mean of their probabilities (slowrun 3.7).

    p(y_t) = sum_k w_k softmax(logits_k)[y_t],  w_k = 1 / K  or proportional to 1 .. K

The K checkpoints, newest last and heaviest, are the last ones of one for every epoch (or cycle, or
every evaluate.ensemble_every steps) and one of the weights at the end of training. They lie in the
run's folder as fp32, whole; the clock stands while they are written. A mixture of distributions is
a distribution, so the score is a fair one; but it belongs to K checkpoints and not to the artifact,
so it is reported beside the score.

Only the probability of each target is kept, as a logarithm: passes over the checkpoints, batches
inside. (Published scripts clamp the mean at 1e-40; logarithms need no clamp.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.errors import ArtifactError
from trainer.evaluate import bits_per_byte
from trainer.evaluate.scorer import EvalResult, LossModel
from trainer.schedule import cycles_done
from trainer.workspace import Workspace, load_weights

WEIGHTS: dict[str, Callable[[int], list[float]]] = {
    "equal": lambda size: [1 / size] * size,
    "weighted": lambda size: [2 * k / (size * (size + 1)) for k in range(1, size + 1)],
}
"""Of K checkpoints, oldest first, by evaluate.ensemble; each row sums to 1."""
MODES = {"equal": ("equal",), "weighted": ("weighted",), "both": ("equal", "weighted")}


@dataclass
class Ensemble:
    """The kept checkpoints of a run; all methods are for all ranks together."""

    folder: Path
    """Used on rank 0 only."""
    work: Workspace
    steps: list[int] = field(default_factory=list)
    """Optimiser steps that each kept checkpoint had seen, oldest first."""
    last: int = 0
    """Number of whole epochs, cycles or intervals at the last step that was looked at."""

    def is_due(self, steps: int, progress: float) -> bool:
        """Whether an epoch, a cycle, or evaluate.ensemble_every steps ended with the step before.

        Args:
            progress: share of the budget that is spent.
        """
        config = self.work.config
        before = self.last
        if config.evaluate.ensemble_every:
            self.last = steps // config.evaluate.ensemble_every
        elif config.evaluate.ensemble_at == "cycles":
            self.last = cycles_done(config.schedule, progress)
        else:
            self.last = int(self.work.loader.epoch)
        return self.last > before

    def take(self, steps: int) -> None:
        """Write the weights of now; drop the oldest file when there are too many."""
        if steps in self.steps:
            return
        work = self.work
        path = self._path(steps)

        def write() -> None:
            state = work.model.state_dict()
            floats = {
                name: value.float() if value.is_floating_point() else value
                for name, value in state.items()
            }
            weights = {name: value.cpu().numpy() for name, value in floats.items()}
            try:
                checkpoint.write(path, weights, work.config)
            except OSError as error:
                raise ArtifactError(
                    f"{path}: cannot be written ({error.strerror}); make room, or lower "
                    "evaluate.ensemble_size"
                ) from None

        work.group.on_main(write)
        self.steps.append(steps)
        while len(self.steps) > work.config.evaluate.ensemble_size:
            self._drop(self.steps.pop(0))

    def score(self) -> dict[str, EvalResult]:
        """Nats and bits per byte of the ensemble, by "ensemble_" and its weights; the model holds
        the last checkpoint afterwards."""
        modes = MODES[self.work.config.evaluate.ensemble]
        passes = {mode: MixturePass(WEIGHTS[mode](len(self.steps))) for mode in modes}
        scores = {}
        for index, steps in enumerate(self.steps):
            load_weights(self.work.model, str(self._path(steps)), self.work.group)
            if index + 1 < len(self.steps):
                single = self._evaluate(_Recording(self.work.forward, list(passes.values()), index))
                self.work.log(f"checkpoint of step {steps}: {single.val_loss:.6f} nats")
                continue
            for mode, mixture in passes.items():
                mixed = self._evaluate(_Mixing(self.work.forward, mixture, index))
                scores[f"ensemble_{mode}"] = mixed
        return scores

    def _evaluate(self, model: LossModel) -> EvalResult:
        work = self.work
        config = work.config.evaluate.plain()
        return bits_per_byte.evaluate(model, work.dataset, work.byte_table, config, work.group)

    def remove(self) -> None:
        """Delete the files, at the end of the run."""
        while self.steps:
            self._drop(self.steps.pop())

    def _path(self, steps: int) -> Path:
        return self.folder / f"ensemble_{steps:07d}.bin"

    def _drop(self, steps: int) -> None:
        self.work.group.on_main(lambda: self._path(steps).unlink(missing_ok=True))


class MixturePass:
    """log sum_k w_k p_k of the targets of each batch, over the passes so far."""

    def __init__(self, weights: list[float]) -> None:
        self._log_weights = [math.log(weight) for weight in weights]
        self._sums: list[Tensor] = []

    def add(self, batch: int, index: int, nats_BT: Tensor) -> Tensor:
        """Take in what checkpoint `index` gives the targets of a batch; returns the sum so far."""
        logs_BT = self._log_weights[index] - nats_BT
        if batch == len(self._sums):
            self._sums.append(logs_BT)
        else:
            self._sums[batch] = torch.logaddexp(self._sums[batch], logs_BT)
        return self._sums[batch]


class _Recording:
    """A model whose losses of a pass, batch after batch, go into mixtures."""

    def __init__(
        self, forward: Callable[..., Tensor], mixtures: list[MixturePass], index: int
    ) -> None:
        self._forward, self._mixtures, self._index = forward, mixtures, index
        self._batch = 0

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        nats_BT = self._forward(tokens_BT, targets_BT, reduction=reduction)
        self._sums = [mix.add(self._batch, self._index, nats_BT) for mix in self._mixtures]
        self._batch += 1
        return nats_BT


class _Mixing(_Recording):
    """The last pass, whose losses are those of the mixture."""

    def __init__(self, forward: Callable[..., Tensor], mixture: MixturePass, index: int) -> None:
        super().__init__(forward, [mixture], index)

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        super().__call__(tokens_BT, targets_BT, reduction)
        return -self._sums[0]
