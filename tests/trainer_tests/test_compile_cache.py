"""Where compiled code is kept: who decides, who may write, and that a new process finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.compile_cache import VARIABLES, use_compile_cache
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_auto_is_a_folder_of_the_user_that_nobody_else_can_write_to(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = use_compile_cache("auto", environment)
    assert folder is not None and folder.is_relative_to(tmp_path / "caddie")
    assert {environment[name] for name in VARIABLES} == {
        str(folder / name) for name in VARIABLES.values()
    }
    assert all((folder / name).stat().st_mode & 0o022 == 0 for name in VARIABLES.values())


@pytest.mark.parametrize("variable", VARIABLES)
def test_auto_leaves_what_the_environment_says(variable: str, tmp_path: Path) -> None:
    environment = {variable: "/elsewhere", "XDG_CACHE_HOME": str(tmp_path)}
    assert use_compile_cache("auto", environment) is None
    assert environment[variable] == "/elsewhere" and not list(tmp_path.iterdir())


def test_off_changes_nothing(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert use_compile_cache("off", environment) is None
    assert list(environment) == ["XDG_CACHE_HOME"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    folder = use_compile_cache(str(tmp_path), environment)
    assert folder is not None
    (folder / "inductor").chmod(0o777)
    with pytest.raises(ConfigError, match=r"compile_cache.*others may write.*off"):
        use_compile_cache(str(tmp_path), {})


def test_a_file_in_the_way_is_an_error_when_named_and_passed_over_by_auto(tmp_path: Path) -> None:
    (tmp_path / "caddie").write_text("")
    with pytest.raises(ConfigError, match=r"runtime.compile_cache = .*caddie.*set runtime"):
        use_compile_cache(str(tmp_path / "caddie"), {})
    assert use_compile_cache("auto", {"XDG_CACHE_HOME": str(tmp_path)}) is None


SHAPE = [
    *("runtime.compile=on", "model.num_layers=1", "model.model_dim=16", "model.num_heads=2"),
    *("model.num_kv_heads=1", "model.vocab_size=400", "data.seq_len=16", "data.batch_tokens=64"),
    *("data.micro_batch_tokens=64", "evaluate.seq_len=16", "evaluate.batch_tokens=64"),
]


@pytest.mark.slow
def test_a_second_process_compiles_from_the_first_ones_cache(tmp_path: Path) -> None:
    """benchmarks.cold_start on a small model: cold against warm in fresh processes."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.cold_start", "--recipe", "tiny", "--steps", "2"]
    for pair in SHAPE:
        command += ["--set", pair]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    cold, warm = (record["runs"]["plain"][kind] for kind in ("cold", "warm"))
    assert "to_first_step" in done.stdout
    assert cold["caches"]["fxgraph_cache_miss"] >= 3  # training there and back, and the score
    assert warm["caches"].get("fxgraph_cache_miss", 0) == 0
    assert warm["caches"]["fxgraph_cache_hit"] == cold["caches"]["fxgraph_cache_miss"]
    assert (
        warm["compile_seconds"]["of_which_codegen"]
        == 0.0
        < (cold["compile_seconds"]["of_which_codegen"])
    )
    assert warm["losses"] == cold["losses"]
    for row in (cold, warm):
        assert row["compilations_inside_the_clock"] == 0
        assert row["seconds"]["to_first_step"] > row["seconds"]["prime"] > 0
