"""Interleaved heads in the extra block of multi-token prediction: causal, counted, a no-op at its
no-op start, in every variant."""

from typing import Any

import pytest
import torch

from tests.trainer_tests.architectures import BASE
from tests.trainer_tests.test_iha import NO_OP, VARIANTS, build, randomize, tokens_of
from trainer.account import flops_per_token, parameter_table
from trainer.config import ModelConfig
from trainer.config.next_token import config_of_block
from trainer.model.gpt import GPT


def extra_block(model: GPT, hidden: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    assert model.mtp is not None
    with torch.no_grad():
        return model.mtp(hidden, later, model._context(tokens_of(hidden.size(1))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_sees_nothing_ahead_and_everything_behind(variant: str) -> None:
    """Windows end with the last layer: the first place moves the last."""
    model = build(torch.float64, mtp_weight=0.3, **VARIANTS[variant])
    randomize(model)
    generator = torch.Generator().manual_seed(7)
    size = (2, 14, BASE["model_dim"])
    hidden, later = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in "hl")
    before = extra_block(model, hidden, later)
    for place in (0, 5, 13):
        for changes in (hidden, later):
            kept = changes[:, place].clone()
            changes[:, place] += 1
            moved = (extra_block(model, hidden, later) - before).abs().amax((0, 2))
            changes[:, place] = kept
            assert (moved[:place] == 0).all(), place
            assert (moved[place:] > 1e-12).all(), place


@pytest.mark.parametrize("layers", ["all", "long", "short", "odd", "even", "0,2"])
@pytest.mark.parametrize("num_layers", [4, 5])
@pytest.mark.parametrize("kind", ["fused", "interleaved"])
def test_the_account_knows_whether_it_mixes(layers: str, num_layers: int, kind: str) -> None:
    """As "all" and "long" do, wherever the pattern would go on to."""
    settings = {"num_layers": num_layers, "mtp_weight": 0.3, "iha": kind, "iha_layers": layers}
    model = build(torch.float32, **settings)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_table(model.config) == shapes
    assert any(name.startswith("mtp.block.attn.iha.") for name in shapes) == (
        layers in ("all", "long")
    )
    assert config_of_block(model.config).window_of(num_layers) is None


def test_its_pseudo_tokens_are_paid_for() -> None:
    """P^2 times the keys of a plain block, and the products of its mixes."""
    shape: dict[str, Any] = {"num_kv_heads": 8, "window": 64, "window_layers": "SSSL"}
    costs = {}
    for where in ("short", "short_and_extra"):
        layers = "all" if where == "short_and_extra" else "short"
        for weight in (0.0, 0.3):
            model = ModelConfig(**shape, iha="interleaved", iha_layers=layers, mtp_weight=weight)
            costs[where, weight] = flops_per_token(model, 256)
    plain = costs["short", 0.3] - costs["short", 0.0]
    mixed = costs["short_and_extra", 0.3] - costs["short_and_extra", 0.0]
    keys = 2 * (2 * 256 + 1) / 2 - (256 + 1) / 2
    products = 3 * 8 * 8 * 2 * 64
    assert mixed - plain == pytest.approx(12 * 512 * keys + 6 * products)


@pytest.mark.parametrize("kind", [NO_OP, {"iha": "fused"}])
def test_training_begins_as_without_mixing(kind: dict[str, Any]) -> None:
    """The whole loss, the extra block's part included, and its gradient."""
    tokens = tokens_of(24)
    losses = []
    for settings in ({}, kind):
        model = build(torch.float64, mtp_weight=0.3, **settings)
        assert model.mtp is not None
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in model.mtp.named_parameters():
                if ".iha." not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        loss = model(tokens[:, :-1], tokens[:, 1:], reduction="objective")
        loss.backward()
        losses.append((loss.detach(), model.mtp.merge.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)
