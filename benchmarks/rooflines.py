"""What this device can do at most: a large matrix product and a large copy, measured.

Figures beside every recipe of `python -m benchmarks` are shares of these, not of a data sheet.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.timing import median_seconds

SIDES = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices."""
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}


def measure_rooflines(device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """{"dtype", "matrix_flops" a second, "copy_bytes" a second, read and written both counted}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = SIDES[device.type]
    # Random and not zeros: the clock of a GPU depends on what it multiplies.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matrix_s = median_seconds(lambda: torch.matmul(a, b, out=product), repeats, device)
    source = torch.randint(255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), repeats, device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_side": side,
        "matrix_flops": 2 * side**3 / matrix_s,
        "copy_bytes": 2 * source.numel() / copy_s,
    }
