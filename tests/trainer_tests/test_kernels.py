"""Kernels against their formulas written out in fp64: the operators on CPU, the Triton code in
Triton's interpreter where there is one, both on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
from trainer.kernels import choice
from trainer.kernels import mlp as mlp_kernels
from trainer.kernels.choice import choose_kernel
from trainer.kernels.cross_entropy import (
    softcapped_ce,
    softcapped_ce_backward,
    softcapped_cross_entropy,
)
from trainer.kernels.mlp import fused_mlp, norm_linear
from trainer.model.gpt import GPT
from trainer.model.mlp import MLP

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps
VARIANTS = ("fused", "fused_saved", "fused_norm", "fused_norm_saved")


def plain_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float, norm_scale: float) -> Tensor:
    if norm_scale:
        x = plain_norm(x) * norm_scale
    hidden = x @ up.transpose(0, 1)
    leaky = torch.where(hidden > 0, hidden, slope * hidden)
    return (leaky * leaky) @ down.transpose(0, 1)


def plain_norm_linear(x: Tensor, weight: Tensor, norm_scale: float) -> Tensor:
    return (plain_norm(x) * norm_scale) @ weight.transpose(0, 1)


def plain_loss(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    capped = cap * torch.tanh(logits / cap)
    return torch.log(torch.exp(capped).sum(1)) - capped[torch.arange(len(targets)), targets]


def random(*shapes: Sequence[int], seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def compare(
    actual: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    tolerance: float,
    device: str = "cpu",
) -> None:
    """Outputs and gradients of both, for a cotangent that differs from place to place; relative
    norms of the differences."""
    results = []
    for function, cast, where in ((actual, dtype, device), (expected, torch.float64, "cpu")):
        leaves = [x.to(dtype).to(where, cast).requires_grad_() for x in inputs]
        out = function(*leaves)
        cotangent = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).cos().view(out.shape)
        gradients = torch.autograd.grad(out, leaves, cotangent.to(out))
        results.append([x.detach().cpu().double() for x in (out, *gradients)])
    for place, (got, want) in enumerate(zip(*results, strict=True)):
        assert (got - want).norm() <= tolerance * want.norm(), place


@pytest.mark.parametrize("norm_scale", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("keep_slope", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_mlp_and_its_gradients(slope: float, keep_slope: bool, norm_scale: float) -> None:
    actual = partial(fused_mlp, slope=slope, keep_slope=keep_slope, norm_scale=norm_scale)
    expected = partial(plain_mlp, slope=slope, norm_scale=norm_scale)
    inputs = random((2, 7, 6), (10, 6), (6, 10))
    compare(actual, expected, inputs, torch.float64, 1e-12)
    compare(actual, expected, inputs, torch.float32, 1e-5)


def test_norm_and_matrix_and_their_gradients() -> None:
    inputs = random((3, 5, 6), (9, 6), seed=1)
    for scale in (1.0, 0.3):
        actual = partial(norm_linear, norm_scale=scale)
        compare(actual, partial(plain_norm_linear, norm_scale=scale), inputs, torch.float64, 1e-12)
    tiny = [1e-5 * inputs[0], inputs[1]]  # mean square below EPS: r is no longer 1 / rms
    expected = partial(plain_norm_linear, norm_scale=1.0)
    compare(norm_linear, expected, tiny, torch.float64, 1e-10)


def test_cross_entropy_and_its_gradient() -> None:
    (logits,) = random((9, 13), seed=2, scale=20.0)
    targets = torch.randint(13, (9,), generator=torch.Generator().manual_seed(0))
    actual = partial(softcapped_cross_entropy, targets_N=targets, cap=15.0)
    expected = partial(plain_loss, targets=targets, cap=15.0)
    compare(actual, expected, [logits], torch.float64, 1e-12)
    compare(actual, expected, [logits], torch.float32, 1e-5)


def test_cross_entropy_computes_in_fp32_on_bfloat16() -> None:
    (logits,) = random((9, 13), seed=2, scale=20.0)
    targets = torch.arange(9)
    loss = softcapped_cross_entropy(logits.bfloat16(), targets, 15.0)
    assert loss.dtype == torch.float32
    want = plain_loss(logits.bfloat16().double(), targets, 15.0)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


def test_operators_keep_the_contract_of_custom_operators() -> None:
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    x, up, down = (x.float().requires_grad_() for x in random((4, 6), (8, 6), (6, 8)))
    for scale in (0.0, 1.0):
        torch.library.opcheck(
            mlp_kernels.mlp_op, (x, up, down, 0.5, True, scale), test_utils=checks
        )
    torch.library.opcheck(mlp_kernels.norm_linear_op, (x, up, 1.0), test_utils=checks)
    torch.library.opcheck(softcapped_ce, (x, torch.arange(4), 15.0), test_utils=checks)


def test_operators_of_the_backward_passes_keep_it_too() -> None:
    x, hidden, down = random((4, 6), (4, 8), (6, 8))
    for operator, inputs in (
        (mlp_kernels.inverse_rms, (x.bfloat16(),)),
        (mlp_kernels.mlp_d_pre, (x, down, hidden, 0.5, False)),
        (softcapped_ce_backward, (x[:, 0].contiguous(), x, torch.arange(4), x[:, 1], 15.0)),
    ):
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def build(**switches: Any) -> GPT:
    torch.manual_seed(3)
    config = ModelConfig(**(BASE | {"leaky_slope": 0.5, "ln_scale": True} | switches))
    model = GPT(config, select_backend("sdpa", "cpu", lambda line: None), 20).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def use(model: GPT, mlp_kernel: str, fuses_loss: bool) -> None:
    model.fuses_loss = fuses_loss
    for module in model.modules():
        if isinstance(module, MLP):
            module.kernel = mlp_kernel


def loss_and_gradients(model: Callable[..., Tensor], owner: GPT) -> list[Tensor]:
    owner.zero_grad()
    rows = torch.randint(2, 13, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(rows[:, :-1], rows[:, 1:], reduction="objective")
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in owner.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kernel", VARIANTS)
def test_a_model_trains_alike_with_kernels_and_without(kernel: str) -> None:
    model = build()
    expected = loss_and_gradients(model, model)
    use(model, kernel, fuses_loss=True)
    for got, want in zip(loss_and_gradients(model, model), expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_kernels_are_part_of_one_compiled_graph() -> None:
    torch._dynamo.reset()
    model = build(num_layers=2)
    use(model, "fused_norm_saved", fuses_loss=True)
    expected = loss_and_gradients(model, model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for got, want in zip(loss_and_gradients(compiled, model), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_scores_come_from_the_plain_code() -> None:
    model = build()
    rows = torch.randint(2, 13, (2, 9))
    with torch.no_grad():
        kinds = ("none", "objective")
        expected = [model(rows[:, :-1], rows[:, 1:], reduction=kind) for kind in kinds]
        use(model, "fused_norm", fuses_loss=True)
        for kind, want in zip(kinds, expected, strict=True):
            assert torch.equal(model(rows[:, :-1], rows[:, 1:], reduction=kind), want)


@pytest.mark.parametrize("setting", ["mlp_kernel", "loss_kernel"])
def test_a_kernel_asked_for_by_name_is_refused_with_the_remedy(setting: str) -> None:
    with pytest.raises(BackendError, match=rf'runtime.{setting} = "fused": its kernels need a GPU'):
        choose_kernel(setting, "fused", "cpu", 9, lambda line: None)


def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert choose_kernel("mlp_kernel", "auto", "cpu", 9, lines.append) == "compiled"
    assert lines == ["mlp_kernel: auto takes compiled, because its kernels need a GPU, and this "
                     "runs on cpu"]  # fmt: skip
    assert choose_kernel("mlp_kernel", "compiled", "cpu", 9, lines.append) == "compiled"
    assert len(lines) == 1
    monkeypatch.setattr(choice, "kernel_fault", lambda device_type, capability: None)
    monkeypatch.setitem(choice.MEASURED_BEST, "mlp_kernel", "fused_saved")
    assert choose_kernel("mlp_kernel", "auto", "cuda", 9, lines.append) == "fused_saved"
    assert choose_kernel("mlp_kernel", "fused", "cuda", 9, lines.append) == "fused"


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides(
            {
                "runtime.mlp_kernel": "fused",
                "model.num_loops": 2,
                "runtime.loss_kernel": "fused",
                "loss.kind": "mile",
            }
        )
    assert "model.num_loops = 2 times have; set runtime.mlp_kernel = compiled" in str(caught.value)
    assert 'loss.kind = "mile" needs; set runtime.loss_kernel = compiled' in str(caught.value)
    assert TrainConfig().runtime.mlp_kernel == TrainConfig().runtime.loss_kernel == "compiled"


IN_INTERPRETER = """
import torch, triton, triton.language as tl

