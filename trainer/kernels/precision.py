"""The type in which sums and exponentials are formed, whatever the tensors' own."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> torch.dtype:
    """fp32, or fp64 where the tensor is."""
    return torch.promote_types(x.dtype, torch.float32)
