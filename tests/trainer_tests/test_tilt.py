"""The n-gram tilt against dictionaries and loops, as a distribution, and against looking ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.test_illegal_evaluation import repeating_tokens
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer.attention import select_backend
from trainer.config import EvaluateConfig, ModelConfig, TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.data.window_hash import window_hashes
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.evaluate import tilt
from trainer.evaluate.bits_per_byte import EvalResult, evaluate, prime
from trainer.evaluate.tilt import NO_HINT, Tilt, hints, tilted
from trainer.loop import train
from trainer.loss import nats_of
from trainer.model.gpt import GPT
from trainer.report import NullReporter

SEQ_LEN = 16
CPU_GROUP = Group(torch.device("cpu"))


def plain_hints(tokens: np.ndarray, order: int, threshold: float) -> list[int]:
    """One pass from left to right with a dictionary of what followed each context."""
    followers: dict[tuple[int, ...], Counter[int]] = {}
    leaders: dict[tuple[int, ...], int] = {}
    found = []
    for target in range(1, len(tokens)):
        hint, token = NO_HINT, int(tokens[target])
        if target >= order - 1:
            context = tuple(int(t) for t in tokens[target - order + 1 : target])
            counts = followers.setdefault(context, Counter())
            if counts and counts[leaders[context]] / counts.total() >= threshold:
                hint = leaders[context]
            counts[token] += 1
            if context not in leaders or counts[token] > counts[leaders[context]]:
                leaders[context] = token
        found.append(hint)
    return found


def small_alphabet(count: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, count).astype(np.uint16)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("order", [2, 3, 5, 16])
def test_hints_equal_a_dictionary_s(order: int, threshold: float) -> None:
    texts = [
        repeating_tokens(700),
        small_alphabet(900, 3, 1),
        small_alphabet(900, 2, 2),
        np.zeros(60, dtype=np.uint16),
        np.full(60, 65535, dtype=np.uint16),
        np.tile(small_alphabet(40, 9, 3), 9),
    ]
    for tokens in texts:
        assert hints(tokens, order, threshold).tolist() == plain_hints(tokens, order, threshold)


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 18])
def test_texts_about_as_long_as_the_context(length: int) -> None:
    for tokens in (np.ones(length, dtype=np.uint16), small_alphabet(length, 2, length)):
        assert hints(tokens, 16, 0.5).tolist() == plain_hints(tokens, 16, 0.5)


def test_contexts_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = repeating_tokens(700)
    expected = plain_hints(tokens, 4, 0.5)
    assert len(set(expected)) > 10
    monkeypatch.setattr(tilt, "MULTIPLIER", 0)  # at first every context has the same hash
    assert hints(tokens, 4, 0.5).tolist() == expected
    monkeypatch.undo()

    def few(*args: Any, **settings: Any) -> np.ndarray:
        return window_hashes(*args, **settings) >> np.uint64(36)

    monkeypatch.setattr(tilt, "window_hashes", few)
    assert hints(tokens, 4, 0.5).tolist() == expected


@pytest.mark.parametrize("order", [2, 4, 9])
def test_a_hint_depends_on_tokens_before_its_target_only(order: int) -> None:
    tokens = repeating_tokens(400)
    before = hints(tokens, order, 0.5)
    num_changed = 0
    for place in (30, 111, 112, 250, 398, 399):
        changed = tokens.copy()
        changed[place:] = random_tokens(400, place)[place:]
        after = hints(changed, order, 0.5)
        # Target i is token i + 1: the last one whose context is unchanged is token `place`.
        assert np.array_equal(before[:place], after[:place])
        assert np.array_equal(hints(tokens[: place + 1], order, 0.5), before[:place])
        num_changed += (before != after).any()
    assert num_changed >= 3


@pytest.mark.parametrize("beta", [0.3, 2.625, 40.0])
def test_the_tilted_distribution_sums_to_one_and_is_the_definition(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(50, 97, generator=generator, dtype=torch.float64)
    hints_N = torch.randint(-1, 97, (50,), generator=generator)
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    raised_NV = log_p_NV.clone()
    for row, hint in enumerate(hints_N.tolist()):
        if hint >= 0:
            raised_NV[row, hint] += beta
    expected_NV = -torch.log_softmax(raised_NV, dim=-1)
    found_NV = torch.stack(
        [
            tilted(
                -log_p_NV[:, token],
                -log_p_NV[torch.arange(50), hints_N.clamp(min=0)],
                torch.full((50,), token),
                hints_N,
                beta,
            )
            for token in range(97)
        ],
        dim=-1,
    )
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.exp(-found_NV).sum(-1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(found_NV[hints_N < 0], -log_p_NV[hints_N < 0])


class TableModel:
    """Logits from a token and its position in the row."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.position = torch.randn(SEQ_LEN, VOCAB_SIZE, generator=generator)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, tokens_BT: Tensor, targets: Tensor, reduction: str) -> Tensor:
        assert reduction == "none"
        self.shapes.append(tuple(targets.shape))
        logits_BTV = self.table[tokens_BT] + self.position[: tokens_BT.shape[1]]
        if targets.dim() == 2:
            return nats_of(logits_BTV, targets[..., None])[..., 0]
        return nats_of(logits_BTV, targets)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return Dataset.open(write_folder(folder, random_tokens(99), repeating_tokens(490), 400))


def tilt_config(**changes: float) -> EvaluateConfig:
    settings = {"tilt_order": 4, "tilt_beta": 2.625, "tilt_threshold": 0.5, **changes}
    return EvaluateConfig.model_validate(
        {"seq_len": SEQ_LEN, "batch_tokens": 5 * SEQ_LEN, **settings}
    )


