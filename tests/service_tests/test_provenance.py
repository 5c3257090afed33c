"""What provenance.json says, and what it must not."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from service.provenance import collect, describe_code, mask_command


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_code_is_commit_and_difference(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = describe_code(tmp_path)
    assert clean == {"commit": git(tmp_path, "rev-parse", "HEAD"), "diff": "", "untracked": []}
    (tmp_path / "a.py").write_text("x = 2  # http://me:pw@host/\n")
    (tmp_path / "b.py").write_text("new\n")
    changed = describe_code(tmp_path)
    assert "+x = 2  # http://me:***@host/" in changed["diff"]
    assert changed["untracked"] == ["b.py"]


def test_code_outside_a_repository_is_unknown(tmp_path: Path) -> None:
    assert describe_code(tmp_path) == {"commit": None, "diff": None, "untracked": None}


def test_collect_is_json_with_versions_and_hardware(tmp_path: Path) -> None:
    found = collect(data_digest="abc", command=["caddie", "sweep"], code_dir=tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["data_digest"] == "abc"
    assert found["packages"]["optuna"] == version("optuna")
    assert found["hardware"]["memory_bytes"] > 2**28


def test_secrets_are_masked_in_the_command() -> None:
    command = ["caddie", "--storage", "postgresql://me:pw@db/x", "--api-key", "k1", "--token=k2"]
    assert mask_command([*command, "--password", "--trials", "3"]) == [
        "caddie", "--storage", "postgresql://me:***@db/x", "--api-key", "***", "--token=***",
        "--password", "--trials", "3",
    ]  # fmt: skip
