"""Pruning to a number of bytes: the cheapest ones go, no more than needed. CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.trainer_tests.test_clip_rules import _uneven
from tests.trainer_tests.test_gptq import _hessian
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer import artifact
from trainer.code import packed_code
from trainer.config import QuantizeConfig, TrainConfig
from trainer.loop import train
from trainer.quantize import QuantizedState, quantize
from trainer.quantize.prune import Pruner, prune_to_fit

ENCODE = partial(artifact.encode, config=TrainConfig())


def _model() -> QuantizedState:
    state = {"a": _uneven(30, 40, 1), "b": _uneven(50, 40, 2)}
    config = QuantizeConfig(scheme="int6", clip="sigma", keep_float_max_numel=0, scale_bits=8)
    return quantize(state, config)


def _prices(model: QuantizedState) -> list[tuple[float, str, int, int]]:
    """Squared step times mean square of the input, of every code of 1 or -1."""
    hessian = _hessian(200, 40)
    found = []
    for name, stored in model.tensors.items():
        scales = stored.arrays["multiples"] * np.float64(stored.arrays["step"][0])
        for row, column in np.argwhere(np.abs(stored.arrays["codes"]) == 1):
            moment = float(hessian[column, column]) if name == "a" else 1.0
            found.append((scales[row] ** 2 * moment, name, row, column))
    return sorted(found)


@pytest.mark.parametrize("count", [0, 1, 250])
def test_the_cheapest_ones_become_zeros_and_nothing_else_changes(count: int) -> None:
    model = _model()
    prices = _prices(model)
    pruner = Pruner(model, {"a": _hessian(200, 40)})
    assert pruner.num_ones == len(prices) > 400
    pruned = pruner.pruned(count)
    for name, stored in model.tensors.items():
        expected = stored.arrays["codes"].copy()
        for _, own, row, column in prices[:count]:
            if own == name:
                expected[row, column] = 0
        np.testing.assert_array_equal(pruned.tensors[name].arrays["codes"], expected)
        np.testing.assert_array_equal(
            pruned.tensors[name].arrays["multiples"], stored.arrays["multiples"]
        )
    assert model.tensors["a"].arrays["codes"].min() < 0  # the model itself is left alone


def test_an_artifact_is_pruned_just_until_it_fits() -> None:
    model = _model()
    whole = len(ENCODE(model))
    for cap in (whole - 10, whole - 150):
        blob, count = prune_to_fit(model, {}, cap, ENCODE)
        assert 0.98 * cap < len(blob) <= cap
        assert blob == ENCODE(Pruner(model, {}).pruned(count))
        assert len(ENCODE(Pruner(model, {}).pruned(int(0.7 * count)))) > cap


def test_what_fits_or_never_will_is_left_whole() -> None:
    model = _model()
    whole = ENCODE(model)
    assert prune_to_fit(model, {}, len(whole), ENCODE) == (whole, 0)
    assert prune_to_fit(model, {}, 100, ENCODE) == (whole, 0)


def test_a_run_fits_its_budget_by_it(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = {"quantize.keep_float_max_numel": 100, "budget.max_steps": 3}
    free = train(configure(**settings), Collector(), tmp_path / "free")
    assert free.bytes_model is not None
    reporter = Collector()
    config = configure(**settings, **{"quantize.prune_to_fit": True})
    cap = len(packed_code(config)) + free.bytes_model - 120
    capped = config.with_overrides({"budget.artifact_bytes": cap})
    result = train(capped, reporter, tmp_path / "capped")
    assert result.bytes_total is not None and cap - 200 < result.bytes_total <= cap
    assert any("pruned" in record["line"] for record in reporter.of("log"))
