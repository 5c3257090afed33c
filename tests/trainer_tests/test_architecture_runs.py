"""Whole runs with many switches at once: train, quantise, pack, read back, score."""

from pathlib import Path

import numpy as np
import pytest

from tests.trainer_tests.architectures import SWITCHES
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer.account import count_parameters
from trainer.loop import train
from trainer.recipes import RECIPES
from trainer.report import NullReporter


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that each follow from the one before: quick to learn."""
    tokens = np.empty(12_000, dtype=np.uint16)
    tokens[0] = 1
    for index in range(1, len(tokens)):
        tokens[index] = 4 + (int(tokens[index - 1]) * 7 + 3) % (VOCAB_SIZE - 4)
    return write_folder(tmp_path_factory.mktemp("runs") / "data", tokens[:10_000], tokens[10_000:])


@pytest.mark.parametrize(
    "name",
    [
        "pr1212",
        "pr1894",
        "frontier",
        "recur_untied",
        "everything_else",
        "loops_with_the_rest",
        "iha_fused_out",
        "iha_published",
    ],
)
def test_many_switches_at_once_train_pack_and_score(data_dir: Path, name: str) -> None:
    switches = {f"model.{key}": value for key, value in SWITCHES[name].items()}
    config = (
        RECIPES["tiny"]
        .build()
        .with_overrides(
            {
                "model.vocab_size": VOCAB_SIZE,
                "model.num_layers": 5,
                "model.model_dim": 32,
                "data.dir": str(data_dir),
                "data.seq_len": 32,  # with rope_ntk_len = 4 another rotary base than in evaluation
                "data.batch_tokens": 512,
                "data.micro_batch_tokens": 256,
                "evaluate.seq_len": 64,
                "optim.scalar_lr": 0.01,
                "schedule.progress": "steps",
                "budget.max_steps": 12,
                "budget.train_seconds": None,
                **switches,
            }
        )
    )
    result = train(config, NullReporter())
    assert result.num_params == count_parameters(config.model)
    assert result.val_loss is not None and result.val_loss < 0.95 * np.log(VOCAB_SIZE)
    assert result.val_bpb == pytest.approx(result.val_bpb_prequant, rel=0.05)
