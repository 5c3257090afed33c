"""Which class an expression of the merged module belongs to, as far as annotations say.

Only what is certain is answered: a name of several types has none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from trainer.flatten.scopes import FUNCTIONS, Function, arguments_of

Env = dict[str, str]
"""Local name -> class."""


def kinships(classes: Mapping[str, ast.ClassDef]) -> dict[str, set[str]]:
    """Class -> itself, those that it derives from and those that derive from it."""

    def above(name: str) -> set[str]:
        bases = classes[name].bases if name in classes else []
        return {name}.union(*(above(base.id) for base in bases if isinstance(base, ast.Name)))

    lines = {name: above(name) for name in classes}
    return {
        name: line | {other for other, others in lines.items() if name in others}
        for name, line in lines.items()
    }


class Types:
    """The classes of a module. Make it anew when definitions have changed."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes = {
            node.name: node
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            and not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
        }
        self.functions = {
            node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
        }
        self._attributes: dict[tuple[str, str], str | None] = {}
        self._envs: dict[int, Env] = {}
        self._stores: dict[str, dict[str, list[_Store]]] = {}

    def method(self, name: str, attribute: str) -> ast.FunctionDef | None:
        """A method or property, inherited ones included."""
        node = self.classes.get(name)
        if node is None:
            return None
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == attribute:
                return statement
        for base in node.bases:
            if isinstance(base, ast.Name) and (found := self.method(base.id, attribute)):
                return found
        return None

    def of_annotation(self, node: ast.expr | None, owner: str | None = None) -> str | None:
        """The class that an annotation names, None aside."""
        if isinstance(node, ast.BinOp):
            sides = {self.of_annotation(node.left, owner), self.of_annotation(node.right, owner)}
            return (sides - {None}).pop() if len(sides - {None}) == 1 else None
        if isinstance(node, ast.Name):
            return owner if node.id == "Self" else node.id if node.id in self.classes else None
        return None

    def of(self, node: ast.expr, env: Mapping[str, str]) -> str | None:
        """The class of an expression."""
        if isinstance(node, ast.Name):
            return env.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.of(node.value, env)
            return None if owner is None else self.attribute(owner, node.attr)
        if isinstance(node, ast.Call):
            return self._of_call(node, env)
        if isinstance(node, ast.Subscript):
            return self._of_part(node, env)
        if isinstance(node, ast.BoolOp):
            kinds = {self.of(value, env) for value in node.values}
            return kinds.pop() if len(kinds) == 1 else None
        if isinstance(node, ast.IfExp):
            kinds = {self.of(node.body, env), self.of(node.orelse, env)}
            return kinds.pop() if len(kinds) == 1 else None
        return None

    def _of_part(self, node: ast.Subscript, env: Mapping[str, str]) -> str | None:
        """Of one of several values that a function returns."""
        call, place = node.value, node.slice
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return None
        known = None if call.func.id in env else self.functions.get(call.func.id)
        returns = known.returns if known else None
        parts = returns.slice.elts if _is_tuple_of_several(returns) else []  # type: ignore[union-attr]
        if not isinstance(place, ast.Constant) or not isinstance(place.value, int):
            return None
        return self.of_annotation(parts[place.value]) if place.value < len(parts) else None

    def _of_call(self, node: ast.Call, env: Mapping[str, str]) -> str | None:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id in self.classes and function.id not in env:
                return function.id
            known = self.functions.get(function.id)
            return None if known is None else self.of_annotation(known.returns)
        if isinstance(function, ast.Attribute):
            value = function.value
            owner = self.of(value, env)
            if owner is None and isinstance(value, ast.Name) and value.id in self.classes:
                owner = value.id  # a class method
            method = None if owner is None else self.method(owner, function.attr)
            return None if method is None else self.of_annotation(method.returns, owner)
        return None

    def attribute(self, owner: str, name: str) -> str | None:
        """The class of an attribute of an object."""
        key = (owner, name)
        if key not in self._attributes:
            self._attributes[key] = None  # ends recursion
            self._attributes[key] = self._attribute(owner, name)
        return self._attributes[key]

    def _attribute(self, owner: str, name: str) -> str | None:
        node = self.classes.get(owner)
        if node is None:
            return None
        kinds: set[str | None] = set()
        for statement in node.body:
            if _is_field(statement, name):
                return self.of_annotation(statement.annotation, owner)  # type: ignore[attr-defined]
            if not isinstance(statement, ast.FunctionDef):
                continue
            if statement.name == name:
                is_property = any("property" in ast.unparse(d) for d in statement.decorator_list)
                return self.of_annotation(statement.returns, owner) if is_property else None
        for function, value, annotation in self._stores_of(owner, node).get(name, []):
            of_value = self.of(value, self.env_of(function, owner, {})) if value else None
            kinds.add(self.of_annotation(annotation, owner) or of_value)
        if kinds:
            return kinds.pop() if len(kinds) == 1 else None
        for base in node.bases:
            if isinstance(base, ast.Name) and (found := self.attribute(base.id, name)):
                return found
        return None

    def _stores_of(self, owner: str, node: ast.ClassDef) -> dict[str, list[_Store]]:
        """What the methods of a class put into attributes of their own object."""
        if owner not in self._stores:
            found = self._stores[owner] = {}
            for function in node.body:
                if not isinstance(function, ast.FunctionDef):
                    continue
                for inner in ast.walk(function):
                    for target, value, annotation in _assignments(inner):
                        if _is_own_attribute(target):
                            assert isinstance(target, ast.Attribute)
                            store = (function, value, annotation)
                            found.setdefault(target.attr, []).append(store)
        return self._stores[owner]

    def env_of(self, function: Function, owner: str | None, outer: Mapping[str, str]) -> Env:
        """What is known of the names that a function sees.

        Args:
            owner: the class that it is a method of.
            outer: what the function around it sees.
        """
        if outer:
            return self._env_of(function, owner, outer)
        if id(function) not in self._envs:
            self._envs[id(function)] = self._env_of(function, owner, outer)
        return self._envs[id(function)]

    def _env_of(self, function: Function, owner: str | None, outer: Mapping[str, str]) -> Env:
        env = dict(outer)
        for place, argument in enumerate(arguments_of(function)):
            kind = self.of_annotation(argument.annotation, owner)
            if owner is not None and place == 0 and argument.arg in ("self", "cls"):
                kind = owner
            env.pop(argument.arg, None)
            if kind is not None:
                env[argument.arg] = kind
        if isinstance(function, ast.Lambda):
            return env
        fixed = {argument.arg for argument in arguments_of(function)}
        stores, looped = _local_stores(function)
        for _ in range(2):
            found: dict[str, set[str | None]] = {name: {None} for name in looped}
            for name, value, annotation in stores:
                kind = self.of_annotation(annotation, owner)
                kind = kind or (self.of(value, env) if value else None)
                found.setdefault(name, set()).add(kind)
            for name, kinds in found.items():
                if name in fixed:
                    if kinds != {env.get(name)}:
                        env.pop(name, None)
                    continue
                env.pop(name, None)
                only = kinds.pop() if len(kinds) == 1 else None
                if only is not None:
                    env[name] = only
        return env


