"""Whole runs of `train` on a small data set: what must hold whatever the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer import artifact, loop
from trainer.config import TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import ArtifactError, ConfigError, DataError
from trainer.evaluate.bits_per_byte import evaluate
from trainer.loop import train
from trainer.quantize import dequantize
from trainer.recipes import RECIPES
from trainer.report import FileReporter, NullReporter, TrainResult
from trainer.workspace import build_model


class Collector:
    """A reporter that keeps records and asks for a stop after some of a kind."""

    def __init__(self, stop_after_steps: int | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self._stop_after = stop_after_steps

    def emit(self, kind: str, **fields: Any) -> None:
        self.records.append({"kind": kind, **fields})

    def stop_requested(self) -> str | None:
        steps = [record["step"] for record in self.of("step")]
        return "enough" if self._stop_after and max(steps, default=0) >= self._stop_after else None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that follow one another by a rule most of the time, so that there is something to
    learn within a few steps."""
    generator = np.random.default_rng(0)
    tokens = np.empty(30_000, dtype=np.uint16)
    tokens[0] = 1
    for index in range(1, len(tokens)):
        follows = 4 + (int(tokens[index - 1]) * 7 + 3) % (VOCAB_SIZE - 4)
        tokens[index] = follows if generator.random() < 0.9 else generator.integers(4, VOCAB_SIZE)
    return write_folder(tmp_path_factory.mktemp("loop") / "data", tokens[:28_000], tokens[28_000:])


@pytest.fixture
def configure(data_dir: Path) -> Callable[..., TrainConfig]:
    def make(**overrides: Any) -> TrainConfig:
        return (
            RECIPES["tiny"]
            .build()
            .with_overrides(
                {
                    "model.vocab_size": VOCAB_SIZE,
                    "model.num_layers": 2,
                    "model.model_dim": 32,
                    "data.dir": str(data_dir),
                    "data.seq_len": 32,
                    "data.batch_tokens": 512,
                    "data.micro_batch_tokens": 256,
                    "evaluate.seq_len": 32,
                    "schedule.progress": "steps",
                    "budget.max_steps": 12,
                    "budget.train_seconds": None,
                    "runtime.log_every": 1,
                    **overrides,
                }
            )
        )

    return make


def losses(config: TrainConfig) -> list[float]:
    reporter = Collector()
    train(config, reporter)
    return [record["train_loss"] for record in reporter.of("step")]


def test_it_learns_and_the_score_is_that_of_the_file(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configure(**{"budget.max_steps": 60})
    reporter = Collector()
    result = train(config, reporter, tmp_path)
    curve = [record["train_loss"] for record in reporter.of("step")]
    assert curve[-1] < curve[0] - 0.5

    blob = (tmp_path / "artifact.bin").read_bytes()
    assert (result.bytes_model, result.artifact_sha256) == (len(blob), artifact.sha256(blob))
    read_config, quantized = artifact.decode(blob)
    assert read_config == config.with_overrides({"data.dir": ""})  # a place is not content
    group = Group(torch.device("cpu"))
    model = build_model(config, group, lambda line: None)
    model.load_state_dict(dequantize(quantized))
    dataset = Dataset.open(config.data.dir)
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, config.model.vocab_size)
    again = evaluate(model, dataset, table, config.evaluate, group)
    assert again.val_bpb == result.val_bpb
    assert result.val_bpb_prequant != result.val_bpb
    assert result.val_tokens == dataset.num_scored_tokens(32)


