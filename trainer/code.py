"""The code that counts towards the artifact: what a run needs to train, pack and score.

The list is derived by following imports from `trainer.loop`, so it is never out of date; recipes,
data preparation and the command line are not in it, nor is the packing of code. Docstrings and
comments are taken out, then what squeeze.py finds; the rest is compressed. Text is cut by token,
not printed anew from the syntax tree, so that every version of Python gives the same bytes and a
size predicted on one machine is the size measured on another.

With compress.code = "script" what counts is one self-contained program instead, made by
trainer/flatten/ from the same modules and half as large. Loads without torch.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import lzma
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenInfo

import brotli

from trainer.config import TrainConfig
from trainer.errors import ArtifactError
from trainer.needed import left_out
from trainer.squeeze import squeezed

ENTRY = "trainer.loop"
"""Module from which everything a run needs is reached."""
PACKED_FILE = "code.bin"
"""Name of the packed code, where it is unpacked to run."""

PACKED_FORM = f"""from pathlib import Path
def packed_code(config):
 return Path(__file__).parents[1].joinpath({PACKED_FILE!r}).read_bytes()
"""
"""This module in the packed code, which need not pack itself: it is the file beside the package."""

_PACKAGE = Path(__file__).parent
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
_BLANK = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT)


def packed_code(config: TrainConfig | None = None) -> bytes:
    """The counted code, packed; its length is `bytes_code`. Equal source gives equal bytes.

    Args:
        config: the run that it is for: techniques that are off in it are left out. None = all.
            With compress.code = "script" it is its train_gpt.py, which takes seconds to make.
    """
    if config is not None and config.compress.code == "script":
        from trainer.flatten.program import script  # which imports what counts

        return script(config)
    return packed_modules(config)


def packed_modules(config: TrainConfig | None = None) -> bytes:
    """The modules themselves, shortened and packed, whatever compress.code says."""
    return _packed(frozenset() if config is None else left_out(config))


@functools.cache
def _packed(without: frozenset[str]) -> bytes:
    counted = counted_modules(without)
    sources = {
        _file(module).relative_to(_PACKAGE.parent).as_posix(): (
            PACKED_FORM if module == __name__ else squeezed(stripped(_file(module).read_text()))
        )
        for module in counted
    }
    sources |= _stand_ins(counted, without)
    text = "\0".join(f"{path}\n{source}" for path, source in sorted(sources.items())).encode()
    by_brotli: bytes = b"B" + brotli.compress(text, quality=11, lgwin=24)
    by_lzma = b"L" + lzma.compress(text, format=lzma.FORMAT_RAW, filters=_LZMA)
    return min(by_brotli, by_lzma, key=len)


def unpacked_code(packed: bytes) -> dict[str, str]:
    """Inverse of packed_code: path in the repository -> shortened source. For our own code only. To
    run it, write these files, and the packed code itself beside them as PACKED_FILE.

    Raises: ArtifactError when it is not packed code.
    """
    try:
        if packed[:1] == b"B":
            text = brotli.decompress(packed[1:])
        else:
            text = lzma.decompress(packed[1:], lzma.FORMAT_RAW, filters=_LZMA)
        files = [file.partition("\n") for file in text.decode().split("\0")]
        if not all(path.endswith(".py") for path, _, _ in files):
            raise ValueError("it names no modules")
        return {path: source for path, _, source in files}
    except (brotli.error, lzma.LZMAError, ValueError) as error:
        raise ArtifactError(f"packed code is damaged ({error}); pack it again") from None


def _stand_ins(counted: list[str], without: frozenset[str]) -> dict[str, str]:
    """For each module that is left out: its path, and a source that binds the names which others
    import from it to an empty class, so that they load. Nothing calls them."""
    names: dict[str, set[str]] = {}
    for module in counted:
        for node in ast.walk(ast.parse(_file(module).read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            bound = {alias.name for alias in node.names}
            if node.module in without:
                names.setdefault(node.module, set()).update(bound)
            for module in {f"{node.module}.{name}" for name in bound} & without:
                names.setdefault(module, set())
    return {
        _file(module).relative_to(_PACKAGE.parent).as_posix(): _stand_in(bound)
        for module, bound in names.items()
    }


def _stand_in(names: set[str]) -> str:
    if not names:
        return "pass\n"
    first, *others = sorted(names)
    return f"class {first}:pass\n" + "".join(f"{name}={first}\n" for name in others)


def counted_modules(without: frozenset[str] = frozenset()) -> list[str]:
    """Every module of this package that importing ENTRY brings in, sorted; packages included.

    Args:
        without: modules that are not followed.
    """
    found: set[str] = set()
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module in found or module in without or not _file(module).is_file():
            continue
        found.add(module)
        waiting.extend([] if module == __name__ else _imports(_file(module)))
        waiting.append(module.rpartition(".")[0] or module)
    return sorted(found)


def stripped(source: str) -> str:
    """The source without docstrings, other bare strings, comments and blank lines."""
    *statements, _ = _statements(source)
    row_starts = list(itertools.accumulate((len(row) + 1 for row in source.split("\n")), initial=0))
    kept = []
    for index, statement in enumerate(statements):
        words = _words(statement)
        if not _is_text(statement):
            kept.append(_on_one_line(source, row_starts, words))
        elif _fills_its_block(statements, index):
            kept.append(" " * words[0].start[1] + "pass")
    return "".join(f"{line}\n" for line in kept)


def _statements(source: str) -> Iterator[list[TokenInfo]]:
    """Tokens of each logical line, with the indents and dedents before it. The last is no line: it
    holds what comes after them."""
    statement: list[TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            yield statement
            statement = []
        else:
            statement.append(token)
    yield statement


def _words(statement: list[TokenInfo]) -> list[TokenInfo]:
    return [token for token in statement if token.type not in _BLANK]


def _is_text(statement: list[TokenInfo]) -> bool:
    """True for a line that is a string and nothing else; an f-string may have effects."""
    return all(
        token.type == tokenize.STRING and not re.match(r"[rR]?[fF]", token.string)
        for token in _words(statement)
    )


def _fills_its_block(statements: list[list[TokenInfo]], index: int) -> bool:
    """True for the first line of a block that holds nothing but strings."""
    if not _has(statements[index], tokenize.INDENT):
        return False
    for later in statements[index + 1 :]:
        if _has(later, tokenize.DEDENT):
            return True
        if not _is_text(later):
            return False
    return True


def _has(statement: list[TokenInfo], kind: int) -> bool:
    return any(token.type == kind for token in statement)


def _on_one_line(source: str, row_starts: list[int], words: list[TokenInfo]) -> str:
    """The words as they stand in the source, with a space for each break between rows and whatever
    comments are there. Strings over several rows stay whole."""
    pieces = []
    first = words[0]
    for word, following in itertools.zip_longest(words, words[1:]):
        if following is None or word.end[0] != following.start[0]:
            start, end = (row_starts[row - 1] + column for row, column in (first.start, word.end))
            pieces.append(source[start:end])
            first = following
    return " " * words[0].start[1] + " ".join(pieces)


def _imports(path: Path) -> Iterator[str]:
    """Names that the file imports, in functions too; some may be no modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> Path:
    """Where a module of this package lies; a path that is no file for any other name."""
    package, *rest = module.split(".")
    if package != _PACKAGE.name:
        return _PACKAGE / "-"
    path = _PACKAGE.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
