"""Muon's step of slowrun against a matrix-by-matrix fp64 form written from its five lines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from trainer.config import OptimConfig
from trainer.distributed import Group
from trainer.optim.muon import Muon
from trainer.optim.neurons import equalize, new_moments
from trainer.optim.orthogonalization import POLAR_EXPRESS, UpdateRule
from trainer.optim.rules import ParamRule
from trainer.optim.sharded_muon import ShardedMuon

ONE = Group(torch.device("cpu"))
SHAPES = [(6, 6), (9, 4), (6, 6), (3, 8), (9, 4)]
RULE = ParamRule("*", "muon", lr=0.05, weight_decay=1.3)
OPTIM = OptimConfig(
    orthogonalization="polar_express",
    muon_row_normalize=True,
    muon_momentum_average=True,
    muon_variance_beta=0.95,
    muon_cautious_decay=True,
)
STEPS = [(1.0, 0.85, 1.0), (0.8, 0.90, 0.65), (0.3, 0.95, 1.5)]
"""Learning-rate multiplier, momentum, decay multiplier."""


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def started(kind: type[Muon] | type[ShardedMuon], group: Group, optim: OptimConfig):  # type: ignore[no-untyped-def]
    params = [
        (f"p{i}", nn.Parameter(matrix.clone()), RULE) for i, matrix in enumerate(gradients(99))
    ]
    return params, kind(params, 5, group, UpdateRule.from_config(optim))


def stepped(kind: type[Muon] | type[ShardedMuon], group: Group, restore: bool) -> list[Tensor]:
    params, muon = started(kind, group, OPTIM)
    for step, (lr_mult, momentum, decay_mult) in enumerate(STEPS):
        for (_, param, _), gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient
        muon.step(lr_mult, momentum, 0.0, decay_mult)
        muon.zero_grad()
        if restore:
            state = muon.state_dict()
            muon = kind(params, 5, group, UpdateRule.from_config(OPTIM))
            muon.load_state_dict(state)
    return [param.detach() for _, param, _ in params]


def plain() -> list[Tensor]:
    results = []
    for index, weight in enumerate(gradients(99)):
        w = weight.double()
        n, m = w.shape
        buffer, second = torch.zeros_like(w), torch.zeros(n if n >= m else m, dtype=torch.float64)
        for step, (lr_mult, mu, decay_mult) in enumerate(STEPS):
            g = gradients(step)[index].double()
            buffer = mu * buffer + (1 - mu) * g
            u = (1 - mu) * g + mu * buffer
            u = torch.stack([row / max(float(row.norm()), 1e-7) for row in u])
            x = u / u.norm()
            left, values, right = torch.linalg.svd(x, full_matrices=False)
            for a, b, c in POLAR_EXPRESS:
                values = a * values + b * values**3 + c * values**5
            x = left @ torch.diag(values) @ right
            squares = x.square().mean(1) if n >= m else x.square().mean(0)
            second = 0.95 * second + 0.05 * squares
            scaled = x / (second.sqrt()[:, None] if n >= m else second.sqrt()[None, :])
            x = scaled * x.norm() / scaled.norm()
            eta = 0.05 * lr_mult * math.sqrt(max(1, n / m))
            decays = (x * w >= 0).double()
            w = w - eta * x - eta * 1.3 * decay_mult * w * decays
        results.append(w)
    return results


@pytest.mark.parametrize("kind", [Muon, ShardedMuon])
@pytest.mark.parametrize("restore", [False, True])
def test_steps_equal_the_published_lines(
    kind: type[Muon] | type[ShardedMuon], restore: bool
) -> None:
    for got, want in zip(stepped(kind, ONE, restore), plain(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


def test_two_ranks_give_the_weights_of_one() -> None:
    alone = stepped(Muon, ONE, restore=False)
    for weights in run_ranks(rank_weights, 2):
        for got, want in zip(weights, alone, strict=True):
            torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-5)


def rank_weights(group: Group) -> list[list[list[float]]]:
    return [weight.tolist() for weight in stepped(Muon, group, restore=True)]


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)])
def test_equal_neurons_keep_the_norm_of_the_update(shape: tuple[int, int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update[:, 0] *= 50
    moments = new_moments(torch.Size(shape), 0.9, torch.device("cpu"))
    equal = equalize(update, moments, 0.9)
    norms = [torch.linalg.matrix_norm(x) for x in (update, equal)]
    torch.testing.assert_close(norms[1], norms[0])
    axis = 2 if shape[1] >= shape[2] else 1
    sizes = equal.square().mean(axis)  # after one step all neurons are equally large
    torch.testing.assert_close(sizes, sizes[:, :1].expand_as(sizes))


def test_cautious_decay_never_acts_where_update_and_weight_differ_in_sign() -> None:
    without = OPTIM.model_copy(update={"muon_cautious_decay": False})
    results = []
    for optim, decay_mult in ((OPTIM, 1.0), (without, 0.0)):
        params, muon = started(Muon, ONE, optim)
        before = [param.detach().clone() for _, param, _ in params]
        for (_, param, _), gradient in zip(params, gradients(0), strict=True):
            param.grad = gradient
        muon.step(1.0, 0.9, 0.0, decay_mult)
        results.append([param.detach() for _, param, _ in params])
    for decayed, moved, start in zip(*results, before, strict=True):
        towards_zero = (start - moved) * start >= 0
        assert 0 < towards_zero.sum() < towards_zero.numel()
        assert torch.equal(decayed[~towards_zero], moved[~towards_zero])
        assert (decayed[towards_zero] != moved[towards_zero]).all()


def test_off_leaves_muon_and_its_state_as_they_were() -> None:
    _, muon = started(Muon, ONE, OptimConfig())
    assert not any(name.endswith("moments") for name in muon.state_dict())
