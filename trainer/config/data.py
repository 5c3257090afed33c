"""Settings of the data: what is read, in which order and portions."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveInt, Settings, raise_together
from trainer.config.row_schedule import row_schedule_faults, row_stages
from trainer.mix import lanes_of, mix_faults


class DataConfig(Settings):
    """What is read and in which portions."""

    dir: str = ""
    """Folder with *_train_*.bin, *_val_*.bin and a .model tokenizer. Not part of the digest: the
    content is, through the data digest in provenance.json."""
    seq_len: PositiveInt = 1024
    """Tokens per training row."""
    batch_tokens: PositiveInt = 524_288
    """Tokens per optimiser step over all workers."""
    micro_batch_tokens: PositiveInt = 65_536
    """Largest number of tokens one worker sends through the model at once; the rest accumulates."""
    val_tokens: Annotated[int, Field(ge=0)] = 0
    """Number of scored validation tokens that evaluation must find; 0 = whatever the data set has.
    A wrong count means a truncated or foreign validation set."""
    mix: str = ""
    """Rows of different lengths within a step, one lane for each of the workers it is written for:
    "5x2048+3x6144" is five lanes with rows of 2048 tokens and three of 6144, each lane an equal
    part of batch_tokens; "5x2048@36+3x6144@10" gives the rows of a lane. Fewer workers run several
    lanes each. "" = off: all rows are of seq_len, which a mix does not use."""
    mix_weighting: Literal["token", "worker"] = "token"
    """What counts alike in the gradient of a mix: every token, or every lane's mean, as published.
    The same unless lanes differ in tokens."""
    loader: Literal["sequential", "shuffled", "coprime", "document", "shuffled_documents"] = (
        "sequential"
    )
    """Order of rows. "sequential": the stream as it is. "shuffled": every window of a row's length
    once an epoch, at random. "coprime": windows in coprime strides, a few shards at a time.
    "document": as sequential, but a shard starts at its first document and no step leaves it.
    "shuffled_documents": epochs of rows in random order, the documents in a new order each time."""
    epoch_multiple: PositiveInt = 1
    """With "shuffled_documents", rows of an epoch are a multiple of this, the rest is dropped. The
    published loader's is the rows that all workers take at once (4 x 8 = 32)."""
    shuffle_seed: Annotated[int, Field(ge=0)] = 0
    """With "shuffled_documents", another order for another number; 0 = the published one, whatever
    runtime.seed is."""
    train_split: Literal["train", "val", "both"] = "train"
    """Text to train on. All but "train" is illegal on the golf tracks: for replays only."""
    seq_len_schedule: str = ""
    """Rows that grow in the course of the run: "1024@0.1,2048@0.7,3072@1.0" is 1024 tokens until a
    tenth of the budget is spent, and so on (#2014); the longest must be seq_len. "" = off: all rows
    are of seq_len."""
    max_overlap: Fraction = 1.0
    """Largest share of the first 10 million training tokens that may also be validation text, found
    by windows of 64 tokens before training; more is refused (#2127). 1 = off: not looked at."""

    @property
    def row_lengths(self) -> set[int]:
        """Tokens of the training rows, each length once."""
        rows = lanes_of(self) if self.mix else row_stages(self)
        return {row.seq_len for row in rows}

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        faults = mix_faults(self) + row_schedule_faults(self) + self._epoch_faults()
        if self.mix:
            return raise_together(self, faults)
        if self.batch_tokens % self.seq_len:
            faults.append(
                f"data.seq_len = {self.seq_len} does not divide data.batch_tokens = "
                f"{self.batch_tokens}; choose a multiple"
            )
        if self.micro_batch_tokens < self.seq_len:
            faults.append(
                f"data.micro_batch_tokens = {self.micro_batch_tokens} is less than one row of "
                f"data.seq_len = {self.seq_len}; raise it"
            )
        return raise_together(self, faults)

    def _epoch_faults(self) -> list[str]:
        if self.loader == "shuffled_documents":
            if self.mix:
                return [
                    f'data.loader = "shuffled_documents" has rows of one length, data.mix = '
                    f'"{self.mix}" several; set data.mix = ""'
                ]
            return []
        return [
            f'data.{name} = {value} is only for data.loader = "shuffled_documents"; set the '
            f"loader, or {default}"
            for name, value, default in (
                ("epoch_multiple", self.epoch_multiple, 1),
                ("shuffle_seed", self.shuffle_seed, 0),
            )
            if value != default
        ]
