"""Which names a scope of Python binds, and a walk over a syntax tree that knows them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def arguments_of(function: Function) -> list[ast.arg]:
    """All of them, in the order of the source."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return named + [arg for arg in (args.vararg, args.kwarg) if arg is not None]


def bound_names(scope: ast.AST) -> set[str]:
    """Names that a module, class, function or comprehension binds itself."""
    names: set[str] = set()
    elsewhere: set[str] = set()
    if isinstance(scope, FUNCTIONS):
        names |= {argument.arg for argument in arguments_of(scope)}
    for node in _inside(scope):
        names |= set(_bound_by(node))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere |= set(node.names)
    return names - elsewhere


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run in a scope, scopes within it left out; a walrus of a comprehension binds
    outside of it."""
    if isinstance(scope, COMPREHENSIONS):
        waiting: list[ast.AST] = [generator.target for generator in scope.generators]
    else:
        body = getattr(scope, "body", [])
        waiting = list(body) if isinstance(body, list) else [body]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, COMPREHENSIONS):
            yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            continue
        waiting += ast.iter_child_nodes(node)


def _bound_by(node: ast.AST) -> Iterable[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        return [node.name]
    return []


class ScopedTransformer(ast.NodeTransformer):
    """Visits a module; `is_global(name)` says what a name means at the node being visited."""

    def __init__(self) -> None:
        self._scopes: list[tuple[bool, set[str]]] = []
        """(whether inner scopes see it, its names), outermost first, without the module's."""

    def is_global(self, name: str) -> bool:
        """Whether the name is the module's here."""
        visible = [names for is_seen, names in self._scopes[:-1] if is_seen]
        visible += [names for _, names in self._scopes[-1:]]
        return not any(name in names for names in visible)

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, FUNCTIONS):
            return self._visit_function(node)
        if isinstance(node, COMPREHENSIONS):
            return self._visit_comprehension(node)
        if isinstance(node, ast.ClassDef):
            for field in ("decorator_list", "bases", "keywords"):
                setattr(node, field, [self.visit(child) for child in getattr(node, field)])
            self._within(False, node, ["body"])
            return self.visited_class(node)
        return super().visit(node)

    def visited_class(self, node: ast.ClassDef) -> ast.AST:
        """Called when the inside of a class has been visited."""
        return node

    def visited_comprehension(self, node: Comprehension) -> ast.AST:
        """Called when a comprehension has been visited."""
        return node

    def visited_function(self, node: Function) -> ast.AST:
        """Called when the inside of a function has been visited."""
        return node

    def _visit_function(self, node: Function) -> ast.AST:
        node.args.defaults = [self.visit(value) for value in node.args.defaults]
        node.args.kw_defaults = [value and self.visit(value) for value in node.args.kw_defaults]
        for argument in arguments_of(node):
            argument.annotation = argument.annotation and self.visit(argument.annotation)
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(item) for item in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        self._within(True, node, ["body"])
        return self.visited_function(node)

    def _visit_comprehension(self, node: Comprehension) -> ast.AST:
        first = node.generators[0]
        first.iter = self.visit(first.iter)
        kept, first.iter = first.iter, ast.Constant(None)
        fields = ["generators", "key", "value", "elt"]
        self._within(True, node, [field for field in fields if hasattr(node, field)])
        first.iter = kept
        return self.visited_comprehension(node)

    def _within(self, is_seen: bool, scope: ast.AST, fields: list[str]) -> None:
        self._scopes.append((is_seen, bound_names(scope)))
        for field in fields:
            setattr(scope, field, self._visited(getattr(scope, field)))
        self._scopes.pop()

    def _visited(self, value: Any) -> Any:
        if not isinstance(value, list):
            return self.visit(value)
        kept: list[Any] = []
        for node in value:
            visited = self.visit(node)
            kept += visited if isinstance(visited, list) else [visited] if visited else []
        return kept
