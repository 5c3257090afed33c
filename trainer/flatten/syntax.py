"""Questions about syntax that need nothing around it, and the syntax of plain values."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

_QUIET_CALLS = {"isinstance", "len", "getattr", "bool", "int", "float", "set", "tuple", "dict"}
_QUIET_CALLS |= {"count_layers", "scheme_named"}
"""Functions, our own last, that do nothing but return."""


def is_constant(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is not ...


def is_pure(node: ast.AST | None) -> bool:
    """Whether an expression can be left out: it has no effect and does not fail."""
    if node is None or isinstance(node, (ast.Constant, ast.Name, ast.Lambda)):
        return True
    if isinstance(node, ast.Call):
        is_quiet = isinstance(node.func, ast.Name) and node.func.id in _QUIET_CALLS
        return is_quiet and all(map(is_pure, node.args))
    if isinstance(node, (ast.Attribute, ast.Starred)):
        return is_pure(node.value)
    kinds = ast.BoolOp | ast.UnaryOp | ast.BinOp | ast.Compare | ast.IfExp | ast.Tuple | ast.List
    if isinstance(node, kinds | ast.Subscript | ast.Slice | ast.Dict | ast.Set):
        parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return all(map(is_pure, parts))
    return False


def value_of(node: ast.AST) -> Any:
    """The value of a literal, tuples, lists, sets and dictionaries included. Raises ValueError."""
    if isinstance(node, ast.expr) and not isinstance(node, ast.JoinedStr):
        return ast.literal_eval(node)
    raise ValueError


def literal(value: Any) -> ast.expr | None:
    """The syntax of a plain value; None for others."""
    try:
        return ast.parse(_written(value), mode="eval").body
    except TypeError:
        return None


def _written(value: Any) -> str:
    """As `repr`, for plain values only; objects of data classes as calls. Raises TypeError."""
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return repr(value)
    if type(value) in (tuple, list, set):
        before, after = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        before, after = ("{", "}") if isinstance(value, set) else (before, after)
        return before + "".join(f"{_written(v)}," for v in value) + after
    if type(value) is dict:
        return "{" + "".join(f"{_written(k)}:{_written(v)}," for k, v in value.items()) + "}"
    names = getattr(value, "_fields", None)
    if names is None and dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    if names is None:
        raise TypeError
    parts = ",".join(_written(getattr(value, name)) for name in names)
    return f"{type(value).__name__}({parts})"


def returned_literal(function: ast.FunctionDef) -> ast.expr | None:
    body = [statement for statement in function.body if not isinstance(statement, ast.Pass)]
    if not body:
        return ast.Constant(None)
    if len(body) == 1 and isinstance(body[0], ast.Return):
        value = body[0].value or ast.Constant(None)
        try:
            value_of(value)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            return None
        return value
    return None


def is_property(function: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(item) for item in function.decorator_list)


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_something(node: ast.expr) -> bool:
    """An expression that certainly is not None."""
    if isinstance(node, ast.Constant):
        return node.value is not None
    return isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Lambda, ast.JoinedStr))


def is_sorted(node: ast.expr) -> bool:
    """Whether it is `sorted(...)`."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return is_call and node.func.id == "sorted"  # type: ignore[attr-defined]


def is_empty(node: ast.expr) -> bool:
    """Whether it has no elements: (), [], {}, range(0), {}.items()."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return not node.elts
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("items", "values", "keys") and is_empty(node.func.value)
    if is_sorted(node):
        assert isinstance(node, ast.Call)
        return is_empty(node.args[0])
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        return is_empty(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        return (
            len(node.args) == 1
            and isinstance(node.args[0], ast.Constant)
            and not node.args[0].value
        )
    return isinstance(node, ast.Dict) and not node.keys


def is_settled(node: ast.AST | None) -> bool:
    """Whether it is the same everywhere: constants, and tuples and objects made of them alone."""
    if isinstance(node, ast.Call):
        is_made = isinstance(node.func, ast.Name) and node.func.id.strip("_")[:1].isupper()
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        return is_made and all(map(is_settled, values))
    if isinstance(node, ast.Tuple):
        return all(map(is_settled, node.elts))
    return is_constant(node)


def is_nothing_in(node: ast.AST | None, kind: type[ast.AST]) -> bool:
    """Whether it is () or {}."""
    return isinstance(node, kind) and isinstance(node, ast.expr) and is_empty(node)


def is_table(node: ast.expr | None) -> bool:
    return isinstance(node, (ast.Tuple, ast.Dict)) and is_pure(node)


def truth_of(node: ast.expr, is_test: bool = False) -> bool | None:
    """Whether an expression is true; None where that is open.

    Args:
        is_test: only its truth matters, so that `open and False` is false.
    """
    if is_constant(node):
        assert isinstance(node, ast.Constant)
        return bool(node.value)
    if is_empty(node):
        return False
    if isinstance(node, ast.Tuple):
        return True if not any(isinstance(one, ast.Starred) for one in node.elts) else None
    if is_test and isinstance(node, ast.BoolOp) and all(map(is_pure, node.values[:-1])):
        is_and = isinstance(node.op, ast.And)
        return (not is_and) if truth_of(node.values[-1]) is (not is_and) else None
    return None


def spread(elements: list[ast.expr]) -> list[ast.expr]:
    """With starred literals in line."""
    kept: list[ast.expr] = []
    for element in elements:
        if isinstance(element, ast.Starred) and isinstance(element.value, (ast.Tuple, ast.List)):
            kept += element.value.elts
        else:
            kept.append(element)
    return kept


def is_nothing(body: list[ast.stmt]) -> bool:
    return all(isinstance(statement, ast.Pass) for statement in body)
