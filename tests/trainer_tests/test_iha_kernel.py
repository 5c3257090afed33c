"""The operator of interleaved heads against its formula written out in fp64: on CPU, its Triton
code in Triton's interpreter where there is one, both on a GPU; then as a part of the model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.architectures import BASE
from trainer.attention import select_backend
from trainer.config import ModelConfig, TrainConfig
from trainer.errors import BackendError, ConfigError
from trainer.kernels.choice import choose_kernel, kernel_fault
from trainer.kernels.iha import interleave, interleave_backward, interleave_op
from trainer.model.gpt import GPT
from trainer.model.iha import InterleavedHeads

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "grouped": {"num_kv_heads": 2, "iha_pseudo_heads": 3},
    "by token": {"iha_positions": "token", "iha_mask": "block", "iha_collapse": "all"},
    "norm last, with a gain": {"qk_norm": "after_rope", "qk_gain": "learned"},
}


def plain(x: Tensor, mix: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Head by head and pair by pair, x [B, T, N, D], mix [P N, N], tables [S, D / 2]."""
    num_rows, num_tokens, num_heads, width = x.shape
    count = len(mix) // num_heads
    z = torch.stack(
        [sum(mix[row, m] * x[:, :, m] for m in range(num_heads)) for row in range(len(mix))], 2
    ).view(num_rows, num_tokens * count, num_heads, width)
    if cos is None or sin is None:
        return z
    out = torch.zeros_like(z)
    for pair in range(width // 2):
        one, other = z[..., pair], z[..., pair + width // 2]
        c, s = cos[:, pair, None], sin[:, pair, None]
        out[..., pair] = one * c + other * s
        out[..., pair + width // 2] = other * c - one * s
    return out / torch.sqrt((out * out).mean(-1, keepdim=True) + EPS)


def inputs(
    num_rows: int, num_tokens: int, num_heads: int, width: int, count: int, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """x and the mix; cos and sin of every pseudo-token; fp64."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    leaves = [draw(num_rows, num_tokens, num_heads, width), draw(count * num_heads, num_heads)]
    places = torch.arange(num_tokens * count, dtype=torch.float64)
    angles = torch.outer(places, 100.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64))
    return leaves, [angles.cos(), angles.sin()]


def results(function: Callable[..., Tensor], leaves: list[Tensor], *tables: Tensor) -> list[Tensor]:
    """Output and gradients for a cotangent that differs from place to place."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *tables)
    cotangent = torch.linspace(-3, 5, out.numel(), dtype=torch.float64).cos().view(out.shape)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out))
    return [x.detach().cpu().double() for x in (out, *gradients)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm(), place


def called(x: Tensor, mix: Tensor, *tables: Tensor) -> Tensor:
    return interleave(x, mix, (tables[0], tables[1]) if tables else None)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 6, 2), (1, 4, 4, 8, 1), (3, 2, 2, 4, 3)])
def test_pseudo_heads_and_their_gradients(shape: tuple[int, ...], turns: bool) -> None:
    leaves, tables = inputs(*shape)
    tables = tables if turns else []
    want = results(plain, leaves, *tables)
    assert_close(results(called, leaves, *tables), want, 1e-12)
    single = [leaf.float() for leaf in leaves]
    assert_close(results(called, single, *(table.float() for table in tables)), want, 1e-5)


def test_a_head_of_zeros_becomes_zeros_with_the_slope_of_a_norm_at_zero() -> None:
    """As the published start has it: every pseudo-head but the first."""
    leaves, tables = inputs(2, 5, 3, 6, 2)
    leaves[1][3:] = 0
    got = results(called, leaves, *tables)
    assert_close(got, results(plain, leaves, *tables), 1e-12)
    assert got[0].view(2, 5, 2, 3, 6)[:, :, 1].eq(0).all() and got[2][3:].norm() > 100


def test_bfloat16_is_rounded_once_after_the_norm() -> None:
    leaves, tables = inputs(2, 50, 4, 16, 2)
    rounded = [leaf.bfloat16() for leaf in leaves]
    got = called(*rounded, *(table.float() for table in tables))
    want = plain(*(leaf.double() for leaf in rounded), *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16()) or (got != want.bfloat16()).float().mean() < 0.001


