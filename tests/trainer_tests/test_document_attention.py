"""Attention within documents against one document at a time: backends, model, compiled graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.trainer_tests.architectures import BASE
from tests.trainer_tests.plain_attention import plain_attention
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from tests.trainer_tests.test_flash4 import stand_in
from trainer.attention import ATTENTION, Attend, Documents, flash4, select_backend
from trainer.attention.document_places import document_blocks, first_visible
from trainer.attention.documents import room_for_pieces
from trainer.attention.flex import attend_flex, document_block_mask
from trainer.attention.repeat import repeat_groups
from trainer.attention.varlen import attend_varlen
from trainer.config import ModelConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.model.gpt import GPT
from trainer.recipes import RECIPES
from trainer.report import NullReporter

__all__ = ["stand_in"]
BOS = 1


def silent(line: str) -> None:
    pass


def rows_of_documents(num_rows: int, num_tokens: int, share: float = 0.2, seed: int = 0) -> Tensor:
    """Tokens above BOS, and BOS at random places, at some row's start and not at another's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 13, (num_rows, num_tokens), generator=generator)
    tokens[torch.rand(num_rows, num_tokens, generator=generator) < share] = BOS
    tokens[0, 0] = BOS
    tokens[-1, 0] = 5
    return tokens


def spans(row: Tensor, max_len: int = 0) -> list[tuple[int, int]]:
    """First token and end of each piece of a row, found token by token."""
    starts = []
    for place, token in enumerate(row.tolist()):
        full = max_len and starts and place - starts[-1] == max_len
        if place == 0 or token == BOS or full:
            starts.append(place)
    return list(itertools.pairwise([*starts, len(row)]))


