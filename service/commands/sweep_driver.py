"""Drives a sweep from the command line: checks the question, builds the parts, turns the scheduler.

Separate from the commands because this is where signals, the live table and the order of starting
and ending things live.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from service.commands.data import data_for
from service.commands.recipe_config import recipe_named, settings_of_source
from service.commands.recipe_config import settings as overrides_from
from service.commands.study_files import artifact_root, dashboard_page, study_dir, tracking_uri
from service.commands.terminal import messages, named, say
from service.config import ServiceSettings, mask_passwords
from service.errors import UsageError

if TYPE_CHECKING:
    import optuna

    from search_spaces import Space
    from search_spaces.tracks import Track
    from service.live import LiveTable
    from service.policies import Policy
    from service.runners.base import Runner
    from service.scheduler import Scheduler
    from service.tracking.base import Tracker

TURN_S = 0.1
"""Pause between two turns of the scheduler."""
SHOW_EVERY_S = 1.0
MIRROR_GRACE_S = 30.0
"""How long the end of a finished study waits for MLflow."""


@dataclass(frozen=True)
class Plan:
    """A sweep, checked, before anything is started."""

    settings: ServiceSettings
    space: Space
    track: Track
    overrides: dict[str, Any]
    """Of every trial, the data folder included."""
    name: str


def make_plan(
    space: str,
    study: str | None,
    new: bool,
    sets: list[str] | None,
    settings: ServiceSettings,
    recipe: str | None = None,
) -> Plan:
    """Check everything that can be asked wrongly, before a study or a cluster is touched.

    Raises: UsageError, ConfigError.
    """
    from search_spaces import SPACES
    from service.study import study_names

    chosen = named("space", space, SPACES)
    own_name = chosen.name
    if recipe and recipe_named(recipe).name != chosen.recipe:
        own_name = f"{chosen.name}-{recipe}"
        chosen = replace(chosen, recipe=recipe)
    track = settings.track(chosen.track)
    base = chosen.base()
    overrides = overrides_from(base, sets)
    clash = [path for path in overrides if path in chosen.axes]
    if clash:
        raise UsageError(
            f"--set {', '.join(clash)}: the space {chosen.name} varies it; fix it with `caddie "
            "train`, or write a space without that axis"
        )
    overrides = settings_of_source(base, overrides, chosen.axes) | overrides
    budget = {f"budget.{name}": value for name, value in track.budget().model_dump().items()}
    config = base.with_overrides({**budget, **overrides})
    if "data.dir" not in overrides:
        overrides["data.dir"] = str(data_for(config, settings.data, chosen.recipe))
    _ = settings.max_gpu_s  # refuses a cost without a price
    name = study or own_name
    if "/" in name or name in ("", ".", ".."):
        raise UsageError(f"--study {name!r}: cannot be the name of a folder; leave out slashes")
    if new:
        name = _unused(name, study_names(settings.storage_url))
    return Plan(settings, chosen, track, overrides, name)


def _unused(name: str, names: list[str]) -> str:
    tried, count = name, 1
    while tried in names:
        count += 1
        tried = f"{name}-{count}"
    return tried


def drive(plan: Plan, study: optuna.Study) -> bool:
    """Run the sweep; False when it ended because nothing in it can work."""
    from service.live import LiveTable
    from service.policies import Ending

    live = LiveTable(messages(), plan.settings.gpu_hour_price)
    with log_to(live), StopSignals() as signals:
        say(f"study {plan.name}: starting {plan.settings.runner}")
        scheduler = _make_scheduler(plan, study, live)
        signals.are_heard = True
        try:
            with live:
                _loop(scheduler, signals, live, plan.settings.grace_seconds)
                live.say("ending: stopping workers and mirroring")
                draw_picture(plan, study)
        finally:
            scheduler.close()
    fine = (Ending.ENOUGH.value, Ending.REQUESTED.value, Ending.BUDGET.value)
    if scheduler.ending is not None and scheduler.ending not in fine:
        live.say(f"error: {scheduler.ending}", "red")
        return False
    return True


def draw_picture(plan: Plan, study: optuna.Study) -> None:
    """Put the picture of bytes against loss into the study's folder, before the last mirroring."""
    from service.reports.study_view import view_trials
    from service.reports.trade_picture import write_trade

    folder = study_dir(plan.settings, plan.name)
    cap = plan.overrides.get("budget.artifact_bytes", plan.track.artifact_bytes)
    write_trade(view_trials(study, folder), cap, folder)