def typed_parts(tree: ast.Module, types: Types) -> Iterator[tuple[ast.AST, Env]]:
    """The nodes of a module, annotations left out, with the classes of the names they see."""
    waiting: list[tuple[ast.AST, str | None, Env]] = [(tree, None, {})]
    while waiting:
        node, owner, env = waiting.pop()
        yield node, env
        inner = types.env_of(node, owner, env) if isinstance(node, FUNCTIONS) else env
        below = node.name if isinstance(node, ast.ClassDef) else None
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            seen = inner if field == "body" else env
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    waiting.append((child, below, seen))


def _is_tuple_of_several(node: ast.expr | None) -> bool:
    is_tuple = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    is_tuple = is_tuple and node.value.id == "tuple"  # type: ignore[union-attr]
    return is_tuple and isinstance(node.slice, ast.Tuple)  # type: ignore[union-attr]


def _is_field(statement: ast.stmt, name: str) -> bool:
    target = getattr(statement, "target", None)
    is_annotated = isinstance(statement, ast.AnnAssign) and isinstance(target, ast.Name)
    return is_annotated and target.id == name  # type: ignore[union-attr]


def _is_own_attribute(target: ast.expr) -> bool:
    return (
        isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    )


def _local_stores(
    function: Function,
) -> tuple[list[tuple[str, ast.expr | None, ast.expr | None]], set[str]]:
    """Names that a function assigns with values and annotations, and names that loops bind."""
    stores: list[tuple[str, ast.expr | None, ast.expr | None]] = []
    looped: set[str] = set()
    for node in ast.walk(function):
        for target, value, annotation in _assignments(node):
            if isinstance(target, ast.Name):
                stores.append((target.id, value, annotation))
        if isinstance(node, (ast.For, ast.comprehension)):
            looped |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    return stores, looped


_Store = tuple[ast.FunctionDef, ast.expr | None, ast.expr | None]
Assigned = tuple[ast.expr, ast.expr | None, ast.expr | None]
"""Target, value and annotation; no value where it cannot be told."""


_BINDING = (ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.withitem, ast.Assign)


def _assignments(node: ast.AST) -> list[Assigned]:
    if not isinstance(node, _BINDING):
        return []
    if isinstance(node, ast.AnnAssign):
        return [(node.target, node.value, node.annotation)]
    if isinstance(node, ast.AugAssign):
        return [(node.target, None, None)]
    if isinstance(node, ast.NamedExpr):
        return [(node.target, node.value, None)]
    if isinstance(node, ast.withitem) and node.optional_vars is not None:
        return _unpacked(node.optional_vars, None)
    if isinstance(node, ast.Assign):
        return [pair for target in node.targets for pair in _unpacked(target, node.value)]
    return []


def _unpacked(target: ast.expr, value: ast.expr | None) -> list[Assigned]:
    if not isinstance(target, (ast.Tuple, ast.List)):
        return [(target, value, None)]
    values: list[ast.expr | None] = [None] * len(target.elts)
    if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
        values = list(value.elts)
    elif isinstance(value, ast.Call):
        values = [ast.Subscript(value, ast.Constant(i), ast.Load()) for i in range(len(values))]
    return [
        pair for part, one in zip(target.elts, values, strict=True) for pair in _unpacked(part, one)
    ]
