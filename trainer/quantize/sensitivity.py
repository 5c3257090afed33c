"""How much the loss minds an error in each row of a matrix: factors of a second-order proxy.

For an error E of the weights W, with inputs x and the loss's gradient g at the outputs,

    loss(W + E) - loss(W)  is about  1/2 mean (g^T E x)^2  =  1/2 sum_r g_r (E A E^T)_rr

where A = mean x x^T is GPTQ's Hessian and g_r the mean square of g at output r (the Fisher matrix
as a Kronecker product with a diagonal left factor). g_r is never seen itself: the mean square of
the weights' own gradient is F_rc = g_r A_cc, so g_r = sum_c F_rc / trace A, which counts every
visit and every role of a shared matrix. A table without A has g_r = mean_c F_rc and A = 1.

Targets are drawn from the model, not read: then tokens are independent, the square of a whole
batch's gradient is the sum of its tokens' squares, and F is the Gauss-Newton matrix. What the
diagonal leaves out is put right by one factor per kind of matrix, measured with rounded weights.

Legend: R rows, C columns, B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed import Group
from trainer.quantize.per_row import as_rows

MAX_TOKENS = 16_384
"""Of a backward pass: the model runs uncompiled, so it needs more memory than in training."""
MIN_PASSES = 16
"""Each pass is one sample of every row's factor (times the columns of the row)."""
FACTOR_BOUNDS = (0.2, 5.0)
"""A measured factor beyond these says that the measurement failed."""
PROBE_WIDTH = 0.25
"""Step of the rounding that factors are measured with, in standard deviations of a row."""


@dataclass(frozen=True)
class Sensitivities:
    """By name of a matrix."""

    rows: Mapping[str, Tensor]
    """g_r from either half of the passes, [2, R], so that what is chosen by one half can be judged
    by the other."""
    factors: Mapping[str, float]
    """True increase of the loss over the proxy's, for the kind of the matrix."""


def row_sensitivities(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    names: Sequence[str],
    batches: Iterable[Tensor],
    hessians: Mapping[str, Tensor],
    group: Group,
    seed: int,
) -> dict[str, Tensor]:
    """g_r of each matrix over all ranks' batches, [2, R], nats per token and squared output. Runs
    on every rank together; a matrix that the loss does not depend on gets zeros.

    Args:
        model: called as model(x_BT, y_BT, reduction="none").
        logits: [B, T] -> [B, T, V].
        batches: tokens [B, T] of this rank, at least two over all ranks.
    """
    parameters = dict(model.named_parameters())
    used = [parameters[name] for name in names]
    generator = torch.Generator(group.device).manual_seed(seed + group.rank)
    squares = [torch.zeros(2, as_rows(p).size(0), device=p.device) for p in used]
    counts = torch.zeros(2, dtype=torch.float64, device=group.device)
    for index, tokens_BT in enumerate(batches):
        half = (index * group.size + group.rank) % 2
        targets_BT = _drawn(logits, tokens_BT, generator)
        loss = model(tokens_BT, targets_BT, reduction="none").sum()
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        for square_2R, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                square_2R[half] += as_rows(gradient).square().sum(1)
        counts[half] += tokens_BT.numel()
    group.all_reduce_sum_(counts)
    rows = {}
    for name, square_2R in zip(names, squares, strict=True):
        group.all_reduce_sum_(square_2R)
        weights_RC = as_rows(parameters[name])
        trace = hessians[name].diagonal().sum() if name in hessians else weights_RC.size(1)
        rows[name] = square_2R / counts.clamp(min=1).float()[:, None] / trace
    return rows


def _drawn(
    logits: Callable[[Tensor], Tensor], tokens_BT: Tensor, generator: torch.Generator
) -> Tensor:
    """Targets from the model's own distribution."""
    with torch.no_grad():
        shares_NV = logits(tokens_BT).flatten(0, 1).softmax(-1)
        return torch.multinomial(shares_NV, 1, generator=generator).view_as(tokens_BT)


def increase(
    row_factors_R: Tensor, weights_RC: Tensor, decoded_RC: Tensor, hessian_CC: Tensor | None
) -> float:
    """The proxy: nats per token that the loss grows by when `decoded` stands for `weights`."""
    error_RC = (weights_RC - decoded_RC).double()
    moved_RC = error_RC if hessian_CC is None else error_RC @ hessian_CC.double()
    return 0.5 * float(((moved_RC * error_RC).sum(1) * row_factors_R).sum())


def measured_factors(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    kinds: Mapping[str, str],
    rows: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    group: Group,
) -> dict[str, float]:
    """Sensitivities.factors: all matrices of a kind are rounded, and come back after each batch.
    Runs on every rank together.

    The increase is measured as the divergence from the plain model, which is what the loss grows by
    where its gradient is 0, without the noise of targets.

    Args:
        kinds: of every matrix, by name.
        batches: tokens [B, T] of this rank.
    """
    parameters = dict(model.named_parameters())
    names_of = {k: [name for name in kinds if kinds[name] == k] for k in kinds.values()}
    rounded = {name: _probe(parameters[name]) for name in kinds}
    found = torch.zeros(len(names_of) + 1, dtype=torch.float64, device=group.device)
    with torch.no_grad():
        for tokens_BT in batches:
            plain_BTV = logits(tokens_BT).log_softmax(-1)
            for place, names in enumerate(names_of.values()):
                with _replaced(parameters, {name: rounded[name] for name in names}):
                    now_BTV = logits(tokens_BT).log_softmax(-1)
                found[place] += (plain_BTV.exp() * (plain_BTV - now_BTV)).sum(-1).double().sum()
            found[-1] += tokens_BT.numel()
    *nats, count = group.all_reduce_sum_(found).tolist()
    by_kind = {}
    for (kind, names), measured in zip(names_of.items(), nats, strict=True):
        expected = sum(
            increase(
                rows[name].mean(0),
                as_rows(parameters[name].detach()),
                as_rows(rounded[name]),
                hessians.get(name),
            )
            for name in names
        )
        low, high = FACTOR_BOUNDS
        by_kind[kind] = min(max(measured / count / expected, low), high) if expected > 0 else 1.0
    return {name: by_kind[kind] for name, kind in kinds.items()}


def _probe(weight: Tensor) -> Tensor:
    """The weight on a plain grid."""
    weights_RC = as_rows(weight.detach())
    scale_R1 = PROBE_WIDTH * weights_RC.std(1, keepdim=True).clamp(min=1e-12)
    return ((weights_RC / scale_R1).round() * scale_R1).reshape(weight.shape)


@contextmanager
def _replaced(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    kept = {name: parameters[name].detach().clone() for name in values}
    for name, value in values.items():
        parameters[name].copy_(value)
    yield
    for name, value in kept.items():
        parameters[name].copy_(value)
