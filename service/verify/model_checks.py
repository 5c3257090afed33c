"""Checks that decode the artifact, score it, or run the folder's program, each in a child process.

The artifact is data: it is decoded and scored by the trainer that is installed here. That shows
what it holds and what it is worth, whatever the folder's program would say. The program itself
shows that the folder needs nothing else; it runs where it is known, or asked for.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_spaces.tracks import Track
from service.provenance import describe_hardware
from service.submission_fields import CODE_FILE, MODEL_FILE, RESULT_FILE, SCORE_ARGUMENTS
from service.verify.checks import Check, at_most, equal, failed, unchecked
from service.verify.dialects import Claims, number
from service.verify.folder import (
    MAX_CODE_BYTES,
    MAX_MODEL_BYTES,
    Folder,
    UnreadableError,
    shown,
)
from service.verify.sandbox import Limits, prove
from trainer.config import TrainConfig
from trainer.errors import ArtifactError, ConfigError
from trainer.flatten.program import script
from trainer.legality import illegal_in_use

DECODE = Limits(seconds=300.0, memory_bytes=8 << 30, data_bytes=8 << 30)
SCORE_MEMORY_BYTES = 64 << 30
SAME_SCORE = 1e-6
"""Bits per byte, nats: what one machine gives again."""
SAME_SCORE_ELSEWHERE = 0.01
"""On other hardware, which rounds differently."""
MOST_OVERLAP = 0.01
"""Share of the training text that may be validation text where data.max_overlap says nothing."""
FREE_GROUPS = ("evaluate", "source", "runtime", "budget")
"""Groups of settings in which a score may differ from the run that packed the artifact."""
NOT_OURS = (
    "is not an artifact of this project; files of other kinds can run code when they are loaded, "
    "so it is not opened"
)

_MAGIC = b"\x89CADDIE\n"


@dataclass(frozen=True)
class Means:
    """How artifacts are scored here."""

    data_for: Callable[[TrainConfig], Path | str]
    """The data set for these settings, or why there is none."""
    run_code: bool = False
    """Run the folder's program even where it is not known."""
    num_processes: int = 1
    seconds: float = 3600.0
    """That a pass of scoring may take."""
    say: Callable[[str], None] = lambda line: None


