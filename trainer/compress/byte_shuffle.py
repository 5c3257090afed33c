"""Groups bytes of equal significance, so that an entropy coder sees one distribution at a time."""

from __future__ import annotations

import numpy as np


def shuffle(data: bytes, itemsize: int) -> bytes:
    """All first bytes of the items, then all second bytes, and so on.

    Args:
        itemsize: bytes of an item; divides the length of data.
    """
    return np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()


def unshuffle(data: bytes, itemsize: int) -> bytes:
    """Inverse of shuffle."""
    return np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()
