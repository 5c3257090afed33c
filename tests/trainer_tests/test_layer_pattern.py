"""Layers named by strings."""

import itertools

import pytest

from trainer.layer_pattern import select_layers


@pytest.mark.parametrize(
    ("pattern", "num_layers", "layers"),
    [
        ("", 12, []),
        ("2,4,6,8,10", 12, [2, 4, 6, 8, 10]),
        ("7,0", 8, [0, 7]),
        ("all", 3, [0, 1, 2]),
        ("even", 5, [0, 2, 4]),
        ("odd", 5, [1, 3]),
        ("even_but_first", 12, [2, 4, 6, 8, 10]),
        ("all_but_first", 3, [1, 2]),
        ("all_but_last", 3, [0, 1]),
        ("first_2", 5, [0, 1]),
        ("last_2", 5, [3, 4]),
        ("SSSL", 10, [0, 1, 2, 4, 5, 6, 8]),
        ("SSSL", 8, [0, 1, 2, 4, 5, 6]),
        ("S", 3, [0, 1]),
        ("LS", 4, [1]),
        ("SSSL", 1, []),
        ("spread_1", 12, [6]),
        ("spread_3", 12, [2, 6, 10]),
        ("spread_5", 12, [2, 4, 6, 8, 10]),
        ("spread_11", 12, list(range(1, 12))),
    ],
)
def test_layers_of_a_pattern(pattern: str, num_layers: int, layers: list[int]) -> None:
    assert list(select_layers(pattern, num_layers)) == layers


@pytest.mark.parametrize("num_layers", [2, 3, 9, 12])
def test_a_count_gives_that_many_different_layers_and_never_the_first(num_layers: int) -> None:
    for count in range(1, num_layers):
        layers = select_layers(f"spread_{count}", num_layers)
        assert len(set(layers)) == count and layers[0] >= 1 and layers[-1] < num_layers
        gaps = {b - a for a, b in itertools.pairwise(layers)}
        assert len(gaps) <= 2 and max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2,12", "no layer 12; choose from 0 to 11"),
        ("-1", "no such pattern; write numbers as in 2,4,6 or one of all, even, "),
        ("2,,4", "no such pattern"),
        ("evn", r"even_but_first.*first_N, last_N, spread_N"),
        ("3,3", "a layer is named twice"),
        ("first_13", "13 is not between 1 and 12"),
        ("spread_12", "12 is not between 1 and 11"),
        ("last_0", "0 is not between 1 and 12"),
    ],
)
def test_a_broken_pattern_says_what_to_do(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(pattern, 12)
