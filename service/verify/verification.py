"""Proves a submission folder: bytes, weights, seconds, rules and score, a check each.

What a folder says of itself is only ever compared with what is found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_spaces.tracks import TRACKS, Track
from service.verify.checks import Check, unchecked
from service.verify.dialects import Claims
from service.verify.folder import Folder, shown
from service.verify.model_checks import Means, Model
from service.verify.record_checks import (
    check_bytes,
    check_files,
    check_logs,
    check_seconds,
    check_seeds,
    read_record,
)

DEFAULT_TRACK = "golf-10min-16mb"
"""Budgets for folders that name none."""


@dataclass
class Verification:
    """What was found."""

    bytes_total: int | None = None
    """As the rules count them; where the model is missing, as recorded."""
    val_bpb: float | None = None
    """As reproduced; None where it was not."""
    checks: list[Check] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """Checks that do not hold."""
        return [check for check in self.checks if check.ok is False]

    @property
    def unchecked(self) -> list[Check]:
        """Checks that could not be made."""
        return [check for check in self.checks if check.ok is None]

    def to_dict(self) -> dict[str, Any]:
        """As --json gives it."""
        return {
            "bytes_total": self.bytes_total,
            "val_bpb": self.val_bpb,
            "checks": [check.to_dict() for check in self.checks],
        }


def verify(
    path: Path,
    means: Means,
    track: Track | None = None,
    tracks: Mapping[str, Track] = TRACKS,
) -> Verification:
    """Check a folder, whoever made it.

    Args:
        track: budgets to hold it to; None = those it names, else DEFAULT_TRACK.
        tracks: the known ones.

    Raises: UsageError when there is no such folder, or as means.data_for does.
    """
    folder = Folder.look(path)
    claims, of_record = read_record(folder)
    track, of_track = _track(claims, track, tracks)
    found = Verification(checks=[check_files(folder), of_record, of_track])
    found.bytes_total, of_bytes = check_bytes(folder, claims, track)
    found.checks += of_bytes
    found.checks += check_seconds(folder, claims, track)
    found.checks += check_seeds(claims, track)
    found.checks += check_logs(folder, claims)
    with tempfile.TemporaryDirectory(prefix="caddie-verify-") as scratch:
        model = Model(folder, claims, track, means, Path(scratch))
        found.checks += model.checks()
        found.val_bpb = model.val_bpb
    return found


def _track(claims: Claims, asked: Track | None, tracks: Mapping[str, Track]) -> tuple[Track, Check]:
    """The budgets that hold, and where they are from."""
    if asked is not None:
        return asked, Check("track", True, asked.name, None, "as asked")
    if claims.track is not None and claims.track in tracks:
        return tracks[claims.track], Check("track", True, claims.track, None, "as recorded")
    why = "the record names none" if claims.track is None else f"none is {shown(claims.track, 60)}"
    return tracks[DEFAULT_TRACK], unchecked("track", f"{why}; held to {DEFAULT_TRACK}")
