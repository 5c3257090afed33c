"""Interleaved head attention: what it begins as, what it must not see, what it costs, and what is
refused. The model with it is compared with the plain model in test_architecture."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.architectures import BASE
from tests.trainer_tests.plain_attention import plain_attention
from trainer.account import _keys_of_layer, count_parameters, parameter_table
from trainer.attention import select_backend
from trainer.attention.pseudo_tokens import build_by_token
from trainer.config import ModelConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.model.attention import Context
from trainer.model.gpt import GPT
from trainer.model.iha import FusedHeads, InterleavedHeads, interleaved, mixed_rows
from trainer.optim.rules import assign, param_rules

SDPA = select_backend("sdpa", "cpu", lambda line: None)
NO_OP = {
    "iha": "interleaved",
    "iha_init": "replicated",
    "iha_positions": "token",
    "iha_mask": "block",
    "iha_windows": "tokens",
}
WINDOWS = {"window": 4, "window_layers": "SSL"}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{positions}-{mask}-{windows}-{collapse}": {
        "iha": "interleaved",
        "iha_positions": positions,
        "iha_mask": mask,
        "iha_windows": windows,
        "iha_collapse": collapse,
    }
    for positions in ("pseudo", "token")
    for mask in ("causal", "block")
    for windows in ("flops", "tokens")
    for collapse in ("own", "all")
} | {
    "qkv": {"iha": "fused"},
    "qkvo": {"iha": "fused", "iha_fused": "qkvo"},
    "weights": {"iha": "interleaved", "iha_product": "weights"},
    "paper": {"iha": "interleaved", "iha_layers": "short", "iha_collapse": "all"},
}


def build(dtype: torch.dtype, **settings: Any) -> GPT:
    """A model as it begins, but with an output projection that is not zero: with zeros attention
    would add nothing, whatever it is."""
    torch.manual_seed(3)
    model = GPT(ModelConfig(**(BASE | WINDOWS | settings)), SDPA, 40).to(dtype)
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for block in model.blocks:
            for weight in (block.attn.out.weight, block.mlp.down.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype) / 8)
    return model


def tokens_of(num_tokens: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, BASE["vocab_size"], (2, num_tokens), generator=generator)


def randomize(model: GPT) -> None:
    """Every parameter random, so that no zero and no identity hides a mistake."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)


# -- 1. fused heads


