"""Other ways to orthogonalise than one polynomial repeated, and what may go before and after.

All are odd polynomials of degree five applied in turn, and differ in which, in how they are
computed, and in what bounds the singular values by 1 at the start. The table is
ORTHOGONALIZATIONS; `UpdateRule` is what Muon calls.

Legend: N matrices of R rows and C columns; x is their wide form, S the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import OptimConfig
from trainer.optim.newton_schulz import (
    NORM_EPS,
    Polynomial,
    applied,
    like,
    normalized,
    orthogonalize,
    quintic,
    wide,
)

POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Of parameter-golf #1344 and #1787: optimal one after the other for five iterations, with 2 %
to spare for what rounding adds to the largest singular value."""
POLAR_EXPRESS_PAPER: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""As printed, with nothing to spare; the last is the limit (https://arxiv.org/abs/2505.16932)."""
MARGIN = 1.05
"""How large the largest singular value may be at the start of "gram" and "turbo"."""
GRAM_ASPECT = 2
"""Longer side over shorter, above which working on the short side saves products."""
GRAM_RESTART = 2
"""The iteration before which the product so far is applied, and its Gram matrix computed anew."""
WITH_MARGIN: tuple[Polynomial, ...] = tuple(
    (a / MARGIN, b / MARGIN**3, c / MARGIN**5) for a, b, c in POLAR_EXPRESS_PAPER
)
GRAM = WITH_MARGIN[:5]
TURBO = WITH_MARGIN[1:]
"""The preconditioner stands in for the first polynomial. Parameter-golf #1089 took those of the
paper: in bf16 some matrices then ended with singular values of 2.5."""

Orthogonalize = Callable[[Tensor, int, torch.dtype], Tensor]
"""As `newton_schulz.orthogonalize`: stack, number of iterations, dtype of the products."""


def polar_express(stack_NRC: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """A polynomial of its own for each iteration: small singular values rise faster, and five take
    [0.01, 1] to [0.86, 1.15] where the plain iteration leaves [0.68, 1.21]. Fewer are the first."""
    return quintic(stack_NRC, POLAR_EXPRESS[:num_steps], dtype)


def gram(stack_NRC: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Gram Newton-Schulz (Dao-AILab, gram-newton-schulz): the same kind of iteration, worked out on
    X X^T and applied to X only twice.

    What a polynomial does to X it does to G = X X^T by multiplication from the left, so that the
    products of the iteration need the short side only: for C = 4 R, about 30 R^3 multiply-adds
    instead of 45. Rounding of G grows from one iteration to the next, and a G that is not positive
    would turn the iteration over: hence one restart, and fp16, whose steps are eight times finer,
    where bf16 is asked for. Matrices of aspect 2 and below take the same polynomials plainly.
    """
    polynomials = GRAM[:num_steps]
    precise = torch.float16 if dtype == torch.bfloat16 else dtype
    if max(stack_NRC.shape[1:]) <= GRAM_ASPECT * min(stack_NRC.shape[1:]):
        return quintic(stack_NRC, polynomials, precise).to(dtype)
    x = normalized(wide(stack_NRC), precise)
    for part in (polynomials[:GRAM_RESTART], polynomials[GRAM_RESTART:]):
        if part:
            x = _product(x @ x.mT, part) @ x
    return like(x, stack_NRC).to(dtype)


def _product(gram_NSS: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The matrix that does to X, from the left, what the polynomials in turn do: [N, S, S].

    With P = a I + Z and Z = b G + c G^2, X becomes P X and G becomes P G P.
    """
    whole_NSS: Tensor | None = None
    for place, (a, b, c) in enumerate(polynomials, 1):
        z_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        if whole_NSS is None:
            whole_NSS = z_NSS.clone()
            whole_NSS.diagonal(dim1=1, dim2=2).add_(a)
        else:
            whole_NSS = torch.baddbmm(whole_NSS, z_NSS, whole_NSS, beta=a)
        if place < len(polynomials):
            half_NSS = torch.baddbmm(gram_NSS, gram_NSS, z_NSS, beta=a)
            gram_NSS = torch.baddbmm(half_NSS, z_NSS, half_NSS, beta=a)
    assert whole_NSS is not None
    return whole_NSS


def turbo(stack_NRC: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Turbo-Muon (https://arxiv.org/abs/2512.04632; parameter-golf #1089): each row of the wide
    form is divided by the root of the sum of |X X^T| over its row.

    Then no singular value is above 1 (Gershgorin), as after division by the norm, but most are
    nearer to 1, which saves an iteration. The rows' scales change what is orthogonalised: it is
    the polar factor of the scaled matrix.
    """
    # Normalised before, so that the Gram matrix neither overflows nor vanishes in half precision.
    x = normalized(wide(stack_NRC), dtype)
    gram_NSS = x @ x.mT
    scale_NS = gram_NSS.float().abs().sum(2).add_(NORM_EPS**2).rsqrt_().to(dtype)
    x = x * scale_NS[:, :, None]
    gram_NSS = gram_NSS * scale_NS[:, :, None] * scale_NS[:, None, :]
    x = applied(x, gram_NSS, TURBO[0])
    for polynomial in TURBO[1:num_steps]:
        x = applied(x, x @ x.mT, polynomial)
    return like(x, stack_NRC)


ORTHOGONALIZATIONS: dict[str, Orthogonalize] = {
    "newton_schulz": orthogonalize,
    "polar_express": polar_express,
    "gram": gram,
    "turbo": turbo,
}
"""By optim.orthogonalization."""


@dataclass(frozen=True)
class UpdateRule:
    """From momentum to update, for a stack of matrices. The default is plain Muon."""

    orthogonalization: str = "newton_schulz"
    """Key of ORTHOGONALIZATIONS."""
    row_eps: float | None = None
    """MuonEq-R: rows are brought to norm 1 before, a norm being taken for at least this; None =
    off."""
    post_norm: str = "none"
    """What is brought to norm 1 afterwards: "row", "col", "row_col"."""
    averages: bool = False
    """Momentum is a running average, not a sum."""
    variance_beta: float = 0.0
    """What remains of a neuron's second moment after a step; 0 = off."""
    is_cautious: bool = False
    """Weight decay acts only where the update takes a weight towards 0."""

    @classmethod
    def from_config(cls, optim: OptimConfig) -> UpdateRule:
        """What the settings say."""
        row_eps = optim.muon_row_eps if optim.muon_row_normalize else None
        return cls(
            optim.orthogonalization,
            row_eps,
            optim.muon_post_norm,
            optim.muon_momentum_average,
            optim.muon_variance_beta,
            optim.muon_cautious_decay,
        )

    def nesterov(self, momentum_NRC: Tensor, gradient_NRC: Tensor, mu: float) -> None:
        """Take gradients into the momentum; what is to be orthogonalised takes their place."""
        if self.averages:
            momentum_NRC.lerp_(gradient_NRC, 1 - mu)
            gradient_NRC.lerp_(momentum_NRC, mu)
        else:
            momentum_NRC.mul_(mu).add_(gradient_NRC)
            gradient_NRC.add_(momentum_NRC, alpha=mu)

    def __call__(self, stack_NRC: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
        """Updates before learning rate and sign, [N, R, C] in `dtype`."""
        if self.row_eps is not None:
            stack_NRC = stack_NRC / _norm(stack_NRC, 2).clamp(min=self.row_eps)
        update_NRC = ORTHOGONALIZATIONS[self.orthogonalization](stack_NRC, num_steps, dtype)
        for axis in POST_NORM_AXES[self.post_norm]:
            update_NRC = (update_NRC / (_norm(update_NRC, axis) + NORM_EPS)).to(dtype)
        return update_NRC


PLAIN = UpdateRule()
POST_NORM_AXES: dict[str, tuple[int, ...]] = {
    "none": (),
    "row": (2,),
    "col": (1,),
    "row_col": (2, 1),
}
"""Axes over which norms are taken, in turn, by optim.muon_post_norm."""


def _norm(stack_NRC: Tensor, axis: int) -> Tensor:
    """Norms along an axis, which stays with length 1; fp32 at least."""
    precise = torch.promote_types(stack_NRC.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(stack_NRC, dim=axis, keepdim=True, dtype=precise)
    return norm
