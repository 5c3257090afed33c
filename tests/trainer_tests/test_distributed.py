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
        "reduce_scatter": reduce_scatter(group),
        "all_gather": group.all_gather(torch.tensor([[rank, 7.0]])).wait().tolist(),
    }


def reduce_scatter(group: Group) -> list[float]:
    """This rank's part of a sum, changed after the first wait and asked for again."""
    pending = group.reduce_scatter_sum(torch.arange(4.0) + group.rank)
    pending.wait().mul_(10)
    return pending.wait().tolist()


def test_collectives_of_two_ranks() -> None:
    for rank, answer in enumerate(run_ranks(exercise, 2)):
        assert answer.pop("reduce_scatter") == [[10.0, 30.0], [50.0, 70.0]][rank]
        assert answer == {
            "mean": [[[0.5] * 3] * 2, 5.0, [0.5] * 4],
            "sum": 3.0,
            "max": [1.0, 0.0, 0.1],
            "bytes": b"from zero",
            "empty": b"",
            "broadcast": 1.0,
            "all_gather": [[0.0, 7.0], [1.0, 7.0]],
        }


def test_a_group_of_one_needs_no_process_group() -> None:
    with join_group("cpu") as group:
        assert (group.rank, group.size, group.is_main) == (0, 1, True)
        tensor = torch.tensor([3.0])
        group.all_reduce_mean_([tensor])
        assert tensor.item() == 3.0
        assert group.max_float(2.5) == 2.5
        assert reduce_scatter(group) == [0.0, 10.0, 20.0, 30.0]
        assert group.all_gather(torch.tensor([2.0])).wait().tolist() == [2.0]
        assert group.broadcast_bytes(b"x") == b"x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_asking_for_cuda_without_one_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"runtime\.device"), join_group("cuda"):
        pass
