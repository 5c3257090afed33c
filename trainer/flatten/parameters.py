"""Arguments that are the same at every call become constants, and arguments that nothing reads go.

Only functions of which every mention is a call that can be followed are changed: functions at the
top by name, methods whose name no other class and no attribute shares.
"""

from __future__ import annotations

import ast
import collections

from trainer.flatten.reach import parts_that_run
from trainer.flatten.scopes import arguments_of
from trainer.flatten.syntax import is_constant, is_pure

_CALLED_BY_TORCH = {"forward", "backward", "setup_context"}


def settled(tree: ast.Module) -> ast.Module:
    """One pass; repeat it with folding until nothing changes."""
    for function, skipped, calls in _followed(tree):
        _settle(function, skipped, calls)
    return tree


Followed = tuple[ast.FunctionDef, int, list[ast.Call]]
"""A function, the number of its first arguments that calls do not show, and all calls of it."""


def _followed(tree: ast.Module) -> list[Followed]:
    calls: dict[str, list[ast.Call]] = collections.defaultdict(list)
    mentions: collections.Counter[str] = collections.Counter()
    bases = {ast.unparse(b) for n in tree.body if isinstance(n, ast.ClassDef) for b in n.bases}
    for node in parts_that_run(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls[node.func.id].append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            calls[f".{node.func.attr}"].append(node)
        if isinstance(node, ast.Name):
            mentions[node.id] += 1
        elif isinstance(node, ast.arg):
            mentions[node.arg] += 1
        elif isinstance(node, ast.Attribute):
            mentions[f".{node.attr}"] += 1
    defined = collections.Counter(
        f".{member.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    )
    found: list[Followed] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not _is_odd(node):
            if mentions[node.name] == len(calls[node.name]):
                found.append((node, 0, calls[node.name]))
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not _is_odd(member):
                    key = f".{member.name}"
                    is_followed = mentions[key] == len(calls[key]) and defined[key] == 1
                    if is_followed and _only_ours(member.name):
                        found.append((member, 1, calls[key]))
            if mentions[node.name] == len(calls[node.name]) and node.name not in bases:
                found += _of_init(node, calls[node.name])
    return found


def _of_init(owner: ast.ClassDef, calls: list[ast.Call]) -> list[Followed]:
    init = next((m for m in owner.body if getattr(m, "name", "") == "__init__"), None)
    makes_itself = any(isinstance(n, ast.Name) and n.id == "cls" for n in ast.walk(owner))
    if not isinstance(init, ast.FunctionDef) or _is_odd(init) or makes_itself:
        return []
    return [(init, 1, calls)]


def _only_ours(name: str) -> bool:
    """Whether no object from elsewhere is likely to have a method of this name."""
    return name not in _CALLED_BY_TORCH and (name.startswith("_") or "_" in name)


def _is_odd(function: ast.FunctionDef) -> bool:
    kinds = {ast.unparse(item) for item in function.decorator_list}
    if kinds - {"torch.no_grad()", "contextmanager", "classmethod"}:
        return True
    args = function.args
    if function.name in _CALLED_BY_TORCH or args.vararg or args.kwarg or args.posonlyargs:
        return True
    return function.name.startswith("__") and function.name != "__init__"


def _settle(function: ast.FunctionDef, skipped: int, calls: list[ast.Call]) -> None:
    if not calls or any(_is_spread(call) for call in calls):
        return
    args = function.args
    defaults = dict(zip([a.arg for a in args.args][::-1], args.defaults[::-1], strict=False))
    keyword_pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    defaults |= {a.arg: default for a, default in keyword_pairs if default is not None}
    stored = _stored(function)
    for argument in [*args.args[skipped:], *args.kwonlyargs]:
        name = argument.arg
        given = [_given(call, function, name, skipped) or defaults.get(name) for call in calls]
        first = given[0]
        is_same = all(value is not None for value in given) and all(
            is_constant(value) and ast.dump(value) == ast.dump(first)  # type: ignore[arg-type]
            for value in given
        )
        if is_same and name not in stored:
            assert isinstance(first, ast.Constant)
            change = _Substitute(name, first)
            function.body = [change.visit(statement) for statement in function.body]
        if not _is_read(function, name) and all(is_pure(value) for value in given):
            _remove(function, name, skipped, calls)


def _is_spread(call: ast.Call) -> bool:
    return any(isinstance(value, ast.Starred) for value in call.args) or any(
        keyword.arg is None for keyword in call.keywords
    )


def _stored(function: ast.FunctionDef) -> set[str]:
    """Names that the body binds, in functions within it too."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif node is not function and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            names |= {argument.arg for argument in arguments_of(node)}
    return names


def _is_read(function: ast.FunctionDef, name: str) -> bool:
    nodes = (node for statement in function.body for node in ast.walk(statement))
    return any(isinstance(node, ast.Name) and node.id == name for node in nodes)


def _given(call: ast.Call, function: ast.FunctionDef, name: str, skipped: int) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    names = [argument.arg for argument in function.args.args][skipped:]
    place = names.index(name) if name in names else len(call.args)
    return call.args[place] if place < len(call.args) else None


def _remove(function: ast.FunctionDef, name: str, skipped: int, calls: list[ast.Call]) -> None:
    args = function.args
    names = [argument.arg for argument in args.args]
    if name in names:
        place = names.index(name)
        for call in calls:
            if place - skipped < len(call.args):
                del call.args[place - skipped]
        first_default = len(args.args) - len(args.defaults)
        if place >= first_default:
            del args.defaults[place - first_default]
        del args.args[place]
    else:
        place = [argument.arg for argument in args.kwonlyargs].index(name)
        del args.kwonlyargs[place], args.kw_defaults[place]
    for call in calls:
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]


class _Substitute(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.Constant) -> None:
        self._name, self._value = name, value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_read = node.id == self._name and isinstance(node.ctx, ast.Load)
        return ast.Constant(self._value.value) if is_read else node
