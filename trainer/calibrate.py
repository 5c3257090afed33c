"""GPTQ's calibration text: the next training batches, or rows that the model writes itself.

Never validation text. Both ways read the final weights and count against budget.train_seconds
(phase "calibrate"); quantize.reserve_seconds keeps the time free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.config.quantize import kind_of
from trainer.data.dataset import Dataset
from trainer.data.documents import BOS_ID
from trainer.data.loader import TrainLoader
from trainer.distributed import Group
from trainer.errors import DataError
from trainer.model.gpt import GPT
from trainer.quantize import coded_names
from trainer.quantize.calibration import Batches, collect_hessians, write_rows
from trainer.quantize.sensitivity import (
    MAX_TOKENS,
    MIN_PASSES,
    Sensitivities,
    measured_factors,
    row_sensitivities,
)


def check_calibration(config: TrainConfig, dataset: Dataset) -> None:
    """Raises DataError, before training, when the settings ask for more calibration text than the
    training set has."""
    quantize = config.quantize
    if quantize.method != "gptq" or quantize.calibration != "train":
        return
    if quantize.calibration_tokens > dataset.train_tokens:
        raise DataError(
            f"quantize.calibration_tokens = {quantize.calibration_tokens} is more than the "
            f"{dataset.train_tokens} training tokens of {dataset.dir}; lower it, or set "
            'quantize.calibration = "self"'
        )


def calibrate(
    config: TrainConfig, model: GPT, loader: TrainLoader, group: Group, prime: bool = False
) -> dict[str, Tensor]:
    """H of every matrix that becomes codes, by name. Runs on every rank together.

    Args:
        prime: only touch every kernel in its shape, so that nothing is compiled inside the clock.
    """
    batches: Batches
    if config.quantize.calibration == "train" and prime:
        batches = _one_of_each_shape(loader)
    elif config.quantize.calibration == "train":
        num_tokens = math.ceil(config.quantize.calibration_tokens / group.size)
        batches = _training_batches(loader, num_tokens)
    else:
        batches = _written_batches(config, model, group, prime)
    names = coded_names(dict(model.named_parameters()), config.quantize)
    return collect_hessians(model, names, batches, group)


def sensitivities(
    config: TrainConfig,
    model: GPT,
    loader: TrainLoader,
    hessians: Mapping[str, Tensor],
    group: Group,
    prime: bool = False,
) -> Sensitivities:
    """What quantize.allocate needs to know of the loss. Reads training batches, on every rank
    together; `prime` as above."""
    quantize = config.quantize
    names = [
        name
        for name in coded_names(dict(model.named_parameters()), quantize)
        if not (quantize.gate_bits and "gate" in name)
    ]
    pass_tokens = min(MAX_TOKENS, max(1, quantize.allocate_tokens // MIN_PASSES))
    if prime:
        batches = [next(_cut([batch], pass_tokens)) for batch in _one_of_each_shape(loader)]
    else:
        num_tokens = math.ceil(quantize.allocate_tokens / group.size)
        batches = list(_cut(_training_batches(loader, num_tokens), pass_tokens))
    seed = config.runtime.seed
    rows = row_sensitivities(model, model.logits, names, batches, hessians, group, seed)
    kinds = {name: kind_of(name) for name in names}
    factors = measured_factors(model, model.logits, kinds, rows, hessians, batches, group)
    return Sensitivities(rows, factors)


def _cut(batches: Batches, num_tokens: int) -> Iterator[Tensor]:
    """The inputs in pieces of whole rows with about so many tokens; all of a shape are alike."""
    for x_BT, _ in batches:
        rows = min(x_BT.size(0), max(1, num_tokens // x_BT.size(1)))
        for start in range(0, x_BT.size(0) - rows + 1, rows):
            yield x_BT[start : start + rows]


def _training_batches(loader: TrainLoader, num_tokens: int) -> Batches:
    """The next micro batches of this rank until they have so many tokens."""
    while num_tokens > 0:
        for x_BT, y_BT in loader.next_step():
            yield x_BT, y_BT
            num_tokens -= x_BT.numel()
            if num_tokens <= 0:
                return


def _one_of_each_shape(loader: TrainLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the next step, the first micro batch of each shape: a mix has several."""
    seen = set()
    for x_BT, y_BT in loader.next_step():
        if x_BT.shape not in seen:
            seen.add(x_BT.shape)
            yield x_BT, y_BT


def _written_batches(
    config: TrainConfig, model: GPT, group: Group, prime: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of data.seq_len tokens after BOS, in portions of a micro batch. The text depends on the
    seed and not on the number of ranks, as long as rounding does not tip a draw."""
    seq_len = config.data.seq_len
    num_rows = max(group.size, math.ceil(config.quantize.calibration_tokens / seq_len))
    generator = torch.Generator().manual_seed(config.runtime.seed)
    uniform_TB = torch.rand(
        1 if prime else seq_len, num_rows, dtype=torch.float64, generator=generator
    )
    first, end = num_rows * group.rank // group.size, num_rows * (group.rank + 1) // group.size
    micro_rows = max(1, config.data.micro_batch_tokens // seq_len)
    for start in range(first, end, micro_rows):
        own_TB = uniform_TB[:, start : min(start + micro_rows, end)].to(group.device)
        begins_B = torch.full((own_TB.size(1),), BOS_ID, device=group.device)
        rows_BT = write_rows(
            model.logits, begins_B, seq_len, config.quantize.calibration_temperature, own_TB
        )
        yield rows_BT[:, :-1], rows_BT[:, 1:]
