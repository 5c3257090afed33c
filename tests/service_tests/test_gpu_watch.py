"""GPUs are sampled while a trial runs, its own and no others; the cards here are stand-ins."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.runners import gpu_watch
from service.runners.gpu_watch import append_to, own_gpus, watch_gpus
from service.tracking.outbox import new_records


class Cards:
    """Sixteen cards that answer as pynvml does; card 5 does not know its power."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        assert isinstance(index, int)
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        self.asked.append(name)
        return 15

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=handle * 1e9, total=16e9)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=90 + handle, memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 5:
            raise self.NVMLError("not supported")
        return 1000 * handle

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    found = Cards()
    monkeypatch.setattr(gpu_watch, "_library", lambda: found)
    yield found


def test_only_the_trials_own_gpus_are_read(tmp_path: Path, cards: Cards) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with watch_gpus(["4", "GPU-ab12", "5"], append_to(metrics), period_s=0.02):
        deadline = time.monotonic() + 20
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    records, _ = new_records(tmp_path, 0, 100)
    assert [record["sample"] for record in records] == list(range(1, len(records) + 1))
    first = records[0]
    assert first["kind"] == "system" and first["time"] == pytest.approx(time.time(), abs=60)
    assert first["gpu_0_utilization_percentage"] == 94
    assert first["gpu_0_memory_usage_megabytes"] == 4000
    assert first["gpu_0_memory_usage_percentage"] == 25
    assert first["gpu_1_power_usage_watts"] == 15
    assert not any(name.startswith("gpu_2") for name in first), "what one card refuses"
    assert set(cards.asked) == {4, "GPU-ab12", 5}

    before = metrics.read_text()
    time.sleep(0.1)
    assert metrics.read_text() == before, "it goes on after the trial"


def test_a_trial_without_gpus_is_not_watched(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    with watch_gpus([], said.append, period_s=0.01):
        time.sleep(0.05)
    assert said == [] and cards.asked == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_gpus() == []  # nobody gave it any: all of the host's are not its own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert own_gpus() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert own_gpus() == []


def test_a_machine_without_the_library_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_watch, "_library", lambda: None)
    said: list[dict[str, Any]] = []
    with watch_gpus(["0"], said.append, period_s=0.01):
        time.sleep(0.05)
    assert json.dumps(said) == "[]"
