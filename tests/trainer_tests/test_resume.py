"""A run that was cut off and goes on does what it would have done uninterrupted. CPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.distributed import Group
from trainer.loop import train
from trainer.report import NullReporter, Reporter, TrainResult
from trainer.resume import FILE, StateFile, _taken_apart

SAVING = {"runtime.checkpoint_seconds": 1e-9, "evaluate.prequant": False}
"""After every step."""


class Lost(BaseException):
    """The worker is gone."""


class Dying(Collector):
    """Ends the process, as far as the trainer can tell, when it hears of a step."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self._at_step = at_step

    def emit(self, kind: str, **fields: Any) -> None:
        super().emit(kind, **fields)
        if kind == "step" and fields["step"] == self._at_step:
            raise Lost


def curve(reporter: Collector) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in reporter.of("step")}


def outcome(result: TrainResult) -> tuple[Any, ...]:
    return result.artifact_sha256, result.val_bpb, result.train_loss, result.steps, result.stages


def interrupted(config: TrainConfig, folder: Path, steps: list[int]) -> tuple[Collector, Any]:
    """The last attempt of a run that is lost at each of these steps, and its result."""
    for step in steps:
        with pytest.raises(Lost):
            train(config, Dying(step), folder)
    torch.manual_seed(987654)  # the new process knows nothing of the old one's generators
    last = Collector()
    return last, train(config, last, folder)


