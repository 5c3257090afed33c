"""Rows of different lengths within one optimiser step: the text form of a mix and its lanes.

"5x2048+3x6144" is eight lanes, five with rows of 2048 tokens and three of 6144: one for each worker
of the machine that it was written for (parameter-golf #1212). On fewer workers, each runs its share
of the lanes as further micro batches, so that the same step is taken on 1, 2, 4 or 8.

Every lane has the same number of tokens, unless rows are given: "5x2048@36+3x6144@10" is the
published batch of 552,960 tokens. Loads without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

GROUP = re.compile(r"(\d+)x(\d+)(?:@(\d+))?")


class DataSettings(Protocol):
    """What is read of trainer.config.DataConfig, which itself needs this module."""

    @property
    def mix(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...


@dataclass(frozen=True)
class Lane:
    """What one worker, of as many as the mix has lanes, would take of every step."""

    seq_len: int
    """Tokens of a row."""
    num_rows: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.num_rows


def lengths_of(mix: str) -> tuple[tuple[int, int | None], ...]:
    """Row length and, where given, number of rows of each lane of a mix. ValueError that says how
    a mix is written."""
    lanes: list[tuple[int, int | None]] = []
    for part in mix.split("+"):
        match = GROUP.fullmatch(part.strip())
        numbers = [int(number) for number in match.groups() if number] if match else [0]
        if match is None or not all(numbers):
            raise ValueError(
                f'data.mix = "{mix}": "{part}" is no group of lanes; write WORKERSxLENGTH or '
                'WORKERSxLENGTH@ROWS, as in "5x2048+3x6144"'
            )
        rows = numbers[2] if len(numbers) == 3 else None
        lanes += [(numbers[1], rows)] * numbers[0]
    return tuple(lanes)


def mix_faults(data: DataSettings) -> list[str]:
    """Everything wrong with data.mix, one line each with the remedy; [] when it is sound or off."""
    if not data.mix:
        return []
    try:
        lanes = lengths_of(data.mix)
    except ValueError as error:
        return [str(error)]
    share, rest = divmod(data.batch_tokens, len(lanes))
    faults = []
    open_lengths = {seq_len for seq_len, rows in lanes if rows is None}
    if open_lengths and rest:
        faults.append(
            f'data.mix = "{data.mix}" has {len(lanes)} lanes, which cannot share '
            f"data.batch_tokens = {data.batch_tokens} equally; choose a multiple of {len(lanes)}"
        )
    elif bad := sorted(length for length in open_lengths if share % length):
        faults.append(
            f'data.mix = "{data.mix}": rows of {", ".join(map(str, bad))} tokens do not divide a '
            f"lane's {share} tokens (data.batch_tokens / {len(lanes)}); choose another "
            "data.batch_tokens, or give rows as in 3x6144@10"
        )
    else:
        total = sum(seq_len * (rows or share // seq_len) for seq_len, rows in lanes)
        if total != data.batch_tokens:
            faults.append(
                f'data.mix = "{data.mix}" makes {total} tokens a step, but data.batch_tokens = '
                f"{data.batch_tokens}; set data.batch_tokens = {total}, or leave out the rows"
            )
    longest = max(seq_len for seq_len, _ in lanes)
    if data.micro_batch_tokens < longest:
        faults.append(
            f"data.micro_batch_tokens = {data.micro_batch_tokens} is less than one row of "
            f'{longest} in data.mix = "{data.mix}"; raise it'
        )
    return faults


def lanes_of(data: DataSettings) -> tuple[Lane, ...]:
    """The lanes of a sound configuration; one lane of the whole batch without a mix."""
    if not data.mix:
        return (Lane(data.seq_len, data.batch_tokens // data.seq_len),)
    lanes = lengths_of(data.mix)
    share = data.batch_tokens // len(lanes)
    return tuple(Lane(seq_len, rows or share // seq_len) for seq_len, rows in lanes)


def sharing_fault(data: DataSettings, num_workers: int) -> str | None:
    """Why that many workers cannot share a step equally, with the remedy; None when they can."""
    if not data.mix:
        return rows_fault(data.batch_tokens, data.seq_len, num_workers)
    num_lanes = len(lanes_of(data))
    if num_lanes % num_workers == 0:
        return None
    return (
        f'data.mix = "{data.mix}" has {num_lanes} lanes, which {num_workers} workers cannot share '
        f"equally; use a number of workers that divides {num_lanes}, or a mix for {num_workers}"
    )


def rows_fault(batch_tokens: int, seq_len: int, num_workers: int) -> str | None:
    """The same for rows of one length."""
    rows = batch_tokens // seq_len
    if rows and rows % num_workers == 0:
        return None
    row_count = max(num_workers, rows - rows % num_workers)
    return (
        f"data.batch_tokens = {batch_tokens} is {rows} rows of data.seq_len = {seq_len}, which "
        f"{num_workers} workers cannot share equally; set data.batch_tokens = "
        f"{row_count * seq_len}, or use a number of workers that divides {rows}"
    )
