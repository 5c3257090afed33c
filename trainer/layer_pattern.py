"""Which layers a technique applies to, as a string that a sweep can vary.

    ""                  none
    "2,4,6,8,10"        these, counted from 0
    "all" "even" "odd"  by position; "even" begins with layer 0
    "even_but_first"    2, 4, 6, ...: the published choice at 12 layers
    "all_but_first" "all_but_last"
    "first_4" "last_4"  that many from one end
    "spread_4"          that many, as evenly as whole numbers allow, never the first layer
    "SSSL"              those marked S when the letters are tiled over the depth; the last layer is
                        always L (short and long windows, nanochat)

Loads without torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

NAMED: dict[str, Callable[[int], range]] = {
    "": lambda num_layers: range(0),
    "all": range,
    "even": lambda num_layers: range(0, num_layers, 2),
    "odd": lambda num_layers: range(1, num_layers, 2),
    "even_but_first": lambda num_layers: range(2, num_layers, 2),
    "all_but_first": lambda num_layers: range(1, num_layers),
    "all_but_last": lambda num_layers: range(num_layers - 1),
}
COUNTED: dict[str, Callable[[int, int], list[int]]] = {
    "first": lambda count, num_layers: list(range(count)),
    "last": lambda count, num_layers: list(range(num_layers - count, num_layers)),
    "spread": lambda count, num_layers: [
        1 + (2 * place + 1) * (num_layers - 1) // (2 * count) for place in range(count)
    ],
}


def select_layers(pattern: str, num_layers: int) -> tuple[int, ...]:
    """The layers of a pattern, ascending.

    Raises ValueError with the remedy, but not the name of the setting: a layer that does not exist,
    one named twice, a count above what there is, an unknown name.
    """
    if pattern in NAMED:
        return tuple(NAMED[pattern](num_layers))
    if counted := re.fullmatch(rf"({'|'.join(COUNTED)})_(\d+)", pattern):
        return _counted(counted[1], int(counted[2]), num_layers)
    if re.fullmatch(r"[SL]+", pattern):
        tiled = itertools.islice(itertools.cycle(pattern), num_layers - 1)
        return tuple(layer for layer, letter in enumerate(tiled) if letter == "S")
    if not re.fullmatch(r"\d+(,\d+)*", pattern):
        names = ", ".join([*NAMED, *(f"{name}_N" for name in COUNTED)][1:])
        raise ValueError(
            f"no such pattern; write numbers as in 2,4,6 or one of {names}, or letters as in SSSL"
        )
    layers = [int(number) for number in pattern.split(",")]
    missing = sorted({layer for layer in layers if layer >= num_layers})
    if missing:
        listed = ", ".join(map(str, missing))
        raise ValueError(f"no layer {listed}; choose from 0 to {num_layers - 1}")
    if len(set(layers)) < len(layers):
        raise ValueError("a layer is named twice; name it once")
    return tuple(sorted(layers))


def _counted(name: str, count: int, num_layers: int) -> tuple[int, ...]:
    most = num_layers - 1 if name == "spread" else num_layers
    if not 1 <= count <= most:
        raise ValueError(f"{count} is not between 1 and {most}; change the count")
    return tuple(COUNTED[name](count, num_layers))
