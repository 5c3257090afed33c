"""The pages on techniques name settings that exist, with values that they take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.recipes import RECIPES

FOLDER = Path(__file__).parents[2] / "docs" / "techniques"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
SETTINGS = TrainConfig().flat()
GROUPS = "|".join({path.split(".")[0] for path in SETTINGS})
NAMED = re.compile(rf"`((?:{GROUPS})\.\w+)(?:\s*=\s*([^`]+))?`")


def test_the_index_links_every_page() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", (FOLDER / "README.md").read_text())
    assert sorted(linked) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_settings_exist_and_take_the_named_values(page: Path) -> None:
    named = NAMED.findall(page.read_text())
    assert len(named) > 15
    for path, text in named:
        assert path in SETTINGS, f"{page.name}: {path}"
        if text:
            _takes(path, " ".join(text.split()))


def _takes(path: str, text: str) -> None:
    """Rules that tie settings together may object; the setting itself may not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text.replace(" ", "")
    try:
        RECIPES["pr1212"].build().with_overrides({path: value})
    except ConfigError as error:
        assert f"{path} = {value!r}: input" not in str(error), error
