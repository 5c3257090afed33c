"""Muon against a matrix-by-matrix fp64 form, and on several ranks against one."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from trainer.distributed import Group
from trainer.optim.muon import Muon, _cost, _share_out
from trainer.optim.rules import ParamRule

SHAPES = [(8, 8), (12, 8), (8, 8), (6, 10), (8, 8), (12, 8), (6, 10)]
RULES = [
    ParamRule("a*", "muon", lr=0.05, weight_decay=0.3),
    ParamRule("b*", "muon", lr=0.02),
]
STEPS = [(1.0, 0.85), (0.6, 0.9), (0.25, 0.95)]
"""Learning-rate multiplier and momentum of each step."""


def new_params() -> list[tuple[str, nn.Parameter, ParamRule]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            f"{'ab'[i % 3 == 0]}{i}",
            nn.Parameter(torch.randn(s, generator=generator)),
            RULES[i % 3 == 0],
        )
        for i, s in enumerate(SHAPES)
    ]


def new_gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 3 for shape in SHAPES]


def run_muon(group: Group) -> list[Tensor]:
    """The matrices after all steps."""
    params = new_params()
    muon = Muon(params, num_steps=5, group=group)
    for step, (lr_mult, momentum) in enumerate(STEPS):
        for (_, param, _), gradient in zip(params, new_gradients(step), strict=True):
            param.grad = gradient
        muon.step(lr_mult, momentum)
        muon.zero_grad()
    return [param.detach() for _, param, _ in params]


def plain_muon() -> list[Tensor]:
    """The same, each matrix by itself, in fp64."""
    results = []
    for index, (_, param, rule) in enumerate(new_params()):
        weight = param.detach().double()
        momentum_buffer = torch.zeros_like(weight)
        for step, (lr_mult, momentum) in enumerate(STEPS):
            gradient = new_gradients(step)[index].double()
            momentum_buffer = momentum * momentum_buffer + gradient
            x = gradient + momentum * momentum_buffer
            x = x / (x.pow(2).sum().sqrt() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            lr = rule.lr * lr_mult
            scale = math.sqrt(max(1.0, weight.size(0) / weight.size(1)))
            weight = weight * (1 - lr * rule.weight_decay) - lr * scale * x
        results.append(weight)
    return results


def test_stacked_steps_equal_each_matrix_by_itself() -> None:
    for got, want in zip(run_muon(Group(torch.device("cpu"))), plain_muon(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_give_the_weights_of_one(size: int) -> None:
    alone = run_muon(Group(torch.device("cpu")))
    for weights in run_ranks(rank_weights, size):
        for got, want in zip(weights, alone, strict=True):
            torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-6)


def rank_weights(group: Group) -> list[list[list[float]]]:
    return [weight.tolist() for weight in run_muon(group)]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_work_is_shared_out_evenly_in_consecutive_pieces(size: int) -> None:
    costs = 36 * [_cost(torch.Size((512, 512)))] + 18 * [_cost(torch.Size((256, 512)))]
    owners = _share_out(costs, size)
    assert owners == sorted(owners) and set(owners) <= set(range(size))
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs)


def test_state_is_a_copy_that_restores_the_run() -> None:
    params = new_params()
    muon = Muon(params, num_steps=5, group=Group(torch.device("cpu")))

    def step(index: int) -> list[Tensor]:
        for (_, param, _), gradient in zip(params, new_gradients(index), strict=True):
            param.grad = gradient
        muon.step(*STEPS[index])
        return [param.detach().clone() for _, param, _ in params]

    weights = step(0)
    state = muon.state_dict()
    first = step(1)
    with torch.no_grad():
        for (_, param, _), weight in zip(params, weights, strict=True):
            param.copy_(weight)
    assert all(not torch.equal(a, b) for a, b in zip(weights, first, strict=True))
    muon.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(step(1), first, strict=True))