def test_operators_keep_the_contract_of_custom_operators() -> None:
    (x, mix), tables = inputs(2, 5, 3, 6, 2)
    d_out = torch.ones(2, 10, 3, 6, dtype=torch.float64)
    qkv = torch.cat([x, x, x], 2).requires_grad_()
    for extra in ([None, None], tables):
        torch.library.opcheck(
            interleave_op, (qkv[:, :, 3:6], mix.requires_grad_(), *extra),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor",
                        "test_aot_dispatch_static"),
        )  # fmt: skip
        torch.library.opcheck(
            interleave_backward, (d_out, x, mix.detach(), *extra),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def build(**settings: Any) -> GPT:
    torch.manual_seed(3)
    config = ModelConfig(**(BASE | {"iha": "interleaved"} | settings))
    model = GPT(config, select_backend("sdpa", "cpu", lambda line: None), 40).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def use(model: GPT, kernel: str) -> None:
    for module in model.modules():
        if isinstance(module, InterleavedHeads):
            module.kernel = kernel


def loss_and_gradients(model: Callable[..., Tensor], owner: GPT) -> list[Tensor]:
    owner.zero_grad()
    rows = torch.randint(2, 13, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in owner.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_trains_alike_with_the_kernel_and_without(name: str) -> None:
    model = build(**SETTINGS[name])
    expected = loss_and_gradients(model, model)
    use(model, "fused")
    got = loss_and_gradients(model, model)
    assert not all(map(torch.equal, got, expected))  # or the switch does nothing
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_the_kernel_is_part_of_one_compiled_graph() -> None:
    torch._dynamo.reset()
    model = build(num_layers=2)
    use(model, "fused")
    expected = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(loss_and_gradients(compiled, model), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_scores_come_from_the_plain_code() -> None:
    model = build()
    rows = torch.randint(2, 13, (2, 9))
    with torch.no_grad():
        expected = model(rows[:, :-1], rows[:, 1:], reduction="none")
        use(model, "fused")
        assert torch.equal(model(rows[:, :-1], rows[:, 1:], reduction="none"), expected)


def test_the_kernel_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(BackendError, match=r'runtime.iha_kernel = "fused": its kernels need a GPU'):
        choose_kernel("iha_kernel", "fused", "cpu", 8, lambda line: None)
    assert choose_kernel("iha_kernel", "auto", "cpu", 8, lambda line: None) == "compiled"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"model.iha_product": "weights"}, "set one of them"),
        ({"model.rope_dims": 16}, "model.rope_dims = 16 turns only a part"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], remedy: str
) -> None:
    wanted = {"model.iha": "interleaved", "runtime.iha_kernel": "fused"}
    assert TrainConfig().with_overrides(wanted).runtime.iha_kernel == "fused"
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides(wanted | settings)
    assert remedy in str(caught.value)


IN_INTERPRETER = """
import torch, triton, triton.language as tl

@triton.jit
def add_up(out, count: tl.constexpr):
    total = 0
    for number in tl.range(0, count, num_stages=2):
        total += number
    tl.store(out, total)

try:
    out = torch.zeros(1, dtype=torch.int64)
    add_up[(1,)](out, 4)
    assert out == 6
except Exception as error:
    print("SKIP", repr(error))
    raise SystemExit(0)

from tests.trainer_tests.test_iha_kernel import EPS, assert_close, inputs, plain, results
from trainer.kernels import iha_triton

class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mix, cos=None, sin=None):
        ctx.save_for_backward(x, mix, cos, sin)
        return iha_triton.forward(x, mix, cos, sin, EPS)

    @staticmethod
    def backward(ctx, d_out):
        return *iha_triton.backward(d_out, *ctx.saved_tensors, EPS), None, None

def called(x, mix, *tables):
    # a slice of a wider product, and a gradient whose heads lie apart, as attention leaves them
    beside = torch.cat([x, x, x], 2)[:, :, x.size(2) : 2 * x.size(2)]
    out = Kernel.apply(beside, mix, *tables)
    return out.transpose(1, 2).contiguous().transpose(1, 2)

iha_triton.FORWARD = iha_triton.FORWARD._replace(tokens=4)  # the last program has none to spare
iha_triton.BACKWARD = iha_triton.BACKWARD._replace(tokens=8)
for shape in ((2, 5, 14, 8, 2), (1, 3, 3, 40, 1), (2, 4, 6, 128, 3)):
    leaves, tables = inputs(*shape)
    for extra in ([], tables):
        want = results(plain, leaves, *extra)
        single = [leaf.float() for leaf in leaves]
        assert_close(results(called, single, *(t.float() for t in extra)), want, 1e-5)
rounded = [leaf.half() for leaf in leaves]  # the interpreter has no products in bfloat16
want = results(plain, [leaf.double() for leaf in rounded], *tables)
got = results(called, rounded, *(t.float() for t in tables))
assert got[0].half().double().equal(got[0])
assert_close(got, want, 0.003)
print("DONE")
"""


def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which PyTorch for CPU does not bring")
    script = tmp_path / "in_interpreter.py"
    script.write_text(IN_INTERPRETER)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"Triton's interpreter does not run here: {done.stdout}")
    assert done.stdout.strip() == "DONE", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("shape", [(2, 300, 14, 128, 2), (3, 64, 6, 64, 3), (1, 77, 2, 96, 1)])
def test_pseudo_heads_on_a_gpu(shape: tuple[int, ...], turns: bool, compiled: bool) -> None:
    fault = kernel_fault("cuda", 8)
    if fault is not None:
        pytest.skip(fault)
    torch._dynamo.reset()
    leaves, tables = inputs(*shape)
    rounded = [leaf.bfloat16() for leaf in leaves]
    tables = tables if turns else []
    want = results(plain, [leaf.double() for leaf in rounded], *tables)
    on_gpu = [leaf.cuda() for leaf in rounded]

    def sliced(x: Tensor, mix: Tensor, *tables: Tensor) -> Tensor:
        return called(torch.cat([x, x], 2)[:, :, x.size(2) :], mix, *tables)

    call = torch.compile(sliced, fullgraph=True, dynamic=False) if compiled else sliced
    assert_close(results(call, on_gpu, *(table.float().cuda() for table in tables)), want, 0.01)
