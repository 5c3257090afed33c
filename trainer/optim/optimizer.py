"""Muon and Adam behind one step, each parameter treated as the table of rules says."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trainer.config import OptimConfig, TrainConfig
from trainer.distributed import Group
from trainer.optim.muon import Muon
from trainer.optim.rules import ParamRule, assign, param_rules


class Optimizer:
    """What the loop steps. Gradients must be averaged over ranks, and clipped where that is
    wanted, before `step`."""

    def __init__(self, muon: Muon, adam: torch.optim.Optimizer) -> None:
        self._muon = muon
        self._adam = adam
        self._peak_lr = [float(group["lr"]) for group in adam.param_groups]

    def step(self, lr_mult: float, momentum: float) -> None:
        """One update of every parameter that has a gradient; reads nothing back from the device.

        Args:
            lr_mult: multiplier on all peak learning rates.
            momentum: Muon's, at this step.
        """
        for group, peak in zip(self._adam.param_groups, self._peak_lr, strict=True):
            group["lr"] = peak * lr_mult
        self._adam.step()
        self._muon.step(lr_mult, momentum)

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
    muon = Muon(
        [(name, params[name], rule) for name, rule in rules.items() if rule.optimizer == "muon"],
        config.optim.muon_backend_steps,
        group,
    )
    return Optimizer(muon, _build_adam(params, rules, config.optim))


def _build_adam(
    params: dict[str, nn.Parameter], rules: dict[str, ParamRule], optim: OptimConfig
) -> torch.optim.Optimizer:
    """Adam with one group for each rule. AdamW, so that a row's weight decay is decoupled, as it is
    for Muon; without weight decay the two are one."""
    rows = dict.fromkeys(rule for rule in rules.values() if rule.optimizer == "adam")
    groups = [
        {
            "params": [params[name] for name, rule in rules.items() if rule == row],
            "lr": row.lr,
            "weight_decay": row.weight_decay,
        }
        for row in rows
    ]
    return torch.optim.AdamW(
        groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps, fused=True
    )
