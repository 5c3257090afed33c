"""A few hundred of the cases of `python -m tests.fuzz`, and that it finds what is wrong. CPU."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests import fuzz
from trainer.errors import ArtifactError


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_and_hostile_files_give_one_error(target: str) -> None:
    outcome = fuzz.fuzz(target, fuzz.shares(400)[target], seed=1)
    assert outcome.findings == []
    assert outcome.cases == fuzz.shares(400)[target] == outcome.accepted + outcome.refused
    assert outcome.refused > 0.7 * outcome.cases or target == "folder"  # which is read anyway


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_cases_are_made_from_the_seed_alone(target: str) -> None:
    make = fuzz.TARGETS[target].make
    assert make(random.Random("0/x/3")) == make(random.Random("0/x/3"))
    assert len({repr(make(random.Random(f"{index}"))) for index in range(20)}) > 10


def _key_error(case: float) -> None:
    raise KeyError("surprise")


def _refused(case: float) -> None:
    raise ArtifactError("")


READERS = {
    "another error": (_key_error, "case 0: KeyError: 'surprise'"),
    "an error without words": (_refused, "case 0: an error of 0 characters"),
    "no end": (lambda case: time.sleep(60), "ended by SIGALRM"),
    "a crash": (lambda case: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
    "much memory": (lambda case: bytes(3 << 30), "case 0: MemoryError"),
}


@pytest.mark.parametrize("fault", READERS)
def test_faults_are_found_and_the_other_cases_go_on(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, words = READERS[fault]
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    first = random.Random("0/x/0").random()

    def only_the_first(case: float) -> object:
        return read(case) if case == first else None

    monkeypatch.setitem(fuzz.TARGETS, "x", fuzz.Target(lambda rng: rng.random(), only_the_first))
    outcome = fuzz.fuzz("x", 3, seed=0)
    assert len(outcome.findings) == 1 and words in outcome.findings[0]
    assert (outcome.cases, outcome.accepted) == (3, 2)
