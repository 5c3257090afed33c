"""Times the attention of one layer, forward and backward, with each way of interleaving its heads.

    python -m benchmarks.iha_layer --out benchmarks/results/iha_layer.json

The shapes are those of slowrun #78 unless told otherwise: width 1792, 14 heads of 128, four rows of
2048 tokens, P = 2; a short layer (window 1024) and a long one, which has a value projection. Each
is one compiled graph from the normalised input to what attention adds, as in a whole model: without
the MLP, which is timed beside them. Then the parts by themselves, with the bytes that they cannot
do without, and how the kernel is best launched. What is printed and saved:

    ratio       over plain heads
    blocks      the same for 22 short and 8 long layers with their MLPs: nearly a step's ratio. The
                rest of a step (head, norms, optimiser) is alike in all, so a step's is lower. Block
                masks of windows count once, as a whole model has them.
    share       of the measured rate of a copy, for parts whose work is moving bytes

Medians, bf16, where there is a GPU: of calls recorded as CUDA graphs, because a step's kernels wait
for each other and not for Python; eager in fp32 elsewhere. The order is that of
importance: past --limit-s what is left is left out. What fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import median_seconds
from benchmarks.training import machine
from trainer.attention import select_backend
from trainer.attention.flex import block_mask_of as build_mask
from trainer.config import ModelConfig
from trainer.kernels.choice import kernel_fault
from trainer.kernels.iha import interleave
from trainer.model.attention import Context
from trainer.model.gpt import GPT
from trainer.model.iha import InterleavedHeads, _rows_of, interleaved
from trainer.model.rotary import rotary_tables, turned_then_normed
from trainer.recipes.slowrun_pr78 import slowrun_pr78

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"iha": "off"},
    "heads": {"iha": "interleaved"},
    "kernel": {"iha": "interleaved"},
    "weights": {"iha": "interleaved", "iha_product": "weights"},
    "fused": {"iha": "fused"},
}
"""Plain heads; pseudo-heads by mixing heads, by the kernel, by mixing weights; weight fusion."""
LAYERS = {"short": 2, "long": 3}
"""Of four, whose windows are SSSL and whose odd ones have a value projection."""
SHARES = {"short": 22, "long": 8}
"""Such layers among the published thirty."""
LAUNCHES = {
    "forward": [(4, 1, 1), (4, 1, 2), (4, 1, 3), (8, 1, 2), (4, 2, 2), (8, 4, 2), (2, 1, 1)],
    "backward": [(8, 1, 1), (8, 1, 2), (8, 1, 3), (4, 1, 2), (16, 1, 2), (8, 2, 2), (8, 4, 2)],
}
"""Tokens of a program, warps, stages: see trainer/kernels/iha_triton.py."""


CALLS = 4
"""That a graph holds."""


class Bench:
    """What is measured, where, and what has been so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.is_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.is_gpu else "cpu")
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.started = time.perf_counter()
        self.record: dict[str, Any] = {"command": sys.argv, **machine(), "ceilings": {}}
        self.record |= {"layers": {}, "parts": {}, "launches": {}, "blocks": {}, "seconds": 0.0}
        self.record["not_as_graph"] = []

    def entry(self, table: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One line of a table; a fault must not cost the others' figures, nor time the budget."""
        if time.perf_counter() - self.started > self.arguments.limit_s:
            row: dict[str, Any] = {"error": "left out: past --limit-s"}
        else:
            try:
                row = measure()
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        self.record[table][name] = row
        print(f"{table:9s} {name:28s} {_figures(row)}", flush=True)
        self.record["seconds"] = time.perf_counter() - self.started
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.out.write_text(json.dumps(self.record, indent=1) + "\n")
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Median of a call; on cuda of calls that a graph repeats."""
        if not self.is_gpu:
            return 1000 * median_seconds(call, self.arguments.repeats, self.device)
        try:
            repeat: Callable[[], Any] = _graph_of(call).replay
        except Exception as error:  # figures with Python's time in them are better than none
            self.record["not_as_graph"].append(f"{type(error).__name__}: {str(error)[:300]}")
            torch.cuda.synchronize()

            def repeat() -> None:
                for _ in range(CALLS):
                    call()

        return 1000 * median_seconds(repeat, self.arguments.repeats, self.device) / CALLS

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """As a model is run here."""
        torch.compiler.reset()  # every variant compiles anew, and the library bounds how often
        return torch.compile(call, fullgraph=True, dynamic=False) if self.is_gpu else call

    def random(self, *shape: int) -> Tensor:
        """Unit normal numbers that gradients are asked for."""
        made = torch.randn(*shape, device=self.device).to(self.dtype)
        return made.requires_grad_()


def _graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def main() -> None:
    """Measure and write after each figure."""
    bench = Bench(_arguments())
    bench.entry("ceilings", "copy", partial(_copy_rate, bench))
    bench.entry("ceilings", "product", partial(_product_rate, bench))
    for layer in LAYERS:
        for form in ("plain", "kernel", "heads"):
            bench.entry("layers", f"{layer} {form}", partial(_layer, bench, form, layer))
    bench.entry("layers", "mlp", partial(_mlp, bench))
    for form in ("plain", "heads"):
        bench.entry("parts", f"mask {form}", partial(_mask, bench, form))
    _blocks(bench)
    for name in ("turned", "value"):
        for form in ("kernel", "compiled"):
            bench.entry("parts", f"{name} {form}", partial(_part, bench, form, name == "turned"))
    for direction, launches in LAUNCHES.items():
        for launch in launches:
            bench.entry(
                "launches", f"{direction} {launch}", partial(_launch, bench, direction, launch)
            )
    for layer in LAYERS:
        bench.entry("layers", f"{layer} weights", partial(_layer, bench, "weights", layer))
    for form in ("plain", "heads"):
        for layer in LAYERS:
            bench.entry("parts", f"attend {layer} {form}", partial(_attend, bench, form, layer))
    bench.entry("layers", "short fused", partial(_layer, bench, "fused", "short"))
    _blocks(bench)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--pseudo-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--attention", default="auto", help="as runtime.attention")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=88.0)
    return parser.parse_args()


def _config(bench: Bench, form: str) -> ModelConfig:
    arguments = bench.arguments
    sizes = {
        "vocab_size": 64,
        "padded_vocab": 64,
        "bos_id": 1,
        "num_layers": 4,
        "window_layers": "SSSL",
        "model_dim": arguments.width,
        "num_heads": arguments.heads,
        "num_kv_heads": arguments.heads,
        "window": arguments.length // 2,
        "recur_visits": 1,
        "mtp_weight": 0.0,
    }
    whole = slowrun_pr78().model
    unset = {name: ModelConfig().model_dump()[name] for name in ("recur_first", "recur_last")}
    config = whole.model_dump() | sizes | unset | FORMS[form]
    if FORMS[form]["iha"] == "interleaved":
        config["iha_pseudo_heads"] = arguments.pseudo_heads
    return ModelConfig(**config)


def _model(bench: Bench, form: str) -> GPT:
    config = _config(bench, form)
    attend = select_backend(
        bench.arguments.attention, bench.device.type, lambda line: None, windowed=True
    )
    torch.manual_seed(0)
    with bench.device:
        model = GPT(config, attend, bench.arguments.length)
    for module in model.modules():
        if isinstance(module, InterleavedHeads):
            module.kernel = "fused" if form == "kernel" else "compiled"
    return model


def _layer(bench: Bench, form: str, layer: str) -> dict[str, Any]:
    model = _model(bench, form)
    attention = model.blocks[LAYERS[layer]].attn
    arguments = bench.arguments
    tables = model.rotary(arguments.length)
    of_pseudo = (None, None)
    if model.config.positions_per_token > 1:
        of_pseudo = model.rotary.of_pseudo_tokens(arguments.length)
    x, x0 = (bench.random(arguments.rows, arguments.length, arguments.width) for _ in range(2))

    def forward(x_BTC: Tensor, x0_BTC: Tensor) -> Tensor:
        context = Context(x0_BTC, *tables, cos_SF=of_pseudo[0], sin_SF=of_pseudo[1])
        added: Tensor = attention(x_BTC, context)[0]
        return added

    leaves = [x, x0, *attention.parameters()]
    row = _forward_and_both(bench, bench.compiled(forward), (x, x0), leaves)
    plain = bench.record["layers"].get(f"{layer} plain", row)
    row["ratio"] = row["both_ms"] / plain["both_ms"] if plain.get("both_ms") else None
    return row


def _mlp(bench: Bench) -> dict[str, Any]:
    arguments = bench.arguments
    mlp = _model(bench, "plain").blocks[0].mlp
    x = bench.random(arguments.rows, arguments.length, arguments.width)
    return _forward_and_both(bench, bench.compiled(mlp), (x,), [x, *mlp.parameters()])


def _forward_and_both(
    bench: Bench,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    leaves: list[Tensor],
) -> dict[str, Any]:
    cotangent = torch.randn_like(call(*inputs).detach())

    def both() -> None:
        torch.autograd.grad(call(*inputs), leaves, cotangent, allow_unused=True)

    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"both_ms": bench.milliseconds(both)}
    row["forward_ms"] = bench.milliseconds(partial(call, *inputs))
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if bench.is_gpu else None
    return row


def _blocks(bench: Bench) -> None:
    """Thirty blocks of each form that has been measured, over thirty plain ones."""
    rows = bench.record["layers"]
    totals: dict[str, float] = {}
    for form in FORMS:
        parts = [(rows.get(f"{layer} {form}", {}), share) for layer, share in SHARES.items()]
        if all(row.get("both_ms") for row, _ in parts) and rows["mlp"].get("both_ms"):
            mlp = sum(SHARES.values()) * rows["mlp"]["both_ms"]
            totals[form] = mlp + sum(share * row["both_ms"] for row, share in parts)
            mask = "plain" if form in ("plain", "fused") else "heads"
            mask_ms = bench.record["parts"][f"mask {mask}"].get("both_ms", 0.0)
            totals[form] -= (SHARES["short"] - 1) * mask_ms
    for form, total in totals.items():
        ratio = total / totals["plain"] if "plain" in totals else None
        bench.record["blocks"][form] = {"both_ms": total, "ratio": ratio}
        print(f"blocks    {form:28s} {_figures(bench.record['blocks'][form])}", flush=True)
    bench.arguments.out.write_text(json.dumps(bench.record, indent=1) + "\n")


def _part_inputs(bench: Bench, turns: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Queries as the projection leaves them, a slice of a wider tensor; the mix [H, H, P]; tables
    of pseudo-tokens."""
    arguments = bench.arguments
    heads, count = arguments.heads, arguments.pseudo_heads
    width = arguments.width // heads
    qkv = torch.randn(arguments.rows, arguments.length, 3 * heads, width, device=bench.device)
    x = qkv.to(bench.dtype)[:, :, heads : 2 * heads].detach().requires_grad_()
    mix = torch.randn(heads, heads, count, device=bench.device).requires_grad_()
    tables = rotary_tables(arguments.length * count, width, 10_000.0, bench.device)
    return x, mix, list(tables) if turns else []


def _by_kernel(x: Tensor, mix: Tensor, *tables: Tensor) -> Tensor:
    return interleave(x, _rows_of(mix), (tables[0], tables[1]) if tables else None)


def _by_plain_code(x: Tensor, mix: Tensor, *tables: Tensor) -> Tensor:
    mixed = interleaved(x, mix)
    return turned_then_normed(mixed, tables[0], tables[1]).to(x.dtype) if tables else mixed


def _part(bench: Bench, form: str, turns: bool) -> dict[str, Any]:
    x, mix, tables = _part_inputs(bench, turns)
    by_form = _by_kernel if form == "kernel" else _by_plain_code
    call = bench.compiled(by_form)
    row = _forward_and_both(bench, call, (x, mix, *tables), [x, mix])
    row["error_to_fp32"] = _error(by_form, x, mix, tables)
    count, unit = bench.arguments.pseudo_heads, x.numel() * x.element_size()
    row["forward_bytes"] = unit * (1 + count)
    row["both_bytes"] = unit * (1 + count) + unit * (2 + count)
    rate = bench.record["ceilings"]["copy"].get("bytes_per_s")
    for name in ("forward", "both"):
        taken = row[f"{name}_bytes"] / row[f"{name}_ms"] * 1000
        row[f"{name}_share"] = taken / rate if rate else None
    return row


def _error(call: Callable[..., Tensor], x: Tensor, mix: Tensor, tables: list[Tensor]) -> float:
    """Worst relative error of output and gradients against fp32, on one row."""
    results = []
    for by, dtype in ((call, x.dtype), (_by_plain_code, torch.float32)):
        leaves = [tensor.detach().to(x.dtype).to(dtype).requires_grad_() for tensor in (x[:1], mix)]
        out = by(*leaves, *tables)
        cotangent = torch.linspace(-3, 3, out.numel(), device=x.device).cos().view(out.shape)
        gradients = torch.autograd.grad(out, leaves, cotangent.to(x.dtype).to(out.dtype))
        results.append([tensor.detach().float() for tensor in (out, *gradients)])
    return max(float((got - want).norm() / want.norm()) for got, want in zip(*results, strict=True))


def _launch(bench: Bench, direction: str, launch: tuple[int, int, int]) -> dict[str, Any]:
    """Milliseconds of a kernel alone, for queries and for values."""
    fault = kernel_fault(bench.device.type, 8)
    if fault is not None:
        return {"error": fault}
    from trainer.kernels import iha_triton
    from trainer.kernels.iha import EPS

    chosen = iha_triton.FORWARD, iha_triton.BACKWARD
    row: dict[str, Any] = {}
    try:
        iha_triton.FORWARD = iha_triton.BACKWARD = iha_triton.Launch(*launch)
        for name, turns in (("turned", True), ("value", False)):
            x, mix, tables = (
                part if isinstance(part, list) else part.detach()
                for part in _part_inputs(bench, turns)
            )
            cos, sin = tables or (None, None)
            forward = partial(iha_triton.forward, x, _rows_of(mix), cos, sin, EPS)
            d_out = torch.randn_like(forward())
            backward = partial(iha_triton.backward, d_out, x, _rows_of(mix), cos, sin, EPS)
            call = forward if direction == "forward" else backward
            row[f"{name}_ms"] = bench.milliseconds(call)
    finally:
        iha_triton.FORWARD, iha_triton.BACKWARD = chosen
    return row


def _attend(bench: Bench, form: str, layer: str) -> dict[str, Any]:
    """Attention by itself, over the tokens or the pseudo-tokens of one layer."""
    arguments = bench.arguments
    attention = _model(bench, form).blocks[LAYERS[layer]].attn
    count = arguments.pseudo_heads if form == "heads" else 1
    shape = (arguments.rows, arguments.length * count, arguments.heads)
    leaves = [bench.random(*shape, arguments.width // arguments.heads) for _ in range(3)]

    def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        out_BTHD: Tensor = attention._attend(q_BTHD, k_BTGD, v_BTGD)
        return out_BTHD

    return _forward_and_both(bench, bench.compiled(attend), tuple(leaves), leaves)


def _mask(bench: Bench, form: str) -> dict[str, Any]:
    """Milliseconds of building the block mask of a short layer; 0 where none is built."""
    if not bench.is_gpu:
        return {"both_ms": 0.0}
    config = _config(bench, form)
    layer = LAYERS["short"]
    window = config.pseudo_window_of(layer) if form == "heads" else config.window_of(layer)
    count = bench.arguments.pseudo_heads if form == "heads" else 1

    def build() -> list[Tensor]:
        mask = build_mask(bench.arguments.length * count, window, bench.device, None)
        found = (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices)
        return [indices for indices in found if indices is not None]

    return {"both_ms": bench.milliseconds(bench.compiled(build))}


def _copy_rate(bench: Bench) -> dict[str, Any]:
    """Of tensors as large as a layer's pseudo-heads, and of large ones; both directions counted."""
    arguments = bench.arguments
    tokens = arguments.rows * arguments.length
    row: dict[str, Any] = {}
    large = 2**29 if bench.is_gpu else 2**16
    for name, size in (
        ("bytes_per_s", large),
        ("bytes_per_s_of_pseudo_heads", tokens * arguments.pseudo_heads * arguments.width),
    ):
        source = torch.randn(size, device=bench.device).to(bench.dtype)
        target = torch.empty_like(source)
        seconds = bench.milliseconds(partial(target.copy_, source)) / 1000
        row[name] = 2 * source.numel() * source.element_size() / seconds
    return row


def _product_rate(bench: Bench) -> dict[str, Any]:
    """Of a large product, and of the projection of q, k and v."""
    arguments = bench.arguments
    large = (8192, 8192, 8192) if bench.is_gpu else (128, 128, 128)
    own = (arguments.rows * arguments.length, arguments.width, 3 * arguments.width)
    row: dict[str, Any] = {}
    for name, (rows, inner, columns) in (
        ("flops_per_s", large),
        ("flops_per_s_of_projection", own),
    ):
        a, b = bench.random(rows, inner).detach(), bench.random(columns, inner).detach()
        seconds = bench.milliseconds(partial(torch.mm, a, b.T)) / 1000
        row[name] = 2.0 * rows * inner * columns / seconds
    return row


def _figures(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    figures = (f"{name} {value:.4g}" for name, value in row.items() if value is not None)
    return "  ".join(figures)


if __name__ == "__main__":
    main()
