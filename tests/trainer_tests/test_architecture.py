"""Every switch of the architecture against the plain model, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.plain_gpt import plain_loss
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.model.gpt import GPT

BASE: dict[str, Any] = {
    "vocab_size": 19,
    "num_layers": 5,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 1.5,
    "logit_softcap": 2.0,
    "rope_base": 50.0,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "leaky_slope": {"leaky_slope": 0.5},
    "ln_scale": {"ln_scale": True},
    "gated_skips": {"gated_skips": True},
    "gated_skips_even": {"gated_skips": True, "num_layers": 4},
    "resid_lambdas": {"resid_lambda_init": 1.05},
    "backout_early": {"backout_layer": 1},
    "backout_late": {"backout_layer": 3},
    "bigram": {"bigram_buckets": 11, "bigram_dim": 6},
    "bigram_unmasked": {"bigram_buckets": 11, "bigram_dim": 32, "mask_documents": False},
    "smear_channel": {"smear": "channel"},
    "smear_channel_unmasked": {"smear": "channel", "mask_documents": False},
    "smear_token": {"smear": "token", "smear_gate_dim": 7},
    "value_embed": {"value_embed_dim": 6, "value_embed_layers": "0,3"},
    "window_even": {"window": 2, "window_layers": "even"},
    "window_listed": {"window": 1, "window_layers": "1,3"},
    "xsa_some": {"xsa_last_n": 2},
    "xsa_all": {"xsa_last_n": 5, "num_kv_heads": 4},
    "rope_dims": {"rope_dims": 4},
    "rope_ntk": {"rope_dims": 6, "rope_ntk_len": 4},
    "rope_ntk_short_rows": {"rope_ntk_len": 8},
    "gqa_repeat": {"gqa": "repeat"},
    "value_residual_half": {"value_residual": "half"},
    "value_residual_gated": {"value_residual": "gated"},
    "value_residual_learned": {"value_residual": "learned"},
    "diff_full": {"diff_attention": "full"},
    "diff_split": {"diff_attention": "split", "window": 2, "window_layers": "odd"},
    "loops": {"num_loops": 2, "num_layers": 2},
    "loops_lora": {"num_loops": 2, "num_layers": 2, "lora_rank": 3, "leaky_slope": 0.3},
    "pr1212": {
        "num_layers": 6,
        "leaky_slope": 0.5,
        "ln_scale": True,
        "gated_skips": True,
        "resid_lambda_init": 1.05,
        "backout_layer": 3,
        "bigram_buckets": 11,
        "bigram_dim": 6,
        "smear": "channel",
        "value_embed_dim": 6,
        "value_embed_layers": "2,4,5",
        "window": 2,
        "window_layers": "even",
        "xsa_last_n": 4,
        "rope_dims": 4,
        "rope_ntk_len": 4,
    },
    "everything_else": {
        "smear": "token",
        "gqa": "repeat",
        "value_residual": "gated",
        "value_embed_dim": 6,
        "value_embed_layers": "even",
        "diff_attention": "full",
        "window": 3,
        "window_layers": "odd",
        "xsa_last_n": 3,
        "rope_dims": 2,
        "tie_embeddings": False,
        "matrix_init": "orthogonal",
        "layer_scale_init": 0.5,
    },
    "loops_with_the_rest": {
        "num_layers": 2,
        "num_loops": 2,
        "lora_rank": 2,
        "lora_init_std": 0.01,
        "ln_scale": True,
        "smear": "channel",
        "bigram_buckets": 9,
        "value_embed_dim": 4,
        "value_embed_layers": "last_1",
        "window": 2,
        "window_layers": "odd",
        "xsa_last_n": 1,
    },
}


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**(BASE | SWITCHES[name]))


def build(config: ModelConfig, attention: str = "sdpa") -> GPT:
    """A model in fp64 whose every parameter is random: fresh zeros and ones would hide mistakes."""
    torch.manual_seed(3)
    model = GPT(config, select_backend(attention, "cpu", lambda line: None), 20, {6}).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def tokens_with_documents(num_tokens: int = 6) -> Tensor:
    """[2, T + 1]; documents begin (token 1) inside the first row and at the start of the second."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(2, BASE["vocab_size"], (2, num_tokens + 1), generator=generator)
    rows[0, 3] = rows[1, 0] = 1
    return rows


