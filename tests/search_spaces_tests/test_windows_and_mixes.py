"""The spaces of windows and row lengths: every choice is a sound and a different configuration."""

from itertools import product

import pytest

from search_spaces import SPACES
from search_spaces.sequence_mixes import mixes
from search_spaces.window_layers import PATTERNS
from trainer.layer_pattern import select_layers
from trainer.mix import lanes_of, sharing_fault
from trainer.recipes import RECIPES

PR1212 = RECIPES["pr1212"].build()


def test_patterns_pick_different_layers() -> None:
    chosen = {pattern: select_layers(pattern, 12) for pattern in PATTERNS}
    assert len(set(chosen.values())) == len(PATTERNS)
    assert chosen["even_but_first"] == (2, 4, 6, 8, 10)
    counts = [len(layers) for layers in chosen.values()]
    assert set(counts) >= {2, 3, 4, 5, 6, 8, 11, 12}
    assert counts == sorted(counts), "a slice plot over them would have no order"


@pytest.mark.parametrize("window", [128, 2048])
@pytest.mark.parametrize(("pattern", "mix"), [*product(("even_but_first", "all"), mixes(8))])
def test_every_corner_is_a_sound_configuration(window: int, pattern: str, mix: str) -> None:
    config = PR1212.with_overrides(
        {"model.window": window, "model.window_layers": pattern, "data.mix": mix}
    )
    lanes = lanes_of(config.data)
    assert len(lanes) == 8
    assert {lane.num_tokens for lane in lanes} == {73_728}
    assert [sharing_fault(config.data, workers) for workers in (1, 2, 4, 8)] == [None] * 4


def test_mixes_go_from_all_short_to_all_long() -> None:
    assert len(set(mixes(8))) == len(mixes(8)) == 1 + 3 * 5 + 3
    assert "5x2048+3x6144" in mixes(8) and "2x2048+6x8192" in mixes(8)
    assert set(mixes(4)) == {
        "4x2048",
        *(f"{4 - long}x2048+{long}x{n}" for n in (4096, 6144, 8192) for long in (1, 2, 3)),
        *(f"4x{length}" for length in (4096, 6144, 8192)),
    }
    lengths = []
    for mix in mixes(8):
        lanes = [part.split("x") for part in mix.split("+")]
        lengths.append(sum(int(count) * int(length) for count, length in lanes))
    assert lengths == sorted(lengths) and (mixes(8)[0], mixes(8)[-1]) == ("8x2048", "8x8192")
    assert mixes(1) == ("1x2048", "1x4096", "1x6144", "1x8192")


@pytest.mark.parametrize("name", ["window_layers", "sequence_mixes", "window_x_mix"])
def test_the_published_choice_comes_first(name: str) -> None:
    space = SPACES[name]
    config = space.base().with_overrides(space.enqueued[0])
    assert (config.model.window, config.data.mix) == (512, "5x2048+3x6144")
    assert [config.model.window_of(layer) for layer in (2, 3)] == [512, None]
