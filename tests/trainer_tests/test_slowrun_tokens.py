"""Token files of the slowrun tracks come back as they are, and unsound ones are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import random_tokens, write_folder
from trainer.data import slowrun_tokens
from trainer.data.dataset import Dataset
from trainer.data.shards import open_shard
from trainer.data.slowrun_tokens import GPT2_BOS, SlowrunTokens
from trainer.errors import DataError


@pytest.fixture
def split() -> SlowrunTokens:
    tokens = np.random.default_rng(0).integers(0, GPT2_BOS, 10_000).astype(np.uint16)
    starts = np.array([0, 7, 5_000, 9_999])
    tokens[starts] = GPT2_BOS
    return SlowrunTokens(tokens, starts, GPT2_BOS, 43)


def test_a_split_comes_back_and_is_a_plain_dict_for_others(
    split: SlowrunTokens, tmp_path: Path
) -> None:
    path = tmp_path / "fineweb_train.pt"
    digest = slowrun_tokens.write(path, split)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = slowrun_tokens.read(path)
    assert np.array_equal(found.tokens, split.tokens) and found.tokens.dtype == np.uint16
    assert np.array_equal(found.doc_starts, split.doc_starts) and found.num_rows == 4
    assert (found.bos_id, found.seq_shuffle_seed, found.seq_size) == (50_256, 43, 2049)
    # As the published scripts read it.
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"tokens", "doc_starts", "bos_id", "seq_shuffle_seed", "seq_size"}
    assert (stored["tokens"].dtype, stored["doc_starts"].dtype) == (torch.uint16, torch.int64)
    assert bool((stored["tokens"].long()[stored["doc_starts"]] == stored["bos_id"]).all())
    assert [path.name for path in tmp_path.iterdir()] == ["fineweb_train.pt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bos_id": 3}, "not every document begins with bos_id = 3"),
        ({"doc_starts": np.array([7, 5_000])}, "begin with 0"),
        ({"doc_starts": np.array([0, 5_000, 7])}, "do not rise"),
        ({"doc_starts": np.array([0, 10_000])}, "do not rise within"),
        ({"seq_size": 1}, "no target"),
        ({"tokens": np.zeros(10_000, np.int64)}, "expected uint16"),
    ],
)
def test_an_unsound_split_is_neither_written_nor_read(
    split: SlowrunTokens, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    wrong = replace(split, **change)
    with pytest.raises(DataError, match=words):
        slowrun_tokens.write(tmp_path / "t.pt", wrong)
    stored = dict(vars(wrong))
    for name in ("tokens", "doc_starts"):
        stored[name] = torch.from_numpy(stored[name])
    torch.save(stored, tmp_path / "t.pt")
    with pytest.raises(DataError, match=words):
        slowrun_tokens.read(tmp_path / "t.pt")


def test_what_is_no_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        slowrun_tokens.read(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DataError, match="no token file"):
        slowrun_tokens.read(tmp_path / "text.pt")
    torch.save({"tokens": torch.zeros(3)}, tmp_path / "some.pt")
    with pytest.raises(DataError, match="has no doc_starts, bos_id"):
        slowrun_tokens.read(tmp_path / "some.pt")
    torch.save({"code": Path}, tmp_path / "code.pt")  # weights_only refuses names of code
    with pytest.raises(DataError, match="no token file"):
        slowrun_tokens.read(tmp_path / "code.pt")


def test_rows_of_the_older_format(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, GPT2_BOS, (5, 9)).astype(np.uint16)
    padded = np.concatenate([rows, np.zeros((1, 9), np.uint16)])
    old = {
        "chunks": [torch.from_numpy(padded[i : i + 2].reshape(-1)) for i in (0, 2, 4)],
        "valid_counts": [2, 2, 1],
        "batch_size": 2,
        "sequence_size": 9,
    }
    torch.save(old, tmp_path / "old.pt")
    assert np.array_equal(slowrun_tokens.read_rows(tmp_path / "old.pt"), rows)
    torch.save({**old, "valid_counts": [2, 2]}, tmp_path / "old.pt")
    with pytest.raises(DataError, match="valid_counts differ"):
        slowrun_tokens.read_rows(tmp_path / "old.pt")
    torch.save({**old, "batch_size": 3}, tmp_path / "old.pt")
    with pytest.raises(DataError, match="a chunk has 18 tokens"):
        slowrun_tokens.read_rows(tmp_path / "old.pt")


def test_shards_become_a_split_and_shards_again(tmp_path: Path, split: SlowrunTokens) -> None:
    tokens = random_tokens(2_500)
    dataset = Dataset.open(write_folder(tmp_path / "data", tokens, tokens[:300]))
    made = slowrun_tokens.from_shards(dataset.train_shards, "train")
    assert np.array_equal(made.doc_starts, np.flatnonzero(tokens == 1))
    slowrun_tokens.write(tmp_path / "train.pt", made)
    (tmp_path / "again").mkdir()
    back = slowrun_tokens.read(tmp_path / "train.pt")
    paths = slowrun_tokens.to_shards(back, tmp_path / "again", "small", "train")
    assert np.array_equal(np.concatenate([open_shard(path) for path in paths]), tokens)
    with pytest.raises(DataError, match="begin with token 50256"):
        slowrun_tokens.to_shards(split, tmp_path / "again", "gpt2", "train")