def assert_equals_plain_model(config: ModelConfig, attention: str) -> None:
    model = build(config, attention)
    rows = tokens_with_documents()
    tokens, targets = rows[:, :-1], rows[:, 1:]
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    expected = plain_loss(config, weights, tokens, targets)
    expected.mean().backward()
    each = model(tokens, targets, reduction="none")
    torch.testing.assert_close(each.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    each.mean().backward()
    for name, parameter in model.named_parameters():
        want = weights[name].grad
        assert parameter.grad is not None and want is not None, name
        assert want.abs().max() > 1e-7, name
        worst = (parameter.grad - want).abs().max() / want.abs().max()
        assert worst < 1e-5, (name, float(worst))


@pytest.mark.parametrize("name", SWITCHES)
def test_loss_and_gradients_equal_the_plain_model(name: str) -> None:
    assert_equals_plain_model(config_of(name), "sdpa")


@pytest.mark.parametrize("name", ["pr1212", "everything_else"])
def test_windows_through_flex_equal_the_plain_model(name: str) -> None:
    assert_equals_plain_model(config_of(name), "flex")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_token_changes_only_what_comes_after_it(name: str) -> None:
    model = build(config_of(name))
    tokens = tokens_with_documents()[:, :-1]
    changed = tokens.clone()
    changed[:, 2] = tokens[:, 2] % 17 + 2  # another ordinary token
    with torch.no_grad():
        difference = (model.logits(tokens) - model.logits(changed)).abs().amax((0, 2))
    assert (difference[:2] == 0).all()
    assert difference[2] > 1e-6 and difference[-1] > 1e-9


@pytest.mark.parametrize("name", ["pr1212", "everything_else", "loops_with_the_rest"])
def test_compiles_as_one_graph_with_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    model = build(config_of(name))
    rows = tokens_with_documents()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(rows[:, :-1], rows[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_leaves_the_other_initial_weights_alone(name: str) -> None:
    """So that trials of a sweep with one seed differ in what is swept and in nothing else."""
    shapes = {"num_layers", "num_kv_heads", "tie_embeddings"}
    off = {key: value for key, value in SWITCHES[name].items() if key in shapes}
    starts = []
    for config in (ModelConfig(**(BASE | off)), config_of(name)):
        torch.manual_seed(0)
        starts.append(GPT(config, lambda q, k, v, *, window=None: q).state_dict())
    if "matrix_init" in SWITCHES[name] or "diff_attention" in SWITCHES[name]:
        assert torch.equal(starts[0]["tok_emb.weight"], starts[1]["tok_emb.weight"])
        return  # these draw the matrices otherwise
    matrices = {key for key in starts[0] if key.endswith(".weight")}
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in matrices)


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    switches = SWITCHES["pr1212"] | {"value_residual": "gated", "matrix_init": "orthogonal"}
    switches |= {"resid_lambda_init": 1.1**0.5, "value_embed_dim": 100, "bigram_dim": 8}
    weights = GPT(ModelConfig(**(BASE | switches)), lambda q, k, v, *, window=None: q).state_dict()
    constants = {
        "skip_gates": 0.0,
        "backout": 0.1,
        "bigram.table.weight": 0.0,
        "bigram.proj.weight": 0.0,
        "bigram.scale": 0.05,
        "channel_smear.gate": 0.0,
        "value_embed.proj.weight": 0.0,
        "value_embed.scale": 0.1,
        "blocks.2.attn.value_embed.scale": 1.0,
        "blocks.1.attn.value_residual.gate": -1.5,
        "blocks.0.resid_lambdas": 1.1**0.5,
    }
    for name, value in constants.items():
        torch.testing.assert_close(weights[name], torch.full_like(weights[name], value))
    assert float(weights["value_embed.table.weight"].std()) == pytest.approx(0.01, rel=0.05)
    k = weights["blocks.0.attn.k.weight"]
    torch.testing.assert_close(k @ k.T, torch.eye(len(k)), atol=1e-5, rtol=0)
    assert not weights["blocks.0.attn.out.weight"].any()


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_smear_and_bigrams_stop_at_document_starts(kind: str) -> None:
    """With the mask the first token of a document hears nothing of the last one of the document
    before; without it, as published, it does."""
    heard = []
    for masked in (True, False):
        switches = {"smear": kind, "bigram_buckets": 11, "mask_documents": masked}
        model = build(ModelConfig(**(BASE | switches)))
        tokens = tokens_with_documents()[:1, :-1]
        changed = tokens.clone()
        changed[0, 2] = tokens[0, 2] % 17 + 2
        with torch.no_grad():
            heard.append((model._embed(tokens) - model._embed(changed))[0, 3].abs().max())
    assert heard[0] == 0 < heard[1]


def test_rotary_base_follows_the_row_length_whether_or_not_it_was_announced() -> None:
    config = config_of("rope_ntk")
    tokens = tokens_with_documents(num_tokens=9)
    announced, found_late = build(config), build(config)
    torch.manual_seed(3)
    announced = GPT(config, announced.blocks[0].attn._attend, 20, {6, 10}).double()
    announced.compute_dtype = torch.float64
    announced.load_state_dict(found_late.state_dict())
    assert hasattr(announced.rotary, "cos_10") and not hasattr(found_late.rotary, "cos_10")
    torch.testing.assert_close(announced.logits(tokens), found_late.logits(tokens))
    shorter = announced.logits(tokens[:, :6])
    assert (announced.logits(tokens)[:, :6] - shorter).abs().max() > 1e-4
