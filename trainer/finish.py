"""After training: calibrate, quantise, pack, write; then read the file back and score that.

What is scored is the file as read from disk, never the weights in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from trainer import artifact, checkpoint
from trainer.calibrate import calibrate, sensitivities
from trainer.code import packed_code
from trainer.compress import coded_size
from trainer.config import TrainConfig
from trainer.errors import ArtifactError, ConfigError
from trainer.evaluate.naive_ttt import train_on_validation
from trainer.evaluate.scorer import EvalResult
from trainer.quantize import QuantizedState, coded_names, dequantize, quantize
from trainer.quantize.allocation import Packer
from trainer.quantize.prune import prune_to_fit
from trainer.quantize.sensitivity import Sensitivities
from trainer.workspace import Workspace


@dataclass(frozen=True)
class PackedSize:
    """What the artifact weighs, and what it is."""

    bytes_code: int
    bytes_model: int
    sha256: str


@dataclass
class Finish:
    """From final weights to the score; `trainer.loop.train` calls its methods in order."""

    work: Workspace
    hessians: dict[str, Tensor] = field(default_factory=dict)
    sensitivities: Sensitivities | None = None

    def calibrate(self) -> None:
        """Collect what GPTQ needs to know of the final weights' inputs. It reads training data or
        writes text with the model, so it counts against budget.train_seconds."""
        work, config = self.work, self.work.config
        if config.quantize.method != "gptq":
            return
        with work.timer.phase("calibrate"):
            self.hessians = calibrate(config, work.model, work.loader, work.group)
            if config.quantize.allocate != "off":
                self.sensitivities = sensitivities(
                    config, work.model, work.loader, self.hessians, work.group
                )
        missing = set(coded_names(dict(work.model.named_parameters()), config.quantize))
        missing -= set(self.hessians)
        if missing:
            names = ", ".join(sorted(missing))
            work.log(f"gptq: rounded, as no linear product uses it: {names}")
        self._report_overrun(work.timer.seconds["calibrate"])

    def _report_overrun(self, seconds: float) -> None:
        config = self.work.config
        reserve = config.quantize.reserve_seconds
        if config.budget.train_seconds is not None and seconds > reserve:
            self.work.log(
                f"calibration took {seconds:.1f} s where quantize.reserve_seconds = "
                f"{reserve:g}; raise it, or lower quantize.calibration_tokens"
            )

    def save_checkpoint(self, path: Path) -> None:
        """Write the weights in memory on rank 0. A failure there is raised on every rank."""
        work = self.work

        def write() -> None:
            weights = {name: value.cpu().numpy() for name, value in work.model.state_dict().items()}
            artifact.write(path, checkpoint.pack(weights, work.config))

        with work.timer.phase("checkpoint"):
            work.group.on_main(write)

    def score_prequant(self, steps: int, elapsed_s: float) -> EvalResult | None:
        """Bits per byte of the weights in memory, in plain rows; None when switched off."""
        work = self.work
        if not work.config.evaluate.prequant:
            return None
        with work.timer.phase("evaluate_prequant"):
            result = work.evaluate(work.config.evaluate.plain())
        work.stages["averaged" if "trained" in work.stages else "trained"] = result.val_bpb
        work.reporter.emit(
            "val",
            step=steps,
            elapsed_s=elapsed_s,
            val_loss=result.val_loss,
            val_bpb=result.val_bpb,
        )
        return result

    def pack(self, path: Path) -> PackedSize:
        """Quantise, pack and write on rank 0. A failure there is raised on every rank."""
        size = self.work.group.on_main(lambda: self._write_artifact(path))
        return size or PackedSize(0, 0, "")

    def _write_artifact(self, path: Path) -> PackedSize:
        work = self.work
        if self.sensitivities is not None:
            return self._write_allocated(path, self.sensitivities)
        with work.timer.phase("quantize"):
            state = work.model.state_dict()
            quantized = quantize(state, work.config.quantize, self.hessians, work.log)
        with work.timer.phase("pack"):
            blob = self._encode(quantized)
            artifact.write(path, blob)
        return PackedSize(len(packed_code(work.config)), len(blob), artifact.sha256(blob))

    def _write_allocated(self, path: Path, sensitivities: Sensitivities) -> PackedSize:
        """Share out what the code leaves of budget.artifact_bytes."""
        work, config = self.work, self.work.config
        bytes_code, cap = len(packed_code(config)), config.budget.artifact_bytes
        assert cap is not None
        with work.timer.phase("quantize"):
            packer = Packer(
                work.model.state_dict(),
                config.quantize,
                self.hessians,
                sensitivities,
                partial(coded_size, config=config.compress),
                work.log,
            )
        with work.timer.phase("pack"):
            blob = packer.pack(cap - bytes_code, partial(artifact.encode, config=config))
            artifact.write(path, blob)
        return PackedSize(bytes_code, len(blob), artifact.sha256(blob))

    def _encode(self, quantized: QuantizedState) -> bytes:
        """The file's content, made to fit where quantize.prune_to_fit is on."""
        config, cap = self.work.config, self.work.config.budget.artifact_bytes
        if not config.quantize.prune_to_fit or cap is None:
            return artifact.encode(quantized, config)
        cap -= len(packed_code(config))
        encode = partial(artifact.encode, config=config)
        blob, num_pruned = prune_to_fit(quantized, self.hessians, cap, encode)
        if num_pruned:
            self.work.log(f"pruned {num_pruned:,} codes of 1 to fit {cap:,} bytes of model")
        return blob

    def adopt(self, path: Path) -> tuple[PackedSize, TrainConfig]:
        """Size and settings of a file that another run packed, on every rank. Raises ArtifactError,
        and ConfigError when it holds another model than this run's."""
        group = self.work.group
        with self.work.timer.phase("restore"):
            blob = group.broadcast_bytes(group.on_main(lambda: artifact.read(path)))
            made, _ = artifact.decode(blob)
        own = self.work.config.model.model_dump()
        faults = [
            f"model.{name} = {value!r} where this run has {own[name]!r}"
            for name, value in made.model.model_dump().items()
            if value != own[name]
        ]
        if faults:
            raise ConfigError(
                f"source.artifact = {path} was made with {', '.join(faults)}; give the settings "
                "that it was made with, or another file"
            )
        return PackedSize(
            len(packed_code(self.work.config)), len(blob), artifact.sha256(blob)
        ), made

    def score_artifact(self, path: Path) -> EvalResult:
        """Bits per byte of the file: read it back, decode, load, evaluate on all ranks."""
        work, config = self.work, self.work.config.evaluate
        if config.stages and config != config.plain():
            with work.timer.phase("evaluate_stages"):
                self._load(path)
                work.stages["quantized"] = work.evaluate(config.plain()).val_bpb
        with work.timer.phase("evaluate"):
            self._load(path)
            if config.naive_ttt_epochs:
                train_on_validation(
                    work.forward,
                    work.model.parameters(),
                    work.dataset,
                    config,
                    work.config.data.micro_batch_tokens,
                    work.group,
                )
            score = work.evaluate(config)
        work.stages[config.method] = score.val_bpb
        return score

    def _load(self, path: Path) -> None:
        """Put the weights of the file that rank 0 reads into the model of every rank."""
        group = self.work.group
        blob = artifact.read(path) if group.is_main else None
        _, quantized = artifact.decode(group.broadcast_bytes(blob))
        try:
            self.work.model.load_state_dict(dequantize(quantized))
        except RuntimeError as error:
            raise ArtifactError(
                f"{path}: its tensors are not those of its settings ({str(error)[:300]}); pack the "
                "model again"
            ) from None
