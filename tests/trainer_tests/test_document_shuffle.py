"""Epochs of shuffled documents against the published loader's steps, written out plainly."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer.config import DataConfig, TrainConfig
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader
from trainer.distributed import Group
from trainer.errors import ConfigError, DataError

SEQ_LEN, ROWS = 15, 4


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    generator = np.random.default_rng(3)
    out = generator.integers(4, VOCAB_SIZE, 2_345).astype(np.uint16)
    out[np.sort(generator.choice(len(out), 60, replace=False))] = 1
    out[0] = 1
    return out


@pytest.fixture(scope="module")
def dataset(tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shuffle")
    return Dataset.open(write_folder(folder, tokens, tokens[:200], tokens_per_shard=5_000))


def loader_of(dataset: Dataset, rank: int = 0, size: int = 1, **settings: int) -> TrainLoader:
    return TrainLoader(
        dataset,
        SEQ_LEN,
        ROWS * SEQ_LEN,
        SEQ_LEN,
        rank,
        size,
        torch.device("cpu"),
        loader="shuffled_documents",
        **settings,
    )


def published_rows(tokens: np.ndarray, epochs: int, multiple: int, offset: int = 0) -> torch.Tensor:
    """[rows, SEQ_LEN + 1] of all epochs in order, made as the published script makes them."""
    bounds = [*np.flatnonzero(tokens == 1), len(tokens)]
    documents = [tokens[a:b] for a, b in itertools.pairwise(bounds)]
    rows = []
    for epoch in range(1, epochs + 1):
        if epoch > 1:
            generator = torch.Generator().manual_seed(epoch + offset)
            order = torch.randperm(len(documents), generator=generator).tolist()
            documents = [documents[i] for i in order]
        text = np.concatenate(documents).astype(np.int64)
        count = len(text) // (SEQ_LEN + 1)
        table = torch.from_numpy(text[: count * (SEQ_LEN + 1)]).view(count, SEQ_LEN + 1)
        generator = torch.Generator().manual_seed(epoch + 1000 + offset)
        rows.append(
            table[torch.randperm(count, generator=generator)][: count // multiple * multiple]
        )
    return torch.cat(rows)


def read_rows(loader: TrainLoader, steps: int) -> torch.Tensor:
    found = []
    for _ in range(steps):
        for x, y in loader.next_step():
            assert torch.equal(x[:, 1:], y[:, :-1])
            found.append(torch.cat([x, y[:, -1:]], dim=1))
    return torch.cat(found)


@pytest.mark.parametrize(("multiple", "seed"), [(1, 0), (8, 0), (8, 3)])
def test_four_epochs_are_the_published_ones(
    dataset: Dataset, tokens: np.ndarray, multiple: int, seed: int
) -> None:
    expected = published_rows(tokens, 4, multiple, 1_000_000 * seed)
    steps = len(expected) // ROWS
    found = read_rows(loader_of(dataset, epoch_multiple=multiple, seed=seed), steps)
    assert torch.equal(found, expected[: len(found)])


def test_ranks_share_a_step_and_a_position_resumes_it(dataset: Dataset) -> None:
    whole = loader_of(dataset)
    ranks = [loader_of(dataset, rank, 2) for rank in range(2)]
    for _ in range(50):  # into the second epoch
        parts = [torch.cat([x for x, _ in rank.next_step()]) for rank in ranks]
        assert torch.equal(torch.cat([x for x, _ in whole.next_step()]), torch.cat(parts))
    again = loader_of(dataset)
    again.load_state_dict(whole.state_dict())
    assert again.epoch_number == 2
    assert torch.equal(read_rows(again, 3), read_rows(whole, 3))


def test_epochs_are_counted_by_what_is_trained_on(dataset: Dataset, tokens: np.ndarray) -> None:
    loader = loader_of(dataset, epoch_multiple=8)
    per_epoch = len(tokens) // (SEQ_LEN + 1) // 8 * 8
    numbers = []
    for _ in range(3 * per_epoch // ROWS):
        numbers.append(loader.epoch_number)
        loader.next_step()
    assert numbers == [1 + step * ROWS // per_epoch for step in range(len(numbers))]
    assert loader.epoch == 3.0 and loader.epoch_number == 4


def test_a_limit_on_tokens_leaves_the_rest_unread(dataset: Dataset, tokens: np.ndarray) -> None:
    rows = published_rows(tokens[:1_000], 2, 1)
    found = read_rows(loader_of(dataset, train_tokens=1_000), len(rows) // ROWS)
    assert torch.equal(found, rows[: len(found)])


def test_it_is_built_from_settings_and_wrong_ones_are_refused(dataset: Dataset) -> None:
    config = TrainConfig().with_overrides(
        {
            "data.loader": "shuffled_documents",
            "data.shuffle_seed": 2,
            "data.seq_len": SEQ_LEN,
            "data.batch_tokens": ROWS * SEQ_LEN,
            "data.micro_batch_tokens": SEQ_LEN,
            "data.epoch_multiple": 8,
        }
    )
    built = TrainLoader.from_config(dataset, config, Group(torch.device("cpu")))
    plain = loader_of(dataset, epoch_multiple=8, seed=2)
    assert torch.equal(read_rows(built, 40), read_rows(plain, 40))
    with pytest.raises(DataError, match=r"data.epoch_multiple = 200 rows"):
        loader_of(dataset, epoch_multiple=200)
    for wrong in ({"data.epoch_multiple": 8}, {"data.shuffle_seed": 1}):
        with pytest.raises(ConfigError, match=r"only for data\.loader = "):
            TrainConfig().with_overrides(wrong)
    assert DataConfig().loader == "sequential"


def test_documents_of_several_shards_are_one_text(tmp_path: Path, tokens: np.ndarray) -> None:
    split = Dataset.open(write_folder(tmp_path, tokens, tokens[:200], tokens_per_shard=700))
    assert len(split.train_shards) > 2
    assert any(tokens[at] != 1 for at in (700, 1_400, 2_100))  # one is cut by a shard's end
    expected = published_rows(tokens, 3, 1)
    found = read_rows(loader_of(split), len(expected) // ROWS)
    assert torch.equal(found, expected[: len(found)])


def test_documents_begin_with_the_token_that_the_model_says(
    dataset: Dataset, tokens: np.ndarray, tmp_path: Path
) -> None:
    """As in text of GPT-2's pieces, where token 1 is a piece like others."""
    other = np.where(tokens == 1, 2, np.where(tokens == 2, 1, tokens)).astype(np.uint16)
    folder = write_folder(tmp_path, other, other[:200], tokens_per_shard=5_000)
    swapped = loader_of(Dataset.open(folder), bos_id=2)
    plain = loader_of(dataset)
    for _ in range(80):
        for (x, _), (want, _) in zip(swapped.next_step(), plain.next_step(), strict=True):
            back = torch.where(x == 1, 2, torch.where(x == 2, 1, x))
            assert torch.equal(back, want)
