"""QAT-lite: late in the run, chosen matrices are drawn towards their codes (parameter-golf #1894).

    P = sum_l w_l |W_l - Q(W_l)|^2 / sum_l w_l,   Q: SDClip, a constant to the gradient

is added to the loss times a strength that ramps up. P depends on weights alone, so its gradient is
written out here and added once a step to what the backward passes left: no graph knows of it, and
none is compiled anew when it begins. It is the same on every rank, as the weights are, so that
averaging over ranks leaves it as it is. The reported loss is without it.

The published script takes the mean over the 131,072 or 262,144 weights of a matrix. That gradient
is about 1e-10 an element, five orders below the loss's own: `reduction = "mean"` replays it.
"pull" leaves the optimiser out: W <- W - strength w_l (W - Q(W)) after the step, which neither
clipping nor Muon's orthogonalisation rescales. The grid follows the weights, and rounding widens a
row by up to a seventieth of its variance at 6 bits and 12.85 sigmas, so that many strong pulls
without a gradient against them blow a row up.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from trainer.config.qat_lite import QatLiteConfig
from trainer.quantize.rules import count_layers
from trainer.quantize.sdclip import sd_clip_round, sd_clip_scale

TARGETS = {
    "qk": ("*.attn.q.weight", "*.attn.k.weight"),
    "qk_out": ("*.attn.q.weight", "*.attn.k.weight", "*.attn.out.weight"),
    "attn": ("*.attn.*.weight",),
    "all": ("*.weight",),
}
"""Names of matrices of the blocks, by qat_lite.targets."""
SHARES = {"squared": (1.0, 0.0), "clip": (0.0, 1.0), "hybrid": (0.5, 0.5)}
"""Of the distance to the codes, and of what lies beyond the clip, by qat_lite.kind."""


class QatLite:
    """Call `add_gradients` between the backward passes and the optimiser, `pull` after it."""

    def __init__(self, model: nn.Module, config: QatLiteConfig) -> None:
        self._config = config
        self._weights: list[tuple[nn.Parameter, float]] = []
        """Matrices and what they weigh."""
        if config.kind == "none":
            return
        parameters = dict(model.named_parameters())
        num_layers = count_layers(parameters)
        for name, parameter in parameters.items():
            layer = _layer_of(name)
            chosen = any(fnmatchcase(name, pattern) for pattern in TARGETS[config.targets])
            if chosen and parameter.ndim == 2 and layer >= config.first_layer:
                weight = ((layer + 1) / num_layers) ** config.depth_power
                self._weights.append((parameter, weight))

    @torch.no_grad()
    def add_gradients(self, step: int, progress: float) -> None:
        """Add the penalty's gradient to the gradients of this step, on every rank alike.

        Args:
            step: counted from 0.
            progress: share of the budget at which the step began.
        """
        if self._config.kind in ("none", "pull"):
            return
        total = sum(weight for _, weight in self._weights)
        for parameter, strength in self._acting(step, progress):
            if parameter.grad is not None:
                count = parameter.numel() if self._config.reduction == "mean" else 1
                direction = self._direction(parameter)
                parameter.grad.add_(direction, alpha=2 * strength / (total * count))

    @torch.no_grad()
    def pull(self, step: int, progress: float) -> None:
        """Move the weights towards their codes; arguments as those of add_gradients."""
        if self._config.kind != "pull":
            return
        for parameter, strength in self._acting(step, progress):
            parameter.sub_(self._distance(parameter), alpha=strength)

    def _acting(self, step: int, progress: float) -> Iterator[tuple[nn.Parameter, float]]:
        """Matrices and strengths of this step; none where it does not act."""
        config = self._config
        if progress < config.start or step % config.every:
            return
        ramp = (progress - config.start) / (1.0 - config.start)
        for parameter, weight in self._weights:
            yield parameter, config.strength * ramp * weight

    def _direction(self, weights_RC: Tensor) -> Tensor:
        """Half the gradient of a matrix's sum of squares."""
        of_distance, of_clip = SHARES[self._config.kind]
        direction_RC = torch.zeros_like(weights_RC)
        if of_distance:
            direction_RC.add_(self._distance(weights_RC), alpha=of_distance)
        if of_clip:
            direction_RC.add_(self._beyond_clip(weights_RC), alpha=of_clip)
        return direction_RC

    def _distance(self, weights_RC: Tensor) -> Tensor:
        return weights_RC - sd_clip_round(weights_RC, self._config.bits, self._config.clip_sigmas)

    def _beyond_clip(self, weights_RC: Tensor) -> Tensor:
        """relu(|w| - clip) with the sign of w; 0 everywhere under a clip as wide as 12.85."""
        scales_R = sd_clip_scale(weights_RC, self._config.bits, self._config.clip_sigmas)
        clip_R1 = scales_R[:, None] * ((1 << (self._config.bits - 1)) - 1)
        return weights_RC - weights_RC.clamp(-clip_R1, clip_R1)


def _layer_of(name: str) -> int:
    """The block of a parameter; -1 outside the blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1
