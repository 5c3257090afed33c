"""Root-mean-square normalisation without gain."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square. Fixed, because the library's default depends on the input's dtype."""


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + EPS) over the last axis, in the dtype of x; sums run in fp32 or more."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)
