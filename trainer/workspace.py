"""What every phase of a run works on: the data, the model, the clock of phases, the reporter."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.attention import select_backend
from trainer.calibrate import check_calibration
from trainer.clock import PhaseTimer
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader
from trainer.data.overlap import check_overlap
from trainer.distributed import Group
from trainer.evaluate.methods import prime_score, score
from trainer.evaluate.scorer import EvalResult
from trainer.evaluate.subject import Subject
from trainer.kernels.choice import choose_kernel
from trainer.loss import build_objective
from trainer.model.gpt import GPT
from trainer.model.iha import InterleavedHeads
from trainer.model.mlp import MLP
from trainer.report import Reporter


@dataclass
class Workspace:
    """One rank's share of a run; the phases in loop.py and finish.py work on it in turn."""

    config: TrainConfig
    reporter: Reporter
    group: Group
    dataset: Dataset
    byte_table: ByteTable
    model: GPT
    forward: Callable[..., Tensor]
    """The model, compiled where that is on."""
    loader: TrainLoader
    timer: PhaseTimer
    stages: dict[str, float] = field(default_factory=dict)
    """Bits per byte by stage, in the words of TrainResult.stages."""

    @classmethod
    def open(cls, config: TrainConfig, reporter: Reporter, group: Group) -> Workspace:
        """Open the data and build the same model on every rank."""
        device = group.device
        timer = PhaseTimer(
            torch.cuda.synchronize if device.type == "cuda" else _nothing,
            lambda name, seconds: reporter.emit("phase", name=name, seconds=seconds),
        )
        with timer.phase("build"):
            dataset = Dataset.open(config.data.dir, config.model.vocab_size)
            dataset.check_scored_tokens(config.evaluate.seq_len, config.data.val_tokens)
            if config.data.max_overlap < 1:
                check_overlap(dataset, config.data.max_overlap)
            check_calibration(config, dataset)
            byte_table = ByteTable.from_tokenizer(dataset.tokenizer_path, config.model.vocab_size)
            torch.manual_seed(config.runtime.seed)
            if device.type == "cuda":
                torch.set_float32_matmul_precision("high")
                torch.cuda.reset_peak_memory_stats()
            model = build_model(config, group, lambda line: reporter.emit("log", line=line))
            loader = TrainLoader.from_config(dataset, config, group)
        forward = _compiled(model) if _compiles(config, device) else model
        reporter.emit(
            "start",
            num_params=count(model),
            world_size=group.size,
            device=device_name(device),
            total_tokens_per_step=config.data.batch_tokens,
            data_digest=dataset.digest,
        )
        return cls(config, reporter, group, dataset, byte_table, model, forward, loader, timer)

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile is on."""
        return self.forward is not self.model

    def log(self, line: str) -> None:
        """Say something to the reader of the run's log."""
        self.reporter.emit("log", line=line)

    def evaluate(self, config: EvaluateConfig) -> EvalResult:
        """Bits per byte of the weights in memory, over all ranks. Where evaluate.ttt adapts them,
        they stay changed."""
        return score(self._subject(), config)

    def prime_evaluation(self) -> None:
        """Compile what this run's score needs, outside every clock, without validation tokens."""
        prime_score(self._subject(), self.config.evaluate)

    def _subject(self) -> Subject:
        return Subject(
            self.model,
            self.forward,
            self.dataset,
            self.byte_table,
            self.config.data.micro_batch_tokens,
            self.group,
        )

    def peak_memory(self) -> int:
        """Bytes that the most loaded rank has used at once: of the GPU, or of its process."""
        return int(self.group.max_float(_peak_memory(self.group.device)))


def build_model(config: TrainConfig, group: Group, log: Callable[[str], None]) -> GPT:
    """The model on its device, with rank 0's initial weights on every rank.

    Weights come from torch's global generator: seed it before. Raises BackendError when the
    attention backend or a kernel that runtime asks for by name cannot run here.
    """
    attend = select_backend(
        config.runtime.attention,
        group.device.type,
        log,
        windowed=config.model.window > 0,
        documents=config.model.document_attention,
        half=_compute_dtype(config, group.device) == torch.bfloat16,
    )
    row_lengths = config.data.row_lengths | {config.evaluate.seq_len}
    model = GPT(config.model, attend, max(row_lengths), row_lengths)
    model.objective = build_objective(config.loss)
    _choose_kernels(model, config, group, log)
    model.to(group.device)
    model.compute_dtype = _compute_dtype(config, group.device)
    for parameter in model.parameters():
        group.broadcast_(parameter.data)
    return model


def _choose_kernels(
    model: GPT, config: TrainConfig, group: Group, log: Callable[[str], None]
) -> None:
    runtime, kind = config.runtime, group.device.type
    mlp_kernel = choose_kernel("mlp_kernel", runtime.mlp_kernel, kind, 9, log)
    loss_kernel = choose_kernel("loss_kernel", runtime.loss_kernel, kind, 8, log)
    iha_kernel = choose_kernel("iha_kernel", runtime.iha_kernel, kind, 8, log)
    model.fuses_loss = loss_kernel == "fused" and model.objective is None
    for module in model.modules():
        if isinstance(module, MLP):
            module.kernel = mlp_kernel
        elif isinstance(module, InterleavedHeads):
            module.kernel = iha_kernel


def load_weights(model: GPT, path: str, group: Group) -> None:
    """Put the weights of a checkpoint that rank 0 reads into the model of every rank.

    Raises: ArtifactError when there is none, ConfigError when it is of another model.
    """

    def load() -> None:
        weights = checkpoint.read(Path(path))
        shapes = {name: array.shape for name, array in weights.items()}
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        checkpoint.check_fits(path, shapes, wanted)
        state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
        model.load_state_dict(state)

    group.on_main(load)
    for value in model.state_dict().values():
        group.broadcast_(value)


def count(model: GPT) -> int:
    """Parameters of the model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _compiled(model: GPT) -> Callable[..., Tensor]:
    # One graph per row length, purpose and phase of recurrence: more than the library's limit of 8,
    # at which it would raise.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(model, dynamic=False, fullgraph=True)


def _compiles(config: TrainConfig, device: torch.device) -> bool:
    if config.runtime.compile == "auto":
        return device.type == "cuda"
    return config.runtime.compile == "on"


def _compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.runtime.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.runtime.dtype == "bfloat16" else torch.float32


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _nothing() -> None:
    pass
