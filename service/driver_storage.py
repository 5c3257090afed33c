"""Optuna's storage for the one process that drives a study: fewer round trips, the same content.

Optuna reads every unfinished trial anew, three times an ask and once for each attribute, because
any process might have written to it. The driver's lease says that nobody else does, so here a
trial that was read or written once is known; what is new is looked for at every read, and all
unfinished trials are read anew now and then. Writes between `batch()` and its end go out in one
transaction. Suggestions are bit for bit those of the plain storage (tested).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

REFRESH_S = 10.0
"""All unfinished trials are read anew this often, to see what others may have done to them."""
BACKENDS = ("sqlite", "postgresql")
"""Databases whose upsert is written out here; others keep Optuna's own storage."""

KEYS = {
    models.TrialParamModel: "param_name",
    models.TrialUserAttributeModel: "key",
    models.TrialSystemAttributeModel: "key",
    models.TrialIntermediateValueModel: "step",
}
"""Table -> the column that, with trial_id, is unique."""


class DriverStorage(_CachedStorage):
    """Use from one thread, for a study whose lease this process holds.

    Args:
        backend: The database.
        clock: Monotonic seconds.
    """

    def __init__(self, backend: RDBStorage, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(backend)
        self._clock = clock
        self._read_at: dict[int, float] = {}
        """Study -> when all its unfinished trials were read."""
        self._newest: dict[int, int] = {}
        """Study -> the largest trial id that was read."""
        self.fence: tuple[int, str, Callable[[Any], None]] | None = None
        """(study, user attribute, what raises when its value says that another drives the study);
        None = no lease is held."""
        self._pending: list[tuple[Any, dict[str, Any]]] | None = None
        """(table, row) of the open batch; None = there is none."""
        self._statements: dict[Any, Any] = {}
        self._has_looked = False
        """Whether new trials were looked for in this batch: once is enough for an ask."""

    def forget(self) -> None:
        """Read everything unfinished anew: after an outage, or when others may have written."""
        self._read_at.clear()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Collect writes to trials, and commit them together at the end; nothing is written when
        the block raises. May be nested."""
        if self._pending is not None:
            yield
            return
        self._pending = []
        self._has_looked = False
        try:
            yield
            self._flush()
        except BaseException:
            self.forget()
            raise
        finally:
            self._pending = None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        with self._fenced():
            trial_id = super().create_new_trial(study_id, template_trial)
        self._studies[study_id].unfinished_trial_ids.add(trial_id)
        return trial_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        known = self._known(trial_id)
        if known is None:
            return super().get_trial(trial_id)
        return known if known.state.is_finished() else _copy(known)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
        first = self._studies[study_id].param_distribution.setdefault(param_name, distribution)
        optuna.distributions.check_distribution_compatibility(first, distribution)
        row = {
            "trial_id": trial_id,
            "param_name": param_name,
            "param_value": param_value_internal,
            "distribution_json": optuna.distributions.distribution_to_json(distribution),
        }
        self._write(models.TrialParamModel, row)
        trial = self._changed(trial_id)
        if trial is not None:
            value = distribution.to_external_repr(param_value_internal)
            trial._params = {**trial._params, param_name: value}
            trial._distributions = {**trial._distributions, param_name: distribution}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        row = {"trial_id": trial_id, "key": key, "value_json": text}
        self._write(models.TrialUserAttributeModel, row)
        trial = self._changed(trial_id)
        if trial is not None:
            trial._user_attrs = {**trial._user_attrs, key: json.loads(text)}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        row = {"trial_id": trial_id, "key": key, "value_json": text}
        self._write(models.TrialSystemAttributeModel, row)
        trial = self._changed(trial_id)
        if trial is not None:
            trial._system_attrs = {**trial._system_attrs, key: json.loads(text)}

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        model = models.TrialIntermediateValueModel
        stored, kind = model.intermediate_value_to_stored_repr(intermediate_value)
        row = {"trial_id": trial_id, "step": step, "intermediate_value": stored}
        self._write(model, {**row, "intermediate_value_type": kind})
        trial = self._changed(trial_id)
        if trial is not None:
            trial.intermediate_values = {**trial.intermediate_values, step: intermediate_value}

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        self._flush()
        with self._fenced():
            written = super().set_trial_state_values(trial_id, state, values)
        trial = self._changed(trial_id)
        if not written:
            self.forget()
        elif trial is not None:
            trial.state = state
            trial._values = list(values) if values is not None else trial._values
            if state == TrialState.RUNNING:
                trial._datetime_start = datetime.now()
            if state.is_finished():
                trial.datetime_complete = datetime.now()
        return written

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        now = self._clock()
        if now - self._read_at.get(study_id, -REFRESH_S) >= REFRESH_S:
            self._flush()
            super()._read_trials_from_remote_storage(study_id)
            self._read_at[study_id] = now
        elif self._pending is None or not self._has_looked:
            self._read_new(study_id)
            self._has_looked = True
        trials = self._studies[study_id].trials
        self._newest[study_id] = max((trial._trial_id for trial in trials.values()), default=-1)

    def _read_new(self, study_id: int) -> None:
        """Trials that others have enqueued."""
        with self._lock:
            newest = self._newest.get(study_id, -1)
            trials = self._backend._get_trials(study_id, None, set(), newest)
            known = self._trial_id_to_study_id_and_number
            fresh = [trial for trial in trials if trial._trial_id not in known]
            self._add_trials_to_cache(study_id, fresh)
            self._studies[study_id].unfinished_trial_ids.update(t._trial_id for t in fresh)

    def _known(self, trial_id: int) -> FrozenTrial | None:
        """The trial as last read or written here; None = it must be read."""
        place = self._trial_id_to_study_id_and_number.get(trial_id)
        if place is None:
            return None
        study_id, number = place
        if self._clock() - self._read_at.get(study_id, -REFRESH_S) >= REFRESH_S:
            self._read_trials_from_remote_storage(study_id)
        return self._studies[study_id].trials[number]

    def _changed(self, trial_id: int) -> FrozenTrial | None:
        """A copy of a known trial in the place of the trial: who has read that keeps it."""
        place = self._trial_id_to_study_id_and_number.get(trial_id)
        if place is None:
            return None
        study_id, number = place
        trials = self._studies[study_id].trials
        trials[number] = copy.copy(trials[number])
        return trials[number]

    def _write(self, model: Any, row: dict[str, Any]) -> None:
        with self.batch():
            assert self._pending is not None, "inside a batch"
            self._pending.append((model, row))

    def _flush(self) -> None:
        """Commit what is pending: one statement a table. Raises UpdateFinishedTrialError, and
        writes nothing, when one of the trials has ended."""
        if not self._pending:
            return
        rows: dict[Any, dict[tuple[int, Any], dict[str, Any]]] = {}
        for model, row in self._pending:
            rows.setdefault(model, {})[row["trial_id"], row[KEYS[model]]] = row
        self._pending.clear()
        with _create_scoped_session(self._backend.scoped_session) as session:
            self._check_fence(session)
            self._check_unfinished(session, {trial for each in rows.values() for trial, _ in each})
            for model, each in rows.items():
                session.connection().execute(self._statement(model), list(each.values()))

    @contextmanager
    def _fenced(self) -> Iterator[None]:
        """Look at the fence in the transaction that the block's one write commits: Optuna takes
        the session of this thread, which is this one."""
        session = self._backend.scoped_session()
        try:
            self._check_fence(session)
            yield
        finally:
            session.close()

    def _check_fence(self, session: Any) -> None:
        """Raises what the fence raises. The row stays locked until the transaction ends, where the
        database can do so: nobody takes the study over between this look and the write."""
        if self.fence is None:
            return
        study_id, key, refuse = self.fence
        found = session.connection().execute(_FENCE, {"study": study_id, "name": key}).first()
        if found is not None:
            refuse(json.loads(found[0]))

    def _check_unfinished(self, session: Any, trial_ids: set[int]) -> None:
        found = session.connection().execute(_STATES, {"trials": sorted(trial_ids)})
        for trial_id, state in found.all():
            self._backend.check_trial_is_updatable(trial_id, state)

    def _statement(self, model: Any) -> Any:
        """Inserts rows; an attribute that exists gets the new value. Made once: what is written
        with lists of rows is not compiled again, however many they are."""
        if model not in self._statements:
            insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[
                self._backend.engine.name
            ](model.__table__)
            unique = ("trial_id", KEYS[model])
            changing = [
                column.name
                for column in model.__table__.columns
                if not column.primary_key and column.name not in unique
            ]
            if model is not models.TrialParamModel:
                insert = insert.on_conflict_do_update(
                    index_elements=unique,
                    set_={name: insert.excluded[name] for name in changing},
                )
            self._statements[model] = insert
        return self._statements[model]


_ATTRS = models.StudyUserAttributeModel.__table__
_FENCE = (
    select(_ATTRS.c.value_json)
    .where(_ATTRS.c.study_id == bindparam("study"), _ATTRS.c.key == bindparam("name"))
    .with_for_update()
)
_TRIALS = models.TrialModel.__table__
_STATES = select(_TRIALS.c.trial_id, _TRIALS.c.state).where(
    _TRIALS.c.trial_id.in_(bindparam("trials", expanding=True))
)


def for_driver(backend: RDBStorage) -> BaseStorage:
    """The storage of a driver on this database."""
    known = backend.engine.name in BACKENDS
    return DriverStorage(backend) if known else _CachedStorage(backend)


def batch(study: optuna.Study) -> AbstractContextManager[None]:
    """Writes of the block to the study's trials in one transaction, where its storage can."""
    storage = study._storage
    return storage.batch() if isinstance(storage, DriverStorage) else nullcontext()


def set_fence(study: optuna.Study, key: str, refuse: Callable[[Any], None]) -> None:
    """From now on no write to a trial happens unless `refuse` accepts the study's attribute."""
    if isinstance(study._storage, DriverStorage):
        study._storage.fence = (study._study_id, key, refuse)


def forget_cache(study: optuna.Study) -> None:
    """Make the next look at the study's trials one into the database."""
    if isinstance(study._storage, DriverStorage):
        study._storage.forget()


def _copy(trial: FrozenTrial) -> FrozenTrial:
    """For an owner that changes it in place, as optuna.Trial does."""
    mine = copy.copy(trial)
    mine._params = dict(trial._params)
    mine._distributions = dict(trial._distributions)
    mine._user_attrs = dict(trial._user_attrs)
    mine._system_attrs = dict(trial._system_attrs)
    mine.intermediate_values = dict(trial.intermediate_values)
    return mine
