"""The range coder with classes of blocks: near what its classes allow, safe when damaged. CPU."""

from __future__ import annotations

import random
import struct

import brotli
import numpy as np
import pytest

from trainer.compress.rans import rans_compress
from trainer.compress.rans_classes import (
    expected_size,
    rans_classes_compress,
    rans_classes_decompress,
)
from trainer.errors import ArtifactError

SPREADS = (0.6, 1.5, 4.0)


def _rows(count: int, spreads: tuple[float, ...] = SPREADS, seed: int = 0) -> bytes:
    """Rows of 512 codes, each of one of some spreads in no order."""
    dice = np.random.default_rng(seed)
    spread_R1 = dice.choice(spreads, (-(-count // 512), 1))
    codes = (dice.normal(size=(len(spread_R1), 512)) * spread_R1).round()
    return np.clip(codes, -31, 31).astype(np.int8).tobytes()[:count]


def _entropy_bytes(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8))
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum()) * len(data) / 8


def test_rows_of_several_spreads_take_the_entropy_of_each() -> None:
    count = 600 * 512 + 77  # the last block is no whole one
    data = _rows(count)
    packed = rans_classes_compress(data, 9)
    assert packed[:1] == b"C" and rans_classes_decompress(packed, count) == data
    dice = np.random.default_rng(0)
    kinds = dice.choice(SPREADS, (601, 1))[:, 0]
    codes = np.frombuffer(data, np.uint8)
    rows = [codes[512 * index : 512 * (index + 1)] for index in range(601)]
    alone = sum(
        _entropy_bytes(
            b"".join(row.tobytes() for row, kind in zip(rows, kinds, strict=True) if kind == spread)
        )
        for spread in SPREADS
    )
    assert len(packed) < 1.005 * alone + 600
    assert len(packed) < 0.97 * len(rans_compress(data, 9))
    assert expected_size(data) == pytest.approx(len(packed), rel=0.003)


def test_data_with_structure_goes_to_brotli() -> None:
    for data in (b"", bytes(50_000), b"abc" * 9000, _rows(512) * 40, bytes(400_000)):
        packed = rans_classes_compress(data, 9)
        assert packed[:1] == b"B" and rans_classes_decompress(packed, len(data)) == data


def _plain_decode(packed: bytes) -> bytes:
    """The description in the module, one symbol at a time with Python's whole numbers."""
    size, block_log, num_classes, head_bytes = struct.unpack_from("<QBBI", packed, 1)
    head = brotli.decompress(packed[15 : 15 + head_bytes])
    num_blocks = -(-size // 2**block_log)
    freqs = [
        struct.unpack_from("<256H", head, num_blocks + 512 * number)
        for number in range(num_classes)
    ]
    starts = [[sum(table[:symbol]) for symbol in range(256)] for table in freqs]
    at = 15 + head_bytes
    num_states = 1 << min(9, max(0, (size // 8192).bit_length() - 1))
    states = list(struct.unpack_from(f"<{num_states}I", packed, at))
    at += 4 * num_states
    symbols = bytearray()
    for index in range(size):
        number = head[index >> block_log]
        table, below = freqs[number], starts[number]
        state = states[index % num_states]
        slot = state % 16384
        symbol = next(s for s in range(256) if below[s] <= slot < below[s] + table[s])
        state = table[symbol] * (state // 16384) + slot - below[symbol]
        if state < 65536:
            state = state * 65536 + struct.unpack_from("<H", packed, at)[0]
            at += 2
        states[index % num_states] = state
        symbols.append(symbol)
    assert at == len(packed) and set(states) == {65536}
    return bytes(symbols)


def test_a_plain_decoder_reads_the_same() -> None:
    data = _rows(36_001)
    packed = rans_classes_compress(data, 9)
    assert packed[:1] == b"C" and packed[10] > 1 and _plain_decode(packed) == data


def test_changed_bytes_and_cuts_are_refused() -> None:
    data = _rows(9_000)
    packed = rans_classes_compress(data, 9)
    assert packed[:1] == b"C"
    dice = random.Random(0)
    for place in [*range(40), *(dice.randrange(len(packed)) for _ in range(12))]:
        broken = bytearray(packed)
        broken[place] ^= 1 << dice.randrange(8)
        try:
            found = rans_classes_decompress(bytes(broken), len(data))
        except ArtifactError:
            continue
        assert found == data  # a bit that brotli does not look at
    for length in [*range(20), *(dice.randrange(len(packed)) for _ in range(8))]:
        with pytest.raises(ArtifactError):
            rans_classes_decompress(packed[:length], len(data))
    with pytest.raises(ArtifactError):
        rans_classes_decompress(packed + b"\0\0", len(data))


def test_another_size_is_refused_before_memory_is_taken() -> None:
    packed = rans_classes_compress(_rows(17_000), 9)
    for size in (0, 16_999, 17_001, 10**15):
        with pytest.raises(ArtifactError, match="were declared"):
            rans_classes_decompress(packed, size)
    huge = packed[:1] + struct.pack("<Q", 1 << 60) + packed[9:]
    with pytest.raises(ArtifactError, match="more than 17,000 bytes"):
        rans_classes_decompress(huge, 17_000)
