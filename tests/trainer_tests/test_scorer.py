"""Cheating through the scorer is not possible: order, single scoring, causality, normalisation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_tokenizer
from tests.trainer_tests.test_bits_per_byte import PrefixModel
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.data.byte_table import ByteTable
from trainer.distributed import Group
from trainer.errors import RuleError
from trainer.evaluate.distribution_check import check_distribution
from trainer.evaluate.scorer import CountBytes, LossModel, Scorer
from trainer.evaluate.windows import Rows
from trainer.model.gpt import GPT

CPU = torch.device("cpu")
SEQ_LEN = 8
NUM_TARGETS = 40
TOKENS = random_tokens(60, 2)
TOKENS[[0, 11, 12, 30]] = 1


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ByteTable:
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ByteTable.from_tokenizer(path, VOCAB_SIZE)


def make(table: ByteTable, group: Group | None = None) -> Scorer:
    return Scorer(TOKENS, NUM_TARGETS, SEQ_LEN, counter(table), group or Group(CPU))


def counter(table: ByteTable) -> CountBytes:
    return lambda x_BT, y_BT, indices_BT: table.count(x_BT, y_BT)


def rows(*spans: tuple[int, int, int]) -> Rows:
    starts, firsts, ends = np.array(spans, dtype=np.int64).T
    return Rows(starts, firsts, ends, SEQ_LEN)


def test_text_is_handed_out_only_after_it_was_scored_and_settled(table: ByteTable) -> None:
    scorer = make(table)
    with pytest.raises(RuleError, match="before every loss there was recorded"):
        scorer.text(0, 8)
    scorer.score(PrefixModel(), rows((0, 0, 8)), 1)
    with pytest.raises(RuleError, match="tokens 0 to 8"):
        scorer.text(0, 8)  # recorded here, but maybe not on every rank
    scorer.settle([(0, 8)])
    assert scorer.text(0, 8).tolist() == TOKENS[:9].tolist()
    for first, end in [(0, 9), (8, 9), (7, 12), (-3, 4), (39, 41), (5, 5)]:
        with pytest.raises(RuleError):
            scorer.text(first, end)


def test_learning_from_what_has_no_loss_yet_is_refused(table: ByteTable) -> None:
    scorer = make(table)
    scorer.score(PrefixModel(), rows((0, 0, 8)), 1)
    with pytest.raises(RuleError, match="1 targets of 9 have no recorded loss yet"):
        scorer.settle([(0, 9)])


def test_no_target_is_scored_twice_nor_left_out(table: ByteTable) -> None:
    scorer = make(table)
    scorer.score(PrefixModel(), rows((0, 0, 8), (4, 8, 12)), 2)
    for again in [(0, 0, 8), (4, 4, 6), (11, 11, 13)]:
        with pytest.raises(RuleError, match="scored before"):
            scorer.score(PrefixModel(), rows(again), 2)
    with pytest.raises(RuleError, match="or are none"):
        scorer.score(PrefixModel(), rows((36, 36, 44)), 2)
    with pytest.raises(RuleError, match="12 targets were scored of 40"):
        scorer.result()


def two_ranks_score_the_same(group: Group, table: ByteTable) -> str:
    scorer = make(table, group)
    scorer.score(PrefixModel(), rows((8 * group.rank, 8 * group.rank, 8 + 8 * group.rank)), 1)
    scorer.settle([(0, 16)])
    scorer.score(PrefixModel(), rows((16, 16, 24)), 1)
    try:
        scorer.settle([(16, 24)])
    except RuleError as error:
        return str(error)
    return ""


def test_what_another_rank_scored_counts_and_counts_once(table: ByteTable) -> None:
    for said in run_ranks(two_ranks_score_the_same, 2, table):
        assert "8 have several" in said


def test_the_model_is_shown_nothing_beyond_the_last_scored_target(table: ByteTable) -> None:
    model = PrefixModel()
    make(table).score(model, rows((2, 4, 7), (20, 20, 28)), 3)
    x_BT = model.seen[0]
    assert x_BT[0].tolist() == [*TOKENS[2:7].tolist(), 0, 0, 0]
    assert x_BT[1].tolist() == TOKENS[20:28].tolist()
    assert x_BT[2].tolist() == [0] * 8


def test_what_is_hidden_of_a_single_row_does_not_reach_its_targets(table: ByteTable) -> None:
    alone = make(table).score(PrefixModel(), rows((2, 4, 7)), 1)
    torch.testing.assert_close(alone, make(table).score(PrefixModel(), rows((2, 4, 7)), 3))


def test_losses_come_back_for_the_scored_targets_only(table: ByteTable) -> None:
    found = make(table).score(PrefixModel(), rows((2, 4, 7)), 2)
    model = PrefixModel()
    x = torch.from_numpy(TOKENS[2:10].astype(np.int64))[None]
    y = torch.from_numpy(TOKENS[3:11].astype(np.int64))[None]
    expected = model(x, y, reduction="none")
    assert found.shape == (1, 8)
    torch.testing.assert_close(found[0, 2:5], expected[0, 2:5])
    assert found[0, :2].abs().sum() == 0 and found[0, 5:].abs().sum() == 0


def test_documents_run_from_bos_to_the_next_and_cover_every_target(table: ByteTable) -> None:
    scorer = make(table)
    assert scorer.documents(bos_id=1) == [(0, 11), (11, 12), (12, 30), (30, 40)]
    scorer.score(PrefixModel(), rows((30, 30, 38)), 1)
    scorer.settle([(30, 38)])
    assert scorer.text(30, 38).tolist() == TOKENS[30:39].tolist()
    with pytest.raises(RuleError):
        scorer.text(29, 38)  # the text before that BOS is another document, not scored


def test_the_score_is_the_mean_over_targets_and_mixing_enters_it_alone(table: ByteTable) -> None:
    spans = rows(*((start, start, start + 8) for start in range(0, 40, 8)))
    plain = make(table)
    nats = plain.score(PrefixModel(), spans, 5)
    asked: list[Tensor] = []

    def halve(
        model: LossModel, x_BT: Tensor, y_BT: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        asked.append(indices)
        losses = model(x_BT, y_BT, reduction="none")
        return losses, losses / 2

    mixed = Scorer(TOKENS, NUM_TARGETS, SEQ_LEN, counter(table), Group(CPU), halve)
    torch.testing.assert_close(mixed.score(PrefixModel(), spans, 5), nats)
    assert torch.equal(asked[0].flatten(), torch.arange(40))
    result = plain.result()
    assert result.val_loss == pytest.approx(float(nats.double().mean()), rel=1e-12)
    assert mixed.result().val_loss == pytest.approx(result.val_loss / 2, rel=1e-12)


def honest(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    return PrefixModel()(x_BT, y_BT, reduction)


def reads_the_next_input(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    logits = PrefixModel().table[x_BT] + 0.05 * one_hot(x_BT.roll(-1, 1), VOCAB_SIZE)
    return cross_entropy(logits.transpose(1, 2), y_BT, reduction="none")


def reads_the_last_input(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    return honest(x_BT, y_BT, reduction) + 0.01 * (x_BT[:, -1:] % 7)


def reads_its_targets(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    """The better of itself and guessing: each a distribution, their maximum none."""
    return honest(x_BT, y_BT, reduction).clamp(max=math.log(VOCAB_SIZE))


def reads_a_later_target(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    return honest(x_BT, y_BT, reduction) * (1 + 0.01 * (y_BT.roll(-1, 1) % 3))


def leaves_mass_out(x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
    return honest(x_BT, y_BT, reduction) - 0.05


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (reads_the_next_input, "not causal"),
        (reads_the_last_input, "not causal"),
        (reads_a_later_target, "not causal"),
        (reads_its_targets, "no distribution"),
        (leaves_mass_out, "no distribution"),
    ],
)
def test_a_cheating_model_is_found(model: LossModel, fault: str) -> None:
    with pytest.raises(RuleError, match=re.escape(fault)):
        check_distribution(model, VOCAB_SIZE, 32, 12, CPU)


@pytest.mark.parametrize("num_rows", [1, 32, 401])
def test_an_honest_model_passes(num_rows: int) -> None:
    check_distribution(honest, VOCAB_SIZE, num_rows, 12, CPU)


def test_a_transformer_passes_and_one_that_sees_all_positions_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = ModelConfig(
        vocab_size=50, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, smear="channel"
    )

    def see_all(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2)

    for attend in (select_backend("sdpa", "cpu", lambda line: None), see_all):
        model = GPT(shape, attend, max_seq_len=12)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with torch.inference_mode():
            if attend is see_all:
                with pytest.raises(RuleError, match="not causal"):
                    check_distribution(model, 50, 16, 12, CPU)
            else:
                check_distribution(model, 50, 16, 12, CPU)
