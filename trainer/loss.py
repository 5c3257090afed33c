"""What training minimises, where that is not the mean cross-entropy: weights on the tokens.

Weights depend on the model's own prediction and pass no gradient (w below is a constant to
autograd). They are part of the training objective only; scores never see them.

Legend: B rows, T tokens, V vocabulary; H is the entropy of the prediction of a token in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import LossConfig


class Objective(nn.Module):
    """The scalar that is differentiated: call with logits and targets. Has no parameters."""

    def set_progress(self, progress: float) -> None:
        """Move what follows the budget to the share of it that is spent; call before each step."""

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        raise NotImplementedError


class MileLoss(Objective):
    """mean(w ce) with w = max((1 - exp(-H))^gamma, clamp): tokens that are predicted with certainty
    count less (parameter-golf #1130, #1212).

    gamma follows the budget in a triangle: 0 at its start, `mile_gamma` at `mile_peak_frac`, 0 at
    its end. It lives in a buffer, because a Python float would be compiled into the graph. The
    weights are not normalised, so the loss, as reported, falls below the cross-entropy on the way.
    """

    gamma: Tensor

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("gamma", torch.zeros(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        self.gamma.fill_(mile_gamma(self._config, progress))

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        loss_BT, entropy_BT = loss_and_entropy(logits_BTV, targets_BT)
        weight_BT = (-torch.expm1(-entropy_BT)) ** self.gamma
        return (weight_BT.clamp(min=self._config.mile_clamp_min) * loss_BT).mean()


class EntropyWeightedLoss(Objective):
    """mean(w ce) / mean(w) with w = clamp(0.5 + H / mean(H), 0.5, 1.5): uncertain tokens count
    more (parameter-golf #675).

    The published form does not divide by mean(w): large weights meet large losses, so that the
    mean grows and the learning rate is no longer what it says. `normalise=False` replays it.
    """

    def __init__(self, normalise: bool) -> None:
        super().__init__()
        self._normalise = normalise

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        loss_BT, entropy_BT = loss_and_entropy(logits_BTV, targets_BT)
        weight_BT = (0.5 + entropy_BT / entropy_BT.mean().clamp(min=1e-12)).clamp(0.5, 1.5)
        loss = (weight_BT * loss_BT).mean()
        return loss / weight_BT.mean() if self._normalise else loss


class AheadLoss(Objective):
    """sum over k of w_k mean_t -ln p_t(y_(t+k)): one head that is also asked for the tokens after
    the next (slowrun, its tiny track).

    A row's last places have no such token and are left out; the published kernel takes the first
    ones of the next row. Weights live in a buffer, because Python floats would be compiled in.
    """

    weights: Tensor

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("weights", torch.tensor(config.ahead), persistent=False)

    def set_progress(self, progress: float) -> None:
        for place, weight in enumerate(ahead_weights(self._config, progress)):
            self.weights[place].fill_(weight)

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        log_z_BT = torch.logsumexp(logits_BTV, dim=-1)
        total = logits_BTV.new_zeros(())
        for ahead, weight in enumerate(self.weights):
            tokens_BS1 = targets_BT[:, ahead:, None]
            num_places = tokens_BS1.size(1)
            picked_BS = logits_BTV[:, :num_places].gather(-1, tokens_BS1)[..., 0]
            total = total + weight * (log_z_BT[:, :num_places] - picked_BS).mean()
        return total


def ahead_weights(config: LossConfig, progress: float) -> list[float]:
    """Weights at a share of the budget: each of the far tokens falls to 0 over an equal part of
    ahead_until, the farthest first."""
    weights = list(config.ahead)
    part = config.ahead_until / max(1, len(weights) - 1)
    for place in range(1, len(weights)):
        begin = (len(weights) - 1 - place) * part
        weights[place] *= 1.0 - min(1.0, max(0.0, (progress - begin) / part))
    return weights


def build_objective(config: LossConfig) -> Objective | None:
    """The objective of a run; None = the mean cross-entropy, which the model computes itself."""
    match config.kind:
        case "cross_entropy":
            return None
        case "mile":
            return MileLoss(config)
        case "ahead":
            return AheadLoss(config)
        case "entropy":
            return EntropyWeightedLoss(normalise=True)
        case "entropy_published":
            return EntropyWeightedLoss(normalise=False)


def mile_gamma(config: LossConfig, progress: float) -> float:
    """gamma at a share of the budget."""
    peak = config.mile_peak_frac
    rising = progress / peak if peak > 0 else 1.0
    falling = (1.0 - progress) / (1.0 - peak) if peak < 1 else 1.0
    return config.mile_gamma * max(0.0, min(rising, falling))


def nats_of(logits_BTV: Tensor, tokens_BTK: Tensor) -> Tensor:
    """-ln p of K tokens for each place, [B, T, K]. Compiled, [B, T, V] is never written out."""
    log_z_BT1 = torch.logsumexp(logits_BTV, dim=-1, keepdim=True)
    return log_z_BT1 - logits_BTV.gather(-1, tokens_BTK)


def loss_and_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target and entropy of each prediction (no gradient), nats, [B, T]."""
    log_p_BTV = torch.log_softmax(logits_BTV, dim=-1)
    loss_BT = -log_p_BTV.gather(-1, targets_BT[..., None])[..., 0]
    fixed_BTV = log_p_BTV.detach()
    return loss_BT, -(fixed_BTV.exp() * fixed_BTV).sum(-1)
