"""A submission folder of one trial: a script that stands alone, the packed model, what it scored.

    train_gpt.py             the program, packed; bytes_code is its length
    train_gpt_readable.py    the same before it was shortened; not needed, not counted
    artifact.bin             the model as the trial packed it; bytes_model is its length
    submission.json          customary fields, results of every seed, settings, digests
    train_seed<S>.log        of every seed
    README.md, requirements.txt

Nothing is taken on trust: the packed model is read back and must be the one that the trial scored.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import UsageError
from service.provenance import package_versions
from service.trial import TrialFolder
from trainer.config import TrainConfig
from trainer.report import TrainResult

REQUIREMENTS = ("torch", "numpy", "brotli", "sentencepiece")
EXTRA = {"zstd": "zstandard"}
"""What else a codec needs."""


@dataclass(frozen=True)
class SeedRun:
    """One finished trial of the configuration."""

    folder: Path
    config: TrainConfig
    result: TrainResult

    @property
    def seed(self) -> int:
        """What told it from the others."""
        return self.config.runtime.seed


def read_run(folder: Path) -> SeedRun:
    """A trial's folder. Raises UsageError when the trial has no score or its files are not here."""
    files = TrialFolder(folder)
    result = files.read_result()
    if result is None or not files.config.exists():
        raise UsageError(
            f"{folder}: no result.json and config.json of a finished run; package a trial that "
            "`caddie leaderboard` lists, on the machine that has its files"
        )
    if result.val_bpb is None or result.artifact_sha256 is None:
        raise UsageError(f"{folder}: the run was stopped before it was scored; package another")
    return SeedRun(folder, TrainConfig.from_dict(json.loads(files.config.read_text())), result)


def write_submission(runs: Sequence[SeedRun], out: Path, name: str, track: str) -> dict[str, Any]:
    """Write the folder; returns submission.json's content.

    Args:
        runs: the trial that is packaged first, then further seeds of its configuration.
        out: absent or empty.
        name: of the submission.
        track: name of the budgets that the runs were judged by.

    Raises: UsageError when `out` holds something or files are missing or changed, ArtifactError.
    """
    from trainer import artifact
    from trainer.flatten.program import readable, script

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; give another --out")
    first = runs[0]
    blob = artifact.read(first.folder / "artifact.bin")
    if artifact.sha256(blob) != first.result.artifact_sha256:
        raise UsageError(
            f"{first.folder / 'artifact.bin'}: is not the file that the run scored (its digest is "
            "another); run the trial again with `caddie trial rerun`"
        )
    code = script(first.config)
    document = _document(
        runs, name, track, len(code), len(blob), artifact.weights_digest(artifact.decode(blob)[1])
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "train_gpt.py").write_bytes(code)
    (out / "train_gpt_readable.py").write_text(readable(first.config))
    (out / "artifact.bin").write_bytes(blob)
    for run in runs:
        shutil.copyfile(run.folder / "train.log", out / f"train_seed{run.seed}.log")
    (out / "requirements.txt").write_text("\n".join(_requirements(first.config)) + "\n")
    (out / "README.md").write_text(_readme(document))
    (out / "submission.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def _document(
    runs: Sequence[SeedRun], name: str, track: str, code: int, model: int, digest: str
) -> dict[str, Any]:
    first, scores = runs[0], [run.result.val_bpb for run in runs if run.result.val_bpb is not None]
    provenance = _provenance(first.folder)
    return {
        "name": name,
        "track": track,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "val_loss": first.result.val_loss,
        "val_bpb": first.result.val_bpb,
        "val_bpb_mean": statistics.fmean(scores),
        "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "seed": first.seed,
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): _seed_result(run) for run in runs},
        "bytes_total": code + model,
        "bytes_code": code,
        "bytes_model": model,
        "artifact_sha256": first.result.artifact_sha256,
        "artifact_digest": digest,
        "phases": first.result.phases,
        "steps": first.result.steps,
        "step_avg_ms": first.result.step_ms,
        "val_tokens": first.result.val_tokens,
        "world_size": first.result.world_size,
        "data_digest": provenance.get("data_digest"),
        "hardware": {"device": first.result.device, **_hardware(provenance)},
        "versions": provenance.get("packages") or package_versions(),
        "illegal": first.result.illegal,
        "config": first.config.without_places(),
    }


def _seed_result(run: SeedRun) -> dict[str, Any]:
    result = run.result
    return {
        "val_loss": result.val_loss,
        "val_bpb": result.val_bpb,
        "artifact_bytes": result.bytes_model,
        "steps": result.steps,
        "step_avg_ms": result.step_ms,
        "train_time_s": result.phases.get("train"),
        "eval_time_s": result.phases.get("evaluate"),
        "artifact_sha256": result.artifact_sha256,
    }


def _provenance(folder: Path) -> dict[str, Any]:
    path = TrialFolder(folder).provenance
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _hardware(provenance: dict[str, Any]) -> dict[str, Any]:
    """Without the name of the machine."""
    hardware = provenance.get("hardware") or {}
    return {key: value for key, value in hardware.items() if key in ("cpu", "cpu_count", "gpus")}


def _requirements(config: TrainConfig) -> list[str]:
    versions = package_versions()
    names = [
        *REQUIREMENTS,
        *([EXTRA[config.compress.codec]] if config.compress.codec in EXTRA else []),
    ]
    return [f"{name}=={versions[name]}" if versions.get(name) else name for name in names]


def _readme(document: dict[str, Any]) -> str:
    workers = document["world_size"]
    start = "python" if workers == 1 else f"torchrun --standalone --nproc_per_node={workers}"
    lines = [
        f"# {document['name']}",
        "",
        f"{document['val_bpb']:.6f} bits per byte, {document['bytes_total']:,} bytes: "
        f"{document['bytes_code']:,} of code and {document['bytes_model']:,} of model.",
        "",
        "| seed | bits per byte | model bytes | steps |",
        "|---|---|---|---|",
        *(
            f"| {seed} | {found['val_bpb']:.6f} | {found['artifact_bytes']:,} | {found['steps']} |"
            for seed, found in document["seed_results"].items()
        ),
        "",
        "Train, pack and score it again; results go to RUN/result.json, RUN/artifact.bin:",
        "",
        f"    {start} train_gpt.py --data DATA --out RUN --seed {document['seed']}",
        "",
        "Score the packed model of this folder:",
        "",
        f"    {start} train_gpt.py --data DATA --out RUN --artifact artifact.bin",
        "",
        "`train_gpt_readable.py` is the same program before it was shortened and packed.",
    ]
    return "\n".join(lines) + "\n"
