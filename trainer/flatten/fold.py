"""Replaces what a fixed configuration decides by its value, and drops what is then never run."""

from __future__ import annotations

import ast
import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from trainer.flatten.bodies import simplified
from trainer.flatten.constants import Literal, constant_functions
from trainer.flatten.infer import Env, Types
from trainer.flatten.objects import Objects, by_name, fields_of, given, is_data
from trainer.flatten.scopes import (
    FUNCTIONS,
    Comprehension,
    Function,
    ScopedTransformer,
    arguments_of,
    bound_names,
)
from trainer.flatten.syntax import (
    is_constant,
    is_empty,
    is_none,
    is_nothing,
    is_nothing_in,
    is_property,
    is_pure,
    is_something,
    is_sorted,
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
        objects = Objects(tree)
        self._classes = objects.classes
        self._constants = objects.constants()
        self._attributes = by_name(self._constants, objects) | {
            name: literal(value) or ast.Constant(value) for name, value in facts.attributes.items()
        }
        self._arguments: list[set[str]] = [set()]
        self._tables = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            and node.value is not None
            and isinstance(target := _only_target(node), ast.Name)
            and (isinstance(node.value, ast.Constant) or self._is_table(node.value))
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
        made = self._given_field(node)
        if made is not None:
            return made
        if not is_pure(node.value):
            return node
        constant = self._constants.get((owner or "", node.attr))
        constant = constant or self._attributes.get(node.attr)
        return node if constant is None else copy.deepcopy(constant)

    def _given_field(self, node: ast.Attribute) -> ast.expr | None:
        """`Class(a, b).field` of a data class is what the call gives it."""
        owner = self._class_made(node.value)
        if owner is None:
            return None
        assert isinstance(node.value, ast.Call)
        for place, (name, default) in enumerate(fields_of(owner)):
            if name == node.attr:
                return given(node.value, place, name) or default
        return None

    def _class_made(self, node: ast.expr) -> ast.ClassDef | None:
        """The data class that a call without effects makes an object of."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return None
        owner = self._classes.get(node.func.id) if self.is_global(node.func.id) else None
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        return owner if owner and is_data(owner) and all(map(is_pure, values)) else None

    def _is_table(self, node: ast.expr) -> bool:
        """A tuple, or a dictionary whose entries can stand anywhere else."""
        if not isinstance(node, ast.Dict):
            return is_table(node)
        return all(is_pure(value) or self._class_made(value) for value in node.values)

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
        known = self._known_call(node, owner) or _got_from_nothing(node)
        if known is None and is_sorted(node) and is_empty(node):
            return ast.Tuple([], ast.Load())  # which is looped over
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
                named = [self._table_of(part) for part in (node.left, *node.comparators)]
                parts = [value_of(part) for part in named]
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
        if isinstance(holder, ast.Dict) and self._is_table(holder):
            for one, value in zip(holder.keys, holder.values, strict=True):
                if isinstance(one, ast.Constant) and one.value == key:
                    return copy.deepcopy(value)
        if isinstance(holder, ast.Tuple) and isinstance(key, int) and is_pure(holder):
            return copy.deepcopy(holder.elts[key])
        return node

    def _table_of(self, node: ast.expr) -> ast.expr:
        """The constant table that a name means."""
        if isinstance(node, ast.Name) and self.is_global(node.id):
            return self._tables.get(node.id, node)
        return node

    def visit_Starred(self, node: ast.Starred) -> ast.AST:
        self.generic_visit(node)
        table = self._table_of(node.value)
        node.value = copy.deepcopy(table) if isinstance(table, ast.Tuple) else node.value
        return node

    def visited_comprehension(self, node: Comprehension) -> ast.AST:
        if not _loops_over_nothing(node) or isinstance(node, ast.SetComp):
            return node
        if isinstance(node, ast.DictComp):
            return ast.Dict([], [])
        make = ast.List if isinstance(node, ast.ListComp) else ast.Tuple
        return make([], ast.Load())

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
        is_idle = is_nothing(node.body) and not node.orelse and isinstance(node.iter, ast.Call)
        if is_idle and is_reading(node.iter):
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


def _only_target(node: ast.Assign | ast.AnnAssign) -> ast.expr | None:
    if isinstance(node, ast.AnnAssign):
        return node.target
    return node.targets[0] if len(node.targets) == 1 else None


def _loops_over_nothing(node: Comprehension) -> bool:
    return any(
        is_empty(loop.iter)
        or (is_pure(loop.iter) and any(truth_of(test, is_test=True) is False for test in loop.ifs))
        for loop in node.generators
    )


def is_reading(node: ast.expr) -> bool:
    """Whether it is `name.items()` and the like."""
    function = node.func if isinstance(node, ast.Call) else None
    is_method = isinstance(function, ast.Attribute) and function.attr in ("items", "values")
    return is_method and is_pure(function.value)  # type: ignore[union-attr]


def _got_from_nothing(node: ast.Call) -> ast.expr | None:
    """`{}.get(key, default)` is the default."""
    function = node.func
    if not isinstance(function, ast.Attribute) or function.attr != "get" or not node.args:
        return None
    is_nothing = is_nothing_in(function.value, ast.Dict) and all(map(is_pure, node.args))
    return (node.args[1] if len(node.args) > 1 else ast.Constant(None)) if is_nothing else None
