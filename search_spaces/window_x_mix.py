"""Windows and row lengths together: the sweep that #1212 was found by.

The two depend on each other. At 2048 tokens a window costs time, at 6144 it saves a fifth, so that
what the long rows cost decides how many steps are left.
"""

from search_spaces.sequence_mixes import MIX_AXIS
from search_spaces.space import Space
from search_spaces.window_layers import SHORT_RUN_AXES, WINDOW_AXES

PUBLISHED = {
    "model.window": 512,
    "model.window_layers": "even_but_first",
    "data.mix": "5x2048+3x6144",
}

WINDOW_X_MIX = Space(
    name="window_x_mix",
    recipe="pr1212",
    track="golf-10min-16mb",
    axes={**WINDOW_AXES, "data.mix": MIX_AXIS, **SHORT_RUN_AXES},
    enqueued=(
        PUBLISHED,
        {**PUBLISHED, "data.mix": "6x2048+2x6144"},
        {**PUBLISHED, "data.mix": "8x2048"},
        {**PUBLISHED, "data.mix": "8x6144"},
        {**PUBLISHED, "model.window": 256},
        {**PUBLISHED, "model.window": 1024},
        {**PUBLISHED, "model.window_layers": "all_but_last"},
    ),
    description="window size and layers against the row lengths of a step",
)