AVERAGES = {
    "none": {},
    "ema": {"average.kind": "ema", "average.start": 0.25, "average.decay": 0.8},
    "published": {"average.kind": "ema", "average.shadow": "bfloat16_embedding"},
    "swa": {"average.kind": "swa", "average.start": 0.25, "average.interval": 2},
    "lawa": {"average.kind": "lawa", "average.interval": 2, "average.keep": 3},
    "shuffled": {"data.loader": "shuffled", "optim.muon_comm": "reduce_scatter"},
    "coprime": {"data.loader": "coprime", "schedule.recur_start": 0.0},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_a_lost_run_ends_bit_for_bit_as_one_never_lost(
    name: str,
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**AVERAGES[name], **SAVING)
    whole = Collector()
    expected = train(config, whole, tmp_path / "whole")
    last, result = interrupted(config, tmp_path / "lost", [3, 8])
    assert outcome(result) == outcome(expected)
    losses = curve(last)
    assert min(losses) >= 8 and max(losses) == 12
    assert losses == {step: loss for step, loss in curve(whole).items() if step in losses}
    assert not (tmp_path / "lost" / FILE).exists()


def _on_ranks(group: Group, tree: dict[str, Any], folder: str, stop: int) -> Any:
    config = TrainConfig.from_dict(tree)
    reporter: Reporter = Dying(stop) if stop and group.is_main else NullReporter()
    try:
        return outcome(train(config, reporter, Path(folder) if group.is_main else None))
    except Lost:
        os._exit(1)


def _on_ranks_until(group: Group, tree: dict[str, Any], folder: str) -> list[str]:
    """Trains to the end and leaves the state that was written after step 5."""
    kept: list[str] = []

    def saved(path: Path) -> None:
        kept.append(str(path))
        if group.is_main and len(kept) == 6:
            Path(folder, "kept.bin").write_bytes(path.read_bytes())

    config = TrainConfig.from_dict(tree)
    train(config, NullReporter(), Path(folder) if group.is_main else None, saved)
    return kept


@pytest.mark.parametrize("comm", ["all_reduce", "reduce_scatter"])
def test_two_workers_go_on_with_momentum_gathered_from_both(
    comm: str,
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**{"optim.muon_comm": comm}, **SAVING)
    tree = config.to_dict()
    (tmp_path / "whole").mkdir()
    told = run_ranks(_on_ranks_until, 2, tree, str(tmp_path / "whole"))
    assert len(told[0]) == len(told[1]) == 12  # before every step, on every rank
    expected = run_ranks(_on_ranks, 2, tree, str(tmp_path / "again"), 0)
    (tmp_path / "lost").mkdir()
    (tmp_path / "whole" / "kept.bin").rename(tmp_path / "lost" / FILE)
    assert run_ranks(_on_ranks, 2, tree, str(tmp_path / "lost"), 0) == expected


class Drawing(Dying):
    """Draws a random number at every step, as dropout would."""

    def __init__(self, at_step: int) -> None:
        super().__init__(at_step)
        self.draws: dict[int, float] = {}

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "step":
            self.draws[fields["step"]] = float(torch.rand(()))
        super().emit(kind, **fields)


def test_random_numbers_go_on_where_they_were(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**SAVING)
    whole, again = Drawing(0), Drawing(0)
    train(config, whole, tmp_path / "whole")
    with pytest.raises(Lost):
        train(config, Drawing(6), tmp_path / "lost")
    torch.manual_seed(987654)
    train(config, again, tmp_path / "lost")
    assert min(again.draws) == 6 and max(again.draws) == 12
    assert again.draws == {step: whole.draws[step] for step in again.draws}


def test_every_second_counts_once(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**SAVING, **{"budget.max_steps": 30})
    first = Dying(20)
    with pytest.raises(Lost):
        train(config, first, tmp_path)
    last = Collector()
    result = train(config, last, tmp_path)
    saved = first.of("saved")[-1]
    assert last.of("saved")[0] == saved  # the clock stands where it was saved
    assert last.of("step")[0]["elapsed_s"] > saved["elapsed_s"]
    own = sum(record["step_ms"] for record in last.of("step")) / 1000
    assert result.phases["train"] == pytest.approx(saved["elapsed_s"] + own, abs=0.05)
    assert result.phases["save_state"] > 0


@pytest.mark.parametrize(("seconds", "told"), [(0.5, False), (1.5, True)])
def test_a_period_that_costs_more_than_a_hundredth_is_told_once_with_a_better_one(
    seconds: float,
    told: bool,
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(**{"runtime.checkpoint_seconds": 100.0})
    now = iter(seconds * place for place in range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(StateFile, "is_due", lambda self, elapsed: True)
    reporter = Collector()
    train(config, reporter, tmp_path)
    lines = [record["line"] for record in reporter.of("log")]
    about = [line for line in lines if "runtime.checkpoint_seconds" in line]
    assert len(about) == told
    assert not told or ("1.5% of" in about[0] and "raise it to 150" in about[0])


def test_other_settings_a_damaged_file_and_never_start_anew(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**SAVING)
    with pytest.raises(Lost):
        train(config, Dying(5), tmp_path)
    blob = (tmp_path / FILE).read_bytes()
    other = config.with_overrides({"optim.matrix_lr": 0.03})
    damaged = bytearray(blob)
    damaged[-100] ^= 1
    never = config.with_overrides({"runtime.resume": "never"})
    for content, settings in ((blob, other), (bytes(damaged), config), (blob, never)):
        (tmp_path / FILE).write_bytes(content)
        reporter = Collector()
        train(settings, reporter, tmp_path)
        assert min(curve(reporter)) == 1


def test_it_is_off_by_default_and_changes_nothing(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    assert TrainConfig().runtime.checkpoint_seconds == 0
    plain, saving = Collector(), Collector()
    train(configure(), plain, tmp_path)
    train(configure(**SAVING), saving, tmp_path)
    assert curve(plain) == curve(saving)
    assert configure().digest() == configure(**{"runtime.checkpoint_seconds": 5.0}).digest()


def test_a_full_disk_does_not_end_the_run(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    reporter = Collector()
    assert train(configure(**SAVING), reporter, tmp_path).status == "finished"
    assert any("No space left" in record["line"] for record in reporter.of("log"))


def test_tensors_of_every_type_keep_their_bits_and_trees_are_plain_json(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 2).bfloat16(),
        "double": torch.randn(4, dtype=torch.float64),
        "zero": torch.tensor(-0.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }
    arrays: dict[str, Any] = {}
    tree = json.loads(json.dumps(_taken_apart({0: [tensors], "pair": (1, None)}, arrays)))
    assert tree[0] == "dict" and tree[1] == 0 and tree[4] == ["tuple", 1, None]
    checkpoint.write(tmp_path / "state.bin", arrays, TrainConfig())
    found = checkpoint.read(tmp_path / "state.bin")
    for array, tensor in zip(found.values(), tensors.values(), strict=True):
        assert array.tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    packed = checkpoint.pack(arrays, TrainConfig())
    assert (tmp_path / "state.bin").read_bytes() == packed