def _make_scheduler(plan: Plan, study: optuna.Study, live: LiveTable) -> Scheduler:
    from service.filters import default_filters
    from service.provenance import collect
    from service.runners.base import Demand
    from service.scheduler import Scheduler
    from trainer.data.dataset import Dataset

    settings = plan.settings
    provenance = collect(data_digest=Dataset.open(plan.overrides["data.dir"]).digest)
    runner = make_runner(settings)
    trackers: list[Tracker] = []
    try:
        trackers = trackers_of(study, settings, live)
        return Scheduler(
            study,
            plan.space,
            runner,
            trackers,
            default_filters(settings.size_limit, plan.track.name, plan.space.recipe),
            Demand(settings.workers_per_trial, settings.gpus_per_worker, settings.cpus_per_worker),
            settings.trials,
            settings.out,
            track=plan.track,
            overrides=plan.overrides,
            max_gpu_s=settings.max_gpu_s,
            policy=policy_of(settings),
            provenance=provenance,
        )
    except BaseException:
        runner.close()
        for tracker in trackers:
            tracker.close(0.0)
        raise


def policy_of(settings: ServiceSettings) -> Policy:
    """The limits that the settings name; the others as they are."""
    from service.policies import Policy

    return Policy(max_attempts=settings.max_attempts, silence_s=settings.hang_seconds)


def make_runner(settings: ServiceSettings) -> Runner:
    """Where trials run; starts or joins the cluster. Raises UsageError for settings that exclude
    each other."""
    if settings.runner == "local":
        if settings.isolation == "resident":
            raise UsageError(
                "isolation = 'resident' needs runner = 'ray': the local runner starts torchrun for "
                "every trial; leave one of both out"
            )
        from service.runners.local_runner import LocalRunner

        return LocalRunner()
    from service.runners.ray_runner import RayRunner

    return RayRunner(
        settings.address,
        isolation=settings.isolation,
        trials_per_gang=settings.trials_per_gang,
        policy=policy_of(settings),
    )


def trackers_of(study: optuna.Study, settings: ServiceSettings, live: LiveTable) -> list[Tracker]:
    """The mirrors of a study: JSON lines, the console, MLflow, notes in optuna-dashboard."""
    from service.live import ConsoleTracker
    from service.tracking.dashboard_notes import DashboardNotes
    from service.tracking.jsonl_tracker import JsonlTracker
    from service.tracking.mlflow_tracker import MlflowTracker

    folder = study_dir(settings, study.study_name)
    mlflow = MlflowTracker(
        study.study_name,
        folder,
        tracking_uri(settings),
        artifact_root(settings),
        warn=lambda line: live.say(line, "yellow"),
        dashboard=dashboard_page(settings, study),
    )
    return [
        JsonlTracker(folder / "trials.jsonl"),
        ConsoleTracker(live),
        mlflow,
        DashboardNotes(study, mlflow.page_of(settings.mlflow_page)),
    ]


def mirror_leftovers(plan: Plan, study: optuna.Study) -> None:
    """Send what an earlier sweep of the study could not."""
    from service.tracking.mlflow_tracker import MlflowTracker
    from service.tracking.outbox import unsent_folders

    folder, uri = study_dir(plan.settings, plan.name), tracking_uri(plan.settings)
    if folder.exists() and unsent_folders(folder, mask_passwords(uri)):
        say("mirroring to MLflow what is not there yet")
        page = dashboard_page(plan.settings, study)
        MlflowTracker(
            plan.name, folder, uri, artifact_root(plan.settings), warn=say, dashboard=page
        ).close(MIRROR_GRACE_S)


def _loop(scheduler: Scheduler, signals: StopSignals, live: LiveTable, grace_s: float) -> None:
    shown, obeyed = 0.0, 0
    while True:
        if signals.count > obeyed:
            obeyed = signals.count
            now = obeyed > 1
            scheduler.stop_asking(0.0 if now else grace_s)
            live.say(
                "stopping now; the study can be resumed"
                if now
                else f"stopping: running trials have {grace_s:g} s to finish; once more stops now"
            )
        if not scheduler.step():
            return
        if time.monotonic() - shown >= SHOW_EVERY_S:
            live.show(scheduler.status())
            shown = time.monotonic()
        time.sleep(TURN_S)


class StopSignals:
    """Counts SIGINT and SIGTERM instead of dying of them.

    While the cluster starts, nobody looks at the count: the first signal takes effect right after,
    the second one interrupts the start.
    """

    def __init__(self) -> None:
        self.count = 0
        self.are_heard = False
        """Whether somebody looks at the count."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for each in (signal.SIGINT, signal.SIGTERM):
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1
        if not self.are_heard and self.count > 1:
            raise KeyboardInterrupt


class _LiveHandler(logging.Handler):
    def __init__(self, live: LiveTable) -> None:
        super().__init__(logging.WARNING)
        self._live = live

    def emit(self, record: logging.LogRecord) -> None:
        self._live.say(record.getMessage(), "yellow")


@contextmanager
def log_to(live: LiveTable) -> Iterator[None]:
    """Warnings of the service appear above the table."""
    handler = _LiveHandler(live)
    logger = logging.getLogger("service")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
