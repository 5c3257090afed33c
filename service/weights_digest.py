"""One name for the weights that an artifact decodes to, whatever bytes they are packed in.

Equal digests, equal weights, to the last bit: on any machine, and under any codec.
"""

from __future__ import annotations

import hashlib

from trainer.quantize import QuantizedState
from trainer.quantize.schemes import scheme_named


def weights_digest(quantized: QuantizedState) -> str:
    """Hex SHA-256 over the tensors in order of their names, and over the names that are tied.

    A tensor is "name dtype shape\\n" and its numbers as they are computed with, little-endian, in C
    order; a tied name is "name = target\\n". One tensor is decoded at a time.
    """
    digest = hashlib.sha256()
    for name, stored in sorted(quantized.tensors.items()):
        values = scheme_named(stored.scheme).decode(stored.arrays, stored.shape)
        values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
        digest.update(f"{name} {values.dtype.str} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    for name, target in sorted(quantized.aliases.items()):
        digest.update(f"{name} = {target}\n".encode())
    return digest.hexdigest()
