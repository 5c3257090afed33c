"""What to try: every search space, in one visible table."""

from search_spaces.evaluation import EVALUATION, EVALUATION_DOCUMENTS
from search_spaces.iha import IHA
from search_spaces.learning_rates import LEARNING_RATES
from search_spaces.optimizers import OPTIMIZERS
from search_spaces.quantization import ALLOCATION, QUANTIZATION
from search_spaces.recurrence import RECURRENCE
from search_spaces.sequence_mixes import SEQUENCE_MIXES
from search_spaces.smoke import SMOKE
from search_spaces.space import Space
from search_spaces.window_layers import WINDOW_LAYERS
from search_spaces.window_x_mix import WINDOW_X_MIX

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        SMOKE,
        LEARNING_RATES,
        OPTIMIZERS,
        WINDOW_LAYERS,
        SEQUENCE_MIXES,
        WINDOW_X_MIX,
        RECURRENCE,
        IHA,
        QUANTIZATION,
        ALLOCATION,
        EVALUATION,
        EVALUATION_DOCUMENTS,
    )
}

__all__ = ["SPACES", "Space"]
