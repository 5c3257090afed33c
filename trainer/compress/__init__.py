"""Bytes to fewer bytes and back; CODECS is the table a new entropy coder joins."""

from __future__ import annotations

from trainer.compress.byte_shuffle import shuffle, unshuffle
from trainer.compress.codecs import (
    Codec,
    brotli_compress,
    brotli_decompress,
    lzma_compress,
    lzma_decompress,
    zlib_compress,
    zlib_decompress,
    zstd_compress,
    zstd_decompress,
)
from trainer.compress.rans import RANS
from trainer.compress.rans_classes import RANS_CLASSES, expected_size
from trainer.config import CompressConfig

__all__ = ["CODECS", "Codec", "coded_size", "compress", "decompress"]

CODECS: dict[str, Codec] = {
    "zlib": Codec(zlib_compress, zlib_decompress),
    "brotli": Codec(brotli_compress, brotli_decompress),
    "lzma": Codec(lzma_compress, lzma_decompress),
    "zstd": Codec(zstd_compress, zstd_decompress),
    "rans": RANS,
    "rans_classes": RANS_CLASSES,
}


def compress(data: bytes, config: CompressConfig, itemsize: int = 1) -> bytes:
    """Pack `data`, a whole number of items of `itemsize` bytes each."""
    if config.byte_shuffle:
        data = shuffle(data, itemsize)
    return CODECS[config.codec].compress(data, config.level)


def coded_size(data: bytes, config: CompressConfig) -> float:
    """Bytes that codes would take alone, measured, or reckoned to a few parts in a thousand where
    the coder's entropy says it."""
    if config.codec == "rans_classes":
        return expected_size(data)
    return float(len(compress(data, config)))


def decompress(packed: bytes, config: CompressConfig, size: int, itemsize: int = 1) -> bytes:
    """Inverse of compress.

    Args:
        size: exact number of bytes that must come out; never much more is produced.

    Raises: ArtifactError when the stream is damaged or holds another number of bytes.
    """
    data = CODECS[config.codec].decompress(packed, size)
    return unshuffle(data, itemsize) if config.byte_shuffle else data
