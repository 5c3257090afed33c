"""A run inside a process group that somebody else made, as on a gang that serves several."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.distributed import Group, join_group


def rejoin(group: Group) -> list[object]:
    """Groups that exist before, during and after a run whose tensors go over another backend."""
    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "get_backend", lambda: "another")
    known = dist.distributed_c10d._world.pg_map
    before = len(known)
    with join_group("cpu") as found:
        during, largest = len(known), found.max_float(float(found.rank))
    patch.undo()
    return [during - before, len(known) - before, largest, group.max_float(2.0 + group.rank)]


def test_a_run_leaves_no_group_behind() -> None:
    assert run_ranks(rejoin, 2) == [[1, 0, 1.0, 3.0]] * 2
