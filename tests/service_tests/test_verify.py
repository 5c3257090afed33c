"""`caddie verify` on a folder made of a real run, and on that folder with one thing wrong. CPU."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.provenance import describe_hardware
from service.runners.processes import name_of
from service.verify.model_checks import is_packaged, same_hardware
from service.verify.sandbox import Limits, Outcome, prove
from tests.service_tests.submission_folder import make_submission, write_record
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer import artifact
from trainer.config import TrainConfig
from trainer.flatten.program import script
from trainer.recipes import RECIPES

Change = Callable[[dict[str, Any]], None]
Report = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submission")


@pytest.fixture
def made(configure: Callable[..., TrainConfig], home: Path) -> tuple[Path, str]:  # noqa: F811
    """A folder, made once, and the folder of its data."""
    config = configure(**{"budget.max_steps": 4, "runtime.prime_steps": 0})
    if not (home / "made").exists():
        make_submission(config, home / "made")
    return home / "made", config.data.dir


@pytest.fixture
def copy(made: tuple[Path, str], tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def verified(
    capsys: pytest.CaptureFixture[str], folder: Path, *options: str, code: int = 0
) -> Report:
    """The report of the command, which exits with `code`."""
    assert main(["verify", str(folder), "--json", *options]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    report: Report = json.loads(printed.out)
    assert set(report) == {"bytes_total", "val_bpb", "checks"}
    for check in report["checks"]:
        assert set(check) == {"name", "ok", "value", "bound"}
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names)), names
    return report


def outcomes(report: Report) -> dict[str, bool | None]:
    return {check["name"]: check["ok"] for check in report["checks"]}


def failures(report: Report) -> set[str]:
    return {name for name, ok in outcomes(report).items() if ok is False}


def changed_record(folder: Path, change: Change) -> None:
    record = json.loads((folder / "submission.json").read_text())
    change(record)
    write_record(folder, record)


def test_a_folder_is_proved_and_its_program_needs_nothing_else(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = made
    record = json.loads((folder / "submission.json").read_text())
    report = verified(capsys, folder, "--data", data, "--run-code")
    assert report["bytes_total"] == record["bytes_total"]
    assert report["val_bpb"] == record["val_bpb"]
    found = outcomes(report)
    assert set(found.values()) == {True}, report
    assert set(found) == {
        *("files", "record", "track", "artifact_bytes", "bytes_code", "bytes_model"),
        *("bytes_total", "train_seconds", "eval_seconds", "seeds_val_bpb", "artifact"),
        *("weights_digest", "config", "legality", "data_digest", "overlap", "distribution"),
        *("val_bpb", "val_loss", "eval_seconds_here", "own_code"),
    }
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["train_seconds"]["value"] == 6.0 and by_name["train_seconds"]["bound"] == 8.0
    assert by_name["val_bpb"]["bound"] == 1e-6


def test_every_false_statement_fails_its_own_check(
    copy: Path, made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights too: one number of one tensor is another. And the program, which is no longer
    ours, is not run, nor is what lies beside it imported; other hardware has a wider bound."""
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("train_gpt.py", "sitecustomize.py", "torch.py", "json.py", "trainer.py"):
        (copy / name).write_text(trap)
    config, quantized = artifact.decode((copy / "artifact.bin").read_bytes())
    tensors = dict(quantized.tensors)
    part, array = next(iter(tensors["tok_emb.weight"].arrays.items()))
    other = array.copy()
    other.flat[5] += 1
    arrays = {**tensors["tok_emb.weight"].arrays, part: other}
    tensors["tok_emb.weight"] = replace(tensors["tok_emb.weight"], arrays=arrays)
    blob = artifact.encode(replace(quantized, tensors=tensors), config)
    (copy / "artifact.bin").write_bytes(blob)

    def change(record: dict[str, Any]) -> None:
        record.update(data_digest="0123456789abcdef", phases={"train": 7.9, "calibrate": 0.2})
        record["phases"]["evaluate"] = 30.1
        seeds = {"x": {"artifact_bytes": 200_001, "val_bpb": 1.5}}
        record["config"]["optim"]["matrix_lr"] = 0.5
        record["config"].setdefault("evaluate", {})["ngram_weight"] = 0.1
        record.update(bytes_code=len(trap), bytes_model=1, bytes_total=2)
        record.update(
            hardware="8xH100", val_loss=1.0, val_bpb=record["val_bpb"] + 0.05, seed_results=seeds
        )

    changed_record(copy, change)
    report = verified(capsys, copy, "--data", made[1], code=1)
    assert failures(report) == {
        *(
            "bytes_code",
            "bytes_model",
            "bytes_total",
            "train_seconds",
            "eval_seconds",
            "seeds_val_bpb",
        ),
        *("seeds_bytes", "weights_digest", "config", "legality", "data_digest", "val_bpb"),
        "val_loss",
    }
    assert outcomes(report)["artifact"] is True and outcomes(report)["own_code"] is None
    check = next(check for check in report["checks"] if check["name"] == "val_bpb")
    assert check["bound"] == 0.01
    assert not (tmp_path / "ran").exists()


