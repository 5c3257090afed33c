"""Runs trials on Ray: one TorchTrainer per trial, or one that stays on its gang and serves many;
all workers of a trial on one node.

One thread, the pump, empties the mailbox, writes the folders and settles trials that ended; the
scheduler's calls touch memory only. Cancelling kills the trial's workers, upon which Ray Train
itself takes down the rest and the placement group; the pump makes sure of it. Nothing is left to
wait inside Ray: hundreds of pending placement groups slow it down fourfold.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.errors import RunnerError
from service.policies import Policy
from service.quarantine import Quarantine
from service.runners.base import Demand, RunState, Update
from service.runners.gang_pool import GangPool, Isolation, num_gangs
from service.runners.ray_cleaning import Cleaning
from service.runners.ray_cluster import connect, gang_resources, nodes_total
from service.runners.ray_gang import Gang
from service.runners.ray_mailbox import Mailbox, News
from service.runners.ray_trial import RayTrial
from service.trial import TrialSpec

COLLECT_WAIT_S = 0.5
"""How long the mailbox holds a call when it has no news."""
MAILBOX_TIMEOUT_S = 10.0
"""How long a call may take before it is made again."""
CLOSE_TIMEOUT_S = 60.0
"""How long `close` waits for Ray Train to take cancelled trials down."""


class RayRunner:
    """See service.runners.base.Runner. Make it in the main thread."""

    def __init__(
        self,
        address: str | None = None,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        train: str = "trainer.loop:train",
        isolation: Isolation = "trial",
        trials_per_gang: int = 50,
        policy: Policy | None = None,
    ) -> None:
        """Join the cluster at `address` or RAY_ADDRESS, else start one limited to num_cpus and
        num_gpus in this process. `train` is the import path of the train function. Gangs of
        isolation "resident" stay for `trials_per_gang` trials. `policy` says when a node is
        quarantined. Raises RunnerError."""
        self._cluster = connect(address, num_cpus, num_gpus)
        self._train = train
        self._mailbox = _start_mailbox()
        self._mailbox_born: str | None = None
        self._trials: dict[int, RayTrial] = {}
        self._draining: list[RayTrial] = []
        self._quarantine = Quarantine(policy or Policy(), time.monotonic)
        self._cleaning = Cleaning(self._quarantine, ray.get_runtime_context().get_node_id())
        self._pool = GangPool(self._mailbox, self._quarantine, isolation, trials_per_gang)
        self._stops: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._pump_thread = threading.Thread(target=self._pump, name="ray pump", daemon=True)
        self._pump_thread.start()

    def free_slots(self, demand: Demand) -> int:
        """How many gangs fit now on nodes that are open, those included that stay and are idle."""
        return self._pool.free_slots(demand)

    def total_slots(self, demand: Demand) -> int:
        return num_gangs(nodes_total(), demand)

    def submit(self, spec: TrialSpec, demand: Demand) -> None:
        if self.total_slots(demand) == 0:
            nodes = "; ".join(_describe(node) for node in nodes_total().values())
            raise RunnerError(
                f"trial {spec.key} needs {demand.workers} workers of {gang_resources(demand)} on "
                f"one node, and no node has that much ({nodes}); lower --workers-per-trial or "
                "--gpus-per-worker, or join a larger cluster"
            )
        if spec.number in self._trials:
            raise RunnerError(f"trial {spec.key} runs already; poll it to its end, or cancel it")
        trial = RayTrial(spec, demand, self._mailbox, self._train)
        with self._lock:
            self._pool.place(trial)
            self._trials[spec.number] = trial

    def poll(self, number: int) -> Update:
        trial = self._trial(number)
        update = trial.take()
        if update.result is not None or update.error is not None:
            with self._lock:
                del self._trials[number]
        return update

    def request_stop(self, number: int, reason: str) -> None:
        trial = self._trial(number)
        self._stops[trial.key] = reason
        self._mailbox.stop.remote(trial.key, reason)

    def cancel(self, number: int, hung: bool = False) -> None:
        trial = self._trial(number)
        if hung and trial.node is not None:
            self._quarantine.failed(trial.node)
        with self._lock:
            del self._trials[number]
            self._draining.append(trial)
        self._mailbox.cancel.remote(trial.key)
        self._pool.cancel(trial)

    def close(self) -> None:
        """Cancel everything, wait until Ray Train has freed it and the processes are gone, and
        leave the cluster."""
        if self._closing.is_set():
            return
        for number in list(self._trials):
            self.cancel(number)
        self._pool.end_all()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self._is_ending() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._closing.set()
        self._pump_thread.join(MAILBOX_TIMEOUT_S)
        ray.kill(self._mailbox)
        self._cluster.disconnect()

    def _is_ending(self) -> bool:
        """Whether something of a trial is still there."""
        return bool(self._draining or not self._pool.is_empty or self._cleaning.is_busy)

    def _trial(self, number: int) -> RayTrial:
        if number not in self._trials:
            raise RunnerError(f"trial {number} is not running here; submit it first")
        return self._trials[number]

    def _pump(self) -> None:
        while not self._closing.is_set():
            trials = self._trials_by_key()
            # Looked at before collecting: what they said last is then in this batch of news.
            ended = [trial for trial in trials.values() if trial.ended and not trial.settled]
            gangs = self._pool.ended()
            all_news = self._collect(trials, 0.0 if ended or gangs else COLLECT_WAIT_S)
            self._pool.absorb(all_news)
            trials = self._trials_by_key()  # a gang that stays answers at once
            for key, news in all_news.items():
                if key in trials:
                    trials[key].absorb(news)
            self._pool.free(gangs)
            for gang in gangs:
                if gang.is_idle:  # lost between two trials
                    self._blame(gang)
            for trial in ended:
                self._settle(trial)
            self._cleaning.look()
            self._pool.attend()
            with self._lock:
                self._draining = [trial for trial in self._draining if not trial.settled]

    def _trials_by_key(self) -> dict[str, RayTrial]:
        with self._lock:
            return {trial.key: trial for trial in [*self._draining, *self._trials.values()]}

    def _settle(self, trial: RayTrial) -> None:
        if trial.gang is not None and trial.was_never_taken:
            self._blame(trial.gang)
            with self._lock:  # it starts elsewhere
                trial.start_over()
                self._pool.place(trial)
            return
        trial.settle()
        self._judge_node(trial)
        self._stops.pop(trial.key, None)

    def _judge_node(self, trial: RayTrial) -> None:
        """What the end of an attempt says of its node."""
        gang = trial.gang
        if gang is None or gang.node is None or trial.is_drivers_fault:
            return
        if trial.state is RunState.FINISHED:
            self._quarantine.ended_well(gang.node)
            return
        if trial.state is RunState.FAILED:
            self._quarantine.failed(gang.node)
        if gang.ended:  # the processes of one that stays and lives are not left over
            self._cleaning.begin(trial.key, gang.node, gang.process_names)

    def _blame(self, gang: Gang) -> None:
        """A gang that stays was lost while no trial ran on it: its node answers for that."""
        if gang.node is not None:
            self._quarantine.failed(gang.node)
            self._cleaning.begin(gang.key, gang.node, gang.process_names)

    def _collect(self, trials: dict[str, RayTrial], wait_s: float) -> dict[str, News]:
        stops = {key: reason for key, reason in list(self._stops.items()) if key in trials}
        cancelled = {key for key, trial in trials.items() if trial.cancelled}
        try:
            call = self._mailbox.collect.remote(stops, cancelled, wait_s)
            born, news = ray.get(call, timeout=wait_s + MAILBOX_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            time.sleep(0.2)  # it is being restarted; the workers repeat what it lost
            return {}
        if born != self._mailbox_born:
            self._mailbox_born = born
            self._pool.hand_again()
        return news


def _start_mailbox() -> Any:
    """The mailbox, on this node where it can be, restarted when it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(Mailbox)
    return actor.options(
        num_cpus=0, max_restarts=-1, max_concurrency=10_000, scheduling_strategy=here
    ).remote()


def _describe(node: dict[str, float]) -> str:
    return f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU"
