"""Adapters of documents against one document at a time in fp64, with plain AdamW and SGD. CPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.ranks import run_ranks
from tests.trainer_tests.adaptive import (
    CPU_GROUP,
    RememberingSubject,
    open_text,
    repeating_tokens,
    small_gpt,
    subject,
)
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import ConfigError, RuleError
from trainer.evaluate import document_training
from trainer.evaluate.document_training import (
    DocumentLora,
    DocumentPass,
    cut_batches,
    deal,
    phase_bounds,
)
from trainer.evaluate.methods import prime_score, score
from trainer.evaluate.scorer import EvalResult, Scorer
from trainer.model.gpt import GPT

SEQ_LEN = 16
SIZE = 4
NUM_TARGETS = 144
CAP = 1.5
"""Near the logits of small models, so that it matters."""
UNTIED = {"tie_embeddings": False, "num_layers": 2, "logit_softcap": CAP}


def make_tokens() -> np.ndarray:
    """Documents of 1 to 40 tokens, the first without BOS, the last cut off."""
    tokens = repeating_tokens(151, 10_000)
    tokens[0] = 9
    tokens[[6, 7, 21, 61, 70, 90, 118]] = 1
    return tokens


TOKENS = make_tokens()
BEGINS = [0, 6, 7, 21, 61, 70, 90, 118, NUM_TARGETS]
QUEUE = sorted(itertools.pairwise(BEGINS), key=lambda document: document[0] - document[1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_text(tmp_path_factory.mktemp("data"), TOKENS)


def settings(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        seq_len=SEQ_LEN,
        batch_tokens=5 * SEQ_LEN,
        ttt="documents",
        ttt_doc_chunk_tokens=SIZE,
        ttt_doc_batch=3,
        ttt_doc_lanes=2,
        ttt_lora_rank=2,
        ttt_lora_alpha=3.0,
        ttt_lora_lr=0.05,
        ttt_lora_beta1=0.3,
        ttt_lora_beta2=0.9,
        ttt_lora_weight_decay=0.2,
        ttt_chunk_tokens=40,
        ttt_batch_rows=2,
        ttt_prefix_docs=6,
        ttt_global_lr=0.3,
    ).model_copy(update=changes)


def run(dataset: Dataset, config: EvaluateConfig) -> tuple[EvalResult, RememberingSubject]:
    it = subject(dataset, model=small_gpt(**UNTIED))
    return DocumentPass.of(it, config).run(), it


class RawLogits(nn.Module):
    """The head's product before the softcap, of one row."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.gpt = model

    def forward(self, x_T: Tensor) -> Tensor:
        hidden = self.gpt._hidden(x_T[None])[0]
        mean = hidden.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps
        return hidden / torch.sqrt(mean) @ self.gpt.head.weight.T


