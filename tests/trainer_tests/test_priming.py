"""Priming: every graph before the clock, nothing changed, and what may be left until later. CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.small_recipes import SMALL
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader
from trainer.distributed import Group
from trainer.loop import Run, train
from trainer.recipes import RECIPES
from trainer.report import NullReporter

CPU_GROUP = Group(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("data"), random_tokens(4000), random_tokens(1200, seed=1), 4000
    )


def config_of(recipe: str, folder: Path, **changes: Any) -> TrainConfig:
    small = {**SMALL[recipe], "model.vocab_size": VOCAB_SIZE, "data.dir": str(folder)}
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    common = {"evaluate.prequant": False, "quantize.reserve_seconds": 0.01}
    return RECIPES[recipe].build().with_overrides({**small, **common, **dotted})


def test_a_thinned_step_has_the_first_micro_batch_of_every_shape(folder: Path) -> None:
    config = config_of("pr1212", folder, data__micro_batch_tokens=96)
    loader = TrainLoader.from_config(Dataset.open(folder), config, CPU_GROUP)
    whole = loader.next_step()
    loader.load_state_dict({**loader.state_dict(), "position": 0})
    with loader.one_of_each_shape():
        thinned = loader.next_step()
        assert len(loader.divisors) == len(thinned)
    shapes = list(dict.fromkeys(tuple(x.shape) for x, _ in whole))
    assert len(shapes) == 2 < len(whole)
    assert [tuple(x.shape) for x, _ in thinned] == shapes
    for x, y in thinned:
        first = next(pair for pair in whole if pair[0].shape == x.shape)
        assert torch.equal(x, first[0]) and torch.equal(y, first[1])
    assert len(loader.divisors) == len(whole)


@pytest.mark.parametrize("recipe", ["pr1212", "pr1894"])
def test_light_and_late_priming_change_no_number(recipe: str, folder: Path) -> None:
    few = {"budget__max_steps": 3, "evaluate__ttt": "off"}
    plain = train(config_of(recipe, folder, **few), NullReporter())
    light = {"runtime__prime_batches": "shapes", "runtime__prime_score": "after"}
    other = train(config_of(recipe, folder, **few, **light), NullReporter())
    assert other.train_loss == plain.train_loss
    assert other.val_bpb == plain.val_bpb


def count_graphs(run: Run) -> list[tuple[Any, ...]]:
    """Have the run compile with a backend that only notes what it is given."""
    seen: list[tuple[Any, ...]] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        shapes = tuple(tuple(x.shape) for x in inputs if x.dtype == torch.int64)
        seen.append((torch.is_grad_enabled(), len(graph.graph.nodes), shapes))
        return graph.forward

    torch._dynamo.reset()
    run.work.forward = torch.compile(run.work.model, backend=note, fullgraph=True, dynamic=False)
    return seen


def test_light_priming_compiles_the_graphs_of_whole_steps(folder: Path) -> None:
    found = []
    for batches in ("all", "shapes"):
        config = config_of("pr1894", folder, runtime__prime_batches=batches)
        run = Run.build(config, NullReporter(), CPU_GROUP)
        seen = count_graphs(run)
        run.prime()
        primed = len(seen)
        for progress in (0.0, 0.5):
            run._step(0, progress)
        run.work.evaluate(config.evaluate)
        assert len(seen) == primed, "compiled after priming"
        found.append(seen)
    assert found[0] == found[1]
    grads = sorted((grad, nodes) for grad, nodes, _ in found[0])
    assert len(grads) == 4  # two phases of training, the score, and SGD on what is scored


def test_the_score_can_be_primed_after_training(folder: Path) -> None:
    config = config_of("pr1894", folder, runtime__prime_score="after")
    run = Run.build(config, NullReporter(), CPU_GROUP)
    seen = count_graphs(run)
    run.prime()
    assert len(seen) == 2
    run.prime_score()
    assert len(seen) == 4
    run.work.evaluate(config.evaluate)
    assert len(seen) == 4


def test_one_primed_step_that_compiles_says_nothing_of_step_times(folder: Path) -> None:
    """A run with less time than its compilation took used to end before its first step."""
    config = config_of("pr675", folder, runtime__prime_steps=1)
    run = Run.build(config, NullReporter(), CPU_GROUP)
    count_graphs(run)
    run.prime()
    assert run.clock.predicted_step_s() == 0.0
    eager = Run.build(config, NullReporter(), CPU_GROUP)
    eager.prime()
    assert eager.clock.predicted_step_s() > 0.0
