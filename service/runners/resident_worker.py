"""What a worker runs that stays on its gang: trial after trial in one process group.

Separate from ray_worker, whose train function each trial runs here too. Lands on GPU nodes: imports
neither Optuna nor MLflow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import ray
import ray.exceptions
import ray.train

from service.runners.ray_worker import describe_failure, introduce, run_trial

T = TypeVar("T")

WAIT_S = 10.0
"""How long the mailbox holds a call for the next job."""
ANSWER_TIMEOUT_S = 15.0
"""How long it may take to answer beyond that before the call is made again."""
TRIAL_END_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for the slowest one to leave a trial, as in any other collective."""
HEALTH_TIMEOUT = timedelta(seconds=60)
"""How long ranks that have cleaned up wait for each other before the gang is given up."""


def serve_trials(gang: dict[str, Any]) -> dict[str, Any]:
    """Train loop of a TorchTrainer that serves trials until it is told or has to stop.

    `gang` has {"key", "mailbox"}. Jobs come through the mailbox; each is one of `run_trial` with a
    "number" (1, 2 ...) and "is_last". Runs on every worker, and returns on all of them or on none.
    Raises what a trial raises: the gang ends with it.
    """
    rank = ray.train.get_context().get_world_rank()
    key, mailbox = gang["key"], gang["mailbox"]
    if not ray.get(mailbox.register.remote(key, introduce(rank))):
        raise RuntimeError("the gang was given up before it started")
    post = Post(mailbox, key, rank)
    try:
        _serve(post)
    except TrialError as error:
        raise error.__cause__ or error from None
    except BaseException as error:
        ray.get(mailbox.fail.remote(key, describe_failure(rank, error)))
        raise
    return {}


class TrialError(Exception):
    """A trial raised, and has said so itself."""


class Post:
    """One rank's side of the mailbox, as far as jobs and their ends go."""

    def __init__(self, mailbox: Any, gang: str, rank: int) -> None:
        self.mailbox = mailbox
        self.gang = gang
        self.rank = rank
        self._last = 0
        self._told: tuple[str, dict[str, Any]] | None = None
        """The last outcome: its trial, and what it was."""
        self._told_to = ""

    def next_job(self) -> dict[str, Any]:
        """Wait for work. Saying so again says that the last job is behind us."""
        while True:
            born, job = self._call(self.mailbox.next_job, self.gang, self.rank, self._last, WAIT_S)
            if job is not None:
                self._last, self._told = job["number"], None
                return {**job, "mailbox": self.mailbox}
            if self._told is not None and born != self._told_to:
                self.tell(*self._told)  # whoever took it is dead, and may not have passed it on

    def tell(self, trial: str, outcome: dict[str, Any]) -> None:
        """Hand over what a trial came to."""
        self._told = (trial, outcome)
        self._told_to = self._call(self.mailbox.finish, trial, outcome)

    def leave(self, reason: str) -> None:
        """Say why this gang ends."""
        self._call(self.mailbox.leave, self.gang, f"rank {self.rank}: {reason}")

    def _call(self, method: Any, *args: Any) -> Any:
        while True:
            try:
                return ray.get(method.remote(*args), timeout=WAIT_S + ANSWER_TIMEOUT_S)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
                continue  # it is being restarted
            except ray.exceptions.ActorDiedError:
                if _is_gone_for_good(self.mailbox):
                    raise


def _is_gone_for_good(mailbox: Any) -> bool:
    """Whether an actor that may restart will not, because its owner is gone."""
    try:
        ray.get(mailbox.wake.remote(), timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.ActorDiedError:
        return True
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return False


def _serve(post: Post) -> None:
    # Here: the driver imports this module too, and starts faster without torch.
    from service.runners.fresh_state import ProcessState

    ranks = Ranks()
    state = ProcessState.capture()
    while True:
        job = post.next_job()
        outcome = in_own_thread(lambda job=job: _run(job))  # type: ignore[misc]
        ranks.agree(False, TRIAL_END_TIMEOUT)  # as without residents: no rank may fail after this
        if post.rank == 0:
            post.tell(job["key"], outcome)
        del outcome
        faults = state.restore()
        for fault in faults:
            post.leave(fault)
        if ranks.agree(bool(faults), HEALTH_TIMEOUT) or job["is_last"]:
            return


def _run(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return run_trial(job)
    except BaseException as error:
        raise TrialError from error


class Ranks:
    """The process group between trials: is everybody there, and does anybody want to leave."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self._dist, self._torch = dist, torch
        self._control = None
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._control = dist.new_group(backend="gloo")

    def agree(self, wish: bool, timeout: timedelta) -> bool:
        """Whether any rank wishes. Raises when a rank does not answer in time, or when the group of
        the trials adds up wrongly."""
        if not self._dist.is_initialized():
            return wish
        size = self._dist.get_world_size()
        box = self._torch.tensor([float(wish), 1.0])
        self._dist.all_reduce(box, group=self._control, async_op=True).wait(timeout)
        if self._control is not None:
            device = self._torch.device("cuda", self._torch.cuda.current_device())
            probe = self._torch.ones(1, device=device)
            self._dist.all_reduce(probe, async_op=True).wait(timeout)
            box[1] = min(float(box[1]), float(probe))
        if round(float(box[1])) != size:
            raise RuntimeError(f"the process group of {size} ranks counted {float(box[1]):g}")
        return bool(box[0] > 0)


def in_own_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, run in a thread that ends with it and takes its state
    along."""
    outcomes: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcomes.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="trial")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcomes[0]