@pytest.mark.parametrize("kind", ["qkv", "qkvo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_identities_are_plain_attention_to_the_bit(dtype: torch.dtype, kind: str) -> None:
    tokens = tokens_of(12)
    results = []
    for settings in ({}, {"iha": "fused", "iha_fused": kind}):
        model = build(torch.float32, **settings)
        model.compute_dtype = dtype
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        shared = {n: p.grad for n, p in model.named_parameters() if ".iha." not in n}
        results.append((loss, shared))
    assert torch.equal(results[0][0], results[1][0])
    assert list(results[0][1]) == list(results[1][1])
    for name, gradient in results[0][1].items():
        if dtype == torch.float32:
            torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-8)


def test_mixed_matrices_project_as_the_mixed_heads_do() -> None:
    """W' x against sum_m M[h, m] (W_m x), forward and gradient, with an M that is not symmetric."""
    torch.manual_seed(0)
    mix, weight = (torch.randn(s, dtype=torch.float64) for s in ((3, 3), (12, 7)))
    x, cotangent = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (5, 12)))
    leaves = [mix.requires_grad_(), weight.requires_grad_()]
    got = x @ mixed_rows(mix, weight, torch.float64).T
    heads = [x @ weight[4 * m : 4 * m + 4].T for m in range(3)]
    want = torch.cat([sum(mix[h, m] * heads[m] for m in range(3)) for h in range(3)], -1)
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(got, leaves, cotangent),
        torch.autograd.grad(want, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# -- 2. interleaved heads


def test_pseudo_tokens_stand_side_by_side_in_memory_as_they_are_attended() -> None:
    torch.manual_seed(0)
    x, mix = (torch.randn(s, dtype=torch.float64) for s in ((2, 5, 3, 4), (3, 3, 2)))
    got = interleaved(x, mix)
    assert got.is_contiguous() and got.shape == (2, 10, 3, 4)
    for row, t, head, p in ((0, 0, 0, 0), (1, 4, 2, 1), (0, 3, 1, 0), (1, 2, 0, 1)):
        want = sum(mix[m, head, p] * x[row, t, m] for m in range(3))
        torch.testing.assert_close(got[row, 2 * t + p, head], want)


@pytest.mark.parametrize("collapse", ["own", "all"])
@pytest.mark.parametrize("positions", ["pseudo", "token"])
def test_one_pseudo_head_with_equal_windows_begins_as_plain_attention(
    positions: str, collapse: str
) -> None:
    switches = {"iha": "interleaved", "iha_pseudo_heads": 1, "iha_positions": positions}
    tokens = tokens_of(24)
    plain, one = build(torch.float64), build(torch.float64, **switches, iha_collapse=collapse)
    torch.testing.assert_close(one.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("collapse", ["own", "all"])
def test_the_no_op_start_is_plain_attention(count: int, collapse: str, groups: int) -> None:
    """Duplicated keys cancel in the softmax. With gradients: the start of training is plain, too,
    where a pseudo-head passes on its share of the gradient."""
    tokens = tokens_of(24)
    plain = build(torch.float64, num_kv_heads=groups)
    no_op = build(
        torch.float64,
        num_kv_heads=groups,
        **NO_OP,
        iha_pseudo_heads=count,
        iha_collapse=collapse,
    )
    torch.testing.assert_close(no_op.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-12)
    for model in (plain, no_op):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in plain.named_parameters():
        gradient = no_op.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "departure",
    [
        {"iha_init": "first"},
        {"iha_positions": "pseudo"},
        {"iha_mask": "causal"},
        {"iha_windows": "flops"},
    ],
)
def test_each_departure_from_the_no_op_start_departs(departure: dict[str, Any]) -> None:
    tokens = tokens_of(24)
    plain = build(torch.float64).logits(tokens)
    other = build(torch.float64, **(NO_OP | departure)).logits(tokens)
    assert (other - plain).abs().max() > 1e-4


def test_published_start_is_zero_but_for_the_first_pseudo_head() -> None:
    model = build(torch.float32, iha="interleaved", iha_pseudo_heads=3)
    mixes = model.blocks[1].attn.iha
    assert torch.equal(mixes.q[:, :, 0], torch.eye(4)) and not mixes.q[:, :, 1:].any()
    assert torch.equal(mixes.v[:, :, 0], torch.eye(2)) and not mixes.v[:, :, 1:].any()
    torch.testing.assert_close(mixes.collapse, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_sees_what_comes_after(variant: str) -> None:
    """Every place of a row in turn: bits before it stay, and its own change."""
    model = build(torch.float64, **VARIANTS[variant])
    randomize(model)
    tokens = tokens_of(11)
    with torch.no_grad():
        before = model.logits(tokens)
        for place in range(11):
            changed = tokens.clone()
            changed[:, place] = tokens[:, place] % 17 + 2
            moved = (model.logits(changed) - before).abs().amax((0, 2))
            assert (moved[:place] == 0).all(), place
            assert moved[place] > 1e-6 and (place > 9 or moved[place + 1] > 1e-9), place


@pytest.mark.parametrize(
    ("settings", "reach"),
    [
        ({"iha_windows": "tokens"}, 8),
        ({"iha_windows": "tokens", "iha_mask": "block"}, 8),
        ({"iha_windows": "flops"}, 2),
        ({"iha_windows": "flops", "iha_mask": "block"}, 2),
    ],
)
def test_a_window_reaches_as_far_as_it_says(settings: dict[str, Any], reach: int) -> None:
    """Of one layer, P = 2, a window of 8 tokens: 8 tokens back, or 8 / P^2 with as much work."""
    one_layer = {"num_layers": 2, "window": 8, "window_layers": "first_1"}
    model = build(torch.float64, iha="interleaved", **(one_layer | settings))
    randomize(model)
    attn = model.blocks[0].attn
    hidden = torch.randn(1, 14, BASE["model_dim"], dtype=torch.float64, requires_grad=True)
    context = _context(model, 14, hidden)
    out = attn(hidden, context)[0]
    gradient = torch.autograd.grad(out[0, -1].sum(), hidden)[0][0]
    seen = [13 - t for t in range(14) if gradient[t].abs().max() > 0]
    assert max(seen) == reach and len(seen) == reach + 1


def _context(model: GPT, num_tokens: int, hidden: Tensor) -> Context:
    cos, sin = model.rotary(num_tokens)
    cos_all, sin_all = model.rotary.of_pseudo_tokens(num_tokens)
    return Context(hidden, cos, sin, cos_SF=cos_all, sin_SF=sin_all)


@pytest.mark.parametrize("window", [None, 2])
def test_attention_by_token_against_a_loop(window: int | None) -> None:
    """Forward and gradient in fp64, with grouped queries."""
    torch.manual_seed(0)
    shapes = ((1, 12, 4, 6), (1, 12, 2, 6), (1, 12, 2, 6))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    cotangent = torch.randn(shapes[0], dtype=torch.float64)
    q, k, v = leaves
    rows = []
    for s in range(12):
        first = 0 if window is None else max(0, s // 3 - window)
        seen = slice(3 * first, 3 * (s // 3) + 3)
        heads = []
        for head in range(4):
            scores = k[0, seen, head // 2] @ q[0, s, head] / math.sqrt(6)
            heads.append(torch.softmax(scores, 0) @ v[0, seen, head // 2])
        rows.append(torch.stack(heads))
    want = torch.stack(rows)[None]
    got = build_by_token(3)(q, k, v, window=window)
    torch.testing.assert_close(got, want)
    pairs = [torch.autograd.grad(out, leaves, cotangent) for out in (got, want)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_by_single_tokens_is_causal_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        build_by_token(1)(q, k, v, window=3), plain_attention(q, k, v, window=3)
    )


@pytest.mark.parametrize("variant", ["weights", "token-block-tokens-all"])
def test_compiles_as_one_graph_with_the_same_numbers(variant: str) -> None:
    torch._dynamo.reset()
    model = build(torch.float64, **VARIANTS[variant])
    randomize(model)
    tokens = tokens_of(9)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    """With every switch of #78 that this part has, at the size of a test."""
    torch.manual_seed(0)
    settings = WINDOWS | {"iha": "interleaved", "attn_gate": "sparse", "qk_norm": "after_rope"}
    model = GPT(ModelConfig(**(BASE | settings)), SDPA, 40)
    tokens = tokens_of(30)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert float(loss.detach()) == pytest.approx(math.log(BASE["vocab_size"]), abs=0.02)


# -- costs


def test_published_numbers_of_parameters() -> None:
    """slowrun 4a and 4b at H = 14: 588 of a block fused, 1,204 interleaved with P = 2."""
    shape = {"num_layers": 30, "model_dim": 1792, "num_heads": 14, "num_kv_heads": 14}
    plain = count_parameters(ModelConfig(**shape))
    fused = count_parameters(ModelConfig(**shape, iha="fused"))
    both = count_parameters(ModelConfig(**shape, iha="interleaved"))
    paper = count_parameters(ModelConfig(**shape, iha="interleaved", iha_collapse="all"))
    assert fused - plain == 30 * 588 and both - plain == 30 * 1204
    assert paper - plain == 30 * 4 * 14 * 14 * 2  # the paper's 4 H^2 P


@pytest.mark.parametrize(("count", "published"), [(1, 25_109), (2, 53_937), (4, 153_351)])
def test_keys_that_are_met_are_those_of_the_published_windows(count: int, published: int) -> None:
    """Keys that all pseudo-queries of a token meet on average, over 30 layers of SSSL at 2048."""
    shape = {"num_layers": 30, "model_dim": 1792, "num_heads": 14, "num_kv_heads": 14}
    windows = {"window": 1024, "window_layers": "SSSL"}
    model = ModelConfig(**shape, **windows, iha="interleaved", iha_pseudo_heads=count)
    met = sum(_keys_of_layer(model, layer, 2048) for layer in range(30))
    assert met == pytest.approx(published, abs=1)


def test_layers_of_each_choice() -> None:
    def layers(**settings: Any) -> list[int]:
        model = ModelConfig(num_layers=8, window=4, window_layers="SSSL", **settings)
        return [layer for layer in range(8) if model.iha_of(layer) != "off"]

    assert layers() == []
    assert layers(iha="fused") == list(range(8))
    assert layers(iha="interleaved", iha_layers="long") == [3, 7]
    assert layers(iha="interleaved", iha_layers="short") == [0, 1, 2, 4, 5, 6]
    assert layers(iha="interleaved", iha_layers="odd") == [1, 3, 5, 7]
    model = ModelConfig(num_layers=8, iha="interleaved", iha_layers="odd")
    kinds = [type(block.attn) for block in GPT(model, SDPA, 8).blocks]
    assert [kind is InterleavedHeads for kind in kinds] == [False, True] * 4
    assert FusedHeads not in kinds


def test_mixes_have_a_learning_rate_of_their_own_and_no_decay() -> None:
    config = TrainConfig().with_overrides(
        {"model.iha": "interleaved", "optim.iha_lr": 0.07, "optim.scalar_weight_decay": 0.5}
    )
    rules = assign(parameter_table(config.model), param_rules(config))
    mixes = [rule for name, rule in rules.items() if ".iha." in name]
    assert len(mixes) == 4 * 9
    assert {(rule.optimizer, rule.lr, rule.weight_decay) for rule in mixes} == {("adam", 0.07, 0.0)}


def test_norm_after_rope_differs_by_rounding_alone() -> None:
    tokens = tokens_of(12)
    logits = []
    for order in ("before_rope", "after_rope"):
        model = build(torch.float64, qk_norm=order)
        logits.append(model.logits(tokens))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
    assert not torch.equal(*logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"iha": "fused", "num_loops": 2}, r"model\.num_loops = 2 is not defined for model\.iha"),
        ({"iha": "interleaved", "diff_attention": "full"}, r"model\.diff_attention = 'full' is no"),
        ({"iha": "interleaved", "document_attention": True}, r"document_attention = true knows no"),
        ({"iha": "interleaved", "rope_ntk_len": 64}, r"rope_ntk_len = 64 stretches .*= token, or"),
        ({"iha": "fused", "iha_layers": "wide"}, r"iha_layers = 'wide': no such .* short or long"),
        ({"iha": "fused", "iha_layers": "short"}, r"has no layer in model\.iha_layers = 'short'"),
        (
            {"iha": "interleaved", "iha_pseudo_heads": 4, "window": 3, "window_layers": "S"},
            r"model\.window = 3 leaves no window .*set model\.iha_windows = tokens",
        ),
    ],
)
def test_settings_that_do_not_fit_name_their_path_and_the_remedy(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_overrides({f"model.{key}": value for key, value in overrides.items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.iha": "fused"}, r'quantize\.method = "gptq" .*model\.iha = "fused"'),
        (
            {"model.iha": "interleaved", "model.iha_product": "weights"},
            r"gptq.*set another quantize\.method, or model\.iha_product = heads",
        ),
    ],
)
def test_calibration_of_mixed_matrices_is_refused(settings: dict[str, Any], message: str) -> None:
    gptq = {"quantize.method": "gptq", "quantize.reserve_seconds": 5.0}
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_overrides(settings | gptq)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_mixing_weights_is_mixing_heads(count: int) -> None:
    """Forward and gradient, with random mixes that are not symmetric."""
    tokens = tokens_of(12)
    results = []
    for product in ("heads", "weights"):
        settings = {"iha_product": product, "iha_pseudo_heads": count, "iha_windows": "tokens"}
        model = build(torch.float64, iha="interleaved", **settings)
        randomize(model)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_mixes_run_when_nothing_or_only_the_input_learns() -> None:
    """Which of two factors learns decides how the library multiplies; never the result."""
    for mix_learns, x_learns in ((False, False), (True, False), (False, True)):
        x = torch.randn(2, 5, 3, 4, requires_grad=x_learns)
        mix = torch.randn(3, 3, 2, requires_grad=mix_learns)
        want = torch.einsum("mhp,btmd->btphd", mix, x).flatten(1, 2)
        torch.testing.assert_close(interleaved(x, mix), want)