class Reference:
    """The model in fp64, into whose weights the adapters are multiplied where they can be."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.model = small_gpt(**UNTIED).double()
        self.model.compute_dtype = torch.float64
        self.scale = config.ttt_lora_alpha / max(1, config.ttt_lora_rank)
        self.caps: Tensor = torch.full((2,), CAP, dtype=torch.float64)

    def losses(self, factors: dict[str, tuple[Tensor, Tensor]], x_T: Tensor, y_T: Tensor) -> Tensor:
        """Nats [T] of one row; factors A [S, R, in] and B [S, out, R]."""
        weights = {f"gpt.{name}": value for name, value in self.model.named_parameters()}
        handles = []
        for name, (a, b) in factors.items():
            delta = self.scale * (b @ a)
            if name == "head":
                weights["gpt.head.weight"] = weights["gpt.head.weight"] + delta
            for layer, block in enumerate(self.model.blocks):
                if name in "qkv":
                    key = f"gpt.blocks.{layer}.attn.{name}.weight"
                    weights[key] = weights[key] + delta[layer]
                elif name == "out":
                    hook = _beside_attention(delta[layer])
                    handles.append(block.attn.register_forward_hook(hook))
                elif name == "mlp":
                    handles.append(block.mlp.register_forward_hook(_beside(delta[layer])))
        raw_TV = functional_call(RawLogits(self.model), weights, (x_T,))
        for handle in handles:
            handle.remove()
        positive, negative = (cap * torch.tanh(raw_TV / cap) for cap in self.caps)
        logits_TV = torch.where(raw_TV > 0, positive, negative)
        return torch.logsumexp(logits_TV, -1) - logits_TV.gather(1, y_T[:, None])[:, 0]


def _beside(delta: Tensor) -> Any:
    return lambda module, arguments, out: out + arguments[0] @ delta.T


def _beside_attention(delta: Tensor) -> Any:
    return lambda module, arguments, out: (out[0] + arguments[0] @ delta.T, *out[1:])


def one_document(
    reference: Reference,
    factors: dict[str, tuple[Tensor, Tensor]],
    document: tuple[int, int],
    config: EvaluateConfig,
) -> dict[int, float]:
    """Nats of a document's targets: score a chunk, then step, and so on."""
    first, end = document
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    leaves = [factor for pair in factors.values() for factor in pair]
    optimizer = leaves and torch.optim.AdamW(
        leaves,
        config.ttt_lora_lr,
        (config.ttt_lora_beta1, config.ttt_lora_beta2),
        1e-10,
        config.ttt_lora_weight_decay,
    )
    nats = {}
    for start in range(first, end, SIZE):
        stop = min(start + SIZE, end)
        begin = max(first, stop - SEQ_LEN)
        losses = reference.losses(factors, tokens[begin:stop], tokens[begin + 1 : stop + 1])
        scored = losses[start - begin :]
        nats.update(zip(range(start, stop), scored.tolist(), strict=True))
        if optimizer and stop < end:
            gradients = torch.autograd.grad(scored.mean(), leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
    return nats


def written_out(config: EvaluateConfig) -> tuple[dict[int, float], Reference]:
    """Every document by itself; random first factors are those that its lane draws."""
    reference = Reference(config)
    reference.caps.requires_grad_(config.ttt_asym_logit)
    nats: dict[int, float] = {}
    done = 0
    for bound in phase_bounds(len(QUEUE), config):
        batches = cut_batches(QUEUE[done:bound], config.ttt_doc_batch)
        for lane in range(config.ttt_doc_lanes):
            lora = (
                DocumentLora(config, reference.model.config, lane, torch.device("cpu"))
                if config.ttt_lora_rank
                else None
            )
            for batch in deal(batches, lane, config.ttt_doc_lanes):
                drawn = {}
                if lora is not None:
                    lora.restart()
                    drawn = lora.adapters(config.ttt_doc_batch, None).stacked
                for row, document in enumerate(batch):
                    factors = {
                        name: tuple(
                            (side[row] if name == "head" else side[:, row])
                            .detach()
                            .double()
                            .clone()
                            .requires_grad_()
                            for side in pair
                        )
                        for name, pair in drawn.items()
                    }
                    nats |= one_document(reference, factors, document, config)
        done = bound
        if done < len(QUEUE):
            global_sgd(reference, QUEUE[:done], config)
    return nats, reference


def global_sgd(
    reference: Reference, documents: list[tuple[int, int]], config: EvaluateConfig
) -> None:
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    last = tokens[documents[-1][1]]
    text = torch.cat([*(tokens[first:end] for first, end in documents), last[None]])
    trained = list(reference.model.parameters())
    if config.ttt_asym_logit:
        trained.append(reference.caps)
    velocity = [torch.zeros_like(p) for p in trained]
    count = math.ceil((len(text) - 1) / config.ttt_chunk_tokens)
    for chunk in range(count):
        part = text[chunk * 40 : (chunk + 1) * 40 + 1]
        num_rows = (len(part) - 1) // SEQ_LEN
        if not num_rows:
            continue
        rows = [part[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1] for row in range(num_rows)]
        loss = torch.stack([reference.losses({}, row[:-1], row[1:]).mean() for row in rows]).mean()
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        shrink = min(1.0, 1.0 / (norm + 1e-6))
        lr = config.ttt_global_lr * 0.5 * (1 + math.cos(math.pi * chunk / (count - 1)))
        with torch.no_grad():
            for p, g, v in zip(trained, gradients, velocity, strict=True):
                v.mul_(0.9).add_(g * shrink)
                p -= lr * v


def check(found: RememberingSubject, result: EvalResult, nats: dict[int, float]) -> None:
    assert sorted(found.nats) == sorted(nats) == list(range(NUM_TARGETS))
    for target, value in nats.items():
        assert found.nats[target] == pytest.approx(value, abs=3e-4), target
    assert result.val_loss == pytest.approx(sum(nats.values()) / NUM_TARGETS, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ttt_lora_targets": "v,head", "ttt_doc_batch": 64},
        {"ttt_lora_targets": "q,out", "ttt_lora_weight_decay": 0.0, "ttt_doc_chunk_tokens": 4},
        {"ttt_phases": 2},
        {"ttt_phases": 1, "ttt_asym_logit": True, "ttt_lora_targets": "k,mlp,head"},
        {"ttt_phases": 3, "ttt_asym_logit": True, "ttt_lora_rank": 0},
    ],
    ids=["all", "v and head", "q and out", "phases", "asymmetric", "phases alone"],
)
def test_equals_one_document_at_a_time(dataset: Dataset, changes: dict[str, Any]) -> None:
    config = settings(**changes)
    found = subject(dataset, model=small_gpt(**UNTIED))
    evaluation = DocumentPass.of(found, config)
    result = evaluation.run()
    nats, reference = written_out(config)
    check(found, result, nats)
    if evaluation.softcaps is not None:
        moved = evaluation.softcaps.detach().double() - CAP
        torch.testing.assert_close(moved, reference.caps.detach() - CAP, rtol=5e-3, atol=1e-5)
        assert moved.abs().min() > 1e-3
    pairs = zip(found.model.named_parameters(), reference.model.parameters(), strict=True)
    for (name, value), expected in pairs:
        np.testing.assert_allclose(
            value.detach().numpy(), expected.detach().numpy(), atol=3e-4, err_msg=name
        )
        assert value.requires_grad and value.grad is None


