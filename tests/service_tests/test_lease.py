"""One driver per study: who is let in, and who is thrown out."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, replace

import optuna
import pytest

from service.errors import StudyBusyError
from service.lease import HEARTBEAT_S, LEASE_ATTR, STALE_S, DriverLease, Lease, is_alive, read_lease


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(study_name="s")


def leave(study: optuna.Study, lease: Lease) -> None:
    study.set_user_attr(LEASE_ATTR, asdict(lease))


def test_one_lease_at_a_time_and_the_next_after_release(study: optuna.Study) -> None:
    clock = Clock()
    first = DriverLease(study, clock)
    lease = read_lease(study)
    assert lease is not None and lease.pid == os.getpid()
    with pytest.raises(StudyBusyError, match=f"by process {os.getpid()} on .*; wait for it"):
        DriverLease(study, clock)
    first.release()
    assert read_lease(study) is None
    DriverLease(study, clock)


def test_a_dead_process_of_this_host_is_taken_over_at_once(study: optuna.Study) -> None:
    clock = Clock()
    DriverLease(study, clock)
    lease = read_lease(study)
    assert lease is not None
    dead = subprocess.Popen(["true"])
    dead.wait()
    leave(study, replace(lease, pid=dead.pid))
    DriverLease(study, clock)


def test_a_process_number_used_again_is_another_process(study: optuna.Study) -> None:
    DriverLease(study, Clock())
    lease = read_lease(study)
    assert lease is not None
    assert is_alive(lease, 1e12), "our own process lives, however old the heartbeat"
    assert not is_alive(replace(lease, process_started=lease.process_started - 100), 0)


def test_another_host_lives_by_its_heartbeat(study: optuna.Study) -> None:
    clock = Clock()
    DriverLease(study, clock)
    lease = read_lease(study)
    assert lease is not None
    leave(study, replace(lease, host="elsewhere", heartbeat=clock.now))
    clock.now += STALE_S - 1
    with pytest.raises(StudyBusyError, match="on elsewhere"):
        DriverLease(study, clock)
    clock.now += 2
    DriverLease(study, clock)


def test_renewing_moves_the_heartbeat_and_notices_a_takeover(study: optuna.Study) -> None:
    clock = Clock()
    mine = DriverLease(study, clock)
    clock.now += HEARTBEAT_S + 1
    mine.renew()
    lease = read_lease(study)
    assert lease is not None and lease.heartbeat == clock.now
    leave(study, replace(lease, token="another", host="elsewhere"))
    mine.renew()  # not due yet
    clock.now += HEARTBEAT_S + 1
    with pytest.raises(StudyBusyError):
        mine.renew()
    mine.release()
    assert read_lease(study) is not None, "what is not ours is not released"
