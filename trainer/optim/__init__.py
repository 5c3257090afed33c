"""How weights are updated."""

from trainer.optim.averaging import WeightAverage, build_average
from trainer.optim.optimizer import Optimizer, build_optimizer

__all__ = ["Optimizer", "WeightAverage", "build_average", "build_optimizer"]
