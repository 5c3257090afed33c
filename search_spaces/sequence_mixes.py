"""How long the rows of a step are: from all short to mostly long, the same tokens in every step.

A mix is written for eight workers and means the same on one, two and four. With 589,824 tokens a
step, a lane has 73,728: whole rows of each of the four lengths, so that every lane weighs the same
whatever its rows. Starting points are the published mix and the three of its author's sweep on four
GPUs (3x2048+1x6144 1.1292, all at 2048 1.1417, all at 6144 1.1360), written for eight.
"""

from optuna.distributions import CategoricalDistribution

from search_spaces.space import Space
from search_spaces.window_layers import SHORT_RUN_AXES

SHORT = 2048
LONG = (4096, 6144, 8192)
LONG_EIGHTHS = (1, 2, 3, 4, 6)
"""Numbers of long lanes in eight."""


def mixes(num_workers: int) -> tuple[str, ...]:
    """Mixes of two lengths for that many workers, each once, by the mean length of their lanes, so
    that a slice over them reads from all short to all long.

    Shares of long lanes are those of LONG_EIGHTHS, rounded to whole workers.
    """
    counts = {round(eighths * num_workers / 8) for eighths in LONG_EIGHTHS} - {0, num_workers}
    mixed = [
        (count * (length - SHORT), f"{num_workers - count}x{SHORT}+{count}x{length}")
        for length in LONG
        for count in sorted(counts)
    ]
    pure = [
        (num_workers * (length - SHORT), f"{num_workers}x{length}") for length in (SHORT, *LONG)
    ]
    return tuple(mix for _, mix in sorted([*mixed, *pure], key=lambda row: row[0]))


MIX_AXIS = CategoricalDistribution(mixes(8))

SEQUENCE_MIXES = Space(
    name="sequence_mixes",
    recipe="pr1212",
    track="golf-10min-16mb",
    axes={"data.mix": MIX_AXIS, **SHORT_RUN_AXES},
    enqueued=(
        {"data.mix": "5x2048+3x6144"},
        {"data.mix": "6x2048+2x6144"},
        {"data.mix": "8x2048"},
        {"data.mix": "8x6144"},
    ),
    description="row lengths of the eight lanes of a step, at equal tokens",
)
