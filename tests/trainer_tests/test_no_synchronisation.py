"""Nothing inside a step waits for the device: on a CPU, operators that would are caught by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from tests.trainer_tests.small_recipes import SMALL
from trainer.distributed import Group
from trainer.loop import Run
from trainer.recipes import RECIPES
from trainer.report import NullReporter

SYNCHRONISING = (
    "_local_scalar_dense",  # .item(), float(), bool(), an `if` on a tensor
    "nonzero",  # also x[mask]; the size of what comes out is read back
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave.Tensor",
    "bincount",
    "equal",
    "lift_fresh",  # torch.tensor(...) of Python numbers: a copy from memory that is not pinned
)


class NoSynchronisation(TorchDispatchMode):
    """Notes operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        name = str(func).removeprefix("aten.")
        if any(name == bad or name.startswith(f"{bad}.") for bad in SYNCHRONISING):
            self.found.append(name)
        if any(x.dtype in (torch.bool, torch.uint8) for x in _indices(name, args)):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def _indices(name: str, args: Any) -> list[torch.Tensor]:
    if not name.startswith(("index.", "index_put")):
        return []
    return [x for x in args[1] if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("data"), random_tokens(4000), random_tokens(1200, seed=1), 4000
    )


MORE: dict[str, dict[str, Any]] = {
    "frontier": {},
    "pr1212": {},
    "pr1894": {},
    "pr675": {},
    "pr1894 sharded, turbo": {
        "optim.muon_comm": "reduce_scatter",
        "optim.orthogonalization": "turbo",
        "optim.muon_post_norm": "row_col",
    },
    "pr675 neurons, cautious": {
        "optim.muon_variance_beta": 0.9,
        "optim.muon_cautious_decay": True,
        "optim.grad_clip_norm": 1.0,
    },
}


@pytest.mark.parametrize("name", MORE)
def test_a_step_never_waits_for_the_device(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches are read before: on a GPU by a thread, pinned, on a stream of its own."""
    recipe = name.split()[0]
    changes = {**SMALL[recipe], "model.vocab_size": VOCAB_SIZE, "data.dir": str(folder)}
    config = RECIPES[recipe].build().with_overrides({**changes, **MORE[name]})
    run = Run.build(config, NullReporter(), Group(torch.device("cpu")))
    run._step(0, 0.0)
    read = run.work.loader.next_step
    for step, progress in enumerate((0.1, 0.5, 0.99), 1):
        batches = read(progress)
        monkeypatch.setattr(run.work.loader, "next_step", lambda _, ready=batches: ready)
        with NoSynchronisation() as watch:
            run.unaveraged = progress
            run._take_average()
            run._step(step, progress)
        assert watch.count > 500
        assert watch.found == [], f"at progress {progress}"
    run.work.loader.close()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index.Tensor by a mask"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x * torch.tensor([2.0]), "lift_fresh"),
        (lambda x: 1 if x.sum() > 0 else 0, "_local_scalar_dense"),
    ],
)
def test_the_watch_finds_what_waits(call: Any, named: str) -> None:
    with NoSynchronisation() as watch:
        call(torch.randn(5))
    assert any(name.startswith(named) for name in watch.found), watch.found
