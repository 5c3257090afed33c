"""A bar on a terminal, plain lines elsewhere, for work that tells (stage, done, total)."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from service.commands.terminal import messages, say

LINES_PER_STAGE = 4
"""Plain lines that one stage of known length prints at most."""
LABELS = {"tokenizer": "reading for the tokenizer", "encode": "encoding", "download": "downloading"}


class StageProgress:
    """Call it with (stage, done, total); total 0 = unknown. Use as a context manager."""

    def __init__(self) -> None:
        console = messages()
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=self._plain,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, int] = {}

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        label = LABELS.get(stage, stage)
        if self._plain:
            self._tell(stage, label, done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(label, total=total or None)
        self._bar.update(self._tasks[stage], completed=done, total=total or None)

    def _tell(self, stage: str, label: str, done: int, total: int) -> None:
        share = done * LINES_PER_STAGE // total if total else 0
        if share > self._told.get(stage, -1):
            self._told[stage] = share
            say(f"{label}: {100 * done // total} %" if total else label)
