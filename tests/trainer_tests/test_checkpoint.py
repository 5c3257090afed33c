"""A run from saved weights does what the run that saved them did after training. CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.distributed import Group
from trainer.errors import ArtifactError, ConfigError
from trainer.loop import train
from trainer.report import NullReporter, TrainResult

WEIGHTS = {
    "tok_emb.weight": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
    "blocks.0.q_gain": np.float32([1.5, -0.0]),
    "steps": np.int64([3]),
    "none": np.zeros((0, 4), np.float32),
}


def _write(path: Path, blob: bytes) -> Path:
    path.write_bytes(blob)
    return path


def test_weights_and_settings_come_back_bit_for_bit(tmp_path: Path) -> None:
    config = TrainConfig().with_overrides({"model.num_layers": 4, "data.dir": "/somewhere"})
    path = _write(tmp_path / "c.bin", checkpoint.pack(WEIGHTS, config))
    assert checkpoint.read_config(path) == config.with_overrides({"data.dir": ""})
    found = checkpoint.read(path)
    assert list(found) == list(WEIGHTS)
    for name, array in WEIGHTS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert b"somewhere" not in path.read_bytes()


def test_every_truncation_and_every_changed_byte_is_refused(tmp_path: Path) -> None:
    blob = checkpoint.pack(WEIGHTS, TrainConfig())
    for length in range(0, len(blob), 7):
        with pytest.raises(ArtifactError):
            checkpoint.read(_write(tmp_path / "c.bin", blob[:length]))
    for place in range(len(blob)):
        broken = bytearray(blob)
        broken[place] ^= 1
        with pytest.raises(ArtifactError):
            checkpoint.read(_write(tmp_path / "c.bin", bytes(broken)))


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    for read in (checkpoint.read, checkpoint.read_config):
        with pytest.raises(ArtifactError, match=r"none\.bin: cannot be read"):
            read(tmp_path / "none.bin")
        with pytest.raises(ArtifactError, match="no checkpoint"):
            read(_write(tmp_path / "zip.bin", b"PK\x03\x04" * 9))


def test_a_header_that_promises_terabytes_takes_no_memory(tmp_path: Path) -> None:
    blob = checkpoint.pack({"w": np.zeros((3, 3), np.float32)}, TrainConfig())
    huge = blob.replace(b"[3,3]", b"[3000000,3000000]")
    size = int.from_bytes(blob[8:12], "little") + len(huge) - len(blob)
    with pytest.raises(ArtifactError, match="damaged"):
        checkpoint.read(
            _write(tmp_path / "c.bin", huge[:8] + size.to_bytes(4, "little") + huge[12:])
        )


def test_what_follows_training_is_the_same_from_the_file(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    switches: dict[str, Any] = {"average.kind": "ema", "average.decay": 0.5}
    whole = train(
        configure(**switches, **{"runtime.save_checkpoint": True}), NullReporter(), tmp_path
    )
    reporter = Collector()
    config = configure(**{"source.checkpoint": str(tmp_path / "checkpoint.bin")}, **switches)
    again = train(config, reporter, tmp_path / "again")
    assert (again.val_bpb, again.val_bpb_prequant) == (whole.val_bpb, whole.val_bpb_prequant)
    assert again.steps == 0 and reporter.of("step") == []
    assert "train" not in again.phases and "restore" in again.phases


def _on_a_rank(group: Group, config: TrainConfig, out: Path) -> TrainResult:
    return train(config, NullReporter(), out)


def test_two_workers_start_from_what_rank_zero_reads(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    gptq = {"quantize.method": "gptq", "quantize.calibration_tokens": 1024}
    train(configure(**{"runtime.save_checkpoint": True}), NullReporter(), tmp_path)
    config = configure(**{"source.checkpoint": str(tmp_path / "checkpoint.bin")}, **gptq)
    alone = train(config, NullReporter(), tmp_path / "one")
    first, second = run_ranks(_on_a_rank, 2, config, tmp_path / "two")
    assert first.val_bpb == second.val_bpb == pytest.approx(alone.val_bpb, rel=1e-4)


def test_weights_of_another_shape_are_refused_with_both_named(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "checkpoint.bin")
    train(configure(**{"runtime.save_checkpoint": True}), NullReporter(), tmp_path)
    wider = configure(**{"source.checkpoint": path, "model.mlp_mult": 3.0})
    with pytest.raises(
        ConfigError,
        match=r"has blocks.0.mlp.up.weight of shape \[64, 32\] where.*"
        r"ask for blocks.0.mlp.up.weight of shape \[96, 32\] and 3 more",
    ):
        train(wider, NullReporter(), tmp_path / "wider")
    deeper = configure(**{"source.checkpoint": path, "model.num_layers": 3})
    with pytest.raises(ConfigError, match=r"checkpoint\.bin has .* ask for"):
        train(deeper, NullReporter(), tmp_path / "deeper")


def test_calibration_needs_no_reserve_where_nothing_is_trained() -> None:
    gptq = {"quantize.method": "gptq", "budget.train_seconds": 9.0}
    with pytest.raises(ConfigError, match=r"quantize\.reserve_seconds"):
        TrainConfig().with_overrides(gptq)
    config = TrainConfig().with_overrides({**gptq, "source.checkpoint": "c.bin"})
    assert config.source.skips_training
