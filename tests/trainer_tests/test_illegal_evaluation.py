"""The evaluation techniques that only replay published runs: numbers, and that they are marked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from search_spaces.tracks import TRACKS
from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.test_bits_per_byte import PrefixModel
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer.attention import select_backend
from trainer.config import EvaluateConfig, ModelConfig, TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.bits_per_byte import EvalResult, evaluate
from trainer.evaluate.naive_ttt import train_on_validation
from trainer.evaluate.ngram_cache import NgramCache
from trainer.legality import ILLEGAL, illegal_in_use
from trainer.loop import train
from trainer.model.gpt import GPT
from trainer.report import NullReporter

SEQ_LEN = 16
CPU_GROUP = Group(torch.device("cpu"))


def repeating_tokens(count: int) -> np.ndarray:
    """A few phrases again and again, some tokens replaced."""
    generator = np.random.default_rng(3)
    phrases = generator.integers(4, VOCAB_SIZE, (4, 9)).astype(np.uint16)
    tokens = phrases[generator.integers(0, 4, count)].reshape(-1)[:count]
    noise = generator.random(count) < 0.05
    tokens[noise] = generator.integers(4, VOCAB_SIZE, noise.sum())
    tokens[0] = 1
    return tokens


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, random_tokens(99), repeating_tokens(490), 400))


def ngram_score(
    group: Group, dataset: Dataset, stride: int = 0, never_lower: bool = False
) -> EvalResult:
    config = EvaluateConfig(
        seq_len=SEQ_LEN,
        batch_tokens=5 * SEQ_LEN,
        stride=stride,
        ngram_weight=0.3,
        ngram_order=4,
        ngram_never_lower=never_lower,
    )
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    return evaluate(PrefixModel(), dataset, table, config, group)


@pytest.mark.parametrize("never_lower", [False, True])
@pytest.mark.parametrize("stride", [0, 6])
def test_the_cache_equals_counting_token_after_token(
    dataset: Dataset, stride: int, never_lower: bool
) -> None:
    """Dictionaries instead of hashes, counts raised only after a token was scored."""
    model = PrefixModel()
    table, position = model.table.double().numpy(), model.position.double().numpy()
    tokens = repeating_tokens(490).astype(int)
    contexts: dict[tuple[int, ...], int] = {}
    pairs: dict[tuple[int, ...], int] = {}
    nats, spoken = 0.0, 0
    num_targets = 489 // SEQ_LEN * SEQ_LEN
    for target in range(num_targets):
        start = 0
        while target >= start + SEQ_LEN:
            start += stride or SEQ_LEN
        logits = table[tokens[target]] + position[target - start]
        p = float(np.exp(logits[tokens[target + 1]]) / np.exp(logits).sum())
        if target >= 2:
            context = tuple(tokens[target - 2 : target + 1])
            pair = (*context, int(tokens[target + 1]))
            seen, together = contexts.get(context, 0), pairs.get(pair, 0)
            if seen >= 3 and together / seen >= 0.5:
                mixed = 0.7 * p + 0.3 * together / seen
                p = max(p, mixed) if never_lower else mixed
                spoken += 1
            contexts[context] = seen + 1
            pairs[pair] = together + 1
        nats -= math.log(p)
    assert spoken > 50
    found = ngram_score(CPU_GROUP, dataset, stride, never_lower)
    assert found.val_loss == pytest.approx(nats / num_targets, rel=1e-6)


def test_two_ranks_have_one_cache(dataset: Dataset) -> None:
    alone = ngram_score(CPU_GROUP, dataset)
    for found in run_ranks(ngram_score, 2, dataset):
        assert found.val_loss == pytest.approx(alone.val_loss, rel=1e-9)


def test_what_the_cache_says_depends_on_the_past_and_the_target_only() -> None:
    config = EvaluateConfig(seq_len=SEQ_LEN, ngram_weight=0.3, ngram_order=3)
    tokens = repeating_tokens(300)
    whole = NgramCache.of(tokens, 299, config, torch.device("cpu"))
    changed = tokens.copy()
    changed[200:] = random_tokens(100, 8)
    other = NgramCache.of(changed, 299, config, torch.device("cpu"))
    assert whole is not None and other is not None
    assert torch.equal(whole.shares[:199], other.shares[:199])
    assert not torch.equal(whole.shares[199:], other.shares[199:])


def test_few_buckets_make_it_the_invalid_thing_that_was_published() -> None:
    """With colliding counters the shares of all continuations of one context sum to far above 1."""
    config = EvaluateConfig(
        seq_len=SEQ_LEN, ngram_weight=0.3, ngram_order=3, ngram_buckets=7, ngram_min_confidence=0.0
    )
    total = 0.0
    history = repeating_tokens(400)
    for candidate in range(50):
        tokens = np.append(history, np.uint16(candidate))
        cache = NgramCache.of(tokens, len(tokens) - 1, config, torch.device("cpu"))
        assert cache is not None
        total += float(cache.shares[len(tokens) - 2])
    assert total > 5


def _small_gpt() -> GPT:
    torch.manual_seed(2)
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1
    )
    model = GPT(shape, select_backend("sdpa", "cpu", lambda line: None), max_seq_len=SEQ_LEN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


TTT = EvaluateConfig(
    seq_len=SEQ_LEN,
    batch_tokens=99 * SEQ_LEN,
    naive_ttt_epochs=3,
    naive_ttt_lr=0.05,
    naive_ttt_momentum=0.9,
)


def ttt_on_a_rank(group: Group, dataset: Dataset, rows: int) -> dict[str, np.ndarray]:
    model = _small_gpt()
    train_on_validation(model, model.parameters(), dataset, TTT, rows * SEQ_LEN, group)
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def test_naive_training_equals_plain_sgd_written_out(dataset: Dataset) -> None:
    found = ttt_on_a_rank(CPU_GROUP, dataset, 7)
    model = _small_gpt().double()
    model.compute_dtype = torch.float64
    tokens = torch.from_numpy(repeating_tokens(490).astype(np.int64))
    x = tokens[: 30 * SEQ_LEN].view(30, SEQ_LEN)
    y = tokens[1 : 30 * SEQ_LEN + 1].view(30, SEQ_LEN)
    velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for _ in range(3):
        for start in range(0, 30, 7):
            model.zero_grad()
            torch.autograd.backward(model(x[start : start + 7], y[start : start + 7]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    velocity[name] = 0.9 * velocity[name] + parameter.grad
                    parameter -= 0.05 * velocity[name]
    for name, parameter in model.named_parameters():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-4, err_msg=name)


def test_naive_training_on_two_ranks_is_one_larger_batch(dataset: Dataset) -> None:
    """30 rows: two ranks with 15 each in passes of 15 are one rank with a pass of 30."""
    alone = ttt_on_a_rank(CPU_GROUP, dataset, 30)
    for found in run_ranks(ttt_on_a_rank, 2, dataset, 15):
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_run_that_uses_them_is_marked_and_scores_with_them(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    plain = train(configure(), NullReporter(), tmp_path / "plain")
    assert plain.illegal == {}
    both = {"evaluate.naive_ttt_epochs": 1, "evaluate.ngram_weight": 0.15, "evaluate.stages": True}
    config = configure(**both, **{"evaluate.stride": 16})
    result = train(config, NullReporter(), tmp_path / "both")
    assert set(result.illegal) == {"naive_ttt", "ngram_cache"}
    assert result.illegal["naive_ttt"] == ["golf-10min-16mb", "golf-unlimited-16mb", "laptop"]
    assert list(result.stages) == ["trained", "quantized", "sliding+naive_ttt+ngram"]
    assert result.stages["quantized"] == plain.val_bpb  # diagnostics come before any training
    assert result.val_bpb != plain.val_bpb


def test_the_table_names_real_tracks_and_settings_that_are_off_by_default() -> None:
    assert illegal_in_use(TrainConfig()) == {}
    for name, entry in ILLEGAL.items():
        assert entry.name == name and entry.reason
        assert set(entry.tracks) <= set(TRACKS)
    on = TrainConfig().with_overrides({"evaluate.ngram_weight": 0.3})
    assert illegal_in_use(on) == {"ngram_cache": list(ILLEGAL["ngram_cache"].tracks)}
