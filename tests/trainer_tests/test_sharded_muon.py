"""Parallel Muon on real ranks, each with gradients of its own, against one rank with their mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer_tests.test_muon import SHAPES, STEPS, new_gradients, new_params, plain_muon
from trainer.attention import select_backend
from trainer.config import TrainConfig
from trainer.distributed import Group
from trainer.model.gpt import GPT
from trainer.optim import build_optimizer
from trainer.optim.muon import Muon
from trainer.optim.sharded_muon import ShardedMuon

ONE = Group(torch.device("cpu"))


def local_gradients(step: int, rank: int, size: int) -> list[Tensor]:
    """Gradients of one rank; their mean over ranks is that of `mean_gradients`."""
    generator = torch.Generator().manual_seed(100 + step)
    parts = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(6)]
    share = 6 // size
    own = parts[rank * share : (rank + 1) * share]
    return [torch.stack(column).mean(0) for column in zip(*own, strict=True)]


def run_sharded(group: Group, with_restore: bool = False) -> dict[str, Any]:
    """Weights and the whole momentum after all steps; perhaps through a saved state."""
    params = new_params()
    muon = ShardedMuon(params, num_steps=5, group=group)
    for step, (lr_mult, momentum) in enumerate(STEPS):
        local = local_gradients(step, group.rank, group.size)
        for (_, param, _), gradient in zip(params, local, strict=True):
            param.grad = gradient
        muon.start_reduction()
        muon.step(lr_mult, momentum)
        muon.zero_grad()
        if with_restore:
            state = muon.state_dict()
            muon = ShardedMuon(params, num_steps=5, group=group)
            muon.load_state_dict(state)
    return {
        "weights": [param.detach().tolist() for _, param, _ in params],
        "momentum": {name: value.tolist() for name, value in muon.state_dict().items()},
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Muon itself on one rank, with the mean gradients."""
    params = new_params()
    muon = Muon(params, num_steps=5, group=ONE)
    for step, (lr_mult, momentum) in enumerate(STEPS):
        for (_, param, _), gradient in zip(params, local_gradients(step, 0, 1), strict=True):
            param.grad = gradient
        muon.step(lr_mult, momentum)
    return {
        "weights": [param.detach().tolist() for _, param, _ in params],
        "momentum": {name: value.tolist() for name, value in muon.state_dict().items()},
    }


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    for one, other in zip(got["weights"], want["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)
    assert got["momentum"].keys() == want["momentum"].keys()
    for name, value in want["momentum"].items():
        torch.testing.assert_close(
            torch.tensor(got["momentum"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6
        )


def test_one_rank_does_what_the_equations_say() -> None:
    params = new_params()
    muon = ShardedMuon(params, num_steps=5, group=ONE)
    for step, (lr_mult, momentum) in enumerate(STEPS):
        for (_, param, _), gradient in zip(params, new_gradients(step), strict=True):
            param.grad = gradient
        muon.step(lr_mult, momentum)
    for (_, param, _), want in zip(params, plain_muon(), strict=True):
        torch.testing.assert_close(param.detach().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_with_gradients_of_their_own_do_what_one_does(
    alone: dict[str, Any], size: int
) -> None:
    answers = [run_sharded(ONE)] if size == 1 else run_ranks(run_sharded, size)
    for answer in answers:
        assert_same(answer, alone)
        assert answer["weights"] == answers[0]["weights"]  # to the bit, or ranks drift apart


@pytest.mark.parametrize("size", [1, 3])
def test_a_saved_state_holds_the_whole_momentum(alone: dict[str, Any], size: int) -> None:
    answers = [run_sharded(ONE, True)] if size == 1 else run_ranks(run_sharded, size, True)
    for answer in answers:
        assert_same(answer, alone)


CONFIG = TrainConfig().with_overrides(
    {
        "model.vocab_size": 23,
        "model.num_layers": 3,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "optim.adam_eps": 1e-3,
    }
)


def train_model(group: Group, comm: str, clip_norm: float) -> list[list[float]]:
    """A whole model after three steps, each rank on its own rows."""
    torch.manual_seed(1)
    model = GPT(CONFIG.model, select_backend("sdpa", "cpu", lambda line: None))
    with torch.no_grad():  # no zeros: an orthogonalised gradient of about 0 is about noise
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    optimizer = build_optimizer(model, CONFIG.with_overrides({"optim.muon_comm": comm}), group)
    rows = torch.randint(23, (6, 13), generator=torch.Generator().manual_seed(2))
    share = 6 // group.size
    own = rows[group.rank * share : (group.rank + 1) * share]
    losses = []
    for _ in range(3):
        loss = model(own[:, :-1], own[:, 1:])
        loss.backward()
        mean_loss = loss.detach().clone()
        optimizer.average_gradients([mean_loss], clip_norm)
        optimizer.step(1.0, 0.9, extra_decay=0.5)
        optimizer.zero_grad()
        losses.append(float(mean_loss))
    return [losses, *(param.detach().flatten().tolist() for param in model.parameters())]


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("comm", ["all_reduce", "reduce_scatter"])
def test_a_whole_step_with_clipping_is_that_of_one_rank(comm: str, clip_norm: float) -> None:
    want = train_model(ONE, "all_reduce", clip_norm)
    answers = [train_model(ONE, comm, clip_norm), *run_ranks(train_model, 2, comm, clip_norm)]
    for answer in answers:
        for got, expected in zip(answer, want, strict=True):
            torch.testing.assert_close(
                torch.tensor(got), torch.tensor(expected), rtol=2e-4, atol=2e-5
            )


def test_clipping_binds_in_the_case_above() -> None:
    assert train_model(ONE, "all_reduce", 0.05) != train_model(ONE, "all_reduce", 0.0)
