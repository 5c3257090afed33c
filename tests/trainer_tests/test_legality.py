"""The table of what some tracks forbid, against the tracks, and in the result of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_spaces.tracks import TRACKS
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.config import TrainConfig
from trainer.legality import ILLEGAL, illegal_in_use
from trainer.loop import train
from trainer.recipes import RECIPES
from trainer.report import NullReporter


def test_the_table_names_tracks_that_exist() -> None:
    for name, row in ILLEGAL.items():
        assert row.name == name and row.reason
        assert row.tracks and set(row.tracks) <= set(TRACKS), name


def test_nothing_is_illegal_unless_it_is_switched_on() -> None:
    assert illegal_in_use(TrainConfig()) == {}


@pytest.mark.parametrize("split", ["val", "both"])
def test_training_on_validation_text_is_forbidden_on_the_golf_tracks(split: str) -> None:
    config = TrainConfig().with_overrides({"data.train_split": split})
    (tracks,) = illegal_in_use(config).values()
    assert {"golf-10min-16mb", "golf-unlimited-16mb"} <= set(tracks)


@pytest.mark.parametrize("split", ["train", "both"])
def test_a_run_says_what_it_used(split: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", random_tokens(3000), random_tokens(300, 1))
    config = (
        RECIPES["tiny"]
        .build()
        .with_overrides(
            {
                "model.vocab_size": VOCAB_SIZE,
                "model.num_layers": 1,
                "model.model_dim": 16,
                "model.num_heads": 2,
                "data.dir": str(folder),
                "data.batch_tokens": 256,
                "data.train_split": split,
                "schedule.progress": "steps",
                "budget.max_steps": 1,
                "budget.train_seconds": None,
            }
        )
    )
    result = train(config, NullReporter(), tmp_path)
    assert list(result.illegal) == ([] if split == "train" else ["validation_training"])
