"""What the attributes of the program's own objects hold: those with one value become constants.

A field of a data class has the values that calls of the class give it, so a class counts only where
every mention of it is a call that can be followed. What `setattr` restores was there before.
"""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator, Mapping

from trainer.flatten.infer import kinships
from trainer.flatten.reach import parts_that_run
from trainer.flatten.syntax import is_constant, is_empty, is_pure

_COPIERS = {"replace", "_replace"}
_AS_WHOLE = {"asdict", "astuple", "fields"}
_ANYTHING = None
Values = dict[str, ast.expr | None]
"""What the program's code puts somewhere, by its dump; None = something that is not constant."""


def named_classes(tree: ast.Module) -> ast.Module:
    """`cls(...)` of a class that no other derives from becomes a call of it by name."""
    bases = {ast.unparse(b) for n in tree.body if isinstance(n, ast.ClassDef) for b in n.bases}
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef) and owner.name not in bases:
            for node in ast.walk(owner):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    node.func.id = owner.name if node.func.id == "cls" else node.func.id
    return tree


class Objects:
    """The classes of a program and what is put into their attributes."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._kin = kinships(self.classes)
        self._values: dict[tuple[str, str], Values] = collections.defaultdict(dict)
        self._methods = {
            (owner.name, member.name)
            for owner in self.classes.values()
            for member in owner.body
            if isinstance(member, ast.FunctionDef)
        }
        self.calls = _followed(tree, self.classes)
        for owner in self.classes.values():
            self._take_class(owner)
        self._take_stores(tree)

    def constants(self) -> dict[tuple[str, str], ast.expr]:
        """(class, attribute) -> its only value."""
        found: dict[tuple[str, str], ast.expr] = {}
        for owner in self.classes:
            kin = self._kin[owner]
            names = {name for one, name in self._values if one in kin}
            for name in names:
                values: Values = {}
                for one in kin:
                    values |= self._values.get((one, name), {})
                only = next(iter(values.values()))
                is_method = any((one, name) in self._methods for one in kin)
                if len(values) == 1 and only is not None and not is_method:
                    found[owner, name] = only
        return found

    def open_names(self, constants: Mapping[tuple[str, str], ast.expr]) -> set[str]:
        """Names of methods, and of attributes that are no constants in some class."""
        names = {name for _, name in self._methods}
        return names | {name for one, name in self._values if (one, name) not in constants}

    def _put(self, owner: str, name: str, value: ast.expr | None) -> None:
        is_plain = value is not None and (is_constant(value) or _is_nothing(value))
        values = self._values[owner, name]
        values[ast.dump(value) if is_plain and value else ""] = value if is_plain else _ANYTHING

    def _take_class(self, owner: ast.ClassDef) -> None:
        if any(isinstance(base, ast.Name) and base.id == "Settings" for base in owner.bases):
            for name, _ in fields_of(owner):
                self._put(owner.name, name, _ANYTHING)
            return
        if not is_data(owner):
            for statement in owner.body:
                for name, value in _bound_in_class(statement):
                    self._put(owner.name, name, value)
            return
        calls = self.calls.get(owner.name)
        for place, (name, default) in enumerate(fields_of(owner)):
            if calls is None:
                self._put(owner.name, name, _ANYTHING)
            for call in calls or ():
                self._put(owner.name, name, given(call, place, name) or default)

    def _take_stores(self, tree: ast.Module) -> None:
        elsewhere: list[tuple[str, ast.expr | None]] = []
        for owner in tree.body:
            own = owner.name if isinstance(owner, ast.ClassDef) else None
            for node in ast.walk(owner):
                for target, value in _stores(node):
                    for attribute, one in _attributes(target, value):
                        if own and _is_self(attribute.value):
                            self._put(own, attribute.attr, one)
                        else:
                            elsewhere.append((attribute.attr, one))
                if isinstance(node, ast.Call) and _called(node) in _COPIERS:
                    elsewhere += [(k.arg, k.value) for k in node.keywords if k.arg]
        for name, given_value in elsewhere:
            for holder in [holder for holder, known in self._values if known == name]:
                self._put(holder, name, given_value)


def by_name(constants: Mapping[tuple[str, str], ast.expr], objects: Objects) -> dict[str, ast.expr]:
    """Attributes that are constant whatever the object is: all classes that have them agree. Those
    of data classes have common names, which objects from elsewhere may share."""
    found: dict[str, ast.expr] = {}
    differing: set[str] = set(objects.open_names(constants))
    for (owner, name), value in constants.items():
        if is_data(objects.classes[owner]) and "_" not in name.strip("_"):
            differing.add(name)
        if ast.dump(found.setdefault(name, value)) != ast.dump(value):
            differing.add(name)
    return {name: value for name, value in found.items() if name not in differing}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def fields_of(owner: ast.ClassDef) -> list[tuple[str, ast.expr | None]]:
    """Names and defaults of the fields of a data class."""
    return [
        (statement.target.id, statement.value)
        for statement in owner.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]


def is_data(owner: ast.ClassDef) -> bool:
    """Whether it is a data class or a named tuple."""
    return any("dataclass" in ast.unparse(item) for item in owner.decorator_list) or any(
        ast.unparse(base) == "NamedTuple" for base in owner.bases
    )


def given(call: ast.Call, place: int, name: str) -> ast.expr | None:
    """What a call gives an argument; None when it leaves it out."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return call.args[place] if place < len(call.args) else None


