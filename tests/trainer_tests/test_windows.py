"""Sliding windows against the definition of their set and a loop over tokens in fp64. CPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.test_bits_per_byte import PrefixModel
from trainer.attention import select_backend
from trainer.config import EvaluateConfig, ModelConfig, TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.evaluate.bits_per_byte import EvalResult, evaluate, prime
from trainer.evaluate.windows import Windows, num_windows
from trainer.model.gpt import GPT

SEQ_LEN = 24
CPU_GROUP = Group(torch.device("cpu"))
CPU = torch.device("cpu")
STRIDES = [1, 5, 7, 8, 12, 23, 24]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, random_tokens(99), random_tokens(380, 1), 400))


def score(group: Group, dataset: Dataset, stride: int, rows: int = 5) -> EvalResult:
    config = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=rows * SEQ_LEN, stride=stride)
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    return evaluate(PrefixModel(), dataset, table, config, group)


def plain_loss(dataset: Dataset, stride: int) -> float:
    """Mean nats: for each target the one window that must score it, found from the definition."""
    model = PrefixModel()
    table, position = model.table.double().numpy(), model.position.double().numpy()
    tokens = random_tokens(380, 1).astype(int)
    num_targets = (len(tokens) - 1) // SEQ_LEN * SEQ_LEN
    nats = 0.0
    for target in range(num_targets):
        start = 0
        while target >= start + SEQ_LEN:  # the first window that reaches the target
            start += stride
        logits = table[tokens[target]] + position[target - start]
        nats += float(np.log(np.exp(logits).sum()) - logits[tokens[target + 1]])
    return nats / num_targets


@pytest.mark.parametrize("stride", STRIDES)
def test_equals_a_plain_loop(dataset: Dataset, stride: int) -> None:
    found = score(CPU_GROUP, dataset, stride)
    assert found.num_tokens == 360
    assert found.val_loss == pytest.approx(plain_loss(dataset, stride), rel=1e-6)


def test_a_stride_of_one_window_is_the_plain_evaluation_bit_for_bit(dataset: Dataset) -> None:
    assert score(CPU_GROUP, dataset, SEQ_LEN) == score(CPU_GROUP, dataset, 0)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("num_targets", [24, 48, 49, 71, 240])
@pytest.mark.parametrize("ranks", [1, 3])
def test_windows_are_the_exact_set_and_score_every_target_once(
    stride: int, num_targets: int, ranks: int
) -> None:
    definition = [w for w in range(0, 999, stride) if w == 0 or w + SEQ_LEN - stride < num_targets]
    count = num_windows(num_targets, SEQ_LEN, stride)
    assert [index * stride for index in range(count)] == definition
    times = np.zeros(num_targets, dtype=int)
    for rank in range(ranks):
        first, end = count * rank // ranks, count * (rank + 1) // ranks
        windows = Windows(SEQ_LEN, stride, num_targets, first, end, batch_rows=3)
        for batch in range(windows.num_batches):
            counted, targets = windows.counted(batch, CPU), windows.targets(batch, CPU)
            np.add.at(times, targets[counted].numpy(), 1)
    assert (times == 1).all()


@pytest.mark.parametrize("stride", [5, 8])
def test_ranks_and_batches_do_not_change_the_sum(dataset: Dataset, stride: int) -> None:
    alone = score(CPU_GROUP, dataset, stride)
    for found in [*run_ranks(score, 2, dataset, stride), score(CPU_GROUP, dataset, stride, 100)]:
        assert (found.num_tokens, found.num_bytes) == (alone.num_tokens, alone.num_bytes)
        assert found.val_loss == pytest.approx(alone.val_loss, rel=1e-9)


def test_bytes_are_counted_once_whatever_the_stride(dataset: Dataset) -> None:
    assert {score(CPU_GROUP, dataset, stride).num_bytes for stride in STRIDES} == {
        score(CPU_GROUP, dataset, 0).num_bytes
    }


@pytest.mark.parametrize("stride", [5, 24])
def test_every_forward_pass_has_the_shape_that_was_primed(dataset: Dataset, stride: int) -> None:
    model = PrefixModel()
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    plain = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=7 * SEQ_LEN)
    sliding = plain.model_copy(update={"stride": stride})
    prime(model, dataset, sliding, CPU_GROUP)
    evaluate(model, dataset, table, sliding, CPU_GROUP)
    evaluate(model, dataset, table, plain, CPU_GROUP)
    assert set(model.shapes) == {(7, SEQ_LEN)}


def test_what_fills_the_last_window_is_not_seen(tmp_path: Path) -> None:
    """A transformer scores the cut last windows as if they were handed to it without padding, and
    tokens after the last target change nothing."""
    torch.manual_seed(3)
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1
    )
    model = GPT(shape, select_backend("sdpa", "cpu", lambda line: None), max_seq_len=SEQ_LEN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = random_tokens(2 * SEQ_LEN + 9, 5)
    num_targets, stride = 2 * SEQ_LEN, 10
    nats = 0.0
    for start in [0, 10, 20, 30]:
        end = min(start + SEQ_LEN, num_targets)
        row = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        with torch.no_grad():
            losses = model(row[:, :-1], row[:, 1:], reduction="none")[0].double()
        nats += float((losses if start == 0 else losses[SEQ_LEN - stride :]).sum())
    config = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=2 * SEQ_LEN, stride=stride)
    for index, tail in enumerate([tokens[num_targets + 1 :], 4 + 0 * tokens[num_targets + 1 :]]):
        val = np.concatenate([tokens[: num_targets + 1], tail])
        data = Dataset.open(write_folder(tmp_path / str(index), random_tokens(99), val))
        table = ByteTable.from_tokenizer(data.tokenizer_path, VOCAB_SIZE)
        found = evaluate(model, data, table, config, CPU_GROUP)
        assert found.num_tokens == num_targets
        assert found.val_loss == pytest.approx(nats / num_targets, rel=1e-6)
        assert found.val_bpb == pytest.approx(
            found.val_loss / math.log(2) * found.num_tokens / found.num_bytes, rel=1e-12
        )


def test_a_stride_beyond_the_window_is_refused_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.stride = 2048 is above evaluate\.seq_len"):
        TrainConfig().with_overrides({"evaluate.stride": 2048})
