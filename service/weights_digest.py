"""One name for the weights that an artifact decodes to, whatever bytes they are packed in.

Equal digests, equal weights, to the last bit: on any machine, and under any codec.
"""

from __future__ import annotations

import hashlib

from trainer.quantize import QuantizedState
from trainer.quantize.schemes import scheme_named


def weights_digest(quantized: QuantizedState) -> str:
    """Hex SHA-256 over the tensors in order of their names: "name dtype shape" and then the numbers
    as they are computed with, in C order. One tensor is decoded at a time."""
    digest = hashlib.sha256()
    for name, stored in sorted(quantized.tensors.items()):
        values = scheme_named(stored.scheme).decode(stored.arrays, stored.shape)
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
