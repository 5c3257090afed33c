"""The Triton kernels of trainer/kernels/mlp.py, for Hopper: one persistent product with epilogues.

As many programs as the GPU has processors walk over the tiles of the output, in groups of rows so
that neighbours share operands in the cache. Tiles arrive and leave through tensor descriptors
(TMA), which clip what lies beyond the matrices; strides must be multiples of 16 bytes. The epilogue
works on the fp32 accumulator in two halves, which halves the registers that it needs (#1530,
#1450).

Legend: M rows, N columns of the output, K summed over.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from trainer.errors import BackendError

TILE = (128, 256, 64)
"""M, N, K of a tile; #1530 has (256, 128, 64)."""
GROUP_M = 8
"""Rows of tiles that are walked together."""
NUM_WARPS = 8
STAGES = (4, 3, 2)
"""Depths of the pipeline, tried in turn until one fits into the processor's shared memory."""

FLATTEN = True
"""Let loads of a program's next tile begin while the present one is written."""

PLAIN = tl.constexpr(0)
"""The product times the row's scale."""
KEEP_INPUT = tl.constexpr(1)
KEEP_SLOPE = tl.constexpr(2)
FROM_INPUT = tl.constexpr(3)
"""Backward: the product times the slope, from the kept pre-activation."""
FROM_SLOPE = tl.constexpr(4)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, fp32."""
    num_rows, width = x.shape
    inverse = x.new_empty(num_rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _inverse_rms_kernel[(num_rows,)](x, inverse, x.stride(0), width, eps, BLOCK=block, num_warps=4)
    return inverse


def up_and_activate(
    x: Tensor, w_up: Tensor, row_scale: Tensor | None, slope: float, keep_slope: bool
) -> tuple[Tensor, Tensor]:
    """Activation and what is kept of it, both [M, N]."""
    mode = KEEP_SLOPE if keep_slope else KEEP_INPUT
    out, kept = (x.new_empty(x.size(0), w_up.size(0)) for _ in range(2))
    _product(x, w_up, out, kept, row_scale, slope, mode)
    return out, kept


def d_pre(d_out: Tensor, w_down: Tensor, kept: Tensor, slope: float, keep_slope: bool) -> Tensor:
    """(d_out w_down) times the activation's slope, [M, N]; w_down is [K, N]."""
    out = torch.empty_like(kept)
    _product(d_out, w_down, out, kept, None, slope, FROM_SLOPE if keep_slope else FROM_INPUT)
    return out


