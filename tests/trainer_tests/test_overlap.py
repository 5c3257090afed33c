"""Training text that is validation text is found and counted, wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from service.cli import main
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.test_prepare import write_plain
from trainer.config import TrainConfig
from trainer.data import overlap
from trainer.data.dataset import Dataset
from trainer.data.overlap import WINDOW, check_overlap, measure_overlap
from trainer.data.window_hash import window_hashes
from trainer.distributed import Group
from trainer.errors import DataError
from trainer.report import NullReporter
from trainer.workspace import Workspace


def leaked(share: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation tokens, and training tokens with a stretch of them in the middle."""
    val = random_tokens(3000, 1)
    train = np.concatenate([random_tokens(1500), val[111 : 111 + share], random_tokens(1500, 2)])
    return train, val


def plain_count(train: np.ndarray, shards: list[np.ndarray]) -> tuple[int, int]:
    """(places found, windows) with sets of tuples."""
    windows = {
        tuple(shard[start : start + WINDOW].tolist())
        for shard in shards
        for start in range(0, len(shard) - WINDOW + 1, WINDOW)
    }
    places = range(len(train) - WINDOW + 1)
    return sum(tuple(train[i : i + WINDOW].tolist()) in windows for i in places), len(windows)


@pytest.mark.parametrize("scan", [70, 500, 1 << 22])
@pytest.mark.parametrize("share", [0, 63, 200, 1500])
def test_counts_equal_those_of_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan: int, share: int
) -> None:
    train, val = leaked(share)
    monkeypatch.setattr(overlap, "SCAN_TOKENS", scan)
    dataset = Dataset.open(write_folder(tmp_path, train, val, 10_000))
    found = measure_overlap(dataset)
    assert (found.found, found.val_windows) == plain_count(train, [val])
    assert found.train_tokens == len(train)
    assert found.share == pytest.approx(share / len(train), abs=2 * WINDOW / len(train))
    few = measure_overlap(dataset, train_tokens=1700)
    assert (few.train_tokens, few.found) == (1700, plain_count(train[:1700], [val])[0])


@pytest.mark.parametrize("step", [1, 3, 64])
def test_keys_are_equal_exactly_where_windows_are(step: int) -> None:
    tokens = np.random.default_rng(4).integers(0, 2, 600).astype(np.uint16)
    for width in (1, 5, 9):
        keys = window_hashes(tokens, width, step)
        windows = [tuple(tokens[i : i + width]) for i in range(0, 600 - width + 1, step)]
        assert len(keys) == len(windows)
        assert len(set(zip(keys.tolist(), windows, strict=True))) == len(set(windows))
        assert len(set(keys.tolist())) == len(set(windows))
    assert len(window_hashes(tokens, 601)) == 0


def test_a_run_on_leaked_data_is_refused_where_asked(tmp_path: Path) -> None:
    train, val = leaked(1500)
    dataset = Dataset.open(write_folder(tmp_path, train, val, 10_000))
    check_overlap(dataset, 0.5)
    with pytest.raises(DataError, match=r"3\d\.\d\d % of the first 4,500 training tokens"):
        check_overlap(dataset, 0.05)
    config = TrainConfig().with_overrides(
        {
            "data.dir": str(tmp_path),
            "data.max_overlap": 0.05,
            "model.vocab_size": VOCAB_SIZE,
            "evaluate.seq_len": 64,
            "runtime.device": "cpu",
        }
    )
    with pytest.raises(DataError, match=r"more than data\.max_overlap = 0\.05; the split is wrong"):
        Workspace.open(config, NullReporter(), Group(torch.device("cpu")))


def test_it_is_not_looked_at_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(write_folder(tmp_path, *leaked(1500), 10_000))
    monkeypatch.setattr(overlap, "measure_overlap", lambda dataset: pytest.fail("looked"))
    check_overlap(dataset, TrainConfig().data.max_overlap)


def test_the_command_warns_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_plain(tmp_path / "train.txt")
    for name, texts in (("leaked", [train, "--val-text", train]), ("other", [train])):
        options = ["--vocab-size", str(VOCAB_SIZE), "--out", str(tmp_path / name), "--json"]
        assert main(["data", "prepare", *map(str, texts), *options]) == 0
        captured = capsys.readouterr()
        json.loads(captured.out)
        assert ("training tokens are also in the validation text" in captured.err) == (
            name == "leaked"
        ), captured.err
