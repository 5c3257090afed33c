"""A sweep on a file of trained weights: their settings come along, axes and --set win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.commands import sweep_driver
from service.commands.recipe_config import settings
from service.config import ServiceSettings
from trainer import checkpoint
from trainer.errors import ArtifactError, ConfigError
from trainer.recipes import RECIPES

TINY = RECIPES["tiny"].build()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    trained = TINY.with_overrides(
        {
            "model.num_layers": 5,
            "model.leaky_slope": 0.5,
            "evaluate.stride": 32,
            "quantize.embed_bits": 8,
            "quantize.keep_float_max_numel": 500,
            "runtime.seed": 4,
            "data.dir": "/gone",
        }
    )
    path = tmp_path / "checkpoint.bin"
    path.write_bytes(checkpoint.pack({"w": np.zeros(3, np.float32)}, trained))
    return path


def _plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *sets: str) -> dict[str, Any]:
    monkeypatch.setattr(sweep_driver, "data_for", lambda *arguments: tmp_path)
    service = ServiceSettings(out=tmp_path / "out")
    return sweep_driver.make_plan("quantization", "s", False, list(sets), service).overrides


def test_settings_of_the_weights_come_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
) -> None:
    found = _plan(monkeypatch, tmp_path, f"source.checkpoint={weights}", "evaluate.stride=16")
    assert found == {
        "source.checkpoint": str(weights),
        "model.num_layers": 5,
        "model.leaky_slope": 0.5,
        "evaluate.stride": 16,  # asked for
        "quantize.keep_float_max_numel": 500,
        "data.dir": str(tmp_path),
    }  # and neither an axis, nor the seed, nor where data lay


def test_without_a_file_a_plan_is_what_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _plan(monkeypatch, tmp_path) == {"data.dir": str(tmp_path)}


def test_a_file_that_is_not_there_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"none\.bin: cannot be read"):
        _plan(monkeypatch, tmp_path, "source.checkpoint=none.bin")
    with pytest.raises(ConfigError, match=r"source\.checkpont"):
        _plan(monkeypatch, tmp_path, "source.checkpont=none.bin")


def test_a_path_holds_in_any_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = settings(TINY, ["source.checkpoint=runs/checkpoint.bin"])
    assert found == {"source.checkpoint": str(tmp_path / "runs" / "checkpoint.bin")}
    assert settings(TINY, ["source.checkpoint="]) == {"source.checkpoint": ""}
