"""All modules that an entry needs, as one module with one name for each thing.

Imports within the package become plain names; a name that two modules bind gets the module's name
in front in all but the first. What a module does at its top stays in the order in which importing
would run it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.flatten.scopes import COMPREHENSIONS, FUNCTIONS, ScopedTransformer, bound_names

PACKAGE = Path(__file__).parents[1]
NOT_KEPT = ("__future__", "pydantic")
"""Modules that the merged code does without."""


def merged(entry: str, stand_ins: Mapping[str, str]) -> ast.Module:
    """The entry's module and all that it needs.

    Args:
        stand_ins: module, or definition in a module -> source that takes its place.
    """
    program = _Program(stand_ins)
    program.add(entry)
    tree = ast.Module(body=program.imports() + program.body, type_ignores=[])
    distinct: ast.Module = _Distinct(tree, program.meant).visit(tree)
    return ast.fix_missing_locations(distinct)


@functools.cache
def _text(module: str) -> str | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.read_text()
    return None


def is_own(module: str) -> bool:
    """Whether it is a module of this package."""
    return module.split(".")[0] == PACKAGE.name and _text(module) is not None


class _Program:
    def __init__(self, stand_ins: Mapping[str, str]) -> None:
        self.body: list[ast.stmt] = []
        self._stand_ins = stand_ins
        self._bindings: dict[str, dict[str, str]] = {}
        """Module -> name in it -> name in the program, or the module's dotted name after a "@"."""
        self._taken: dict[str, str] = {}
        """Name in the program -> what it is."""
        self.meant: list[ast.Name] = []
        """Names that are of the program, even where a function has its own of the same name."""
        self._external: dict[str, tuple[str, str, str]] = {}
        """Name in the program -> (module, name in it or "", how it is bound)."""

    def imports(self) -> list[ast.stmt]:
        """Of what is not in the package."""
        statements: list[ast.stmt] = []
        for name, (module, attribute, _) in sorted(self._external.items()):
            bound = attribute or module
            alias = ast.alias(bound, None if bound == name else name)
            if attribute:
                statements.append(ast.ImportFrom(module, [alias], 0))
            else:
                statements.append(ast.Import([alias]))
        return statements

    def add(self, module: str) -> dict[str, str]:
        """Merge a module, once; returns its bindings."""
        if module in self._bindings:
            return self._bindings[module]
        names = self._bindings[module] = {}
        source = self._stand_ins.get(module) or _text(module)
        assert source is not None, module
        tree = self._replaced(module, ast.parse(source))
        kept = []
        for statement in tree.body:
            if not self._imported(statement, names):
                kept.append(statement)
        for name in sorted(bound_names(ast.Module(body=kept, type_ignores=[]))):
            names[name] = self._free(name, module)
        resolver = _Resolver(self, names)
        for statement in kept:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                self.body.append(resolver.visit(statement))
        return names

    def _replaced(self, module: str, tree: ast.Module) -> ast.Module:
        """With stand-ins in the place of definitions at the top of it, or of methods."""
        for holder, prefix in [
            (tree, f"{module}."),
            *(
                (node, f"{module}.{node.name}.")
                for node in tree.body
                if isinstance(node, ast.ClassDef)
            ),
        ]:
            body: list[ast.stmt] = []
            for statement in holder.body:  # type: ignore[attr-defined]
                name = getattr(statement, "name", None)
                source = self._stand_ins.get(f"{prefix}{name}")
                body += [statement] if source is None else ast.parse(source).body
            holder.body = body  # type: ignore[attr-defined]
        return tree

    def _imported(self, statement: ast.stmt, names: dict[str, str]) -> bool:
        """Take in an import. False when it is something else."""
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            return True
        if isinstance(statement, ast.ImportFrom):
            assert statement.module and not statement.level
            for alias in statement.names:
                bound = self.binding(statement.module, alias.name)
                if bound is not None:
                    names[alias.asname or alias.name] = bound
            return True
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                names[(alias.asname or alias.name).split(".")[0]] = self._outside(alias)
            return True
        return False

    def binding(self, module: str, name: str) -> str | None:
        """What `from module import name` means in the program."""
        if module.split(".")[0] in NOT_KEPT:
            return name
        if not is_own(module):
            wanted = self._external_name(name, (module, name, name))
            return wanted
        if is_own(f"{module}.{name}"):
            self.add(f"{module}.{name}")
            return f"@{module}.{name}"
        return self.add(module)[name]

    def _outside(self, alias: ast.alias) -> str:
        name = alias.asname or alias.name.split(".")[0]
        module = alias.name if alias.asname else name
        if alias.name != module:  # `import a.b` binds a
            self._external[alias.name] = (alias.name, "", alias.name)
        return self._external_name(name, (module, "", name))

    def _external_name(self, name: str, what: tuple[str, str, str]) -> str:
        for known, other in self._external.items():
            if other == what:
                return known
        unique = name
        while unique in self._taken:
            unique += "_"
        self._taken[unique] = unique
        self._external[unique] = what
        return unique

    def _free(self, name: str, module: str) -> str:
        unique, parts = name, module.split(".")[1:]
        while unique in self._taken:
            unique = f"{parts.pop() if parts else '_'}_{unique.lstrip('_')}"
        self._taken[unique] = unique
        return unique


