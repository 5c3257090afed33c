"""Shorter text with the same effect, for the code that counts towards an artifact.

Out go annotations that nothing reads, imports that only they used, and blanks that the grammar does
not need; variables of functions get names of a letter or two. Annotations in the bodies of classes
stay, as dataclasses and pydantic read them; so do those of functions with a decorator that is not
known to ignore them, and all of a module that speaks of torch.library or triton. Edited by position
in the text itself, so that every version of Python gives the same bytes.
"""

from __future__ import annotations

import ast
import builtins
import collections
import io
import itertools
import keyword
import re
import tokenize
from collections.abc import Iterator

_BLIND = re.compile(
    r"(functools\.)?(cache|lru_cache|cached_property)(\(\w*\))?|property|staticmethod|classmethod"
    r"|contextmanager|torch\.no_grad\(\)|\w+\.setter"
)
"""Decorators that do not look at annotations."""
_FOR_ANNOTATIONS = ("collections.abc", "torch", "typing")
"""Modules of which an import has no effect but its names."""
_READS_ANNOTATIONS = re.compile(r"\b(torch\.library|triton|get_type_hints|singledispatch)\b")
_SEES_NAMES = {"locals", "vars", "eval", "exec", "globals"}
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
Edit = tuple[int, int, str]
"""Bytes of the source, from and up to, and what takes their place."""


def squeezed(source: str) -> str:
    """The shorter text. `source` has no comments and one row for each logical line, strings over
    several rows aside."""
    if not _READS_ANNOTATIONS.search(source):
        source = _edited(source, _annotations(source))
        source = _edited(source, _short_names(source))
    return tight(_edited(source, _unused_names(source)))


def _edited(source: str, edits: Iterator[Edit]) -> str:
    text = source.encode()
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead.encode() + text[end:]
    return text.decode()


