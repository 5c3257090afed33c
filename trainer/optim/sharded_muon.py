"""Parallel Muon: each rank keeps, receives and orthogonalises its share of the matrices only.

The same update as `Muon`, with another division of labour (parameter-golf #399, #549, #1212).
Matrices of one shape form a bank of N; R ranks own N / R of them each, rounded up. Per bank: the
local gradients are reduce-scattered, so that a rank receives the mean gradient of its own; it
updates their momentum and orthogonalises; the results are gathered. All banks' gradients travel at
once, largest first, and results travel while the next bank is computed. Against averaging all
gradients everywhere, a rank receives half as much before the step, and keeps 1 / R of the momentum.

The published scripts leave the momentum, being apart on every rank, out of their saved state, so
that their warm-up steps are not wholly undone. Here a state holds the whole momentum by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed import Group, Pending
from trainer.optim.muon import (
    apply_update,
    by_shape,
    gradient,
    in_use,
    load_moments,
    moments_of,
)
from trainer.optim.neurons import new_moments
from trainer.optim.orthogonalization import PLAIN, UpdateRule
from trainer.optim.rules import ParamRule


@dataclass
class _Bank:
    """N matrices of one shape under one rule; shards are of K = N / ranks, rounded up."""

    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    rule: ParamRule
    momentum_KRC: Tensor
    """Of this rank's matrices only; zeros where the last ranks have fewer than K."""
    moments: Tensor
    """Second moments of the neurons of all N: small, and updated from the gathered results."""
    pending: Pending | None = None
    """This rank's summed gradients, between `start_reduction` and `step`."""

    def padded_gradients(self, size: int) -> Tensor:
        """[K * size, R, C]: the local gradients, and zeros up to a multiple of the ranks."""
        gradients = [gradient(param) for param in self.params]
        missing = len(self.momentum_KRC) * size - len(gradients)
        gradients += [torch.zeros_like(gradients[0])] * missing
        return torch.stack(gradients)


class ShardedMuon:
    """Like Muon, but gradients are those of this rank's own backward pass: nobody needs to average
    them before. State is gathered from and cut for any number of ranks."""

    def __init__(
        self,
        params: Sequence[tuple[str, nn.Parameter, ParamRule]],
        num_steps: int,
        group: Group,
        update: UpdateRule = PLAIN,
    ) -> None:
        self._num_steps = num_steps
        self._update_rule = update
        self._group = group
        self._dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
        banks = []
        for (shape, rule), members in by_shape(params).items():
            share = -(-len(members) // group.size)
            banks.append(
                _Bank(
                    names=tuple(name for name, _ in members),
                    params=tuple(param for _, param in members),
                    rule=rule,
                    momentum_KRC=torch.zeros(share, *shape, device=group.device),
                    moments=new_moments(
                        torch.Size((len(members), *shape)), update.variance_beta, group.device
                    ),
                )
            )
        self._banks = sorted(banks, key=lambda bank: -bank.momentum_KRC.numel())

    @torch.no_grad()
    def start_reduction(self) -> None:
        """Send every bank's gradients on their way, right after the backward pass."""
        for bank in self._used():
            bank.pending = self._group.reduce_scatter_sum(bank.padded_gradients(self._group.size))

    def own_gradients(self) -> list[Tensor]:
        """Sums over ranks of the gradients of this rank's matrices, on their way since
        start_reduction. Scaling them in place scales the step's gradients."""
        return [bank.pending.wait() for bank in self._banks if bank.pending is not None]

    @torch.no_grad()
    def step(
        self, lr_mult: float, momentum: float, extra_decay: float = 0.0, decay_mult: float = 1.0
    ) -> None:
        """Update every matrix; arguments as those of Muon.step."""
        banks = self._used()
        if any(bank.pending is None for bank in banks):
            self.start_reduction()
        results = [self._group.all_gather(self._update(bank, momentum)) for bank in banks]
        for bank, result in zip(banks, results, strict=True):
            update_NRC = result.wait()[: len(bank.params)]
            decay = (bank.rule.weight_decay + extra_decay) * decay_mult
            lr, rule = bank.rule.lr * lr_mult, self._update_rule
            apply_update(bank.params, update_NRC, lr, decay, rule, bank.moments)

    def _used(self) -> list[_Bank]:
        return [bank for bank in self._banks if in_use(bank.params)]

    def _update(self, bank: _Bank, momentum: float) -> Tensor:
        """Orthogonalised updates of this rank's share of a bank, [K, R, C]."""
        assert bank.pending is not None
        gradient_KRC = bank.pending.wait().div_(self._group.size)
        bank.pending = None
        self._update_rule.nesterov(bank.momentum_KRC, gradient_KRC, momentum)
        return self._update_rule(gradient_KRC, self._num_steps, self._dtype).contiguous()

    def zero_grad(self) -> None:
        """Drop the matrices' gradients."""
        for bank in self._banks:
            bank.pending = None
            for param in bank.params:
                param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the momentum of every matrix by its name, gathered (a collective)."""
        return {
            name: value.clone()
            for bank in self._banks
            for name, value in zip(
                bank.names, self._group.all_gather(bank.momentum_KRC).wait(), strict=False
            )
        } | moments_of((bank.names, bank.moments) for bank in self._banks)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict, on any number of ranks. KeyError when a matrix is missing."""
        for bank in self._banks:
            first = self._group.rank * len(bank.momentum_KRC)
            own = bank.names[first : first + len(bank.momentum_KRC)]
            for name, value in zip(own, bank.momentum_KRC, strict=False):
                value.copy_(state[name])
            load_moments(bank.names, bank.moments, state)
