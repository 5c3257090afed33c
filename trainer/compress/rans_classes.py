"""The range coder of rans.py with frequencies of their own for each class of blocks.

Rows of a matrix differ in spread, matrices in their steps, and one table of frequencies for all of
them is nobody's. Here the data is cut into blocks of one length, a row of most matrices; alike
blocks form a class (k-means with the coder's own measure, bits), and each class has a table. brotli
is tried only where a quick try says that it may win, so 36 million codes take seconds.

    "C"  number of symbols (8)  log2 of a block (1)  number of classes (1)  size of the head (4)
         head, packed: the class of every block, one byte each; then 256 frequencies a class
         states  words
    "B"  a brotli stream

Symbol i belongs to state i mod L; a block is a whole number of turns, so that all symbols of a turn
share a table.

Legend: B blocks, K classes, L states, S the 256 symbols.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import brotli
import numpy as np

from trainer.compress.codecs import (
    BROTLI_WINDOW_BITS,
    Codec,
    brotli_compress,
    brotli_decompress,
    wrong_size,
)
from trainer.compress.rans import (
    LEAST_SHARE,
    LOWEST,
    SYMBOLS_PER_STATE,
    TABLE_BITS,
    TOTAL,
    check_share,
    damaged,
    frequencies,
)

MAX_STATES_LOG = 9
BLOCK_LOGS = (9, 11, 13)
NUM_CLASSES = (1, 4, 16, 64)
"""Cuts that are tried: lengths of a block, and classes."""
TURNS = 4
"""Rounds of k-means."""
SMALL_BYTES = 1 << 18
"""Up to here brotli is always tried at full effort; beyond, where its quick form would win."""
QUICK_LEVEL = 3

_PREFIX = struct.Struct("<cQBBI")


@dataclass(frozen=True)
class _Plan:
    """How data is cut and coded."""

    block_log: int
    classes_B: np.ndarray
    freqs_KS: np.ndarray
    expected_bytes: float

    @property
    def head(self) -> bytes:
        """Classes and tables, packed."""
        plain = self.classes_B.astype(np.uint8).tobytes() + self.freqs_KS.astype("<u2").tobytes()
        packed: bytes = brotli.compress(plain, lgwin=BROTLI_WINDOW_BITS)
        return packed


def rans_classes_compress(data: bytes, level: int) -> bytes:
    symbols = np.frombuffer(data, np.uint8)
    plan = _plan(symbols) if len(data) else None
    if plan is not None and plan.expected_bytes < LEAST_SHARE * len(data):
        plan = None  # not noise: brotli takes it
    by_brotli = None
    if plan is None or len(data) <= SMALL_BYTES or _quick(data) < plan.expected_bytes:
        by_brotli = b"B" + brotli_compress(data, level)
        if plan is None or len(by_brotli) < 0.99 * plan.expected_bytes:
            return by_brotli
    coded = _encode(symbols, plan)
    return coded if by_brotli is None else min(by_brotli, coded, key=len)


def expected_size(data: bytes) -> float:
    """Bytes of the compressed data, to a few parts in a thousand, without coding it."""
    return _plan(np.frombuffer(data, np.uint8)).expected_bytes if data else 0.0


def rans_classes_decompress(packed: bytes, size: int) -> bytes:
    if packed[:1] == b"B":
        return brotli_decompress(packed[1:], size)
    if packed[:1] != b"C" or len(packed) < _PREFIX.size:
        raise damaged("it begins like none")
    _, num_symbols, block_log, num_classes, head_bytes = _PREFIX.unpack_from(packed)
    if num_symbols != size:  # before memory is taken
        raise wrong_size(min(num_symbols, size + 1), size, "rans_classes")
    check_share(packed, size)
    if block_log not in BLOCK_LOGS or not 1 <= num_classes <= NUM_CLASSES[-1]:
        raise damaged("it is cut in an unknown way")
    num_blocks = -(-size // (1 << block_log))
    body = packed[_PREFIX.size + head_bytes :]
    head = brotli_decompress(
        packed[_PREFIX.size : _PREFIX.size + head_bytes], num_blocks + 512 * num_classes
    )
    classes_B = np.frombuffer(head, np.uint8, num_blocks)
    freqs_KS = np.frombuffer(head, "<u2", offset=num_blocks).astype(np.uint64).reshape(-1, 256)
    if (classes_B >= num_classes).any() or (freqs_KS.sum(1) != TOTAL).any():
        raise damaged("its tables are none")
    num_states = 1 << _states_log(size)
    if len(body) < 4 * num_states or len(body) % 2:
        raise damaged("it is cut short")
    states_L = np.frombuffer(body[: 4 * num_states], "<u4").astype(np.uint64)
    words = np.frombuffer(body[4 * num_states :], "<u2")
    plan = _Plan(block_log, classes_B, freqs_KS, 0.0)
    return _decode(size, plan, states_L, words)


RANS_CLASSES = Codec(rans_classes_compress, rans_classes_decompress)


def _quick(data: bytes) -> int:
    return len(brotli_compress(data, QUICK_LEVEL))


def _states_log(num_symbols: int) -> int:
    return min(MAX_STATES_LOG, max(0, (num_symbols // SYMBOLS_PER_STATE).bit_length() - 1))


def _plan(symbols: np.ndarray) -> _Plan:
    """The cheapest of the cuts that are tried. More classes are given up once they do not pay."""
    used = np.flatnonzero(np.bincount(symbols, minlength=256))
    all_BU = counts_BU = _histograms(symbols, used)
    best: _Plan | None = None
    for block_log in BLOCK_LOGS:
        if best is not None and len(symbols) <= 1 << block_log:
            break
        joined = 1 << block_log - BLOCK_LOGS[0]
        if joined > 1:
            starts = np.arange(0, len(all_BU), joined)
            counts_BU = np.add.reduceat(all_BU, starts, axis=0)
        least = np.inf
        for num_classes in NUM_CLASSES:
            if num_classes > len(counts_BU):
                break
            plan = _clustered(counts_BU, num_classes, block_log, used)
            if best is None or plan.expected_bytes < best.expected_bytes:
                best = plan
            if plan.expected_bytes > least:
                break
            least = plan.expected_bytes
    assert best is not None
    return best


def _histograms(symbols: np.ndarray, used: np.ndarray) -> np.ndarray:
    """How often each used symbol stands in each of the smallest blocks, [B, U] float32."""
    num_blocks = -(-len(symbols) // (1 << BLOCK_LOGS[0]))
    counts_BU = np.zeros((num_blocks, len(used)), np.float32)
    place_S = np.zeros(256, np.int64)
    place_S[used] = np.arange(len(used))
    portion = 1 << 20  # symbols at a time: their indices take eight bytes each
    for start in range(0, len(symbols), portion):
        places = place_S[symbols[start : start + portion]]
        places += (np.arange(len(places)) >> BLOCK_LOGS[0]) * len(used)
        counts = np.bincount(places)
        flat = counts_BU[start >> BLOCK_LOGS[0] :].reshape(-1)
        flat[: len(counts)] = counts
    return counts_BU


def _clustered(counts_BU: np.ndarray, num_classes: int, block_log: int, used: np.ndarray) -> _Plan:
    """k-means: a block joins the class whose table codes it in the fewest bits. It begins with
    equal portions of the blocks in the order of their most frequent symbol's share."""
    order_B = np.argsort(counts_BU.max(1), kind="stable")
    classes_B = np.empty(len(counts_BU), np.int64)
    classes_B[order_B] = np.arange(len(counts_BU)) * num_classes // len(counts_BU)
    for _ in range(TURNS if num_classes > 1 else 0):
        totals_KU = _totals(counts_BU, classes_B) + 1 / 64  # what a class lacks is dear, not barred
        costs_KU = -np.log2(totals_KU / totals_KU.sum(1, keepdims=True)).astype(np.float32)
        classes_B = (counts_BU @ costs_KU.T).argmin(1)
    _, classes_B = np.unique(classes_B, return_inverse=True)
    totals_KU = _totals(counts_BU, classes_B)
    freqs_KS = np.zeros((len(totals_KU), 256), np.uint64)
    bits = 0.0
    for number, counts_U in enumerate(totals_KU):
        counts_S = np.zeros(256)
        counts_S[used] = counts_U
        freqs_KS[number] = frequencies(counts_S)
        occurs = counts_S > 0
        shares = freqs_KS[number][occurs].astype(np.float64) / TOTAL
        bits -= float((counts_S[occurs] * np.log2(shares)).sum())
    plan = _Plan(block_log, classes_B, freqs_KS, 0.0)
    beside = _PREFIX.size + len(plan.head) + 4.3 * (1 << _states_log(int(counts_BU.sum())))
    return _Plan(block_log, classes_B, freqs_KS, bits / 8 + beside)


