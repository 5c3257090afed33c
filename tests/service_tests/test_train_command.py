"""`caddie data`, `train` and `trial rerun` with the real trainer, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import main
from tests.trainer_tests.small_recipes import SMALL as RECIPES
from trainer.report import TrainResult

SMALL = (
    *("--set", "model.num_layers=1", "--set", "model.model_dim=16", "--set", "model.num_heads=2"),
    *("--set", "model.num_kv_heads=1", "--set", "data.batch_tokens=512", "--set"),
    *("data.micro_batch_tokens=512", "--set", "schedule.progress=steps"),
    *("--set", "budget.max_steps=3", "--set", "runtime.prime_steps=0"),
)
WORDS = " ".join(f"word{number % 97} and {number}" for number in range(6000))
DOCUMENTS = [WORDS[start : start + 700] for start in range(0, len(WORDS), 700)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little data set made by the command itself."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.txt"
    text.write_text("\0".join(DOCUMENTS))
    code = main(["data", "prepare", str(text), "--vocab-size", "280", "--out", str(folder / "set")])
    assert code == 0
    return folder / "set"


def test_prepare_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    out = tmp_path / "set"
    code = main(["data", "prepare", str(text), "--vocab-size", "280", "--out", str(out), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert code == 0
    assert made["vocab_size"] == 280 and made["train_tokens"] > made["val_tokens"] > 0
    assert set(made) == {"dir", "vocab_size", "train_tokens", "val_tokens", "digest"}
    assert main(["data", "prepare", str(text), "--vocab-size", "280", "--out", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes_train_and_pack_by_command(
    recipe: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**RECIPES[recipe], "model.vocab_size": 280, "budget.max_steps": 4}
    command = ["train", recipe, "--data", str(data), "--out", str(tmp_path / "run"), "--json"]
    for path, value in settings.items():
        command += ["--set", path + "=" + (value if isinstance(value, str) else json.dumps(value))]
    assert main(command) == 0
    result = TrainResult.model_validate_json(capsys.readouterr().out)
    assert (result.status, result.steps, result.illegal) == ("finished", 4, {})
    assert (tmp_path / "run" / "artifact.bin").stat().st_size == result.bytes_model


def test_train_leaves_the_result_it_prints(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "tiny", "--data", str(data), "--out", str(out), "--seed", "5", *SMALL]
    command += ["--set", "model.vocab_size=280"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "result.json").read_text())
    result = TrainResult.model_validate(printed)
    assert result.status == "finished" and result.steps == 3 and result.val_bpb is not None
    assert (out / "artifact.bin").stat().st_size == result.bytes_model
    assert json.loads((out / "config.json").read_text())["runtime"]["seed"] == 5
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_train_refuses_a_vocabulary_that_does_not_match(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", "tiny", "--data", str(data), "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert code == 2
    assert "280 pieces" in message and "model.vocab_size = 512" in message


def test_a_broken_shard_fails_the_run_with_its_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in data.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = next(broken.glob("*_train_*.bin"))
    shard.write_bytes(b"\0\0\0\0" + shard.read_bytes()[4:])
    code = main(
        [
            *("train", "tiny", "--data", str(broken), "--out", str(tmp_path / "run")),
            *SMALL,
            *("--set", "model.vocab_size=280"),
        ]
    )
    message = capsys.readouterr().err
    assert code == 1
    assert shard.name in message and "not a token shard" in message and "Traceback" not in message
