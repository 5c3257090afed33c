"""Rows of different lengths in one step: the text form, who runs what, and the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.calibrate import calibrate
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.loop import Run, train
from trainer.mix import Lane, lanes_of, sharing_fault
from trainer.recipes import RECIPES
from trainer.report import NullReporter, TrainResult

TRAIN = random_tokens(6000)
CPU = torch.device("cpu")


def with_mix(mix: str, batch: int, micro: int = 65_536, **more: Any) -> TrainConfig:
    return TrainConfig().with_overrides(
        {"data.mix": mix, "data.batch_tokens": batch, "data.micro_batch_tokens": micro, **more}
    )


@pytest.mark.parametrize(
    ("mix", "batch", "lanes"),
    [
        ("5x2048+3x6144", 589_824, [(2048, 36)] * 5 + [(6144, 12)] * 3),
        ("5x2048@36+3x6144@10", 552_960, [(2048, 36)] * 5 + [(6144, 10)] * 3),
        ("8x4096", 589_824, [(4096, 18)] * 8),
        ("1x8 + 1x16@1", 32, [(8, 2), (16, 1)]),
    ],
)
def test_a_mix_says_its_lanes(mix: str, batch: int, lanes: list[tuple[int, int]]) -> None:
    data = with_mix(mix, batch).data
    assert lanes_of(data) == tuple(Lane(*lane) for lane in lanes)
    assert sum(lane.num_tokens for lane in lanes_of(data)) == batch
    assert data.row_lengths == {length for length, _ in lanes}


def test_without_a_mix_there_is_one_lane() -> None:
    assert lanes_of(TrainConfig().data) == (Lane(1024, 512),)


@pytest.mark.parametrize(
    ("mix", "batch", "named"),
    [
        ("5*2048", 524_288, ['"5*2048" is no group of lanes', "5x2048+3x6144"]),
        ("0x2048", 524_288, ['"0x2048" is no group']),
        ("5x2048+", 524_288, ['"" is no group']),
        ("5x2048@0", 524_288, ['"5x2048@0" is no group']),
        ("5x2048+3x6144", 524_290, ["8 lanes", "a multiple of 8"]),
        ("5x2048+3x6144", 524_288, ["rows of 6144 tokens", "65536 tokens", "3x6144@10"]),
        ("5x2048@36+3x6144@10", 524_288, ["552960", "set data.batch_tokens = 552960"]),
        ("1x2048@1", 1, ["set data.batch_tokens = 2048"]),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_the_remedy(
    mix: str, batch: int, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_mix(mix, batch)
    (fault,) = str(caught.value).split("\n")
    for part in ["data.mix", *named]:
        assert part in fault


def test_rows_longer_than_a_micro_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.micro_batch_tokens = 4096 .* 6144 .*raise it"):
        with_mix("5x2048+3x6144", 589_824, 4096)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_published_mix_scales_to_fewer_workers(workers: int) -> None:
    assert sharing_fault(with_mix("5x2048+3x6144", 589_824).data, workers) is None


@pytest.mark.parametrize("workers", [3, 5, 16])
def test_workers_that_do_not_divide_the_lanes_are_refused(folder: Path, workers: int) -> None:
    fault = sharing_fault(with_mix("5x2048+3x6144", 589_824).data, workers)
    assert fault is not None
    for part in ("data.mix", "8 lanes", f"{workers} workers", "divides 8"):
        assert part in fault
    with pytest.raises(ConfigError, match=r"data\.mix.* 4 lanes"):
        TrainLoader.from_config(Dataset.open(folder), small_config(folder), _rank(0, workers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("mix")
    return write_folder(target, TRAIN, random_tokens(300, 1), tokens_per_shard=2500)


LANES = [(8, 6), (8, 6), (16, 3), (24, 1)]
"""Row length and rows of the four lanes of MIX: 168 tokens a step, unequal between lanes."""
MIX = "2x8@6+1x16@3+1x24@1"


def small_config(folder: Path, **overrides: Any) -> TrainConfig:
    return (
        RECIPES["tiny"]
        .build()
        .with_overrides(
            {
                "model.vocab_size": VOCAB_SIZE,
                "model.num_layers": 2,
                "model.model_dim": 16,
                "model.num_heads": 2,
                "data.dir": str(folder),
                "data.mix": MIX,
                "data.batch_tokens": 168,
                "data.micro_batch_tokens": 24,
                "evaluate.seq_len": 16,
                "schedule.progress": "steps",
                "budget.max_steps": 4,
                "budget.train_seconds": None,
                "runtime.log_every": 1,
                **overrides,
            }
        )
    )


def expected_lane(step: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a lane in sequential order, one token at a time."""
    before = sum(length * rows for length, rows in LANES[:lane])
    length, rows = LANES[lane]
    at = [[168 * step + before + row * length + i for i in range(length)] for row in range(rows)]
    positions = np.array(at)
    return TRAIN[positions % len(TRAIN)], TRAIN[(positions + 1) % len(TRAIN)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_lane_reads_its_part_of_the_span_once(folder: Path, world_size: int) -> None:
    config = small_config(folder)
    dataset = Dataset.open(folder)
    loaders = [
        TrainLoader.from_config(dataset, config, _rank(rank, world_size))
        for rank in range(world_size)
    ]
    for step in range(40):  # past the end of the stream
        for rank, loader in enumerate(loaders):
            micro_batches = loader.next_step()
            for lane in range(rank, 4, world_size):
                x, y = expected_lane(step, lane)
                rows = 0
                while rows < len(x):
                    got_x, got_y = micro_batches.pop(0)
                    assert got_x.numel() <= 24
                    assert np.array_equal(got_x, x[rows : rows + len(got_x)])
                    assert np.array_equal(got_y, y[rows : rows + len(got_x)])
                    rows += len(got_x)
            assert not micro_batches


def _rank(rank: int, size: int) -> Group:
    group = Group(CPU)
    group.rank, group.size = rank, size
    return group


def gradients_of_a_step(group: Group, config: TrainConfig) -> dict[str, Any]:
    """Loss and averaged gradients of the second step of the real loop, on weights without zeros."""
    run = Run.build(config, NullReporter(), group)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in run.work.model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    run.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    run._step(0, 0.0)
    run.optimizer.zero_grad()
    run.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    loss = float(run._step(1, 0.25))
    gradients = {
        n: p.grad.tolist() for n, p in run.work.model.named_parameters() if p.grad is not None
    }
    return {"loss": loss, **gradients}


def plain_gradients(config: TrainConfig) -> dict[str, Any]:
    """One process, whole lanes, each lane's mean loss weighted as the setting says, in fp64."""
    run = Run.build(config, NullReporter(), Group(CPU))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.work.model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model = run.work.model.double()
    model.compute_dtype = torch.float64
    total = torch.zeros((), dtype=torch.float64)
    for lane, (length, rows) in enumerate(LANES):
        x, y = (torch.from_numpy(part.astype(np.int64)) for part in expected_lane(1, lane))
        losses = [model(x[row : row + 1], y[row : row + 1]) for row in range(rows)]
        by_token = config.data.mix_weighting == "token"
        weight = length * rows / 168 if by_token else 1 / len(LANES)
        total = total + weight * torch.stack(losses).mean()
    total.backward()
    gradients = {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(total.detach()), **gradients}


@pytest.mark.parametrize("weighting", ["token", "worker"])
def test_a_mixed_step_has_the_gradient_of_one_process_doing_the_same_sequences(
    folder: Path, weighting: str
) -> None:
    config = small_config(folder, **{"data.mix_weighting": weighting})
    want = plain_gradients(config)
    answers = [gradients_of_a_step(Group(CPU), config)]
    answers += run_ranks(gradients_of_a_step, 2, config) + run_ranks(gradients_of_a_step, 4, config)
    for got in answers:
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(
                torch.tensor(got[name]), torch.tensor(value), rtol=2e-4, atol=2e-6
            )


def test_the_two_weightings_differ_where_lanes_do(folder: Path) -> None:
    by_token, by_worker = (
        plain_gradients(small_config(folder, **{"data.mix_weighting": weighting}))
        for weighting in ("token", "worker")
    )
    assert by_token["loss"] != pytest.approx(by_worker["loss"], rel=1e-4)


def test_a_mix_of_one_length_is_the_batch_without_a_mix(folder: Path) -> None:
    without = small_config(folder, **{"data.mix": "", "data.seq_len": 8})
    with_mix_of_one = small_config(folder, **{"data.mix": "3x8"})
    one, other = (gradients_of_a_step(Group(CPU), c) for c in (without, with_mix_of_one))
    for name, value in one.items():
        torch.testing.assert_close(
            torch.tensor(other[name]), torch.tensor(value), rtol=1e-4, atol=1e-6
        )


class Losses(NullReporter):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "step":
            self.curve.append(fields["train_loss"])


def whole_run(group: Group, config: TrainConfig, out: Path) -> tuple[TrainResult, list[float]]:
    reporter = Losses()
    return train(config, reporter, out), reporter.curve


def test_whole_runs_with_every_technique_agree_for_any_number_of_workers(
    folder: Path, tmp_path: Path
) -> None:
    config = small_config(
        folder,
        **{
            "optim.matrix_lr_late": 0.03,
            "optim.scalar_lr_late": 0.02,
            "optim.muon_comm": "reduce_scatter",
            "optim.muon_momentum_warmup_frac": 0.2,
            "optim.weight_decay": 0.02,
            "optim.weight_decay_ramp": 0.06,
            "optim.grad_clip_norm": 0.3,
            "loss.kind": "mile",
            "average.kind": "ema",
            "average.decay": 0.7,
            "data.loader": "shuffled",
            "budget.max_steps": 8,
        },
    )
    alone, curve = whole_run(Group(CPU), config, tmp_path / "one")
    assert alone.stages.keys() >= {"trained", "averaged"}
    assert alone.tokens == 8 * 168
    without = whole_run(Group(CPU), config.with_overrides({"runtime.prime_steps": 0}), tmp_path)
    assert without[1] == curve  # priming leaves no trace, in sharded momentum neither
    (first, shared_curve), (second, _) = run_ranks(whole_run, 2, config, tmp_path / "two")
    assert shared_curve == pytest.approx(curve, rel=1e-3)
    assert first.val_bpb == second.val_bpb == pytest.approx(alone.val_bpb, rel=2e-3)
    assert first.stages == second.stages == pytest.approx(alone.stages, rel=2e-3)


def test_the_calibration_is_primed_with_rows_of_every_length(folder: Path) -> None:
    """Otherwise the kernels of the other lengths are compiled inside the clock: seen, 9 s for 3."""
    config = small_config(folder, **{"quantize.method": "gptq", "quantize.calibration_tokens": 168})
    run = Run.build(config, NullReporter(), Group(CPU))
    lengths = []
    run.work.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    calibrate(config, run.work.model, run.work.loader, run.work.group, prime=True)
    assert sorted(lengths) == sorted(config.data.row_lengths)
    assert len(lengths) > 1
