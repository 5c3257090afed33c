"""The n-gram tilt with test-time training: what counts is tilted, what is learned is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.adaptive import CPU_GROUP, open_text, repeating_tokens, small_gpt, subject
from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.bits_per_byte import EvalResult, evaluate
from trainer.evaluate.methods import prime_score, score
from trainer.evaluate.tilt import NO_HINT, hints

SEQ_LEN = 16
TOKENS = repeating_tokens(330)
TOKENS[::55] = 1
BETA, ORDER, THRESHOLD = 2.0, 3, 0.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_text(tmp_path_factory.mktemp("data"), TOKENS)


def settings(ttt: str, beta: float = BETA, **changes: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "seq_len": SEQ_LEN,
            "batch_tokens": 5 * SEQ_LEN,
            "stride": 0 if ttt == "documents" else 8,
            "ttt": ttt,
            "ttt_chunk_tokens": 64,
            "ttt_batch_rows": 3,
            "ttt_lr": 0.3,
            "ttt_doc_chunk_tokens": 8,
            "ttt_doc_batch": 3,
            "ttt_doc_lanes": 2,
            "ttt_lora_rank": 2,
            "ttt_lora_lr": 0.05,
            "tilt_beta": beta,
            "tilt_order": ORDER,
            "tilt_threshold": THRESHOLD,
            **changes,
        }
    )


def run(group: Group, dataset: Dataset, config: EvaluateConfig) -> EvalResult:
    return score(subject(dataset, group), config)


@pytest.mark.parametrize("ttt", ["chunks", "documents"])
def test_hinted_targets_change_and_no_other(dataset: Dataset, ttt: str) -> None:
    """The same weights are learned with and without, so that untouched targets cost the same."""
    plain, changed = subject(dataset), subject(dataset)
    score(plain, settings(ttt, beta=0.0))
    found = score(changed, settings(ttt))
    for expected, parameter in zip(
        plain.model.parameters(), changed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
    hinted = hints(TOKENS[: found.num_tokens + 1], ORDER, THRESHOLD)
    assert 50 < (hinted != NO_HINT).sum() < 300
    for target, hint in enumerate(hinted.tolist()):
        before, after = plain.nats[target], changed.nats[target]
        if hint == NO_HINT:
            assert after == pytest.approx(before, rel=1e-3, abs=1e-4)
        else:
            is_right = hint == TOKENS[target + 1]
            assert after < before if is_right else after > before - 1e-3
    assert found.val_loss < score(subject(dataset), settings(ttt, beta=0.0)).val_loss


def test_training_at_rate_zero_is_the_tilted_sliding_score(dataset: Dataset) -> None:
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, 400)
    still = settings("chunks", ttt_lr=0.0)
    expected = evaluate(small_gpt(), dataset, table, settings("off"), CPU_GROUP)
    assert run(CPU_GROUP, dataset, still).val_loss == pytest.approx(expected.val_loss, rel=1e-6)


@pytest.mark.parametrize("ttt", ["off", "chunks", "documents"])
def test_two_ranks_and_priming_change_nothing(dataset: Dataset, tmp_path: Path, ttt: str) -> None:
    config = settings(ttt)
    it = subject(dataset)
    prime_score(it, config)
    alone = score(it, config)
    for found in run_ranks(run, 2, dataset, config):
        assert found.val_loss == pytest.approx(alone.val_loss, rel=1e-5)
        assert found.num_bytes == alone.num_bytes