def _annotations(source: str) -> Iterator[Edit]:
    tree, at = ast.parse(source), _Places(source)
    of_classes = {
        id(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and node.value and id(node) not in of_classes:
            yield at.end(node.target), at.end(node.annotation), ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and all(
            _BLIND.fullmatch(ast.unparse(decorator)) for decorator in node.decorator_list
        ):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            for argument in (*named, arguments.vararg, arguments.kwarg):
                if argument is not None and argument.annotation is not None:
                    start = at.start(argument) + len(argument.arg.encode())
                    yield start, at.end(argument.annotation), ""
            if node.returns is not None:
                arrow = at.text.rindex(b"->", 0, at.start(node.returns))
                yield len(at.text[:arrow].rstrip()), at.end(node.returns), ""


def _unused_names(source: str) -> Iterator[Edit]:
    """Names, or whole rows, of imports at the top of a module that nothing else in it names."""
    tree, at = ast.parse(source), _Places(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module not in _FOR_ANNOTATIONS:
            continue
        unused = [alias for alias in node.names if (alias.asname or alias.name) not in used]
        if len(unused) == len(node.names):
            yield at.start(node), at.end(node) + 1, ""
            continue
        for alias in unused:
            if alias is node.names[-1]:
                last = [kept for kept in node.names if kept not in unused][-1]
                yield at.end(last), at.end(alias), ""
            elif not _ends_in(node.names, unused, alias):
                following = node.names[node.names.index(alias) + 1]
                yield at.start(alias), at.start(following), ""


def _ends_in(names: list[ast.alias], unused: list[ast.alias], alias: ast.alias) -> bool:
    """True when all names from this one on are unused: one cut takes them."""
    return all(name in unused for name in names[names.index(alias) :])


def _short_names(source: str) -> Iterator[Edit]:
    """New names for the variables of every function, those of functions within it included."""
    tree, at = ast.parse(source), _Places(source)
    taken = {name for node in ast.walk(tree) for name in _names(node)} | set(dir(builtins))
    free = [name for name in _candidates() if name not in taken and not keyword.iskeyword(name)]
    for function in _outermost_functions(tree):
        own = _renamable(function, taken_elsewhere=_module_names(tree))
        new = dict(zip(own, free, strict=False))
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in new:
                yield at.start(node), at.end(node), new[node.id]


def _candidates() -> Iterator[str]:
    yield from _LETTERS
    yield from map("".join, itertools.product(_LETTERS, repeat=2))


def _outermost_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _renamable(function: ast.AST, taken_elsewhere: set[str]) -> list[str]:
    """Variables that are assigned to in a function and known by nothing but plain mentions, the
    most mentioned first. Mentions in f-strings have no places in older versions of Python."""
    inside = list(ast.walk(function))
    if any(isinstance(node, ast.ClassDef) for node in inside):
        return []
    mentions = [node for node in inside if isinstance(node, ast.Name)]
    if _SEES_NAMES & {node.id for node in mentions}:
        return []
    fixed = set(taken_elsewhere)
    for node in inside:
        if isinstance(node, ast.JoinedStr):
            fixed |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        elif not isinstance(node, ast.Name):
            fixed |= set(_names(node))
    counts = collections.Counter(node.id for node in mentions)
    stored = dict.fromkeys(node.id for node in mentions if isinstance(node.ctx, ast.Store))
    own = [name for name in stored if name not in fixed and len(name) > 1]
    return sorted(own, key=lambda name: -counts[name])


def _module_names(tree: ast.Module) -> set[str]:
    """Names that functions may mean when they mention what is not theirs."""
    names = set(dir(builtins))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        names |= set(_names(node))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    for node in ast.walk(tree):
        names |= set(node.names) if isinstance(node, ast.Global) else set()
    return names


def _names(node: ast.AST) -> Iterator[str]:
    """Every name that a node binds or mentions, attributes and keywords aside."""
    for field in ("id", "arg", "name", "asname", "rest"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value.split(".")[0]
    if isinstance(node, ast.Global | ast.Nonlocal):
        yield from node.names


class _Places:
    """Where nodes are in the bytes of a source."""

    def __init__(self, source: str) -> None:
        self.text = source.encode()
        rows = self.text.split(b"\n")
        self._rows = list(itertools.accumulate((len(row) + 1 for row in rows), initial=0))

    def start(self, node: ast.expr | ast.stmt | ast.arg | ast.alias) -> int:
        return self._rows[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt | ast.arg | ast.alias) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._rows[node.end_lineno - 1] + node.end_col_offset


def tight(source: str) -> str:
    """One blank for each level of a block, and none but where two words would become one."""
    rows = [0, *itertools.accumulate(len(row) + 1 for row in source.split("\n"))]
    pieces: list[str] = []
    level = depth = end = 0
    is_first = True
    before = tokenize.TokenInfo(tokenize.NEWLINE, "", (1, 0), (1, 0), "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("INDENT", "DEDENT"):
            level += 1 if kind == "INDENT" else -1
        elif kind in ("NEWLINE", "NL"):
            pieces.append("\n")
            is_first = True
        elif kind != "ENDMARKER":
            start = rows[token.start[0] - 1] + token.start[1]
            if is_first:
                pieces.append(" " * level)
            elif depth:  # inside an f-string, which older versions of Python see as one word
                pieces.append(source[end:start])
            elif _needs_blank(before, token):
                pieces.append(" ")
            depth += {"FSTRING_START": 1, "FSTRING_END": -1}.get(kind, 0)
            end = rows[token.end[0] - 1] + token.end[1]
            pieces.append(source[start:end])
            before, is_first = token, False
    return "".join(pieces)


def _needs_blank(before: tokenize.TokenInfo, token: tokenize.TokenInfo) -> bool:
    one, other = before.string[-1:], token.string[:1]
    if before.type == tokenize.NUMBER and other == ".":
        return True
    return all(letter.isalnum() or letter in "_\"'" or letter > "~" for letter in (one, other))
