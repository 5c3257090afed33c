"""Documents out of text files, one at a time, so that a corpus never has to fit in memory.

Plain text separates documents by NUL bytes (a file without one is one document); JSON lines have
the document under "text". Either may be compressed by xz. All text is UTF-8.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from trainer.errors import DataError

CHUNK_BYTES = 1 << 20


def read_documents(path: Path, on_position: Callable[[int], None] | None = None) -> Iterator[str]:
    """The non-empty documents of a file, in order.

    Args:
        path: *.txt or any plain text, *.jsonl, and either with .xz.
        on_position: called now and then with the bytes of the file on disk that were read.

    Raises DataError, naming file and place, for a missing file, a broken archive, text that is not
    UTF-8, or a line that is not an object with a "text".
    """
    if not path.is_file():
        raise DataError(f"{path}: no such text file; check the path")
    plain_name = path.name.removesuffix(".xz")
    records = _json_lines if plain_name.endswith(".jsonl") else _nul_separated
    is_packed = path.suffix == ".xz"
    with path.open("rb") as raw, lzma.open(raw) if is_packed else nullcontext(raw) as stream:
        try:
            for number, document in enumerate(records(stream, path), start=1):
                if on_position is not None:
                    on_position(raw.tell())
                text = _decode(document, path, number)
                if text.strip():
                    yield text
        except (lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path}: broken xz archive ({error}); copy it again") from None


def _nul_separated(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    parts: list[bytes] = []
    while chunk := stream.read(CHUNK_BYTES):
        head, *rest = chunk.split(b"\0")
        parts.append(head)
        for following in rest:
            yield b"".join(parts)
            parts = [following]
    yield b"".join(parts)


def _json_lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(
                f'{path}: line {number} is not a JSON object with a string under "text"; give one '
                "such object per line"
            )
        # NUL cannot occur in a document of plain text either; the published exports blank it too.
        yield text.replace("\0", " ").encode(errors="replace")


def _decode(document: bytes, path: Path, number: int) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: document {number} is not UTF-8 at its byte {error.start} "
            f"(0x{document[error.start]:02x}); convert the file to UTF-8"
        ) from None