@pytest.mark.parametrize("changes", [{"ttt_lora_rank": 0}, {"ttt_lora_lr": 0.0}])
def test_rank_zero_and_rate_zero_are_plain_evaluation_of_each_document(
    dataset: Dataset, changes: dict[str, Any]
) -> None:
    result, found = run(dataset, settings(**changes))
    nats, _ = written_out(settings(ttt_lora_rank=0))
    check(found, result, nats)
    model = small_gpt(**UNTIED)
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():  # a document that one row holds is one plain forward pass
        losses = model(tokens[None, 6:21], tokens[None, 7:22], reduction="none")[0]
        losses[1:] = model(tokens[None, 7:21], tokens[None, 8:22], reduction="none")[0]
    for target in range(6, 21):
        assert found.nats[target] == pytest.approx(float(losses[target - 6]), abs=1e-5)


def test_it_learns_within_documents(dataset: Dataset) -> None:
    plain, _ = run(dataset, settings(ttt_lora_rank=0))
    adapted, _ = run(dataset, settings())
    assert adapted.val_loss < plain.val_loss - 0.02


def on_a_rank(group: Group, dataset: Dataset, changes: dict[str, Any]) -> EvalResult:
    it = subject(dataset, group, model=small_gpt(**UNTIED))
    return DocumentPass.of(it, settings(**changes)).run()


