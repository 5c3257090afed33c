"""`caddie trial rerun`: the same configuration, seed and data give the same loss, bit for bit; what
is not as it was is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from tests.service_tests.test_train_command import DOCUMENTS

SMALL = {
    "model.vocab_size": 280,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "data.batch_tokens": 512,
    "data.micro_batch_tokens": 512,
    "schedule.progress": "steps",
    "budget.max_steps": 3,
    "runtime.prime_steps": 0,
}


def prepared(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text("\0".join(documents))
    made = ("--vocab-size", "280", "--out", str(folder / "set"))
    assert main(["data", "prepare", str(folder / "text.txt"), *made]) == 0
    return folder / "set"


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
def test_a_trial_run_again_is_the_same_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = prepared(tmp_path / "data", DOCUMENTS), ("--out", str(tmp_path / "runs"))
    command = ["sweep", "run", "smoke", "--runner", "local", "--trials", "1", "--json", *out]
    for path, value in SMALL.items():
        command += ["--set", f"{path}={value}"]
    assert main([*command, "--data", str(data)]) == 0
    elsewhere = prepared(tmp_path / "other", DOCUMENTS[::-1])
    capsys.readouterr()

    def rerun(name: str, *more: str) -> tuple[dict[str, Any], Path, str]:
        to = tmp_path / name
        where = ("--to", str(to), *out, *more, "--json")
        assert main(["trial", "rerun", "smoke", "0", *where]) == 0
        answer = capsys.readouterr()
        return json.loads(answer.out), to, answer.err

    found, folder, warnings = rerun("again")
    first = tmp_path / "runs" / "smoke" / "trial-00000"
    for name in ("train_loss", "val_loss", "val_bpb", "bytes_model", "steps"):
        assert found["result"][name] == found["before"][name], name
    assert found["result"]["steps"] == 3
    assert (folder / "artifact.bin").read_bytes() == (first / "artifact.bin").read_bytes()
    assert losses(folder) == losses(first) and len(losses(first)) >= 1
    assert (folder / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert "another" not in warnings and "has changed" not in warnings

    provenance = json.loads((first / "provenance.json").read_text())
    packages = {**provenance["packages"], "torch": "1.0"}
    rewritten(first / "provenance.json", packages=packages, code={"commit": "0" * 40})
    other, _, warnings = rerun("elsewhere", "--data", str(elsewhere))
    assert "torch is another" in warnings and "was 1.0" in warnings
    assert "the data set is another: digest" in warnings
    assert "the code has changed since" in warnings
    assert other["result"]["train_loss"] != found["result"]["train_loss"]


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train_loss"]) for row in rows if row["kind"] == "step"]