@dataclass
class Model:
    """A folder's artifact in the hands of a verification; `checks` yields them in order."""

    folder: Folder
    claims: Claims
    track: Track
    means: Means
    scratch: Path
    val_bpb: float | None = None
    """As reproduced."""
    digest: str | None = None
    """Of the decoded weights."""

    def checks(self) -> Iterator[Check]:
        """All checks that need the artifact."""
        try:
            copy = self._copied()
        except UnreadableError as error:
            yield (failed if self.claims.is_ours else unchecked)("artifact", str(error))
            copy = None
        decoded: Mapping[str, Any] = {}
        if copy is not None:
            self.means.say("decoding the artifact")
            outcome = prove({"what": "decode", "artifact": str(copy)}, self.scratch, DECODE)
            decoded = outcome.result or {"error": outcome.fault or "the decoder said nothing"}
            if "error" in decoded:
                yield failed("artifact", shown(decoded["error"], 400), "decodes")
                copy = None
            else:
                reason = f"{decoded['num_tensors']} tensors, decoded in a process of its own, in s"
                yield at_most("artifact", round(outcome.seconds, 2), DECODE.seconds, reason)
        self.digest = decoded.get("digest")
        yield self._check_digest(self.digest)
        made = _config(decoded.get("config"))
        recorded, fault = _recorded(self.claims)
        yield from self._check_config(made, recorded, fault)
        yield self._check_legality(made, recorded)
        config = recorded or made
        if copy is None or config is None:
            yield unchecked("val_bpb", "there is no artifact that decodes", SAME_SCORE)
            return
        yield from self._check_score(copy, config)

    def _copied(self) -> Path:
        """The artifact, out of the reach of whoever can write to the folder."""
        name = self.folder.model
        if name is None:
            raise UnreadableError(f"there is no {MODEL_FILE} in the folder")
        content = self.folder.read(name, MAX_MODEL_BYTES)
        if name != MODEL_FILE and not content.startswith(_MAGIC):
            raise UnreadableError(f"{shown(name)} {NOT_OURS}")
        copy = self.scratch / MODEL_FILE
        copy.write_bytes(content)
        return copy

    def _check_digest(self, digest: str | None) -> Check:
        recorded = self.claims.text("artifact_digest")
        recorded = None if recorded is None else shown(recorded, 80)
        if digest is None:
            return unchecked("weights_digest", "nothing was decoded", recorded)
        if recorded is None:
            return unchecked("weights_digest", f"the record has none; it is {digest}")
        return equal("weights_digest", digest, recorded, "of the decoded weights, as recorded")

    def _check_config(
        self, made: TrainConfig | None, recorded: TrainConfig | None, fault: str | None
    ) -> Iterator[Check]:
        if fault is not None:
            yield failed("config", fault, 0)
        elif made is None or recorded is None:
            yield unchecked("config", "settings are in record and artifact only of our own folders")
        else:
            changes = made.difference(recorded)
            changed = [path for path in changes if path.partition(".")[0] not in FREE_GROUPS]
            changed = [path for path in changed if path != "data.dir"]
            reason = f"recorded otherwise than packed: {', '.join(changed[:5])}" if changed else ""
            yield at_most("config", len(changed), 0, reason)

    def _check_legality(self, made: TrainConfig | None, recorded: TrainConfig | None) -> Check:
        known = [config for config in (made, recorded) if config is not None]
        if not known:
            return unchecked("legality", "the settings are not recorded", 0)
        used = {
            name
            for config in known
            for name, tracks in illegal_in_use(config).items()
            if self.track.name in tracks
        }
        reason = f"{', '.join(sorted(used))}: forbidden on {self.track.name}" if used else ""
        return at_most("legality", len(used), 0, reason)

    def _check_score(self, copy: Path, config: TrainConfig) -> Iterator[Check]:
        data = self.means.data_for(config)
        if isinstance(data, str):
            for name in ("val_bpb", "overlap", "own_code"):
                yield unchecked(name, data, SAME_SCORE if name != "overlap" else MOST_OVERLAP)
            return
        self.means.say(f"scoring the artifact on {data}")
        job = {
            "what": "score",
            "artifact": str(copy),
            "data": str(data),
            "config": config.to_dict(),
        }
        limits = Limits(self.means.seconds, SCORE_MEMORY_BYTES)
        outcome = prove(job, self.scratch, limits, self.means.num_processes)
        found = outcome.result or {"error": outcome.fault or "the scorer said nothing"}
        if "error" in found:
            fault = shown(found["error"], 400)
            is_ours = found.get("kind") in ("BackendError", "DataError")
            yield (unchecked if is_ours else failed)("val_bpb", fault, SAME_SCORE)
        else:
            self.val_bpb = found["val_bpb"]
            yield from self._check_data(found, config)
            yield from self._compare(found)
        yield self._check_own_code(config, data)

    def _check_data(self, found: Mapping[str, Any], config: TrainConfig) -> Iterator[Check]:
        recorded = self.claims.text("data_digest")
        if recorded is None:
            yield unchecked("data_digest", "the record has none", found["data_digest"])
        else:
            reason = "of the data set here, as recorded"
            yield equal("data_digest", found["data_digest"], shown(recorded, 80), reason)
        most = config.data.max_overlap if config.data.max_overlap < 1 else MOST_OVERLAP
        reason = "share of the first training tokens that are validation text"
        yield at_most("overlap", found["overlap"], most, reason)
        if self.means.num_processes > 1:
            yield unchecked("distribution", "only one process can look", 0)
        else:
            fault = found["not_a_distribution"]
            yield at_most("distribution", int(fault is not None), 0, shown(fault or "causal, sums"))

    def _compare(self, found: Mapping[str, Any]) -> Iterator[Check]:
        is_same = same_hardware(self.claims.tree.get("hardware"), found["device"])
        bound = SAME_SCORE if is_same else SAME_SCORE_ELSEWHERE
        where = "the same hardware" if is_same else "other hardware than recorded"
        for name in ("val_bpb", "val_loss"):
            said = [self.claims.numbers.get(name)]
            said += [seed.numbers.get(name) for seed in self.claims.seeds]
            distances = [abs(found[name] - value) for value in said if value is not None]
            nearest = min(distances, default=None)
            if nearest is None:
                yield unchecked(name, f"the record has none; it is {found[name]:.8f}", bound)
            else:
                reason = f"{found[name]:.8f} here, distance to what is recorded, on {where}"
                yield at_most(name, nearest, bound, reason)
        cap = self.track.eval_seconds
        if is_same and cap is not None:
            yield at_most("eval_seconds_here", found["eval_seconds"], cap, "measured now")

    def _check_own_code(self, config: TrainConfig, data: Path) -> Check:
        """The program scores the artifact in a folder with nothing but what counts."""
        try:
            arguments = self._arguments(config, data)
        except UnreadableError as error:
            return unchecked("own_code", str(error), SAME_SCORE)
        clean = self.scratch / "clean"
        clean.mkdir()
        for name in (CODE_FILE, MODEL_FILE, *self.folder.helpers):
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder.path / name, clean / name, follow_symlinks=False)
        self.means.say(f"running {CODE_FILE} in a folder of its own")
        job = {"what": "code", "program": CODE_FILE, "arguments": arguments}
        outcome = prove(job, clean, Limits(self.means.seconds, SCORE_MEMORY_BYTES))
        if outcome.fault is not None:
            return failed("own_code", shown(outcome.fault, 400), SAME_SCORE)
        try:
            said = Folder(clean).read_json(RESULT_FILE)
        except UnreadableError as error:
            return failed("own_code", str(error), SAME_SCORE)
        if said.get("artifact_digest") not in (None, self.digest):
            return failed("own_code", "it decodes other weights", SAME_SCORE)
        wanted = self.val_bpb if self.val_bpb is not None else self.claims.numbers.get("val_bpb")
        if (score := number(said.get("val_bpb"))) is None or wanted is None:
            return failed("own_code", f"its {RESULT_FILE} has no val_bpb", SAME_SCORE)
        reason = f"{score:.8f} by {CODE_FILE}, with nothing but the folder"
        return at_most("own_code", abs(score - wanted), SAME_SCORE, reason)

    def _arguments(self, config: TrainConfig, data: Path) -> list[str]:
        """How the program is told to score. Raises UnreadableError when it is not to be run."""
        if self.folder.code is None:
            raise UnreadableError(f"there is no {CODE_FILE} in the folder")
        program = self.folder.read(CODE_FILE, MAX_CODE_BYTES)
        if not self.means.run_code and not is_packaged(program, config):
            raise UnreadableError(
                f"{CODE_FILE} is not what this version packs for these settings; if you trust it, "
                "give --run-code to run it"
            )
        return [word.replace("{data}", str(data)) for word in SCORE_ARGUMENTS]


def same_hardware(recorded: object, device: str) -> bool:
    """Whether the record names the device that scored here, and, for a processor, its model."""
    text = json.dumps(recorded).lower() if recorded else ""
    if device != "cpu":
        kind = re.search(r"[a-z]*\d{2,4}", device.lower())  # h100 of "NVIDIA H100 80GB HBM3"
        return kind is not None and kind[0] in text
    return "cpu" in text and str(describe_hardware()["cpu"]).lower() in text


def is_packaged(program: bytes, config: TrainConfig) -> bool:
    """Whether it is what `caddie package` writes for these settings: the script, whichever code
    compress.code counts."""
    try:
        return program == script(config)
    except (ArtifactError, ConfigError):
        return False


def _config(tree: object) -> TrainConfig | None:
    return TrainConfig.from_dict(tree) if isinstance(tree, dict) else None


def _recorded(claims: Claims) -> tuple[TrainConfig | None, str | None]:
    tree = claims.tree.get("config")
    if not claims.is_ours or not isinstance(tree, dict):
        return None, None
    try:
        return TrainConfig.from_dict(tree), None
    except ConfigError as error:
        return None, shown(f"the recorded settings are not valid: {error}", 400)