def _totals(counts_BU: np.ndarray, classes_B: np.ndarray) -> np.ndarray:
    is_in_KB = np.arange(int(classes_B.max()) + 1)[:, None] == classes_B
    totals_KU: np.ndarray = (is_in_KB.astype(np.float32) @ counts_BU).astype(np.float64)
    return totals_KU


def _encode(symbols: np.ndarray, plan: _Plan) -> bytes:
    num_states = 1 << _states_log(len(symbols))
    starts_KS = np.cumsum(plan.freqs_KS, 1) - plan.freqs_KS
    states_L = np.full(num_states, LOWEST, np.uint64)
    words: list[np.ndarray] = []
    shift, table_bits = np.uint64(32 - TABLE_BITS), np.uint64(TABLE_BITS)
    for first in reversed(range(0, len(symbols), num_states)):
        number = plan.classes_B[first >> plan.block_log]
        part = symbols[first : first + num_states]
        freqs, states = plan.freqs_KS[number][part], states_L[: len(part)]
        is_full = states >= freqs << shift
        words.append((states[is_full] & np.uint64(0xFFFF)).astype("<u2"))
        states = np.where(is_full, states >> np.uint64(16), states)
        whole, rest = np.divmod(states, freqs)
        states_L[: len(part)] = (whole << table_bits) + rest + starts_KS[number][part]
    head = plan.head
    prefix = _PREFIX.pack(b"C", len(symbols), plan.block_log, len(plan.freqs_KS), len(head))
    body = [states_L.astype("<u4").tobytes(), *(part.tobytes() for part in words[::-1])]
    return b"".join([prefix, head, *body])


def _decode(size: int, plan: _Plan, states_L: np.ndarray, words: np.ndarray) -> bytes:
    starts_KS = np.cumsum(plan.freqs_KS, 1) - plan.freqs_KS
    alphabet = np.arange(256, dtype=np.uint8)
    symbols_KT = [np.repeat(alphabet, freqs_S.astype(np.int64)) for freqs_S in plan.freqs_KS]
    symbols, used = np.empty(size, np.uint8), 0
    table_bits, mask = np.uint64(TABLE_BITS), np.uint64(TOTAL - 1)
    for first in range(0, size, len(states_L)):
        number = plan.classes_B[first >> plan.block_log]
        states = states_L[: size - first]
        slots = states & mask
        part = symbols_KT[number][slots]
        symbols[first : first + len(states)] = part
        states = plan.freqs_KS[number][part] * (states >> table_bits) + slots
        states -= starts_KS[number][part]
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
