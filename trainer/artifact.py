"""The packed model: quantised weights <-> one file, whose length is what the byte budget counts.

    magic (8)  version (2)  header: packed size (4), size (4)  header  streams ...  checksum (16)

All integers little-endian. The header is brotli-packed JSON: the run's settings, then name, scheme
and shape of every tensor, tied names, and the packed size of each stream. There is one stream per
element type (codes, scales, floats), because each has its own statistics, and under
compress.grouping one per role of the codes. Sizes of arrays are not stored: they follow from scheme
and shape, so they cannot disagree.

The file comes from strangers as often as from us: nothing in it is executed, no name in it is a
path, and every size is checked before memory is taken. Never pickle, never torch.save.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.compress import CODECS, compress, decompress
from trainer.config import TrainConfig
from trainer.errors import ArtifactError
from trainer.quantize import SCHEMES, ArraySpec, QuantizedState, find_scheme, scheme_named
from trainer.streams import Layouts, gather, itemsize, scatter, stream_sizes

MAGIC = b"\x89CADDIE\n"
VERSION = 1
SAFE_BYTES = 1 << 28
"""An artifact may always unpack to this much,"""
SAFE_RATIO = 64
"""and otherwise to this many times its own size; trained weights shrink by 1.1 to 8."""

_PREFIX = struct.Struct("<8sHII")
_CHECKSUM_BYTES = 16
_MAX_HEADER_BYTES = 1 << 19
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Size = Annotated[int, Field(ge=0, le=1 << 48)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=200)]


class _Header(BaseModel):
    """What the file says about itself; strict, so that nothing is guessed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any]
    tensors: list[tuple[Name, str, Annotated[list[Size], Field(max_length=8)]]]
    aliases: dict[Name, Name]
    streams: dict[str, Size]
    """Name of a stream -> packed bytes, in the order of the file."""


def encode(quantized: QuantizedState, config: TrainConfig) -> bytes:
    """The file's content; equal input gives equal bytes on every machine.

    Settings at their defaults are left out, and so are paths: where things lay is nobody's business
    and must not change the size.
    """
    contents = gather(quantized, config.compress.grouping)
    streams = {
        stream: compress(data, config.compress, itemsize(stream))
        for stream, data in contents.items()
    }
    table = {
        "tensors": [(name, t.scheme, t.shape) for name, t in quantized.tensors.items()],
        "aliases": dict(quantized.aliases),
        "streams": {stream: len(packed) for stream, packed in streams.items()},
    }
    rest = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    text = f'{{"config":{config.text_without_places()},{rest[1:]}'.encode()
    assert len(text) <= _MAX_HEADER_BYTES, "too many tensors for one artifact"
    packed_header = CODECS["brotli"].compress(text, 11)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(packed_header), len(text))
    body = b"".join([prefix, packed_header, *streams.values()])
    return body + _checksum(body)


def decode(blob: bytes) -> tuple[TrainConfig, QuantizedState]:
    """Inverse of encode. Arrays are read-only views of the unpacked streams.

    Raises: ArtifactError for anything that encode did not write, whatever it is.
    """
    packed_header, text_size, streams = _split(blob)
    header, config = _read_header(packed_header, text_size)
    layouts = _checked_layouts(header, max(SAFE_BYTES, SAFE_RATIO * len(blob)))
    if sum(header.streams.values()) != len(streams):
        raise ArtifactError(
            f"artifact: its streams take {len(streams):,} bytes where the header says "
            f"{sum(header.streams.values()):,}; copy it again"
        )
    contents = _unpack(header, config, layouts, streams)
    schemes = {name: (scheme, tuple(shape)) for name, scheme, shape in header.tensors}
    tensors = scatter(schemes, layouts, contents, config.compress.grouping)
    return config, QuantizedState(tensors, dict(header.aliases))


def weights_digest(quantized: QuantizedState) -> str:
    """Hex SHA-256 over the decoded weights in the order of their names: "name dtype shape", then
    the numbers as they are computed with, in C order. Equal digests, equal models, to the last
    bit, however they are packed. One tensor is decoded at a time. Raises ArtifactError."""
    digest = hashlib.sha256()
    for name, stored in sorted(quantized.tensors.items()):
        weights = scheme_named(stored.scheme).decode(stored.arrays, stored.shape)
        digest.update(f"{name} {weights.dtype.str} {weights.shape}".encode())
        digest.update(weights.tobytes())
    return digest.hexdigest()


def write(path: Path, blob: bytes) -> None:
    """Put the whole file in place or leave everything as it was; survives a power cut.

    Raises: ArtifactError with the remedy, in particular when the device is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the fault that is being reported says more
            partial.unlink(missing_ok=True)
        raise ArtifactError(_write_fault(path, len(blob), error)) from None


def read(path: Path) -> bytes:
    """The content of a file that `write` wrote. Raises ArtifactError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ArtifactError(f"{path}: not a regular file; name the artifact itself")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def sha256(blob: bytes) -> str:
    """Hex digest that names the artifact."""
    return hashlib.sha256(blob).hexdigest()


