"""The command line as scripts see it: exit codes, one JSON document, errors that help."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.cli import app, main
from service.commands.recipe_config import configured
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.recipes import RECIPES


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document of a command that must succeed."""
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The message of a command that must fail with `code`, without a traceback or an answer."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def commands() -> list[list[str]]:
    names = [[command.name] for command in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        registered = group.typer_instance.registered_commands
        names += [[group.name, command.name] for command in registered]
    return names  # type: ignore[return-value]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_help_has_an_example_of_the_command(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    assert f"Example: caddie {' '.join(command)}" in capsys.readouterr().out


def test_recipes_are_listed_with_their_track(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in answer(capsys, "recipes")}
    assert rows.keys() == RECIPES.keys()
    assert rows["golf_baseline"]["track"] == "golf-10min-16mb"
    assert "Muon" in rows["golf_baseline"]["techniques"]
    assert set(rows["tiny"]) == {"name", "source", "techniques", "track"}


def test_spaces_show_axes_as_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    smoke = next(row for row in answer(capsys, "spaces") if row["name"] == "smoke")
    assert smoke["recipe"] == "tiny" and smoke["track"] == "laptop"
    depth = smoke["axes"]["model.num_layers"]
    assert (depth["type"], depth["low"], depth["high"]) == ("int", 2, 8)
    assert smoke["axes"]["optim.tied_embed_lr"]["log"] is True
    assert smoke["enqueued"][0].keys() <= smoke["axes"].keys()


def test_tracks_hold_the_challenge_budgets_and_the_users_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "caddie.toml").write_text("[tracks.mine]\nartifact_bytes = 5\n")
    rows = {row["name"]: row for row in answer(capsys, "tracks")}
    golf = rows["golf-10min-16mb"]
    assert (golf["artifact_bytes"], golf["train_seconds"], golf["eval_seconds"]) == (
        16_000_000,
        600.0,
        600.0,
    )
    assert rows["mine"]["artifact_bytes"] == 5


def test_estimate_knows_the_published_parameter_count(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, "estimate", "golf_baseline")
    assert document["parameters"] == 17_059_912
    size = document["bytes"]
    assert size["p05"] < 15_863_489 < size["p95"]
    assert size["p05"] < size["p50"] < size["p95"]
    assert {verdict["name"]: verdict["ok"] for verdict in document["verdicts"]} == {
        "configuration": True,
        "legality": True,
        "artifact_size": True,
    }
    assert {"name", "ok", "value", "bound", "reason"} <= document["verdicts"][0].keys()


def test_estimate_of_pr1212_counts_its_mix_and_names_what_is_illegal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = answer(capsys, "estimate", "pr1212")
    assert document["parameters"] == 29_751_910
    short = answer(capsys, "estimate", "pr1212", "--set", "data.mix=8x2048")
    long = answer(capsys, "estimate", "pr1212", "--set", "data.mix=8x6144")
    by_lanes = (5 * short["flops_per_token"] + 3 * long["flops_per_token"]) / 8
    assert document["flops_per_token"] == pytest.approx(by_lanes)
    assert all(verdict["ok"] for verdict in document["verdicts"])
    replay = answer(capsys, "estimate", "pr675", "--set", "data.train_split=val")
    legality = next(row for row in replay["verdicts"] if row["name"] == "legality")
    assert not legality["ok"] and "data.train_split trains on validation" in legality["reason"]


def test_estimate_forecasts_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    eight = answer(capsys, "estimate", "golf_baseline")["step_time"]
    assert (eight["device"], eight["count"]) == ("h100", 8)
    assert eight["step_ms"] == pytest.approx(43.54, rel=0.05)
    one = answer(capsys, "estimate", "golf_baseline", "--device", "h200", "--count", "1")
    assert one["step_time"]["step_ms"] == pytest.approx(308, rel=0.05)


