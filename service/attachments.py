"""Files of a trial in optuna-dashboard, as links: nothing is copied.

The dashboard finds a file by an identifier in one folder, and learns of it from an attribute of the
trial, which can only be written until the trial is told. So the attribute and a link are made just
before.
"""

from __future__ import annotations

import json
import logging
import mimetypes
import os
import uuid
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.artifacts import ArtifactMeta
from optuna.trial import FrozenTrial

from service.tracking.curve import write_curve

logger = logging.getLogger(__name__)
PREFIX = "artifacts:"
"""Of the system attributes that name a trial's files."""
FOLDER = "attachments"
NAMES = ("curve.svg", "config.json", "result.json", "verdicts.json", "train.log", "artifact.bin")
PLAIN = {"train.log": "text/plain", "artifact.bin": "application/octet-stream"}


def attachments_dir(out: Path) -> Path:
    """The folder of links, beside the studies."""
    return out / FOLDER


def attach(study: optuna.Study, trial: optuna.Trial | FrozenTrial, folder: Path) -> None:
    """Show a trial's files in the dashboard, with a picture of its loss. May be called again: it
    makes the same links. Where links cannot be made, it says so and leaves them out.

    Args:
        trial: Not told yet.
        folder: The trial's; OUT/STUDY/trial-00007.
    """
    try:
        write_curve(folder, f"{folder.parent.name}, trial {trial.number}")
        links = attachments_dir(folder.parent.parent)
        links.mkdir(parents=True, exist_ok=True)
        found = [name for name in NAMES if (folder / name).exists()]
        attrs = dict(_link(folder / name, links) for name in found)
    except (OSError, ValueError) as error:  # ValueError: half a line in metrics.jsonl
        logger.warning("optuna-dashboard will not show the files of %s: %s", folder, error)
        return
    for key, meta in attrs.items():
        study._storage.set_trial_system_attr(trial._trial_id, key, meta)


def _link(file: Path, links: Path) -> tuple[str, str]:
    """Make the link; the attribute that names it, and its value."""
    identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, str(file)))
    link = links / identifier
    if not link.is_symlink():
        os.symlink(os.path.relpath(file, links), link)
    kind = PLAIN.get(file.name) or mimetypes.guess_type(file.name)[0] or PLAIN["artifact.bin"]
    meta = ArtifactMeta(artifact_id=identifier, filename=file.name, mimetype=kind, encoding=None)
    return PREFIX + identifier, json.dumps(asdict(meta))
