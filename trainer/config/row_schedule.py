"""Row lengths that change in the course of a run: the text form of data.seq_len_schedule.

"1024@0.1,2048@0.7,3072@1.0" is rows of 1024 tokens until a tenth of the budget is spent, of 2048
until seven tenths, then of 3072 (parameter-golf #2014). Every step has the same tokens, cut into
rows of the length of the moment, so that only the context grows. Loads without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from trainer.mix import DataSettings as MixSettings

STAGE = re.compile(r"(\d+)@(\d+(?:\.\d+)?|\.\d+)")


class DataSettings(MixSettings, Protocol):
    """What is read of trainer.config.DataConfig, which itself needs this module."""

    @property
    def seq_len_schedule(self) -> str: ...
    @property
    def loader(self) -> str: ...


@dataclass(frozen=True)
class RowStage:
    """A stretch of the run with rows of one length."""

    seq_len: int
    start: float
    """Share of the budget at which it begins."""


def row_stages(data: DataSettings) -> tuple[RowStage, ...]:
    """The stages of a run in order; a single one of data.seq_len without a schedule. ValueError
    that says how a schedule is written."""
    if not data.seq_len_schedule:
        return (RowStage(data.seq_len, 0.0),)
    stages, start = [], 0.0
    for part in data.seq_len_schedule.split(","):
        match = STAGE.fullmatch(part.strip())
        if match is None or int(match[1]) == 0 or not start < float(match[2]) <= 1:
            raise ValueError(
                f'data.seq_len_schedule = "{data.seq_len_schedule}": "{part}" is no stage; write '
                'LENGTH@END with rising ends up to 1.0, as in "1024@0.1,2048@0.7,3072@1.0"'
            )
        stages.append(RowStage(int(match[1]), start))
        start = float(match[2])
    if start != 1:
        raise ValueError(
            f'data.seq_len_schedule = "{data.seq_len_schedule}" ends at {start:g}; the last stage '
            "must end at 1.0"
        )
    return tuple(stages)


def row_len_at(stages: tuple[RowStage, ...], progress: float) -> int:
    """Tokens of a row at a share of the budget."""
    return next(stage.seq_len for stage in reversed(stages) if progress >= stage.start)


def row_schedule_faults(data: DataSettings) -> list[str]:
    """Everything wrong with data.seq_len_schedule, one line each with the remedy."""
    if not data.seq_len_schedule:
        return []
    written = f'data.seq_len_schedule = "{data.seq_len_schedule}"'
    faults = []
    if data.mix:
        faults.append(f'{written} and data.mix = "{data.mix}" exclude each other; set one to ""')
    if data.loader not in ("sequential", "document"):
        faults.append(
            f'{written} cuts the text anew as rows grow, which data.loader = "{data.loader}" '
            'cannot; set data.loader to "sequential" or "document"'
        )
    try:
        lengths = {stage.seq_len for stage in row_stages(data)}
    except ValueError as error:
        return [*faults, str(error)]
    if max(lengths) != data.seq_len:
        faults.append(
            f"{written}: its longest rows have {max(lengths)} tokens, but data.seq_len = "
            f"{data.seq_len}; set data.seq_len = {max(lengths)}"
        )
    for name, tokens in (
        ("batch_tokens", data.batch_tokens),
        ("micro_batch_tokens", data.micro_batch_tokens),
    ):
        bad = ", ".join(str(length) for length in sorted(lengths) if tokens % length)
        if bad:
            faults.append(
                f"{written}: rows of {bad} tokens do not divide data.{name} = {tokens}; choose a "
                "common multiple"
            )
    return faults
