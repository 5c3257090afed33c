"""Checkpoints scored together, against probabilities computed from their logits in fp64. CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from tests.trainer_tests.test_resume import SAVING, Dying, Lost
from trainer import checkpoint
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.ensemble import WEIGHTS, Ensemble, MixturePass
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.report import NullReporter
from trainer.workspace import build_model

SETTINGS: dict[str, Any] = {
    "evaluate.ensemble": "both",
    "evaluate.ensemble_size": 3,
    "evaluate.ensemble_every": 5,
    "evaluate.prequant": False,
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the checkpoints of a run are copied when it deletes them."""
    folder = tmp_path / "kept"
    folder.mkdir()
    remove = Ensemble.remove

    def copy_first(self: Ensemble) -> None:
        for steps in self.steps:
            shutil.copy(self._path(steps), folder)
        remove(self)

    monkeypatch.setattr(Ensemble, "remove", copy_first)
    return folder


def reference(config: TrainConfig, files: list[Path], weights: list[float]) -> float:
    """Mean nats of the mixture, from every checkpoint's own softmax in fp64."""
    dataset = Dataset.open(config.data.dir)
    length = config.evaluate.seq_len
    count = dataset.num_scored_tokens(length)
    tokens = torch.from_numpy(dataset.read_val()[: count + 1].astype(np.int64))
    x, y = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    mixture = torch.zeros(y.shape, dtype=torch.float64)
    model = build_model(config, Group(torch.device("cpu")), lambda line: None)
    for path, weight in zip(files, weights, strict=True):
        state = {name: torch.from_numpy(a.copy()) for name, a in checkpoint.read(path).items()}
        model.load_state_dict(state)
        with torch.no_grad():
            mixture += weight * torch.exp(-model(x, y, reduction="none").double())
    return float(-mixture.log().mean())


def test_both_mixtures_are_those_of_the_probabilities(
    configure: Callable[..., TrainConfig],  # noqa: F811
    kept: Path,
    tmp_path: Path,
) -> None:
    config = configure(**SETTINGS, **{"budget.max_steps": 22})
    plain = train(configure(**{"budget.max_steps": 22}), NullReporter())
    result = train(config, NullReporter(), tmp_path / "run")
    files = sorted(kept.iterdir())
    assert [int(path.stem.split("_")[1]) for path in files] == [15, 20, 22]
    equal = reference(config, files, [1 / 3, 1 / 3, 1 / 3])
    weighted = reference(config, files, [1 / 6, 2 / 6, 3 / 6])
    assert abs(equal - weighted) > 1e-4
    assert result.ensemble["ensemble_equal"] == pytest.approx(equal, abs=1e-6)
    assert result.ensemble["ensemble_weighted"] == pytest.approx(weighted, abs=1e-6)
    assert result.stages.keys() >= {"ensemble_equal", "ensemble_weighted"}
    # It is beside the score and changes nothing in the run.
    assert (result.val_loss, result.train_loss) == (plain.val_loss, plain.train_loss)
    assert list((tmp_path / "run").glob("ensemble_*")) == []


def test_two_copies_of_one_checkpoint_score_as_one(
    configure: Callable[..., TrainConfig],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    take = Ensemble.take

    def take_twice(self: Ensemble, steps: int) -> None:
        take(self, steps)
        take(self, steps + 1)

    monkeypatch.setattr(Ensemble, "take", take_twice)
    config = configure(**{**SETTINGS, "evaluate.ensemble_every": 100})
    reporter = Collector()
    result = train(config, reporter, tmp_path)
    (line,) = [r["line"] for r in reporter.of("log") if r["line"].startswith("checkpoint of")]
    single = float(line.split()[-2])
    for loss in result.ensemble.values():
        assert loss == pytest.approx(single, abs=2e-6)


def test_checkpoints_fall_at_the_ends_of_epochs(
    configure: Callable[..., TrainConfig],  # noqa: F811
    kept: Path,
    tmp_path: Path,
) -> None:
    settings = {**SETTINGS, "evaluate.ensemble_every": 0, "evaluate.ensemble": "weighted"}
    limited = {"budget.train_tokens": 4 * 512 + 100, "data.loader": "shuffled_documents"}
    train(configure(**settings, **limited), NullReporter(), tmp_path / "run")
    # 2,148 tokens are 65 rows of 33, an epoch is 4.06 steps of 16 rows.
    steps = [int(path.stem.split("_")[1]) for path in sorted(kept.iterdir())]
    assert steps == [5, 9, 12]


def test_checkpoints_fall_at_the_ends_of_cycles(
    configure: Callable[..., TrainConfig],  # noqa: F811
    kept: Path,
    tmp_path: Path,
) -> None:
    """Three of a quarter of the run each: its last is the end of the run."""
    settings = {**SETTINGS, "evaluate.ensemble_every": 0, "evaluate.ensemble_at": "cycles"}
    with pytest.raises(ConfigError, match=r"ensemble_at = .cycles. .*schedule\.cycles = 0; raise"):
        configure(**settings)
    cycles = {"schedule.cycles": 3, "schedule.cycle_share": 0.25}
    train(configure(**settings, **cycles), NullReporter(), tmp_path / "run")
    steps = [int(path.stem.split("_")[1]) for path in sorted(kept.iterdir())]
    assert steps == [6, 9, 12]


def test_a_resumed_run_has_the_same_ensemble(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**{**SETTINGS, **SAVING})
    expected = train(config, NullReporter(), tmp_path / "whole")
    with pytest.raises(Lost):
        train(config, Dying(8), tmp_path / "lost")
    assert train(config, NullReporter(), tmp_path / "lost").ensemble == expected.ensemble


def _on_ranks(group: Group, tree: dict[str, Any], folder: str) -> dict[str, float]:
    out = Path(folder) if group.is_main else None
    return train(TrainConfig.from_dict(tree), NullReporter(), out).ensemble


def test_two_workers_read_what_the_first_wrote(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**SETTINGS)
    alone = train(config, NullReporter(), tmp_path / "alone").ensemble
    first, second = run_ranks(_on_ranks, 2, config.to_dict(), str(tmp_path / "two"))
    assert first == second
    assert first == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("mode", WEIGHTS)
def test_sums_of_logarithms_hold_tiny_probabilities(mode: str) -> None:
    weights = WEIGHTS[mode](4)
    assert sum(weights) == pytest.approx(1) and weights == sorted(weights)
    nats = 150 * torch.rand(4, 2, 3, 5, dtype=torch.float64)  # [checkpoints, batches, B, T]
    mixture = MixturePass(weights)
    for index in range(4):
        sums = [mixture.add(batch, index, nats[index, batch]) for batch in range(2)]
    expected = (torch.tensor(weights).double().view(4, 1, 1, 1) * torch.exp(-nats)).sum(0).log()
    torch.testing.assert_close(torch.stack(sums), expected)


def test_it_is_off_by_default(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:  # noqa: F811
    assert TrainConfig().evaluate.ensemble == "off"
    result = train(configure(**{"budget.max_steps": 2}), NullReporter(), tmp_path)
    assert result.ensemble == {} and "evaluate_ensemble" not in result.phases
