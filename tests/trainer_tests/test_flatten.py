"""The flattened script computes what the package computes, from nothing but itself. CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainer_tests.small_recipes import SMALL
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer import artifact
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.flatten.program import script
from trainer.loop import train
from trainer.recipes import RECIPES
from trainer.report import NullReporter

OVERRIDES = {
    "tiny": {"compress.code": "script"},
    "pr1212": SMALL["pr1212"] | {"data.loader": "sequential"},
    "pr1894": SMALL["pr1894"],
    "frontier": SMALL["frontier"],
    "pr675": SMALL["pr675"],
}


def run_script(path: Path, *arguments: str) -> dict[str, object]:
    out = path.parent
    done = subprocess.run(
        [sys.executable, "-I", str(path), "--out", str(out), *arguments],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads((out / "result.json").read_text())
    return result


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_script_alone_gives_the_same_artifact_and_score(
    name: str,
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    plain_config = configure()
    tiny = RECIPES["tiny"].build()
    config = (
        RECIPES[name]
        .build()
        .with_overrides(
            {
                **plain_config.difference(tiny),
                "evaluate.batch_tokens": 768,
                **OVERRIDES[name],
                "model.vocab_size": plain_config.model.vocab_size,
                "budget.max_steps": 3,
                "runtime.prime_steps": 0,
            }
        )
    )
    path = tmp_path / "alone" / "train_gpt.py"
    path.parent.mkdir()
    path.write_bytes(script(config))
    seed = str(config.runtime.seed)
    alone = run_script(path, "--data", config.data.dir, "--seed", seed)
    torch.set_num_threads(1)
    plain = train(config, NullReporter(), tmp_path / "plain")
    blob = (tmp_path / "plain" / "artifact.bin").read_bytes()
    assert alone["train_loss"] == plain.train_loss
    assert alone["artifact_sha256"] == plain.artifact_sha256
    assert (alone["val_loss"], alone["val_bpb"]) == (plain.val_loss, plain.val_bpb)
    assert alone["artifact_digest"] == artifact.weights_digest(artifact.decode(blob)[1])
    assert (alone["steps"], alone["stages"]) == (plain.steps, plain.stages)
    assert alone["bytes_code"] == path.stat().st_size
    if config.compress.code == "script":
        assert plain.bytes_code == alone["bytes_code"], "what a run counts is what is packaged"


def test_kernels_that_need_their_source_are_refused() -> None:
    fused = RECIPES["tiny"].build().with_overrides({"runtime.loss_kernel": "fused"})
    with pytest.raises(ConfigError, match=r"runtime\.loss_kernel = \"fused\" reads its own source"):
        script(fused)
