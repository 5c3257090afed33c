"""Functions and attributes that have one value wherever the program looks at them."""

from __future__ import annotations

import ast
from typing import Any

from trainer.flatten.syntax import returned_literal

Literal = str | int | float | bool | bytes | None


def constant_functions(tree: ast.Module) -> dict[str, ast.expr]:
    """Functions at the top that do nothing but return a literal."""
    return {
        node.name: returned
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.decorator_list
        and (returned := returned_literal(node)) is not None
    }


def constant_attributes(tree: ast.Module, taken: set[str]) -> dict[str, Literal]:
    """Attributes that objects of this code set themselves, always to one and the same constant."""
    values: dict[str, set[tuple[type, Literal]]] = {}
    strange: set[str] = set(taken)
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            strange |= {
                target
                for statement in node.body
                for target in _declared(statement, bool(node.decorator_list or node.bases))
            }
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if not isinstance(target, ast.Attribute):
                    strange |= _stored(target)
                elif isinstance(node.value, ast.Constant):
                    constant: Any = (type(node.value.value), node.value.value)
                    values.setdefault(target.attr, set()).add(constant)
                    if isinstance(target.value, ast.Name) and target.value.id == "self":
                        own.add(target.attr)
                else:
                    strange.add(target.attr)
        elif isinstance(node, (ast.AugAssign, ast.For, ast.comprehension)):
            strange |= _stored(node.target)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            strange |= _stored(node.optional_vars)
    return {
        name: next(iter(found))[1]
        for name, found in values.items()
        if len(found) == 1 and name in own and name not in strange
    }


def _stored(target: ast.expr) -> set[str]:
    return {node.attr for node in ast.walk(target) if isinstance(node, ast.Attribute)}


def _declared(statement: ast.stmt, is_data: bool) -> list[str]:
    """Names that the body of a class gives a value or makes a field."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id] if is_data or statement.value else []
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []
