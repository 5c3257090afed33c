"""A runner with its own clock: runs follow a script, and hours pass in milliseconds.

For the scheduler's tests and for `caddie simulate`. It keeps the contract of every runner, folder
files included, except artifact.bin, for which there are no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from service.errors import RunnerError
from service.runners.base import Demand, RunState, Update
from service.trial import TrialFolder, TrialSpec, write_json
from trainer.account import count_parameters
from trainer.report import TrainResult, plain


@dataclass(frozen=True)
class FakeRun:
    """The script of one run. All times in seconds of the runner's clock."""

    start_s: float = 5.0
    """From submission to the first step."""
    train_s: float = 8.0
    step_s: float = 0.05
    finish_s: float = 2.0
    """From the last step to the result: quantise, pack, evaluate."""
    eval_s: float = 1.0
    """Reported as the evaluation's seconds."""
    compile_s: float = 0.0
    """The part of start_s that is reported as priming."""
    num_records: int = 20
    """Step records over the whole run."""
    loss: Callable[[float], float] = lambda progress: 6.0 - 3.0 * progress
    """Training loss in nats at a share of train_s."""
    val_bpb: float | None = 2.0
    bytes_code: int = 40_000
    bytes_model: int = 80_000
    fails_at_s: float | None = None
    """Seconds after submission at which the run ends with `error`; None = it does not."""
    error: str = "ValueError: a defect"
    out_of_memory: bool = False
    """The end at fails_at_s is for lack of device memory."""
    ignores_stop: bool = False
    cannot_be_placed: bool = False


Script = Callable[[TrialSpec], FakeRun]


@dataclass
class _Submitted:
    spec: TrialSpec
    run: FakeRun
    at: float
    told: int = 0
    """Records already handed out."""
    stop: str | None = None
    stop_at: float = 0.0


class FakeRunner:
    """Keeps the Runner protocol without processes.

    Args:
        script: What a trial will do; or a queue of runs, in order of submission.
        slots: Trials that run at once, whatever their demand.
        clock: Seconds; None = an own clock that `advance` moves.
    """

    def __init__(
        self,
        script: Script | Iterable[FakeRun],
        slots: int = 2,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._script = script if callable(script) else _queue(script)
        self._slots = slots
        self._clock = clock
        self._seconds = 1_000_000.0
        self._submitted: dict[int, _Submitted] = {}
        self.submissions: list[TrialSpec] = []
        """Every spec ever submitted, oldest first."""

    def now(self) -> float:
        """The clock that the scheduler of these runs must use."""
        return self._clock() if self._clock is not None else self._seconds

    def advance(self, seconds: float) -> None:
        """Let own time pass."""
        self._seconds += seconds

    def free_slots(self, demand: Demand) -> int:
        return self._slots - len(self._submitted)

    def total_slots(self, demand: Demand) -> int:
        return self._slots

    def submit(self, spec: TrialSpec, demand: Demand) -> None:
        self.submissions.append(spec)
        run = self._script(spec)
        if run.cannot_be_placed or self.free_slots(demand) <= 0:
            raise RunnerError(f"trial {spec.key} cannot be placed; free some slots")
        self._start(spec, run)

    def _start(self, spec: TrialSpec, run: FakeRun) -> None:
        self._submitted[spec.number] = _Submitted(spec, run, self.now())

    def poll(self, number: int) -> Update:
        trial = self._submitted[number]
        events = self._new_events(trial)
        elapsed = self.now() - trial.at
        if trial.run.fails_at_s is not None and elapsed >= trial.run.fails_at_s:
            return self._end(trial, self._failure(trial, events))
        if trial.stop is not None and not trial.run.ignores_stop:
            return self._end(trial, self._result(trial, events, trial.stop))
        if elapsed >= trial.run.start_s + trial.run.train_s + trial.run.finish_s:
            return self._end(trial, self._result(trial, events, None))
        started = elapsed >= trial.run.start_s
        return Update(RunState.RUNNING if started else RunState.STARTING, events)

    def request_stop(self, number: int, reason: str) -> None:
        trial = self._submitted[number]
        trial.stop, trial.stop_at = reason, self.now()

    def cancel(self, number: int, hung: bool = False) -> None:
        del self._submitted[number]

    def close(self) -> None:
        self._submitted.clear()

    def _end(self, trial: _Submitted, update: Update) -> Update:
        del self._submitted[trial.spec.number]
        return update

    def _failure(self, trial: _Submitted, events: list[dict[str, Any]]) -> Update:
        state = RunState.OUT_OF_MEMORY if trial.run.out_of_memory else RunState.FAILED
        return Update(state, events, error=trial.run.error)

    def _new_events(self, trial: _Submitted) -> list[dict[str, Any]]:
        run, events = trial.run, []
        trained = min(self.now() - trial.at - run.start_s, run.train_s)
        due = int(trained / run.train_s * run.num_records + 1e-9) if trained > 0 else 0
        for index in range(trial.told, due):
            progress = (index + 1) / run.num_records
            events.append(plain(_step_record(trial, progress)))
        trial.told = max(trial.told, due)
        if events:
            with TrialFolder(trial.spec.folder).metrics.open("a") as file:
                file.writelines(json.dumps(event) + "\n" for event in events)
        return events

    def _result(
        self, trial: _Submitted, events: list[dict[str, Any]], stopped: str | None
    ) -> Update:
        result = _train_result(trial, stopped)
        folder = TrialFolder(trial.spec.folder)
        folder.log.write_text(f"fake run of {trial.spec.key}\n")
        write_json(folder.result, result.model_dump(mode="json"))
        return Update(RunState.FINISHED, events, result=result)


def _queue(runs: Iterable[FakeRun]) -> Script:
    remaining = iter(runs)
    return lambda spec: next(remaining)


def _step_record(trial: _Submitted, progress: float) -> dict[str, Any]:
    run, data = trial.run, trial.spec.config.data
    elapsed = progress * run.train_s
    return {
        "kind": "step",
        "time": trial.at + run.start_s + elapsed,
        "step": max(1, round(elapsed / run.step_s)),
        "elapsed_s": elapsed,
        "progress": progress,
        "train_loss": run.loss(progress),
        "step_ms": 1000 * run.step_s,
        "lr_mult": 1.0,
        "tokens_per_s": data.batch_tokens / run.step_s,
    }


def _train_result(trial: _Submitted, stopped: str | None) -> TrainResult:
    run, config = trial.run, trial.spec.config
    trained = run.train_s if stopped is None else max(0.0, trial.stop_at - trial.at - run.start_s)
    steps = round(min(trained, run.train_s) / run.step_s)
    loss = run.loss(min(1.0, trained / run.train_s))
    common = TrainResult(
        status="finished" if stopped is None else "stopped",
        stop_reason=stopped,
        steps=steps,
        tokens=steps * config.data.batch_tokens,
        num_params=count_parameters(config.model),
        world_size=trial.spec.workers,
        device="fake",
        phases=_phases(run, min(trained, run.train_s)),
        step_ms=1000 * run.step_s,
        train_loss=loss,
    )
    if stopped is not None:
        return common
    return common.model_copy(
        update={
            "phases": {
                **common.phases,
                "pack": max(0.0, run.finish_s - run.eval_s),
                "evaluate": run.eval_s,
            },
            "val_loss": run.val_bpb,
            "val_bpb": run.val_bpb,
            "bytes_code": run.bytes_code,
            "bytes_model": run.bytes_model,
        }
    )


def _phases(run: FakeRun, trained: float) -> dict[str, float]:
    primed = {"prime": run.compile_s} if run.compile_s else {}
    return {**primed, "train": trained}