@triton.jit
def add_up(out, count):
    total = 0
    for number in tl.range(tl.program_id(0), count, 2):
        total += number
    tl.store(out, total)

try:
    out = torch.zeros(1, dtype=torch.int64)
    add_up[(1,)](out, 5)
    assert out == 6
except Exception as error:
    print("SKIP", repr(error))
    raise SystemExit(0)

from trainer.kernels import cross_entropy, cross_entropy_triton, mlp, mlp_triton

def close(got, want, tolerance):
    assert got.shape == want.shape and (got - want).norm() <= tolerance * want.norm()

torch.manual_seed(0)
mlp_triton.TILE, mlp_triton.GROUP_M = (16, 32, 16), 2  # ragged in all three dimensions below
x, up, down, d_out = (torch.randn(s) for s in ((50, 24), (72, 24), (24, 72), (50, 24)))
scale = torch.rand(50)
close(mlp_triton.inverse_rms(x, mlp.EPS), (x.double()**2).mean(1)**-0.5, 1e-6)
for row_scale in (None, scale):
    pre = x.double() @ up.double().T * (1 if row_scale is None else row_scale[:, None])
    leaky = torch.where(pre > 0, pre, 0.3 * pre)
    slope = 2 * leaky * torch.where(pre > 0, 1, 0.3)
    for keep_slope in (False, True):
        out, kept = mlp_triton.up_and_activate(x, up, row_scale, 0.3, keep_slope)
        close(out, leaky**2, 1e-5)
        close(kept, slope if keep_slope else pre, 1e-5)
        d_pre = mlp_triton.d_pre(d_out, down, kept, 0.3, keep_slope)
        close(d_pre, d_out.double() @ down.double() * slope, 1e-5)
    product = mlp_triton.scaled_product(x, up, scale)
    close(product, x.double() @ up.double().T * scale[:, None], 1e-5)

