"""The range coder: at the entropy, read by a plain decoder, safe against hostile streams. CPU."""

from __future__ import annotations

import random
import struct

import brotli
import numpy as np
import pytest

from trainer.compress.rans import rans_compress, rans_decompress
from trainer.errors import ArtifactError


def _codes(count: int, spread: float = 2.4, seed: int = 0) -> bytes:
    drawn = np.random.default_rng(seed).normal(0, spread, count).round()
    return np.clip(drawn, -31, 31).astype(np.int8).tobytes()


def _entropy_bytes(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8))
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum()) * len(data) / 8


@pytest.mark.parametrize("count", [2_000, 20_000, 140_001])
@pytest.mark.parametrize("spread", [0.7, 2.4, 9.0])
def test_noise_takes_its_entropy_and_little_more(count: int, spread: float) -> None:
    data = _codes(count, spread)
    packed = rans_compress(data, 9)
    assert rans_decompress(packed, count) == data
    if count > 30_000:
        assert packed[:1] == b"R"
        assert len(packed) < 1.003 * _entropy_bytes(data) + 120
        assert len(packed) < len(brotli.compress(data, quality=11))


def test_data_with_structure_goes_to_brotli() -> None:
    for data in (b"", bytes(50_000), b"abc" * 9000, _codes(500) * 40):
        packed = rans_compress(data, 9)
        assert packed[:1] == b"B" and rans_decompress(packed, len(data)) == data


def _plain_decode(packed: bytes) -> bytes:
    """The description in the module, one symbol at a time with Python's whole numbers."""
    size, table_bytes = struct.unpack_from("<QH", packed, 1)
    at = 11 + table_bytes
    freqs = struct.unpack("<256H", brotli.decompress(packed[11:at]))
    starts = [sum(freqs[:symbol]) for symbol in range(256)]
    num_states = min(256, max(1, size // 8192))
    states = list(struct.unpack_from(f"<{num_states}I", packed, at))
    at += 4 * num_states
    symbols = bytearray()
    for index in range(size):
        state = states[index % num_states]
        slot = state % 16384
        symbol = next(s for s in range(256) if starts[s] <= slot < starts[s] + freqs[s])
        state = freqs[symbol] * (state // 16384) + slot - starts[symbol]
        if state < 65536:
            state = state * 65536 + struct.unpack_from("<H", packed, at)[0]
            at += 2
        states[index % num_states] = state
        symbols.append(symbol)
    assert at == len(packed) and set(states) == {65536}
    return bytes(symbols)


def test_a_plain_decoder_reads_the_same() -> None:
    data = _codes(36_001)  # four states, the last step of which has one symbol
    packed = rans_compress(data, 9)
    assert packed[:1] == b"R" and _plain_decode(packed) == data


def test_changed_bytes_and_cuts_are_refused() -> None:
    data = _codes(9_000)
    packed = rans_compress(data, 9)
    assert packed[:1] == b"R"
    dice = random.Random(0)
    for place in [*range(20), *(dice.randrange(len(packed)) for _ in range(12))]:
        broken = bytearray(packed)
        broken[place] ^= 1 << dice.randrange(8)
        try:
            found = rans_decompress(bytes(broken), len(data))
        except ArtifactError:
            continue
        assert found == data  # a bit that brotli does not look at
    for length in [*range(16), *(dice.randrange(len(packed)) for _ in range(8))]:
        with pytest.raises(ArtifactError):
            rans_decompress(packed[:length], len(data))
    with pytest.raises(ArtifactError):
        rans_decompress(packed + b"\0\0", len(data))


def test_another_size_is_refused_before_memory_is_taken() -> None:
    packed = rans_compress(_codes(17_000), 9)
    for size in (0, 16_999, 17_001, 10**15):
        with pytest.raises(ArtifactError, match="were declared"):
            rans_decompress(packed, size)
    huge = packed[:1] + struct.pack("<Q", 1 << 60) + packed[9:]
    with pytest.raises(ArtifactError, match="more than 17,000 bytes"):
        rans_decompress(huge, 17_000)
