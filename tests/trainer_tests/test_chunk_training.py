"""Score-first training by chunks against loops over windows and SGD written out in fp64. CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer_tests.adaptive import (
    CPU_GROUP,
    open_text,
    repeating_tokens,
    small_gpt,
    subject,
)
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import ConfigError, RuleError
from trainer.evaluate.bits_per_byte import EvalResult, evaluate
from trainer.evaluate.chunk_training import plan_chunks, prime_chunks, score_in_chunks
from trainer.evaluate.row_sgd import trained_parameters
from trainer.model.gpt import GPT

SEQ_LEN = 16
TOKENS = repeating_tokens(330)
NUM_TARGETS = 320


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_text(tmp_path_factory.mktemp("data"), TOKENS)


def settings(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        seq_len=SEQ_LEN,
        batch_tokens=5 * SEQ_LEN,
        ttt="chunks",
        ttt_chunk_tokens=70,
        ttt_batch_rows=3,
        ttt_lr=0.5,
        ttt_clip_norm=0.5,
    ).model_copy(update=changes)


def run(dataset: Dataset, config: EvaluateConfig, micro: int = 1 << 20) -> tuple[EvalResult, GPT]:
    it = subject(dataset, micro=micro)
    return score_in_chunks(it, config), it.model


def written_out(config: EvaluateConfig) -> tuple[dict[int, float], GPT]:
    """Nats of every target, window after window and chunk after chunk, in fp64."""
    model = small_gpt().double()
    model.compute_dtype = torch.float64
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    stride, chunk_tokens = config.stride or SEQ_LEN, config.ttt_chunk_tokens
    names = {id(p) for p in trained_parameters(model, config)}
    trained = [p for p in model.parameters() if id(p) in names]
    velocity = [torch.zeros_like(p) for p in trained]
    nats: dict[int, float] = {}
    num_chunks = math.ceil(NUM_TARGETS / chunk_tokens)
    for chunk in range(num_chunks):
        for start in range(0, NUM_TARGETS, stride):
            scored = start if start == 0 else start + SEQ_LEN - stride
            if scored // chunk_tokens != chunk or scored >= NUM_TARGETS:
                continue
            end = min(start + SEQ_LEN, NUM_TARGETS)
            row = tokens[None, start : end + 1]
            with torch.no_grad():
                losses = model(row[:, :-1], row[:, 1:], reduction="none")[0]
            for target in range(scored, end):
                assert target not in nats
                nats[target] = float(losses[target - start])
        if chunk == num_chunks - 1:
            break
        lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
        begin = chunk * chunk_tokens
        num_rows = chunk_tokens // SEQ_LEN
        x = tokens[begin : begin + num_rows * SEQ_LEN].view(num_rows, SEQ_LEN)
        y = tokens[begin + 1 : begin + 1 + num_rows * SEQ_LEN].view(num_rows, SEQ_LEN)
        for _ in range(config.ttt_epochs):
            for first in range(0, num_rows, config.ttt_batch_rows):
                step = slice(first, first + config.ttt_batch_rows)
                gradients = torch.autograd.grad(model(x[step], y[step]), trained)
                norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
                shrink = min(1.0, config.ttt_clip_norm / (norm + 1e-6))
                with torch.no_grad():
                    for p, g, v in zip(trained, gradients, velocity, strict=True):
                        v.mul_(config.ttt_momentum).add_(g * shrink)
                        p -= lr * v
    return nats, model


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": 5},
        {"stride": 0, "ttt_freeze_blocks": 2},
        {"stride": 8, "ttt_part": "mlp", "ttt_last_fraction": 0.4, "ttt_momentum": 0.0},
        {"stride": 16, "ttt_chunk_tokens": 32, "ttt_batch_rows": 50, "ttt_clip_norm": 1e9},
    ],
    ids=["sliding", "frozen", "mlp", "chunks of whole rows"],
)
def test_equals_windows_and_sgd_written_out(dataset: Dataset, changes: dict[str, Any]) -> None:
    config = settings(**changes)
    it = subject(dataset)
    result = score_in_chunks(it, config)
    nats, model = written_out(config)
    assert sorted(it.nats) == sorted(nats) == list(range(NUM_TARGETS))
    for target, value in nats.items():
        assert it.nats[target] == pytest.approx(value, abs=2e-4), target
    assert result.val_loss == pytest.approx(sum(nats.values()) / NUM_TARGETS, rel=1e-5)
    for (name, found), expected in zip(
        it.model.named_parameters(), model.parameters(), strict=True
    ):
        np.testing.assert_allclose(
            found.detach().numpy(), expected.detach().numpy(), atol=2e-4, err_msg=name
        )
        assert found.requires_grad and found.grad is None


def test_it_learns_what_repeats(dataset: Dataset) -> None:
    still, _ = run(dataset, settings(ttt_lr=0.0))
    moved, _ = run(dataset, settings())
    assert moved.val_loss < still.val_loss - 0.1


@pytest.mark.parametrize("stride", [0, 5, 16])
def test_learning_rate_zero_is_the_evaluation_without_training(
    dataset: Dataset, stride: int
) -> None:
    config = settings(ttt_lr=0.0, stride=stride)
    found, model = run(dataset, config)
    it = subject(dataset)
    plain = evaluate(it.model, dataset, it.byte_table, config, CPU_GROUP)
    assert found.val_loss == pytest.approx(plain.val_loss, rel=1e-7)
    assert (found.num_tokens, found.num_bytes) == (plain.num_tokens, plain.num_bytes)
    for before, after in zip(small_gpt().parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_the_last_chunk_is_not_trained_on(dataset: Dataset) -> None:
    one_chunk = settings(ttt_chunk_tokens=NUM_TARGETS)
    _, model = run(dataset, one_chunk)
    for before, after in zip(small_gpt().parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_micro_batches_do_not_change_the_score(dataset: Dataset) -> None:
    whole, _ = run(dataset, settings())
    parts, _ = run(dataset, settings(), micro=2 * SEQ_LEN)
    assert parts.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


def on_a_rank(group: Group, dataset: Dataset, stride: int) -> EvalResult:
    return score_in_chunks(subject(dataset, group), settings(stride=stride))


@pytest.mark.parametrize("stride", [0, 5])
def test_two_ranks_give_the_number_of_one(dataset: Dataset, stride: int) -> None:
    alone = on_a_rank(CPU_GROUP, dataset, stride)
    first, second = run_ranks(on_a_rank, 2, dataset, stride)
    assert first == second
    assert (first.num_tokens, first.num_bytes) == (alone.num_tokens, alone.num_bytes)
    assert first.val_loss == pytest.approx(alone.val_loss, rel=1e-6)


@pytest.mark.parametrize("changed", [69, 70, 150, 301])
def test_a_token_changes_no_loss_before_its_own(
    dataset: Dataset, tmp_path: Path, changed: int
) -> None:
    tokens = TOKENS.copy()
    tokens[changed + 1 :] = repeating_tokens(500, 41)[-(len(tokens) - changed - 1) :]
    tokens[changed] = 4 + (int(tokens[changed]) + 9) % 300
    texts = [subject(dataset), subject(open_text(tmp_path, tokens))]
    for it in texts:
        score_in_chunks(it, settings(stride=5))
    before, after = (it.nats for it in texts)
    assert [before[target] for target in range(changed - 1)] == [
        after[target] for target in range(changed - 1)
    ]
    assert before[changed] != after[changed]


def test_training_before_scoring_is_stopped_by_the_scorer(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that trains on the chunk after the one that was scored."""
    from trainer.evaluate.chunk_training import ChunkPlan

    honest = ChunkPlan.targets
    monkeypatch.setattr(ChunkPlan, "targets", lambda self, chunk: honest(self, chunk + 1))
    with pytest.raises(RuleError, match="have no recorded loss yet"):
        run(dataset, settings())


