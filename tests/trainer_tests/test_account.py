"""The arithmetic of the account against the real model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer_tests.architectures import SWITCHES, config_of
from trainer.account import count_parameters, flops_per_token, parameter_table
from trainer.attention import Attend, select_backend
from trainer.config import ModelConfig
from trainer.model.gpt import GPT
from trainer.recipes import RECIPES

CONFIGS = [
    RECIPES["tiny"].build().model,
    RECIPES["golf_baseline"].build().model,
    ModelConfig(num_layers=1, model_dim=48, num_heads=6, num_kv_heads=3, mlp_mult=1.3),
    ModelConfig(num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, tie_embeddings=False),
    *map(config_of, SWITCHES),
]
PR1212 = ModelConfig(
    num_layers=12,
    mlp_mult=3.0,
    leaky_slope=0.5,
    matrix_init="orthogonal",
    ln_scale=True,
    gated_skips=True,
    backout_layer=7,
    bigram_buckets=5120,
    bigram_dim=128,
    smear="channel",
    mask_documents=False,
    value_embed_dim=128,
    value_embed_layers="5,9,10",
    window=512,
    window_layers="even_but_first",
    xsa_last_n=7,
    rope_dims=16,
    rope_ntk_len=1024,
    qk_gain_init=2.5,
)


@pytest.mark.parametrize("config", CONFIGS)
def test_table_equals_the_real_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = GPT(config, select_backend("sdpa", "cpu", lambda line: None))
    real = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert list(parameter_table(config).items()) == list(real.items())
    assert set(model.state_dict()) == set(real)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_baseline_has_the_published_number_of_parameters() -> None:
    assert count_parameters(RECIPES["golf_baseline"].build().model) == 17_059_912


def test_pr1212_has_the_published_number_of_parameters() -> None:
    assert count_parameters(PR1212) == 29_751_910
    with_lambdas = PR1212.model_copy(update={"resid_lambda_init": 1.1**0.5})
    assert count_parameters(with_lambdas) == 29_751_910 + 2 * 12


def test_ten_layers_of_the_baseline_are_those_of_pr675() -> None:
    ten = RECIPES["golf_baseline"].build().model.model_copy(update={"num_layers": 10})
    block = 512 * (512 + 256 + 256 + 512) + 2 * 512 * 1024 + 4 * 512 + 8
    assert count_parameters(ten) == 1024 * 512 + 10 * block + 5 * 512 == 18_897_488


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]])
def test_matrix_operations_equal_what_torch_counts(config: ModelConfig) -> None:
    def no_products(q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None = None) -> Tensor:
        repeats = q.size(2) // k.size(2)
        return q + (k + v).repeat_interleave(repeats, dim=2)

    model = GPT(config, no_products)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    attention = flops_per_token(config, 16) - flops_per_token(config, -1)  # T + 1 = 0: none
    assert counter.get_total_flops() == 32 * (flops_per_token(config, 16) - attention)


def test_attention_operations_are_those_of_the_visible_keys() -> None:
    config = CONFIGS[0]
    num_tokens = 10
    pairs = sum(range(1, num_tokens + 1))  # (query, key), causal
    forward = config.num_layers * config.num_heads * pairs * 4 * config.head_dim
    attention = flops_per_token(config, num_tokens) - flops_per_token(config, -1)
    assert num_tokens * attention == 3 * forward


@pytest.mark.parametrize("name", SWITCHES)
def test_operations_of_a_step_equal_those_of_the_real_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products as torch counts them, attention by the keys that the backend was asked
    for."""
    num_tokens, attention = 7, 0

    def count_keys(q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None = None) -> Tensor:
        nonlocal attention
        num = q.size(1)  # more than num_tokens where heads interleave
        keys = [min(t, num if window is None else window) + 1 for t in range(num)]
        of_a_key = 2 * q.size(3) + 2 * v.size(3)
        times = 3 if torch.is_grad_enabled() else 1  # a pass without a gradient only goes forward
        attention += times * q.size(0) * q.size(2) * sum(keys) * of_a_key
        return q + (k + v).repeat_interleave(q.size(2) // k.size(2), dim=2)

    def count_blocks(per_token: int) -> Attend:
        def count(q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None = None) -> Tensor:
            nonlocal attention
            tokens = range(q.size(1) // per_token)
            keys = [min(t, len(tokens) if window is None else window) + 1 for t in tokens]
            attention += 3 * q.size(0) * q.size(2) * sum(keys) * per_token**2 * 4 * q.size(3)
            return q + (k + v).repeat_interleave(q.size(2) // k.size(2), dim=2)

        return count

    monkeypatch.setattr("trainer.model.iha.build_by_token", count_blocks)
    config = config_of(name)
    model = GPT(config, count_keys)
    tokens = torch.zeros(2, num_tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    expected = 2 * num_tokens * flops_per_token(config, num_tokens)
    expected += _operations_on_weights(config)
    assert counter.get_total_flops() + attention == pytest.approx(expected, rel=1e-12)


def _operations_on_weights(config: ModelConfig) -> int:
    """Matrices mix once in a step, not for each token: 2 D C forward, twice that backward, for each
    entry of a mix."""
    heads, groups = config.num_heads**2, config.num_kv_heads**2
    if config.iha == "fused":
        entries = heads * (2 if config.iha_fused == "qkvo" else 1) + 2 * groups
    elif config.iha_product == "weights":
        entries = config.iha_pseudo_heads * (heads + groups)
    else:
        return 0
    layers = [layer for layer in range(config.num_layers) if config.iha_of(layer) != "off"]
    return 6 * len(layers) * entries * config.head_dim * config.model_dim


def test_loads_without_torch() -> None:
    code = "import sys, trainer.account; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
