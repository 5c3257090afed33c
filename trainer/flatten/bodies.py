"""Makes the body of a function shorter by what can be seen in it alone."""

from __future__ import annotations

import ast
import collections
import copy

from trainer.flatten.scopes import FUNCTIONS, arguments_of
from trainer.flatten.syntax import is_nothing_in, is_pure

_READING = {"get", "items", "keys", "values"}
"""Methods of dictionaries that leave them as they are."""


def simplified(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """The body without what never runs, constants in the place of names that hold them, and
    without names that nothing reads."""
    _cut_after_return(function)
    _propagate(function)
    loaded = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
    }
    loaded |= {
        node.target.id
        for node in ast.walk(function)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    }
    declared = {
        name
        for node in ast.walk(function)
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    for block in blocks_of(function):
        for statement in block:
            _drop_unread_pairs(statement, loaded | declared)
        block[:] = [s for s in block if not _is_unread(s, loaded | declared)] or [ast.Pass()]
    return function.body


def blocks_of(function: ast.AST) -> list[list[ast.stmt]]:
    return [
        block
        for node in ast.walk(function)
        for name in ("body", "orelse", "finalbody")
        if isinstance(block := getattr(node, name, None), list) and block
    ]


def _cut_after_return(function: ast.AST) -> None:
    for block in blocks_of(function):
        for place, statement in enumerate(block):
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                del block[place + 1 :]
                break


def _is_unread(statement: ast.stmt, loaded: set[str]) -> bool:
    if isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign):
        targets, value = [statement.target], statement.value  # type: ignore[assignment]
        if value is None and isinstance(statement.target, ast.Name):
            return True  # a declaration of a local name
    else:
        return False
    return (
        len(targets) == 1
        and isinstance(targets[0], ast.Name)
        and targets[0].id not in loaded
        and is_pure(value)
    )


def _drop_unread_pairs(statement: ast.stmt, loaded: set[str]) -> None:
    """`a, b = c, 1` without the pairs whose name nothing reads."""
    pairs = _pairs(statement)
    if len(pairs) < 2 or not isinstance(statement, ast.Assign):
        return
    kept = [
        (target, value)
        for target, value in pairs
        if not (isinstance(target, ast.Name) and target.id not in loaded and is_pure(value))
    ]
    if len(kept) == 1:
        statement.targets, statement.value = [kept[0][0]], kept[0][1]
    elif kept:
        targets, values = zip(*kept, strict=True)
        statement.targets = [ast.Tuple(list(targets), ast.Store())]
        statement.value = ast.Tuple(list(values), ast.Load())


class _Substitute(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self._name, self._value = name, value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_read = node.id == self._name and isinstance(node.ctx, ast.Load)
        return copy.deepcopy(self._value) if is_read else node


def _propagate(function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Put constants in the place of local names that are bound once, at the top of the body, and
    empty dictionaries where nothing is put into them."""
    times, filled = _bindings(function)
    for place, statement in enumerate(function.body):
        for target, value in _pairs(statement):
            if not isinstance(target, ast.Name) or times[target.id] != 1:
                continue
            is_fixed = isinstance(value, ast.Constant) or is_nothing_in(value, ast.Tuple)
            if is_fixed or (is_nothing_in(value, ast.Dict) and target.id not in filled):
                change = _Substitute(target.id, value)
                for later in range(place + 1, len(function.body)):
                    function.body[later] = change.visit(function.body[later])


def _bindings(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[dict[str, int], set[str]]:
    """How often each local name is bound, and names that are more than read from."""
    times: dict[str, int] = {argument.arg: 9 for argument in arguments_of(function)}
    mentions: collections.Counter[str] = collections.Counter()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                mentions[node.id] += 1
            else:
                times[node.id] = times.get(node.id, 0) + 1
        elif isinstance(node, (ast.Nonlocal, ast.Global)):
            times |= dict.fromkeys(node.names, 9)
        elif node is not function and isinstance(node, FUNCTIONS):
            times |= {argument.arg: 9 for argument in arguments_of(node)}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            times[node.name] = 9
        mentions[_read_by(node)] -= 1
    return times, {name for name, number in mentions.items() if number > 0}


def _read_by(node: ast.AST) -> str:
    """The name that a piece of code reads from without keeping or changing it, or ""."""
    holder: ast.AST | None = None
    if isinstance(node, ast.Attribute):
        holder = node.value if node.attr in _READING else None
    elif isinstance(node, ast.Subscript):
        holder = node.value if isinstance(node.ctx, ast.Load) else None
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        holder = node.args[0] if node.func.id in ("sorted", "len", "dict", "set") else None
    return holder.id if isinstance(holder, ast.Name) else ""


def _pairs(statement: ast.stmt) -> list[tuple[ast.expr, ast.expr]]:
    """What a statement binds, with the value; `a, b = 1, 2` binds two."""
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return [(statement.target, statement.value)]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return []
    target, value = statement.targets[0], statement.value
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    if not isinstance(value, ast.Tuple) or len(value.elts) != len(target.elts):
        return []
    if any(isinstance(part, ast.Starred) for part in [*target.elts, *value.elts]):
        return []
    return list(zip(target.elts, value.elts, strict=True))
