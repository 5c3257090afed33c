"""Quantisation-aware training: gradients are taken at the weights that the artifact will hold.

With a straight-through estimator the forward pass uses Q(W) and the backward pass treats Q as the
identity. W is constant during an optimiser step, however many micro batches that has. So Q(W) is
computed once a step and lies in the parameter while the batches run; then W is put back and the
optimiser updates it with the gradient found at Q(W). Nothing of it is in the compiled graph: it
cannot be folded away there (which happened to the "late QAT" of several published runs), and
starting it late compiles nothing anew.

Q is the exporter's own code, so the grid is the exporter's: bits, clip, rounding and fp16 scales.
Published versions used W + (Q(W) - W), the same up to rounding, on a grid of their own, which
widened the gap that they were to close (#675).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.config import QuantizeConfig
from trainer.quantize import coded_names
from trainer.quantize.per_row import PerRow
from trainer.quantize.rules import choose_scheme, count_layers
from trainer.quantize.schemes import scheme_named


class QuantizationAware:
    """Switches a model between its weights and what the artifact would make of them."""

    def __init__(self, model: nn.Module, config: QuantizeConfig) -> None:
        self._config = config
        self._coded: list[tuple[nn.Parameter, PerRow, QuantizeConfig]] = []
        if config.qat_start >= 1:
            return
        parameters = dict(model.named_parameters())
        num_layers = count_layers(parameters)
        for name in coded_names(parameters, config):
            parameter = parameters[name]
            scheme = scheme_named(choose_scheme(name, tuple(parameter.shape), config, num_layers))
            assert isinstance(scheme, PerRow)
            self._coded.append((parameter, scheme, config.for_tensor(name)))

    def starts_by(self, progress: float) -> bool:
        """Whether the step at this share of the budget is quantisation-aware."""
        return self._config.qat_start < 1 and progress >= self._config.qat_start

    @contextmanager
    def weights(self, progress: float) -> Iterator[None]:
        """Inside the block the model holds Q(W), after it W again, bit for bit. Forward and
        backward passes go inside, everything that reads or writes weights outside."""
        if not self.starts_by(progress):
            yield
            return
        with torch.no_grad():
            masters = [parameter.detach().clone() for parameter, _, _ in self._coded]
            for parameter, scheme, config in self._coded:
                parameter.copy_(scheme.fake(parameter.detach(), config))
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _, _), master in zip(self._coded, masters, strict=True):
                    parameter.copy_(master)
