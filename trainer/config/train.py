"""`TrainConfig`: one training run, complete; how it is changed, written down and named."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import ValidationError, model_validator
from pydantic_core import to_json

from trainer.config.base import Settings, raise_together
from trainer.config.data import DataConfig
from trainer.config.evaluate import EvaluateConfig
from trainer.config.iha import faults_of_iha_kernel
from trainer.config.model import ModelConfig
from trainer.config.optim import AverageConfig, LossConfig, OptimConfig, ScheduleConfig
from trainer.config.qat_lite import QatLiteConfig
from trainer.config.quantize import CompressConfig, QuantizeConfig
from trainer.config.recurrence import Phase, parse_phases
from trainer.config.run import BudgetConfig, RuntimeConfig
from trainer.config.source import SourceConfig
from trainer.errors import ConfigError


class TrainConfig(Settings):
    """One training run, complete."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    compress: CompressConfig = CompressConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig = BudgetConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    loss: LossConfig = LossConfig()
    average: AverageConfig = AverageConfig()
    qat_lite: QatLiteConfig = QatLiteConfig()
    source: SourceConfig = SourceConfig()

    @model_validator(mode="after")
    def _schedule_has_a_budget(self) -> Self:
        faults = []
        if self.schedule.progress == "clock" and self.budget.train_seconds is None:
            faults.append(
                'schedule.progress = "clock" needs budget.train_seconds; set it, or set '
                'schedule.progress = "steps" and budget.max_steps'
            )
        if self.schedule.progress == "steps" and self.budget.max_steps is None:
            faults.append('schedule.progress = "steps" needs budget.max_steps; set it')
        if self.evaluate.batch_tokens < self.evaluate.seq_len:
            faults.append(
                f"evaluate.batch_tokens = {self.evaluate.batch_tokens} is less than one row of "
                f"evaluate.seq_len = {self.evaluate.seq_len}; raise it"
            )
        longest_row = max(self.data.seq_len, self.evaluate.seq_len)
        widest = max([self.model.window, *(stage.long for stage in self.model.stages)])
        if widest > longest_row:
            name = "window" if widest == self.model.window else "window_stages"
            faults.append(
                f"model.{name} = {getattr(self.model, name)} is above {longest_row}, the longest "
                "row of data.seq_len and evaluate.seq_len; lower it, or set 0 and "
                'model.window_layers = ""'
            )
        if self.qat_lite.kind != "none" and self.qat_lite.first_layer >= self.model.num_layers:
            faults.append(
                f"qat_lite.first_layer = {self.qat_lite.first_layer} leaves none of "
                f"model.num_layers = {self.model.num_layers}; lower it"
            )
        by_cycle = self.evaluate.ensemble_at == "cycles" and not self.evaluate.ensemble_every
        if self.evaluate.ensemble != "off" and by_cycle and not self.schedule.cycles:
            faults.append(
                'evaluate.ensemble_at = "cycles" has no checkpoints to take while schedule.cycles '
                '= 0; raise it, or set evaluate.ensemble_at = "epochs"'
            )
        faults.extend(self._calibration_faults())
        faults.extend(self._iha_faults())
        faults.extend(self._recurrence_faults())
        faults.extend(self._kernel_faults())
        faults.extend(self._ttt_faults())
        return raise_together(self, faults)

    def _iha_faults(self) -> list[str]:
        if self.model.iha == "fused":
            setting, remedy = 'model.iha = "fused"', "model.iha = interleaved"
        elif self.model.iha == "interleaved" and self.model.iha_product == "weights":
            setting, remedy = 'model.iha_product = "weights"', "model.iha_product = heads"
        else:
            return []
        faults = []
        if self.quantize.method == "gptq":
            faults.append(
                f'quantize.method = "gptq" sees no inputs of matrices that {setting} mixes before '
                f"use; set another quantize.method, or {remedy}"
            )
        if self.evaluate.ttt == "documents" and self.model.iha == "interleaved":
            faults.append(
                f'evaluate.ttt = "documents" adapts projected heads, which {setting} does not '
                f"have; set evaluate.ttt = off, or {remedy}"
            )
        return faults

    def _calibration_faults(self) -> list[str]:
        if self.quantize.allocate != "off" and self.budget.artifact_bytes is None:
            return [
                f'quantize.allocate = "{self.quantize.allocate}" fills budget.artifact_bytes, '
                "which is null; set it"
            ]
        seconds, reserve = self.budget.train_seconds, self.quantize.reserve_seconds
        if self.quantize.method != "gptq" or seconds is None or self.source.skips_training:
            return []
        if reserve == 0:
            return [
                'quantize.method = "gptq" calibrates inside budget.train_seconds = '
                f"{seconds:g} and quantize.reserve_seconds = 0 keeps no time for it; set "
                "quantize.reserve_seconds (published runs took 4 to 14)"
            ]
        if reserve >= seconds:
            return [
                f"quantize.reserve_seconds = {reserve:g} leaves nothing of budget.train_seconds = "
                f"{seconds:g} to train in; lower it"
            ]
        return []

    def _recurrence_faults(self) -> list[str]:
        start, text = self.schedule.recur_start, self.schedule.recur_phases
        visits = self.model.most_visits
        if visits == 1 and (start or text):
            return [
                f"schedule.recur_start = {start:g} and schedule.recur_phases = {text!r} begin a "
                "recurrence that model.recur_visits = 1 does not have; raise it, or set 0 and "
                '""'
            ]
        if start and text:
            return [
                f"schedule.recur_start = {start:g} and schedule.recur_phases = {text!r} both say "
                "when recurrence begins; set one of them"
            ]
        try:
            last = parse_phases(text)[-1].visits if text else visits
        except ValueError as error:
            return [f"schedule.recur_phases = {text!r}: {error}"]
        if last != visits:
            return [
                f"schedule.recur_phases = {text!r} ends with {last} visits, but evaluation makes "
                f"model.recur_visits = {visits}; make them equal"
            ]
        return []

    @property
    def recur_phases(self) -> tuple[Phase, ...]:
        """Visits of the recurring blocks along the training, from 0 on, at least one phase."""
        if self.schedule.recur_phases:
            return parse_phases(self.schedule.recur_phases)
        last = Phase(self.schedule.recur_start, self.model.most_visits)
        return (Phase(0.0, 1), last) if last.start > 0 else (last,)

    def _kernel_faults(self) -> list[str]:
        faults = []
        mlp, loss = self.runtime.mlp_kernel, self.runtime.loss_kernel
        if mlp.startswith("fused") and self.model.num_loops > 1:
            faults.append(
                f'runtime.mlp_kernel = "{mlp}" knows no adapters, which blocks visited '
                f"model.num_loops = {self.model.num_loops} times have; set runtime.mlp_kernel = "
                "compiled"
            )
        if mlp.startswith("fused") and self.model.mlp_kind != "squared":
            faults.append(
                f'runtime.mlp_kernel = "{mlp}" knows two matrices, but model.mlp_kind = '
                f'"{self.model.mlp_kind}" has three; set runtime.mlp_kernel = compiled'
            )
        if self.model.iha != "off":
            faults += faults_of_iha_kernel(self.model, self.runtime.iha_kernel)
        if self.compress.code == "script":
            faults += [
                f'runtime.{name} = "{kernel}" reads its own source, which compress.code = "script" '
                "does not have; set compress.code = modules"
                for name in ("mlp_kernel", "loss_kernel", "iha_kernel")
                if (kernel := getattr(self.runtime, name)).startswith("fused")
            ]
        if loss == "fused" and self.loss.kind != "cross_entropy":
            faults.append(
                f'runtime.loss_kernel = "fused" has no weights on the tokens, which loss.kind = '
                f'"{self.loss.kind}" needs; set runtime.loss_kernel = compiled'
            )
        return faults

    def _ttt_faults(self) -> list[str]:
        faults, model, evaluate = [], self.model, self.evaluate
        if evaluate.ttt != "off" and evaluate.ttt_freeze_blocks >= model.num_layers:
            faults.append(
                f"evaluate.ttt_freeze_blocks = {evaluate.ttt_freeze_blocks} leaves none of "
                f"model.num_layers = {model.num_layers} blocks to train; lower it"
            )
        if evaluate.ttt != "documents":
            return faults
        if evaluate.ttt_lora_rank and model.num_loops > 1:
            faults.append(
                f"evaluate.ttt_lora_rank = {evaluate.ttt_lora_rank}: adapters of documents are not "
                f"defined for model.num_loops = {model.num_loops}; set either to 0 or 1"
            )
        if 0 < model.rope_ntk_len < evaluate.seq_len:
            faults.append(
                f"model.rope_ntk_len = {model.rope_ntk_len} turns rows of other lengths "
                'differently, and rows of evaluate.ttt = "documents" grow; raise it to '
                f"evaluate.seq_len = {evaluate.seq_len}, or set 0"
            )
        return faults

    @property
    def step_seconds(self) -> float | None:
        """Seconds in which training steps may run: budget.train_seconds less the reserve for
        calibration. None = no limit."""
        seconds = self.budget.train_seconds
        if seconds is None or self.quantize.method != "gptq":
            return seconds
        return seconds - self.quantize.reserve_seconds

    def with_overrides(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """A copy with dotted paths replaced, fully validated.

        Raises ConfigError that lists every unknown path (with the nearest names), every wrong type
        and every broken rule together.
        """
        paths = set(_leaf_paths())
        faults = [_unknown_path(path) for path in overrides if path not in paths]
        known = {path: value for path, value in overrides.items() if path in paths}
        try:
            changed = TrainConfig.model_validate(_replaced(self, known))
        except ValidationError as error:
            faults.extend(describe_faults(error))
            # pydantic checks cross-field rules only where every field has its type: put the
            # mistyped ones back and look again, so that one error lists both kinds.
            mistyped = {".".join(str(part) for part in fault["loc"]) for fault in error.errors()}
            rest = {path: value for path, value in known.items() if path not in mistyped}
            try:
                TrainConfig.model_validate(_replaced(self, rest))
            except ValidationError as more:
                faults.extend(line for line in describe_faults(more) if line not in faults)
        if faults:
            raise ConfigError("\n".join(faults))
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `TrainConfig.from_dict` inverts it exactly."""
        return self.model_dump(mode="json")

    def without_places(self) -> dict[str, Any]:
        """What from_dict needs, without settings at their defaults and without the names of files
        and folders: data.dir is left out, and source.checkpoint is "checkpoint.bin"."""
        tree = self.model_dump(mode="json", exclude_defaults=True)
        tree.get("data", {}).pop("dir", None)
        for name in tree.get("source", {}):
            tree["source"][name] = f"{name}.bin"
        return {group: settings for group, settings in tree.items() if settings}

    def text_without_places(self) -> str:
        """The same as JSON, as an artifact has it."""
        return to_json(self.without_places()).decode()

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TrainConfig:
        """Inverse of to_dict. Raises ConfigError with every fault."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(describe_faults(error))) from None

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted path."""
        return dict(_walk(self.to_dict()))

    def difference(self, base: TrainConfig) -> dict[str, Any]:
        """The settings, by dotted path, in which this run differs from `base`."""
        other = base.flat()
        return {path: value for path, value in self.flat().items() if other[path] != value}

    def digest(self) -> str:
        """16 hex digits that name what the run computes: equal digests, equal runs.

        Leaves out where the data lies and how the run is executed (data.dir, runtime.* except seed
        and dtype), so that the same trial on another machine keeps its name; and settings at their
        defaults, so that it keeps its name when a later version adds a setting. A default therefore
        must not change once it has been published: a new behaviour is a new value.
        """
        changed = self.difference(TrainConfig())
        for path in list(changed):
            group, _, leaf = path.partition(".")
            if path == "data.dir" or (group == "runtime" and leaf not in ("seed", "dtype")):
                del changed[path]
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_overrides(pairs: list[str]) -> dict[str, object]:
    """["optim.matrix_lr=0.02"] -> {"optim.matrix_lr": 0.02}; values are JSON, else plain strings.

    Raises ConfigError naming every pair without "=".
    """
    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise ConfigError("\n".join(f"--set {pair}: write it as PATH=VALUE" for pair in broken))
    overrides: dict[str, object] = {}
    for pair in pairs:
        path, _, text = pair.partition("=")
        try:
            overrides[path] = json.loads(text)
        except json.JSONDecodeError:
            overrides[path] = text
    return overrides


def describe_faults(error: ValidationError) -> list[str]:
    """One line per fault of a pydantic error, each starting with the dotted path."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "value_error":
            lines.extend(str(fault["ctx"]["error"]).split("\n"))
        elif fault["type"] == "extra_forbidden":
            lines.append(_unknown_path(path))
        else:
            lines.append(
                f"{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
            )
    return lines


def _unknown_path(path: str) -> str:
    paths = _leaf_paths()
    near = difflib.get_close_matches(path, paths, n=3, cutoff=0.5)
    leaf = path.split(".")[-1]
    near += [p for p in paths if p.split(".")[-1] == leaf and p not in near]
    hint = f"did you mean {', '.join(near)}?" if near else "see `caddie train --help`"
    return f"{path}: no such setting; {hint}"


def _leaf_paths() -> list[str]:
    return [path for path, _ in _walk(TrainConfig().model_dump())]


def _replaced(config: TrainConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.model_dump()
    for path, value in values.items():
        *groups, leaf = path.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = value
    return tree


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
