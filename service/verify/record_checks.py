"""Checks that need nothing but the folder's files: sizes, seconds, seeds, logs, and how they agree.

Nothing is decoded here, and nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator

from search_spaces.tracks import Track
from service.submission_fields import CODE_FILE, MODEL_FILE, RECORD_FILE
from service.verify.checks import Check, at_most, equal, failed, unchecked
from service.verify.dialects import Claims, number
from service.verify.folder import (
    MAX_CODE_BYTES,
    MAX_LOG_BYTES,
    Folder,
    UnreadableError,
    shown,
)
from service.verify.training_log import TrainingLog

SAME_BPB = 5e-4
"""Scores that are rounded or are of another pass of the same run differ by up to this."""
SAME_BYTES = 2
MAX_LOGS = 20


def check_files(folder: Folder) -> Check:
    """Nothing in the folder but plain files, and something to check."""
    if not (folder.code or folder.model or folder.logs or _record_name(folder)):
        return failed(
            "files", f"neither {CODE_FILE} nor {MODEL_FILE}, {RECORD_FILE} or a log is here", 0
        )
    reason = "; ".join(folder.faults[:5])
    return at_most("files", len(folder.faults), 0, reason or "links, pipes and other odd entries")


def read_record(folder: Folder) -> tuple[Claims, Check]:
    """submission.json, in whatever dialect, and whether it could be read."""
    name = _record_name(folder)
    if name is None:
        return Claims(), unchecked("record", f"there is no {RECORD_FILE}", "a JSON object")
    try:
        claims = Claims.read(folder.read_json(name))
    except UnreadableError as error:
        return Claims(), failed("record", str(error), "a JSON object")
    return claims, Check("record", True, name, "a JSON object", "; ".join(claims.notes))


def check_bytes(folder: Folder, claims: Claims, track: Track) -> tuple[int | None, list[Check]]:
    """The artifact's bytes as the rules count them, from the files as far as they are here.

    Program, model, and every other file that the program could read. A published folder seldom has
    the model, and often old programs: there the model's bytes are the record's, and a helper counts
    where the program names it (one accepted record ran 80 kB from beside a program of 74 bytes).
    """
    code = folder.sizes[folder.code] if folder.code else None
    helpers = folder.helpers if claims.is_ours else _named_helpers(folder)
    with_helpers = (code or 0) + sum(folder.sizes[name] for name in helpers)
    model = folder.sizes[folder.model] if folder.model else None
    said = {name: claims.numbers.get(f"bytes_{name}") for name in ("code", "model", "total")}
    if model is not None and (code is not None or helpers):
        total: float | None = with_helpers + model
    else:
        of_parts = _model_said(said) if model is None else model
        parts = [said["total"], None if of_parts is None else of_parts + with_helpers]
        total = max((part for part in parts if part is not None), default=None)
    checks = [_check_cap(total, track, folder, helpers)]
    codes = [float(size) for size in ([] if claims.is_ours else [code]) + [with_helpers] if size]
    if said["code"] is not None and codes:
        measured = said["code"] if said["code"] in codes else codes[-1]
        checks.append(equal("bytes_code", measured, said["code"], f"size of {folder.code}"))
    if said["model"] is not None and model is not None:
        checks.append(equal("bytes_model", model, said["model"], f"size of {folder.model}"))
    checks.append(_check_total(total, said, model is not None))
    return None if total is None else round(total), checks


def check_seconds(folder: Folder, claims: Claims, track: Track) -> Iterator[Check]:
    """What the run recorded of its clocks, against the caps. The largest number of record, seeds
    and logs counts."""
    logs = list(_logs(folder))
    phases = claims.tree.get("phases")
    phase = {str(k): number(v) for k, v in phases.items()} if isinstance(phases, dict) else {}
    trained = phase.get("train")
    if trained is not None:
        trained += phase.get("calibrate") or 0.0
    of_train = [trained, claims.train_seconds, *(log.train_seconds for log in logs)]
    of_eval = [phase.get("evaluate"), claims.eval_seconds, *(log.eval_seconds for log in logs)]
    for name, values, cap in (
        ("train_seconds", of_train, track.train_seconds),
        ("eval_seconds", of_eval, track.eval_seconds),
    ):
        found = [value for value in values if value is not None]
        if not found:
            yield unchecked(name, "neither record nor logs state it", cap)
        elif cap is None:
            yield Check(name, True, max(found), None, f"{track.name} sets no limit")
        else:
            yield at_most(name, max(found), cap, f"as recorded; cap of {track.name}")
        if any(value < 0 for value in found):
            yield failed(name, f"{min(found):g} s cannot be", 0)


def check_seeds(claims: Claims, track: Track) -> Iterator[Check]:
    """Whether the results by seed bear out what is claimed of all."""
    scores = [seed.numbers["val_bpb"] for seed in claims.seeds if "val_bpb" in seed.numbers]
    claimed = claims.numbers.get("val_bpb")
    if scores and claimed is not None:
        candidates = [*scores, sum(scores) / len(scores)]
        nearest = min(abs(candidate - claimed) for candidate in candidates)
        yield at_most("seeds_val_bpb", nearest, SAME_BPB, "claimed against mean and single seeds")
    sizes = [s.numbers["bytes_total"] for s in claims.seeds if "bytes_total" in s.numbers]
    if sizes and track.artifact_bytes is not None:
        yield at_most(
            "seeds_bytes", max(sizes), track.artifact_bytes, "the largest seed's artifact"
        )


def check_logs(folder: Folder, claims: Claims) -> Iterator[Check]:
    """Whether the logs print what a published record claims. Our own scores are made again."""
    if claims.is_ours:
        return
    logs = list(_logs(folder))
    claimed = [seed.numbers["val_bpb"] for seed in claims.seeds if "val_bpb" in seed.numbers]
    if not claimed and "val_bpb" in claims.numbers:
        claimed = [claims.numbers["val_bpb"]]
    if not any(log.val_bpb for log in logs):
        yield unchecked("logs_val_bpb", "no log prints a val_bpb", 0)
    elif not claimed:
        yield unchecked("logs_val_bpb", "the record claims no val_bpb", 0)
    else:
        missing = [bpb for bpb in claimed if not any(log.prints(bpb, SAME_BPB) for log in logs)]
        reason = f"claimed scores that no log prints: {shown(missing[:5])}" if missing else ""
        yield at_most("logs_val_bpb", len(missing), 0, reason)
    printed = [size for log in logs for size in log.bytes_total]
    total = claims.numbers.get("bytes_total")
    if printed and total is not None:
        nearest = min(abs(size - total) for size in printed)
        yield at_most(
            "logs_bytes", nearest, SAME_BYTES, "claimed total against the nearest printed"
        )


def _record_name(folder: Folder) -> str | None:
    if RECORD_FILE in folder.sizes:
        return RECORD_FILE
    others = [
        name
        for name in folder.sizes
        if name.lower().startswith("submission") and name.lower().endswith(".json")
    ]
    return others[0] if len(others) == 1 else None


def _named_helpers(folder: Folder) -> list[str]:
    if folder.code is None:
        return []
    try:
        program = folder.read(folder.code, MAX_CODE_BYTES).decode(errors="replace")
    except UnreadableError:
        return folder.helpers
    stems = {name: name.rpartition("/")[2].partition(".")[0] for name in folder.helpers}
    return [name for name, stem in stems.items() if stem and stem in program]


def _model_said(said: dict[str, float | None]) -> float | None:
    if said["model"] is not None:
        return said["model"]
    if said["total"] is not None and said["code"] is not None:
        return said["total"] - said["code"]
    return None


def _check_cap(total: float | None, track: Track, folder: Folder, helpers: list[str]) -> Check:
    cap = track.artifact_bytes
    if total is None:
        return unchecked("artifact_bytes", "neither model nor record is here", cap)
    counted = [name for name in (folder.code, folder.model) if name] + helpers
    reason = f"{track.name}: " + ", ".join(
        f"{shown(name)} {folder.sizes[name]:,}" for name in counted[:6]
    )
    if folder.model is None:
        reason += ", and the model as recorded"
    return Check("artifact_bytes", cap is None or 0 < total <= cap, total, cap, reason)


def _check_total(total: float | None, said: dict[str, float | None], is_measured: bool) -> Check:
    if said["total"] is None:
        return unchecked("bytes_total", "the record states no total")
    if is_measured and total is not None:
        return equal("bytes_total", total, said["total"], "sizes of the files, as recorded")
    if said["code"] is not None and said["model"] is not None:
        summed = said["code"] + said["model"]
        return equal("bytes_total", summed, said["total"], "recorded parts, recorded total")
    return unchecked("bytes_total", "the model is not in the folder", said["total"])


def _logs(folder: Folder) -> Iterator[TrainingLog]:
    for name in folder.logs[:MAX_LOGS]:
        try:
            yield TrainingLog.read(folder.read(name, MAX_LOG_BYTES))
        except UnreadableError:
            continue
