"""What to try: every search space, in one visible table."""

from search_spaces.learning_rates import LEARNING_RATES
from search_spaces.smoke import SMOKE
from search_spaces.space import Space

SPACES: dict[str, Space] = {space.name: space for space in (SMOKE, LEARNING_RATES)}

__all__ = ["SPACES", "Space"]
