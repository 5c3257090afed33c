"""Every codec: exact round trips, and no more output than was declared. CPU."""

from __future__ import annotations

import lzma
import tracemalloc
import zlib

import brotli
import numpy as np
import pytest
import zstandard

from trainer.compress import CODECS, compress, decompress
from trainer.compress.byte_shuffle import shuffle, unshuffle
from trainer.config import CompressConfig, TrainConfig
from trainer.errors import ArtifactError, ConfigError

RANDOM = np.random.default_rng(0)
DATA: dict[str, bytes] = {
    "empty": b"",
    "one_item": bytes(range(8)),
    "noise": RANDOM.bytes(4096),
    "zeros": bytes(100_000),
    "codes": np.clip(RANDOM.normal(0, 9, 30_000).round(), -31, 31).astype(np.int8).tobytes(),
    "floats": RANDOM.normal(0, 0.01, 5000).astype(np.float16).tobytes(),
}
CONFIGS = [
    CompressConfig.model_validate({"codec": codec, "level": level, "byte_shuffle": shuffled})
    for codec in CODECS
    for level in (1, 9)
    for shuffled in (False, True)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.codec}{c.level}{c.byte_shuffle}")
@pytest.mark.parametrize("name", DATA)
def test_what_goes_in_comes_out(name: str, config: CompressConfig) -> None:
    for itemsize in (1, 2, 4, 8):
        packed = compress(DATA[name], config, itemsize)
        assert decompress(packed, config, len(DATA[name]), itemsize) == DATA[name]


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_shuffle_groups_bytes_of_equal_significance(itemsize: int) -> None:
    data = DATA["noise"]
    expected = b"".join(data[place::itemsize] for place in range(itemsize))
    assert shuffle(data, itemsize) == expected
    assert unshuffle(expected, itemsize) == data


@pytest.mark.parametrize("codec", CODECS)
def test_shuffling_halves_serve_their_purpose(codec: str) -> None:
    data = np.linspace(1.0, 1.01, 4000, dtype=np.float32).tobytes()
    plain = CompressConfig.model_validate({"codec": codec})
    shuffled = plain.model_copy(update={"byte_shuffle": True})
    assert len(compress(data, shuffled, 4)) < 0.8 * len(compress(data, plain, 4))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fault", [-1, 1, -4096, 10**12])
def test_another_size_than_declared_is_refused(codec: str, fault: int) -> None:
    data = DATA["noise"]
    packed = CODECS[codec].compress(data, 9)
    with pytest.raises(ArtifactError, match="pack the model again"):
        CODECS[codec].decompress(packed, len(data) + fault)


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_and_every_extra_byte_is_refused(codec: str) -> None:
    data = DATA["codes"][:300]
    packed = CODECS[codec].compress(data, 9)
    for length in range(len(packed)):
        with pytest.raises(ArtifactError):
            CODECS[codec].decompress(packed[:length], len(data))
    with pytest.raises(ArtifactError):
        CODECS[codec].decompress(packed + b"\0", len(data))


def test_a_stream_that_says_everything_but_never_ends_is_refused() -> None:
    data = DATA["codes"]
    by_zlib, by_brotli = zlib.compressobj(), brotli.Compressor()
    open_ended = {
        "zlib": by_zlib.compress(data) + by_zlib.flush(zlib.Z_SYNC_FLUSH),
        "brotli": by_brotli.process(data) + by_brotli.flush(),
    }
    for codec, packed in open_ended.items():
        with pytest.raises(ArtifactError, match="cut short"):
            CODECS[codec].decompress(packed, len(data))


def test_lzma_and_zstd_streams_without_their_ends_are_refused() -> None:
    data = DATA["codes"]
    by_lzma, by_zstd = lzma.LZMACompressor(), zstandard.ZstdCompressor().compressobj(len(data))
    head = by_lzma.compress(data)
    tail = by_lzma.flush()
    with pytest.raises(ArtifactError, match="cut short"):
        CODECS["lzma"].decompress(head + tail[:-1], len(data))
    open_ended = by_zstd.compress(data) + by_zstd.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(ArtifactError, match="pack the model again"):
        CODECS["zstd"].decompress(open_ended, len(data))


def test_a_zstd_frame_that_hides_its_size_is_refused() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    hidden = stream.compress(DATA["codes"]) + stream.flush()
    with pytest.raises(ArtifactError, match="pack the model again"):
        CODECS["zstd"].decompress(hidden, len(DATA["codes"]))


def test_a_zstd_frame_that_lies_about_its_size_is_refused() -> None:
    """The header of a bomb is made to announce what we expect; the decoder stops at that."""
    bomb = bytearray(zstandard.ZstdCompressor(level=9).compress(bytes(300)))
    honest = zstandard.get_frame_parameters(bytes(bomb))
    assert honest.content_size == 300
    small = zstandard.ZstdCompressor(level=9).compress(bytes(260))
    header = zstandard.frame_header_size(small)
    assert header == zstandard.frame_header_size(bytes(bomb))
    with pytest.raises(ArtifactError, match="pack the model again"):
        CODECS["zstd"].decompress(small[:header] + bytes(bomb[header:]), 260)


def test_an_lzma_stream_that_asks_for_much_memory_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}]
    greedy = lzma.compress(bytes(100), lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)
    with pytest.raises(ArtifactError, match="more than 100 bytes"):
        CODECS["lzma"].decompress(greedy, 100)


@pytest.mark.parametrize("level", range(10))
def test_the_dictionary_is_as_large_as_the_level_presets_it(level: int) -> None:
    data = np.random.default_rng(3).bytes(300_000) * 2  # the second half needs a long memory
    ours = CODECS["lzma"].compress(data, level)
    theirs = lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, preset=level)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(
    ("codec", "level", "word"),
    [("lzma", 10, "above 9"), ("zstd", 0, "below 1"), ("brotli", 12, "11")],
)
def test_a_level_that_a_codec_lacks_is_refused(codec: str, level: int, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"compress\.level = {level} is .*{word}.*{codec}"):
        TrainConfig().with_overrides({"compress.codec": codec, "compress.level": level})


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_is_refused_before_it_fills_the_memory(codec: str) -> None:
    bomb = CODECS[codec].compress(bytes(64_000_000), 9)
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="more than 1,000 bytes"):
        CODECS[codec].decompress(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
