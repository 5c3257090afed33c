"""Real work before the clock starts, undone afterwards, so that nothing is compiled inside it.

Every graph of training is run: one phase of recurrence, windows or row lengths after another, each
by a few whole steps, or by steps of one micro batch of each shape, which compile the same. Then
what calibration and the score need.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainer.calibrate import calibrate, sensitivities
from trainer.config import TrainConfig
from trainer.config.row_schedule import row_stages
from trainer.optim import Optimizer
from trainer.pacer import StepPacer
from trainer.workspace import Workspace

Step = Callable[[int, float], Tensor]
"""Number and progress of a step -> its loss."""


def prime(
    work: Workspace, optimizer: Optimizer, step: Step, now: Callable[[], float]
) -> dict[float, float]:
    """Runs on every rank together. Returns the seconds that a step takes by the start of its phase,
    as measured by the last of each."""
    weights = {name: value.clone() for name, value in work.model.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    position = work.loader.state_dict()
    begin = now()
    with work.loader.one_of_each_shape(work.config.runtime.prime_batches == "shapes"):
        seconds = {
            start: _prime_phase(work, step, start, now) for start in phase_starts(work.config)
        }
    trained = now()
    _prime_calibration(work)
    calibrated = now()
    work.model.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    work.loader.load_state_dict(position)
    if work.config.runtime.prime_score == "before":
        work.prime_evaluation()
    work.log(
        f"primed: training {trained - begin:.1f} s, calibration {calibrated - trained:.1f} s, "
        f"score {now() - calibrated:.1f} s"
    )
    return seconds


def phase_starts(config: TrainConfig) -> list[float]:
    """Shares of the budget from which steps run another graph."""
    starts = {phase.start for phase in config.recur_phases}
    starts |= {stage.start for stage in config.model.stages}
    return sorted(starts | {stage.start for stage in row_stages(config.data)})


def _prime_phase(work: Workspace, step: Step, start: float, now: Callable[[], float]) -> float:
    """Steps of one phase; the seconds that a whole one takes, by the last."""
    pacer = StepPacer(work.group.device)
    started = now()
    for number in range(work.config.runtime.prime_steps):
        started = now()
        pacer.launched(step(number, start))
        pacer.drain()
    return (now() - started) * work.loader.num_micro_batches / len(work.loader.divisors)


def _prime_calibration(work: Workspace) -> None:
    config, model, loader = work.config, work.model, work.loader
    if config.quantize.method != "gptq":
        return
    hessians = calibrate(config, model, loader, work.group, prime=True)
    if config.quantize.allocate != "off":
        sensitivities(config, model, loader, hessians, work.group, prime=True)
