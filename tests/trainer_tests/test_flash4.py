"""FlashAttention-4 behind our operators. On CPU a stand-in with the library's two inner functions
takes its place: what is tested there is what we hand over and how gradients come back."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.plain_attention import plain_attention
from trainer.attention import ATTENTION, flash4, select_backend
from trainer.errors import BackendError


def silent(line: str) -> None:
    pass


def _pieces(x: Tensor, bounds: Tensor | None) -> list[Tensor]:
    """Rows of their own: of a batch, or cut from packed tokens."""
    if bounds is None:
        return [row[None] for row in x]
    edges = bounds.tolist()
    return [x[None, a:b] for a, b in itertools.pairwise(edges) if b > a]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    return_lse: bool,
    causal: bool,
    window_size_left: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor, None, None, None]:
    assert return_lse and causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    out = torch.cat(
        [
            plain_attention(*part, window=window_size_left)
            for part in zip(*(_pieces(x, cu_seqlens_q) for x in (q, k, v)), strict=True)
        ],
        dim=0 if cu_seqlens_q is None else 1,
    )
    shape = (q.size(0), q.size(2), q.size(1)) if cu_seqlens_q is None else q.shape[1::-1]
    return out.reshape(q.shape), torch.full(shape, 7.0), None, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    causal: bool,
    **options: Any,
) -> None:
    assert (lse == 7).all()

    def gradients() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        again = _forward(*leaves, return_lse=True, causal=causal, **options)[0]
        torch.testing.assert_close(again.detach(), out)
        return list(torch.autograd.grad(again, leaves, dout))

    # An operator's own thread has autograd switched off below it; another one has not.
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(gradients).result()
    for kept, gradient in zip((dq, dk, dv), made, strict=True):
        assert kept.is_contiguous()
        kept.copy_(gradient)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    monkeypatch.setattr(flash4, "_library", lambda: library)


def random_qkv(*leading: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """q, k, v as slices of one tensor, as the model's product gives them."""
    generator = torch.Generator().manual_seed(3)
    joint = torch.randn(*leading, 8, 8, generator=generator).to(dtype)
    return list(joint.split((4, 2, 2), dim=-2))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("window", "compiled"), [(None, False), (0, False), (3, False), (3, True)])
def test_rows_are_handed_over_and_gradients_come_back(window: int | None, compiled: bool) -> None:
    torch._dynamo.reset()
    inputs = random_qkv(2, 7)
    call = flash4.attend_flash4
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float16)
    results = []
    for attend, cast in ((call, torch.float16), (plain_attention, torch.float64)):
        leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
        out = attend(*leaves, window=window)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(cast))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("stand_in")
def test_the_operator_keeps_the_library_contract() -> None:
    q, k, v = (x.detach().requires_grad_() for x in random_qkv(9))
    bounds = torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash4.flash4, (q, k, v, bounds, 5, 2), test_utils=checks)
    torch.library.opcheck(
        flash4.flash4, (q[None], k[None], v[None], None, 0, -1), test_utils=checks
    )


def test_it_says_which_types_it_computes_in() -> None:
    q, k, v = random_qkv(1, 4, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"float32; set runtime.dtype = bfloat16"):
        flash4.attend_flash4(q, k, v)


def test_where_it_cannot_run_it_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"'flash4': it runs on cuda, not on cpu; set runtime"):
        select_backend("flash4", "cpu", silent)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> None:
        raise ModuleNotFoundError("No module named 'flash_attn'")

    monkeypatch.setattr(flash4, "_library", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "install flash-attn-4" in str(ATTENTION["flash4"].fault("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "compute capability 9.0, and this GPU has 8.0" in str(ATTENTION["flash4"].fault("cuda"))


def skip_where_it_cannot_run() -> None:
    fault = ATTENTION["flash4"].fault("cuda")
    if fault is not None:
        pytest.skip(fault)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 0, 100, 512])
@pytest.mark.parametrize("num_tokens", [384, 1000])
def test_rows_on_a_gpu(
    num_tokens: int, window: int | None, num_groups: int, compiled: bool
) -> None:
    skip_where_it_cannot_run()
    torch._dynamo.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (4, num_groups, num_groups, 4)
    *inputs, cotangent = (
        torch.randn(2, num_tokens, count, 64, device="cuda", generator=generator).bfloat16()
        for count in heads
    )
    dense = select_backend("flex", "cpu", silent)  # checked against loops in test_attention.py
    call = select_backend("flash4", "cuda", silent)
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)
    results = []
    for attend, cast in ((call, torch.bfloat16), (dense, torch.float32)):
        leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
        out = attend(*leaves, window=window)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(cast))])
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() / want.norm() < 0.01