def _split(blob: bytes) -> tuple[bytes, int, memoryview]:
    """Packed header, its unpacked size, and the bytes of all streams."""
    if blob[: len(MAGIC)] != MAGIC:
        raise ArtifactError("artifact: it does not begin like one; name the right file")
    if len(blob) < _PREFIX.size + _CHECKSUM_BYTES:
        raise ArtifactError(f"artifact: cut short at {len(blob)} bytes; copy it again")
    _, version, packed_size, text_size = _PREFIX.unpack_from(blob)
    if version != VERSION:
        raise ArtifactError(
            f"artifact: version {version}, this code reads {VERSION}; use the code it came with"
        )
    body = memoryview(blob)[:-_CHECKSUM_BYTES]
    if _checksum(body) != blob[-_CHECKSUM_BYTES:]:
        raise ArtifactError("artifact: its checksum is wrong, it is damaged; copy it again")
    if text_size > _MAX_HEADER_BYTES or packed_size > len(body) - _PREFIX.size:
        raise ArtifactError(
            f"artifact: the sizes of its header, {packed_size:,} and {text_size:,} bytes, are "
            "impossible; copy it again"
        )
    end = _PREFIX.size + packed_size
    return bytes(body[_PREFIX.size : end]), text_size, body[end:]


def _read_header(packed: bytes, size: int) -> tuple[_Header, TrainConfig]:
    try:
        header = _Header.model_validate_json(CODECS["brotli"].decompress(packed, size))
        return header, TrainConfig.model_validate(header.config)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"][:4])
        raise ArtifactError(
            f"artifact: {error.error_count()} faults in its header, first {where[:200]}: "
            f"{fault['msg'][:200]}; written by another version of the code, or damaged"
        ) from None


def _checked_layouts(header: _Header, max_bytes: int) -> dict[str, dict[str, ArraySpec]]:
    """Tensor name -> its arrays, after every rule on names and sizes has been checked."""
    layouts: dict[str, dict[str, ArraySpec]] = {}
    total_bytes = 0
    for name, scheme, shape in header.tensors:
        if name in layouts:
            raise ArtifactError(f"artifact: tensor {name} is stored twice; pack the model again")
        known = find_scheme(scheme)
        if known is None:
            raise ArtifactError(
                f"artifact: tensor {name} has the scheme {scheme[:80]!r}, this code knows "
                f"{', '.join(SCHEMES)}; use the code it came with"
            )
        layouts[name] = known.layout(tuple(shape))
        total_bytes += sum(_bound(spec) for spec in layouts[name].values())
        if total_bytes > max_bytes:
            raise ArtifactError(
                f"artifact: tensor {name} of shape {shape} brings it above {max_bytes:,} bytes "
                "unpacked, more than a file of this size can mean; do not trust it"
            )
    for name, target in header.aliases.items():
        if name in layouts or target not in layouts:
            raise ArtifactError(
                f"artifact: {name} is tied to {target}, which breaks its table of tensors; "
                "pack the model again"
            )
    return layouts


def _unpack(
    header: _Header, config: TrainConfig, layouts: Layouts, streams: memoryview
) -> dict[str, memoryview]:
    """Name of a stream -> unpacked content."""
    sizes = stream_sizes(layouts, config.compress.grouping)
    if list(sizes) != list(header.streams):
        raise ArtifactError(
            f"artifact: its streams {', '.join(header.streams)[:80]} are not those of its "
            f"tensors, {', '.join(sizes)}; pack the model again"
        )
    contents: dict[str, memoryview] = {}
    start = 0
    for stream, packed_size in header.streams.items():
        packed = bytes(streams[start : start + packed_size])
        data = decompress(packed, config.compress, sizes[stream], itemsize(stream))
        if stream.startswith("<f") and not np.isfinite(np.frombuffer(data, stream)).all():
            raise ArtifactError(
                f"artifact: some of its {stream} numbers are not finite; pack the model again"
            )
        contents[stream] = memoryview(data)
        start += packed_size
    return contents


def _bound(spec: ArraySpec) -> int:
    """Bytes, with empty axes counted as one: numpy cannot shape an array beyond its own limits."""
    return ArraySpec(spec.dtype, tuple(max(size, 1) for size in spec.shape)).nbytes


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _sync_folder(folder: Path) -> None:
    """Make the new name of the file last, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_fault(path: Path, needed: int, error: OSError) -> str:
    if error.errno not in _FULL_DISK:
        return f"{path}: cannot be written ({error.strerror}); choose another folder"
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return (
        f"{path}: no space left on the device: {needed:,} bytes are needed, {free:,} are free "
        f"({error.strerror}); free some there or choose a folder on another device. Nothing was "
        "written, and an earlier artifact of that name is untouched"
    )
