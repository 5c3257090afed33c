"""The names `trainer` and `service` are taken on PyPI by others: these are the fences. CPU."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("service", "search_spaces", "trainer")


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_that_imports_is_ours(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == (REPOSITORY / name / "__init__.py").resolve()


def test_no_pinned_distribution_brings_a_package_of_our_names() -> None:
    path = REPOSITORY / "constraints.txt"
    if not path.exists():
        pytest.skip("no constraints.txt")
    pinned = re.findall(r"^([A-Za-z0-9._-]+)\s*==", path.read_text(), re.MULTILINE)
    assert len(pinned) > 20, "constraints.txt should pin exact versions"
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert not names & {"trainer", "service", "search-spaces"}


@pytest.mark.parametrize("name", ["trainer", "service", "service.runners"])
def test_packages_that_light_modules_lie_in_are_empty(name: str) -> None:
    """Importing trainer.config runs trainer/__init__.py, which the import contracts do not see."""
    assert (REPOSITORY / name.replace(".", "/") / "__init__.py").read_text() == ""


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("trainer.config", "torch"),
        ("trainer.recipes", "torch"),
        ("trainer.report", "torch"),
        ("trainer.account", "torch"),
        ("trainer.code", "torch"),
        ("search_spaces", "torch"),
        ("service.trial", "torch ray mlflow"),
        ("service.runners.base", "torch ray mlflow"),
        ("trainer.artifact", "ray optuna mlflow"),
    ],
)
def test_modules_load_without_what_they_must_not_need(module: str, forbidden: str) -> None:
    program = (
        f"import sys, {module}\n"
        f"print([name for name in {forbidden.split()!r} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


def test_deploy_holds_no_python() -> None:
    assert list((REPOSITORY / "deploy").rglob("*.py")) == []
