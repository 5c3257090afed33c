"""What a submission folder holds, read so that nothing in it can lead, stall or swamp the reader.

Links are never followed, pipes and devices never opened, nothing is read beyond its cap, and what
is not a regular file directly below a real folder is a fault of the folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import UsageError
from service.submission_fields import CODE_FILE, MODEL_FILE, READABLE_FILE

MAX_FILES = 2000
MAX_DEPTH = 4
MAX_RECORD_BYTES = 1 << 20
MAX_CODE_BYTES = 1 << 22
MAX_LOG_BYTES = 1 << 25
MAX_MODEL_BYTES = 1 << 28
"""Files above these are not opened."""

EXEMPT_SUFFIXES = frozenset(
    {".md", ".txt", ".log", ".out", ".err", ".stdout", ".png", ".jpg", ".svg", ".pdf", ".csv"}
)
"""Prose, pictures and logs. Everything else that a program could read counts."""
MODEL_SUFFIXES = frozenset({".bin", ".ptz", ".pt", ".pth", ".xz", ".zst", ".br", ".lzma"})


class UnreadableError(ValueError):
    """A file of the folder cannot be read, or should not be; says which and why."""


@dataclass(frozen=True)
class Folder:
    """The regular files of a folder, by their path in it, and what is wrong with the rest."""

    path: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """Path in the folder -> bytes."""
    faults: tuple[str, ...] = ()

    @classmethod
    def look(cls, path: Path) -> Folder:
        """List a folder. Raises UsageError when there is none."""
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; name one that `caddie package` wrote")
        sizes: dict[str, int] = {}
        faults: list[str] = []
        try:
            for name, found in _walk(path, "", 1):
                if isinstance(found, str):
                    faults.append(found)
                else:
                    sizes[name] = found
                if len(sizes) + len(faults) > MAX_FILES:
                    faults.append(f"more than {MAX_FILES:,} files, of which the rest is not read")
                    break
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be listed ({error.strerror}); give the right to read it"
            ) from None
        return cls(path, sizes, tuple(faults))

    def read(self, name: str, most: int) -> bytes:
        """The content of one of `sizes`. Raises UnreadableError."""
        try:
            # O_NONBLOCK: a pipe that took the file's place must not stall; O_NOFOLLOW: nor a link.
            handle = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise UnreadableError(f"{shown(name)} cannot be read ({error.strerror})") from None
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableError(f"{shown(name)} is not a regular file")
            content = file.read(most + 1)
        if len(content) > most:
            raise UnreadableError(f"{shown(name)} has more than the {most:,} bytes that are read")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises UnreadableError."""
        content = self.read(name, MAX_RECORD_BYTES)
        try:
            tree = json.loads(content.decode("utf-8-sig"), parse_constant=lambda _: None)
        except RecursionError:
            raise UnreadableError(f"{shown(name)} is nested too deeply") from None
        except ValueError as error:  # also: bad UTF-8, a number of thousands of digits
            raise UnreadableError(f"{shown(name)} is not JSON ({shown(error)})") from None
        if not isinstance(tree, dict):
            raise UnreadableError(f"{shown(name)} holds a {type(tree).__name__}, not an object")
        return tree

    @property
    def code(self) -> str | None:
        """The program; None when the folder has none."""
        return CODE_FILE if CODE_FILE in self.sizes else None

    @property
    def model(self) -> str | None:
        """The packed model: ours, else the largest file that looks like one; None without one."""
        if MODEL_FILE in self.sizes:
            return MODEL_FILE
        others = [name for name in self.sizes if Path(name).suffix.lower() in MODEL_SUFFIXES]
        return max(others, key=lambda name: self.sizes[name], default=None)

    @property
    def logs(self) -> list[str]:
        """Logs of training, in name order."""
        suffixes = (".log", ".txt", ".out", ".stdout")
        return sorted(
            name
            for name in self.sizes
            if name.lower().endswith(suffixes) and "requirements" not in name.lower()
        )

    @property
    def helpers(self) -> list[str]:
        """Files beside program and model that count, because a program could read them."""
        named = {self.code, self.model, READABLE_FILE}
        return sorted(name for name in self.sizes if name not in named and not _is_exempt(name))


def shown(value: object, most: int = 160) -> str:
    """Text of strangers as it may go to a terminal: printable, and not long."""
    text = str(value)[: most + 1]
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return text if len(text) <= most else text[:most] + "..."


def _is_exempt(name: str) -> bool:
    path = Path(name.lower())
    is_record = path.name.startswith("submission") and path.suffix == ".json"
    bare = path.name in ("license", "readme", "licence", ".gitignore", ".gitattributes")
    return path.suffix in EXEMPT_SUFFIXES or is_record or bare


def _walk(path: Path, prefix: str, depth: int) -> Iterator[tuple[str, int | str]]:
    """Path in the folder, with its size or with what is wrong with it."""
    with os.scandir(path) as entries:
        for entry in entries:
            name = prefix + entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if not name.isprintable():  # also: bytes that are no UTF-8
                yield name, f"{shown(name)}: a name that cannot be printed"
            elif stat.S_ISREG(mode):
                yield name, entry.stat(follow_symlinks=False).st_size
            elif not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe, socket or device"
                yield name, f"{shown(name)}: {kind}, which is not followed"
            elif depth == MAX_DEPTH:
                yield name, f"{shown(name)}: more than {MAX_DEPTH} folders deep"
            elif entry.name not in ("__pycache__", ".git"):
                yield from _walk(Path(entry.path), name + "/", depth + 1)
