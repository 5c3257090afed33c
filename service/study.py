"""Open, resume and write an Optuna study: the storage is the truth about which trials exist.

How a trial is told is decided here once: a rejected or stopped trial is PRUNED and carries its
broken constraint, so that the sampler learns where feasible configurations are; FAIL is for
failures that are nobody's choice and teaches nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from search_spaces import Space
from search_spaces.tracks import TRACKS, Track
from service.config import mask_passwords, nearest, with_driver
from service.driver_storage import for_driver
from service.errors import StorageError, UsageError
from service.sampler import QuickTPE, ReplayableTPE
from service.trial import Verdict

OBJECTIVE = "val_bpb"
LEGACY_CONSTRAINTS = "constraints"
"""System attribute that optuna-dashboard 0.21 reads; Optuna 5 writes `constraints:<name>`."""
FOUNDATION = ("space", "recipe", "track", "budget", "overrides", "axes")
"""Study attributes that a resumed sweep must agree with, else its trials cannot be compared."""
STOP_ATTR = "stop_requested"
CONFIRMS = "confirms"
"""Attribute of trials that `caddie confirm` ran: fresh seeds, which count towards no sweep."""
SEED_PATH = "runtime.seed"
STORAGE_FAULTS = (SQLAlchemyError, StorageInternalError)
"""What a storage raises when it is away or broken."""


def open_study(
    name: str,
    storage_url: str,
    space: Space,
    *,
    track: Track | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> optuna.Study:
    """Create a study, or resume the one of this name.

    The space's starting points are enqueued once, also when an earlier attempt was killed between
    creating the study and enqueueing them.

    Args:
        name: Same name = same study.
        storage_url: Any SQLAlchemy URL that Optuna takes.
        space: What is searched.
        track: Budget in force; None = the space's own.
        overrides: Settings replaced for every trial.
        seed: Seeds the sampler; each trial has a stream of its own.

    Raises:
        StorageError: The storage cannot be opened or written.
        UsageError: The study exists with another space, recipe, track or other settings.
    """
    faults = space.faults()
    if faults:
        raise UsageError("\n".join(faults))
    track = track or TRACKS[space.track]
    foundation = {
        "space": space.name,
        "recipe": space.recipe,
        "track": track.name,
        "budget": track.budget().model_dump(mode="json"),
        "overrides": _that_matter(overrides or {}),
        "axes": {
            path: optuna.distributions.distribution_to_json(axis)
            for path, axis in space.axes.items()
        },
    }
    _make_folder(storage_url)
    storage = for_driver(open_storage(storage_url))
    with _storage_errors(storage_url):
        study = optuna.create_study(
            study_name=name, storage=storage, direction="minimize", load_if_exists=True
        )
        _lay_foundation(study, foundation)
        _name_objective(study)
        study.sampler = make_sampler(seed)
        _enqueue_once(study, space)
    return study


def load_study(name: str, storage_url: str, for_writing: bool = False) -> optuna.Study:
    """An existing study, to look at, or to write to under its lease.

    Raises:
        StorageError: The storage cannot be opened.
        UsageError: There is no such study; names near ones.
    """
    if not _sqlite_exists(storage_url):
        raise UsageError(
            f"no study {name!r}: there is no storage at {mask_passwords(storage_url)}; start one "
            "with `caddie sweep run`"
        )
    storage = open_storage(storage_url)
    with _storage_errors(storage_url):
        names = optuna.get_all_study_names(storage)
        if name not in names:
            raise UsageError(f"no study {name!r}; {nearest(name, names)}")
        kept = for_driver(storage) if for_writing else storage
        return optuna.load_study(study_name=name, storage=kept, sampler=make_sampler(0))


def study_names(storage_url: str) -> list[str]:
    """Names of all studies; none when the storage does not exist yet."""
    if not _sqlite_exists(storage_url):
        return []
    storage = open_storage(storage_url)
    with _storage_errors(storage_url):
        return optuna.get_all_study_names(storage)


def open_storage(storage_url: str) -> RDBStorage:
    """Connect, creating the tables when they are missing.

    Raises:
        StorageError: With the URL (password masked) and what to do.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _storage_errors(storage_url):
        url = make_url(with_driver(storage_url))
        connect: dict[str, Any] = {}
        if url.get_backend_name() == "sqlite":
            connect["timeout"] = 60  # seconds to wait for another process's lock
        if url.get_backend_name() == "postgresql":
            connect["connect_timeout"] = 10
        return RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": connect, "pool_pre_ping": True},
        )


def make_sampler(seed: int) -> ReplayableTPE:
    """The sampler of every study. A trial's proposal depends on the seed, its number and the
    study's trials, not on what this process asked before."""
    return QuickTPE(seed)


def write_constraints(
    study: optuna.Study, trial: optuna.Trial, verdicts: Sequence[Verdict]
) -> None:
    """Write the verdicts that decided a trial as constraints, in the form of every reader.

    `set_constraint` keeps the first value for ever, so this is called once, just before tell, with
    what was measured or, for a trial that will never be measured, with the forecast that ended it.
    Called again after a crash, it keeps what is there.
    """
    written = study._storage.get_trial_system_attrs(trial._trial_id)
    values = {verdict.name: verdict.excess for verdict in deciding(verdicts)}
    for name, value in values.items():
        if f"{LEGACY_CONSTRAINTS}:{name}" not in written:
            trial.set_constraint(name, value)
    if values and LEGACY_CONSTRAINTS not in written:
        study._storage.set_trial_system_attr(
            trial._trial_id, LEGACY_CONSTRAINTS, list(values.values())
        )