def test_the_same_configuration_gives_the_same_run_bit_for_bit(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    results = [train(configure(), NullReporter(), tmp_path / name) for name in ("a", "b")]
    assert results[0].artifact_sha256 == results[1].artifact_sha256
    assert results[0].val_bpb == results[1].val_bpb
    other = train(configure(**{"runtime.seed": 7}), NullReporter(), tmp_path / "c")
    assert other.artifact_sha256 != results[0].artifact_sha256


def test_priming_leaves_no_trace(configure: Callable[..., TrainConfig]) -> None:
    assert losses(configure(**{"runtime.prime_steps": 0})) == losses(
        configure(**{"runtime.prime_steps": 3})
    )


def test_accumulation_is_one_large_batch(configure: Callable[..., TrainConfig]) -> None:
    whole = losses(configure(**{"data.micro_batch_tokens": 512}))
    parts = losses(configure(**{"data.micro_batch_tokens": 64}))
    assert parts == pytest.approx(whole, rel=2e-4)


def run_on_a_rank(group: Group, config: TrainConfig, out: Path) -> tuple[TrainResult, list[float]]:
    reporter = Collector()
    result = train(config, reporter, out)
    return result, [record["train_loss"] for record in reporter.of("step")]


def test_two_workers_do_what_one_does(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configure()
    reporter = Collector()
    alone = train(config, reporter, tmp_path / "one")
    (first, curve), (second, silent) = run_ranks(run_on_a_rank, 2, config, tmp_path / "two")
    assert curve == pytest.approx([r["train_loss"] for r in reporter.of("step")], rel=1e-3)
    assert silent == []  # only rank 0 reports
    assert first.val_bpb == second.val_bpb == pytest.approx(alone.val_bpb, rel=2e-3)
    assert first.phases == second.phases
    assert (first.world_size, first.tokens) == (2, alone.tokens)


def test_training_ends_within_the_seconds_of_the_budget(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 50.0  # a clock on which a step takes a tenth of a second, and nothing else any time

    def tick() -> float:
        return seconds

    real_step = loop.Run._step

    def step(run: loop.Run, index: int, progress: float) -> torch.Tensor:
        nonlocal seconds
        seconds += 0.1
        return real_step(run, index, progress)

    monkeypatch.setattr(loop.Run, "_step", step)
    monkeypatch.setattr(loop, "BudgetClock", partial(loop.BudgetClock, now=tick))
    config = configure(
        **{
            "schedule.progress": "clock",
            "budget.train_seconds": 1.5,
            "budget.max_steps": None,
        }
    )
    result = train(config, NullReporter(), tmp_path)
    assert result.status == "finished"
    assert result.steps == 14  # the fifteenth, with a tenth for jitter, would pass 1.5 s
    assert result.phases["train"] == pytest.approx(1.4)


@pytest.mark.parametrize("average", ["none", "ema"])
def test_a_step_that_is_held_up_past_the_cap_is_thrown_away(
    configure: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    average: str,
) -> None:
    seconds = 50.0
    real_step = loop.Run._step

    def step(run: loop.Run, index: int, progress: float) -> torch.Tensor:
        nonlocal seconds
        seconds += 0.9 if run.steps == 12 else 0.1  # the thirteenth stalls
        return real_step(run, index, progress)

    monkeypatch.setattr(loop.Run, "_step", step)
    monkeypatch.setattr(loop, "BudgetClock", partial(loop.BudgetClock, now=lambda: seconds))
    shared = {"schedule.warmdown_frac": 0.0, "average.kind": average, "average.decay": 0.5}
    timed = {"budget.train_seconds": 1.5, **shared}
    reporter = Collector()
    held_up = train(
        configure(**{"schedule.progress": "clock", "budget.max_steps": None}, **timed),
        reporter,
        tmp_path / "held_up",
    )
    assert held_up.steps == 12
    assert held_up.phases["train"] == pytest.approx(1.2)
    assert any("thrown away" in record["line"] for record in reporter.of("log"))
    twelve = train(configure(**{"budget.max_steps": 12, **shared}), NullReporter())
    assert held_up.val_bpb == twelve.val_bpb


def test_a_stop_request_ends_the_run_at_a_step_without_a_score(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    result = train(configure(), Collector(stop_after_steps=4), tmp_path)
    assert (result.status, result.stop_reason, result.steps) == ("stopped", "enough", 4)
    assert result.val_bpb is None
    assert not (tmp_path / "artifact.bin").exists()


def stop_on_rank_zero(group: Group, config: TrainConfig) -> TrainResult:
    return train(config, Collector(stop_after_steps=3 if group.is_main else None))


def test_all_ranks_stop_at_the_same_step(configure: Callable[..., TrainConfig]) -> None:
    first, second = run_ranks(stop_on_rank_zero, 2, configure())
    assert first.steps == second.steps == 3
    assert first.status == second.status == "stopped"


def test_a_loss_that_is_not_finite_stops_the_run(configure: Callable[..., TrainConfig]) -> None:
    result = train(configure(**{"optim.scalar_lr": 1e30}), NullReporter())
    assert result.status == "stopped"
    assert result.stop_reason is not None and "training loss is nan" in result.stop_reason
    assert result.steps < 12


def test_validation_on_the_way_costs_no_budget_and_changes_nothing(
    configure: Callable[..., TrainConfig],
) -> None:
    reporter = Collector()
    result = train(configure(**{"runtime.val_every": 4}), reporter)
    assert [record["step"] for record in reporter.of("val")] == [4, 8, 12, 12]
    curve = [record["train_loss"] for record in reporter.of("step")]
    assert curve == losses(configure())
    assert result.phases["validate"] > 0


def test_a_wrong_number_of_validation_tokens_is_refused_before_training(
    configure: Callable[..., TrainConfig],
) -> None:
    reporter = Collector()
    with pytest.raises(DataError, match=r"data\.val_tokens"):
        train(configure(**{"data.val_tokens": 99}), reporter)
    assert reporter.of("step") == []


def fail_to_write(group: Group, config: TrainConfig, out: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        train(config, NullReporter(), out)
    return str(caught.value)


def test_a_failed_write_on_rank_zero_is_raised_on_every_rank(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    (target / "artifact.bin").mkdir(parents=True)  # a folder stands where the file should go
    messages = run_ranks(fail_to_write, 2, configure(**{"budget.max_steps": 2}), target)
    assert messages[0] == messages[1]
    assert "artifact.bin" in messages[0]


def test_the_files_that_a_run_leaves(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    result = train(configure(), FileReporter(tmp_path), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = [record["name"] for record in records if record["kind"] == "phase"]
    assert phases == [
        "build",
        "prime",
        "train",
        "evaluate_prequant",
        "quantize",
        "pack",
        "evaluate",
    ]
    assert {
        record["name"]: record["seconds"] for record in records if record["kind"] == "phase"
    } == (pytest.approx(result.phases))
    assert "val_bpb" in (tmp_path / "train.log").read_text()


def test_sliding_windows_make_the_score_and_every_stage_is_recorded(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    plain = train(configure(), NullReporter(), tmp_path / "plain")
    sliding = train(
        configure(**{"evaluate.stride": 8, "evaluate.stages": True}),
        NullReporter(),
        tmp_path / "sliding",
    )
    assert plain.stages == {"trained": plain.val_bpb_prequant, "quantized": plain.val_bpb}
    assert sliding.stages == {**plain.stages, "sliding": sliding.val_bpb}
    assert sliding.val_bpb != plain.val_bpb and sliding.val_tokens == plain.val_tokens
    assert {"evaluate_stages", "evaluate"} <= set(sliding.phases)
    assert "evaluate_stages" not in plain.phases


GPTQ = {"quantize.method": "gptq", "quantize.calibration_tokens": 1000}


@pytest.mark.parametrize("calibration", ["train", "self"])
def test_gptq_calibrates_on_the_final_weights_in_a_phase_of_its_own(
    configure: Callable[..., TrainConfig], tmp_path: Path, calibration: str
) -> None:
    rounded = train(configure(), NullReporter(), tmp_path / "rounded")
    config = configure(**GPTQ, **{"quantize.calibration": calibration})
    reporter = Collector()
    solved = train(config, reporter, tmp_path / "solved")
    assert solved.train_loss == rounded.train_loss  # calibrating and priming it train nothing
    assert solved.val_bpb_prequant == rounded.val_bpb_prequant
    assert solved.artifact_sha256 != rounded.artifact_sha256
    assert solved.phases["calibrate"] > 0 and "calibrate" not in rounded.phases
    assert not [r for r in reporter.of("log") if "gptq" in r["line"]]


def test_steps_end_early_enough_for_the_calibration(configure: Callable[..., TrainConfig]) -> None:
    clock = {"schedule.progress": "clock", "budget.train_seconds": 8.0, "budget.max_steps": None}
    config = configure(**GPTQ, **clock, **{"quantize.reserve_seconds": 3.0})
    reporter = Collector()
    result = train(config, reporter)
    assert result.steps > 0 and result.phases["train"] <= 5.0
    assert reporter.of("step")[-1]["progress"] > 0.5  # of the seconds that steps may take


def test_a_calibration_that_outlasts_its_reserve_says_so(
    configure: Callable[..., TrainConfig],
) -> None:
    clock = {"budget.train_seconds": 60.0, "quantize.reserve_seconds": 1e-6}
    reporter = Collector()
    result = train(configure(**GPTQ, **clock), reporter)
    lines = [record["line"] for record in reporter.of("log")]
    assert any("quantize.reserve_seconds = 1e-06; raise it" in line for line in lines)
    assert result.phases["calibrate"] > 1e-6


def gptq_on_a_rank(group: Group, config: TrainConfig, out: Path) -> TrainResult:
    return train(config, NullReporter(), out)


@pytest.mark.parametrize("calibration", ["train", "self"])
def test_two_workers_calibrate_together(
    configure: Callable[..., TrainConfig], tmp_path: Path, calibration: str
) -> None:
    config = configure(**GPTQ, **{"quantize.calibration": calibration})
    first, second = run_ranks(gptq_on_a_rank, 2, config, tmp_path)
    assert first.val_bpb == second.val_bpb
    assert first.phases["calibrate"] == second.phases["calibrate"] > 0


def test_a_calibration_larger_than_the_data_is_refused_before_training(
    configure: Callable[..., TrainConfig],
) -> None:
    reporter = Collector()
    with pytest.raises(DataError, match=r"quantize\.calibration_tokens = 28001 is more than"):
        train(configure(**GPTQ | {"quantize.calibration_tokens": 28_001}), reporter)
    assert reporter.records == []


@pytest.mark.parametrize(("reserve", "words"), [(0.0, "keeps no time"), (8.0, "leaves nothing")])
def test_a_reserve_that_cannot_work_is_refused(reserve: float, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantize\.reserve_seconds = .*{words}"):
        RECIPES["tiny"].build().with_overrides(
            {"quantize.method": "gptq", "quantize.reserve_seconds": reserve}
        )
