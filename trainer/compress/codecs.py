"""Entropy coders whose decoders never produce much more than they were promised.

Each decoder is told the exact size that must come out and fails on less, on more, on bytes left
over and on broken input, so a few hostile bytes cannot fill the memory.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import brotli
import zstandard

from trainer.errors import ArtifactError

BROTLI_WINDOW_BITS = 24
"""The largest window that every brotli decoder accepts, 16 MiB."""
LZMA_OVERHEAD = 1 << 18
"""Bytes that an lzma decoder takes beside its output and its dictionary, at most."""
LZMA_DICTIONARY = (18, 20, 21, 22, 22, 23, 23, 24, 25, 26)
"""Bits of the dictionary of each level, as the library presets it."""


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


def lzma_compress(data: bytes, level: int) -> bytes:
    # A dictionary beyond the data changes nothing but the memory that both sides take.
    dictionary = min(1 << LZMA_DICTIONARY[level], max(1 << 12, len(data)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": dictionary}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)


def lzma_decompress(packed: bytes, size: int) -> bytes:
    # The header rounds the size of the dictionary up, by a third at most.
    dictionary = min(2 * max(1 << 12, size), 1 << LZMA_DICTIONARY[-1])
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=dictionary + LZMA_OVERHEAD)
    try:
        data = decoder.decompress(packed, size + 1)
    except lzma.LZMAError as error:
        if "limit" in str(error):  # a dictionary for more data than was declared
            raise wrong_size(size + 1, size, "lzma") from None
        raise ArtifactError(f"an lzma stream is damaged ({error}); pack the model again") from None
    complete = decoder.eof and not decoder.unused_data
    return _exactly(data, size, complete, "lzma")


def zstd_compress(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def zstd_decompress(packed: bytes, size: int) -> bytes:
    """One frame that announces its size. It is compared before memory is taken, and the decoder
    cannot write beyond it."""
    try:
        announced = zstandard.get_frame_parameters(packed).content_size
        if announced != size:
            raise wrong_size(min(announced, size + 1), size, "zstd")
        decoder = zstandard.ZstdDecompressor()
        data = decoder.decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"a zstd stream is damaged ({error}); pack the model again") from None
    return _exactly(data, size, True, "zstd")


def _exactly(data: bytes, size: int, complete: bool, codec: str) -> bytes:
    if complete and len(data) == size:
        return data
    raise wrong_size(len(data), size, codec)


def wrong_size(found: int, size: int, codec: str) -> ArtifactError:
    """`found`: bytes that came out, or any number above `size` where there were more."""
    words = f"more than {size:,}" if found > size else f"{found:,}"
    return ArtifactError(
        f"a {codec} stream holds {words} bytes or is cut short, where {size:,} were declared; "
        "pack the model again"
    )