def deciding(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts that become constraints: all measured ones, and forecasts that ended the trial.

    A forecast gives way to a measurement of the same name.
    """
    measured = {verdict.name for verdict in verdicts if not verdict.predicted}
    latest = {
        verdict.name: verdict
        for verdict in verdicts
        if not verdict.predicted or (not verdict.ok and verdict.name not in measured)
    }
    return list(latest.values())


def live_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """The handle of an unfinished trial. Raises KeyError when there is no such trial."""
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    return optuna.Trial(study, trial_id)


def add_seed(
    study: optuna.Study, trial: FrozenTrial, seed: int, attrs: Mapping[str, Any]
) -> optuna.Trial:
    """A running trial with the parameters of another one and a seed of its own.

    Made in one write and never asked for, so that nothing waiting in the queue is taken for it.
    """
    seeds = optuna.distributions.IntDistribution(0, 2**31 - 1)
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={**trial.params, SEED_PATH: seed},
        distributions={**trial.distributions, SEED_PATH: seeds},
        user_attrs=dict(attrs),
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=template)
    return optuna.Trial(study, trial_id)


def take_up(study: optuna.Study, number: int) -> optuna.Trial | None:
    """An unfinished trial as a running one; None when another driver took it from the queue."""
    trial = live_trial(study, number)
    state = study._storage.get_trial(trial._trial_id).state
    if state == TrialState.WAITING and not study._storage.set_trial_state_values(
        trial._trial_id, TrialState.RUNNING
    ):
        return None
    return trial


def last_step(study: optuna.Study, trial: optuna.Trial) -> int:
    """The last step with an intermediate value, also of an earlier attempt; -1 = none."""
    step = study._storage.get_trial(trial._trial_id).last_step
    return -1 if step is None else step


def requeue(study: optuna.Study, number: int) -> None:
    """Put an unfinished trial back in the queue: the next ask returns it, number and parameters
    kept, before anything new is proposed."""
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def ask_to_stop(study: optuna.Study, grace_s: float) -> None:
    """Tell the driver, in whatever process, to ask for no more trials and to give running ones
    that many seconds."""
    study.set_user_attr(STOP_ATTR, grace_s)


def stop_grace(study: optuna.Study) -> float | None:
    """The grace that somebody gave with ask_to_stop; None = nobody asked."""
    return study.user_attrs.get(STOP_ATTR)


def forget_stop(study: optuna.Study) -> None:
    """A sweep that starts again overrules an earlier wish to stop."""
    if stop_grace(study) is not None:
        study.set_user_attr(STOP_ATTR, None)


def frozen_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials in these states, by number, not to be changed."""
    return study.get_trials(deepcopy=False, states=states or None)


def _lay_foundation(study: optuna.Study, foundation: Mapping[str, Any]) -> None:
    attrs = study.user_attrs
    faults = []
    for key in FOUNDATION:
        if key not in attrs:
            study.set_user_attr(key, foundation[key])
        elif attrs[key] != foundation[key]:
            faults.append(f"{key}: the study has {attrs[key]}, you ask for {foundation[key]}")
    if faults:
        raise UsageError(
            f"study {study.study_name!r} exists with other settings; choose another --study, or "
            "ask for the same:\n" + "\n".join(faults)
        )


def _name_objective(study: optuna.Study) -> None:
    """What pages call the value."""
    if study.metric_names is None:
        with warnings.catch_warnings():  # Optuna calls it experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["bits per byte"])


def _that_matter(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As a configuration's digest: not where data lies, nor how runs are executed."""
    return {
        path: value
        for path, value in overrides.items()
        if path in ("runtime.seed", "runtime.dtype")
        or not path.startswith(("data.dir", "runtime."))
    }


def _enqueue_once(study: optuna.Study, space: Space) -> None:
    if study.user_attrs.get("enqueued"):
        return
    for point in space.enqueued:
        study.enqueue_trial(point, skip_if_exists=True)
    study.set_user_attr("enqueued", len(space.enqueued))


def _sqlite_exists(storage_url: str) -> bool:
    """False for a SQLite file that is not there: looking must not create it."""
    file = _sqlite_file(storage_url)
    return file is None or file.exists()


def _make_folder(storage_url: str) -> None:
    file = _sqlite_file(storage_url)
    if file is not None:
        with _storage_errors(storage_url):
            file.parent.mkdir(parents=True, exist_ok=True)


def _sqlite_file(storage_url: str) -> Path | None:
    with _storage_errors(storage_url):
        url = make_url(storage_url)
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(url.database)


@contextmanager
def _storage_errors(storage_url: str) -> Iterator[None]:
    """Turns what SQLAlchemy, a driver or Optuna raise into a StorageError."""
    try:
        yield
    except (SQLAlchemyError, ImportError, OSError, RuntimeError, OptunaError) as error:
        if isinstance(error, StorageError):
            raise
        reason = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        raise StorageError(
            f"cannot use the storage {mask_passwords(storage_url)}: {mask_passwords(reason)}; "
            + _remedy(storage_url)
        ) from error


def _remedy(storage_url: str) -> str:
    if storage_url.startswith("sqlite"):
        return "check that the folder exists and is writable, or give another --storage"
    if "://" not in storage_url:
        return "write it as sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    return "check that the server runs, the address and password, and that its driver is installed"
