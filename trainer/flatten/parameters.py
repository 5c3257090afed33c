"""Arguments that are the same at every call become constants, and arguments that nothing reads go.

Only functions of which every mention is a call that can be followed are changed: functions at the
top by name, methods whose name no other class and no attribute shares.
"""

from __future__ import annotations

import ast
import collections
import copy

from trainer.flatten.infer import Env, Types, kinships, typed_parts
from trainer.flatten.reach import parts_that_run, tested_classes
from trainer.flatten.scopes import arguments_of
from trainer.flatten.syntax import is_pure, is_settled

_CALLED_BY_TORCH = {"forward", "backward", "setup_context"}


def settled(tree: ast.Module) -> ast.Module:
    """One pass; repeat it with folding until nothing changes."""
    for function, skipped, calls in _followed(tree):
        _settle(function, skipped, calls)
    _settle_options(tree)
    _settle_defaults(tree)
    return tree


def _settle_defaults(tree: ast.Module) -> None:
    """Arguments of methods that no call of a method of that name gives, whatever the object."""
    calls: dict[str, list[ast.Call]] = collections.defaultdict(list)
    mentions: collections.Counter[str] = collections.Counter()
    for node in parts_that_run(tree):
        if isinstance(node, ast.Attribute):
            mentions[node.attr] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            calls[node.func.attr].append(node)
    for owner in tree.body:
        for method in owner.body if isinstance(owner, ast.ClassDef) else ():
            if not isinstance(method, ast.FunctionDef) or method.name.startswith("__"):
                continue
            own = calls[method.name]
            is_followed = len(own) == mentions[method.name] and not any(map(_is_spread, own))
            if is_followed and not _is_odd(method):
                _settle_default(method, own)


def _settle_default(method: ast.FunctionDef, calls: list[ast.Call]) -> None:
    args, first = method.args.args, len(method.args.args) - len(method.args.defaults)
    for place in range(len(args) - 1, max(first, 1) - 1, -1):
        name, default = args[place].arg, method.args.defaults[place - first]
        given = [value for call in calls if (value := _given(call, method, name, 1)) is not None]
        if not is_settled(default) or name in _stored(method):
            continue
        if all(ast.dump(value) == ast.dump(default) for value in given):
            change = _Substitute(name, default)
            method.body = [change.visit(statement) for statement in method.body]
            if not given:
                del args[place], method.args.defaults[place - first]


def _settle_options(tree: ast.Module) -> None:
    """Arguments by keyword alone that no call gives, but for functions that pass on their own."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    taking = [function for function in functions if function.args.kwonlyargs]
    defaults: dict[str, set[str]] = collections.defaultdict(set)
    for function in taking:
        pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        for argument, default in pairs:
            is_fixed = is_settled(default) and default is not None
            defaults[argument.arg].add(ast.dump(default) if is_fixed and default else "")
    given = _given_options(tree, taking, set(defaults))
    for name, values in defaults.items():
        if len(values) == 1 and "" not in values and name not in given:
            for function in taking:
                _remove_option(function, name)
            needing = {
                function.name
                for function in functions
                if name in {argument.arg for argument in function.args.args}
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and not _calls_one_of(node, needing):
                    node.keywords = [keyword for keyword in node.keywords if keyword.arg != name]


def _calls_one_of(call: ast.Call, names: set[str]) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in names


def _given_options(tree: ast.Module, taking: list[ast.FunctionDef], names: set[str]) -> set[str]:
    """Names that some call gives as a keyword, and names that functions take in another way."""
    passed = {
        id(keyword)
        for function in taking
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Name)
        and keyword.value.id == keyword.arg
        and keyword.arg in {argument.arg for argument in function.args.kwonlyargs}
    }
    given = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in names and id(node) not in passed:
            given.add(node.arg)
    return given


def _remove_option(function: ast.FunctionDef, name: str) -> None:
    args = function.args
    places = [place for place, argument in enumerate(args.kwonlyargs) if argument.arg == name]
    for place in places:
        default = args.kw_defaults[place]
        if default is not None and name not in _stored(function):
            change = _Substitute(name, default)
            function.body = [change.visit(statement) for statement in function.body]
        del args.kwonlyargs[place], args.kw_defaults[place]


Followed = tuple[ast.FunctionDef, int, list[ast.Call]]
"""A function, the number of its first arguments that calls do not show, and all calls of it."""


def _followed(tree: ast.Module) -> list[Followed]:
    uses = _Uses(tree)
    bases = {ast.unparse(b) for n in tree.body if isinstance(n, ast.ClassDef) for b in n.bases}
    found: list[Followed] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not _is_odd(node):
            if uses.mentions[node.name] == len(uses.calls[node.name]):
                found.append((node, 0, uses.calls[node.name]))
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not _is_odd(member):
                    calls = uses.of_method(node.name, member.name)
                    found += [] if calls is None else [(member, 1, calls)]
            if uses.mentions[node.name] == len(uses.calls[node.name]) and node.name not in bases:
                found += _of_init(node, uses.calls[node.name])
    return found


class _Uses:
    """Where the names of a program are mentioned, and called."""

    def __init__(self, tree: ast.Module) -> None:
        self.calls: dict[str, list[ast.Call]] = collections.defaultdict(list)
        """Of functions and classes by name, of methods by ".name" and "class.name"."""
        self.mentions: collections.Counter[str] = collections.Counter()
        self._types = Types(tree)
        self._kin = kinships(self._types.classes)
        self._defined = {
            (node.name, member.name)
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            for member in node.body
            if isinstance(member, ast.FunctionDef)
        }
        for node, env in typed_parts(tree, self._types):
            self._take(node, env)

    def _take(self, node: ast.AST, env: Env) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            self.calls[node.func.id].append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            self.calls[self._key(node.func, env)].append(node)
        if isinstance(node, ast.Name):
            self.mentions[node.id] += 1
        elif isinstance(node, ast.arg):
            self.mentions[node.arg] += 1
        elif isinstance(node, ast.Attribute):
            self.mentions[self._key(node, env)] += 1
            if isinstance(node.value, ast.Name) and node.value.id in self._kin:
                self.mentions[node.value.id] -= 1  # a class method
        self.mentions.subtract(tested_classes(node))

    def _key(self, node: ast.Attribute, env: Env) -> str:
        owner = self._types.of(node.value, env)
        if owner is None and isinstance(node.value, ast.Name) and node.value.id in self._kin:
            owner = node.value.id
        return f"{owner or ''}.{node.attr}"

    def of_method(self, owner: str, name: str) -> list[ast.Call] | None:
        """All calls of a method; None when some cannot be told."""
        kin = self._kin.get(owner, {owner})
        if any((one, name) in self._defined for one in kin - {owner}):
            return None
        keys = [f"{one}.{name}" for one in kin]
        if self.mentions[f".{name}"]:  # of objects that may be of any class
            others = {one for one, method in self._defined if method == name} - {owner}
            if others or not _only_ours(name):
                return None
            keys.append(f".{name}")
        calls = [call for key in keys for call in self.calls[key]]
        return calls if sum(self.mentions[key] for key in keys) == len(calls) else None


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
            is_settled(value) and ast.dump(value) == ast.dump(first)  # type: ignore[arg-type]
            for value in given
        )
        if is_same and name not in stored:
            assert first is not None
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
    def __init__(self, name: str, value: ast.expr) -> None:
        self._name, self._value = name, value

    def visit_Name(self, node: ast.Name) -> ast.AST:
        is_read = node.id == self._name and isinstance(node.ctx, ast.Load)
        return copy.deepcopy(self._value) if is_read else node
