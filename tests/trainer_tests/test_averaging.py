"""Averages of weights against sums in fp64, and as part of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.config import AverageConfig, TrainConfig
from trainer.loop import train
from trainer.optim import WeightAverage, build_average
from trainer.recipes import RECIPES
from trainer.report import NullReporter

NUM_STEPS = 40


def walk() -> list[dict[str, Tensor]]:
    """Weights after each step, first the initial ones; one tensor is bf16."""
    generator = torch.Generator().manual_seed(0)
    path = [torch.randn(6, generator=generator)]
    for _ in range(NUM_STEPS):
        path.append(path[-1] + 0.1 * torch.randn(6, generator=generator))
    return [{"a": x[:4].reshape(2, 2), "half": x[4:].bfloat16()} for x in path]


def follow(config: AverageConfig) -> WeightAverage:
    """The average after the walk; progress is the share of steps done before each."""
    path = walk()
    live = {name: value.clone() for name, value in path[0].items()}
    live["count"] = torch.tensor(3)  # not a float: none of an average's business
    average = build_average(config, live)
    assert average is not None
    for step, weights in enumerate(path[1:]):
        for name, value in weights.items():
            live[name].copy_(value)
        average.update(step / NUM_STEPS)
    return average


def check(average: WeightAverage, want: dict[str, Tensor]) -> None:
    got = average.result()
    assert got.keys() == want.keys()
    for name, value in want.items():
        tolerance = 1e-6 if name == "a" else 2**-8
        torch.testing.assert_close(got[name].double(), value, rtol=tolerance, atol=1e-6)
    assert got["half"].dtype == torch.bfloat16


def mean_of(steps: list[int]) -> dict[str, Tensor]:
    """fp64 mean of the weights after those steps (0 = the initial ones)."""
    path = walk()
    return {
        name: torch.stack([path[step][name].double() for step in steps]).mean(0) for name in path[0]
    }


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.997])
def test_ema_is_its_recursion(start: float, decay: float) -> None:
    average = follow(AverageConfig(kind="ema", decay=decay, start=start))
    path = walk()
    first = int(start * NUM_STEPS) + (start > 0)
    want = {name: value.double() for name, value in path[first].items()}
    for weights in path[first + 1 :]:
        want = {n: decay * e + (1 - decay) * weights[n].double() for n, e in want.items()}
    check(average, want)


def test_ema_of_half_precision_weights_moves_by_less_than_their_resolution() -> None:
    """The published mistake: a bf16 shadow stays where it began."""
    live = {"w": torch.tensor([1.0]).bfloat16()}
    average = build_average(AverageConfig(kind="ema", decay=0.9965), live)
    assert average is not None
    live["w"].fill_(1.0 + 2**-7)
    for _ in range(2000):
        average.update(0.5)
    assert average.result()["w"].item() == 1.0 + 2**-7


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_the_published_shadow_rounds_the_embedding_alone(start: float) -> None:
    """Weights that move once: the fp32 average follows; the embedding's stays where it began, for
    good, because its increment is lost between two bf16 numbers."""
    live = {name: torch.ones(3) for name in ("tok_emb.weight", "other")}
    config = AverageConfig(kind="ema", decay=0.9965, start=start, shadow="bfloat16_embedding")
    average = build_average(config, live)
    assert average is not None
    average.update(0.4)
    for value in live.values():
        value.fill_(1.25)
    want = {"tok_emb.weight": torch.tensor(1.0).bfloat16(), "other": torch.tensor(1.0).double()}
    for _ in range(700):
        average.update(0.5)
        rounded = (want["tok_emb.weight"].float() * 0.9965).bfloat16().float()
        want["tok_emb.weight"] = (rounded + (1 - 0.9965) * 1.25).bfloat16()
        want["other"] = want["other"] * 0.9965 + (1 - 0.9965) * 1.25
    got = average.result()
    assert (got["tok_emb.weight"] == want["tok_emb.weight"].float()).all()
    torch.testing.assert_close(got["other"].double(), want["other"].expand(3), rtol=1e-5, atol=0)
    assert float(want["other"]) > 1.22 and float(want["tok_emb.weight"]) < 1.1


def test_the_published_shadow_is_refused_beside_other_averages() -> None:
    with pytest.raises(ValidationError, match=r"average\.shadow.*set average\.shadow = .float32"):
        AverageConfig(kind="swa", shadow="bfloat16_embedding")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ({"kind": "swa", "interval": 10}, [10, 20, 30, 40]),
        ({"kind": "swa", "interval": 7, "start": 0.5}, [27, 34]),
        ({"kind": "lawa", "interval": 10}, [10, 20, 30, 40]),  # the final weights count once
        ({"kind": "lawa", "interval": 7, "start": 0.5}, [27, 34, 40]),
        ({"kind": "lawa", "interval": 3, "keep": 4}, [30, 33, 36, 39, 40]),
    ],
)
def test_snapshots_are_averaged_as_listed(overrides: dict[str, Any], steps: list[int]) -> None:
    average = follow(AverageConfig(**overrides))
    check(average, mean_of(steps))


def test_an_average_that_never_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"average\.start = 1; lower it"):
        AverageConfig(kind="swa", start=1.0)
    assert build_average(AverageConfig(), {}) is None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, random_tokens(9000), random_tokens(500, 1))
    return (
        RECIPES["tiny"]
        .build()
        .with_overrides(
            {
                "model.vocab_size": VOCAB_SIZE,
                "model.num_layers": 2,
                "model.model_dim": 32,
                "data.dir": str(folder),
                "data.seq_len": 32,
                "data.batch_tokens": 256,
                "evaluate.seq_len": 32,
                "schedule.progress": "steps",
                "budget.max_steps": 10,
                "budget.train_seconds": None,
                "average.interval": 3,
            }
        )
    )


def test_a_run_quantises_the_average_and_scores_both(config: TrainConfig, tmp_path: Path) -> None:
    plain = train(config, NullReporter(), tmp_path / "plain")
    assert plain.stages["trained"] == plain.val_bpb_prequant
    seen = {plain.artifact_sha256}
    for kind in ("ema", "swa", "lawa"):
        overrides = {"average.kind": kind, "average.decay": 0.8}
        result = train(config.with_overrides(overrides), NullReporter(), tmp_path / kind)
        assert result.stages["trained"] == plain.stages["trained"]  # training is untouched
        assert result.stages["averaged"] == result.val_bpb_prequant != plain.val_bpb_prequant
        seen.add(result.artifact_sha256)
    assert len(seen) == 4


def test_an_average_of_the_last_weights_alone_changes_nothing(
    config: TrainConfig, tmp_path: Path
) -> None:
    plain = train(config, NullReporter(), tmp_path / "plain")
    overrides = {"average.kind": "swa", "average.interval": 1, "average.start": 0.9}
    result = train(config.with_overrides(overrides), NullReporter(), tmp_path / "last")
    assert result.stages["averaged"] == plain.val_bpb_prequant
    assert result.val_bpb == plain.val_bpb


def test_a_run_that_ends_before_the_average_begins_keeps_its_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    plain = train(config, NullReporter(), tmp_path / "plain")
    overrides = {"average.kind": "lawa", "average.interval": 11}
    result = train(config.with_overrides(overrides), NullReporter(), tmp_path / "none")
    assert result.val_bpb == plain.val_bpb
    assert "averaged" not in result.stages
