"""Quantisation-aware training: the exporter's own grid, bit for bit, and a straight-through
gradient. CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer_tests.test_calibration import _batches, _model
from tests.trainer_tests.test_loop import configure, data_dir, losses  # noqa: F401
from trainer.config import QuantizeConfig, TrainConfig
from trainer.loop import train
from trainer.quantize import dequantize, quantize
from trainer.quantize.aware import QuantizationAware
from trainer.report import NullReporter

QAT = QuantizeConfig(scheme="int6", keep_float_max_numel=0, qat_start=0.3)
GRIDS: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int6": {},
    "mixed": {"mlp_bits": 5, "attn_bits": 6, "embed_bits": 8},
    "narrow_clip": {"clip_percentile": 97.0},
    "search": {"clip": "search"},
    "published_floor": {"scale_floor": 1 / 31},
    "floor_by_levels": {"floor_by_levels": True, "embed_bits": 8},
    "some_floats": {"keep_float_max_numel": 300},
}


def _exported(model: nn.Module, config: QuantizeConfig) -> dict[str, Tensor]:
    return dequantize(quantize(model.state_dict(), config))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_model_holds_exactly_what_the_artifact_would_decode_to(grid: str) -> None:
    model = _model()
    config = QAT.model_copy(update=GRIDS[grid])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = quantize(model.state_dict(), config)
    exported = dequantize(quantized)
    coded = [name for name, t in quantized.tensors.items() if t.scheme.startswith("int")]
    assert 2 < len(coded) < len(before)
    aware = QuantizationAware(model, config)
    with aware.weights(0.3):
        for name, value in model.state_dict().items():
            if name in coded:
                same_bits = value.view(torch.int32) == exported[name].view(torch.int32)
                assert same_bits.all() and not torch.equal(value, before[name]), name
            else:
                assert torch.equal(value, before[name]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_gradient_is_the_one_at_the_exported_weights_passed_straight_through() -> None:
    """Reference: a second model in fp64 that really has the exported weights."""
    model, (tokens, targets) = _model(), _batches(1)[0]
    exported = _exported(model, QAT)
    aware = QuantizationAware(model, QAT)
    with aware.weights(0.5):
        torch.autograd.backward(model(tokens, targets))
    reference = _model(torch.float64).double()
    coded = {name for name, value in model.named_parameters() if value.dim() > 1}
    coded -= {name for name in coded if name.endswith(("resid_mix", "skip_weights"))}
    reference.load_state_dict(
        {k: v for k, v in exported.items() if k in coded}
        | {k: v for k, v in model.state_dict().items() if k not in coded}
    )
    torch.autograd.backward(reference(tokens, targets))
    for (name, parameter), other in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert parameter.grad is not None and other.grad is not None
        (
            torch.testing.assert_close(
                parameter.grad.double(), other.grad, rtol=1e-3, atol=1e-5 * float(other.grad.norm())
            ),
            name,
        )


@pytest.mark.parametrize(
    ("start", "progress", "on"),
    [(1.0, 1.0, False), (1.0, 0.0, False), (0.0, 0.0, True), (0.5, 0.49, False), (0.5, 0.5, True)],
)
def test_it_starts_by_the_share_of_the_budget(start: float, progress: float, on: bool) -> None:
    model = _model()
    before = model.blocks[0].mlp.up.weight.detach().clone()
    aware = QuantizationAware(model, QAT.model_copy(update={"qat_start": start}))
    with aware.weights(progress):
        assert torch.equal(model.blocks[0].mlp.up.weight, before) != on


def test_weights_come_back_when_a_step_fails() -> None:
    model = _model()
    before = model.tok_emb.weight.detach().clone()
    aware = QuantizationAware(model, QAT)
    with pytest.raises(RuntimeError), aware.weights(1.0):
        raise RuntimeError
    assert torch.equal(model.tok_emb.weight, before)


def test_a_run_changes_from_the_step_at_which_it_is_switched_on(
    configure: Callable[..., TrainConfig],  # noqa: F811
) -> None:
    """12 steps, half the budget: the loss of step 7 is the first that is taken at codes."""
    plain = losses(configure())
    aware = losses(configure(**{"quantize.qat_start": 0.5}))
    assert aware[:6] == plain[:6]
    assert aware[6] != plain[6]
    assert losses(configure(**{"quantize.qat_start": 1.0})) == plain


def test_it_closes_the_gap_that_quantisation_opens(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    coarse = {
        "quantize.matrix_bits": 5,
        "quantize.embed_bits": 5,
        "quantize.keep_float_max_numel": 0,
        "quantize.scale_floor": 1 / 15,
        "budget.max_steps": 60,
    }
    plain = train(configure(**coarse), NullReporter(), tmp_path / "plain")
    aware = train(configure(**coarse, **{"quantize.qat_start": 0.7}), NullReporter(), tmp_path)
    gaps = [r.val_bpb - r.val_bpb_prequant for r in (plain, aware)]  # type: ignore[operator]
    assert aware.val_bpb < plain.val_bpb  # type: ignore[operator]
    assert gaps[1] < 0.5 * gaps[0]
