"""QAT-lite: gradients against autograd of the penalty as it is published, in fp64; whole runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import configure, data_dir, losses  # noqa: F401
from trainer.config import QatLiteConfig, TrainConfig
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.quantize.qat_lite import QatLite
from trainer.report import NullReporter

SHAPES = {"q": (12, 16), "k": (6, 16), "v": (6, 16), "out": (16, 12)}
NUM_LAYERS = 5


def new_model() -> nn.Module:
    """Blocks with the names of a GPT's matrices, weights spread widely from row to row."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for _ in range(NUM_LAYERS):
        block = nn.Module()
        block.attn, block.mlp = nn.Module(), nn.Module()
        for part, name, shape in [
            *((block.attn, name, shape) for name, shape in SHAPES.items()),
            (block.mlp, "up", (20, 16)),
        ]:
            layer = nn.Linear(shape[1], shape[0], bias=False)
            spread = torch.rand(shape[0], 1, generator=generator) + 0.01
            layer.weight.data = torch.randn(shape, generator=generator) * spread
            part.add_module(name, layer)
        block.attn.q_gain = nn.Parameter(torch.ones(3))
        model.blocks.append(block)
    return model


def penalty(weights: dict[str, Tensor], config: QatLiteConfig) -> Tensor:
    """P as the reference states it, on fp64 copies that need gradients."""
    names = {"qk": "qk", "qk_out": ["q", "k", "out"], "attn": list(SHAPES)}
    levels = 2 ** (config.bits - 1) - 1
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for layer in range(config.first_layer, NUM_LAYERS):
        share = ((layer + 1) / NUM_LAYERS) ** config.depth_power
        for name, weight in weights.items():
            place, part = name.split(".")[1], name.split(".")[3]
            wanted = config.targets == "all" or part in names[config.targets]
            if not wanted or int(place) != layer or weight.ndim != 2:
                continue
            scale = config.clip_sigmas * weight.detach().std(1, keepdim=True) / levels
            stored = scale.half().double()
            rounded = (weight.detach() / stored).round().clamp(-levels, levels) * stored
            squared = (weight - rounded) ** 2
            clipped = torch.relu(weight.abs() - levels * scale) ** 2
            both = {
                "squared": squared,
                "clip": clipped,
                "hybrid": (squared + clipped) / 2,
            }[config.kind]
            total = total + share * (both.mean() if config.reduction == "mean" else both.sum())
            divisor += share
    return total / divisor


def added(model: nn.Module, config: QatLiteConfig, step: int, progress: float) -> dict[str, Tensor]:
    """What add_gradients adds to gradients of 1."""
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    QatLite(model, config).add_gradients(step, progress)
    return {name: param.grad - 1 for name, param in model.named_parameters()}  # type: ignore[operator]


@pytest.mark.parametrize("targets", ["qk", "qk_out", "attn", "all"])
@pytest.mark.parametrize(
    ("kind", "reduction"), list(product(["squared", "clip", "hybrid"], ["sum", "mean"]))
)
def test_gradients_are_those_of_autograd(kind: str, reduction: str, targets: str) -> None:
    """A narrow clip, so that both parts of the penalty have something to say."""
    settings: dict[str, Any] = {"kind": kind, "reduction": reduction, "targets": targets}
    config = QatLiteConfig(
        **settings, strength=30.0, clip_sigmas=1.5, bits=4, first_layer=2, depth_power=1.7
    )
    model = new_model()
    weights = {
        name: param.detach().double().requires_grad_() for name, param in model.named_parameters()
    }
    progress = 0.85
    ramp = (progress - 0.55) / 0.45
    torch.autograd.backward(config.strength * ramp * penalty(weights, config))
    got = added(model, config, step=8, progress=progress)
    touched = 0
    for name, weight in weights.items():
        want = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(got[name].double(), want, rtol=1e-4, atol=2e-6)
        touched += bool(want.any())
    assert touched == 3 * {"qk": 2, "qk_out": 3, "attn": 4, "all": 5}[targets]


def test_the_published_mean_is_five_orders_below_the_sum() -> None:
    model = new_model()
    norms = []
    for reduction in ("sum", "mean"):
        config = QatLiteConfig(kind="squared", reduction=reduction, strength=1e5, first_layer=0)
        gradient = added(model, config, step=0, progress=1.0)["blocks.0.attn.q.weight"]
        norms.append(float(gradient.norm()))
    assert norms[0] / norms[1] == pytest.approx(12 * 16, rel=1e-3)


def test_the_clip_penalty_is_nothing_under_the_published_clip() -> None:
    config = QatLiteConfig(kind="clip", strength=1e6, first_layer=0)
    assert not any(change.any() for change in added(new_model(), config, 0, 1.0).values())


@pytest.mark.parametrize(
    ("step", "progress", "part"),
    [(0, 0.54, 0.0), (0, 0.55, 0.0), (4, 0.775, 0.5), (5, 0.775, 0.0), (8, 1.0, 1.0)],
)
def test_it_ramps_from_its_start_and_acts_at_every_fourth_step(
    step: int, progress: float, part: float
) -> None:
    config = QatLiteConfig(kind="squared", strength=50.0, first_layer=3)
    name = "blocks.4.attn.k.weight"
    full = added(new_model(), config, 0, 1.0)[name]
    assert full.any()
    torch.testing.assert_close(
        added(new_model(), config, step, progress)[name], part * full, rtol=1e-4, atol=1e-6
    )