def _followed(tree: ast.Module, classes: Mapping[str, ast.ClassDef]) -> dict[str, list[ast.Call]]:
    """The calls of each class of which every mention is a call, or a test for it."""
    calls: dict[str, list[ast.Call]] = {name: [] for name in classes}
    mentions: collections.Counter[str] = collections.Counter()
    for node in parts_that_run(tree):
        if isinstance(node, ast.Name) and node.id in classes:
            mentions[node.id] += 1
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            mentions[node.value.id] -= 1  # a class method
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in classes:
            calls[node.func.id].append(node)
        elif node.func.id == "isinstance":
            mentions.subtract(n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name))
    return {
        name: found
        for name, found in calls.items()
        if mentions[name] == len(found) and not any(map(_is_spread, found))
    }


def _is_spread(call: ast.Call) -> bool:
    return any(isinstance(value, ast.Starred) for value in call.args) or any(
        keyword.arg is None for keyword in call.keywords
    )


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_nothing(value: ast.expr) -> bool:
    return isinstance(value, ast.Tuple) and is_empty(value)


def _bound_in_class(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        if statement.value is not None:
            yield statement.target.id, statement.value
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                yield target.id, statement.value


def _stores(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.target, node.value
    elif isinstance(node, (ast.AugAssign, ast.For, ast.comprehension)):
        yield node.target, None
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, None
    elif isinstance(node, ast.Delete):
        yield from ((target, None) for target in node.targets)


def _attributes(
    target: ast.expr, value: ast.expr | None
) -> Iterator[tuple[ast.Attribute, ast.expr | None]]:
    if isinstance(target, ast.Attribute):
        yield target, value
    elif isinstance(target, (ast.Tuple, ast.List)):
        values: list[ast.expr | None] = [None] * len(target.elts)
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            values = list(value.elts)
        for part, one in zip(target.elts, values, strict=True):
            yield from _attributes(part, one)


def without_unread_fields(tree: ast.Module) -> ast.Module:
    """Data classes lose the fields that nothing reads, and calls of them what they give these."""
    objects = Objects(tree)
    read = {
        node.attr
        for node in parts_that_run(tree)
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)
    }
    read |= {node.value for node in ast.walk(tree) if _is_word(node)}  # type: ignore[attr-defined]
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    copied = {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _called(node) in _COPIERS
        for keyword in node.keywords
    }
    if any(isinstance(node, ast.Name) and node.id in _AS_WHOLE for node in ast.walk(tree)):
        return tree
    for name, calls in objects.calls.items():
        owner = objects.classes[name]
        is_tuple = any(ast.unparse(base) == "NamedTuple" for base in owner.bases)
        if not is_data(owner) or not calls:
            continue
        for place, (field, _) in reversed(list(enumerate(fields_of(owner)))):
            is_kept = field in read or field in copied or field in stored
            values = [given(call, place, field) for call in calls]
            if is_tuple and any(values):  # which may be unpacked
                continue
            if not is_kept and all(map(is_pure, values)):
                _remove(owner, field, place, calls)
    return tree


def _is_word(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()
    )


def _remove(owner: ast.ClassDef, field: str, place: int, calls: list[ast.Call]) -> None:
    owner.body = [
        statement
        for statement in owner.body
        if not (isinstance(statement, ast.AnnAssign) and _target(statement) == field)
    ] or [ast.Pass()]
    for call in calls:
        del call.args[place : place + 1]
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != field]


def _target(statement: ast.AnnAssign) -> str:
    return statement.target.id if isinstance(statement.target, ast.Name) else ""
