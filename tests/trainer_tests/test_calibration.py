"""Calibration: Hessians against inputs captured by ordinary hooks, and text that a model writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranks import run_ranks
from trainer.attention import select_backend
from trainer.config import ModelConfig, QuantizeConfig
from trainer.distributed import Group
from trainer.model.gpt import GPT
from trainer.model.norm import rms_norm
from trainer.quantize import coded_names
from trainer.quantize.calibration import collect_hessians, write_rows

CPU_GROUP = Group(torch.device("cpu"))
VOCAB_SIZE = 37
CODED = QuantizeConfig(keep_float_max_numel=0)


def _model(dtype: torch.dtype = torch.float32, tied: bool = True) -> GPT:
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        tie_embeddings=tied,
    )
    model = GPT(shape, select_backend("sdpa", "cpu", lambda line: None), max_seq_len=32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.compute_dtype = dtype
    return model


def _batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB_SIZE, (count, 3, 13), generator=generator)
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def _hessians_by_hooks(model: GPT, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean of x x^T in fp64, x caught on the way into modules and out of the final norm."""
    caught: dict[str, list[Tensor]] = {}

    def catch(*names: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name in names:
                caught.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

        return hook

    handles = []
    for index, block in enumerate(model.blocks):
        at = f"blocks.{index}"
        joined = [f"{at}.attn.{part}.weight" for part in ("q", "k", "v")]
        handles.append(block.attn.register_forward_pre_hook(catch(*joined)))
        handles.append(block.attn.out.register_forward_pre_hook(catch(f"{at}.attn.out.weight")))
        for part in ("up", "down"):
            module = getattr(block.mlp, part)
            handles.append(module.register_forward_pre_hook(catch(f"{at}.mlp.{part}.weight")))
    head = "tok_emb.weight" if model.config.tie_embeddings else "head.weight"
    with torch.no_grad():
        for tokens, targets in batches:
            model(tokens, targets)
            hidden = rms_norm(model._hidden(tokens)).double().flatten(0, -2)
            caught.setdefault(head, []).append(hidden)
            for handle_name in caught:  # _hidden ran the blocks a second time
                if handle_name != head:
                    caught[handle_name].pop()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for name, x in caught.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_are_those_of_the_real_inputs(dtype: torch.dtype, tied: bool) -> None:
    model, batches = _model(dtype, tied), _batches(4)
    names = coded_names(model.state_dict(), CODED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_hessians(model, names, batches, CPU_GROUP)
    expected = _hessians_by_hooks(model, batches)
    assert set(found) == set(expected) and set(found) <= set(names)
    for name, hessian in expected.items():
        np.testing.assert_allclose(found[name], hessian, rtol=1e-4, atol=1e-5 * hessian.max())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert type(model.get_parameter(name)) is nn.Parameter


class Visited(nn.Module):
    """A matrix that is used three times, once with a correction, once joined with another."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(5, 5))
        self.other = nn.Parameter(torch.randn(2, 5))
        self.down, self.up = torch.randn(5, 2), torch.randn(2, 5)
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        first = F.linear(x, self.shared)
        second = F.linear(first.tanh(), self.shared + self.down @ self.up)
        third = F.linear(second.tanh(), torch.cat((self.shared, self.other)).to(x.dtype))
        self.inputs.append((torch.cat((x, first.tanh(), second.tanh())), second.tanh()))
        return third


def test_all_visits_of_a_shared_matrix_add_up() -> None:
    torch.manual_seed(1)
    model = Visited()
    x = torch.randn(7, 5)
    found = collect_hessians(model, ["shared", "other"], [(x, x[:, 0])], CPU_GROUP)
    shared, other = (part.double() for part in model.inputs[0])
    # Means are over tokens that went in (35 numbers here), which scales all visits alike.
    np.testing.assert_allclose(found["shared"], shared.T @ shared / 35, rtol=1e-5)
    np.testing.assert_allclose(found["other"], other.T @ other / 35, rtol=1e-5)


def hessians_of_a_rank(group: Group) -> dict[str, np.ndarray]:
    model = _model()
    own = _batches(5)[group.rank :: group.size]  # unequal shares
    names = coded_names(model.state_dict(), CODED)
    found = collect_hessians(model, names, own, group)
    return {name: hessian.numpy() for name, hessian in found.items()}


def test_ranks_share_the_tokens_and_get_the_same_hessians() -> None:
    alone = hessians_of_a_rank(CPU_GROUP)
    first, second = run_ranks(hessians_of_a_rank, 2)
    for name, hessian in alone.items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], hessian, rtol=1e-4, atol=1e-6)


def test_a_model_writes_what_plain_sampling_draws() -> None:
    model = _model()
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(9, 4, generator=generator, dtype=torch.float64)
    rows = write_rows(model.logits, torch.ones(4, dtype=torch.int64), 9, 0.8, uniform)
    assert rows.shape == (4, 10)
    for row in range(4):
        tokens = [1]
        for position in range(9):
            with torch.no_grad():
                logits = model.logits(torch.tensor([tokens]))[0, -1].double().numpy() / 0.8
            share = np.exp(logits - logits.max())
            edges = np.cumsum(share / share.sum())
            tokens.append(int((edges <= float(uniform[position, row])).sum()))
        assert rows[row].tolist() == tokens
    assert len(set(map(tuple, rows.tolist()))) == 4
