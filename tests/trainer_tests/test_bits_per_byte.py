"""val_bpb against the challenge's definition, written out token by token in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import DataError
from trainer.evaluate.bits_per_byte import EvalResult, evaluate, prime

SEQ_LEN = 32
CPU_GROUP = Group(torch.device("cpu"))


class PrefixModel:
    """Logits depend on a token and its position in the row, so a row cut elsewhere scores
    otherwise; each row's loss is independent of the batch around it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.position = torch.randn(64, VOCAB_SIZE, generator=generator)
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[Tensor] = []

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
        assert reduction == "none"
        self.shapes.append(tuple(tokens_BT.shape))
        self.seen.append(tokens_BT.clone())
        logits_BTV = self.table[tokens_BT] + self.position[: tokens_BT.shape[1]]
        return cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, random_tokens(99), random_tokens(1500, 1), 400))


def byte_table(dataset: Dataset) -> ByteTable:
    return ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)


def plain_evaluate(dataset: Dataset) -> tuple[float, float, int, int]:
    """(loss, bpb, tokens, bytes) with Python loops, numpy fp64 and SentencePiece alone."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(dataset.tokenizer_path))
    model = PrefixModel()
    table, position = model.table.double().numpy(), model.position.double().numpy()
    tokens = random_tokens(1500, 1).astype(int)
    num_rows = (len(tokens) - 1) // SEQ_LEN
    nats, num_bytes = 0.0, 0
    for index in range(num_rows * SEQ_LEN):
        previous, target = int(tokens[index]), int(tokens[index + 1])
        logits = table[previous] + position[index % SEQ_LEN]
        nats += float(np.log(np.exp(logits).sum()) - logits[target])
        if tokenizer.is_control(target) or tokenizer.is_unknown(target):
            continue
        if tokenizer.is_byte(target):
            num_bytes += 1
            continue
        text = tokenizer.id_to_piece(target)
        if text.startswith("\u2581"):
            text = text[1:]
            num_bytes += not (tokenizer.is_control(previous) or tokenizer.is_unknown(previous))
        num_bytes += len(text.encode("utf-8"))
    num_tokens = num_rows * SEQ_LEN
    loss = nats / num_tokens
    return loss, loss / math.log(2) * num_tokens / num_bytes, num_tokens, num_bytes


def score(group: Group, dataset: Dataset, batch_tokens: int) -> EvalResult:
    config = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=batch_tokens)
    return evaluate(PrefixModel(), dataset, byte_table(dataset), config, group)


def test_equals_the_definition(dataset: Dataset) -> None:
    loss, bpb, num_tokens, num_bytes = plain_evaluate(dataset)
    found = score(CPU_GROUP, dataset, 7 * SEQ_LEN)
    assert (found.num_tokens, found.num_bytes) == (num_tokens, num_bytes) == (1472, num_bytes)
    assert found.val_loss == pytest.approx(loss, rel=1e-6)
    assert found.val_bpb == pytest.approx(bpb, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 46, 1000])
def test_batch_size_does_not_change_the_sum(dataset: Dataset, rows: int) -> None:
    expected = score(CPU_GROUP, dataset, 5 * SEQ_LEN)
    found = score(CPU_GROUP, dataset, rows * SEQ_LEN + 3)
    assert found.val_loss == pytest.approx(expected.val_loss, rel=1e-9)
    assert found.val_bpb == pytest.approx(expected.val_bpb, rel=1e-9)
    assert found.num_bytes == expected.num_bytes


@pytest.mark.parametrize("size", [2, 3])
def test_number_of_ranks_does_not_change_the_sum(dataset: Dataset, size: int) -> None:
    expected = score(CPU_GROUP, dataset, 7 * SEQ_LEN)
    for found in run_ranks(score, size, dataset, 7 * SEQ_LEN):
        assert found.num_bytes == expected.num_bytes
        assert found.num_tokens == expected.num_tokens
        assert found.val_bpb == pytest.approx(expected.val_bpb, rel=1e-9)


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, random_tokens(99), random_tokens(SEQ_LEN + 2, 1))
    small = Dataset.open(folder)
    alone = score(CPU_GROUP, small, 64)
    assert run_ranks(score, 2, small, 64) == [alone, alone]
    assert alone.num_tokens == SEQ_LEN


def test_every_forward_pass_has_one_shape_and_prime_the_same(dataset: Dataset) -> None:
    model = PrefixModel()
    config = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=7 * SEQ_LEN)
    prime(model, dataset, config, CPU_GROUP)
    calls: list[tuple[int, int]] = []
    evaluate(
        model,
        dataset,
        byte_table(dataset),
        config,
        CPU_GROUP,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert model.shapes == [(7, SEQ_LEN)] * 8  # one to prime, 46 rows in 7 batches
    assert calls == [(n, 7) for n in range(1, 8)]
    validation = torch.from_numpy(random_tokens(1500, 1).astype(np.int64))
    assert torch.equal(torch.cat(model.seen[1:])[:46].flatten(), validation[: 46 * SEQ_LEN])
    assert not torch.equal(model.seen[0], model.seen[1])  # primed on random tokens


def test_refuses_a_set_smaller_than_a_row(dataset: Dataset) -> None:
    config = EvaluateConfig(seq_len=1500, batch_tokens=1500)
    arguments: list[Any] = [PrefixModel(), dataset, byte_table(dataset), config, CPU_GROUP]
    with pytest.raises(DataError, match="not one row"):
        evaluate(*arguments)
