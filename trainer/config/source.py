"""Settings of where a run starts, when it does not start from random weights."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from trainer.config.base import Settings, raise_together


class SourceConfig(Settings):
    """Work that an earlier run has done, so that this one does not repeat it."""

    checkpoint: str = ""
    """File of trained weights, as runtime.save_checkpoint writes it: training is skipped, what
    follows it runs. "" = train."""
    artifact: str = ""
    """File of a packed model, artifact.bin of an earlier run: training and packing are skipped,
    only its score is made. "" = pack one."""

    @model_validator(mode="after")
    def _one_file(self) -> Self:
        if not (self.checkpoint and self.artifact):
            return self
        fault = (
            f"source.checkpoint = {self.checkpoint!r} and source.artifact = {self.artifact!r}: a "
            "run starts from one of them; leave the other out"
        )
        return raise_together(self, [fault])

    @property
    def skips_training(self) -> bool:
        """Whether the weights come from a file, so that no step is taken."""
        return bool(self.checkpoint or self.artifact)
