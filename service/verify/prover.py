"""The child process of a verification; run by its path, in a folder of its own, with limits.

    prover.py JOB RESULT

JOB is a JSON file: what to do ("decode", "score" or "code"), on what, and within which limits.
RESULT is written last. It is a
process of its own so that whatever a file of strangers does to it ends with it. Nothing here is
imported by the rest; `decode` and `score` read the artifact as data, `code` runs the folder's own
program, and can do so because nothing of this project is on its path.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Set the limits, do the job, write the result."""
    job, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    limits = job["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"],) * 2)
    if limits["data_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limits["data_bytes"],) * 2)
    if job["what"] == "code":
        _run_code(job)
        return
    sys.path.insert(0, job["root"])
    found = JOBS[job["what"]](job)
    if os.environ.get("RANK", "0") == "0":
        result.write_text(json.dumps(found))


def _decode(job: dict[str, Any]) -> dict[str, Any]:
    from trainer import artifact
    from trainer.errors import ArtifactError

    started = time.monotonic()
    try:
        config, quantized = artifact.decode(artifact.read(Path(job["artifact"])))
        digest = artifact.weights_digest(quantized)
    except ArtifactError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "artifact: it asks for more memory than a check may take"}
    return {
        "digest": digest,
        "num_tensors": len(quantized.tensors),
        "config": config.without_places(),
        "seconds": time.monotonic() - started,
    }


def _score(job: dict[str, Any]) -> dict[str, Any]:
    """Score the artifact as a run does that was given it; also: is the model causal, does it give a
    distribution, and how much of its training text is validation text."""
    from trainer.config import TrainConfig
    from trainer.data.dataset import Dataset
    from trainer.data.overlap import measure_overlap
    from trainer.errors import TrainerError
    from trainer.loop import train

    log = _Log()
    try:
        config = TrainConfig.from_dict(job["config"]).with_overrides(
            {
                "data.dir": job["data"],
                "source.artifact": job["artifact"],
                "source.checkpoint": "",
                "runtime.save_checkpoint": False,
            }
        )
        result = train(config, log)
        if os.environ.get("RANK", "0") != "0":
            return {}
        overlap = measure_overlap(Dataset.open(config.data.dir, config.model.vocab_size))
        return {
            "val_bpb": result.val_bpb,
            "val_loss": result.val_loss,
            "val_tokens": result.val_tokens,
            "device": result.device,
            "eval_seconds": result.phases["evaluate"],
            "illegal": result.illegal,
            "data_digest": log.data_digest,
            "overlap": overlap.share,
            "not_a_distribution": _fault_of_distribution(config),
        }
    except TrainerError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except (RuntimeError, MemoryError, ValueError, KeyError) as error:  # torch's own words
        return {"error": f"the model cannot be built or scored: {type(error).__name__}: {error}"}


def _fault_of_distribution(config: Any) -> str | None:
    import torch

    from trainer import artifact
    from trainer.distributed import join_group
    from trainer.errors import RuleError
    from trainer.evaluate.distribution_check import check_distribution
    from trainer.quantize import dequantize
    from trainer.workspace import build_model

    rows, length = 32, min(64, config.evaluate.seq_len)
    if "WORLD_SIZE" in os.environ:  # rank 0 alone is here
        return None
    with join_group(config.runtime.device) as group, torch.no_grad():
        model = build_model(config, group, lambda line: None)
        _, quantized = artifact.decode(artifact.read(Path(config.source.artifact)))
        model.load_state_dict(dequantize(quantized))
        try:
            check_distribution(model, config.model.vocab_size, rows, length, group.device)
        except RuleError as error:
            return str(error)
    return None


def _run_code(job: dict[str, Any]) -> None:
    """Run the program in the working directory as `python train_gpt.py` would, without us."""
    root = Path(job["root"])
    sys.path[:] = [os.getcwd(), *(entry for entry in sys.path if not _is_ours(entry, root))]
    # An editable install is found by a hook of its own.
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "__editable__" not in getattr(type(finder), "__module__", "")
        and "__editable__" not in getattr(finder, "__module__", "")
    ]
    sys.argv = [job["program"], *job["arguments"]]
    runpy.run_path(job["program"], run_name="__main__")


def _is_ours(entry: str, root: Path) -> bool:
    path = Path(entry)
    return path == root or (path / "trainer" / "loop.py").exists() or path == Path(__file__).parent


class _Log:
    """A reporter that keeps the digest of the data."""

    data_digest: str | None = None

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "start":
            self.data_digest = fields["data_digest"]

    def stop_requested(self) -> str | None:
        return None


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"decode": _decode, "score": _score}

if __name__ == "__main__":
    main()
