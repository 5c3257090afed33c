"""The live table on a real pseudo-terminal, read back through a small emulator of a screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import os
import sys
from dataclasses import replace
from rich.console import Console
from service.commands.terminal import messages
from service.live import LiveTable
from tests.service_tests.test_live import RUNNING, STATUS

with LiveTable(messages()) as live:
    for step in range(3):
        live.show(replace(STATUS, running=[replace(RUNNING, step=30 + step)]))
    live.say("a word above the table")
    live.show(STATUS)
    os.write(1, b"READY\\n")  # Live takes sys.stdout to above the table
    sys.stdin.readline()
    live.show(replace(STATUS, running=[replace(RUNNING, step=77)]))
    live.show(replace(STATUS, running=[replace(RUNNING, step=78)]))
    os.write(1, b"READY\\n")  # Live takes sys.stdout to above the table
    sys.stdin.readline()
"""
SEQUENCE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Screen:
    """What a terminal of this size shows: wrapping, cursor up, erasing, home; colours counted."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines: list[str] = [""]
        self.x = self.y = 0
        self.num_colours = 0

    def feed(self, text: str) -> None:
        for match in SEQUENCE.finditer(text):
            code, command = match.group(1), match.group(2)
            if command is not None:
                self._control(code, command)
            elif match.group() == "\r":
                self.x = 0
            elif match.group() == "\n":
                self._down()
            else:
                for character in match.group():
                    self._put(character)

    def _control(self, code: str, command: str) -> None:
        if command == "A":
            self.y = max(0, self.y - int(code or 1))
        elif command == "K":
            self.lines[self.y] = ""
        elif command == "J":
            self.lines = [""] * len(self.lines)
        elif command == "H":
            self.x = self.y = 0
        elif command == "m" and re.search(r"(^|;)3[0-7]|(^|;)9[0-7]", code):
            self.num_colours += 1

    def _down(self) -> None:
        self.y += 1
        if self.y == len(self.lines):
            self.lines.append("")

    def _put(self, character: str) -> None:
        if self.x == self.width:
            self.x = 0
            self._down()
        line = self.lines[self.y].ljust(self.x)
        self.lines[self.y] = line[: self.x] + character + line[self.x + 1 :]
        self.x += 1

    def resize(self, width: int, height: int) -> None:
        """Narrower terminals wrap what they show, and the cursor stays at its text."""
        wrapped: list[str] = []
        for place, line in enumerate(self.lines):
            if place == self.y:
                self.y, self.x = len(wrapped) + self.x // width, self.x % width
            wrapped += [line[i : i + width] for i in range(0, len(line), width)] or [""]
        self.lines, self.width, self.height = wrapped, width, height

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip()


def set_size(terminal: int, width: int, height: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


class Terminal:
    """A process whose standard error is a terminal."""

    def __init__(self, width: int, height: int, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        set_size(self.ours, width, height)
        self.screen = Screen(width, height)
        plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            env={**plain, "TERM": "xterm", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)

    def until_ready(self) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + 100
        ready = False
        while not ready or select.select([self.ours], [], [], 0.2)[0]:
            assert time.monotonic() < deadline
            found, _, _ = select.select([self.ours, self.process.stdout], [], [], 1.0)
            if self.ours in found:
                try:
                    data = os.read(self.ours, 65536)
                except OSError:  # the other end is closed
                    return
                self.screen.feed(data.decode())
            elif self.process.stdout in found:
                assert self.process.stdout.readline() == "READY\n"
                ready = True

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.go_on()
        self.process.wait(60)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self.ours)
        assert self.process.returncode == 0


@pytest.mark.parametrize(("first", "then"), [((120, 30), (70, 24)), ((80, 24), (150, 40))])
def test_the_table_is_redrawn_in_place_and_follows_the_window(
    first: tuple[int, int], then: tuple[int, int]
) -> None:
    terminal = Terminal(*first)
    terminal.until_ready()
    text = terminal.screen.text
    assert text.startswith("a word above the table")
    for words in ("5 of 12 trials", "best: trial 4", "GPU-hours", "trial 5 rejected"):
        assert text.count(words) == 1, text
    assert " 30 " in text and " 31 " not in text
    assert terminal.screen.num_colours > 0

    set_size(terminal.ours, *then)
    terminal.screen.resize(*then)
    terminal.go_on()
    terminal.until_ready()
    text = terminal.screen.text
    for words in ("5 of 12 trials", "best: trial 4", "GPU-hours", "trial 5 rejected"):
        assert text.count(words) == 1, text
    assert " 78 " in text and " 77 " not in text
    terminal.end()


def test_no_color_keeps_the_table() -> None:
    terminal = Terminal(100, 30, NO_COLOR="1")
    terminal.until_ready()
    assert terminal.screen.text.count("5 of 12 trials") == 1
    assert terminal.screen.num_colours == 0
    terminal.go_on()
    terminal.until_ready()
    terminal.end()


def test_a_low_terminal_is_not_overrun() -> None:
    terminal = Terminal(60, 6)
    terminal.until_ready()
    text = terminal.screen.text
    assert text.count("5 of 12 trials") == 1 and len(text.splitlines()) <= 7
    terminal.go_on()
    terminal.until_ready()
    terminal.end()