def test_estimate_rejects_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, "estimate", "tiny", "--set", "model.num_layers=12")
    size = next(v for v in document["verdicts"] if v["name"] == "artifact_size")
    assert not size["ok"] and size["bound"] == 200_000


def test_every_fault_of_the_settings_is_reported_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refusal(
        capsys,
        2,
        *("estimate", "tiny", "--set", "optim.matrixlr=2", "--set", "model.num_layers=x"),
        *("--set", "data.seq_len=100"),
    )
    assert "optim.matrixlr: no such setting; did you mean optim.matrix_lr" in message
    assert "model.num_layers = 'x'" in message
    assert "data.seq_len = 100 does not divide data.batch_tokens = 2048" in message


def test_text_settings_keep_text_that_looks_like_json() -> None:
    config, overrides = configured("tiny", ["data.dir=123", "budget.max_steps=none"])
    assert config.data.dir == "123"
    assert overrides == {"data.dir": "123", "budget.max_steps": None}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "tny"], "did you mean tiny?"),
        (["estimate", "golf_baselin"], "did you mean golf_baseline?"),
        (["estimate", "tiny", "--device", "h1000"], "did you mean h100"),
        (["sweep", "run", "smok"], "did you mean smoke?"),
        (["trian", "tiny"], "train"),
        (["sweep", "rum"], "run"),
        (["train", "tiny", "--nproc", "two"], "nproc"),
        (["train", "tiny", "--set", "model.num_layers"], "PATH=VALUE"),
        (["train", "tiny", "--data", "nowhere"], "no such folder"),
        (["data", "prepare", "absent.txt", "--vocab-size", "512", "--out", "d"], "no such file"),
        (["leaderboard", "nothing"], "no study 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_questions_exit_2_with_a_remedy(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in refusal(capsys, 2, *arguments)


def test_a_recipe_without_data_names_the_commands_that_make_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refusal(capsys, 2, "train", "golf_baseline")
    assert "caddie data prepare" in message and "--vocab-size 1024" in message
    assert "caddie data fetch sp1024" in message


def test_a_storage_that_cannot_be_opened_is_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = "postgresql://me:secret@127.0.0.1:1/none"
    message = refusal(capsys, 1, "leaderboard", "s", "--storage", url)
    assert "cannot use the storage" in message
    assert "secret" not in message


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for arguments in (["--debug", "train", "tny"], ["train", "tny", "--debug"]):
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert "Traceback" in done.stderr and done.returncode == 1


def test_light_commands_load_no_heavy_library() -> None:
    """Start-up stays quick: nobody waits for torch to read a list of recipes."""
    code = (
        "import sys; from service.cli import main; main(['spaces']); main(['tracks']);"
        "main(['estimate', 'tiny']);"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_doctor_names_every_check_and_a_remedy_for_what_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["doctor", "--tracking-uri", "http://127.0.0.1:1", "--json"])
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert code == 1
    assert set(rows) == {
        *("python", "packages", "torch", "gpus", "attention", "ports"),
        *("storage", "tracking", "ray", "disk"),
    }
    assert not rows["tracking"]["ok"] and rows["tracking"]["remedy"]
    assert rows["python"]["ok"] and rows["attention"]["ok"]
    assert "sdpa" in rows["attention"]["detail"]


def test_a_full_disk_is_named_with_the_remedy(
    capsys: pytest.CaptureFixture[str], small_disk: Path, tmp_path: Path
) -> None:
    message = refusal(capsys, 1, "data", "demo", "--out", str(small_disk / "demo"))
    assert "cannot write there (No space left on device); free space" in message

    data = write_folder(tmp_path / "data", random_tokens(5000), random_tokens(500, 1))
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2**20))
    message = refusal(
        capsys,
        1,
        *("train", "tiny", "--data", str(data), "--out", str(small_disk / "run")),
        *("--set", f"model.vocab_size={VOCAB_SIZE}", "--set", "budget.train_seconds=0.1"),
    )
    assert "No space left on device; free some space, then give the same command again" in message
