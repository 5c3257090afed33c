"""Muon: momentum, orthogonalised, for the matrices of the blocks.

Jordan et al., https://kellerjordan.github.io/posts/muon, as the challenge's baseline runs it. For
each matrix W of R rows and C columns with gradient G:

    M <- mu M + G;  U = rule(G + mu M);  W <- (1 - lr wd) W - lr sqrt(max(1, R / C)) U

where the rule (trainer.optim.orthogonalization) makes its input roughly orthogonal. Matrices of one
shape are stacked and go through each product together: the baseline's fifty-four matrices have four
shapes. The orthogonalisation, which is the cost, is shared out over the ranks; momentum is kept
whole on every rank (4 bytes per weight), so a state does not depend on their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed import Group
from trainer.optim.neurons import equalize, new_moments
from trainer.optim.orthogonalization import PLAIN, UpdateRule
from trainer.optim.rules import ParamRule


@dataclass(frozen=True)
class _Stack:
    """Matrices of one shape under one rule."""

    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    rule: ParamRule
    momentum_NRC: Tensor
    own: slice
    """The matrices that this rank orthogonalises."""
    first: int
    """Where the stack begins in the buffer of all updates."""
    moments: Tensor
    """Second moments of neurons, the same on every rank."""


class Muon:
    """Construct and step on all ranks alike, with equal parameters and equal gradients."""

    def __init__(
        self,
        params: Sequence[tuple[str, nn.Parameter, ParamRule]],
        num_steps: int,
        group: Group,
        update: UpdateRule = PLAIN,
    ) -> None:
        """
        Args:
            params: name, matrix and treatment, in any order.
            num_steps: Newton-Schulz iterations.
            update: how momentum becomes an update.
        """
        self._num_steps = num_steps
        self._update_rule = update
        self._group = group
        self._dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
        self._stacks = _stack_by_shape(params, group, update.variance_beta)
        self._num_values = sum(stack.momentum_NRC.numel() for stack in self._stacks)

    @torch.no_grad()
    def step(
        self, lr_mult: float, momentum: float, extra_decay: float = 0.0, decay_mult: float = 1.0
    ) -> None:
        """Update every matrix from its gradient, which must be the same on all ranks already.

        Args:
            lr_mult: multiplier on peak learning rates.
            momentum: mu of this step.
            extra_decay: added to each rule's weight decay.
            decay_mult: multiplier on what comes out.
        """
        if not self._stacks:
            return
        # Ranks fill in their own matrices; the sum with the others' zeros gathers them.
        updates = torch.zeros(self._num_values, dtype=self._dtype, device=self._group.device)
        parts = [
            updates.narrow(0, stack.first, stack.momentum_NRC.numel()).view_as(stack.momentum_NRC)
            for stack in self._stacks
        ]
        stacks = [pair for pair in zip(self._stacks, parts, strict=True) if in_use(pair[0].params)]
        for stack, part_NRC in stacks:
            self._orthogonal_update(stack, momentum, part_NRC)
        self._group.all_reduce_sum_(updates)
        for stack, part_NRC in stacks:
            decay = (stack.rule.weight_decay + extra_decay) * decay_mult
            update = self._update_rule
            apply_update(
                stack.params, part_NRC, stack.rule.lr * lr_mult, decay, update, stack.moments
            )

    def _orthogonal_update(self, stack: _Stack, momentum: float, part_NRC: Tensor) -> None:
        gradient_NRC = torch.stack([gradient(param) for param in stack.params])
        self._update_rule.nesterov(stack.momentum_NRC, gradient_NRC, momentum)
        own = stack.own
        if own.start < own.stop:
            part_NRC[own] = self._update_rule(gradient_NRC[own], self._num_steps, self._dtype)

    def zero_grad(self) -> None:
        """Drop the matrices' gradients."""
        for stack in self._stacks:
            for param in stack.params:
                param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the momentum of each matrix by the parameter's name, and of its neurons'
        second moments where there are any."""
        return {
            name: value.clone()
            for stack in self._stacks
            for name, value in zip(stack.names, stack.momentum_NRC, strict=True)
        } | moments_of((stack.names, stack.moments) for stack in self._stacks)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict, on any number of ranks. KeyError when a matrix is missing."""
        for stack in self._stacks:
            for name, value in zip(stack.names, stack.momentum_NRC, strict=True):
                value.copy_(state[name])
            load_moments(stack.names, stack.moments, state)


