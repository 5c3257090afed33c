"""How commands speak: data on standard output, everything else on standard error.

With --json a command prints exactly one JSON document on standard output. Tables, summaries and
answers go there too without --json; progress, warnings and errors never do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.config import nearest
from service.errors import UsageError

T = TypeVar("T")
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace one setting; may be repeated."),
]
PLAIN_WIDTH = 140
"""Columns of a table that does not go to a terminal."""


def output() -> Console:
    """The console of answers. Made anew for each use: tests replace sys.stdout."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def messages() -> Console:
    """The console of progress, warnings and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """The one document of --json. NaN and infinity become null, which JSON can hold."""
    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")


def warn(message: str) -> None:
    messages().print(Text(f"warning: {message}", style="yellow"))


def say(message: str) -> None:
    """A line of progress."""
    messages().print(Text(message))


def named(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry called `name`; UsageError with the nearest names when there is none."""
    if name in table:
        return table[name]
    raise UsageError(f"no {kind} is called {name!r}; {nearest(name, dict(table))}")


def make_table(*columns: str, right: Iterable[str] = (), title: str | None = None) -> Table:
    """An empty table; the columns named in `right` are numbers."""
    numbers = set(right)
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=any(columns),
    )
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table cell; "-" for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
