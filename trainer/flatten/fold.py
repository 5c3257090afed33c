"""Replaces what a fixed configuration decides by its value, and drops what is then never run."""

from __future__ import annotations

import ast
import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from trainer.flatten.bodies import simplified
from trainer.flatten.constants import Literal, constant_attributes, constant_functions
from trainer.flatten.infer import Env, Types
from trainer.flatten.scopes import FUNCTIONS, Function, ScopedTransformer, arguments_of, bound_names
from trainer.flatten.syntax import (
    is_constant,
    is_empty,
    is_none,
    is_nothing,
    is_property,
    is_pure,
    is_something,
    is_table,
    literal,
    returned_literal,
    spread,
    truth_of,
    value_of,
)

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
_BUILTINS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (abs, bool, float, int, len, max, min, round, str, sorted, tuple)
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known beside the code; trainer/flatten/facts.py collects it."""

    fields: Mapping[tuple[str, str], ast.expr]
    """(class of settings, field) -> value."""
    functions: Mapping[str, Callable[..., Any]]
    """Functions to call now when all their arguments are known."""
    methods: Mapping[tuple[str, str], Callable[..., Any]]
    """The same for methods of settings."""
    arguments: Mapping[str, Literal]
    """Arguments, by name, that always have one value."""
    attributes: Mapping[str, Literal]
    """The same of attributes."""
    objects: Mapping[str, Any]
    """Class of settings -> the settings of this run."""


def folded(tree: ast.Module, facts: Facts) -> ast.Module:
    """One pass; repeat it until nothing changes."""
    folder = _Folder(tree, facts)
    tree = folder.visit(tree)
    for node in ast.walk(tree):
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
    return ast.fix_missing_locations(tree)


class _Folder(ScopedTransformer):
    def __init__(self, tree: ast.Module, facts: Facts) -> None:
        super().__init__()
        self._facts = facts
        self._types = Types(tree)
        self._functions = constant_functions(tree)
        self._attributes = {**constant_attributes(tree, set()), **facts.attributes}
        self._arguments: list[set[str]] = [set()]
        self._tables = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and (isinstance(node.value, ast.Constant) or is_table(node.value))
        }
        self._owners: list[str] = []
        self._envs: list[Env] = [{}]

    # scopes

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.ClassDef):
            self._owners.append(node.name)
            visited = super().visit(node)
            self._owners.pop()
            return visited
        if isinstance(node, FUNCTIONS):
            owner = self._owners[-1] if self._owners and len(self._scopes) == 1 else None
            self._envs.append(self._types.env_of(node, owner, self._envs[-1]))
            own = {argument.arg for argument in arguments_of(node)}
            self._arguments.append((self._arguments[-1] - bound_names(node)) | own)
            visited = super().visit(node)
            self._envs.pop()
            self._arguments.pop()
            return visited
        return super().visit(node)

    def visited_function(self, node: Function) -> ast.AST:
        if not isinstance(node, ast.Lambda):
            node.body = simplified(node)
        return node

    # expressions

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load):
            return node
        if self.is_global(node.id):
            table = self._tables.get(node.id)
            return table if isinstance(table, ast.Constant) else node
        if node.id in self._facts.arguments and node.id in self._arguments[-1]:
            return ast.Constant(self._facts.arguments[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        owner = self._types.of(node.value, self._envs[-1])
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        if owner is not None:
            if (owner, node.attr) in self._facts.fields:
                return copy.deepcopy(self._facts.fields[owner, node.attr])
            method = self._types.method(owner, node.attr)
            if method is not None and is_property(method) and is_pure(node.value):
                returned = returned_literal(method)
                if returned is not None and self._is_final(owner, node.attr):
                    return returned
        if not is_pure(node.value):
            return node
        if node.attr in self._attributes:
            return ast.Constant(self._attributes[node.attr])
        return node

    def _is_final(self, owner: str, name: str) -> bool:
        """Whether no class that derives from the owner has its own."""
        return not any(
            any(isinstance(base, ast.Name) and base.id == owner for base in node.bases)
            for node in self._types.classes.values()
        )

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        owner, method = None, None
        if isinstance(function, ast.Attribute):
            owner = self._types.of(function.value, self._envs[-1])
            method = owner and self._types.method(owner, function.attr)
        self.generic_visit(node)
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return node
        known = self._known_call(node, owner)
        if known is not None:
            return known
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if all(map(is_pure, arguments)):
            if isinstance(function, ast.Name) and self.is_global(function.id):
                return self._functions.get(function.id, node)
            if owner and method and not method.decorator_list and self._is_final(owner, ""):
                assert isinstance(function, ast.Attribute)
                returned = returned_literal(method)
                if returned is not None and is_pure(function.value):
                    return returned
        return node

    def _known_call(self, node: ast.Call, owner: str | None) -> ast.expr | None:
        function = node.func
        called: Callable[..., Any] | None = None
        if isinstance(function, ast.Name) and self.is_global(function.id):
            called = self._facts.functions.get(function.id) or _BUILTINS.get(function.id)
        elif isinstance(function, ast.Attribute) and owner is not None:
            called = self._facts.methods.get((owner, function.attr))
        if called is None or any(keyword.arg is None for keyword in node.keywords):
            return None
        try:
            arguments = [self._value(argument) for argument in node.args]
            options = {str(k.arg): self._value(k.value) for k in node.keywords}
            return literal(called(*arguments, **options))
        except (ValueError, TypeError, SyntaxError):
            return None

    def _value(self, node: ast.expr) -> Any:
        """Of a literal, or of settings. Raises ValueError."""
        settings = self._facts.objects.get(self._types.of(node, self._envs[-1]) or "")
        return value_of(node) if settings is None else settings

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return self._computed(node)
        left, right = node.left, node.comparators[0]
        kind = node.ops[0]
        if isinstance(kind, (ast.Is, ast.IsNot)) and is_none(right) and is_something(left):
            return ast.Constant(isinstance(kind, ast.IsNot))
        if isinstance(kind, (ast.In, ast.NotIn)) and is_empty(right) and is_pure(left):
            return ast.Constant(isinstance(kind, ast.NotIn))
        return self._computed(node)

    def _computed(self, node: ast.expr) -> ast.AST:
        """The value of an operation on literals."""
        try:
            if isinstance(node, ast.Compare):
                parts = [value_of(part) for part in (node.left, *node.comparators)]
                pairs = zip(parts, parts[1:], node.ops, strict=False)
                value = all(_OPERATORS[type(kind)](a, b) for a, b, kind in pairs)
            elif isinstance(node, ast.BinOp):
                operate = _OPERATORS[type(node.op)]
                value = operate(value_of(node.left), value_of(node.right))
            else:
                assert isinstance(node, ast.UnaryOp)
                value = _OPERATORS[type(node.op)](value_of(node.operand))
            return literal(value) or node
        except (ValueError, TypeError, KeyError, SyntaxError, ArithmeticError):
            return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self._computed(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._computed(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        is_and = isinstance(node.op, ast.And)
        kept: list[ast.expr] = []
        for place, value in enumerate(node.values):
            truth = truth_of(value)
            if truth is is_and and place < len(node.values) - 1:
                continue
            kept.append(value)
            if truth is not None and truth is not is_and:
                break
        if len(kept) == 1:
            return kept[0]
        node.values = kept
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        truth = truth_of(node.test, is_test=True)
        return node if truth is None else node.body if truth else node.orelse

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.ctx, ast.Load) and is_constant(node.slice)):
            return node
        assert isinstance(node.slice, ast.Constant)
        holder, key = node.value, node.slice.value
        if isinstance(holder, ast.Name) and self.is_global(holder.id):
            holder = self._tables.get(holder.id, holder)
        if isinstance(holder, ast.Dict) and all(map(is_pure, holder.values)):
            for one, value in zip(holder.keys, holder.values, strict=True):
                if isinstance(one, ast.Constant) and one.value == key:
                    return value
        if isinstance(holder, ast.Tuple) and isinstance(key, int) and is_pure(holder):
            return holder.elts[key]
        return node

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        self.generic_visit(node)
        node.elts = spread(node.elts)
        return node

    def visit_List(self, node: ast.List) -> ast.AST:
        self.generic_visit(node)
        node.elts = spread(node.elts)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        merged: list[Any] = []
        for part in node.values:
            if (
                isinstance(part, ast.FormattedValue)
                and is_constant(part.value)
                and part.conversion == -1
                and part.format_spec is None
            ):
                assert isinstance(part.value, ast.Constant)
                part = ast.Constant(str(part.value.value))
            if (
                merged
                and isinstance(part, ast.Constant)
                and isinstance(before := merged[-1], ast.Constant)
            ):
                merged[-1] = ast.Constant(str(before.value) + str(part.value))
            else:
                merged.append(part)
        if all(isinstance(part, ast.Constant) for part in merged):
            return merged[0] if merged else ast.Constant("")
        node.values = merged
        return node

    # statements

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        truth = truth_of(node.test, is_test=True)
        if truth is not None:
            return self._visited(node.body if truth else node.orelse) or None
        node.body = self._visited(node.body) or [ast.Pass()]
        node.orelse = self._visited(node.orelse)
        if not node.orelse and is_nothing(node.body) and is_pure(node.test):
            return None
        return node

    def visit_Match(self, node: ast.Match) -> Any:
        self.generic_visit(node)
        if not isinstance(node.subject, ast.Constant):
            return node
        for case in node.cases:
            pattern = case.pattern
            if isinstance(pattern, ast.MatchValue) and isinstance(pattern.value, ast.Constant):
                if pattern.value.value == node.subject.value:
                    return case.body
            elif isinstance(pattern, ast.MatchAs) and (pattern.pattern, pattern.name) == (
                None,
                None,
            ):
                return case.body
            else:
                return node
        return None

    def visit_For(self, node: ast.For) -> Any:
        self.generic_visit(node)
        if is_empty(node.iter) and not node.orelse:
            return None
        node.body = node.body or [ast.Pass()]
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> Any:
        self.generic_visit(node)
        return None if is_pure(node.value) else node

    def visited_class(self, node: ast.ClassDef) -> ast.AST:
        node.body = node.body or [ast.Pass()]
        return node