def moments_of(parts: Iterable[tuple[Sequence[str], Tensor]]) -> dict[str, Tensor]:
    """A copy of second moments by "NAME:moments"; nothing where they are empty."""
    return {
        f"{name}:moments": value.clone()
        for names, moments in parts
        if moments.numel()
        for name, value in zip(names, moments, strict=True)
    }


def load_moments(names: Sequence[str], moments: Tensor, state: dict[str, Tensor]) -> None:
    """Inverse of moments_of. KeyError when one is missing."""
    for name, value in zip(names, moments, strict=True) if moments.numel() else ():
        value.copy_(state[f"{name}:moments"])


def apply_update(
    params: Sequence[nn.Parameter],
    update_NRC: Tensor,
    lr: float,
    decay: float,
    rule: UpdateRule,
    moments: Tensor,
) -> None:
    """Decay N matrices of one shape and take their orthogonalised updates off them.

    Cautious decay (slowrun): W <- W - eta X - eta wd W [X W >= 0], eta the rate times the scale of
    the matrix's update.
    """
    matrices: list[Tensor] = list(params)
    rows, columns = update_NRC.shape[1:]
    # Keeps the root-mean-square of a tall matrix's update at that of a square one.
    scale = math.sqrt(max(1.0, rows / columns))
    if moments.numel():
        update_NRC = equalize(update_NRC, moments, rule.variance_beta)
    update_NRC = update_NRC.float()
    if decay and rule.is_cautious:
        # 1 where update and weight agree in sign or either is 0, else 0.
        decaying = torch._foreach_sign(torch._foreach_mul(list(update_NRC.unbind()), matrices))
        torch._foreach_add_(decaying, 1.0)
        torch._foreach_clamp_max_(decaying, 1.0)
        torch._foreach_mul_(decaying, matrices)
        torch._foreach_add_(matrices, decaying, alpha=-lr * scale * decay)
    elif decay:
        torch._foreach_mul_(matrices, 1 - lr * decay)
    torch._foreach_add_(matrices, update_NRC.mul_(-lr * scale).unbind())


def in_use(params: Sequence[nn.Parameter]) -> bool:
    """Whether the backward pass came through these matrices: through all of a stack or none. Those
    of a recurrence that has not begun are left alone, weight decay included."""
    return params[0].grad is not None


def gradient(param: nn.Parameter) -> Tensor:
    """The gradient that a backward pass left on a matrix."""
    assert param.grad is not None, "Muon steps after a backward pass through all of a stack"
    return param.grad


def by_shape(
    params: Sequence[tuple[str, nn.Parameter, ParamRule]],
) -> dict[tuple[torch.Size, ParamRule], list[tuple[str, nn.Parameter]]]:
    """Matrices that can go through one product together: of one shape and under one rule."""
    kinds: dict[tuple[torch.Size, ParamRule], list[tuple[str, nn.Parameter]]] = {}
    for name, param, rule in params:
        assert param.ndim == 2, f"Muon is for matrices; {name} has shape {tuple(param.shape)}"
        kinds.setdefault((param.shape, rule), []).append((name, param))
    return kinds


def _stack_by_shape(
    params: Sequence[tuple[str, nn.Parameter, ParamRule]], group: Group, variance_beta: float
) -> list[_Stack]:
    kinds = by_shape(params)
    costs = [_cost(shape) for (shape, _), members in kinds.items() for _ in members]
    owners = _share_out(costs, group.size)
    stacks, first, seen = [], 0, 0
    for (shape, rule), members in kinds.items():
        mine = [i for i in range(len(members)) if owners[seen + i] == group.rank]
        whole = torch.Size((len(members), *shape))
        stacks.append(
            _Stack(
                names=tuple(name for name, _ in members),
                params=tuple(param for _, param in members),
                rule=rule,
                momentum_NRC=torch.zeros(whole, device=group.device),
                own=slice(mine[0], mine[-1] + 1) if mine else slice(0, 0),
                first=first,
                moments=new_moments(whole, variance_beta, group.device),
            )
        )
        first += len(members) * shape.numel()
        seen += len(members)
    return stacks


def _cost(shape: torch.Size) -> int:
    """Multiply-adds of one iteration, but for a constant: two products with the wide matrix and one
    of the square."""
    short, long = min(shape), max(shape)
    return short * short * (2 * long + short)


def _share_out(costs: Sequence[int], size: int) -> list[int]:
    """An owner for each of a row of jobs: consecutive pieces of about equal cost, ascending."""
    owners, before, total = [], 0.0, sum(costs)
    for cost in costs:
        owners.append(min(size - 1, int((before + cost / 2) * size / total)))
        before += cost
    return owners
