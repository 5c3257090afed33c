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
import string
from collections.abc import Iterator, Mapping

from trainer.flatten.objects import is_data
from trainer.flatten.scopes import FUNCTIONS, arguments_of
from trainer.squeeze import tight


def shortened(tree: ast.Module) -> str:
    """The source."""
    tree = _Formatted().visit(_Brief().visit(_Stripped().visit(tree)))
    _rename_attributes(tree)
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


def _rename_attributes(tree: ast.Module) -> None:
    """Attributes, fields and methods that only the program has: names in several words that its
    classes define. Attributes of torch's modules stay, because the artifact has their names, and
    so do names that strings or keywords of other functions mention."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    defined: set[str] = set()
    of_modules: set[str] = set()
    for owner in classes.values():
        is_module = _is_module(owner, classes)
        for node in ast.walk(owner):
            if name := _own_attribute(node):
                (of_modules if is_module else defined).add(name)
        defined |= set(_members(owner))
    uses = collections.Counter(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    fixed = of_modules | _used_strings(tree) | _foreign_keywords(tree, classes) | _OF_TORCH
    own = [name for name in defined - fixed if "_" in name and not name.endswith("__")]
    own.sort(key=lambda name: (-uses[name], name))
    taken = (set(uses) | defined) - set(own) | {"T", "H", "mT"}
    new = dict(zip(own, _short_names(taken), strict=False))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            node.attr = new.get(node.attr, node.attr)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords if _fills_fields(node, classes) else ():
                keyword.arg = keyword.arg and new.get(keyword.arg, keyword.arg)
    for owner in classes.values():
        for member in owner.body:
            if isinstance(member, ast.FunctionDef):
                member.name = new.get(member.name, member.name)
            elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                member.target.id = new.get(member.target.id, member.target.id)
            elif isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
                member.targets[0].id = new.get(member.targets[0].id, member.targets[0].id)


_OF_TORCH = {
    *(
        "vocab_size",
        "bos_id",
        "state_dict",
        "load_state_dict",
        "zero_grad",
        "param_groups",
        "setup_context",
    ),
    *("all_reduce", "all_gather", "reduce_scatter", "model_copy", "model_dump", "wait_event"),
    *("named_parameters", "register_buffer", "record_event", "is_cuda", "new_empty", "_replace"),
}
"""Names in several words that objects from elsewhere have too."""


def _is_module(owner: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> bool:
    bases = [base for base in owner.bases if isinstance(base, ast.Name) and base.id in classes]
    is_nn = any("Module" in ast.unparse(base) for base in owner.bases)
    return is_nn or any(_is_module(classes[base.id], classes) for base in bases)


def _own_attribute(node: ast.AST) -> str:
    """X where it is `self.X`, being stored."""
    is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    holder = node.value if is_stored else None  # type: ignore[attr-defined]
    is_own = isinstance(holder, ast.Name) and holder.id == "self"
    return node.attr if is_own else ""  # type: ignore[attr-defined]


def _members(owner: ast.ClassDef) -> Iterator[str]:
    for member in owner.body:
        if isinstance(member, ast.FunctionDef):
            yield member.name
        elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id


def _fills_fields(call: ast.Call, classes: Mapping[str, ast.ClassDef]) -> bool:
    """Whether keywords of a call are fields of a data class."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr == "_replace"
    if not isinstance(function, ast.Name):
        return False
    owner = classes.get(function.id)
    return function.id == "replace" or (owner is not None and is_data(owner))


def _foreign_keywords(tree: ast.Module, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    """Names that calls give as keywords to anything but data classes."""
    return {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and not _fills_fields(node, classes)
        for keyword in node.keywords
        if keyword.arg
    }


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
