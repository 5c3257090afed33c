"""Orders of rows: what each must visit, never twice an epoch, alike for any number of workers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import random_tokens, write_folder
from trainer.data.dataset import Dataset
from trainer.data.loader import MicroBatches, TrainLoader
from trainer.data.row_order import ROW_ORDERS, CoprimeOrder, LanePlace, shuffled_order
from trainer.errors import DataError
from trainer.mix import Lane

CPU = torch.device("cpu")
TRAIN = random_tokens(2300)
SHARD_SIZES = [700, 700, 700, 200]
SHARDS = np.split(TRAIN, np.cumsum(SHARD_SIZES)[:-1])
MIXED = (Lane(16, 3), Lane(16, 3), Lane(24, 2), Lane(48, 1))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, TRAIN, random_tokens(200, 1), tokens_per_shard=700))


def loader(
    dataset: Dataset, kind: str, rank: int = 0, size: int = 1, **more: object
) -> TrainLoader:
    lanes = more.pop("lanes", ())
    batch = sum(lane.num_tokens for lane in lanes) if lanes else 192  # type: ignore[attr-defined]
    return TrainLoader(  # type: ignore[arg-type]
        dataset, 16, batch, 48, rank, size, CPU, lanes=lanes, loader=kind, **{"seed": 3} | more
    )


def rows_of(step: MicroBatches) -> list[list[int]]:
    """Each row with its last target, as T + 1 tokens; targets must be the inputs moved on."""
    rows = []
    for x, y in step:
        assert torch.equal(x[:, 1:], y[:, :-1])
        rows += torch.cat((x, y[:, -1:]), 1).tolist()
    return rows


@pytest.mark.parametrize("kind", ROW_ORDERS)
def test_the_global_batch_is_the_same_for_any_number_of_workers(
    dataset: Dataset, kind: str
) -> None:
    alone = loader(dataset, kind)
    ranks = {size: [loader(dataset, kind, r, size) for r in range(size)] for size in (2, 3, 4)}
    for _ in range(30):  # several epochs
        want = rows_of(alone.next_step())
        for workers in ranks.values():
            assert list(itertools.chain(*(rows_of(w.next_step()) for w in workers))) == want


@pytest.mark.parametrize("kind", ROW_ORDERS)
def test_lanes_do_not_depend_on_who_runs_them(dataset: Dataset, kind: str) -> None:
    alone = loader(dataset, kind, lanes=MIXED)
    pair = [loader(dataset, kind, rank, 2, lanes=MIXED) for rank in range(2)]
    for _ in range(10):
        want = rows_of(alone.next_step())
        lanes = [want[0:3], want[3:6], want[6:8], want[8:9]]
        for rank, worker in enumerate(pair):
            assert rows_of(worker.next_step()) == lanes[rank] + lanes[rank + 2]


@pytest.mark.parametrize("lanes", [(), MIXED])
@pytest.mark.parametrize("kind", ROW_ORDERS)
def test_a_saved_position_is_restored(dataset: Dataset, kind: str, lanes: tuple[Lane, ...]) -> None:
    first = loader(dataset, kind, lanes=lanes)
    for _ in range(17):
        first.next_step()
    state = first.state_dict()
    want = [rows_of(first.next_step()) for _ in range(3)]
    first.load_state_dict(state)  # back, in the same loader
    fresh = loader(dataset, kind, lanes=lanes)
    fresh.load_state_dict(state)  # and on, in a new one
    for again in (first, fresh):
        assert [rows_of(again.next_step()) for _ in range(3)] == want


def test_a_position_of_another_order_is_refused(dataset: Dataset) -> None:
    state = loader(dataset, "shuffled").state_dict()
    with pytest.raises(DataError, match=r'belongs to data\.loader = "shuffled", this is "coprime"'):
        loader(dataset, "coprime").load_state_dict(state)
    old = {"position": 192, "digest": dataset.digest}  # saved before there were orders
    loader(dataset, "sequential").load_state_dict(old)


@pytest.mark.parametrize("kind", ["shuffled", "coprime"])
def test_the_seed_changes_the_order(dataset: Dataset, kind: str) -> None:
    one, same, other = (loader(dataset, kind, seed=seed) for seed in (3, 3, 4))
    first = rows_of(one.next_step())
    assert rows_of(same.next_step()) == first != rows_of(other.next_step())


def windows_of(starts: list[int], seq_len: int) -> list[tuple[int, int, int]]:
    """(shard, phase, window) of each row; a row and its last target must lie in one shard."""
    ends = np.cumsum(SHARD_SIZES)
    found = []
    for start in starts:
        shard = int(np.searchsorted(ends, start, side="right"))
        inside = start - (ends[shard] - SHARD_SIZES[shard])
        assert inside + seq_len + 1 <= SHARD_SIZES[shard]
        found.append((shard, int(inside % seq_len), int(inside // seq_len)))
    return found


COUNTS = [(size - 16) // 16 for size in SHARD_SIZES]
"""Windows of 16 that fit in a shard after any phase: 42, 42, 42, 11."""


def test_shuffled_takes_every_window_once_an_epoch_in_random_order() -> None:
    lane = Lane(16, 5)
    order = shuffled_order(SHARDS, LanePlace((lane,), 0, seed=1))
    total = sum(COUNTS)
    steps = -(-2 * total // lane.num_rows)
    starts = np.concatenate([order(step * 80) for step in range(steps)])
    epochs = [windows_of(list(starts[n * total : (n + 1) * total]), 16) for n in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == total
        phases = {(shard, phase) for shard, phase, _ in epoch}
        assert len(phases) == len(SHARDS)  # one phase for each shard
        per_shard = [sum(shard == s for shard, _, _ in epoch) for s in range(4)]
        assert per_shard == COUNTS
        # Shards come in proportion to what they have left: early on as at the end.
        assert {shard for shard, _, _ in epoch[: total // 3]} == {0, 1, 2, 3}
    assert epochs[0] != epochs[1]
    assert {e[:2] for e in epochs[0]} != {e[:2] for e in epochs[1]}  # new phases


@pytest.mark.parametrize("kind", ["shuffled", "coprime"])
def test_lanes_never_read_the_same_text_within_an_epoch(kind: str) -> None:
    num_tokens = sum(lane.num_tokens for lane in MIXED)
    seen: set[int] = set()
    for index, lane in enumerate(MIXED):
        order = ROW_ORDERS[kind](SHARDS, LanePlace(MIXED, index, seed=1))
        for step in range(3):  # less than an epoch of any lane
            for start in order(step * num_tokens):
                inputs = set(range(int(start), int(start) + lane.seq_len))
                assert not inputs & seen
                seen |= inputs


def test_coprime_repeats_nothing_before_a_new_epoch() -> None:
    lane = Lane(16, 5)
    order = CoprimeOrder(SHARDS, LanePlace((lane,), 0, seed=1))
    steps = sum(COUNTS) // lane.num_rows
    for epoch in range(2):
        first = epoch * steps
        found = windows_of(
            [int(s) for step in range(first, first + steps) for s in order(step * 80)], 16
        )
        assert len(set(found)) == len(found) == steps * lane.num_rows
        for shard in range(4):
            taken = [window for s, _, window in found if s == shard]
            strides = {(b - a) % COUNTS[shard] for a, b in itertools.pairwise(taken)}
            assert len(strides) == 1  # one stride, which reaches all windows
            assert math.gcd(strides.pop(), COUNTS[shard]) == 1


def test_document_spans_start_at_the_first_document_and_stay_in_their_shard(tmp_path: Path) -> None:
    train = random_tokens(1000)
    train[train == 1] = 5
    train[[30, 333, 590, 700]] = 1  # first BOS at 30 in shard 0, at 83 in 1, at 90 and 200 in 2
    folder = write_folder(tmp_path / "data", train, random_tokens(100, 1), tokens_per_shard=250)
    data = Dataset.open(folder)
    part = TrainLoader(data, 8, 64, 64, 0, 1, CPU, loader="document")
    want = []
    for shard, first in enumerate([30, 83, 90, 0]):  # shard 3 has none: from its first token
        span = 250 * shard + first
        while span + 64 + 1 <= 250 * (shard + 1):
            want.append(train[span : span + 65])
            span += 64
    for span in itertools.chain(want, want):  # around the end
        ((x, y),) = part.next_step()
        assert np.array_equal(x.flatten(), span[:-1])
        assert np.array_equal(y.flatten(), span[1:])


@pytest.mark.parametrize("kind", ["shuffled", "coprime", "document"])
def test_too_little_text_is_refused_with_the_remedy(dataset: Dataset, kind: str) -> None:
    with pytest.raises(DataError, match=rf'data\.loader = "{kind}": .*lower data\.batch_tokens'):
        TrainLoader(dataset, 16, 2288, 48, 0, 1, CPU, loader=kind)


def test_validation_text_is_trained_on_only_when_asked_for(dataset: Dataset) -> None:
    val = random_tokens(200, 1)
    parts = {
        split: TrainLoader(dataset, 16, 160, 160, 0, 1, CPU, split=split)
        for split in ("train", "val", "both")
    }
    text = {"train": TRAIN, "val": val, "both": np.concatenate([TRAIN, val])}
    for split, part in parts.items():
        for step in range(16):
            ((x, _),) = part.next_step()
            positions = np.arange(step * 160, (step + 1) * 160) % len(text[split])
            assert np.array_equal(x.flatten(), text[split][positions]), (split, step)
