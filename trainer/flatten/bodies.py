"""Makes the body of a function shorter by what can be seen in it alone."""

from __future__ import annotations

import ast

from trainer.flatten.scopes import FUNCTIONS, arguments_of
from trainer.flatten.syntax import is_pure


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


class _Substitute(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.Constant) -> None:
        self._name, self._value = name, value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_read = node.id == self._name and isinstance(node.ctx, ast.Load)
        return ast.Constant(self._value.value) if is_read else node


def _propagate(function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    """Put constants in the place of local names that are bound once, at the top of the body."""
    times: dict[str, int] = {argument.arg: 9 for argument in arguments_of(function)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            times[node.id] = times.get(node.id, 0) + 1
        elif isinstance(node, (ast.Nonlocal, ast.Global)):
            times |= dict.fromkeys(node.names, 9)
        elif node is not function and isinstance(node, FUNCTIONS):
            times |= {argument.arg: 9 for argument in arguments_of(node)}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            times[node.name] = 9
    for place, statement in enumerate(function.body):
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        value, target = statement.value, targets[0]
        if (
            len(targets) == 1
            and isinstance(target, ast.Name)
            and times[target.id] == 1
            and isinstance(value, ast.Constant)
        ):
            change = _Substitute(target.id, value)
            for later in range(place + 1, len(function.body)):
                function.body[later] = change.visit(function.body[later])
