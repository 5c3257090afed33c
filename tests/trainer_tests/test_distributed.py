"""Collectives on real gloo ranks, and the group of one."""

import pytest
import torch

from tests.ranks import run_ranks
from trainer.distributed import Group, join_group
from trainer.errors import BackendError


def exercise(group: Group) -> dict[str, object]:
    """Every collective once, with values that depend on the rank."""
    rank = float(group.rank)
    tensors = [torch.full((2, 3), rank), torch.tensor(10.0 * rank), torch.full((4,), rank).double()]
    group.all_reduce_mean_(tensors)
    return {
        "mean": [tensor.tolist() for tensor in tensors],
        "sum": group.all_reduce_sum_(torch.tensor([1.0 + rank])).item(),
        "max": group.max_floats(rank, -rank, 0.1),
        "bytes": group.broadcast_bytes(b"from zero" if group.is_main else None),
        "empty": group.broadcast_bytes(b"" if group.is_main else None),
        "broadcast": group.broadcast_(torch.tensor([rank]), src=1).item(),
    }


def test_collectives_of_two_ranks() -> None:
    for answer in run_ranks(exercise, 2):
        assert answer == {
            "mean": [[[0.5] * 3] * 2, 5.0, [0.5] * 4],
            "sum": 3.0,
            "max": [1.0, 0.0, 0.1],
            "bytes": b"from zero",
            "empty": b"",
            "broadcast": 1.0,
        }


def test_a_group_of_one_needs_no_process_group() -> None:
    with join_group("cpu") as group:
        assert (group.rank, group.size, group.is_main) == (0, 1, True)
        tensor = torch.tensor([3.0])
        group.all_reduce_mean_([tensor])
        assert tensor.item() == 3.0
        assert group.max_float(2.5) == 2.5
        assert group.broadcast_bytes(b"x") == b"x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_asking_for_cuda_without_one_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"runtime\.device"), join_group("cuda"):
        pass