def test_a_pull_goes_its_share_of_the_way() -> None:
    config = QatLiteConfig(
        kind="pull", strength=0.4, first_layer=3, depth_power=2.0, bits=4, clip_sigmas=3.0
    )
    model = new_model()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    lite = QatLite(model, config)
    lite.add_gradients(0, 1.0)  # no gradients there, and none needed
    lite.pull(4, 0.775)
    for name, param in model.named_parameters():
        layer = int(name.split(".")[1])
        if layer >= 3 and name.split(".")[3] in "qk":
            start = before[name].double()
            scale = (3.0 * start.std(1, keepdim=True) / 7).half().double()
            rounded = (start / scale).round().clamp(-7, 7) * scale
            share = 0.4 * 0.5 * ((layer + 1) / NUM_LAYERS) ** 2
            want = start - share * (start - rounded)
            torch.testing.assert_close(param.detach().double(), want, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(param, before[name])


def test_repeated_pulls_draw_weights_to_the_grid() -> None:
    """A few only: the grid follows the weights, which rounding spreads a little each time."""
    config = QatLiteConfig(kind="pull", strength=0.5, first_layer=0)
    model = new_model()
    lite = QatLite(model, config)
    weight = model.get_parameter("blocks.0.attn.q.weight")
    before = float(lite._distance(weight.detach()).norm())
    for _ in range(4):
        lite.pull(0, 1.0)
    assert float(lite._distance(weight.detach()).norm()) < 0.4 * before


def test_rules_name_the_setting_and_the_remedy() -> None:
    off = TrainConfig().with_overrides({"qat_lite.start": 1.0, "qat_lite.strength": 9.0})
    for overrides, words in [
        ({"qat_lite.kind": "squared"}, r"never begin at qat_lite\.start = 1; lower"),
        ({"qat_lite.kind": "pull", "qat_lite.start": 0.5}, r"qat_lite\.strength = 9 .*at most 1"),
        (
            {"qat_lite.kind": "clip", "qat_lite.start": 0.5, "qat_lite.first_layer": 9},
            r"qat_lite\.first_layer = 9 leaves none of model\.num_layers = 9",
        ),
    ]:
        with pytest.raises(ConfigError, match=words):
            off.with_overrides(overrides)


def test_off_is_the_run_before_and_on_changes_it_from_its_start(
    configure: Callable[..., TrainConfig],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """12 steps: the step at 0.5 of the budget is the first whose update is another, which the
    loss of the next one shows."""
    on = {"qat_lite.first_layer": 0, "qat_lite.start": 0.4, "qat_lite.every": 1}
    plain = losses(configure())
    for kind, strength in [("squared", 100.0), ("pull", 1.0)]:
        with_it = losses(configure(**on, **{"qat_lite.kind": kind, "qat_lite.strength": strength}))
        assert with_it[:6] == plain[:6]
        assert with_it[6] != plain[6]
    for method in ("add_gradients", "pull"):
        monkeypatch.setattr(QatLite, method, lambda self, step, progress: None)
    assert losses(configure()) == plain


def test_a_sum_closes_the_gap_that_coarse_codes_open_and_the_published_mean_does_not(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Mean distance to the grid of queries and keys after a run."""
    base = {
        "qat_lite.first_layer": 0,
        "qat_lite.start": 0.3,
        "qat_lite.every": 1,
        "budget.max_steps": 24,
    }
    found = {}
    for name, more in {
        "off": {},
        "mean": {"qat_lite.kind": "squared", "qat_lite.reduction": "mean"},
        "sum": {"qat_lite.kind": "squared", "qat_lite.strength": 0.5},
        "pull": {"qat_lite.kind": "pull", "qat_lite.strength": 0.3},
    }.items():
        found[name] = distance_after(configure(**base, **more), tmp_path / name)
    assert found["mean"] == pytest.approx(found["off"], rel=0.02)
    assert found["sum"] < 0.8 * found["off"]
    assert found["pull"] < 0.5 * found["off"]


def distance_after(config: TrainConfig, out: Path) -> float:
    """Squared distance of the final queries' and keys' weights to their grids."""
    models: list[nn.Module] = []
    build = QatLite.__init__

    def keep(self: QatLite, model: nn.Module, settings: QatLiteConfig) -> None:
        build(self, model, settings)
        models.append(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QatLite, "__init__", keep)
        train(config, NullReporter(), out)
    total = 0.0
    for name, weight in models[0].state_dict().items():
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            scale = (12.85 * weight.std(1, keepdim=True) / 31).half().float()
            total += float((weight / scale - (weight / scale).round()).mul(scale).square().sum())
    return total


def rank_gradient(group: Group) -> list[list[float]]:
    model = new_model()
    got = added(model, QatLiteConfig(kind="squared", first_layer=4), 0, 1.0)
    gradients = [got["blocks.4.attn.q.weight"]]
    before = gradients[0].clone()
    group.all_reduce_mean_(gradients)
    assert torch.equal(before, gradients[0])
    return before.tolist()


def test_averaging_over_ranks_leaves_it_as_it_is() -> None:
    first, second = run_ranks(rank_gradient, 2)
    assert first == second
