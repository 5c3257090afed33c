"""The model against the same model written out in fp64, forward and backward."""

import math

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.plain_gpt import plain_logits, plain_loss
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model.gpt import GPT
from trainer.recipes import RECIPES

SMALL = ModelConfig(
    vocab_size=19,
    num_layers=5,
    model_dim=24,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=1.5,
    logit_softcap=2.0,  # low enough to bend these logits
    rope_base=50.0,
)
CASES = [
    SMALL,
    SMALL.model_copy(update={"tie_embeddings": False, "num_kv_heads": 4}),
    SMALL.model_copy(update={"num_layers": 1, "num_kv_heads": 1}),
]


def build(config: ModelConfig, attention: str = "sdpa", max_seq_len: int = 20) -> GPT:
    """A model whose every parameter is random: fresh zeros and ones would hide mistakes."""
    torch.manual_seed(3)
    model = GPT(config, select_backend(attention, "cpu", lambda line: None), max_seq_len)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def random_tokens(config: ModelConfig, num_tokens: int = 8) -> tuple[Tensor, Tensor]:
    rows = torch.randint(
        config.vocab_size, (2, num_tokens + 1), generator=torch.Generator().manual_seed(5)
    )
    return rows[:, :-1], rows[:, 1:]


def plain_weights(model: GPT) -> dict[str, Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "attention"),
    [(CASES[0], "sdpa"), (CASES[0], "flex"), (CASES[1], "sdpa"), (CASES[2], "sdpa")],
    ids=["tied", "flex", "untied", "one_layer"],
)
def test_loss_and_gradients_equal_the_plain_model(config: ModelConfig, attention: str) -> None:
    model = build(config, attention)
    tokens, targets = random_tokens(config)
    weights = plain_weights(model)
    expected = plain_loss(config, weights, tokens, targets)
    expected.mean().backward()
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.float64, 1e-6)):
        model.to(dtype).zero_grad()
        model.compute_dtype = dtype
        each = model(tokens, targets, reduction="none")
        mean = model(tokens, targets)
        mean.backward()
        torch.testing.assert_close(each.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        assert mean.item() == pytest.approx(expected.mean().item(), rel=tolerance)
        for name, parameter in model.named_parameters():
            want = weights[name].grad
            assert parameter.grad is not None and want is not None and want.abs().max() > 1e-4
            worst = (parameter.grad.double() - want).abs().max() / want.abs().max()
            assert worst < tolerance, name


def test_bfloat16_activations_give_fp32_gradients_near_the_exact_ones() -> None:
    model = build(SMALL)
    model.compute_dtype = torch.bfloat16
    tokens, targets = random_tokens(SMALL, num_tokens=13)
    weights = plain_weights(model)
    plain_loss(SMALL, weights, tokens, targets).mean().backward()
    assert model._hidden(tokens).dtype == torch.bfloat16
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        want = weights[name].grad
        assert want is not None
        error = (parameter.grad.double() - want).norm() / want.norm()
        assert 0 < error < 0.15, (name, float(error))


def test_logits_equal_the_plain_model_and_keep_within_the_softcap() -> None:
    model = build(SMALL)
    tokens, _ = random_tokens(SMALL)
    logits = model.logits(tokens)
    expected = plain_logits(SMALL, plain_weights(model), tokens)
    torch.testing.assert_close(logits.double(), expected, rtol=2e-4, atol=2e-4)
    assert 1.0 < float(logits.detach().abs().max()) < 2.0


@pytest.mark.parametrize("position", [0, 4, 7])
def test_a_token_changes_only_what_comes_after_it(position: int) -> None:
    model = build(SMALL)
    tokens, _ = random_tokens(SMALL)
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1) % SMALL.vocab_size
    with torch.no_grad():
        difference = (model.logits(tokens) - model.logits(changed)).abs().amax((0, 2))
    assert (difference[:position] == 0).all()
    assert (difference[position:] > 1e-5).all()


def test_compiles_as_one_graph_with_the_same_numbers() -> None:
    model = build(SMALL.model_copy(update={"num_layers": 3}))
    model.compute_dtype = torch.bfloat16
    tokens, targets = random_tokens(SMALL)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(tokens, targets)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=1e-3)
    with torch.no_grad():
        each = compiled(tokens, targets, reduction="none")
        torch.testing.assert_close(each.mean(), gradients[0][0], rtol=1e-3, atol=1e-3)


def test_rows_beyond_the_rotary_tables_are_refused_and_a_larger_table_changes_nothing() -> None:
    short, longer = build(SMALL, max_seq_len=12), build(SMALL, max_seq_len=13)
    tokens, _ = random_tokens(SMALL, num_tokens=13)
    with pytest.raises(ConfigError, match=r"rows of 13 tokens.*at most 12; lower data\.seq_len"):
        short.logits(tokens)
    torch.testing.assert_close(longer.logits(tokens)[:, :12], short.logits(tokens[:, :12]))


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_are_the_reference_s(tied: bool) -> None:
    config = RECIPES["tiny"].build().model.model_copy(update={"tie_embeddings": tied})
    torch.manual_seed(0)
    weights = GPT(config, select_backend("sdpa", "cpu", lambda line: None)).state_dict()
    embed_std = config.tied_embed_init_std if tied else 1.0
    assert float(weights["tok_emb.weight"].std()) == pytest.approx(embed_std, rel=0.03)
    for layer in range(config.num_layers):
        for name in ("attn.out", "mlp.down"):
            assert not weights[f"blocks.{layer}.{name}.weight"].any()
        for name in ("attn.q", "attn.k", "attn.v", "mlp.up"):
            weight = weights[f"blocks.{layer}.{name}.weight"]
            bound = 1 / math.sqrt(weight.size(1))
            assert 0.98 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (weights[f"blocks.{layer}.resid_mix"] == torch.tensor([[1.0], [0.0]])).all()
        assert (weights[f"blocks.{layer}.attn.q_gain"] == config.qk_gain_init).all()
    if not tied:
        assert not weights["head.weight"].any()


def test_same_seed_same_weights() -> None:
    first, second = (build(SMALL).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_small_updates_of_the_embedding_are_not_lost() -> None:
    # bf16 steps are 1/256 of a value: the published embedding loses an update of 1/1000.
    model = build(SMALL)
    model.compute_dtype = torch.bfloat16
    before = model.tok_emb.weight.detach().clone()
    with torch.no_grad():
        model.tok_emb.weight.mul_(1.001)
    torch.testing.assert_close(model.tok_emb.weight.detach(), before * 1.001, rtol=1e-6, atol=0)
