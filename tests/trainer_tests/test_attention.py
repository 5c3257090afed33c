"""Every attention backend of the table against attention written out in fp64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tests.trainer_tests.plain_attention import plain_attention
from trainer import attention
from trainer.attention import ATTENTION, Attend, attend_by_window, select_backend
from trainer.attention.flex import attend_flex
from trainer.attention.repeat import repeat_groups
from trainer.errors import BackendError

WINDOWS = [None, 0, 1, 4, 100]
ON_CPU = [name for name, backend in ATTENTION.items() if backend.fault("cpu") is None]


def silent(line: str) -> None:
    pass


def random_qkv(num_tokens: int, num_heads: int, num_groups: int, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + num_groups)
    shapes = [(2, num_tokens, heads, width) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def output_and_gradients(
    attend: Attend, inputs: list[Tensor], window: int | None, cotangent: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(leaves[0], leaves[1], leaves[2], window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def expected_results(inputs: list[Tensor], window: int | None, cotangent: Tensor) -> list[Tensor]:
    return output_and_gradients(plain_attention, inputs, window, cotangent)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("name", ON_CPU)
def test_backend_equals_plain_attention(name: str, num_groups: int, window: int | None) -> None:
    inputs = random_qkv(11, 4, num_groups)
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = expected_results(inputs, window, cotangent)
    attend = select_backend(name, "cpu", silent)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        cast = [x.to(dtype) for x in inputs]
        actual = output_and_gradients(attend, cast, window, cotangent)
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 0, 70, 128, 200])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_of_the_library_equal_plain_attention(window: int | None) -> None:
    # Longer than one mask block of 128. The library has no backward on cpu, hence no gradients.
    inputs = random_qkv(300, 2, 1)
    with torch.no_grad():
        actual = attend_flex(flex_attention, *inputs, window=window)
        expected = plain_attention(*inputs, window=window)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_is_part_of_one_compiled_graph() -> None:
    inputs = random_qkv(150, 2, 1)
    eager = partial(attend_flex, flex_attention)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(*inputs, window=40)
        torch.testing.assert_close(actual, plain_attention(*inputs, window=40))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
def test_repeated_groups_equal_plain_attention(num_groups: int, window: int | None) -> None:
    def without_groups(q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None = None) -> Tensor:
        assert q.shape == k.shape == v.shape
        return plain_attention(q, k, v, window=window)

    inputs = random_qkv(7, 4, num_groups)
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = expected_results(inputs, window, cotangent)
    actual = output_and_gradients(partial(repeat_groups, without_groups), inputs, window, cotangent)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("window", "asked"), [(None, "full"), (0, "windowed"), (5, "windowed")])
def test_windows_go_to_the_backend_for_windows(window: int | None, asked: str) -> None:
    calls = []

    def record(name: str, q: Tensor, k: Tensor, v: Tensor, /, *, window: int | None) -> Tensor:
        calls.append((name, window))
        return plain_attention(q, k, v, window=window)

    attend = partial(attend_by_window, partial(record, "full"), partial(record, "windowed"))
    inputs = random_qkv(9, 2, 1)
    expected = plain_attention(*inputs, window=window)
    torch.testing.assert_close(attend(*inputs, window=window), expected)
    assert calls == [(asked, window)]


def test_windows_change_nothing_of_what_auto_takes_on_cpu() -> None:
    lines: list[str] = []
    attend = select_backend("auto", "cpu", lines.append, windowed=True)
    assert attend is select_backend("sdpa", "cpu", silent) and len(lines) == 1


def test_documents_go_to_flex_where_it_skips_what_is_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    select_backend("auto", "cpu", lines.append, documents=True)
    assert lines == ["attention: auto takes sdpa on cpu"]
    monkeypatch.setitem(attention.AUTO_FOR_DOCUMENTS, "cpu", ("flash4", "flex"))
    lines.clear()
    select_backend("auto", "cpu", lines.append, documents=True)
    assert lines[0].startswith("attention: auto passes over flash4: it runs on cuda, not on cpu")
    assert lines[1] == "attention: auto takes flex on cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_auto_on_cuda_serves_windows_with_flex_and_says_so_once(window: int | None) -> None:
    torch._dynamo.reset()
    lines: list[str] = []
    attend = select_backend("auto", "cuda", lines.append, windowed=True)
    assert sum("auto takes flex for layers with a window" in line for line in lines) == 1
    inputs = [x.cuda() for x in random_qkv(384, 4, 2, width=64)]
    cotangent = torch.randn(inputs[0].shape, device="cuda", dtype=torch.float64)
    expected = expected_results([x.cpu() for x in inputs], window, cotangent.cpu())
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    cast = [x.bfloat16() for x in inputs]
    for got, want in zip(
        output_and_gradients(compiled, cast, window, cotangent), expected, strict=True
    ):
        assert (got.cpu().double() - want).norm() / want.norm() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 64, 100])
@pytest.mark.parametrize("name", ["auto", *ATTENTION])
def test_backend_on_cuda_in_bfloat16(name: str, window: int | None, compiled: bool) -> None:
    torch._dynamo.reset()
    inputs = [x.cuda() for x in random_qkv(384, 4, 2, width=64)]
    cotangent = torch.randn(inputs[0].shape, device="cuda", dtype=torch.float64)
    dense = select_backend("flex", "cpu", silent)  # checked against the loops above
    expected = output_and_gradients(dense, inputs, window, cotangent)
    fault = None if name == "auto" else ATTENTION[name].fault("cuda")
    if fault is not None:
        pytest.skip(fault)
    attend = select_backend(name, "cuda", silent)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, dynamic=False)
    cast = [x.bfloat16() for x in inputs]
    for got, want in zip(
        output_and_gradients(attend, cast, window, cotangent), expected, strict=True
    ):
        assert (got.double() - want).norm() / want.norm() < 0.01


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'flash9'.*choose one of auto, sdpa, flex"):
        select_backend("flash9", "cpu", silent)


def test_backend_that_cannot_run_here_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"not on mps; set runtime.attention = sdpa"):
        select_backend("flex", "mps", silent)


def test_auto_says_what_it_took() -> None:
    lines: list[str] = []
    select_backend("auto", "cpu", lines.append)
    assert any("auto takes sdpa on cpu" in line for line in lines)
