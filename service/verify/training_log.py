"""What the log of a training run says, in the words of the challenge's scripts or in ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.verify.dialects import number

_BPB = re.compile(r"val_bpb\s*[:=]?\s{0,2}(\d{1,3}\.\d{2,12})")
_TOTAL = re.compile(r"[Tt]otal submission size[^:\n]{0,60}:\s*([\d,]{4,15})\s*bytes")
_TRAIN_MS = re.compile(r"train_time:\s?(\d{1,12}(?:\.\d{1,6})?)ms")
_EVAL_MS = re.compile(r"eval_time:\s?(\d{1,12}(?:\.\d{1,6})?)ms")
_PHASE = re.compile(r"^(train|calibrate|evaluate): (\d{1,9}\.\d{1,6}) s$", re.MULTILINE)


@dataclass(frozen=True)
class TrainingLog:
    """Facts of one log; empty where it says nothing."""

    val_bpb: tuple[float, ...]
    """All that were printed, in order."""
    bytes_total: tuple[int, ...]
    train_seconds: float | None
    eval_seconds: float | None

    @classmethod
    def read(cls, content: bytes) -> TrainingLog:
        """Search a log; never raises. UTF-16 is understood too: one public log is in it."""
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = content.decode("utf-16" if wide else "utf-8", errors="replace")
        phases = {name: float(seconds) for name, seconds in _PHASE.findall(text)}
        train_ms = [float(found) for found in _TRAIN_MS.findall(text)]
        eval_ms = [float(found) for found in _EVAL_MS.findall(text)]
        train = max(train_ms) / 1000 if train_ms else phases.get("train")
        if train is not None and not train_ms:
            train += phases.get("calibrate", 0.0)
        return cls(
            tuple(float(found) for found in _BPB.findall(text)),
            tuple(int(number(found) or 0) for found in _TOTAL.findall(text)),
            train,
            max(eval_ms) / 1000 if eval_ms else phases.get("evaluate"),
        )

    def prints(self, val_bpb: float, within: float) -> bool:
        """Whether it has this score."""
        return any(abs(found - val_bpb) <= within for found in self.val_bpb)
