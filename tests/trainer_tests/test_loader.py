"""The loader against its definition: step s is a span of batch_tokens + 1 tokens of the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import random_tokens, write_folder
from trainer.data.dataset import Dataset
from trainer.data.loader import MicroBatches, TrainLoader
from trainer.data.stream import TokenStream
from trainer.errors import ConfigError, DataError

CPU = torch.device("cpu")
TRAIN = random_tokens(2300)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, TRAIN, random_tokens(200, 1), tokens_per_shard=700))


def loader(
    dataset: Dataset, rank: int = 0, world_size: int = 1, micro: int = 32, batch: int = 192
) -> TrainLoader:
    return TrainLoader(dataset, 16, batch, micro, rank, world_size, CPU)


def joined(steps: list[MicroBatches]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x and of y of several ranks' or micro batches in order."""
    pairs = [pair for step in steps for pair in step]
    return tuple(torch.cat([pair[side] for pair in pairs]).numpy() for side in (0, 1))  # type: ignore[return-value]


def expected_rows(step: int, batch: int = 192, seq_len: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Straight from the definition, one token at a time."""
    span = [int(TRAIN[(step * batch + i) % len(TRAIN)]) for i in range(batch + 1)]
    x = np.array(span[:-1]).reshape(-1, seq_len)
    return x, np.array(span[1:]).reshape(-1, seq_len)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro", [16, 48, 10_000])
def test_global_batch_is_the_same_for_any_number_of_workers(
    dataset: Dataset, world_size: int, micro: int
) -> None:
    ranks = [loader(dataset, rank, world_size, micro) for rank in range(world_size)]
    for step in range(30):  # past two ends of the stream
        x, y = joined([rank.next_step() for rank in ranks])
        expected_x, expected_y = expected_rows(step)
        assert np.array_equal(x, expected_x)
        assert np.array_equal(y, expected_y)


@pytest.mark.parametrize(
    ("micro", "world_size", "shapes"),
    [
        (192, 1, [(12, 16)]),
        (191, 1, [(6, 16)] * 2),
        (80, 1, [(4, 16)] * 3),  # 5 rows would fit, but do not divide 12
        (16, 2, [(1, 16)] * 6),
        (1, 12, [(1, 16)]),
    ],
)
def test_micro_batches_fit_and_weigh_the_same(
    dataset: Dataset, micro: int, world_size: int, shapes: list[tuple[int, int]]
) -> None:
    part = loader(dataset, world_size - 1, world_size, micro)
    step = part.next_step()
    assert [tuple(x.shape) for x, _ in step] == shapes
    assert part.num_micro_batches == len(shapes)
    assert {x.dtype for x, _ in step} | {y.dtype for _, y in step} == {torch.int64}


def test_resumes_where_it_stopped_with_another_number_of_workers(dataset: Dataset) -> None:
    first = loader(dataset)
    for _ in range(14):
        first.next_step()
    state = first.state_dict()
    ranks = [loader(dataset, rank, 4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    for step in (14, 15):
        x, _ = joined([rank.next_step() for rank in ranks])
        assert np.array_equal(x, expected_rows(step)[0])
    assert ranks[0].epoch == pytest.approx(16 * 192 / 2300)


def test_refuses_a_position_in_other_data(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"belongs to data 0123, this is"):
        loader(dataset).load_state_dict({"position": 0, "digest": "0123"})


def test_refuses_workers_that_cannot_share_with_both_remedies(dataset: Dataset) -> None:
    with pytest.raises(ConfigError) as caught:
        loader(dataset, 0, 5)
    for part in ("12 rows", "5 workers", "data.batch_tokens = 160", "divides 12"):
        assert part in str(caught.value)
    assert loader(dataset, 0, 5, batch=160).num_micro_batches == 1
    with pytest.raises(ConfigError, match=r"set data\.batch_tokens = 208"):
        loader(dataset, 0, 13)


def test_refuses_data_smaller_than_a_step(dataset: Dataset) -> None:
    assert len(loader(dataset, batch=2288, micro=16).next_step()) == 143
    with pytest.raises(DataError, match=r"2300 training tokens .* data\.batch_tokens = 2304"):
        loader(dataset, batch=2304)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (695, 10), (2295, 12), (0, 7001), (9999, 3)])
def test_stream_reads_across_shards_and_around_the_end(
    dataset: Dataset, start: int, count: int
) -> None:
    stream = TokenStream(dataset.train_shards)
    expected = np.take(TRAIN, range(start, start + count), mode="wrap")
    assert stream.num_tokens == 2300
    assert np.array_equal(stream.read(start, count), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetched_batches_equal_those_of_the_cpu(dataset: Dataset) -> None:
    cuda = TrainLoader(dataset, 16, 192, 48, 0, 1, torch.device("cuda", 0))
    cpu = loader(dataset, micro=48)
    for _ in range(8):
        x, y = joined([[(x.cpu(), y.cpu()) for x, y in cuda.next_step()]])
        expected_x, expected_y = joined([cpu.next_step()])
        assert np.array_equal(x, expected_x)
        assert np.array_equal(y, expected_y)
    start = loader(dataset, micro=48)
    cuda.load_state_dict(start.state_dict())
    x, _ = joined([[(x.cpu(), y.cpu()) for x, y in cuda.next_step()]])
    assert np.array_equal(x, expected_rows(0)[0])
    cuda.close()
