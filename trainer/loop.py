"""`train`: the one door of the trainer. Build, prime, train against the clock, pack, score.

The order of things is the story: every graph is compiled by real steps that are then undone; the
clock starts; steps run until the next one would pass the cap; the weights are quantised, packed
and written; and what is scored is the file as read back from disk, never the weights in memory.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer.clock import BudgetClock, Gate
from trainer.compilations import on_compilation
from trainer.config import TrainConfig
from trainer.config.recurrence import visits_at
from trainer.config.window_stages import window_stage_at
from trainer.distributed import Group, join_group
from trainer.ensemble import Ensemble
from trainer.evaluate.scorer import EvalResult
from trainer.finish import Finish, PackedSize
from trainer.legality import illegal_in_use
from trainer.optim import Optimizer, WeightAverage, build_average, build_optimizer
from trainer.pacer import StepPacer
from trainer.priming import prime
from trainer.quantize.aware import QuantizationAware
from trainer.quantize.qat_lite import QatLite
from trainer.report import NullReporter, Reporter, TrainResult
from trainer.resume import FILE as STATE_FILE
from trainer.resume import Saved, StateFile
from trainer.schedule import (
    decay_multiplier,
    extra_weight_decay,
    lr_multiplier,
    muon_momentum,
    step_seed,
)
from trainer.workspace import Workspace, count, device_name, load_weights


def train(
    config: TrainConfig,
    reporter: Reporter,
    out: Path | None = None,
    saved: Saved | None = None,
) -> TrainResult:
    """Run one configuration to its score. Call it on every rank of the run.

    Args:
        config: the whole run; config.data.dir must hold a data set.
        reporter: the side channel; used on rank 0 only.
        out: folder for artifact.bin, written by rank 0; None = a temporary folder. Where
            runtime.checkpoint_seconds is on, a run goes on from the state that it finds there.
        saved: told on every rank when rank 0 has written a state.

    Returns: the same result on every rank (seconds are maxima over ranks).
    Raises: ConfigError, DataError, BackendError, ArtifactError; torch.OutOfMemoryError.
    """
    with join_group(config.runtime.device) as group, tempfile.TemporaryDirectory() as scratch:
        run = Run.build(config, reporter if group.is_main else NullReporter(), group)
        finish = Finish(run.work)
        if config.source.artifact:
            return run.score_only(finish, Path(config.source.artifact))
        try:
            if config.source.skips_training:
                run.restore()
                reason = None
            else:
                run.prime()
                if config.evaluate.ensemble != "off":
                    run.ensemble = Ensemble(Path(out or scratch), run.work)
                run.resume(Path(out or scratch), saved)
                with on_compilation(run.note_compilation):
                    reason = run.train_to_budget()
                if reason is None and config.runtime.prime_score == "after":
                    run.prime_score()
            if reason is None:
                run.apply_average()
                finish.calibrate()
        finally:
            run.work.loader.close()
        if reason is not None:
            run.forget_state()
            return run.result(stop_reason=reason)
        if config.runtime.save_checkpoint:
            finish.save_checkpoint(Path(out or scratch) / "checkpoint.bin")
        prequant = finish.score_prequant(run.steps, run.clock.elapsed())
        size = finish.pack(Path(out or scratch) / "artifact.bin")
        score = finish.score_artifact(Path(out or scratch) / "artifact.bin")
        run.score_ensemble()
        run.forget_state()
        return run.result(prequant=prequant, score=score, size=size)


@dataclass(frozen=True)
class KeptStep:
    """Weights as they were before a step near the cap."""

    steps: int
    elapsed_s: float
    """Budget clock when these weights were done, on the slowest rank."""
    weights: dict[str, Tensor]


@dataclass
class Run:
    """The training of one run on one rank; `train` calls its methods in order."""

    work: Workspace
    optimizer: Optimizer
    clock: BudgetClock
    aware: QuantizationAware
    average: WeightAverage | None
    qat_lite: QatLite
    steps: int = 0
    train_loss: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    kept: KeptStep | None = None
    trained_as: TrainConfig | None = None
    """Settings that the weights were trained with, where another run did."""
    unaveraged: float | None = None
    """Progress of the last step, until its weights are taken into the average."""
    primed_seconds: dict[float, float] = field(default_factory=dict)
    """Seconds of a primed step by the start of its phase, until that begins."""
    compilations: int = 0
    """Inside the clock, on this rank."""
    ensemble: Ensemble | None = None
    """Checkpoints to score together, if any."""
    ensemble_loss: dict[str, float] = field(default_factory=dict)
    state_file: StateFile | None = None
    """Where the run's state is saved, if it is."""

    @classmethod
    def build(cls, config: TrainConfig, reporter: Reporter, group: Group) -> Run:
        """Open the data, build the same model on every rank, and what trains it."""
        work = Workspace.open(config, reporter, group)
        return cls(
            work,
            build_optimizer(work.model, config, group),
            BudgetClock(config.step_seconds, group),
            QuantizationAware(work.model, config.quantize),
            build_average(config.average, work.model.state_dict()),
            QatLite(work.model, config.qat_lite),
        )

    @property
    def config(self) -> TrainConfig:
        """The whole run."""
        return self.work.config

    def prime(self) -> None:
        """Take real steps so that every graph is compiled, then undo them, outside the clock."""
        if self.config.runtime.prime_steps == 0:
            return
        with self.work.timer.phase("prime"):
            seconds = prime(self.work, self.optimizer, self._step, self.clock.now)
        self.primed_seconds = seconds
        if self.config.runtime.prime_steps == 1 and self.work.is_compiled:
            self.primed_seconds.clear()  # they are those of compilation
        self._expect_phase(0.0)
        if self.config.runtime.prime_steps == 1:
            self.primed_seconds.clear()

    def resume(self, folder: Path, saved: Saved | None) -> None:
        """Go on where a lost run of the same settings was saved; see to it that this one is."""
        if self.config.runtime.checkpoint_seconds == 0:
            return
        self.state_file = StateFile(
            folder / STATE_FILE, self.work, self.optimizer, self.clock, self.average, saved
        )
        with self.work.timer.phase("restore"):
            counted = self.state_file.restore()
        if counted is not None:
            self.steps, self.compilations = counted["steps"], counted["compilations"]
            self.train_loss, self.step_seconds = counted["train_loss"], counted["step_seconds"]
            if self.ensemble is not None:
                self.ensemble.steps, self.ensemble.last = counted["ensemble"]
            self.work.log(f"goes on after step {self.steps}, {self.clock.elapsed():.1f} s")
            self._report_saved()

    def _save_state(self) -> None:
        """Save the run, outside the clock. The device is idle, the last step in the average."""
        assert self.state_file is not None
        self.clock.stop()
        counted = {
            "steps": self.steps,
            "compilations": self.compilations,
            "train_loss": self.train_loss,
            "step_seconds": self.step_seconds,
            "ensemble": [self.ensemble.steps, self.ensemble.last] if self.ensemble else None,
        }
        with self.work.timer.phase("save_state"):
            self.state_file.save(counted)
        self._report_saved()
        self.clock.start()

    def _report_saved(self) -> None:
        self.work.reporter.emit("saved", step=self.steps, elapsed_s=self.clock.elapsed())

    def forget_state(self) -> None:
        """The run is over: nothing will go on from its state."""
        if self.state_file is not None:
            self.state_file.remove()
        if self.ensemble is not None:
            self.ensemble.remove()

    def _keep_for_ensemble(self) -> None:
        """Keep the weights of now, outside the clock. The device is idle."""
        assert self.ensemble is not None
        self.clock.stop()
        with self.work.timer.phase("save_state"):
            self.ensemble.take(self.steps)
        self.clock.start()

    def score_ensemble(self) -> None:
        """Score the kept checkpoints together, where there are any."""
        if self.ensemble is None:
            return
        with self.work.timer.phase("evaluate_ensemble"):
            scores = self.ensemble.score()
        self.ensemble_loss = {name: score.val_loss for name, score in scores.items()}
        self.work.stages.update({name: score.val_bpb for name, score in scores.items()})

    def restore(self) -> None:
        """Take the weights from source.checkpoint instead of training; prime what scores them."""
        with self.work.timer.phase("restore"):
            load_weights(self.work.model, self.config.source.checkpoint, self.work.group)
        self.average = None
        self.prime_score()

    def score_only(self, finish: Finish, path: Path) -> TrainResult:
        """The score of a packed file; nothing is trained, nothing written."""
        self.work.loader.close()
        self.average = None
        size, made = finish.adopt(path)
        self.trained_as = made.model_copy(update={"evaluate": self.config.evaluate})
        self.prime_score()
        return self.result(score=finish.score_artifact(path), size=size)

    def prime_score(self) -> None:
        """Compile what the score needs, outside every clock."""
        if self.config.runtime.prime_steps:
            with self.work.timer.phase("prime"):
                self.work.prime_evaluation()

    def note_compilation(self) -> None:
        """Something is being compiled: a fault of priming when the clock runs."""
        self.compilations += self.clock.is_running

    def _step(self, step: int, progress: float) -> Tensor:
        """One optimiser step; returns the mean training loss over all workers, on the device."""
        if self.work.model.objective is not None:
            self.work.model.objective.set_progress(progress)
        if self.config.model.is_noisy:
            torch.manual_seed(step_seed(self.config.runtime.seed, step, self.work.group.rank))
        micro_batches = self.work.loader.next_step(progress)
        visits = visits_at(self.config.recur_phases, progress)
        stages = self.config.model.stages
        stage = window_stage_at(stages, progress) if stages else 0
        total = torch.zeros((), device=self.work.group.device)
        model = self.work.model
        with self.aware.weights(progress), model.visiting(visits), model.in_window_stage(stage):
            divisors = self.work.loader.divisors
            for (tokens, targets), divisor in zip(micro_batches, divisors, strict=True):
                loss = self.work.forward(tokens, targets, reduction="objective") / divisor
                torch.autograd.backward(loss)
                total += loss.detach()
        self.qat_lite.add_gradients(step, progress)
        optim = self.config.optim
        self.optimizer.average_gradients([total], optim.grad_clip_norm)
        lr_mult = lr_multiplier(self.config.schedule, step, progress)
        self.optimizer.step(
            lr_mult,
            muon_momentum(optim, step, progress),
            extra_weight_decay(optim, lr_mult, progress),
            decay_multiplier(self.config.schedule, progress),
        )
        self.qat_lite.pull(step, progress)
        self.optimizer.zero_grad()
        return total

    def train_to_budget(self) -> str | None:
        """Step until the budget is spent. Returns why the run was stopped early, or None."""
        config = self.config
        pacer = StepPacer(self.work.group.device)
        reason: str | None = None
        self.clock.start()
        for step in itertools.count(self.steps):
            self._collect(pacer.wait())
            reason = reason or self.work.reporter.stop_requested() or self._not_finite()
            gate = self.clock.gate(pacer.in_flight, reason is not None)
            if gate.near_cap and pacer.in_flight:
                self._collect(pacer.drain())
                gate = self.clock.gate(0, reason is not None)
            if gate.stop or self.steps == config.budget.max_steps:
                break
            if gate.near_cap:
                self.kept = self._keep(gate.elapsed_s)
            self._take_average()
            progress = self._progress(step, gate)
            if self.ensemble is not None and self.ensemble.is_due(self.steps, progress):
                self._collect(pacer.drain())
                self._keep_for_ensemble()
            if self.state_file is not None and self.state_file.is_due(gate.elapsed_s):
                self._collect(pacer.drain())
                self._save_state()
            self.unaveraged = progress
            self._expect_phase(progress)
            pacer.launched(self._step(step, progress))
            self.steps += 1
            if config.runtime.val_every and self.steps % config.runtime.val_every == 0:
                self._collect(pacer.drain())
                self._validate()
        self._collect(pacer.drain())
        self.clock.stop()
        self.work.timer.add("train", self._settle_seconds())
        if self.ensemble is not None:
            self.ensemble.take(self.steps)
        reason = reason or self._not_finite()
        if self.work.group.max_float(float(reason is not None)) > 0:
            return reason or "stopped with rank 0"
        return None

    def _expect_phase(self, progress: float) -> None:
        """Tell the clock what a step of a phase that begins takes, from when it was primed: the
        last steps do not know it."""
        for start in [start for start in self.primed_seconds if start <= progress]:
            self.clock.expect_step(self.primed_seconds.pop(start))

    def _take_average(self) -> None:
        """Take the last step's weights into the average, as soon as it is known that they count."""
        if self.average is not None and self.unaveraged is not None:
            self.average.update(self.unaveraged)
        self.unaveraged = None

    def _keep(self, elapsed_s: float) -> KeptStep:
        weights = {name: value.clone() for name, value in self.work.model.state_dict().items()}
        return KeptStep(self.steps, elapsed_s, weights)

    def _settle_seconds(self) -> float:
        """Seconds of the training that counts. When the last step was held up past the cap, that
        is the training before it: its weights come back, and the step is thrown away."""
        cap, elapsed = self.clock.cap_s, self.work.group.max_float(self.clock.elapsed())
        if cap is None or elapsed <= cap or self.kept is None:
            self._take_average()
            return elapsed
        self.work.model.load_state_dict(self.kept.weights)
        self.steps = self.kept.steps
        line = f"the last step ended at {elapsed:.3f} s, past the cap of {cap:g} s: thrown away"
        self.work.log(line)
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
        self.work.reporter.emit(
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
        with self.work.timer.phase("validate"):
            result = self.work.evaluate(self.config.evaluate.plain())
        self.work.reporter.emit(
            "val",
            step=self.steps,
            elapsed_s=self.clock.elapsed(),
            val_loss=result.val_loss,
            val_bpb=result.val_bpb,
        )
        self.clock.start()

    def apply_average(self) -> None:
        """Put the averaged weights, where there are any, in place of the last ones. Those are
        scored before, as a diagnostic outside every budget."""
        if self.average is None:
            return
        if not self.average.num_updates:
            self.work.log("average: the run ended before it began; not applied")
            return
        if self.config.evaluate.prequant:
            with self.work.timer.phase("evaluate_trained"):
                score = self.work.evaluate(self.config.evaluate.plain())
            self.work.stages["trained"] = score.val_bpb
        with self.work.timer.phase("average"):
            self.work.model.load_state_dict(self.average.result(), strict=False)
        held = f"{self.average.num_updates} sets of weights"
        self.work.log(f"average: {self.config.average.kind} over {held}")

    def result(
        self,
        stop_reason: str | None = None,
        prequant: EvalResult | None = None,
        score: EvalResult | None = None,
        size: PackedSize | None = None,
    ) -> TrainResult:
        """The outcome so far, equal on every rank but for the size, which rank 0 knows."""
        names = ["build", "restore", "prime", "train", "validate"]
        names += ["save_state", "evaluate_trained", "average"]
        names += ["calibrate", "checkpoint", "evaluate_prequant", "quantize", "pack"]
        names += ["evaluate_stages", "evaluate", "evaluate_ensemble"]
        timer = self.work.timer
        seconds = self.work.group.max_floats(*(timer.seconds.get(name, 0.0) for name in names))
        compilations = int(self.work.group.max_float(float(self.compilations)))
        if compilations and self.config.runtime.prime_steps:
            self.work.log(
                f"{compilations} graphs were compiled inside the clock, in spite of priming"
            )
        phases = {name: value for name, value in zip(names, seconds, strict=True) if value > 0}
        return TrainResult(
            status="finished" if stop_reason is None else "stopped",
            stop_reason=stop_reason,
            steps=self.steps,
            tokens=self.steps * self.config.data.batch_tokens,
            num_params=count(self.work.model),
            world_size=self.work.group.size,
            device=device_name(self.work.group.device),
            phases=phases,
            step_ms=1000 * statistics.median(self.step_seconds) if self.step_seconds else None,
            train_loss=self.train_loss,
            val_loss=score.val_loss if score else None,
            val_bpb=score.val_bpb if score else None,
            val_bpb_prequant=prequant.val_bpb if prequant else None,
            stages=self.work.stages,
            ensemble=self.ensemble_loss,
            val_tokens=score.num_tokens if score else None,
            bytes_code=size.bytes_code if size else None,
            bytes_model=size.bytes_model if size else None,
            artifact_sha256=size.sha256 if size else None,
            skipped=self._skipped() if score else [],
            illegal=illegal_in_use(self.trained_as or self.config),
            compilations=compilations,
            peak_memory_bytes=self.work.peak_memory(),
        )

    def _skipped(self) -> list[str]:
        """Diagnostic passes that the settings left out, in the words of the stages."""
        possible = ["quantized"]
        if not self.config.source.artifact:
            possible = ["trained", "quantized"]
        if self.average is not None and self.average.num_updates:
            possible = ["trained", "averaged", "quantized"]
        return [name for name in possible if name not in self.work.stages]
