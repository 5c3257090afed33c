"""The tracker that mirrors a study to MLflow from a thread of its own.

The scheduler's calls only write `tracking.json` in the trial's folder and wake the thread. The
thread copies folders to the server (mlflow_mirror) and keeps trying while the server is away; what
is still unsent when the sweep ends lies in the folders, and the next sweep of the study sends it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.config import mask_passwords
from service.tracking.mlflow_mirror import MlflowMirror
from service.tracking.outbox import (
    STUDY_ID_FILE,
    close_entry,
    open_entry,
    read_entry,
    read_progress,
    unsent_folders,
)
from service.trial import TrialSpec, Verdict
from trainer.report import TrainResult

MAX_ERROR_CHARS = 160
Warn = Callable[[str], None]


def _warn_on_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class MlflowTracker:
    """Mirrors one study. All methods return at once; `close` waits for at most its grace.

    Args:
        study: Name of the study.
        study_dir: Folder under which the trial folders lie; unsent ones found there are sent.
        tracking_uri: MLflow server or database URL.
        artifact_root: Where a new experiment keeps files; None = as the server decides.
        warn: Takes one line for a person, from the mirror's thread.
        interval_s: Seconds between two looks at the folders of running trials.
        max_backoff_s: Longest pause between attempts while the server is away.
        dashboard: Address of the study's page in optuna-dashboard, for links; None = no links.
    """

    def __init__(
        self,
        study: str,
        study_dir: Path,
        tracking_uri: str,
        artifact_root: str | None = None,
        warn: Warn = _warn_on_stderr,
        interval_s: float = 2.0,
        max_backoff_s: float = 30.0,
        dashboard: str | None = None,
    ) -> None:
        study_dir.mkdir(parents=True, exist_ok=True)
        self._study = study
        self._study_dir = study_dir
        self._study_id = study_id(study_dir)
        self._uri = tracking_uri
        self._shown_uri = mask_passwords(tracking_uri)
        self._artifact_root = artifact_root
        self._dashboard = dashboard
        self._warn = warn
        self._interval_s = interval_s
        self._max_backoff_s = max_backoff_s
        self._mirror: MlflowMirror | None = None
        self._lock = threading.Lock()
        self._pending = dict.fromkeys(unsent_folders(study_dir, self._shown_uri), 0)
        """Folder -> failed attempts."""
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._down = False
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def trial_started(self, spec: TrialSpec) -> None:
        open_entry(spec)
        self._enqueue(spec.folder)

    def trial_events(self, spec: TrialSpec, events: list[dict[str, Any]]) -> None:
        """Nothing to keep: the runner writes metrics.jsonl, and the thread reads it."""

    def trial_ended(
        self, spec: TrialSpec, state: str, verdicts: list[Verdict], result: TrainResult | None
    ) -> None:
        close_entry(spec, state, verdicts, result)
        self._enqueue(spec.folder)
        self._wake.set()

    def close(self, grace_seconds: float = 10.0) -> None:
        self._deadline = time.monotonic() + grace_seconds
        self._closing.set()
        self._wake.set()
        self._thread.join(grace_seconds)
        left = self.unsent_trials()
        if left:
            self._warn(
                f"MLflow at {self._shown_uri}: {left} trial{'s are' if left > 1 else ' is'} not "
                "mirrored yet; nothing is lost, the next `caddie sweep run` of this study sends "
                "the rest"
            )

    def unsent_trials(self) -> int:
        """Trials that the server does not have completely."""
        with self._lock:
            return len(self._pending)

    def page_of(self, base: str) -> Callable[[TrialSpec], str | None]:
        """Where a trial's run is shown, as far as the mirror has come.

        Args:
            base: Address of MLflow for people.
        """

        def page(spec: TrialSpec) -> str | None:
            run_id = read_progress(spec.folder, self._shown_uri).run_id
            experiment = self._mirror.experiment_id() if run_id and self._mirror else None
            return f"{base}/#/experiments/{experiment}/runs/{run_id}" if experiment else None

        return page

    def _enqueue(self, folder: Path) -> None:
        with self._lock:
            self._pending.setdefault(folder, 0)

    def _run(self) -> None:
        pause_s = self._interval_s
        while True:
            closing = self._closing.is_set()  # before the pass: what comes later is seen next time
            if self._attempt(closing):
                pause_s = self._interval_s
                if closing:
                    return
            else:
                pause_s = min(2 * pause_s, self._max_backoff_s)
            if closing:
                if time.monotonic() + self._interval_s > self._deadline:
                    return
                time.sleep(self._interval_s)
            else:
                (self._closing if self._down else self._wake).wait(pause_s)
                self._wake.clear()

    def _attempt(self, closing: bool) -> bool:
        """One pass over the folders; False when the server did not take everything."""
        try:
            mirror = self._connected()
            self._pass(mirror)
            if closing:
                mirror.close_study(sorted(self._study_dir.glob("*.svg")))
        except Exception as error:  # whatever the client raises: the sweep must go on
            self._report(error)
            return False
        if self._down:
            self._down = False
            self._warn(f"MLflow at {self._shown_uri} is back; mirroring goes on")
        return True

    def _pass(self, mirror: MlflowMirror) -> None:
        with self._lock:
            # A folder that failed goes last, so that a broken one does not hold up the others.
            folders = sorted(self._pending, key=lambda folder: (self._pending[folder], folder))
        for folder in folders:
            try:
                entry = read_entry(folder)
                if entry is not None and not mirror.sync(folder, entry).finished:
                    continue
            except Exception:
                with self._lock:
                    self._pending[folder] += 1
                raise
            with self._lock:
                if entry is None or read_entry(folder) == entry:  # not launched again meanwhile
                    self._pending.pop(folder, None)

    def _connected(self) -> MlflowMirror:
        """Importing MLflow and opening its store takes seconds; both happen on this thread."""
        if self._mirror is None:
            quiet_mlflow()
            mirror = MlflowMirror(
                self._uri, self._study, self._study_id, self._artifact_root, self._dashboard
            )
            mirror.open_study()
            self._mirror = mirror
        return self._mirror

    def _report(self, error: Exception) -> None:
        if not self._down:
            self._down = True
            words = " ".join(mask_passwords(str(error)).split())
            words = words if len(words) <= MAX_ERROR_CHARS else words[:MAX_ERROR_CHARS] + "..."
            self._warn(
                f"MLflow at {self._shown_uri} cannot be used; the sweep goes on, trials are "
                f"kept in their folders and mirrored later ({type(error).__name__}: {words})"
            )


def quiet_mlflow() -> None:
    """Settings for MLflow as a library: short retries, no usage reports, no migration log.

    Must run before the first import of mlflow in the process; a value set by the user wins.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def study_id(study_dir: Path, lost: str | None = None) -> str:
    """Unique name of this study wherever it is mirrored; made once, kept in its folder.

    Args:
        lost: What it was, when that is known and the file is gone.
    """
    path = study_dir / STUDY_ID_FILE
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(lost or uuid.uuid4().hex)
        os.replace(partial, path)
    return path.read_text().strip()