@pytest.mark.parametrize("stride", [1, 5, 7, 16])
@pytest.mark.parametrize("chunk_tokens", [16, 33, 64, 1000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_chunks_and_ranks_share_the_windows_out(stride: int, chunk_tokens: int, ranks: int) -> None:
    config = settings(stride=stride, ttt_chunk_tokens=chunk_tokens)
    plan = plan_chunks(NUM_TARGETS, config, ranks)
    index = 0
    for chunk in range(plan.num_chunks):
        for rank in range(ranks):
            share = plan.share(chunk, rank, ranks)
            assert share.first == index
            assert share.end - share.first <= share.batch_rows * max(1, share.num_batches)
            index = share.end
    assert index == plan.windows.end


def test_priming_changes_nothing_and_sees_no_validation_token(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = subject(dataset)
    monkeypatch.setattr(Dataset, "read_val", lambda self: pytest.fail("read"))
    shapes: list[tuple[int, ...]] = []
    hook = it.model.register_forward_pre_hook(
        lambda _, arguments: shapes.append(tuple(arguments[0].shape))
    )
    prime_chunks(it, settings(stride=5))
    primed = set(shapes)
    monkeypatch.undo()
    for before, after in zip(small_gpt().parameters(), it.model.parameters(), strict=True):
        assert torch.equal(before, after) and after.grad is None
    shapes.clear()
    score_in_chunks(it, settings(stride=5))
    hook.remove()
    assert set(shapes) <= primed


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"evaluate.ttt_chunk_tokens": 512}, ["evaluate.ttt_chunk_tokens", "evaluate.seq_len"]),
        ({"evaluate.ttt_phases": 1}, ["evaluate.ttt_phases", '"documents"']),
        ({"evaluate.ngram_weight": 0.1}, ["evaluate.ttt", "evaluate.ngram_weight"]),
        ({"evaluate.ttt_freeze_blocks": 9}, ["evaluate.ttt_freeze_blocks", "model.num_layers"]),
    ],
)
def test_settings_that_exclude_each_other_are_named(
    overrides: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides({"evaluate.ttt": "chunks", **overrides})
    for name in named:
        assert name in str(caught.value)
