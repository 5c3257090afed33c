"""The arrays of an artifact, laid end to end in a few byte streams of one kind each, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from trainer.compress.grouping import ORDERS, Grouping, Place, arranged, near_rows_first, place
from trainer.compress.grouping import restored as restore_rows
from trainer.quantize import ArraySpec, QuantizedState, QuantizedTensor, scheme_named

Layouts = Mapping[str, Mapping[str, ArraySpec]]
"""Tensor name -> its arrays, by part."""


def gather(quantized: QuantizedState, grouping: Grouping) -> dict[str, bytes]:
    """Stream name -> the content of its arrays, tensor after tensor."""
    layouts = {
        name: scheme_named(t.scheme).layout(t.shape) for name, t in quantized.tensors.items()
    }
    parts: dict[str, list[bytes]] = {}
    for name, part, spec, where in _places(layouts, grouping):
        array = quantized.tensors[name].arrays[part]
        assert (array.dtype.str, array.shape) == (spec.dtype, spec.shape), "not as laid out"
        order_R = near_rows_first(array) if where.is_sorted else None
        if order_R is not None:
            parts.setdefault(ORDERS, []).append(order_R.tobytes())
        parts.setdefault(where.stream, []).append(arranged(array, where, order_R))
    return {stream: b"".join(arrays) for stream, arrays in parts.items()}


def stream_sizes(layouts: Layouts, grouping: Grouping) -> dict[str, int]:
    """Stream name -> bytes, in the order in which `gather` makes them."""
    sizes: dict[str, int] = {}
    for _, _, spec, where in _places(layouts, grouping):
        if where.is_sorted:
            sizes[ORDERS] = sizes.get(ORDERS, 0) + _order_bytes(spec)
        sizes[where.stream] = sizes.get(where.stream, 0) + spec.nbytes
    return sizes


def itemsize(stream: str) -> int:
    """Bytes of an element of a stream."""
    return np.dtype(stream.partition(".")[0]).itemsize


def scatter(
    schemes: Mapping[str, tuple[str, tuple[int, ...]]],
    layouts: Layouts,
    contents: Mapping[str, memoryview],
    grouping: Grouping,
) -> dict[str, QuantizedTensor]:
    """Cut the unpacked streams into arrays.

    Args:
        schemes: (scheme, shape) by tensor name.
        contents: of exactly the sizes that `stream_sizes` says.

    Raises: ArtifactError when an order of rows is none.
    """
    used = dict.fromkeys(contents, 0)

    def take(stream: str, num_bytes: int) -> memoryview:
        start = used[stream]
        used[stream] = start + num_bytes
        return contents[stream][start : used[stream]]

    arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in layouts}
    for name, part, spec, where in _places(layouts, grouping):
        order = bytes(take(ORDERS, _order_bytes(spec))) if where.is_sorted else b""
        flat = np.frombuffer(take(where.stream, spec.nbytes), np.dtype(spec.dtype))
        arrays[name][part] = restore_rows(flat, spec.shape, where, order)
    return {name: QuantizedTensor(*schemes[name], arrays[name]) for name in layouts}


def _places(layouts: Layouts, grouping: Grouping) -> Iterator[tuple[str, str, ArraySpec, Place]]:
    for name, layout in layouts.items():
        for part, spec in layout.items():
            yield name, part, spec, place(grouping, name, part, spec.dtype, spec.shape)


def _order_bytes(spec: ArraySpec) -> int:
    return 2 * spec.shape[0]
