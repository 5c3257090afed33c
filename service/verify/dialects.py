"""Reads submission.json in the words of whoever wrote it.

The challenge enforces no schema. Published records call one thing by many names, write numbers as
text, put them into groups, give seeds as a list or by name, and sometimes a loss where bits per
byte belong. What is found is plain numbers; what is not understood is left out, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES: dict[str, tuple[str, ...]] = {
    "val_bpb": ("val_bpb", "val_bpb_mean", "mean_val_bpb", "bpb", "bpb_mean", "mean_bpb"),
    "val_loss": ("val_loss", "val_loss_mean", "mean_val_loss", "val_loss_nats"),
    "val_bpb_std": ("val_bpb_std", "std_val_bpb", "bpb_std", "val_bpb_stdev"),
    "bytes_total": (
        *("bytes_total", "total_bytes", "artifact_bytes_max", "artifact_bytes"),
        *("bytes_total_max", "submission_bytes", "total_submission_bytes", "artifact_size_bytes"),
        *("artifact_bytes_mean", "artifact_size", "size_bytes", "total_size_bytes"),
    ),
    "bytes_code": ("bytes_code", "code_bytes", "code_size_bytes", "code_size"),
    "bytes_model": ("bytes_model", "model_bytes", "compressed_model_bytes", "model_size_bytes"),
    "train_seconds": ("train_time_s", "train_seconds", "train_time_s_mean", "training_time_s"),
    "train_ms": ("train_time_ms", "wallclock_ms"),
    "eval_seconds": ("eval_time_s", "eval_seconds", "eval_time_s_mean", "eval_time_seconds"),
    "eval_ms": ("eval_time_ms",),
    "steps": ("steps", "step", "train_steps", "num_steps"),
    "seed": ("seed",),
}
"""What is meant -> the names it goes by, the best one first; lower case, with underscores."""
SEEDS = ("seed_results", "per_seed", "per_seed_results", "seeds", "runs", "results")
TRACK_NAMES = {
    "10min_16mb": "golf-10min-16mb",
    "track_10min_16mb": "golf-10min-16mb",
    "main": "golf-10min-16mb",
    "non_record_16mb": "golf-unlimited-16mb",
    "track_non_record_16mb": "golf-unlimited-16mb",
    "unlimited_16mb": "golf-unlimited-16mb",
}
"""The challenge's own names of tracks."""

MAX_SEEDS = 1000
LARGEST = 1e15
"""No size, time or score is this large, and sums of such numbers stay finite."""
_MAX_DEPTH = 3
_NUMBER = re.compile(
    r"[~\u2248]?\s*(-?\d{1,3}(?:[,_]\d{3})+|-?\d+)(\.\d+)?([eE][-+]?\d{1,3})?\s*(\w*)"
)
_UNITS = {"": 1.0, "b": 1.0, "bytes": 1.0, "s": 1.0, "kb": 1e3, "mb": 1e6, "ms": 1e-3, "min": 60.0}


@dataclass(frozen=True)
class SeedClaim:
    """What is said of one run."""

    seed: str
    numbers: Mapping[str, float]
    """By the keys of NAMES."""

    @property
    def train_seconds(self) -> float | None:
        return _seconds(self.numbers, "train")

    @property
    def eval_seconds(self) -> float | None:
        return _seconds(self.numbers, "eval")


