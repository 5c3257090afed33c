"""`caddie estimate`: what a configuration weighs and costs, without training it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.recipe_config import configured, recipe_named
from service.commands.terminal import (
    JsonFlag,
    SetOption,
    make_table,
    named,
    number,
    output,
    print_json,
)
from service.commands.train import RecipeArgument
from trainer.account import count_parameters, flops_per_token
from trainer.config import TrainConfig
from trainer.mix import lanes_of

if TYPE_CHECKING:
    from service.filters import Filter
    from service.trial import TrialSpec


@dataclass(frozen=True)
class Device:
    """What one processor does with a small model, as far as a table can say."""

    flops: float
    """Floating-point operations per second that training really gets."""
    basis: str


DEVICES = {
    "h100": Device(
        1.97e14, "golf_baseline: 43.54 ms for 524,288 tokens on eight, 20 % of 989 TFLOP/s"
    ),
    "h200": Device(2.22e14, "golf_baseline: 308 ms for 524,288 tokens on one, 23 % of 989 TFLOP/s"),
    "cpu": Device(2.0e10, "tiny: 4,096 tokens in 180 ms on one core"),
}
"""Rough: other shapes, backends and machines differ by a factor of two and more."""


def estimate(
    recipe: RecipeArgument,
    sets: SetOption = None,
    device: Annotated[
        str | None, typer.Option("--device", help="h100, h200 or cpu; default: as the track says.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Number of devices.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say parameters, bytes, step time and the launch filters' verdicts; trains nothing."""
    config, overrides = configured(recipe, sets)
    device, count = _hardware(recipe, device, count)
    answer = forecast(recipe, config, overrides, device, count)
    if as_json:
        return print_json(answer)
    _show(answer)


def forecast(
    recipe: str, config: TrainConfig, overrides: dict[str, Any], device: str, count: int
) -> dict[str, Any]:
    """The estimate as the contract's document."""
    from service.filters import Filter, default_filters
    from service.filters.artifact_size import ArtifactSize
    from service.trial import TrialSpec

    spec = TrialSpec("estimate", 0, recipe, overrides, config, Path.cwd(), workers=count)
    filters = default_filters(track=recipe_named(recipe).track, recipe=recipe)
    size = next(f for f in filters if isinstance(f, ArtifactSize)).forecast(config, count)
    flops = _flops_per_token(config)
    step_s = flops * config.data.batch_tokens / (DEVICES[device].flops * count)
    seconds = config.budget.train_seconds
    return {
        "recipe": recipe,
        "overrides": overrides,
        "parameters": count_parameters(config.model),
        "bytes": {f"p{percent:02}": size.quantile(percent / 100) for percent in (5, 50, 95)},
        "flops_per_token": flops,
        "step_time": {
            "device": device,
            "count": count,
            "step_ms": 1000 * step_s,
            "steps": int(seconds / step_s) if seconds is not None else config.budget.max_steps,
            "basis": f"rough, from {DEVICES[device].basis}",
        },
        "verdicts": [
            _judge(judge, spec)
            for judge in filters
            if type(judge).before_launch is not Filter.before_launch
        ],
    }


def _flops_per_token(config: TrainConfig) -> float:
    """Of training, averaged over the tokens of a step, whose rows may differ in length."""
    lanes = lanes_of(config.data)
    total = sum(lane.num_tokens * flops_per_token(config.model, lane.seq_len) for lane in lanes)
    return total / sum(lane.num_tokens for lane in lanes)


def _judge(judge: Filter, spec: TrialSpec) -> dict[str, Any]:
    verdict = judge.before_launch(spec)
    if verdict is None:
        nothing = {"value": None, "bound": None, "unit": "", "reason": "nothing against it"}
        return {"name": judge.name, "ok": True, **nothing}
    return {
        "name": verdict.name,
        "ok": verdict.ok,
        "value": verdict.value,
        "bound": verdict.bound,
        "unit": verdict.unit,
        "reason": verdict.reason,
    }


def _hardware(recipe: str, device: str | None, count: int | None) -> tuple[str, int]:
    """What the recipe's track runs on, unless told otherwise."""
    from search_spaces.tracks import TRACKS

    track = TRACKS.get(recipe_named(recipe).track)
    on_node = track is not None and "H100" in track.hardware
    chosen = device or ("h100" if on_node else "cpu")
    named("device", chosen, DEVICES)
    return chosen, count or (8 if on_node and chosen != "cpu" else 1)


def _show(answer: dict[str, Any]) -> None:
    size, step = answer["bytes"], answer["step_time"]
    table = make_table("", "")
    table.add_row("parameters", number(answer["parameters"], 0))
    table.add_row("bytes", f"{size['p50']:,} (90 % interval {size['p05']:,} to {size['p95']:,})")
    table.add_row("FLOPs per token", f"{answer['flops_per_token']:.4g}, forward and backward")
    table.add_row(
        "step",
        f"{step['step_ms']:,.1f} ms on {step['count']} x {step['device']}, "
        f"{number(step['steps'], 0)} steps in the budget ({step['basis']})",
    )
    output().print(table)
    verdicts = make_table("filter", "ok", "reason")
    for verdict in answer["verdicts"]:
        verdicts.add_row(verdict["name"], "yes" if verdict["ok"] else "no", verdict["reason"])
    output().print(verdicts)