def scaled_product(x: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
    """x weight^T with every row times its scale, [M, N]."""
    out = x.new_empty(x.size(0), weight.size(0))
    _product(x, weight, out, out, row_scale, 0.0, PLAIN)
    return out


def _product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    kept: Tensor,
    row_scale: Tensor | None,
    slope: float,
    mode: tl.constexpr,
) -> None:
    """Write `out` and, forward, `kept`; b is [N, K] forward and [K, N] backward."""
    _check(a, b, out, kept)
    is_backward = mode.value >= FROM_INPUT.value
    tile_m, tile_n, tile_k = TILE
    half = [tile_m, tile_n // 2]
    descriptors = [
        TensorDescriptor.from_tensor(a, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(b, [tile_k, tile_n] if is_backward else [tile_n, tile_k]),
        TensorDescriptor.from_tensor(out, half),
        TensorDescriptor.from_tensor(kept, half),
    ]
    num_rows, num_columns = out.shape
    tiles = triton.cdiv(num_rows, tile_m) * triton.cdiv(num_columns, tile_n)
    programs = min(_num_processors(a.device), tiles)
    key = (mode.value, a.dtype, a.size(1), num_columns)
    for stages in STAGES[_shallower.get(key, 0) :]:
        try:
            _product_kernel[(programs,)](
                *descriptors,
                a if row_scale is None else row_scale,
                num_rows,
                num_columns,
                a.size(1),
                slope,
                TILE_M=tile_m,
                TILE_N=tile_n,
                TILE_K=tile_k,
                GROUP=GROUP_M,
                PROGRAMS=programs,
                MODE=mode.value,
                FLATTEN=FLATTEN,
                SCALED=row_scale is not None,
                num_stages=stages,
                num_warps=NUM_WARPS,
            )
            return
        except OutOfResources:
            if stages == STAGES[-1]:
                raise
            _shallower[key] = STAGES.index(stages) + 1


_shallower: dict[tuple[object, ...], int] = {}
"""Index of the first depth of STAGES that fits, by kind and shape."""


def _check(*matrices: Tensor) -> None:
    for matrix in matrices:
        if matrix.is_cuda and matrix.element_size() != 2:
            raise BackendError(
                f"runtime.mlp_kernel: tiles of {matrix.dtype} do not fit into the GPU; set "
                "runtime.dtype = bfloat16 or runtime.mlp_kernel = compiled"
            )
        bytes_per_row = matrix.stride(0) * matrix.element_size()
        if matrix.stride(1) != 1 or bytes_per_row % 16:
            raise BackendError(
                f"runtime.mlp_kernel: a matrix of {tuple(matrix.shape)} has rows of "
                f"{bytes_per_row} bytes, no multiple of 16; change model.model_dim or "
                "model.mlp_mult, or set runtime.mlp_kernel = compiled"
            )


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _inverse_rms_kernel(x_ptr, inverse_ptr, stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(inverse_ptr + row, tl.rsqrt(tl.sum(x * x, axis=0) / width + eps))


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down a group of rows first, then on to the next column."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    height = min(tiles_m - first, GROUP)
    return first + (tile % per_group) % height, (tile % per_group) // height


@triton.jit
def _product_kernel(
    a_desc, b_desc, out_desc, kept_desc, scale_ptr, M, N, K, slope,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, MODE: tl.constexpr, SCALED: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    finished = tl.program_id(0) - PROGRAMS
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = m * TILE_M, n * TILE_N
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(tl.cdiv(K, TILE_K)):
            a = a_desc.load([row, k * TILE_K])
            if MODE >= FROM_INPUT:
                total = tl.dot(a, b_desc.load([k * TILE_K, column]), total)
            else:
                total = tl.dot(a, b_desc.load([column, k * TILE_K]).T, total)
        # Counted anew, so that the epilogue does not hold on to what the loads of the tile used.
        finished += PROGRAMS
        m, n = _place(finished, tiles_m, tiles_n, GROUP)
        row, column = m * TILE_M, n * TILE_N
        if SCALED:
            rows = row + tl.arange(0, TILE_M)
            total *= tl.load(scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
        halves = tl.permute(tl.reshape(total, (TILE_M, 2, TILE_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _epilogue(left, out_desc, kept_desc, row, column, slope, MODE)
        _epilogue(right, out_desc, kept_desc, row, column + TILE_N // 2, slope, MODE)


@triton.jit
def _epilogue(total, out_desc, kept_desc, row, column, slope, MODE: tl.constexpr):
    if MODE == PLAIN:
        out_desc.store([row, column], total.to(out_desc.dtype))
    elif MODE == FROM_SLOPE:
        kept = kept_desc.load([row, column]).to(tl.float32)
        out_desc.store([row, column], (total * kept).to(out_desc.dtype))
    elif MODE == FROM_INPUT:
        kept = kept_desc.load([row, column]).to(tl.float32)
        total *= tl.where(kept > 0, 2 * kept, 2 * slope * slope * kept)
        out_desc.store([row, column], total.to(out_desc.dtype))
    else:
        leaky = tl.where(total > 0, total, slope * total)
        out_desc.store([row, column], (leaky * leaky).to(out_desc.dtype))
        if MODE == KEEP_SLOPE:
            total = tl.where(total > 0, 2 * total, 2 * slope * slope * total)
        kept_desc.store([row, column], total.to(kept_desc.dtype))
