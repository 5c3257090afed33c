"""The same program in fewer bytes: no annotations, short names, one blank per level.

Printed from the syntax tree. f-strings become calls of `format` first, because versions of Python
print them differently.
"""

from __future__ import annotations

import ast
import builtins
import collections
import itertools
import keyword
import re
import string
from collections.abc import Iterator

from trainer.flatten.scopes import FUNCTIONS, arguments_of
from trainer.squeeze import tight


def shortened(tree: ast.Module) -> str:
    """The source."""
    tree = _Formatted().visit(_Brief().visit(_Stripped().visit(tree)))
    _rename_private_attributes(tree)
    _rename_globals(tree)
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    taken = _globals(tree)
    for function in _outermost_functions(tree):
        _rename_locals(function, taken, given)
    return tight(ast.unparse(ast.fix_missing_locations(tree)))


class _Stripped(ast.NodeTransformer):
    """Without annotations, but where a data class needs one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        for argument in arguments_of(node):
            argument.annotation = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        is_data = any("dataclass" in ast.unparse(item) for item in node.decorator_list)
        is_data |= any(ast.unparse(base) == "NamedTuple" for base in node.bases)
        body: list[ast.stmt] = []
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and is_data:
                statement.annotation = ast.Name("int", ast.Load())
                body.append(statement)
            elif (visited := self.visit(statement)) is not None:
                body.append(visited)
        node.body = body or [ast.Pass()]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else ast.Assign([node.target], node.value)


class _Brief(ast.NodeTransformer):
    """Errors say what they are about and leave what is wrong with it to their place in the code:
    the readable copy has the sentence."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call) and len(node.exc.args) == 1 and not node.exc.keywords:
            node.exc.args = [_subject(node.exc.args[0])]
        return node


def _subject(message: ast.expr) -> ast.expr:
    """The first thing that a message names, or its first words."""
    if isinstance(message, ast.JoinedStr):
        values = [part.value for part in message.values if isinstance(part, ast.FormattedValue)]
        return values[0]
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return ast.Constant(message.value.split(":")[0][:20])
    return message


class _Formatted(ast.NodeTransformer):
    """f"{a!r} {b:,}" -> "{!r} {:,}".format(a, b)."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        values: list[ast.expr] = []
        text = self._template(node, values)
        function = ast.Attribute(ast.Constant(text), "format", ast.Load())
        return ast.Call(function, values, [])

    def _template(self, node: ast.JoinedStr, values: list[ast.expr]) -> str:
        text = ""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                values.append(self.visit(part.value))
                conversion = "" if part.conversion == -1 else "!" + chr(part.conversion)
                spec = ""
                if isinstance(part.format_spec, ast.JoinedStr):
                    spec = ":" + self._template(part.format_spec, values)
                text += "{" + conversion + spec + "}"
            else:
                assert isinstance(part, ast.Constant)
                text += str(part.value).replace("{", "{{").replace("}", "}}")
        return text


def _short_names(taken: set[str]) -> Iterator[str]:
    letters = string.ascii_letters
    two = map("".join, itertools.product(letters, letters + string.digits))
    for name in itertools.chain(letters, two):
        if name not in taken and not keyword.iskeyword(name):
            yield name


def _globals(tree: ast.Module) -> set[str]:
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    defined: set[str] = set(dir(builtins))
    for statement in tree.body:
        name = getattr(statement, "name", None)
        defined |= {name} if isinstance(name, str) else set()
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            aliases = statement.names
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        else:
            defined |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
                and not isinstance(statement, (ast.ClassDef, ast.FunctionDef))
            }
    return defined | (names & defined)


def _used_strings(tree: ast.Module) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _rename_globals(tree: ast.Module) -> None:
    """Functions, classes and constants of the program."""
    own: list[str] = []
    for statement in tree.body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            own.append(statement.name)
        elif isinstance(statement, ast.Assign):
            own += [t.id for t in statement.targets if isinstance(t, ast.Name)]
    everywhere = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    local = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
        for argument in arguments_of(node)
    }
    stored = collections.Counter(
        node.id
        for statement in tree.body
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    )
    methods = {
        member.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    }
    fixed = local | set(stored) | _used_strings(tree) | methods
    own = [name for name in dict.fromkeys(own) if name not in fixed]
    taken = everywhere | local | set(dir(builtins)) | set(own) | _globals(tree)
    letters = string.ascii_uppercase
    short = map("".join, itertools.product(letters, letters + string.ascii_lowercase))
    free = (name for name in short if name not in taken)
    new = dict(zip(own, free, strict=False))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node in tree.body:
            node.name = new.get(node.name, node.name)


def _rename_private_attributes(tree: ast.Module) -> None:
    """Attributes and methods that begin with an underscore, or end with a legend of axes, and that
    the program defines."""
    defined: collections.Counter[str] = collections.Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    defined[member.name] += 1
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    defined[member.target.id] += 1
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if isinstance(node.ctx, ast.Store) and of_self:
                defined[node.attr] += 1
    strings = _used_strings(tree)
    own = [name for name in defined if (re.fullmatch(r"_[a-z]\w*", name)) and name not in strings]
    new = {name: f"_{short}" for name, short in zip(own, _short_names(set()), strict=False)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            node.attr = new.get(node.attr, node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            node.arg = new.get(node.arg, node.arg)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    member.name = new.get(member.name, member.name)
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    member.target.id = new.get(member.target.id, member.target.id)


def _outermost_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
        else:
            yield from _outermost_functions(child)


def _rename_locals(function: ast.AST, taken: set[str], given: set[str]) -> None:
    """All names that a function and those within it bind, but arguments that are given by name
    somewhere."""
    bound: dict[str, None] = {}
    fixed: set[str] = set(taken)
    for node in ast.walk(function):
        if isinstance(node, FUNCTIONS):
            for argument in arguments_of(node):
                bound[argument.arg] = None
            is_exact = isinstance(node, ast.FunctionDef) and node.name.startswith("__torch")
            fixed |= {argument.arg for argument in arguments_of(node)} if is_exact else set()
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] = None
        elif isinstance(node, (ast.ExceptHandler, ast.FunctionDef)) and node is not function:
            bound |= {node.name: None} if node.name else {}
    mentioned = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    named = given & {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    own = [name for name in bound if name not in fixed and name not in named]
    free = _short_names((mentioned - set(own)) | taken | named)
    new = dict(zip(own, free, strict=False))
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = new.get(node.arg, node.arg)
        elif isinstance(node, (ast.ExceptHandler, ast.FunctionDef)) and node is not function:
            node.name = new.get(node.name or "", node.name or "") or None
