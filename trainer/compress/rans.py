"""A range coder for codes that have no structure but their frequencies, or brotli where that wins.

brotli gives a symbol a whole number of bits and looks for repeats that noise does not have: on
Gaussian codes it stays 1.4 % above their entropy, some 200 kB of 16 MB. Asymmetric numeral systems
(Duda, https://arxiv.org/abs/1311.2540) reach it. Many states run side by side, so that numpy takes
a step of all of them at once; symbol i belongs to state i mod L.

    "R"  number of symbols (8)  size of the packed table (2)  table  states  words
    "B"  a brotli stream

A state lies in [2^16, 2^32); words of 16 bits carry it across. All of them end where the encoder
began, at 2^16, which a damaged stream does not.

Legend: L states, S the 256 symbols.
"""

from __future__ import annotations

import struct

import brotli
import numpy as np

from trainer.compress.codecs import (
    BROTLI_WINDOW_BITS,
    Codec,
    brotli_compress,
    brotli_decompress,
    wrong_size,
)
from trainer.errors import ArtifactError

TABLE_BITS = 14
"""Frequencies sum to two to the power of this."""
MAX_STATES = 256
SYMBOLS_PER_STATE = 1 << 13
"""A state costs four bytes and a half, so there is one for this many symbols."""
LEAST_SHARE = 1 / 64
"""Data that would shrink below this share is not noise; brotli takes it."""

TOTAL = 1 << TABLE_BITS
LOWEST = 1 << 16
_PREFIX = struct.Struct("<cQH")


def rans_compress(data: bytes, level: int) -> bytes:
    by_brotli = b"B" + brotli_compress(data, level)
    symbols = np.frombuffer(data, np.uint8)
    counts_S = np.bincount(symbols, minlength=256).astype(np.float64)
    shares = counts_S[counts_S > 0] / max(len(data), 1)
    entropy = float(-(shares * np.log2(shares)).sum()) * len(data) / 8
    if not LEAST_SHARE * len(data) < entropy < len(by_brotli):
        return by_brotli
    by_states = _encode(symbols, frequencies(counts_S))
    return min(by_brotli, by_states, key=len)


def rans_decompress(packed: bytes, size: int) -> bytes:
    if packed[:1] == b"B":
        return brotli_decompress(packed[1:], size)
    if packed[:1] != b"R" or len(packed) < _PREFIX.size:
        raise damaged("it begins like none")
    _, num_symbols, table_bytes = _PREFIX.unpack_from(packed)
    if num_symbols != size:  # before memory is taken
        raise wrong_size(min(num_symbols, size + 1), size, "rans")
    check_share(packed, size)
    body = packed[_PREFIX.size + table_bytes :]
    table = brotli_decompress(packed[_PREFIX.size : _PREFIX.size + table_bytes], 512)
    freqs_S = np.frombuffer(table, "<u2").astype(np.uint64)
    if int(freqs_S.sum()) != TOTAL:
        raise damaged("its frequencies do not add up")
    num_states = _num_states(size)
    if len(body) < 4 * num_states or len(body) % 2:
        raise damaged("it is cut short")
    states_L = np.frombuffer(body[: 4 * num_states], "<u4").astype(np.uint64)
    return _decode(size, freqs_S, states_L, np.frombuffer(body[4 * num_states :], "<u2"))


def check_share(packed: bytes, size: int) -> None:
    """A few bytes must not buy minutes of work. Raises ArtifactError."""
    if len(packed) < LEAST_SHARE / 2 * size:
        raise damaged("it is too short for what it says")


RANS = Codec(rans_compress, rans_decompress)


def frequencies(counts_S: np.ndarray) -> np.ndarray:
    """Whole shares of TOTAL, [S] uint64, at least 1 for what occurs."""
    freqs_S = np.round(counts_S / counts_S.sum() * TOTAL)
    freqs_S[(counts_S > 0) & (freqs_S < 1)] = 1
    while (excess := int(freqs_S.sum()) - TOTAL) != 0:  # the most frequent bear what is left
        most = int(freqs_S.argmax())
        freqs_S[most] -= min(excess, freqs_S[most] // 2) if excess > 0 else excess
    whole_S: np.ndarray = freqs_S.astype(np.uint64)
    return whole_S


def _num_states(num_symbols: int) -> int:
    return min(MAX_STATES, max(1, num_symbols // SYMBOLS_PER_STATE))


def starts(freqs_S: np.ndarray) -> np.ndarray:
    starts_S: np.ndarray = np.cumsum(freqs_S) - freqs_S
    return starts_S


def _encode(symbols: np.ndarray, freqs_S: np.ndarray) -> bytes:
    starts_S, num_states = starts(freqs_S), _num_states(len(symbols))
    states_L = np.full(num_states, LOWEST, np.uint64)
    words: list[np.ndarray] = []
    shift = np.uint64(32 - TABLE_BITS)
    for first in reversed(range(0, len(symbols), num_states)):
        part = symbols[first : first + num_states]
        freqs, states = freqs_S[part], states_L[: len(part)]
        is_full = states >= freqs << shift
        words.append((states[is_full] & np.uint64(0xFFFF)).astype("<u2"))
        states = np.where(is_full, states >> np.uint64(16), states)
        states_L[: len(part)] = (
            ((states // freqs) << np.uint64(TABLE_BITS)) + states % freqs + starts_S[part]
        )
    table = brotli.compress(freqs_S.astype("<u2").tobytes(), lgwin=BROTLI_WINDOW_BITS)
    prefix = _PREFIX.pack(b"R", len(symbols), len(table))
    parts = [prefix, table, states_L.astype("<u4").tobytes(), *(w.tobytes() for w in words[::-1])]
    return b"".join(parts)


def _decode(size: int, freqs_S: np.ndarray, states_L: np.ndarray, words: np.ndarray) -> bytes:
    symbol_of = np.repeat(np.arange(256, dtype=np.uint8), freqs_S.astype(np.int64))
    starts_S, symbols = starts(freqs_S), np.empty(size, np.uint8)
    used = 0
    for first in range(0, size, len(states_L)):
        states = states_L[: size - first]
        slots = states & np.uint64(TOTAL - 1)
        part = symbol_of[slots]
        symbols[first : first + len(states)] = part
        states = freqs_S[part] * (states >> np.uint64(TABLE_BITS)) + slots - starts_S[part]
        is_low = states < LOWEST
        refill = words[used : used + int(is_low.sum())]
        used += int(is_low.sum())
        if used > len(words):
            raise damaged("it is cut short")
        states[is_low] = (states[is_low] << np.uint64(16)) | refill
        states_L[: len(states)] = states
    if used != len(words) or (states_L != LOWEST).any():
        raise damaged("it does not end where it began")
    return symbols.tobytes()


def damaged(fault: str) -> ArtifactError:
    return ArtifactError(f"a rans stream is damaged ({fault}); pack the model again")
