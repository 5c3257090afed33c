"""How weights are updated."""

from trainer.optim.optimizer import Optimizer, build_optimizer

__all__ = ["Optimizer", "build_optimizer"]
