"""What a run says while it works and what it returns: the only surface a scheduler sees.

`Reporter` is called on rank 0 only, from the training thread, and must return at once: it is inside
the clock. `TrainResult` is plain data that crosses processes and is written as result.json.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

EventKind = Literal["start", "step", "val", "phase", "log", "saved"]
"""Kinds of records in metrics.jsonl.

start  once, before priming: {"num_params", "world_size", "device", "total_tokens_per_step"}
step   every runtime.log_every steps: {"step", "elapsed_s", "progress", "train_loss" (nats),
       "step_ms", "lr_mult", "tokens_per_s"}; elapsed_s is the budget clock
val    {"step", "elapsed_s", "val_loss", "val_bpb"}
phase  at the end of each phase: {"name", "seconds"}
log    {"line"}
saved  {"step", "elapsed_s"}: what a lost worker would not lose; also when a run goes on from there
"""


class Reporter(Protocol):
    """The side channel of a run. Implementations: service runners, FileReporter, NullReporter."""

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Hand over one record; must not block."""
        ...

    def stop_requested(self) -> str | None:
        """The reason why the run should stop at the next step boundary, or None."""
        ...


class NullReporter:
    """Says nothing and never stops: for the other ranks and for tests."""

    def emit(self, kind: EventKind, **fields: Any) -> None:
        pass

    def stop_requested(self) -> str | None:
        return None


class FileReporter:
    """Appends records to FOLDER/metrics.jsonl and log lines to FOLDER/train.log; a file named
    FOLDER/stop, holding the reason, asks the run to stop."""

    def __init__(self, folder: Path, echo: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._echo = echo
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._log = (folder / "train.log").open("a", buffering=1)

    def emit(self, kind: EventKind, **fields: Any) -> None:
        record = {"kind": kind, "time": time.time(), **fields}
        self._metrics.write(json.dumps(plain(record)) + "\n")
        line = describe(record)
        self._log.write(line + "\n")
        if self._echo:
            print(line, file=sys.stderr, flush=True)

    def stop_requested(self) -> str | None:
        stop = self._folder / "stop"
        return stop.read_text().strip() or "asked to stop" if stop.exists() else None


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """The record with every number that JSON cannot hold (NaN, infinity) as its name."""
    return {
        key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def describe(record: dict[str, Any]) -> str:
    """One line of prose for a metric record, as train.log has it."""
    kind = record["kind"]
    if kind == "log":
        return str(record["line"])
    if kind == "step":
        return (
            f"step {record['step']}  {record['elapsed_s']:.1f} s  loss {record['train_loss']:.4f}  "
            f"{record['step_ms']:.1f} ms/step  {record['tokens_per_s']:,.0f} tokens/s"
        )
    if kind == "val":
        return (
            f"step {record['step']}  val_loss {record['val_loss']:.6f}  "
            f"val_bpb {record['val_bpb']:.6f}"
        )
    if kind == "phase":
        return f"{record['name']}: {record['seconds']:.2f} s"
    return f"{kind}: " + ", ".join(
        f"{key} {value}" for key, value in record.items() if key not in ("kind", "time")
    )


class TrainResult(BaseModel):
    """The outcome of a run. Seconds are the maximum over ranks; bits per byte belong to the
    artifact as read back from disk, unless named prequant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["finished", "stopped"]
    """"stopped": ended early on request or because the loss was not finite; no score then."""
    stop_reason: str | None = None
    """Why a stopped run stopped; None otherwise."""
    steps: int
    """Optimiser steps done."""
    tokens: int
    """Training tokens seen, over all workers."""
    num_params: int
    world_size: int
    device: str
    """Such as "cpu" or "NVIDIA H200"."""
    phases: dict[str, float]
    """Seconds per phase: build, restore, prime, train, validate, save_state, evaluate_trained,
    average, calibrate, checkpoint, evaluate_prequant, quantize, pack, evaluate_stages, evaluate,
    evaluate_ensemble. "train" and "calibrate" count against budget.train_seconds, "evaluate"
    against budget.eval_seconds."""
    step_ms: float | None = None
    """Median milliseconds of a step."""
    train_loss: float | None = None
    """Last logged training loss, nats per token."""
    val_loss: float | None = None
    """Nats per token of the decoded artifact."""
    val_bpb: float | None = None
    """Bits per byte of the decoded artifact: the score."""
    val_bpb_prequant: float | None = None
    """Bits per byte before quantisation."""
    stages: dict[str, float] = {}
    """Bits per byte stage by stage, as far as measured: "trained" at the end of training and
    "averaged" where average.kind replaced those weights, both before quantisation; "quantized"
    after it; all in plain rows; and the score under the name of its method."""
    ensemble: dict[str, float] = {}
    """Nats per token of the last checkpoints together, where evaluate.ensemble is on:
    "ensemble_equal", "ensemble_weighted". Their bits per byte are in `stages`."""
    skipped: list[str] = []
    """Diagnostic passes that evaluate.prequant and evaluate.stages left out, in the words of
    `stages`."""
    val_tokens: int | None = None
    """Scored tokens."""
    bytes_code: int | None = None
    bytes_model: int | None = None
    artifact_sha256: str | None = None
    compilations: int = 0
    """Graphs that were compiled inside the training clock, on the worst rank. Priming is there to
    make it 0."""
    peak_memory_bytes: int = 0
    """Device memory on cuda, resident set on cpu; maximum over ranks."""
    illegal: dict[str, list[str]] = {}
    """Techniques in use that some tracks forbid: name -> tracks."""

    @property
    def bytes_total(self) -> int | None:
        """Packed code plus packed model."""
        if self.bytes_code is None or self.bytes_model is None:
            return None
        return self.bytes_code + self.bytes_model