@pytest.mark.parametrize(
    "changes",
    [
        {"ttt_lora_warm_start": True, "ttt_phases": 2, "ttt_asym_logit": True},
        {"ttt_doc_batch": 1, "ttt_lora_warm_start": True},
        {"ttt_lora_rank": 0},
    ],
)
def test_two_ranks_give_the_number_of_one(dataset: Dataset, changes: dict[str, Any]) -> None:
    alone = on_a_rank(CPU_GROUP, dataset, changes)
    first, second = run_ranks(on_a_rank, 2, dataset, changes)
    assert first == second
    assert (first.num_tokens, first.num_bytes) == (alone.num_tokens, alone.num_bytes)
    assert first.val_loss == pytest.approx(alone.val_loss, rel=1e-6)


@pytest.mark.parametrize("warm", [True, False])
def test_warm_first_factors_stay_and_second_ones_do_not(warm: bool) -> None:
    config = settings(ttt_lora_warm_start=warm)
    lora = DocumentLora(config, small_gpt().config, 0, torch.device("cpu"))
    first, second = lora.adapters(3, None).stacked["q"]
    lora.step(((second + 0.1) * first.sum()).sum())
    kept = first.detach().clone()
    assert second.abs().max() > 0
    lora.restart()
    assert torch.equal(first, kept) == warm
    assert second.abs().max() == 0


@pytest.mark.parametrize("changed", [30, 63, 95])
def test_a_token_moves_later_losses_of_its_own_document_only(
    dataset: Dataset, tmp_path: Path, changed: int
) -> None:
    tokens = TOKENS.copy()
    tokens[changed] = 4 + (int(tokens[changed]) + 9) % 300
    _, before = run(dataset, settings())
    _, after = run(open_text(tmp_path, tokens), settings())
    (own,) = [document for document in QUEUE if document[0] < changed < document[1]]
    for target in range(NUM_TARGETS):
        if not changed - 1 <= target < own[1]:
            assert before.nats[target] == after.nats[target], target
    assert before.nats[changed] != after.nats[changed]


def test_phases_pass_on_what_was_scored_to_what_was_not(dataset: Dataset, tmp_path: Path) -> None:
    config = settings(ttt_phases=1, ttt_prefix_docs=3)
    tokens = TOKENS.copy()
    tokens[30] += 1  # in the longest document, which is scored first
    _, before = run(dataset, config)
    _, after = run(open_text(tmp_path / "early", tokens), config)
    early = [target for first, end in QUEUE[:3] for target in range(first, end)]
    late = sorted(set(range(NUM_TARGETS)) - set(early))
    assert [before.nats[t] for t in early if not 29 <= t < 61] == [
        after.nats[t] for t in early if not 29 <= t < 61
    ]
    assert all(before.nats[target] != after.nats[target] for target in late[:20])
    tokens = TOKENS.copy()
    tokens[65] += 1  # in a short one
    _, after = run(open_text(tmp_path / "late", tokens), config)
    assert [before.nats[target] for target in early] == [after.nats[target] for target in early]


