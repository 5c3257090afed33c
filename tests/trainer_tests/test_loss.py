"""Objectives against their equations in fp64, token by token; where they count and where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention import select_backend
from trainer.config import LossConfig, TrainConfig
from trainer.distributed import Group
from trainer.loss import MileLoss, build_objective, loss_and_entropy, mile_gamma
from trainer.model.gpt import GPT
from trainer.workspace import build_model

Weights = Callable[[list[float]], list[float]]
"""Entropies of all tokens -> weights of all tokens."""


def logits_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * 3
    logits[0, 0] = torch.tensor([60.0, *6 * [0.0]])  # as good as certain
    return logits.requires_grad_(), torch.randint(7, (3, 5), generator=generator)


def plain(logits: Tensor, targets: Tensor, weights: Weights, normalise: bool) -> Tensor:
    """sum(w ce) / n, or / sum(w), spelled out."""
    losses, entropies = [], []
    for row, target in zip(logits.flatten(0, 1), targets.flatten(), strict=True):
        p = torch.exp(row - row.max())
        p = p / p.sum()
        losses.append(-torch.log(p[target]))
        entropies.append(-sum(x * math.log(x) for x in p.tolist() if x > 0))
    w = weights(entropies)
    total = sum((a * b for a, b in zip(w, losses, strict=True)), torch.zeros(()).double())
    return total / (sum(w) if normalise else len(w))


def mile(gamma: float, clamp: float) -> Weights:
    return lambda entropies: [max((1 - math.exp(-h)) ** gamma, clamp) for h in entropies]


def by_entropy(entropies: list[float]) -> list[float]:
    mean = sum(entropies) / len(entropies)
    return [min(max(0.5 + h / mean, 0.5), 1.5) for h in entropies]


@pytest.mark.parametrize(
    ("overrides", "progress", "weights", "normalise"),
    [
        ({"kind": "mile"}, 0.4, mile(0.75, 0.2), False),
        ({"kind": "mile"}, 0.1, mile(0.75 / 4, 0.2), False),
        ({"kind": "mile", "mile_clamp_min": 0.6, "mile_gamma": 2.0}, 0.7, mile(1.0, 0.6), False),
        ({"kind": "mile"}, 0.0, lambda entropies: [1.0] * len(entropies), False),
        ({"kind": "mile"}, 1.0, lambda entropies: [1.0] * len(entropies), False),
        ({"kind": "entropy"}, 0.3, by_entropy, True),
        ({"kind": "entropy_published"}, 0.3, by_entropy, False),
    ],
)
def test_objectives_are_their_equations(
    overrides: dict[str, Any], progress: float, weights: Weights, normalise: bool
) -> None:
    logits, targets = logits_and_targets()
    objective = build_objective(LossConfig(**overrides))
    assert objective is not None
    objective.double().set_progress(progress)
    got = objective(logits, targets)
    (got_gradient,) = torch.autograd.grad(got, logits)
    want = plain(logits, targets, weights, normalise)
    (want_gradient,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-9, atol=1e-12)


def test_the_exponent_is_the_published_triangle() -> None:
    config = LossConfig(mile_gamma=0.75, mile_peak_frac=0.4)
    values = [mile_gamma(config, p) for p in (0.0, 0.2, 0.4, 0.7, 1.0)]
    assert values == pytest.approx([0.0, 0.375, 0.75, 0.375, 0.0])
    edges = [LossConfig(mile_gamma=1.0, mile_peak_frac=peak) for peak in (0.0, 1.0)]
    assert [mile_gamma(edges[0], p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    assert [mile_gamma(edges[1], p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]


def test_entropy_and_loss_survive_certainty() -> None:
    logits = torch.tensor([[[1e4, 0.0, 0.0]]], requires_grad=True)
    loss, entropy = loss_and_entropy(logits, torch.zeros(1, 1, dtype=torch.long))
    assert entropy.item() == 0.0
    assert loss.item() == 0.0
    mile_loss = MileLoss(LossConfig(kind="mile"))
    for progress in (0.0, 0.4):
        mile_loss.set_progress(progress)
        (gradient,) = torch.autograd.grad(
            mile_loss(logits, torch.ones(1, 1, dtype=torch.long)), logits
        )
        assert torch.isfinite(gradient).all()


CONFIG = TrainConfig().with_overrides(
    {
        "model.vocab_size": 23,
        "model.num_layers": 2,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
    }
)
ROWS = (torch.arange(33) % 11).repeat(2, 1)


def build(kind: str) -> GPT:
    torch.manual_seed(3)
    config = CONFIG.with_overrides({"loss.kind": kind})
    return build_model(config, Group(torch.device("cpu")), lambda line: None)


def test_switched_off_is_the_model_without_it_to_the_bit() -> None:
    torch.manual_seed(3)
    attend = select_backend("auto", "cpu", lambda line: None)
    bare, built = GPT(CONFIG.model, attend), build("cross_entropy")
    assert list(bare.state_dict()) == list(built.state_dict()) == list(build("mile").state_dict())
    for model in (bare, built):
        model(ROWS[:, :-1], ROWS[:, 1:], "objective" if model is built else "mean").backward()
    for one, other in zip(bare.parameters(), built.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_weights_count_in_training_only() -> None:
    plain_model, weighted = build("cross_entropy"), build("mile")
    with torch.no_grad():
        for one, other in zip(plain_model.parameters(), weighted.parameters(), strict=True):
            one.add_(torch.randn(one.shape))
            other.copy_(one)
    assert weighted.objective is not None
    weighted.objective.set_progress(0.4)
    for reduction in ("mean", "none"):
        one, other = (m(ROWS[:, :-1], ROWS[:, 1:], reduction) for m in (plain_model, weighted))
        assert torch.equal(one, other)
    values = [m(ROWS[:, :-1], ROWS[:, 1:], "objective").item() for m in (plain_model, weighted)]
    assert values[1] < values[0]


def test_a_new_exponent_needs_no_new_graph() -> None:
    model = build("mile")
    assert model.objective is not None
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=False, fullgraph=True)
    values = set()
    for progress in (0.0, 0.1, 0.4, 0.9):
        model.objective.set_progress(progress)
        got = compiled(ROWS[:, :-1], ROWS[:, 1:], reduction="objective")
        want = model(ROWS[:, :-1], ROWS[:, 1:], reduction="objective")
        torch.testing.assert_close(got, want)
        values.add(got.item())
    assert len(values) == 4
    assert graphs == 1
