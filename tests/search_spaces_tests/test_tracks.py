"""The slowrun tracks are the published ones, and their limit on training text is kept."""

from pathlib import Path

import numpy as np
import pytest

from search_spaces.tracks import TRACKS
from tests.trainer_tests.small_data import random_tokens, write_folder
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.data.stream import TokenStream


@pytest.mark.parametrize(("name", "minutes"), [("tiny", 15), ("1h", 60), ("2h", 120)])
def test_slowrun_budgets_are_the_published_ones(name: str, minutes: int) -> None:
    track = TRACKS[f"slowrun-{name}"]
    budget = track.budget()
    assert (budget.train_seconds, budget.train_tokens) == (60 * minutes, 100_000_000)
    assert (budget.eval_seconds, budget.artifact_bytes, budget.min_steps) == (None, None, 0)
    assert "evaluation" in " ".join(track.not_counted)
    assert TrainConfig(budget=budget).digest() != TrainConfig().digest()


def test_golf_tracks_limit_no_tokens() -> None:
    assert TRACKS["golf-10min-16mb"].budget().train_tokens is None


def test_only_the_first_tokens_are_read_and_again(tmp_path: Path) -> None:
    tokens = random_tokens(2_500)
    folder = write_folder(tmp_path, tokens, tokens[:100], tokens_per_shard=1000)
    shards = Dataset.open(folder).train_shards
    for limit in (1_700, 2_000, 999, 9_999):
        stream = TokenStream(shards, limit)
        used = min(limit, 2_500)
        assert stream.num_tokens == used
        expected = np.resize(tokens[:used], 2 * used + 3)
        assert np.array_equal(stream.read(0, len(expected)), expected)