def test_the_same_hardware_is_known_by_its_name() -> None:
    cpu = {"device": "cpu", "cpu": describe_hardware()["cpu"]}
    assert same_hardware(cpu, "cpu") and same_hardware("1x NVIDIA H200", "NVIDIA H200")
    assert same_hardware("8xH100 80GB SXM", "NVIDIA H100 80GB HBM3")
    assert not same_hardware("8xH100 80GB SXM", "NVIDIA H200")
    assert not same_hardware("cpu", "cpu") and not same_hardware(None, "cpu")


def test_the_script_is_known_though_modules_are_what_counts() -> None:
    tiny = RECIPES["tiny"].build()
    program = script(tiny)
    assert tiny.compress.code == "modules" and is_packaged(program, tiny)
    assert not is_packaged(program + b"#", tiny)
    assert not is_packaged(program, tiny.with_overrides({"runtime.loss_kernel": "fused"}))


def test_without_data_it_says_what_could_not_be_checked(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "weights").mkdir()
    (copy / "weights" / "more.json").write_bytes(bytes(200_000))
    report = verified(capsys, copy, code=1)
    assert report["val_bpb"] is None and report["bytes_total"] > 200_000
    assert failures(report) == {"artifact_bytes", "bytes_code", "bytes_total"}
    check = next(check for check in report["checks"] if check["name"] == "val_bpb")
    assert check["ok"] is None and "--data" in check["value"]
    assert main(["verify", str(copy), "--no-score"]) == 1  # for a person
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "bytes_total FAILED" in printed.err and "--no-score" in printed.err


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    (tmp_path / "clean").mkdir()
    return tmp_path / "clean"


LIMITS = Limits(seconds=20.0, memory_bytes=1 << 30)


def run_program(clean: Path, source: str, limits: Limits = LIMITS) -> Outcome:
    (clean / "train_gpt.py").write_text(source)
    job = {"what": "code", "program": "train_gpt.py", "arguments": ["--data", "x y"]}
    return prove(job, clean, limits)


def test_a_program_runs_alone(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    source = (
        "import os, sys, importlib.util as u\n"
        "found = [n for n in ('trainer', 'service', 'search_spaces') if u.find_spec(n)]\n"
        "print(found, sys.argv, 'SECRET_TOKEN' in os.environ, sorted(os.listdir()))\n"
    )
    outcome = run_program(clean, source)
    files = ["prover.job.json", "train_gpt.py"]
    assert outcome.fault is None
    assert outcome.printed == f"[] ['train_gpt.py', '--data', 'x y'] False {files}\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("open('notes.txt')", "ended with code 1.*notes.txt"),
        ("import os; os._exit(3)", "ended with code 3"),
        ("x = bytes(10**9)\nfor i in range(9): x = x + b'1' * 10**8", "GiB of memory, the limit"),
        ("while True: print('x' * 10**6)", "printed without end"),
        (
            "import os, time\nif os.fork() == 0: os.setsid()\n"
            "open(f'pid{os.getpid()}', 'w'); time.sleep(60)",
            "not done",
        ),
    ],
    ids=["sleeps", "lacks a file", "dies", "swells", "talks", "forks"],
)
def test_a_program_that_will_not_end_well_is_ended(clean: Path, source: str, words: str) -> None:
    seconds = 1.0 if "not done" in words else 20.0
    outcome = run_program(clean, source, Limits(seconds, 500 << 20))
    assert re.search(words, outcome.fault or "")
    pids = [int(left.name[3:]) for left in clean.glob("pid*")]
    deadline = time.monotonic() + 10
    while any(map(name_of, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)  # they are killed, and go when their turn comes
    assert not any(map(name_of, pids))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "no such folder"),
        ([__file__], "no such folder"),
        ([str(Path(__file__).parent), "--track", "gold"], "golf-10min-16mb"),
    ],
)
def test_asked_wrongly(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    assert words in capsys.readouterr().err