class _Resolver(ScopedTransformer):
    """Puts the program's names in the place of a module's."""

    def __init__(self, program: _Program, names: dict[str, str]) -> None:
        super().__init__()
        self._program = program
        self._names = names
        self._inner: list[dict[str, str]] = []

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        base = node.value
        if isinstance(base, ast.Name) and self.is_global(base.id):
            bound = self._names.get(base.id, "")
            if bound.startswith("@"):
                found = ast.Name(self._program.add(bound[1:])[node.attr], node.ctx)
                self._program.meant.append(found)
                return found
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        for names in self._inner:
            if node.id in names:
                return ast.Name(names[node.id], node.ctx)
        if self.is_global(node.id):
            bound = self._names.get(node.id, node.id)
            assert not bound.startswith("@"), f"{bound} is used as a value"
            return ast.Name(bound, node.ctx)
        return node

    def visit(self, node: ast.AST) -> Any:
        is_top = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not self._scopes
        if isinstance(node, ast.FunctionDef):
            self._inner.append(self._imports_of(node))
        visited = super().visit(node)
        if isinstance(node, ast.FunctionDef):
            self._inner.pop()
        if is_top:
            assert isinstance(visited, (ast.ClassDef, ast.FunctionDef))
            visited.name = self._names[visited.name]
        return visited

    def _imports_of(self, function: ast.FunctionDef) -> dict[str, str]:
        """Names that imports of this package inside a function bind; those imports are dropped."""
        names: dict[str, str] = {}
        for node in ast.walk(function):
            for field in ("body", "orelse"):
                block = getattr(node, field, None)
                if not isinstance(block, list):
                    continue
                for statement in list(block):
                    if isinstance(statement, ast.ImportFrom) and is_own(statement.module or ""):
                        for alias in statement.names:
                            bound = self._program.binding(statement.module or "", alias.name)
                            names[alias.asname or alias.name] = bound or alias.name
                        block[block.index(statement)] = ast.Pass()
        return names


class _Distinct(ScopedTransformer):
    """Functions of the program get names that no scope within it binds, so that every mention of
    the name is one of the function."""

    def __init__(self, tree: ast.Module, meant: list[ast.Name]) -> None:
        super().__init__()
        self._meant = set(map(id, meant))
        local = {
            name
            for scope in ast.walk(tree)
            if isinstance(scope, (*FUNCTIONS, *COMPREHENSIONS))
            for name in bound_names(scope)
        }
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        self._shared = own & local

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_ours = id(node) in self._meant or self.is_global(node.id)
        return ast.Name(f"{node.id}_", node.ctx) if is_ours and node.id in self._shared else node

    def visit(self, node: ast.AST) -> Any:
        is_top = isinstance(node, ast.FunctionDef) and not self._scopes
        visited = super().visit(node)
        if is_top and visited.name in self._shared:
            visited.name += "_"
        return visited
