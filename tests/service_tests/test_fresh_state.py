"""What a process puts back after a trial, and what it says it cannot: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import gc, json, os, random, resource, subprocess, sys, threading, time
import numpy as np
import torch
from service.runners import fresh_state
from service.runners.fresh_state import ProcessState, switches
from service.runners.resident_worker import in_own_thread
from tests.service_tests import stand_in_train
import trainer.workspace
from trainer.compress import CODECS
from trainer.model.gpt import GPT

fresh_state.PATIENCE_S = 0.2
state = ProcessState.capture()
found = {"clean": state.restore()}
draws = lambda: [random.random(), float(np.random.rand()), float(torch.rand(()))]
before = draws()
state.restore()
variables, count, codecs = dict(os.environ), trainer.workspace.count, dict(CODECS)
values = {switch.name: switch.read() for switch in switches()}
in_own_thread(stand_in_train.poison)
changed = [s.name for s in switches() if not fresh_state._is_same(s.read(), values[s.name])]
found["changed"] = changed
found["poisoned"] = state.restore()
found["not back"] = [
    s.name for s in switches() if not fresh_state._is_same(s.read(), values[s.name])
]
found["same draws"] = draws() == before
found["same variables"] = dict(os.environ) == variables
found["same code"] = (
    trainer.workspace.count is count and CODECS == codecs and not hasattr(GPT, "poisoned")
)
found["new thread"] = in_own_thread(lambda: [
    torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_device()),
    float(torch.tensor([1e-39]) * 0.5),
])

held = [torch.ones(2**20)]
found["tensor"] = state.restore()
held.clear()
file = open(sys.executable)
found["file"] = state.restore()
file.close()
thread = threading.Thread(target=time.sleep, args=(2.0,), name="straggler")
thread.start()
found["thread"] = state.restore()
thread.join()
child = subprocess.Popen(["sleep", "30"])
found["child"] = state.restore()
child.kill(), child.wait()
cycle = [torch.ones(2**20)]
cycle.append(cycle)
del cycle
found["again"] = state.restore()
big = bytearray(256 * 2**20)
del big
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state.restore()
found["peak"] = [peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_nothing_is_wrong_with_a_process_that_did_nothing(found: dict[str, Any]) -> None:
    assert found["clean"] == []


def test_every_switch_that_a_trial_turns_is_turned_back(found: dict[str, Any]) -> None:
    assert len(found["changed"]) >= 15, found["changed"]
    assert found["poisoned"] == []
    assert found["not back"] == []
    assert found["same draws"] and found["same variables"] and found["same code"]


def test_a_new_thread_has_the_state_of_a_new_process(found: dict[str, Any]) -> None:
    threads, gradients, device, denormal = found["new thread"]
    assert (threads, gradients, device) == (1, True, "cpu")
    assert denormal > 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tensor", " tensors with 4,"),
        ("file", "was left open"),
        ("thread", "thread 'straggler' goes on"),
        ("child", "(sleep 30) goes on"),
    ],
)
def test_what_cannot_be_put_back_is_named(found: dict[str, Any], what: str, words: str) -> None:
    (fault,) = found[what]
    assert words in fault


def test_garbage_is_no_fault(found: dict[str, Any]) -> None:
    assert found["again"] == []


def test_the_peak_of_memory_counts_anew(found: dict[str, Any]) -> None:
    before_kib, after_kib = found["peak"]
    if after_kib == before_kib:
        pytest.skip("the kernel does not let a process reset it")
    assert after_kib < before_kib - 200 * 1024
