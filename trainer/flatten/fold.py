"""Replaces what a fixed configuration decides by its value, and drops what is then never run."""

from __future__ import annotations

import ast
import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from trainer.flatten.infer import Env, Types
from trainer.flatten.scopes import FUNCTIONS, Function, ScopedTransformer, arguments_of, bound_names

Literal = str | int | float | bool | bytes | None
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
_QUIET_CALLS = {"isinstance", "len", "getattr", "bool", "int", "float", "set", "tuple", "dict"}


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


def constant_functions(tree: ast.Module) -> dict[str, ast.expr]:
    """Functions at the top that do nothing but return a literal."""
    return {
        node.name: returned
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.decorator_list
        and (returned := returned_literal(node)) is not None
    }


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
            and (isinstance(node.value, ast.Constant) or _is_literal(node.value))
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
            node.body = _simplified(node)
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
            if method is not None and _is_property(method) and is_pure(node.value):
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
        if isinstance(kind, (ast.Is, ast.IsNot)) and _is_none(right) and _is_something(left):
            return ast.Constant(isinstance(kind, ast.IsNot))
        if isinstance(kind, (ast.In, ast.NotIn)) and _is_empty(right) and is_pure(left):
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
            truth = _truth(value)
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
        truth = _truth(node.test, is_test=True)
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
        node.elts = _spread(node.elts)
        return node

    def visit_List(self, node: ast.List) -> ast.AST:
        self.generic_visit(node)
        node.elts = _spread(node.elts)
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
        truth = _truth(node.test, is_test=True)
        if truth is not None:
            return self._visited(node.body if truth else node.orelse) or None
        node.body = self._visited(node.body) or [ast.Pass()]
        node.orelse = self._visited(node.orelse)
        if not node.orelse and _is_nothing(node.body) and is_pure(node.test):
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
        if _is_empty(node.iter) and not node.orelse:
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


def _is_property(function: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(item) for item in function.decorator_list)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_something(node: ast.expr) -> bool:
    """An expression that certainly is not None."""
    if isinstance(node, ast.Constant):
        return node.value is not None
    return isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Lambda, ast.JoinedStr))


def _is_empty(node: ast.expr) -> bool:
    if isinstance(node, (ast.Tuple, ast.List)):
        return not node.elts
    return isinstance(node, ast.Dict) and not node.keys


def _is_literal(node: ast.expr | None) -> bool:
    return isinstance(node, (ast.Tuple, ast.Dict)) and is_pure(node)


def _truth(node: ast.expr, is_test: bool = False) -> bool | None:
    """Whether an expression is true; None where that is open.

    Args:
        is_test: only its truth matters, so that `open and False` is false.
    """
    if is_constant(node):
        assert isinstance(node, ast.Constant)
        return bool(node.value)
    if _is_empty(node):
        return False
    if is_test and isinstance(node, ast.BoolOp) and all(map(is_pure, node.values[:-1])):
        is_and = isinstance(node.op, ast.And)
        return (not is_and) if _truth(node.values[-1]) is (not is_and) else None
    return None


def _spread(elements: list[ast.expr]) -> list[ast.expr]:
    """With starred literals in line."""
    kept: list[ast.expr] = []
    for element in elements:
        if isinstance(element, ast.Starred) and isinstance(element.value, (ast.Tuple, ast.List)):
            kept += element.value.elts
        else:
            kept.append(element)
    return kept


def _is_nothing(body: list[ast.stmt]) -> bool:
    return all(isinstance(statement, ast.Pass) for statement in body)


def _simplified(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
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
    for block in _blocks(function):
        block[:] = [s for s in block if not _is_unread(s, loaded | declared)] or [ast.Pass()]
    return function.body


def _blocks(function: ast.AST) -> list[list[ast.stmt]]:
    return [
        block
        for node in ast.walk(function)
        for name in ("body", "orelse", "finalbody")
        if isinstance(block := getattr(node, name, None), list) and block
    ]


def _cut_after_return(function: ast.AST) -> None:
    for block in _blocks(function):
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