@dataclass(frozen=True)
class Claims:
    """What a submission.json says."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """By the keys of NAMES."""
    seeds: tuple[SeedClaim, ...] = ()
    track: str | None = None
    """In our words, where it is one of the challenge's."""
    tree: Mapping[str, Any] = field(default_factory=dict)
    """The whole record, for what only our own folders say."""
    notes: tuple[str, ...] = ()
    """What was found odd."""

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> Claims:
        """Understand a record; never raises, whatever it holds."""
        numbers = _numbers(tree)
        notes = []
        if "val_loss" in numbers and numbers["val_loss"] == numbers.get("val_bpb"):
            del numbers["val_loss"]
            notes.append("val_loss repeats val_bpb, so it is left out")
        track = tree.get("track")
        known = TRACK_NAMES.get(track, track) if isinstance(track, str) else None
        return cls(numbers, _seeds(tree), known, tree, tuple(notes))

    @property
    def train_seconds(self) -> float | None:
        """Of the slowest run."""
        found = [seed.train_seconds for seed in self.seeds] + [_seconds(self.numbers, "train")]
        return max((seconds for seconds in found if seconds is not None), default=None)

    @property
    def eval_seconds(self) -> float | None:
        """Of the slowest run."""
        found = [seed.eval_seconds for seed in self.seeds] + [_seconds(self.numbers, "eval")]
        return max((seconds for seconds in found if seconds is not None), default=None)

    @property
    def is_ours(self) -> bool:
        """Whether it says all that a proof needs."""
        return isinstance(self.tree.get("config"), dict) and "artifact_digest" in self.tree

    def text(self, name: str) -> str | None:
        """A field of ours that is text."""
        value = self.tree.get(name)
        return value if isinstance(value, str) else None


def number(value: object) -> float | None:
    """A number below LARGEST, written as one or as text: "15,863,489", "15863489 bytes", "1 MB"."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        try:
            found = float(value)
        except OverflowError:
            return None
        return found if abs(found) < LARGEST else None
    if not isinstance(value, str) or len(value) > 60:
        return None
    match = _NUMBER.fullmatch(value.strip())
    if match is None or match[4].lower() not in _UNITS:
        return None
    digits = re.sub(r"[,_]", "", match[1]) + (match[2] or "") + (match[3] or "")
    found = float(digits) * _UNITS[match[4].lower()]
    return found if abs(found) < LARGEST else None


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """For each meaning the first of its names that has a number, outer groups before inner ones."""
    found: dict[str, float] = {}
    for group in _groups(tree):
        plain = {_plain(key): value for key, value in group.items()}
        for meaning, names in NAMES.items():
            values = (number(plain.get(name)) for name in names)
            value = next((value for value in values if value is not None), None)
            if value is not None:
                found.setdefault(meaning, value)
    return found


def _groups(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The object and those inside it, breadth first, but not what is said of single seeds."""
    level: list[Mapping[str, Any]] = [tree]
    for _ in range(_MAX_DEPTH):
        yield from level
        level = [
            value
            for group in level
            for key, value in group.items()
            if isinstance(value, dict) and _plain(key) not in (*SEEDS, "config", "phases")
        ]


def _seeds(tree: Mapping[str, Any]) -> tuple[SeedClaim, ...]:
    plain = {_plain(key): value for key, value in tree.items()}
    for name in SEEDS:
        claims = list(_of_seeds(plain.get(name)))[:MAX_SEEDS]
        if any(claim.numbers for claim in claims):
            return tuple(claims)
    return ()


def _of_seeds(value: object) -> Iterator[SeedClaim]:
    if isinstance(value, dict):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list):
        pairs = [("", entry) for entry in value]
    else:
        return
    for key, entry in pairs:
        if isinstance(entry, dict):
            seed = next((str(entry[k]) for k in entry if _plain(k) == "seed"), key)
            yield SeedClaim(seed.removeprefix("seed_")[:40], _numbers(entry))
        elif key and (bpb := number(entry)) is not None:
            yield SeedClaim(key.removeprefix("seed_")[:40], {"val_bpb": bpb})


def _seconds(numbers: Mapping[str, float], what: str) -> float | None:
    if f"{what}_seconds" in numbers:
        return numbers[f"{what}_seconds"]
    milliseconds = numbers.get(f"{what}_ms")
    return None if milliseconds is None else milliseconds / 1000


def _plain(key: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(key)[:80].lower()).strip("_")
