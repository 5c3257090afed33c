"""Entropy coders whose decoders never produce much more than they were promised.

Each decoder is told the exact size that must come out and fails on less, on more, on bytes left
over and on broken input, so a few hostile bytes cannot fill the memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import brotli

from trainer.errors import ArtifactError

BROTLI_WINDOW_BITS = 24
"""The largest window that every brotli decoder accepts, 16 MiB."""


@dataclass(frozen=True)
class Codec:
    """A pair of inverse functions."""

    compress: Callable[[bytes, int], bytes]
    """(data, level) -> packed."""
    decompress: Callable[[bytes, int], bytes]
    """(packed, exact size of the data) -> data. Raises ArtifactError."""


def zlib_compress(data: bytes, level: int) -> bytes:
    return zlib.compress(data, level)


def zlib_decompress(packed: bytes, size: int) -> bytes:
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(packed, size + 1)  # one more than right: 0 would mean no bound
    except zlib.error as error:
        raise ArtifactError(f"a zlib stream is damaged ({error}); pack the model again") from None
    complete = decoder.eof and not decoder.unused_data
    return _exactly(data, size, complete, "zlib")


def brotli_compress(data: bytes, level: int) -> bytes:
    packed: bytes = brotli.compress(data, quality=level, lgwin=BROTLI_WINDOW_BITS)
    return packed


def brotli_decompress(packed: bytes, size: int) -> bytes:
    decoder = brotli.Decompressor()
    try:
        data = decoder.process(packed, output_buffer_limit=size + 1)
    except brotli.error as error:
        raise ArtifactError(f"a brotli stream is damaged ({error}); pack the model again") from None
    return _exactly(data, size, decoder.is_finished(), "brotli")


def _exactly(data: bytes, size: int, complete: bool, codec: str) -> bytes:
    if complete and len(data) == size:
        return data
    found = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
    raise ArtifactError(
        f"a {codec} stream holds {found} bytes or is cut short, where {size:,} were declared; "
        "pack the model again"
    )
