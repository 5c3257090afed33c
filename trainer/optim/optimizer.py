"""Muon and Adam behind one step, each parameter treated as the table of rules says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig, TrainConfig
from trainer.distributed import Group
from trainer.optim.muon import Muon
from trainer.optim.orthogonalization import UpdateRule
from trainer.optim.rules import ParamRule, assign, param_rules
from trainer.optim.sharded_muon import ShardedMuon

MUON: dict[str, type[Muon] | type[ShardedMuon]] = {
    "all_reduce": Muon,
    "reduce_scatter": ShardedMuon,
}
"""Forms of Muon by optim.muon_comm."""


class Optimizer:
    """What the loop steps: `average_gradients` after the backward passes, then `step`."""

    def __init__(
        self,
        muon: Muon | ShardedMuon,
        adam: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        group: Group,
    ) -> None:
        self._muon = muon
        self._adam = adam
        self._params = params
        self._group = group
        self._peak_lr = [float(group["lr"]) for group in adam.param_groups]
        self._decay = [float(group["weight_decay"]) for group in adam.param_groups]

    def average_gradients(self, extra: Sequence[Tensor], clip_norm: float) -> None:
        """Average gradients over ranks, and clip them to a global norm.

        The norm is that of the averaged gradient of all parameters, whichever way Muon's ranks
        share their work. (Published forms of parallel Muon clip each rank's own gradient.)

        Args:
            extra: further tensors to average, in place.
            clip_norm: bound of the norm; 0 = off.
        """
        muon = self._muon if isinstance(self._muon, ShardedMuon) else None
        if muon is not None:
            muon.start_reduction()
        rest = self._params if muon is None else self._adam_params()
        gradients = [param.grad for param in rest if param.grad is not None]
        self._group.all_reduce_mean_([*gradients, *extra])
        if clip_norm > 0 and muon is not None:
            self._clip_sharded(gradients, muon.own_gradients(), clip_norm)
        elif clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._params, clip_norm, foreach=True)

    def _adam_params(self) -> list[nn.Parameter]:
        return [param for group in self._adam.param_groups for param in group["params"]]

    def _clip_sharded(self, whole: list[Tensor], own_sums: list[Tensor], clip_norm: float) -> None:
        """Clip by the norm over `whole`, the same on all ranks, and every rank's `own_sums`."""
        squares = torch.zeros((), device=self._group.device)
        for own in own_sums:
            squares += (own / self._group.size).square().sum()
        self._group.all_reduce_sum_(squares)
        for gradient in whole:
            squares += gradient.square().sum()
        factor = (clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*whole, *own_sums], factor)

    def step(
        self, lr_mult: float, momentum: float, extra_decay: float = 0.0, decay_mult: float = 1.0
    ) -> None:
        """One update of every parameter that has a gradient; reads nothing back from the device.

        Args:
            lr_mult: multiplier on all peak learning rates.
            momentum: Muon's, at this step.
            extra_decay: added to the weight decay of Muon's matrices.
            decay_mult: multiplier on every weight decay.
        """
        peaks = zip(self._adam.param_groups, self._peak_lr, self._decay, strict=True)
        for group, peak, decay in peaks:
            group["lr"] = peak * lr_mult
            group["weight_decay"] = decay * decay_mult
        self._adam.step()
        self._muon.step(lr_mult, momentum, extra_decay, decay_mult)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adam.zero_grad(set_to_none=True)
        self._muon.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """A copy that later steps do not change; the same on all ranks."""
        return {"muon": self._muon.state_dict(), "adam": copy.deepcopy(self._adam.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


def build_optimizer(model: nn.Module, config: TrainConfig, group: Group) -> Optimizer:
    """The optimiser of a run, for a GPT that is on its device already. Call it on every rank."""
    params = dict(model.named_parameters())
    rules = assign(params, param_rules(config))
    muon = MUON[config.optim.muon_comm](
        [(name, params[name], rule) for name, rule in rules.items() if rule.optimizer == "muon"],
        config.optim.muon_backend_steps,
        group,
        UpdateRule.from_config(config.optim),
    )
    adam = _build_adam(params, rules, config.optim)
    return Optimizer(muon, adam, list(params.values()), group)


def _build_adam(
    params: dict[str, nn.Parameter], rules: dict[str, ParamRule], optim: OptimConfig
) -> torch.optim.Optimizer:
    """Adam with one group for each kind of rate, decay and memory. AdamW, so that a row's weight
    decay is decoupled, as it is for Muon; without weight decay the two are one."""
    alike: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, rule in rules.items():
        if rule.optimizer == "adam":
            beta1 = rule.beta1 or optim.adam_beta1
            alike.setdefault((rule.lr, rule.weight_decay, beta1), []).append(params[name])
    groups = [
        {"params": members, "lr": lr, "weight_decay": decay, "betas": (beta1, optim.adam_beta2)}
        for (lr, decay, beta1), members in alike.items()
    ]
    return torch.optim.AdamW(groups, eps=optim.adam_eps, fused=True)