cross_entropy_triton.LARGEST_BLOCK = 16  # several passes a row, the last one ragged
targets = torch.randint(45, (7,))
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
    logits = (40 * torch.randn(7, 45)).to(dtype)
    wide = logits.double().requires_grad_()
    capped = 30 * torch.tanh(wide / 30)
    want = capped.logsumexp(1) - capped[torch.arange(7), targets]
    loss, lse = cross_entropy_triton.forward(logits, targets, 30.0)
    close(loss, want.detach(), 1e-5)
    close(lse, capped.logsumexp(1).detach(), 1e-5)
    d_loss = torch.randn(7)
    (d_want,) = torch.autograd.grad(want, wide, d_loss.double())
    got = cross_entropy_triton.backward(d_loss, logits, targets, lse, 30.0)
    assert got.dtype == dtype
    close(got.double(), d_want, tolerance)
print("DONE")
"""


def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which PyTorch for CPU does not bring")
    script = tmp_path / "in_interpreter.py"  # a file: Triton reads the source of its kernels
    script.write_text(IN_INTERPRETER)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"Triton's interpreter does not run here: {done.stdout}")
    assert done.stdout.strip() == "DONE", done.stderr[-3000:]


def skip_where_kernels_cannot_run(capability: int) -> None:
    fault = choice.kernel_fault("cuda", capability)
    if fault is not None:
        pytest.skip(fault)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("norm_scale", [0.0, 0.4])
@pytest.mark.parametrize("keep_slope", [False, True])
@pytest.mark.parametrize("shape", [(1024, 512, 2048), (1000, 264, 712)])
def test_mlp_on_a_gpu(
    shape: tuple[int, int, int], keep_slope: bool, norm_scale: float, compiled: bool
) -> None:
    skip_where_kernels_cannot_run(9)
    torch._dynamo.reset()
    rows, width, hidden = shape
    inputs = random((rows, width), (hidden, width), (width, hidden))
    inputs = [inputs[0], inputs[1] / width**0.5, inputs[2] / hidden**0.5]
    call = partial(fused_mlp, slope=0.5, keep_slope=keep_slope, norm_scale=norm_scale)
    actual = torch.compile(call, fullgraph=True, dynamic=False) if compiled else call
    expected = partial(plain_mlp, slope=0.5, norm_scale=norm_scale)
    compare(actual, expected, inputs, torch.bfloat16, 0.015, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_norm_and_matrix_on_a_gpu() -> None:
    skip_where_kernels_cannot_run(9)
    inputs = random((1000, 264), (712, 264), seed=1)
    expected = partial(plain_norm_linear, norm_scale=0.3)
    compare(partial(norm_linear, norm_scale=0.3), expected, inputs, torch.bfloat16, 0.015, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vocab", [1000, 1024, 8192, 20001])
def test_cross_entropy_on_a_gpu(vocab: int, compiled: bool) -> None:
    skip_where_kernels_cannot_run(8)
    torch._dynamo.reset()
    (logits,) = random((300, vocab), seed=2, scale=20.0)
    targets = torch.randint(vocab, (300,), generator=torch.Generator().manual_seed(0))
    call = partial(softcapped_cross_entropy, cap=30.0)
    actual = torch.compile(call, fullgraph=True, dynamic=False) if compiled else call
    compare(
        lambda x: actual(x, targets.cuda()),
        partial(plain_loss, targets=targets, cap=30.0),
        [logits],
        torch.bfloat16,
        0.01,
        "cuda",
    )
