"""Settings of where a run starts, when it does not start from random weights."""

from __future__ import annotations

from trainer.config.base import Settings


class SourceConfig(Settings):
    """Work that an earlier run has done, so that this one does not repeat it."""

    checkpoint: str = ""
    """File of trained weights, as runtime.save_checkpoint writes it: training is skipped, what
    follows it runs. "" = train."""

    @property
    def skips_training(self) -> bool:
        """Whether the weights come from a file, so that no step is taken."""
        return bool(self.checkpoint)
