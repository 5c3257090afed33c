"""Settings of the service: command line over caddie.toml over built-in defaults.

The environment holds only secrets and what other tools define: MLFLOW_TRACKING_URI and RAY_ADDRESS
count where neither the command line nor the file says otherwise.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from search_spaces.tracks import TRACKS, Track
from service.errors import UsageError
from trainer.config import Settings, describe_faults

FILE = "caddie.toml"
MLFLOW_URL = "http://127.0.0.1:5000"
"""Where `caddie ui` serves it, unless that port is taken."""
ENVIRONMENT = {"tracking_uri": "MLFLOW_TRACKING_URI", "address": "RAY_ADDRESS"}


PathSetting = Annotated[Path, Field(strict=False)]
"""A path, or the string that TOML has for one."""


class ServiceSettings(Settings):
    """How sweeps run here. Keys of caddie.toml are the fields' names."""

    out: PathSetting = Path("caddie-runs")
    """Folder of studies: STUDY/trial-00007/ and, by default, the databases."""
    storage: str | None = None
    """Optuna storage URL; None = SQLite in `out`."""
    tracking_uri: str | None = None
    """MLflow server or database; None = SQLite in `out`."""
    mlflow_url: str | None = None
    """Where people open MLflow, for links; None = tracking_uri if that is a server, else where
    `caddie ui` serves it."""
    dashboard_url: str = "http://127.0.0.1:8080"
    """Where people open optuna-dashboard, for links; by default where `caddie ui` serves it."""
    address: str | None = None
    """Ray cluster; None = start one on this machine."""
    runner: Literal["ray", "local"] = "ray"
    """"ray": TorchTrainer on a cluster. "local": torchrun on this machine."""
    isolation: Literal["trial", "resident"] = "trial"
    """"trial": every trial gets processes of its own. "resident": processes stay on their gang and
    serve trial after trial, each from a fresh state; runner = "ray" only."""
    trials_per_gang: PositiveInt = 50
    """After how many trials processes that stay are replaced."""
    data: PathSetting | None = None
    """Folder of shards and tokenizer; None = the embedded corpus."""
    trials: PositiveInt = 12
    """Trials told COMPLETE or PRUNED in all, over every run of the study."""
    workers_per_trial: PositiveInt = 1
    gpus_per_worker: NonNegativeFloat = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    seed: int = 0
    """Seeds the sampler."""
    max_attempts: PositiveInt = 2
    """How often a trial is tried when it fails through nobody's choice."""
    grace_seconds: NonNegativeFloat = 60.0
    """How long running trials may go on after the sweep was asked to stop."""
    hang_seconds: NonNegativeFloat = 300.0
    """A trial that trains and reports no step for this long is killed and tried again; never less
    than ten times what its steps take between two reports. 0 = never."""
    max_gpu_hours: PositiveFloat | None = None
    """GPU-hours (worker-hours without GPUs) that trials of a study may hold in all, failed attempts
    included; no trial is started that is expected to pass them. None = no limit."""
    gpu_hour_price: NonNegativeFloat = 0.0
    """Of one GPU-hour, in whatever currency max_cost is in; 0 = unknown."""
    max_cost: PositiveFloat | None = None
    """As max_gpu_hours, in money; needs gpu_hour_price. None = no limit."""
    size_limit: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """A trial whose probability of exceeding the artifact cap is above this is not launched."""
    tracks: dict[str, Track] = Field(default_factory=dict)
    """The user's own tracks, beside the built-in ones."""

    @property
    def storage_url(self) -> str:
        """The Optuna storage in use."""
        return self.storage or f"sqlite:///{self.out.absolute() / 'caddie.db'}"

    @property
    def mlflow_page(self) -> str:
        """Address of MLflow for people."""
        served = (self.tracking_uri or "").startswith(("http://", "https://"))
        page = self.mlflow_url or (self.tracking_uri if served else None) or MLFLOW_URL
        return mask_passwords(page.rstrip("/"))

    @property
    def max_gpu_s(self) -> float | None:
        """The tighter of both budgets in GPU-seconds. Raises UsageError for a cost without a
        price."""
        hours = [] if self.max_gpu_hours is None else [self.max_gpu_hours]
        if self.max_cost is not None:
            if self.gpu_hour_price == 0:
                raise UsageError("max_cost needs the price of a GPU-hour; give --gpu-hour-price")
            hours.append(self.max_cost / self.gpu_hour_price)
        return 3600 * min(hours) if hours else None

    def track(self, name: str) -> Track:
        """A track by name, the user's first. Raises UsageError naming the nearest."""
        known = {**TRACKS, **self.tracks}
        if name not in known:
            raise UsageError(f"no track {name!r}; {nearest(name, known)}")
        return known[name]


def load_settings(
    command_line: Mapping[str, Any] | None = None, file: Path | None = None
) -> ServiceSettings:
    """Merge the sources of settings.

    Args:
        command_line: Values given there; None values count as not given.
        file: The settings file; None = caddie.toml in the working directory, if there is one.

    Raises:
        UsageError: The file is missing, unreadable or has unknown or mistyped keys; all of them are
            listed.
    """
    given = {key: value for key, value in (command_line or {}).items() if value is not None}
    path = file or Path(FILE)
    written = _read(path) if file is not None or path.exists() else {}
    defined = {key: os.environ[name] for key, name in ENVIRONMENT.items() if os.environ.get(name)}
    try:
        return ServiceSettings.model_validate({**defined, **written, **given})
    except ValidationError as error:
        raise UsageError("\n".join(describe_faults(error))) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; write it or leave out the option") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}; mend that line") from None
    for name, track in _tables(table.get("tracks")):
        track.setdefault("name", name)
    faults = [
        f"{path}: {key}: no such setting; {nearest(key, ServiceSettings.model_fields)}"
        for key in table
        if key not in ServiceSettings.model_fields
    ]
    known = {key: value for key, value in table.items() if key in ServiceSettings.model_fields}
    try:
        ServiceSettings.model_validate(known)
    except ValidationError as error:
        faults += [f"{path}: {line}" for line in _describe(error)]
    if faults:
        raise UsageError("\n".join(faults))
    return known


def _tables(value: Any) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict):
        return []
    return [(name, table) for name, table in value.items() if isinstance(table, dict)]


def _describe(error: ValidationError) -> list[str]:
    """As describe_faults, but near names come from tracks, not from training settings."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            leaf = str(fault["loc"][-1])
            lines.append(f"{path}: no such setting; {nearest(leaf, Track.model_fields)}")
        else:
            message = fault["msg"][0].lower() + fault["msg"][1:]
            lines.append(f"{path} = {fault['input']!r}: {message}; correct it")
    return lines


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The remedy for a wrong name: the nearest ones, else all."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"there are {', '.join(known) or 'none'}"


def with_driver(url: str) -> str:
    """A PostgreSQL URL that names the client library we bring, psycopg2: SQLAlchemy 2.1 takes a
    plain `postgresql://` for another one. Any other URL as it is."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)


def mask_passwords(text: str) -> str:
    """The text with every password in a URL replaced by ***."""
    return re.sub(r"(://[^:/@\s]*:)[^@\s]*(@)", r"\1***\2", text)