def score(group: Group, dataset: Dataset, config: EvaluateConfig) -> EvalResult:
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    return evaluate(TableModel(), dataset, table, config, group)


@pytest.mark.parametrize("stride", [0, 6])
def test_the_score_equals_a_loop_over_tokens(dataset: Dataset, stride: int) -> None:
    model = TableModel()
    table, position = model.table.double().numpy(), model.position.double().numpy()
    tokens = repeating_tokens(490).astype(int)
    num_targets = 489 // SEQ_LEN * SEQ_LEN
    expected_hints = plain_hints(tokens[: num_targets + 1], 4, 0.5)
    nats, num_right = 0.0, 0
    for target, hint in enumerate(expected_hints):
        start = 0
        while target >= start + SEQ_LEN:
            start += stride or SEQ_LEN
        logits = table[tokens[target]] + position[target - start]
        if hint >= 0:
            logits[hint] += 2.625
            num_right += hint == tokens[target + 1]
        p = np.exp(logits - logits.max())
        nats -= float(np.log(p[tokens[target + 1]] / p.sum()))
    assert num_right > 100
    config = tilt_config(stride=stride)
    found = score(CPU_GROUP, dataset, config)
    assert found.val_loss == pytest.approx(nats / num_targets, rel=1e-6)
    plain = score(CPU_GROUP, dataset, config.model_copy(update={"tilt_beta": 0.0}))
    assert found.val_loss < plain.val_loss - 0.5
    assert (found.num_tokens, found.num_bytes) == (plain.num_tokens, plain.num_bytes)
    for other in run_ranks(score, 2, dataset, config):
        assert other.val_loss == pytest.approx(found.val_loss, rel=1e-12)


def test_without_effect_it_is_the_plain_score(dataset: Dataset) -> None:
    plain = score(CPU_GROUP, dataset, EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=5 * SEQ_LEN))
    assert score(CPU_GROUP, dataset, tilt_config(tilt_beta=0.0)) == plain
    silent = score(CPU_GROUP, dataset, tilt_config(tilt_order=480))
    assert silent.val_loss == pytest.approx(plain.val_loss, rel=1e-12)


def test_its_graph_is_primed_and_every_pass_has_one_shape(dataset: Dataset) -> None:
    model = TableModel()
    prime(model, dataset, tilt_config(), CPU_GROUP)
    assert model.shapes == [(5, SEQ_LEN), (5, SEQ_LEN, 2)]
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    evaluate(model, dataset, table, tilt_config(), CPU_GROUP)
    assert set(model.shapes[2:]) == {(5, SEQ_LEN, 2)}


def small_gpt() -> GPT:
    torch.manual_seed(2)
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1
    )
    model = GPT(shape, select_backend("sdpa", "cpu", lambda line: None), max_seq_len=SEQ_LEN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_the_model_scores_several_tokens_for_each_place() -> None:
    model = small_gpt().double()
    model.compute_dtype = torch.float64
    x, y = (torch.randint(VOCAB_SIZE, (3, SEQ_LEN)) for _ in range(2))
    several = torch.randint(VOCAB_SIZE, (3, SEQ_LEN, 4))
    several[..., 2] = y
    nats = model(x, several, reduction="none")
    log_p = torch.log_softmax(model.logits(x), dim=-1)
    torch.testing.assert_close(nats, -log_p.gather(-1, several))
    torch.testing.assert_close(nats[..., 2], model(x, y, reduction="none"))


def test_a_changed_token_changes_no_loss_before_it() -> None:
    model, tokens = small_gpt(), repeating_tokens(SEQ_LEN * 6 + 1)
    config = tilt_config(tilt_order=3)

    def losses(tokens: np.ndarray) -> Tensor:
        found = Tilt.of(tokens, config, CPU_GROUP)
        assert found is not None
        rows = torch.from_numpy(tokens.astype(np.int64))
        indices = torch.arange(6 * SEQ_LEN).view(6, SEQ_LEN)
        with torch.inference_mode():
            x_BT, y_BT = rows[:-1].view(6, SEQ_LEN), rows[1:].view(6, SEQ_LEN)
            plain, changed = found.score(model, x_BT, y_BT, indices)
            assert torch.allclose(plain, model(x_BT, y_BT, reduction="none"), atol=1e-5)
            assert (plain != changed).any()
            return changed.flatten()

    before = losses(tokens)
    for place in (1, 20, 47, 48, 90):
        changed = tokens.copy()
        changed[place] = (int(tokens[place]) + 5) % VOCAB_SIZE
        after = losses(changed)
        assert torch.equal(before[: place - 1], after[: place - 1])
        assert before[place - 1] != after[place - 1]


def test_a_run_with_it_is_legal_and_named(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = {"evaluate.tilt_beta": 2.625, "evaluate.tilt_order": 4, "evaluate.stages": True}
    config = configure(**settings, **{"evaluate.stride": 16, "runtime.prime_steps": 1})
    result = train(config, NullReporter(), tmp_path)
    assert result.illegal == {}
    assert list(result.stages) == ["trained", "quantized", "sliding+tilt"]
    assert result.val_bpb == result.stages["sliding+tilt"] != result.stages["quantized"]


def test_two_ways_to_use_n_grams_exclude_each_other() -> None:
    both = {"evaluate.tilt_beta": 2.0, "evaluate.ngram_weight": 0.3}
    with pytest.raises(ConfigError, match=r"evaluate\.tilt_beta = 2 and evaluate\.ngram_weight"):
        TrainConfig().with_overrides(both)
