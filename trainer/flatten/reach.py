"""Leaves of the merged program what its main program can reach: definitions, methods, fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from trainer.flatten.infer import Env, Types, kinships
from trainer.flatten.scopes import COMPREHENSIONS, FUNCTIONS, bound_names
from trainer.flatten.syntax import is_pure

_CALLED_BY_TORCH = {"forward", "backward", "setup_context"}
_KEPT_BASES = {"Settings", "NamedTuple", "Exception", "ValueError", "RuntimeError"}


def reachable(tree: ast.Module) -> ast.Module:
    """The program without what nothing in it can reach."""
    seen = _Reach(tree)
    seen.run()
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    body: list[ast.stmt] = []
    for statement in tree.body:
        names = _defined(statement)
        if names is None:
            body.append(statement)
        elif names & seen.names:
            if isinstance(statement, ast.ClassDef):
                statement.body = [s for s in statement.body if seen.keeps(statement, s)]
                statement.body = statement.body or [ast.Pass()]
            body.append(statement)
    tree.body = body
    _drop_unread_attributes(tree, seen)
    tree = _WithoutTests((seen.tested - seen.names) & own).visit(tree)
    return tree


def _defined(statement: ast.stmt) -> set[str] | None:
    """Names of a definition without effects; None for what must stay."""
    if isinstance(statement, ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.FunctionDef):
        return {statement.name} | {
            name for item in statement.decorator_list for name in _registered(item)
        }
    if isinstance(statement, ast.Expr):
        return set(_registered(statement.value)) or None
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    if isinstance(statement, ast.Assign):
        targets = [node for target in statement.targets for node in ast.walk(target)]
        if not any(isinstance(node, (ast.Attribute, ast.Subscript)) for node in targets):
            return {node.id for node in targets if isinstance(node, ast.Name)}
    return None


def _registered(node: ast.expr) -> list[str]:
    """The operator that `operator.register_...` is about: nothing but that needs it."""
    function = node.func if isinstance(node, ast.Call) else node
    if isinstance(function, ast.Attribute) and function.attr.startswith("register_"):
        return [function.value.id] if isinstance(function.value, ast.Name) else []
    return []


def parts_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, annotations left out."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            children = value if isinstance(value, list) else [value]
            waiting += [child for child in children if isinstance(child, ast.AST)]


class _Reach:
    def __init__(self, tree: ast.Module) -> None:
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        """Read of objects that may be of any class."""
        self.owned: set[tuple[str, str]] = set()
        """(class, attribute) read of objects of this class, or of one that derives from it."""
        self.tested: set[str] = set()
        """Classes that objects are only tested for."""
        self._types = Types(tree)
        self._kin = kinships(self._types.classes)
        self._tree = tree
        self._waiting: list[tuple[ast.AST, str | None]] = []
        self._held: list[tuple[ast.ClassDef, ast.stmt]] = []
        """Methods and fields of live classes that nothing has named yet."""

    def run(self) -> None:
        definitions: list[tuple[set[str], ast.stmt]] = []
        for statement in self._tree.body:
            names = _defined(statement)
            if names is None:
                self._waiting.append((statement, None))
            else:
                definitions.append((names, statement))
        while True:
            while self._waiting:
                self._read(*self._waiting.pop())
            ready = [s for names, s in definitions if names & self.names]
            definitions = [(names, s) for names, s in definitions if not names & self.names]
            for statement in ready:
                self._open(statement)
            members = [pair for pair in self._held if self.keeps(*pair)]
            self._held = [pair for pair in self._held if not self.keeps(*pair)]
            self._waiting += [(member, owner.name) for owner, member in members]
            if not ready and not members:
                return

    def _open(self, statement: ast.stmt) -> None:
        if not isinstance(statement, ast.ClassDef):
            self._waiting.append((statement, None))
            return
        parts = [*statement.bases, *statement.keywords, *statement.decorator_list]
        self._waiting += [(part, None) for part in parts]
        self._held += [(statement, member) for member in statement.body]

    def _read(
        self,
        node: ast.AST,
        owner: str | None,
        local: frozenset[str] = frozenset(),
        env: Env | None = None,
    ) -> None:
        """Note the names and attributes that a piece of code reads.

        Args:
            owner: the class that it is a member of.
            local: names that mean something else there than at the top.
            env: classes of local names.
        """
        env = env or {}
        if isinstance(node, ast.Name):
            self.names |= {node.id} - local if isinstance(node.ctx, ast.Load) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            self._read_attribute(node, env)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
            self.attributes.add(node.target.attr)
        elif tested := tested_classes(node):
            assert isinstance(node, ast.Call)
            self.tested |= tested
            self._read(node.args[0], owner, local, env)
            return
        inner, inner_env = local, env
        if isinstance(node, (*FUNCTIONS, *COMPREHENSIONS)):
            inner = local | bound_names(node)
        if isinstance(node, FUNCTIONS):
            inner_env = self._types.env_of(node, owner, env)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            is_inside = field in ("body", "elt", "key", "value", "generators")
            names = inner if is_inside else local
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self._read(child, None if is_inside else owner, names, inner_env)

    def _read_attribute(self, node: ast.Attribute, env: Env) -> None:
        owner = self._types.of(node.value, env)
        if owner is None and isinstance(node.value, ast.Name) and node.value.id in self._kin:
            owner = node.value.id  # of the class itself
        if owner is None:
            self.attributes.add(node.attr)
        else:
            self.owned.add((owner, node.attr))

    def is_read(self, owner: str, attribute: str) -> bool:
        """Whether something may read this attribute of objects of a class."""
        kin = self._kin.get(owner, {owner})
        return attribute in self.attributes or any((one, attribute) in self.owned for one in kin)

    def keeps(self, owner: ast.ClassDef, member: ast.stmt) -> bool:
        """Whether a member of a live class is needed."""
        is_settings = any(isinstance(b, ast.Name) and b.id == "Settings" for b in owner.bases)
        if isinstance(member, ast.FunctionDef):
            name = member.name
            is_special = name.startswith("__") and name.endswith("__")
            return is_special or self.is_read(owner.name, name) or name in _CALLED_BY_TORCH
        if is_settings and isinstance(member, ast.AnnAssign):
            assert isinstance(member.target, ast.Name)
            return self.is_read(owner.name, member.target.id)
        return not isinstance(member, ast.Pass)


def tested_classes(node: ast.AST) -> set[str]:
    """The names in `isinstance(..., names)`."""
    is_test = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if not is_test or node.func.id != "isinstance":  # type: ignore[attr-defined]
        return set()
    return {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}  # type: ignore[attr-defined]


class _WithoutTests(ast.NodeTransformer):
    """Nothing is an object of a class that nothing reaches."""

    def __init__(self, never: set[str]) -> None:
        self._never = never

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        tested = tested_classes(node)
        return ast.Constant(False) if tested and tested <= self._never else node


def _drop_unread_attributes(tree: ast.Module, seen: _Reach) -> None:
    """Take away what methods put into attributes that nothing reads. Modules of torch register
    what they are given, so theirs stay unless it is a plain value."""
    for owner in tree.body:
        if not isinstance(owner, ast.ClassDef):
            continue
        is_plain = all(isinstance(b, ast.Name) and b.id in _KEPT_BASES for b in owner.bases)
        for function in owner.body:
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    for field in ("body", "orelse", "finalbody"):
                        block = getattr(node, field, None)
                        if isinstance(block, list) and block:
                            kept = [
                                s for s in block if not _is_unread(s, owner.name, seen, is_plain)
                            ]
                            setattr(node, field, kept or ([ast.Pass()] if field == "body" else []))


def _is_unread(statement: ast.stmt, owner: str, seen: _Reach, is_plain: bool) -> bool:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign):
        target, value = statement.target, statement.value or ast.Constant(None)
    else:
        return False
    if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)):
        return False
    if target.value.id != "self" or seen.is_read(owner, target.attr):
        return False
    return isinstance(value, ast.Constant) or (is_plain and is_pure(value))