def one_at_a_time(
    tokens: Tensor, max_len: int, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    return torch.stack(
        [
            torch.cat(
                [
                    plain_attention(*(x[row, None, a:b] for x in (q, k, v)), window=window)[0]
                    for a, b in spans(tokens[row], max_len)
                ]
            )
            for row in range(len(tokens))
        ]
    )


def flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    starts_k: Tensor,
    max_len: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """Stands in for FlashAttention-2, which has no kernel for CPU."""
    assert starts is starts_k and max_len == max_k and window_size[1] == 0
    edges = starts.tolist()
    assert edges[0] == 0 and edges[-1] == len(q)
    window = None if window_size[0] < 0 else window_size[0]
    parts = [
        plain_attention(*(x[None, a:b] for x in (q, k, v)), window=window)[0]
        for a, b in itertools.pairwise(edges)
        if a < b and b - a <= max_len
    ]
    return torch.cat(parts)


def without_documents(attend: Attend, *inputs: Tensor, window: int | None) -> Tensor:
    """As the backend is called when the switch is off."""
    return attend(*inputs, window=window)


BACKENDS: dict[str, tuple[Attend, torch.dtype, float]] = {
    "sdpa": (select_backend("sdpa", "cpu", silent), torch.float64, 1e-10),
    "flex": (select_backend("flex", "cpu", silent), torch.float64, 1e-10),
    "repeat": (
        partial(repeat_groups, select_backend("sdpa", "cpu", silent)),
        torch.float64,
        1e-10,
    ),
    "varlen": (partial(attend_varlen, flash2), torch.float16, 2e-2),
    "flash4": (flash4.attend_flash4, torch.float16, 2e-2),
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("max_len", [0, 3])
@pytest.mark.parametrize("window", [None, 0, 2, 50])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_equals_one_document_at_a_time(name: str, window: int | None, max_len: int) -> None:
    attend, dtype, tolerance = BACKENDS[name]
    tokens = rows_of_documents(3, 13)
    documents = Documents(tokens, BOS, max_len)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(3, 13, heads, 4, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    ]
    cotangent = inputs.pop()
    results = []
    for call, cast in (
        (partial(attend, window=window, documents=documents), dtype),
        (partial(one_at_a_time, tokens, max_len, window), torch.float64),
    ):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(cast))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_varlen_without_documents_takes_each_row_for_one() -> None:
    inputs = [torch.randn(2, 5, heads, 4).half() for heads in (2, 1, 1)]
    got = attend_varlen(flash2, *inputs, window=2)
    want = plain_attention(*(x.double() for x in inputs), window=2)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("max_len", [0, 200])
@pytest.mark.parametrize("window", [None, 0, 40, 128, 300])
@pytest.mark.parametrize(("num_tokens", "share"), [(512, 0.004), (700, 0.02), (300, 0.0)])
def test_blocks_of_the_mask_are_those_of_the_library(
    num_tokens: int, share: float, window: int | None, max_len: int
) -> None:
    tokens = rows_of_documents(3, num_tokens, share)
    documents = Documents(tokens, BOS, max_len)
    ours = document_block_mask(documents, window)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return documents.mask(window)[batch, query, key]

    theirs = create_block_mask(visible, 3, None, num_tokens, num_tokens, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for number, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert torch.equal(_blocks(ours, number, indices), _blocks(theirs, number, indices))


def _blocks(mask: Any, number: str, indices: str) -> Tensor:
    count, order = getattr(mask, number), getattr(mask, indices)
    listed = torch.arange(order.size(-1)) < count[..., None]
    dense = torch.zeros(order.shape, dtype=torch.bool)
    return dense.scatter(-1, order.long(), listed)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_masks_made_in_one_compiled_graph_follow_the_documents() -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(2, 150, heads, 4, dtype=torch.float64) for heads in (2, 1, 1)]
    graphs = []

    def two_layers(tokens: Tensor, *inputs: Tensor) -> Tensor:
        documents = Documents(tokens, BOS)
        first = attend_flex(flex_attention, *inputs, window=40, documents=documents)
        return attend_flex(flex_attention, first, *inputs[1:], documents=documents)

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(two_layers, fullgraph=True, dynamic=False, backend=backend)
    for seed in (0, 1):
        tokens = rows_of_documents(2, 150, 0.05, seed)
        with torch.no_grad():
            first = one_at_a_time(tokens, 0, 40, *inputs)
            expected = one_at_a_time(tokens, 0, None, first, *inputs[1:])
            torch.testing.assert_close(compiled(tokens, *inputs), expected)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_masks_serve_rows_of_every_length_in_one_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def attend(tokens: Tensor, *inputs: Tensor) -> Tensor:
        return attend_flex(flex_attention, *inputs, documents=Documents(tokens, BOS, 200))

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=backend)
    for length in (256, 128, 384):
        tokens = rows_of_documents(2, length, 0.05, 0)
        inputs = [torch.randn(2, length, heads, 4, dtype=torch.float64) for heads in (2, 1, 1)]
        for tensor in (tokens, *inputs):
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.no_grad():
            expected = one_at_a_time(tokens, 200, None, *inputs)
            torch.testing.assert_close(compiled(tokens, *inputs), expected)
    assert len(graphs) <= 2  # rows longer than the longest piece, and the others


def test_more_pieces_than_room_give_nan_and_not_a_leak() -> None:
    tokens = torch.full((1, 600), BOS)
    assert room_for_pieces(1, 600, 600) == 257
    assert torch.isnan(Documents(tokens, BOS).pieces().guard)
    tokens[:, 256:] = 2
    bounds, max_len, guard = Documents(tokens, BOS).pieces()
    assert guard == 1 and max_len == 600 and len(bounds) == 258
    assert bounds.tolist() == [*range(256), 600, 600]
    tokens[:, 300] = BOS
    assert Documents(tokens, BOS).pieces().guard == 1
    tokens[:, 400] = BOS
    assert torch.isnan(Documents(tokens, BOS).pieces().guard)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut": {"max_doc_len": 3},
    "windows_and_xsa": {
        "window": 2,
        "window_layers": "1,2",
        "xsa_last_n": 2,
        "gqa": "repeat",
        "value_residual": "learned",
        "rope_dims": 4,
    },
    "neighbours": {
        "smear": "channel",
        "bigram_buckets": 9,
        "value_embed_dim": 4,
        "value_embed_layers": "1",
    },
    "differential_full": {"diff_attention": "full"},
    "differential_split": {"diff_attention": "split"},
    "loops": {"num_loops": 2},
}


