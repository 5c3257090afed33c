"""Rows that grow in the course of a run: the same tokens, cut anew, with every length primed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import random_tokens, write_folder
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer.clock import BudgetClock
from trainer.config import DataConfig, TrainConfig
from trainer.config.row_schedule import row_len_at, row_stages
from trainer.data.dataset import Dataset
from trainer.data.loader import MicroBatches, TrainLoader
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.loop import Run

TRAIN = random_tokens(2300)
SCHEDULE = "8@0.25,16@0.5,48@1.0"


def data_config(**settings: object) -> DataConfig:
    base = {"seq_len": 48, "batch_tokens": 192, "micro_batch_tokens": 96}
    return DataConfig.model_validate({**base, "seq_len_schedule": SCHEDULE, **settings})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, TRAIN, random_tokens(200, 1), tokens_per_shard=700))


def loader(dataset: Dataset, rank: int, size: int, micro: int, kind: str) -> TrainLoader:
    stages = row_stages(data_config())
    device = torch.device("cpu")
    return TrainLoader(dataset, 48, 192, micro, rank, size, device, stages=stages, loader=kind)


@pytest.mark.parametrize(
    ("progress", "seq_len"),
    [(0.0, 8), (0.2499, 8), (0.25, 16), (0.4999, 16), (0.5, 48), (0.99, 48), (1.0, 48)],
)
def test_a_stage_lasts_until_its_end(progress: float, seq_len: int) -> None:
    assert row_len_at(row_stages(data_config()), progress) == seq_len


@pytest.mark.parametrize("kind", ["sequential", "document"])
@pytest.mark.parametrize(("size", "micro"), [(1, 96), (2, 96), (2, 48), (4, 48)])
def test_every_step_is_the_plain_loader_s_span_in_rows_of_the_moment(
    dataset: Dataset, size: int, micro: int, kind: str
) -> None:
    ranks = [loader(dataset, rank, size, micro, kind) for rank in range(size)]
    plain = TrainLoader(dataset, 48, 192, 192, 0, 1, torch.device("cpu"), loader=kind)
    for progress, seq_len in [(0.0, 8), (0.1, 8), (0.3, 16), (0.6, 48), (1.0, 48)] * 3:
        steps = [rank.next_step(progress) for rank in ranks]
        assert {tuple(x.shape) for step in steps for x, _ in step} == {(micro // seq_len, seq_len)}
        ((x_BT, y_BT),) = plain.next_step()
        assert torch.equal(joined(steps, 0), x_BT.flatten())
        assert torch.equal(joined(steps, 1), y_BT.flatten())


def joined(steps: list[MicroBatches], side: int) -> torch.Tensor:
    return torch.cat([pair[side].flatten() for step in steps for pair in step])


def test_a_share_that_rows_do_not_divide_is_refused(dataset: Dataset) -> None:
    stages = row_stages(data_config(seq_len_schedule="32@0.5,48@1.0"))
    with pytest.raises(ConfigError, match="micro batch has 48 tokens here, which rows of 32"):
        TrainLoader(dataset, 48, 192, 96, 0, 4, torch.device("cpu"), stages=stages)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seq_len_schedule": "8@0.5,48"}, r'"48" is no stage; write LENGTH@END'),
        ({"seq_len_schedule": "8@0.5,16@0.5,48@1.0"}, r'"16@0\.5" is no stage'),
        ({"seq_len_schedule": "0@0.5,48@1.0"}, r'"0@0\.5" is no stage'),
        ({"seq_len_schedule": "8@0.5,48@1.5"}, r'"48@1\.5" is no stage'),
        ({"seq_len_schedule": "8@0.5,48@0.9"}, r"ends at 0\.9; the last stage must end at 1\.0"),
        ({"seq_len": 96}, r"longest rows have 48 tokens.*set data\.seq_len = 48"),
        (
            {"seq_len_schedule": "10@0.5,48@1.0"},
            r"rows of 10 tokens do not divide data\.batch_tokens = 192",
        ),
        ({"micro_batch_tokens": 100}, r"8, 16, 48 tokens do not divide data\.micro_batch_tokens"),
        ({"loader": "shuffled"}, r'data\.loader = "shuffled" cannot'),
        ({"mix": "4x48"}, r'data\.mix = "4x48" exclude each other'),
    ],
)
def test_faults_are_named_with_the_remedy(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data_config(**settings)


def test_lengths_are_known_to_the_model_in_advance() -> None:
    assert data_config().row_lengths == {8, 16, 48}
    assert data_config(seq_len_schedule="").row_lengths == {48}


def shapes_of_a_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int], list[float]]:
    """Row lengths of the steps before the clock and inside it, and the losses inside."""
    lengths: list[int] = []
    started: list[int] = []
    next_step, start = TrainLoader.next_step, BudgetClock.start

    def noting_step(self: TrainLoader, progress: float = 1.0) -> MicroBatches:
        micro_batches = next_step(self, progress)
        lengths.append(micro_batches[0][0].shape[1])
        return micro_batches

    def noting_start(self: BudgetClock) -> None:
        started.append(len(lengths))
        start(self)

    monkeypatch.setattr(TrainLoader, "next_step", noting_step)
    monkeypatch.setattr(BudgetClock, "start", noting_start)
    reporter = Collector()
    run = Run.build(config, reporter, Group(torch.device("cpu")))
    run.prime()
    assert run.train_to_budget() is None
    monkeypatch.undo()
    losses = [record["train_loss"] for record in reporter.of("step")]
    return lengths[: started[0]], lengths[started[0] :], losses


def test_a_run_grows_its_rows_and_primes_every_length(
    configure: Callable[..., TrainConfig],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {"runtime.prime_steps": 2}
    growing = configure(**few, **{"data.seq_len_schedule": "8@0.25,16@0.5,32@1.0"})
    primed, run, losses = shapes_of_a_run(growing, monkeypatch)
    assert primed == [8, 8, 16, 16, 32, 32]
    assert run == [8] * 3 + [16] * 3 + [32] * 6
    constant = configure(**few, **{"data.seq_len_schedule": "32@1.0"})
    _, run, same = shapes_of_a_run(constant, monkeypatch)
    _, _, plain = shapes_of_a_run(configure(**few), monkeypatch)
    assert run == [32] * 12
    assert same == plain
    assert np.isfinite(losses).all() and losses != plain
