"""Gangs on nodes: never split, packed so that large gangs find room, kept off closed nodes."""

from __future__ import annotations

import random

import pytest

from service.placement import Node, Placement


def nodes(count: int, gpus: int = 8) -> list[Node]:
    return [Node(f"n{i}", gpus) for i in range(count)]


def test_small_gangs_share_a_node_so_that_a_large_one_fits_the_other() -> None:
    placement = Placement(nodes(2))
    seats = [placement.place(key, gpus) for key, gpus in enumerate((1, 2, 1, 4))]
    assert seats == ["n0"] * 4
    assert placement.place("large", 8) == "n1"
    assert placement.place("one more", 1) is None
    assert placement.release(1) == "n0"
    assert placement.place("fits the gap", 2) == "n0"


def test_a_gang_never_spans_nodes() -> None:
    placement = Placement(nodes(2))
    placement.place("a", 6)
    placement.place("b", 6)
    assert placement.num_fitting(2) == 2
    assert placement.num_fitting(4) == 0, "two halves on two nodes are no gang"
    assert placement.place("c", 4) is None


def test_labels_and_closed_nodes_count() -> None:
    placement = Placement([Node("old", 8, {"gpu": "A100"}), Node("new", 8, {"gpu": "H200"})])
    wish = {"gpu": "H200"}
    assert placement.num_fitting(8, wish) == 1
    assert placement.place("a", 4, wish) == "new"
    assert placement.place("b", 8, wish) is None
    assert placement.place("c", 4, wish, closed=frozenset({"new"})) is None
    assert placement.place("d", 4, wish) == "new"
    assert placement.gangs_on("new") == ["a", "d"]


@pytest.mark.parametrize("seed", range(5))
def test_no_node_idles_while_work_fits_and_no_gpu_is_counted_twice(seed: int) -> None:
    """Random arrivals and departures of gangs of 1, 2, 4, 8."""
    chance = random.Random(seed)
    placement, held = Placement(nodes(6)), dict[int, int]()
    for key in range(500):
        gpus = chance.choice((1, 2, 4, 8))
        free = {name: placement.free_gpus(name) for name in placement.nodes}
        seat = placement.place(key, gpus)
        fits = [name for name in free if free[name] >= gpus]
        assert (seat is None) == (not fits)
        if seat is not None:
            assert free[seat] == min(free[name] for name in fits), "the fullest that holds it"
            held[key] = gpus
        while held and (seat is None or chance.random() < 0.3):
            gone = chance.choice(list(held))
            del held[gone]
            placement.release(gone)
            seat = ""
        assert sum(held.values()) == 48 - sum(map(placement.free_gpus, placement.nodes))
        for name in placement.nodes:
            assert 0 <= placement.free_gpus(name) <= 8
