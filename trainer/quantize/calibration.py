"""Collects, for GPTQ, the second moments of what each matrix really multiplies: H = X^T X / n.

While a model runs, the weights in question are replaced by tensors that remember their names and
tell what they are multiplied with. So the inputs are the real ones whatever the model does on the
way (matrices joined for one product, a head tied to the embedding, a block visited several times),
and the model needs no second forward pass written for calibration. The model runs uncompiled.

Legend: B rows, T tokens, C input width of a matrix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.distributed import Group

Batches = Iterable[tuple[Tensor, Tensor]]
"""(x_BT, y_BT) of one rank, as the loader gives them."""

_RENAMING = {"to", "type", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach"}
"""Methods after which a matrix is still the same matrix."""
_SUM = {"add", "__add__", "__radd__"}
"""A matrix plus a correction of the same shape (LoRA) meets the inputs that the matrix meets."""


class HessianSums:
    """Sums of x x^T by the names of the matrices that x was multiplied with."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self.num_tokens = 0

    def add(self, names: tuple[str, ...], inputs: Tensor) -> None:
        """Book the inputs, [..., C], of the matrices `names`, which were joined in one product."""
        flat_NC = inputs.detach().reshape(-1, inputs.size(-1)).float()
        width = flat_NC.size(1)
        sum_CC = self._sums.get(names)
        if sum_CC is None:
            sum_CC = self._sums[names] = torch.zeros(width, width, device=flat_NC.device)
        sum_CC.addmm_(flat_NC.T, flat_NC)

    def means(self, group: Group) -> dict[str, Tensor]:
        """H of each matrix over all ranks' tokens, [C, C] fp32; matrices that were always joined
        share one tensor. A collective: every rank must have seen the same matrices."""
        count = torch.tensor(float(self.num_tokens), dtype=torch.float64, device=group.device)
        num_tokens = float(group.all_reduce_sum_(count))
        hessians: dict[str, Tensor] = {}
        for names, sum_CC in self._sums.items():
            mean_CC = group.all_reduce_sum_(sum_CC) / num_tokens
            for name in names:
                hessians[name] = hessians[name] + mean_CC if name in hessians else mean_CC
        return hessians


class _Observed(Tensor):
    """A weight that reports its inputs. `parameter_names` says which parameters it consists of (not
    `names`, which torch 2.11 reserves for dimensions)."""

    parameter_names: tuple[str, ...]
    sums: HessianSums

    @classmethod
    def of(cls, weight: Tensor, names: tuple[str, ...], sums: HessianSums) -> _Observed:
        observed: _Observed = weight.detach().as_subclass(cls)
        observed.parameter_names, observed.sums = names, sums
        return observed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        names, sums = _source(func, args)
        if func is F.linear:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            inputs = kwargs["input"] if "input" in kwargs else args[0]
            if isinstance(weight, _Observed):
                weight.sums.add(weight.parameter_names, inputs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad:
            result = result.detach()
        if names and sums is not None:
            return cls.of(result.as_subclass(Tensor), names, sums)
        return result.as_subclass(Tensor) if isinstance(result, _Observed) else result


def _source(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[tuple[str, ...], HessianSums | None]:
    """The parameters that the result of a call still stands for, if it does."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else None
    if name in _RENAMING and isinstance(first, _Observed):
        return first.parameter_names, first.sums
    if name in _SUM and isinstance(args[1], Tensor):
        for one, other in (args[:2], args[1::-1]):
            if isinstance(one, _Observed) and one.shape == other.shape:
                return one.parameter_names, one.sums
    if name in ("cat", "concat") and isinstance(first, (tuple, list)) and len(args) == 1:
        parts = [part for part in first if isinstance(part, _Observed)]
        return tuple(n for part in parts for n in part.parameter_names), parts[0].sums
    return (), None


def collect_hessians(
    model: nn.Module, names: Sequence[str], batches: Batches, group: Group
) -> dict[str, Tensor]:
    """Run the model on this rank's batches; returns H of every matrix in `names` that was a factor
    of a linear product. Runs on every rank together; all get the same. The model is not changed.

    Args:
        model: called as model(x_BT, y_BT, reduction="none").
        names: parameters of the model.
    """
    sums = HessianSums()
    parameters = dict(model.named_parameters())
    observed: dict[str, Tensor] = {
        name: _Observed.of(parameters[name], (name,), sums) for name in names
    }
    with torch.no_grad():
        for x_BT, y_BT in batches:
            torch.func.functional_call(model, observed, (x_BT, y_BT), {"reduction": "none"})
            sums.num_tokens += x_BT.numel()
    return sums.means(group)


def write_rows(
    logits: Callable[[Tensor], Tensor],
    first_tokens_B: Tensor,
    num_tokens: int,
    temperature: float,
    uniform_TB: Tensor,
) -> Tensor:
    """Rows that a model writes itself, [B, num_tokens + 1]; self-generated calibration, #1019.

    Every forward pass has one shape, [B, num_tokens], so one kernel serves the whole text; what
    lies after the last token written is not seen by a causal model.

    Args:
        logits: [B, T] -> [B, T, V].
        uniform_TB: numbers in [0, 1), one for each token to write: equal numbers, equal text.
    """
    rows_BT = torch.zeros(
        len(first_tokens_B), num_tokens + 1, dtype=torch.int64, device=first_tokens_B.device
    )
    rows_BT[:, 0] = first_tokens_B
    with torch.no_grad():
        for position in range(len(uniform_TB)):
            now_BV = logits(rows_BT[:, :-1])[:, position].double() / temperature
            below_BV = now_BV.softmax(-1).cumsum(-1)
            drawn_B1 = torch.searchsorted(below_BV, uniform_TB[position, :, None], right=True)
            rows_BT[:, position + 1] = drawn_B1[:, 0].clamp(max=now_BV.size(-1) - 1)
    return rows_BT
