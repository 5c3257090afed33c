"""The whole optimiser on a real model: Adam's part by hand, state, and that it learns."""

import pytest
import torch
from torch import Tensor

from trainer.attention import select_backend
from trainer.config import TrainConfig
from trainer.distributed import Group
from trainer.model.gpt import GPT
from trainer.optim import Optimizer, build_optimizer

CONFIG = TrainConfig().with_overrides(
    {
        "model.vocab_size": 23,
        "model.num_layers": 2,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "optim.adam_eps": 1e-3,  # large enough to matter
    }
)


def build(config: TrainConfig = CONFIG) -> tuple[GPT, Optimizer]:
    torch.manual_seed(1)
    model = GPT(config.model, select_backend("sdpa", "cpu", lambda line: None))
    return model, build_optimizer(model, config, Group(torch.device("cpu")))


def gradients(model: GPT, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def step(model: GPT, optimizer: Optimizer, seed: int, lr_mult: float = 1.0) -> None:
    for name, gradient in gradients(model, seed).items():
        model.get_parameter(name).grad = gradient
    optimizer.step(lr_mult, 0.9)
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "lr", "tied"),
    [
        ("tok_emb.weight", 0.05, True),
        ("tok_emb.weight", 0.6, False),
        ("head.weight", 0.008, False),
        ("skip_weights", 0.04, True),
        ("blocks.1.resid_mix", 0.04, True),
        ("blocks.0.attn.q_gain", 0.04, True),
    ],
)
def test_adam_s_part_equals_its_equations(name: str, lr: float, tied: bool) -> None:
    model, optimizer = build(CONFIG.with_overrides({"model.tie_embeddings": tied}))
    weight = model.get_parameter(name).detach().double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, lr_mult in enumerate((1.0, 0.5, 0.1), start=1):
        gradient = gradients(model, count)[name].double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        root = (second / (1 - 0.95**count)).sqrt() + 1e-3
        weight = weight - lr * lr_mult * (first / (1 - 0.9**count)) / root
        step(model, optimizer, count, lr_mult)
    torch.testing.assert_close(
        model.get_parameter(name).detach().double(), weight, rtol=1e-5, atol=1e-6
    )


def test_state_is_a_copy_that_undoes_steps() -> None:
    model, optimizer = build()
    for taken in (0, 2):  # before the first step and in the middle
        for seed in range(taken):
            step(model, optimizer, seed)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = optimizer.state_dict()
        runs = []
        for _ in range(2):
            step(model, optimizer, 10)
            step(model, optimizer, 11)
            runs.append([p.detach().clone() for p in model.parameters()])
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for got, want, start in zip(runs[1], runs[0], weights.values(), strict=True):
            assert torch.equal(got, want) and not torch.equal(got, start)


def test_zero_grad_drops_every_gradient() -> None:
    model, optimizer = build()
    step(model, optimizer, 0)
    assert all(p.grad is None for p in model.parameters())


def test_learns_a_repeating_sequence() -> None:
    model, optimizer = build()
    rows = (torch.arange(33) % 11).repeat(4, 1)
    for _ in range(40):
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()
    assert loss.item() < 0.1  # log(23) = 3.1 at first


def test_weight_decay_is_decoupled_and_grows_for_the_matrices_only() -> None:
    """On gradients of 0 a step only decays: by lr wd for Adam, by lr (wd + ramp) for Muon."""
    model, optimizer = build(
        CONFIG.with_overrides(
            {
                "optim.weight_decay": 0.5,
                "optim.scalar_weight_decay": 0.25,
                "optim.embed_weight_decay": 0.125,
                "optim.scalar_lr_late": 0.02,
                "optim.matrix_lr_late": 0.08,
            }
        )
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5, 0.9, extra_decay=0.3)
    rates = {
        "tok_emb.weight": 0.05 * 0.125,
        "skip_weights": 0.04 * 0.25,
        "blocks.0.attn.q_gain": 0.04 * 0.25,
        "blocks.1.attn.q_gain": 0.02 * 0.25,
        "blocks.0.mlp.up.weight": 0.04 * 0.8,
        "blocks.1.mlp.up.weight": 0.08 * 0.8,
    }
    for name, rate in rates.items():
        torch.testing.assert_close(
            model.get_parameter(name).detach(), before[name] * (1 - 0.5 * rate), rtol=1e-6, atol=0.0
        )
