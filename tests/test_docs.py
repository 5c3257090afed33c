"""The pages of docs/: every command is one that exists, and the newcomer's are really run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from service.cli import app, main
from service.errors import UsageError
from service.status import status_of
from service.study import load_study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("first_sweep.md", "your_data.md", "reading_results.md", "submitting_a_record.md")
"""In the order of the menu: later ones use what earlier ones made."""
SETTINGS = """
runner = "local"
data = "data/small"
[tracks.laptop]
artifact_bytes = 200_000
train_seconds = 0.5
eval_seconds = 120.0
"""
NOT_PAGES = ("log.md",)
"""The log keeps commands as they were."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text())


def commands(content: str) -> list[str]:
    """The `caddie` lines of a block, whole where they are broken with a backslash."""
    lines = content.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("caddie ")]


def parse(line: str) -> None:
    """Raises UsageError for a command or option that there is not."""
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands:
            raise UsageError(f"no command {name}")
        command = command.commands[name]
    if words == ["--help"]:
        return
    try:
        command.make_context(command.name, words)
    except Exception as fault:  # Typer has a copy of Click's errors of its own
        raise UsageError(str(fault)) from fault


def quoted() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [
        (str(page.relative_to(ROOT)), line)
        for page in pages
        if page.name not in NOT_PAGES
        for _, content in blocks(page)
        for line in commands(content)
    ]


def test_every_quoted_command_exists() -> None:
    found = quoted()
    assert len(found) > 40 and {"README.md", "docs/first_sweep.md"} <= {page for page, _ in found}
    faults = []
    for page, line in found:
        try:
            parse(line)
        except UsageError as fault:
            faults.append(f"{page}: {line}: {fault}")
    assert faults == []


def test_a_command_that_is_none_is_seen() -> None:
    for line in ("caddie sweep go smoke", "caddie leaderboard s --jsn", "caddie confirm s"):
        with pytest.raises(UsageError):
            parse(line)


def test_the_menu_names_every_page_but_none_that_is_missing() -> None:
    def files(entries: list[object]) -> list[str]:
        found: list[str] = []
        for entry in entries:
            assert isinstance(entry, dict)
            (value,) = entry.values()
            found += files(value) if isinstance(value, list) else [value]
        return found

    named = set(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    present = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert present - named == set()
    assert named - present <= {"cluster.md"}


def run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As typed, in this process: starting one for each command takes longer than most commands."""
    code = main(shlex.split(line, comments=True)[1:])
    captured = capsys.readouterr()
    assert code == 0, f"{line}\n{captured.out[-2000:]}\n{captured.err[-2000:]}"


@pytest.mark.slow
def test_the_newcomers_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paragraphs = [part for page in DOCS.rglob("*.md") for part in page.read_text().split("\n\n")]
    (tmp_path / "mytext.txt").write_text("\0".join(paragraphs))
    (tmp_path / "caddie.toml").write_text(SETTINGS)
    run("caddie data prepare mytext.txt --vocab-size 512 --out data/small", capsys)
    lines = [
        line
        for page in PAGES
        for language, content in blocks(DOCS / page)
        if language == "bash"
        for line in content.splitlines()
    ]
    assert all(line.startswith("caddie ") for line in lines)
    assert len(lines) >= 10
    for line in lines:
        run(line, capsys)
    study = load_study("smoke", f"sqlite:///{tmp_path / 'caddie-runs' / 'caddie.db'}")
    status = status_of(study)
    assert (status.told, status.rejected_before_launch, status.confirming_seeds) == (3, 1, 1)
    assert status.feasible >= 2, "trial 0 and its fresh seed"
    assert "<html" in (tmp_path / "smoke.html").read_text()[:200]
