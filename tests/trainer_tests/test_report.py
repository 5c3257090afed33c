"""The side channel of a run as files, and its result as plain data. CPU, no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.report import FileReporter, NullReporter, TrainResult, describe

STEP = {
    "step": 10,
    "elapsed_s": 3.25,
    "progress": 0.5,
    "train_loss": 4.125,
    "step_ms": 12.5,
    "lr_mult": 1.0,
    "tokens_per_s": 1234567.0,
}


def test_records_are_lines_of_json_in_the_order_they_were_made(tmp_path: Path) -> None:
    reporter = FileReporter(tmp_path / "new" / "folder")
    reporter.emit("start", num_params=5)
    reporter.emit("step", **STEP)
    reporter.emit("log", line='a "quoted" line')
    lines = (tmp_path / "new/folder/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["kind"] for record in records] == ["start", "step", "log"]
    assert {key: records[1][key] for key in STEP} == STEP
    assert records[0]["time"] <= records[1]["time"] <= records[2]["time"]


def test_the_log_holds_one_line_of_prose_for_each_record(tmp_path: Path) -> None:
    reporter = FileReporter(tmp_path)
    reporter.emit("step", **STEP)
    reporter.emit("val", step=10, elapsed_s=3.25, val_loss=4.0, val_bpb=1.5)
    reporter.emit("phase", name="pack", seconds=1.25)
    reporter.emit("log", line="as it is")
    reporter.emit("start", num_params=5, device="cpu")
    assert (tmp_path / "train.log").read_text().splitlines() == [
        "step 10  3.2 s  loss 4.1250  12.5 ms/step  1,234,567 tokens/s",
        "step 10  val_loss 4.000000  val_bpb 1.500000",
        "pack: 1.25 s",
        "as it is",
        "start: num_params 5, device cpu",
    ]


def test_a_second_reporter_appends(tmp_path: Path) -> None:
    for name in ("first", "second"):
        FileReporter(tmp_path).emit("log", line=name)
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"


def test_records_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    reporter = FileReporter(tmp_path)
    for count in range(1, 4):
        reporter.emit("step", **STEP)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == count


def test_a_stop_file_asks_the_run_to_stop_and_says_why(tmp_path: Path) -> None:
    reporter = FileReporter(tmp_path)
    assert reporter.stop_requested() is None
    (tmp_path / "stop").write_text("too slow\n")
    assert reporter.stop_requested() == "too slow"
    (tmp_path / "stop").write_text("")
    assert reporter.stop_requested() == "asked to stop"
    (tmp_path / "stop").unlink()
    assert reporter.stop_requested() is None


def test_echo_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FileReporter(tmp_path, echo=True).emit("log", line="hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_a_loss_that_is_not_a_number_is_still_reported(tmp_path: Path) -> None:
    FileReporter(tmp_path).emit("step", **(STEP | {"train_loss": math.nan}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train_loss"] == "nan"  # JSON has no NaN; browsers refuse a bare one
    assert "loss nan" in describe({"kind": "step", **STEP, "train_loss": math.nan})


def test_the_null_reporter_says_nothing_and_never_stops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = NullReporter()
    reporter.emit("log", line="hello")
    assert reporter.stop_requested() is None
    assert capsys.readouterr() == ("", "")


def _result(**changes: object) -> TrainResult:
    fields: dict[str, object] = {
        "status": "finished",
        "steps": 3,
        "tokens": 12_288,
        "num_params": 100,
        "world_size": 2,
        "device": "cpu",
        "phases": {"train": 8.0 / 3.0},
        "val_bpb": 0.1 + 0.2,
    }
    return TrainResult.model_validate(fields | changes)


def test_a_result_survives_json_exactly() -> None:
    result = _result(illegal={"ngram_cache": ["golf"]}, artifact_sha256="ab" * 32)
    assert TrainResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize(
    ("code", "model", "total"), [(10, 90, 100), (None, 90, None), (10, None, None), (0, 0, 0)]
)
def test_the_total_is_code_plus_model_when_both_are_known(
    code: int | None, model: int | None, total: int | None
) -> None:
    assert _result(bytes_code=code, bytes_model=model).bytes_total == total


@pytest.mark.parametrize("changes", [{"status": "failed"}, {"steps": None}, {"colour": "red"}])
def test_a_result_of_another_form_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _result(**changes)
