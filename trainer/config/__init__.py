"""Every setting of a training run, as frozen pydantic models: one file per group.

A run is `TrainConfig` and nothing else: no environment variable changes a hyperparameter. A sweep
addresses a setting by its dotted path (`"optim.matrix_lr"`); `with_overrides` builds the changed
copy and refuses unknown paths, wrong types and broken cross-field rules, all in one error.

`None` in a budget means "no limit". Loads without torch.
"""

from trainer.config.base import Settings
from trainer.config.data import DataConfig
from trainer.config.evaluate import EvaluateConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import AverageConfig, LossConfig, OptimConfig, ScheduleConfig
from trainer.config.quantize import CODEC_LEVELS, CompressConfig, QuantizeConfig
from trainer.config.run import BudgetConfig, RuntimeConfig
from trainer.config.source import SourceConfig
from trainer.config.train import TrainConfig, describe_faults, parse_overrides

__all__ = [
    "CODEC_LEVELS",
    "AverageConfig",
    "BudgetConfig",
    "CompressConfig",
    "DataConfig",
    "EvaluateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantizeConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "Settings",
    "SourceConfig",
    "TrainConfig",
    "describe_faults",
    "parse_overrides",
]