def build(attention: str = "sdpa", **switches: Any) -> GPT:
    """fp64 and every parameter random: zeros would hide mistakes."""
    torch.manual_seed(3)
    config = ModelConfig(**(BASE | switches))
    model = GPT(config, select_backend(attention, "cpu", silent), 20).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_one_document_at_a_time(name: str, attention: str) -> None:
    switches = MODELS[name]
    max_len = switches.get("max_doc_len", 0)
    apart = build(attention, document_attention=True, **switches)
    alone = build("sdpa", **{key: switches[key] for key in switches if key != "max_doc_len"})
    rows = rows_of_documents(2, 12)
    rows[:, 0] = BOS  # a row that begins inside a document has a bigram of its own there
    tokens, targets = rows[:, :-1], rows[:, 1:]
    losses = apart(tokens, targets, reduction="none")
    losses.sum().backward()
    expected = torch.zeros_like(losses)
    for row in range(2):
        for a, b in spans(tokens[row], max_len):
            loss = alone(tokens[row, None, a:b], targets[row, None, a:b], reduction="none")
            loss.sum().backward()
            expected[row, a:b] = loss.detach()[0]
    # Rotary tables are fp32, so other positions round otherwise, whatever the model computes in.
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-6, atol=1e-6)
    want = gradients(alone)
    assert gradients(apart).keys() == want.keys()
    for parameter, gradient in gradients(apart).items():
        scale = want[parameter].abs().max()
        assert (gradient - want[parameter]).abs().max() < 1e-5 * scale, parameter


@pytest.mark.parametrize("max_len", [0, 4])
def test_a_token_is_seen_by_what_follows_in_its_piece_and_by_nothing_else(max_len: int) -> None:
    model = build(document_attention=True, max_doc_len=max_len)
    tokens = rows_of_documents(2, 14)
    for place in range(14):
        if BOS in tokens[:, place]:
            continue
        changed = tokens.clone()
        changed[:, place] = tokens[:, place] % 11 + 2  # another token that begins no document
        with torch.no_grad():
            moved = (model.logits(tokens) - model.logits(changed)).abs().amax(-1)
        for row in range(2):
            end = next(b for a, b in spans(tokens[row], max_len) if a <= place < b)
            assert (moved[row, :place] == 0).all() and (moved[row, end:] == 0).all()
            assert (moved[row, place:end] > 1e-9).all()


def test_off_is_what_it_was_and_adds_no_parameter() -> None:
    off, on = build(), build(document_attention=True)
    assert list(off.state_dict()) == list(on.state_dict())
    tokens = torch.randint(2, 13, (2, 9))
    assert torch.equal(off.logits(tokens), on.logits(tokens)) or torch.allclose(
        off.logits(tokens), on.logits(tokens), rtol=1e-6
    )
    config = TrainConfig()
    assert not config.model.document_attention
    assert config.digest() == config.with_overrides({"model.document_attention": False}).digest()


def test_one_compiled_graph_serves_all_documents() -> None:
    torch._dynamo.reset()
    model = build(num_layers=2, document_attention=True, window=2, window_layers="1")
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for seed in (0, 1):
        rows = rows_of_documents(2, 11, seed=seed)
        model.zero_grad()
        loss = compiled(rows[:, :-1], rows[:, 1:])
        loss.backward()
        got = gradients(model)
        model.zero_grad()
        plain = model(rows[:, :-1], rows[:, 1:])
        plain.backward()
        torch.testing.assert_close(loss, plain)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(got[name], gradient)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_limit_without_documents_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.max_doc_len = 64 cuts nothing while model.doc"):
        TrainConfig().with_overrides({"model.max_doc_len": 64})


