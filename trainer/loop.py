"""`train`: the one door of the trainer. Build, prime, train against the clock, pack, score.

The order of things is the story: every graph is compiled by real steps that are then undone; the
clock starts; steps run until the next one would pass the cap; the weights are quantised, packed
and written; and what is scored is the file as read back from disk, never the weights in memory.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer import artifact
from trainer.attention import select_backend
from trainer.calibrate import calibrate, check_calibration
from trainer.clock import BudgetClock, Gate, PhaseTimer
from trainer.code import packed_code
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader
from trainer.distributed import Group, join_group
from trainer.errors import ArtifactError
from trainer.evaluate.bits_per_byte import EvalResult, evaluate
from trainer.evaluate.bits_per_byte import prime as prime_evaluation
from trainer.evaluate.naive_ttt import train_on_validation
from trainer.legality import illegal_in_use
from trainer.loss import build_objective
from trainer.model.gpt import GPT
from trainer.optim import Optimizer, WeightAverage, build_average, build_optimizer
from trainer.pacer import StepPacer
from trainer.quantize import coded_names, dequantize, quantize
from trainer.quantize.aware import QuantizationAware
from trainer.report import NullReporter, Reporter, TrainResult
from trainer.schedule import extra_weight_decay, lr_multiplier, muon_momentum


def train(config: TrainConfig, reporter: Reporter, out: Path | None = None) -> TrainResult:
    """Run one configuration to its score. Call it on every rank of the run.

    Args:
        config: the whole run; config.data.dir must hold a data set.
        reporter: the side channel; used on rank 0 only.
        out: folder for artifact.bin, written by rank 0; None = a temporary folder.

    Returns: the same result on every rank (seconds are maxima over ranks).
    Raises: ConfigError, DataError, BackendError, ArtifactError; torch.OutOfMemoryError.
    """
    with join_group(config.runtime.device) as group, tempfile.TemporaryDirectory() as scratch:
        run = Run.build(config, reporter if group.is_main else NullReporter(), group)
        try:
            run.prime()
            reason = run.train_to_budget()
            if reason is None:
                run.apply_average()
                run.calibrate()
        finally:
            run.loader.close()
        if reason is not None:
            return run.result(stop_reason=reason)
        prequant = run.score_prequant()
        size = run.pack(Path(out or scratch) / "artifact.bin")
        score = run.score_artifact(Path(out or scratch) / "artifact.bin")
        return run.result(prequant=prequant, score=score, size=size)


@dataclass(frozen=True)
class PackedSize:
    """What the artifact weighs, and what it is."""

    bytes_code: int
    bytes_model: int
    sha256: str


@dataclass(frozen=True)
class KeptStep:
    """Weights as they were before a step near the cap."""

    steps: int
    elapsed_s: float
    """Budget clock when these weights were done, on the slowest rank."""
    weights: dict[str, Tensor]


@dataclass
class Run:
    """The state of one run on one rank; `train` calls its methods in order."""

    config: TrainConfig
    reporter: Reporter
    group: Group
    dataset: Dataset
    byte_table: ByteTable
    model: GPT
    forward: Callable[..., Tensor]
    """The model, compiled where that is on."""
    optimizer: Optimizer
    loader: TrainLoader
    clock: BudgetClock
    timer: PhaseTimer
    aware: QuantizationAware
    steps: int = 0
    train_loss: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    kept: KeptStep | None = None
    hessians: dict[str, Tensor] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    average: WeightAverage | None = None
    unaveraged: float | None = None
    """Progress of the last step, until its weights are taken into the average."""

    @classmethod
    def build(cls, config: TrainConfig, reporter: Reporter, group: Group) -> Run:
        """Open the data and build the same model on every rank."""
        device = group.device
        timer = PhaseTimer(
            torch.cuda.synchronize if device.type == "cuda" else _nothing,
            lambda name, seconds: reporter.emit("phase", name=name, seconds=seconds),
        )
        with timer.phase("build"):
            dataset = Dataset.open(config.data.dir, config.model.vocab_size)
            dataset.check_scored_tokens(config.evaluate.seq_len, config.data.val_tokens)
            check_calibration(config, dataset)
            byte_table = ByteTable.from_tokenizer(dataset.tokenizer_path, config.model.vocab_size)
            torch.manual_seed(config.runtime.seed)
            if device.type == "cuda":
                torch.set_float32_matmul_precision("high")
                torch.cuda.reset_peak_memory_stats()
            model = build_model(config, group, lambda line: reporter.emit("log", line=line))
            loader = TrainLoader.from_config(dataset, config, group)
            optimizer = build_optimizer(model, config, group)
        forward = (
            torch.compile(model, dynamic=False, fullgraph=True)
            if _compiles(config, device)
            else model
        )
        reporter.emit(
            "start",
            num_params=sum(parameter.numel() for parameter in model.parameters()),
            world_size=group.size,
            device=_device_name(device),
            total_tokens_per_step=config.data.batch_tokens,
            data_digest=dataset.digest,
        )
        clock = BudgetClock(config.step_seconds, group)
        return cls(
            config,
            reporter,
            group,
            dataset,
            byte_table,
            model,
            forward,
            optimizer,
            loader,
            clock,
            timer,
            QuantizationAware(model, config.quantize),
            average=build_average(config.average, model.state_dict()),
        )

    def prime(self) -> None:
        """Take real steps so that every graph is compiled, then undo them, outside the clock."""
        if self.config.runtime.prime_steps == 0:
            return
        with self.timer.phase("prime"):
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            optimizer_state = self.optimizer.state_dict()
            position = self.loader.state_dict()
            pacer = StepPacer(self.group.device)
            for step in range(self.config.runtime.prime_steps):
                started = self.clock.now()
                pacer.launched(self._step(step, 0.0))
                pacer.drain()
            self.clock.expect_step(self.clock.now() - started)
            if self.config.quantize.method == "gptq":
                calibrate(self.config, self.model, self.loader, self.group, prime=True)
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(optimizer_state)
            self.loader.load_state_dict(position)
            prime_evaluation(self.forward, self.dataset, self.config.evaluate, self.group)

    def _step(self, step: int, progress: float) -> Tensor:
        """One optimiser step; returns the mean training loss over all workers, on the device."""
        if self.model.objective is not None:
            self.model.objective.set_progress(progress)
        micro_batches = self.loader.next_step()
        total = torch.zeros((), device=self.group.device)
        with self.aware.weights(progress):
            for (tokens, targets), divisor in zip(micro_batches, self.loader.divisors, strict=True):
                loss = self.forward(tokens, targets, reduction="objective") / divisor
                torch.autograd.backward(loss)
                total += loss.detach()
        optim = self.config.optim
        self.optimizer.average_gradients([total], optim.grad_clip_norm)
        lr_mult = lr_multiplier(self.config.schedule, step, progress)
        self.optimizer.step(
            lr_mult, muon_momentum(optim, step, progress), extra_weight_decay(optim, lr_mult)
        )
        self.optimizer.zero_grad()
        return total

    def train_to_budget(self) -> str | None:
        """Step until the budget is spent. Returns why the run was stopped early, or None."""
        config = self.config
        pacer = StepPacer(self.group.device)
        reason: str | None = None
        self.clock.start()
        for step in itertools.count():
            self._collect(pacer.wait())
            reason = reason or self.reporter.stop_requested() or self._not_finite()
            gate = self.clock.gate(pacer.in_flight, reason is not None)
            if gate.near_cap and pacer.in_flight:
                self._collect(pacer.drain())
                gate = self.clock.gate(0, reason is not None)
            if gate.stop or self.steps == config.budget.max_steps:
                break
            if gate.near_cap:
                self.kept = self._keep(gate.elapsed_s)
            self._take_average()
            self.unaveraged = self._progress(step, gate)
            pacer.launched(self._step(step, self.unaveraged))
            self.steps += 1
            if config.runtime.val_every and self.steps % config.runtime.val_every == 0:
                self._collect(pacer.drain())
                self._validate()
        self._collect(pacer.drain())
        self.clock.stop()
        self.timer.add("train", self._settle_seconds())
        reason = reason or self._not_finite()
        if self.group.max_float(float(reason is not None)) > 0:
            return reason or "stopped with rank 0"
        return None

    def _take_average(self) -> None:
        """Take the last step's weights into the average, as soon as it is known that they count."""
        if self.average is not None and self.unaveraged is not None:
            self.average.update(self.unaveraged)
        self.unaveraged = None

    def _keep(self, elapsed_s: float) -> KeptStep:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        return KeptStep(self.steps, elapsed_s, weights)

    def _settle_seconds(self) -> float:
        """Seconds of the training that counts. When the last step was held up past the cap, that
        is the training before it: its weights come back, and the step is thrown away."""
        cap, elapsed = self.clock.cap_s, self.group.max_float(self.clock.elapsed())
        if cap is None or elapsed <= cap or self.kept is None:
            self._take_average()
            return elapsed
        self.model.load_state_dict(self.kept.weights)
        self.steps = self.kept.steps
        line = f"the last step ended at {elapsed:.3f} s, past the cap of {cap:g} s: thrown away"
        self.reporter.emit("log", line=line)
        return self.kept.elapsed_s

    def _progress(self, step: int, gate: Gate) -> float:
        budget = self.config.budget
        if self.config.schedule.progress == "steps":
            assert budget.max_steps is not None
            return step / budget.max_steps
        assert self.config.step_seconds is not None
        return min(1.0, gate.elapsed_s / self.config.step_seconds)

    def _not_finite(self) -> str | None:
        if self.train_loss is None or torch.isfinite(torch.tensor(self.train_loss)):
            return None
        return f"the training loss is {self.train_loss}"

    def _collect(self, losses: list[float]) -> None:
        """Book finished steps and report each log_every-th."""
        for loss in losses:
            self.step_seconds.append(self.clock.step_completed())
            self.train_loss = loss
            done = len(self.step_seconds)
            if done % self.config.runtime.log_every == 0 or done == 1:
                self._report_step(done, loss)

    def _report_step(self, done: int, loss: float) -> None:
        recent = self.step_seconds[-self.config.runtime.log_every :]
        seconds = statistics.fmean(recent)
        elapsed = self.clock.elapsed()
        cap = self.config.step_seconds
        max_steps = self.config.budget.max_steps
        self.reporter.emit(
            "step",
            step=done,
            elapsed_s=elapsed,
            progress=elapsed / cap if cap else done / max_steps if max_steps else 0.0,
            train_loss=loss,
            step_ms=1000 * seconds,
            tokens_per_s=self.config.data.batch_tokens / max(seconds, 1e-9),
        )

    def _validate(self) -> None:
        """Score the present weights outside the clock, for the curve."""
        self.clock.stop()
        with self.timer.phase("validate"):
            result = self._evaluate(self.config.evaluate.plain())
        self.reporter.emit(
            "val",
            step=self.steps,
            elapsed_s=self.clock.elapsed(),
            val_loss=result.val_loss,
            val_bpb=result.val_bpb,
        )
        self.clock.start()

    def calibrate(self) -> None:
        """Collect what GPTQ needs to know of the final weights' inputs. It reads training data or
        writes text with the model, so it counts against budget.train_seconds."""
        if self.config.quantize.method != "gptq":
            return
        with self.timer.phase("calibrate"):
            self.hessians = calibrate(self.config, self.model, self.loader, self.group)
        missing = set(coded_names(dict(self.model.named_parameters()), self.config.quantize))
        missing -= set(self.hessians)
        if missing:
            names = ", ".join(sorted(missing))
            self.reporter.emit("log", line=f"gptq: rounded, as no linear product uses it: {names}")
        self._report_overrun(self.timer.seconds["calibrate"])

    def _report_overrun(self, seconds: float) -> None:
        reserve = self.config.quantize.reserve_seconds
        if self.config.budget.train_seconds is not None and seconds > reserve:
            self.reporter.emit(
                "log",
                line=f"calibration took {seconds:.1f} s where quantize.reserve_seconds = "
                f"{reserve:g}; raise it, or lower quantize.calibration_tokens",
            )

    def _evaluate(self, config: EvaluateConfig) -> EvalResult:
        return evaluate(self.forward, self.dataset, self.byte_table, config, self.group)

    def apply_average(self) -> None:
        """Put the averaged weights, where there are any, in place of the last ones. Those are
        scored before, as a diagnostic outside every budget."""
        if self.average is None:
            return
        if not self.average.num_updates:
            self.reporter.emit("log", line="average: the run ended before it began; not applied")
            return
        if self.config.evaluate.prequant:
            with self.timer.phase("evaluate_trained"):
                self.stages["trained"] = self._evaluate(self.config.evaluate.plain()).val_bpb
        with self.timer.phase("average"):
            self.model.load_state_dict(self.average.result(), strict=False)
        held = f"{self.average.num_updates} sets of weights"
        self.reporter.emit("log", line=f"average: {self.config.average.kind} over {held}")

    def score_prequant(self) -> EvalResult | None:
        """Bits per byte of the weights in memory, in plain rows; None when switched off."""
        if not self.config.evaluate.prequant:
            return None
        with self.timer.phase("evaluate_prequant"):
            result = self._evaluate(self.config.evaluate.plain())
        self.stages["averaged" if "trained" in self.stages else "trained"] = result.val_bpb
        self.reporter.emit(
            "val",
            step=self.steps,
            elapsed_s=self.clock.elapsed(),
            val_loss=result.val_loss,
            val_bpb=result.val_bpb,
        )
        return result

    def pack(self, path: Path) -> PackedSize:
        """Quantise, pack and write on rank 0. A failure there is raised on every rank."""
        failure, size = "", PackedSize(0, 0, "")
        if self.group.is_main:
            try:
                size = self._write_artifact(path)
            except ArtifactError as error:
                failure = str(error)
        failure = self.group.broadcast_bytes(
            failure.encode() if self.group.is_main else None
        ).decode()
        if failure:
            raise ArtifactError(failure)
        return size

    def _write_artifact(self, path: Path) -> PackedSize:
        with self.timer.phase("quantize"):
            quantized = quantize(
                self.model.state_dict(),
                self.config.quantize,
                self.hessians,
                lambda line: self.reporter.emit("log", line=line),
            )
        with self.timer.phase("pack"):
            blob = artifact.encode(quantized, self.config)
            artifact.write(path, blob)
        return PackedSize(len(packed_code()), len(blob), artifact.sha256(blob))

    def score_artifact(self, path: Path) -> EvalResult:
        """Bits per byte of the file: read it back, decode, load, evaluate on all ranks."""
        config = self.config.evaluate
        if config.stages and config != config.plain():
            with self.timer.phase("evaluate_stages"):
                self._load(path)
                self.stages["quantized"] = self._evaluate(config.plain()).val_bpb
        with self.timer.phase("evaluate"):
            self._load(path)
            if config.naive_ttt_epochs:
                train_on_validation(
                    self.forward,
                    self.model.parameters(),
                    self.dataset,
                    config,
                    self.config.data.micro_batch_tokens,
                    self.group,
                )
            score = self._evaluate(config)
        self.stages[config.method] = score.val_bpb
        return score

    def _load(self, path: Path) -> None:
        """Put the weights of the file that rank 0 reads into the model of every rank."""
        blob = artifact.read(path) if self.group.is_main else None
        _, quantized = artifact.decode(self.group.broadcast_bytes(blob))
        self.model.load_state_dict(dequantize(quantized))

    def result(
        self,
        stop_reason: str | None = None,
        prequant: EvalResult | None = None,
        score: EvalResult | None = None,
        size: PackedSize | None = None,
    ) -> TrainResult:
        """The outcome so far, equal on every rank but for the size, which rank 0 knows."""
        names = ["build", "prime", "train", "validate", "evaluate_trained", "average"]
        names += ["calibrate", "evaluate_prequant", "quantize", "pack"]
        names += ["evaluate_stages", "evaluate"]
        seconds = self.group.max_floats(*(self.timer.seconds.get(name, 0.0) for name in names))
        phases = {name: value for name, value in zip(names, seconds, strict=True) if value > 0}
        return TrainResult(
            status="finished" if stop_reason is None else "stopped",
            stop_reason=stop_reason,
            steps=self.steps,
            tokens=self.steps * self.config.data.batch_tokens,
            num_params=sum(parameter.numel() for parameter in self.model.parameters()),
            world_size=self.group.size,
            device=_device_name(self.group.device),
            phases=phases,
            step_ms=1000 * statistics.median(self.step_seconds) if self.step_seconds else None,
            train_loss=self.train_loss,
            val_loss=score.val_loss if score else None,
            val_bpb=score.val_bpb if score else None,
            val_bpb_prequant=prequant.val_bpb if prequant else None,
            stages=self.stages,
            val_tokens=score.num_tokens if score else None,
            bytes_code=size.bytes_code if size else None,
            bytes_model=size.bytes_model if size else None,
            artifact_sha256=size.sha256 if size else None,
            illegal=illegal_in_use(self.config),
            peak_memory_bytes=int(self.group.max_float(_peak_memory(self.group.device))),
        )


def build_model(config: TrainConfig, group: Group, log: Callable[[str], None]) -> GPT:
    """The model on its device, with rank 0's initial weights on every rank.

    Weights come from torch's global generator: seed it before. Raises BackendError when the
    attention backend of runtime.attention cannot run here.
    """
    attend = select_backend(
        config.runtime.attention, group.device.type, log, windowed=config.model.window > 0
    )
    row_lengths = config.data.row_lengths | {config.evaluate.seq_len}
    model = GPT(config.model, attend, max(row_lengths), row_lengths)
    model.objective = build_objective(config.loss)
    model.to(group.device)
    model.compute_dtype = _compute_dtype(config, group.device)
    for parameter in model.parameters():
        group.broadcast_(parameter.data)
    return model


def _compiles(config: TrainConfig, device: torch.device) -> bool:
    if config.runtime.compile == "auto":
        return device.type == "cuda"
    return config.runtime.compile == "on"


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.runtime.dtype == "bfloat16" else torch.float32


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _nothing() -> None:
    pass
