"""The file format: exact round trips, honest sizes, and thousands of hostile files. CPU.

Headers are taken apart here from the description in the module's docstring, not with its code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch

from trainer import artifact
from trainer.compress import CODECS
from trainer.config import QuantizeConfig, TrainConfig
from trainer.errors import ArtifactError
from trainer.model.gpt import GPT
from trainer.quantize import SCHEMES, QuantizedState, QuantizedTensor, dequantize, quantize
from trainer.recipes import RECIPES

HEADER_AT = 18
CHECKSUM_BYTES = 16


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = 0.05 * torch.randn(24, 40, generator=generator)
    return {
        "tok_emb.weight": weights,
        "head.weight": weights,
        "blocks.0.attn.q.weight": 0.02 * torch.randn(40, 40, generator=generator),
        "blocks.0.attn_scale": torch.randn(40, generator=generator),
        "small": torch.randn(3, generator=generator),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 7),
        "count": torch.tensor([3, 4]),
    }


def _every_scheme() -> QuantizedState:
    """One tensor of each scheme in the table, and a tied name."""
    weights = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    tensors = {
        f"as.{name}": QuantizedTensor(name, (6, 50), scheme.encode(weights, QuantizeConfig()))
        for name, scheme in SCHEMES.items()
    }
    return QuantizedState(tensors, {"tied": "as.int6"})


def _config(codec: str = "zlib", shuffled: bool = False) -> TrainConfig:
    return TrainConfig().with_overrides(
        {
            "compress.codec": codec,
            "compress.byte_shuffle": shuffled,
            "quantize.keep_float_max_numel": 100,
        }
    )


def _small() -> bytes:
    config = _config("brotli", True)
    return artifact.encode(quantize(_state(), config.quantize), config)


def _assert_same(found: QuantizedState, expected: QuantizedState) -> None:
    assert found.aliases == expected.aliases
    assert list(found.tensors) == list(expected.tensors)
    for name, stored in expected.tensors.items():
        other = found.tensors[name]
        assert (other.scheme, other.shape) == (stored.scheme, stored.shape)
        assert list(other.arrays) == list(stored.arrays)
        for part, array in stored.arrays.items():
            assert other.arrays[part].dtype == array.dtype
            assert other.arrays[part].shape == array.shape
            assert other.arrays[part].tobytes() == array.tobytes()


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("make", [_every_scheme, lambda: quantize(_state(), QuantizeConfig())])
def test_decoding_gives_back_what_was_encoded(
    make: Callable[[], QuantizedState], codec: str, shuffled: bool
) -> None:
    config, quantized = _config(codec, shuffled), make()
    found_config, found = artifact.decode(artifact.encode(quantized, config))
    assert found_config == config
    _assert_same(found, quantized)


def test_a_model_without_tensors_round_trips() -> None:
    empty = QuantizedState({})
    _assert_same(artifact.decode(artifact.encode(empty, TrainConfig()))[1], empty)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_the_same_with_its_decoded_weights_on_either_path(tied: bool) -> None:
    config = RECIPES["tiny"].build().with_overrides({"model.tie_embeddings": tied})
    torch.manual_seed(0)
    model = GPT(config.model, lambda q, k, v, *, window=None: q)
    quantized = quantize(model.state_dict(), config.quantize)
    direct = dequantize(quantized)
    decoded = dequantize(artifact.decode(artifact.encode(quantized, config))[1])
    model.load_state_dict(decoded, strict=True)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, direct[name]), name


def test_equal_models_give_equal_bytes_wherever_the_data_lies() -> None:
    quantized = quantize(_state(), QuantizeConfig())
    here = artifact.encode(quantized, _config())
    there = artifact.encode(quantized, _config().with_overrides({"data.dir": "/some/where/else"}))
    assert here == there
    assert artifact.decode(there)[0].data.dir == ""
    assert artifact.sha256(here) == hashlib.sha256(here).hexdigest()


def test_the_account_is_the_size_of_the_file(tmp_path: Path) -> None:
    blob, path = _small(), tmp_path / "new" / "artifact.bin"
    artifact.write(path, blob)
    assert path.stat().st_size == len(blob)
    assert artifact.read(path) == blob
    assert os.listdir(path.parent) == ["artifact.bin"]


def test_the_parts_of_the_file_add_up_as_described() -> None:
    blob = _small()
    header = _header(blob)
    assert blob[:8] == b"\x89CADDIE\n"
    assert int.from_bytes(blob[8:10], "little") == artifact.VERSION
    packed_size = int.from_bytes(blob[10:14], "little")
    assert len(blob) == HEADER_AT + packed_size + sum(header["streams"].values()) + CHECKSUM_BYTES
    assert list(header["streams"]) == ["|i1", "<f2", "<f4", "<i8"]


# --- no space, no permission ---------------------------------------------------------------


def _assert_refused_and_untouched(path: Path, blob: bytes, match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=match) as caught:
        artifact.write(path, blob)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_full_device_leaves_the_earlier_artifact_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "artifact.bin"
    path.write_bytes(b"earlier")
    # What the writer opens for the new content is the device that is always full.
    (tmp_path / "artifact.bin.partial").symlink_to("/dev/full")
    _assert_refused_and_untouched(path, bytes(5000), "no space left .* 5,000 bytes are needed")


def test_a_full_file_system_leaves_the_earlier_artifact_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "artifact.bin"
    artifact.write(path, b"earlier" * 1000)
    message = r"no space left .*200,000 bytes are needed, 5\d,\d{3} are free"
    _assert_refused_and_untouched(path, bytes(200_000), message)
    artifact.write(path, b"later")
    assert artifact.read(path) == b"later"


def test_a_limit_on_file_sizes_counts_as_no_space(tmp_path: Path) -> None:
    path = tmp_path / "artifact.bin"
    path.write_bytes(b"earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        _assert_refused_and_untouched(path, bytes(50_000), "no space left .* 50,000 bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"cannot be written \(File exists\)"):
        artifact.write(tmp_path / "file" / "artifact.bin", b"x")


def test_killing_the_writer_leaves_the_earlier_artifact_whole(tmp_path: Path) -> None:
    path = tmp_path / "artifact.bin"
    artifact.write(path, b"earlier")
    code = (
        "import sys; from pathlib import Path; from trainer import artifact\n"
        "print('ready', flush=True)\n"
        "while True: artifact.write(Path(sys.argv[1]), b'l' * 3_000_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.05)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert artifact.read(path) in (b"earlier", b"l" * 3_000_000)
    artifact.write(path, b"next")  # whatever was left behind is in nobody's way
    assert os.listdir(tmp_path) == ["artifact.bin"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [("missing", "cannot be read"), (".", "not a regular"), ("pipe", "not a regular")],
)
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str, fault: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match=fault):
        artifact.read(tmp_path / name)


# --- hostile files -------------------------------------------------------------------------


def _header(blob: bytes) -> dict[str, Any]:
    size = int.from_bytes(blob[10:14], "little")
    return json.loads(brotli.decompress(blob[HEADER_AT : HEADER_AT + size]))


def _streams(blob: bytes) -> bytes:
    return blob[HEADER_AT + int.from_bytes(blob[10:14], "little") : -CHECKSUM_BYTES]


def _sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()


def _with_header(blob: bytes, header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = brotli.compress(text, quality=1)
    sizes = len(packed).to_bytes(4, "little") + len(text).to_bytes(4, "little")
    return _sealed(blob[:10] + sizes + packed + _streams(blob))


def test_a_header_written_anew_still_decodes() -> None:
    """The attacks below change one thing each in a file that is otherwise accepted."""
    blob = _small()
    _assert_same(artifact.decode(_with_header(blob, _header(blob)))[1], artifact.decode(blob)[1])


def _set(*path: Any, to: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        node: Any = header
        for step in path[:-1]:  # settings at their defaults are left out
            node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
        node[path[-1]] = to

    return change


EMPTY = [name for name in _state() if name != "head.weight"].index("empty")

LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown scheme": _set("tensors", 0, 1, to="pickle"),
    "another scheme": _set("tensors", 0, 1, to="float32"),
    "huge shape": _set("tensors", 0, 2, to=[1 << 40, 1 << 40]),
    "large shape": _set("tensors", 0, 2, to=[1 << 29]),
    "huge empty shape": _set("tensors", EMPTY, 2, to=[1 << 48, 1 << 48, 0]),
    "shape beyond integers": _set("tensors", 0, 2, to=[10**400]),
    "shape at the bound": _set("tensors", 0, 2, to=[1 << 27]),
    "larger shape": _set("tensors", 0, 2, to=[25, 40]),
    "smaller shape": _set("tensors", 0, 2, to=[23, 40]),
    "negative shape": _set("tensors", 0, 2, to=[-24, -40]),
    "fractional shape": _set("tensors", 0, 2, to=[24.0, 40]),
    "boolean shape": _set("tensors", 0, 2, to=[True, 960]),
    "many axes": _set("tensors", 0, 2, to=[1] * 70),
    "name is a path": _set("tensors", 1, 0, to="../../etc/passwd"),
    "name is absolute": _set("tensors", 1, 0, to="/etc/passwd"),
    "name has a zero": _set("tensors", 1, 0, to="a\0b"),
    "name ends a line": _set("tensors", 1, 0, to="q\n"),
    "no name": _set("tensors", 1, 0, to=""),
    "long name": _set("tensors", 1, 0, to="a" * 100_000),
    "name twice": _set("tensors", 1, 0, to="tok_emb.weight"),
    "tied to nothing": _set("aliases", "head.weight", to="nothing"),
    "tied to itself": _set("aliases", "head.weight", to="head.weight"),
    "tied and stored": _set("aliases", "small", to="tok_emb.weight"),
    "stream too long": _set("streams", "|i1", to=1 << 40),
    "stream too short": _set("streams", "|i1", to=0),
    "negative stream": _set("streams", "|i1", to=-1),
    "object stream": _set("streams", "|O", to=0),
    "another codec": _set("config", "compress", "codec", to="zlib"),
    "unknown codec": _set("config", "compress", "codec", to="lzma"),
    "unknown setting": _set("config", "model", "depth", to=3),
    "broken rule": _set("config", "model", "num_heads", to=7),
    "config is a list": _set("config", to=[]),
    "extra key": _set("code", to="print()"),
    "no tensors": _set("tensors", to=[]),
    "tensors is text": _set("tensors", to="all"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str) -> None:
    blob = _small()
    header = _header(blob)
    LIES[lie](header)
    _assert_refused_cheaply(_with_header(blob, header))


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 200_000, b'{"config":' * 50_000, b"9" * 9999],
    ids=range(8),
)
def test_a_header_that_is_no_header_is_refused(text: bytes) -> None:
    _assert_refused_cheaply(_with_header(_small(), text))


def test_a_header_of_thirty_thousand_faults_is_refused_at_once() -> None:
    blob = _small()
    header = _header(blob)
    header["config"] = {f"k{index}": 0 for index in range(30_000)}
    _assert_refused_cheaply(_with_header(blob, header))


def test_a_bomb_for_a_header_is_refused() -> None:
    blob = _small()
    packed = brotli.compress(bytes(64_000_000), quality=1)
    for claimed in (1000, 1 << 19, 64_000_000, (1 << 32) - 1):
        sizes = len(packed).to_bytes(4, "little") + claimed.to_bytes(4, "little")
        _assert_refused_cheaply(_sealed(blob[:10] + sizes + packed + _streams(blob)))


def test_a_bomb_for_a_stream_is_refused() -> None:
    blob = _small()
    header = _header(blob)
    bomb = brotli.compress(bytes(64_000_000), quality=1)
    rest = _streams(blob)[header["streams"]["|i1"] :]
    header["streams"]["|i1"] = len(bomb)
    hostile = _with_header(blob, header)[:-CHECKSUM_BYTES]
    _assert_refused_cheaply(_sealed(hostile.removesuffix(_streams(blob)) + bomb + rest))


def _assert_refused_cheaply(blob: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            artifact.decode(blob)
        assert tracemalloc.get_traced_memory()[1] < 32_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change", [lambda s: s + b"hidden", lambda s: b"hidden" + s, lambda s: b""]
)
def test_streams_must_fill_the_file(change: Callable[[bytes], bytes]) -> None:
    blob = _small()
    head = blob[: -CHECKSUM_BYTES - len(_streams(blob))]
    with pytest.raises(ArtifactError, match=r"streams take [\d,]+ bytes where the header says"):
        artifact.decode(_sealed(head + change(_streams(blob))))


def test_a_newer_version_says_so() -> None:
    blob = _small()
    newer = _sealed(blob[:8] + (99).to_bytes(2, "little") + blob[10:-CHECKSUM_BYTES])
    with pytest.raises(ArtifactError, match="version 99, this code reads 1"):
        artifact.decode(newer)


def test_every_truncation_is_refused() -> None:
    blob = _small()
    for length in range(len(blob)):
        with pytest.raises(ArtifactError):
            artifact.decode(blob[:length])


def test_every_flipped_byte_is_refused() -> None:
    blob = _small()
    for place in range(len(blob)):
        damaged = bytearray(blob)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ArtifactError):
            artifact.decode(bytes(damaged))


def _mutated(body: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut out, repeat or insert, once or a few times."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 30)))
        kind = rng.randrange(5)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start:end] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * (end - start)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end]
        else:
            data[start:start] = rng.randbytes(end - start)
    return bytes(data)


def test_thousands_of_damaged_files_are_refused_or_harmless() -> None:
    """Checksums are made right again, so that damage reaches the inner layers; what still decodes
    must be a whole model."""
    blob, rng = _small(), random.Random(20)
    body, text = blob[:-CHECKSUM_BYTES], json.dumps(_header(blob)).encode()
    refused = 0
    for trial in range(10_000):
        if trial % 2:
            hostile = _with_header(blob, _mutated(text, rng))
        else:
            hostile = _sealed(_mutated(body, rng))
        try:
            config, quantized = artifact.decode(hostile)
        except ArtifactError:
            refused += 1
            continue
        assert isinstance(config, TrainConfig)
        for name, weights in dequantize(quantized).items():
            stored = quantized.tensors[quantized.aliases.get(name, name)]
            assert tuple(weights.shape) == stored.shape
    assert refused > 8000


def test_arrays_of_a_decoded_artifact_cannot_be_written_to() -> None:
    _, quantized = artifact.decode(_small())
    codes = quantized.tensors["tok_emb.weight"].arrays["codes"]
    with pytest.raises(ValueError, match="read-only"):
        codes[0, 0] = np.int8(1)
