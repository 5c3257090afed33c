"""Trained weights as a file, so that a later run starts where this one stopped training.

    magic (8)  header size (4)  header  weights ...  checksum (16)

Integers little-endian. The header is JSON: the run's settings, then name, element type and shape of
every tensor; the weights follow in that order, as they are. Nothing in the file is executed, no
name in it is a path, and every size is checked before memory is taken. Loads without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config import TrainConfig
from trainer.errors import ArtifactError, ConfigError

MAGIC = b"\x89CADDIEW"
_PREFIX = struct.Struct("<8sI")
_CHECKSUM_BYTES = 16
_MAX_HEADER_BYTES = 1 << 20

Size = Annotated[int, Field(ge=0, le=1 << 40)]
DType = Literal["<f4", "<i8", "|u1"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=200)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any]
    tensors: list[tuple[Name, DType, Annotated[list[Size], Field(max_length=8)]]]


def pack(weights: Mapping[str, np.ndarray], config: TrainConfig) -> bytes:
    """The file's content. Real numbers become fp32, whole ones int64, bytes stay bytes; where the
    data lay is left out."""
    return b"".join(_parts(weights, config))


def write(path: Path, weights: Mapping[str, np.ndarray], config: TrainConfig) -> None:
    """Put `pack`'s content in place of the file or leave everything as it was; survives a power
    cut, and needs no memory for a second copy of the weights. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for part in _parts(weights, config):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the fault that is being reported says more
            partial.unlink(missing_ok=True)
        raise


def _parts(weights: Mapping[str, np.ndarray], config: TrainConfig) -> Iterator[bytes | memoryview]:
    arrays = {name: np.asarray(array, _dtype(array), order="C") for name, array in weights.items()}
    header = _Header(
        config=config.without_places(),
        tensors=[(name, _dtype(array), list(array.shape)) for name, array in arrays.items()],
    )
    text = header.model_dump_json().encode()
    checksum = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    bodies = (_raw(array) for array in arrays.values() if array.size)
    parts: tuple[bytes | memoryview, ...] = (_PREFIX.pack(MAGIC, len(text)), text, *bodies)
    for part in parts:
        checksum.update(part)
        yield part
    yield checksum.digest()


def _raw(array: np.ndarray) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def read_config(path: Path) -> TrainConfig:
    """The settings that a file's weights were trained with; the weights are not read.

    Raises: ArtifactError when there is no such file or it is something else.
    """
    _check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(_PREFIX.size)
            text = file.read(min(_header_size(path, head), _MAX_HEADER_BYTES))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return _config(path, _parsed(path, text))


def read(path: Path) -> dict[str, np.ndarray]:
    """The weights by name, read-only. Raises ArtifactError."""
    _check_regular(path)
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    start = _PREFIX.size + _header_size(path, blob)
    header = _parsed(path, blob[_PREFIX.size : start])
    body = memoryview(blob)[:-_CHECKSUM_BYTES]
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in header.tensors]
    if start + sum(sizes) != len(body) or _checksum(body) != blob[-_CHECKSUM_BYTES:]:
        raise ArtifactError(f"{path}: cut short or damaged; copy it again")
    weights = {}
    for (name, dtype, shape), size in zip(header.tensors, sizes, strict=True):
        weights[name] = np.frombuffer(body[start : start + size], dtype).reshape(shape)
        start += size
    return weights


def check_fits(
    path: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ConfigError that names what the file has and what the settings ask for.

    Args:
        found: shapes by name, of the file; `wanted` those of the model.
    """
    faults = [
        f"source.checkpoint = {path} has {_shaped(name, found)} where the settings of model.* "
        f"ask for {_shaped(name, wanted)}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]
    if faults:
        more = f" and {len(faults) - 1} more tensors differ" if len(faults) > 1 else ""
        raise ConfigError(f"{faults[0]}{more}; give the settings that it was trained with")


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise ArtifactError(f"{path}: not a regular file; name the checkpoint itself")


def _shaped(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{name} of shape {list(shapes[name])}" if name in shapes else f"no {name}"


def _dtype(array: np.ndarray) -> DType:
    if array.dtype == np.uint8:
        return "|u1"
    return "<f4" if array.dtype.kind == "f" else "<i8"


def _header_size(path: Path, head: bytes) -> int:
    if len(head) < _PREFIX.size or head[: len(MAGIC)] != MAGIC:
        raise ArtifactError(
            f"{path}: no checkpoint; name a file that runtime.save_checkpoint = true wrote"
        )
    return int(_PREFIX.unpack_from(head)[1])


def _parsed(path: Path, text: bytes) -> _Header:
    try:
        return _Header.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]["msg"][:200]
        raise ArtifactError(f"{path}: its header is damaged ({fault}); copy it again") from None


def _config(path: Path, header: _Header) -> TrainConfig:
    try:
        return TrainConfig.from_dict(header.config)
    except ConfigError as error:
        raise ArtifactError(
            f"{path}: written by another version of the code, or damaged: {str(error)[:300]}"
        ) from None


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
