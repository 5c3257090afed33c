"""The arithmetic of the account against the real model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.account import count_parameters, flops_per_token, parameter_table
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.model.gpt import GPT
from trainer.recipes import RECIPES

CONFIGS = [
    RECIPES["tiny"].build().model,
    RECIPES["golf_baseline"].build().model,
    ModelConfig(num_layers=1, model_dim=48, num_heads=6, num_kv_heads=3, mlp_mult=1.3),
    ModelConfig(num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, tie_embeddings=False),
]


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


def test_loads_without_torch() -> None:
    code = "import sys, trainer.account; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