def test_sgd_on_a_document_that_is_not_scored_is_stopped(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Scorer.settle
    monkeypatch.setattr(Scorer, "settle", lambda self, spans: honest(self, spans[:-1]))
    with pytest.raises(RuleError, match="before every loss there was recorded"):
        run(dataset, settings(ttt_phases=1))


@pytest.mark.parametrize("kind", ["documents", "chunks"])
def test_nothing_is_compiled_after_priming(dataset: Dataset, kind: str) -> None:
    torch._dynamo.reset()
    config = settings(ttt=kind, ttt_chunk_tokens=32, ttt_lora_warm_start=True)
    if kind == "documents":
        learning = {"ttt_phases": 1, "ttt_asym_logit": True, "ttt_doc_lengths": 1}
        config = config.model_copy(update=learning)
    eager, it = (subject(dataset, model=small_gpt(**UNTIED)) for _ in range(2))
    compiled = torch.compile(it.model, fullgraph=True, dynamic=False, backend="eager")
    it = dataclasses.replace(it, forward=compiled)
    prime_score(it, config)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = counter["unique_graphs"]
    found = score(it, config)
    assert graphs > 1 and counter["unique_graphs"] == graphs
    assert found.val_loss == pytest.approx(score(eager, config).val_loss, rel=1e-5)


@pytest.mark.parametrize("shapes", ["fixed", "dynamic"])
def test_one_graph_can_serve_rows_of_every_length(
    shapes: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions: a second graph is for an eighth of the documents at the longest."""
    monkeypatch.setattr(document_training, "LENGTH_STEP", SIZE)
    torch._dynamo.reset()
    config = settings(ttt_doc_shapes=shapes, ttt_doc_batch=4, prequant=False)
    plain = settings(ttt_doc_batch=4)
    model = {**UNTIED, "document_attention": True, "max_doc_len": SEQ_LEN}
    eager, it = (subject(dataset, model=small_gpt(**model)) for _ in range(2))
    graphs: list[list[int]] = []
    lengths: set[int] = set()

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([x.size(1) for x in inputs if isinstance(x, Tensor) and x.dim() == 2])
        return graph.forward

    compiled = torch.compile(it.model, fullgraph=True, dynamic=False, backend=note)

    def forward(tokens: Tensor, targets: Tensor, **how: Any) -> Tensor:
        lengths.add(tokens.size(1))
        nats: Tensor = compiled(tokens, targets, **how)
        return nats

    it = dataclasses.replace(it, forward=forward)
    prime_score(it, config)
    primed = len(graphs)
    lengths.clear()
    found = score(it, config)
    assert len(graphs) == primed, "compiled after priming"
    assert found.val_loss == pytest.approx(score(eager, plain).val_loss, rel=1e-5)
    if shapes == "dynamic":
        assert primed == 2 and lengths == {4, 8, 12, 16}
    else:
        assert primed == 4 and lengths == {4, 8, 16}


def test_priming_changes_nothing_and_sees_no_validation_token(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(ttt_phases=2, ttt_asym_logit=True)
    it = subject(dataset, model=small_gpt(**UNTIED))
    monkeypatch.setattr(Dataset, "read_val", lambda self: pytest.fail("read"))
    shapes: list[tuple[Any, ...]] = []
    hook = it.model.register_forward_pre_hook(
        lambda _, arguments: shapes.append((*arguments[0].shape, torch.is_grad_enabled()))
    )
    DocumentPass.of(it, config).prime()
    primed = set(shapes)
    monkeypatch.undo()
    for before, after in zip(small_gpt(**UNTIED).parameters(), it.model.parameters(), strict=True):
        assert torch.equal(before, after) and after.grad is None and after.requires_grad
    shapes.clear()
    DocumentPass.of(it, config).run()
    hook.remove()
    assert set(shapes) <= primed


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"evaluate.stride": 64}, ["evaluate.stride", "evaluate.ttt_doc_chunk_tokens"]),
        ({"evaluate.ttt_doc_chunk_tokens": 2048}, ["evaluate.ttt_doc_chunk_tokens"]),
        ({"evaluate.ttt_asym_logit": True}, ["evaluate.ttt_asym_logit", "evaluate.ttt_phases"]),
        ({"evaluate.ttt_lora_targets": "q,up"}, ["evaluate.ttt_lora_targets", "'q,up'"]),
        ({"evaluate.ttt_lora_targets": "q,q"}, ["evaluate.ttt_lora_targets"]),
        ({"model.num_loops": 2}, ["evaluate.ttt_lora_rank", "model.num_loops"]),
        ({"model.rope_ntk_len": 512}, ["model.rope_ntk_len", "evaluate.seq_len"]),
    ],
)
def test_settings_that_exclude_each_other_are_named(
    overrides: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides({"evaluate.ttt": "documents", **overrides})
    for name in named:
        assert name in str(caught.value)