def test_a_whole_run_trains_calibrates_packs_and_scores(tmp_path: Path) -> None:
    tokens = np.empty(7_000, dtype=np.uint16)
    tokens[0] = BOS
    for place in range(1, len(tokens)):
        tokens[place] = 4 + (int(tokens[place - 1]) * 7 + 3) % (VOCAB_SIZE - 4)
    tokens[::50] = BOS
    folder = write_folder(tmp_path / "data", tokens[:5_000], tokens[5_000:])
    settings = {
        "model.vocab_size": VOCAB_SIZE,
        "model.num_layers": 2,
        "model.model_dim": 32,
        "model.document_attention": True,
        "model.max_doc_len": 20,
        "data.dir": str(folder),
        "data.seq_len": 64,
        "data.batch_tokens": 512,
        "data.micro_batch_tokens": 256,
        "evaluate.seq_len": 64,
        "evaluate.stride": 16,
        "quantize.method": "gptq",
        "quantize.calibration_tokens": 512,
        "schedule.progress": "steps",
        "budget.max_steps": 8,
        "budget.train_seconds": None,
    }
    result = train(RECIPES["tiny"].build().with_overrides(settings), NullReporter())
    assert result.val_loss is not None and result.val_loss < 0.95 * np.log(VOCAB_SIZE)
    assert result.val_bpb == pytest.approx(result.val_bpb_prequant, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("max_len", [0, 150])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", [*ATTENTION, "auto"])
def test_backend_on_a_gpu(name: str, window: int | None, max_len: int, compiled: bool) -> None:
    fault = None if name == "auto" else ATTENTION[name].fault("cuda")
    if fault is not None:
        pytest.skip(fault)
    torch._dynamo.reset()
    tokens = rows_of_documents(3, 500, 0.01).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    *inputs, cotangent = (
        torch.randn(3, 500, heads, 64, device="cuda", generator=generator).bfloat16()
        for heads in (4, 2, 2, 4)
    )
    attend = select_backend(name, "cuda", silent, documents=True)

    def call(tokens: Tensor, *leaves: Tensor) -> Tensor:
        return attend(*leaves, window=window, documents=Documents(tokens, BOS, max_len))

    def dense(tokens: Tensor, *leaves: Tensor) -> Tensor:
        documents = Documents(tokens, BOS, max_len)
        return BACKENDS["flex"][0](*leaves, window=window, documents=documents)

    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)
    results = []
    for function, cast in ((call, torch.bfloat16), (dense, torch.float32)):
        leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
        out = function(tokens, *leaves)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(cast))])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*ATTENTION, "auto"])
def test_compiled_model_without_gradients_on_a_gpu(name: str) -> None:
    """PyTorch 2.11 could not compile this with FlexAttention while the graph itself computed where
    documents begin."""
    fault = None if name == "auto" else ATTENTION[name].fault("cuda")
    if fault is not None:
        pytest.skip(fault)
    torch._dynamo.reset()
    shape = {"num_layers": 2, "model_dim": 256, "document_attention": True, "max_doc_len": 100}
    model = GPT(
        ModelConfig(**(BASE | shape)), select_backend(name, "cuda", silent, documents=True)
    ).cuda()
    model.compute_dtype = torch.bfloat16
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tokens = rows_of_documents(3, 500, 0.01).cuda()
    with torch.no_grad():
        want = model.logits(tokens).float()
        got = torch.compile(model.logits, fullgraph=True, dynamic=False)(tokens).float()
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize(("max_len", "window"), [(0, None), (7, 20)])
def test_operators_of_document_places_keep_their_contract(max_len: int, window: int | None) -> None:
    tokens, checks = rows_of_documents(3, 300), ("test_schema", "test_faketensor")
    torch.library.opcheck(first_visible, (tokens, BOS, max_len), test_utils=checks)
    first_BT = first_visible(tokens, BOS, max_len)
    torch.library.opcheck(document_blocks, (first_BT, window), test_utils=checks)
