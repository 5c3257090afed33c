"""What flattening takes away from small programs, and what it must leave. Without torch."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
import types

import pytest

from trainer.flatten.fold import Facts, folded
from trainer.flatten.objects import named_classes, without_unread_fields
from trainer.flatten.pack import in_source
from trainer.flatten.parameters import settled
from trainer.flatten.program import script
from trainer.flatten.reach import reachable
from trainer.flatten.shorten import shortened
from trainer.recipes import RECIPES

HEAD = "from dataclasses import dataclass, replace\nfrom typing import NamedTuple\n"
NOTHING = Facts({}, {}, {}, {}, {}, {})


def flattened(source: str) -> ast.Module:
    """As program.flattened does, without a configuration."""
    tree = named_classes(ast.parse(HEAD + source))
    for _ in range(8):
        tree = reachable(without_unread_fields(settled(folded(tree, NOTHING))))
    return ast.fix_missing_locations(tree)


def printed(source: str) -> str:
    shown, module = io.StringIO(), types.ModuleType("program")
    sys.modules["program"] = module  # data classes look for the module that they are in
    module.__dict__["__name__"] = "program"
    with contextlib.redirect_stdout(shown):
        exec(compile(source, "program", "exec"), module.__dict__)
    return shown.getvalue()


PROGRAMS = {
    "an attribute that stays None": (
        """
@dataclass
class Run:
    steps: int
    saved: object = None
    @classmethod
    def build(cls, steps: int): return cls(steps)
    def go(self):
        if self.saved is not None:
            print("gone")
        return self.steps
print(Run.build(3).go())
""",
        ["saved", "gone"],
    ),
    "a method that only another class's objects are asked for": (
        """
class One:
    def state_of(self): return "gone"
    def name_of(self): return "one"
class Two:
    def state_of(self): return "two"
def show(one: One, two: Two): print(one.name_of(), two.state_of())
show(One(), Two())
""",
        ["gone"],
    ),
    "a class that is only tested for": (
        """
class Never:
    def gone(self): return 1
def show(x):
    if isinstance(x, Never): print("gone")
    print(x)
for x in (1, 2): show(x)
""",
        ["Never", "gone"],
    ),
    "an option that only passes itself on": (
        """
def inner(x, *, mask=None): return x if mask is None else "gone"
def outer(x, *, mask=None): return inner(x, mask=mask)
for f in (inner, outer): print(f(4))
""",
        ["mask", "gone"],
    ),
    "an empty dictionary that nothing fills": (
        """
def go(names):
    extra = {}
    for name in sorted(extra, key=lambda one: extra[one]): print("gone", name)
    for name in names: print(name, extra.get(name, 0))
for names in ("ab", "cd"): go(names)
""",
        ["gone", "extra"],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_nothing_uses_is_gone_and_the_rest_prints_the_same(name: str) -> None:
    source, gone = PROGRAMS[name]
    tree = flattened(source)
    text = ast.unparse(tree)
    assert [word for word in gone if word in text] == []
    assert printed(text) == printed(HEAD + source)
    assert printed(shortened(tree)) == printed(HEAD + source)


KEPT = {
    "an attribute that is set from outside": """
class Box:
    def __init__(self): self.is_full = False
def fill(box): box.is_full = True
box = Box()
fill(box)
if box.is_full: print("full")
""",
    "a field that a copy changes": """
@dataclass(frozen=True)
class Grid:
    top: int
    num_rows: int = 0
for grid in (Grid(1), replace(Grid(2), num_rows=3)):
    if grid.num_rows: print(grid.top, grid.num_rows)
""",
    "a method that a class below has": """
class Base:
    def size_of(self): return 0
class Large(Base):
    def size_of(self): return 9
def show(one: Base): print(one.size_of())
show(Large())
""",
    "a named tuple that is unpacked": """
class Place(NamedTuple):
    layer: int
    visit_at: int
for layer, visit in (Place(1, 2), Place(3, 4)): print(layer)
""",
    "an attribute of one name in two classes": """
class One:
    def __init__(self): self.lane_of = None
class Two:
    def __init__(self): self.lane_of = [1]
for x in (One(), Two()):
    if x.lane_of is not None: print(x.lane_of)
""",
    "an option that one call gives": """
def inner(x, *, mask=None): return x if mask is None else mask
def outer(x, *, mask=None): return inner(x, mask=mask)
print(outer(1), outer(1, mask=2))
""",
    "a dictionary that is filled in a loop": """
def go(names):
    seen = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return seen
for names in ("aab", "c"): print(go(names))
""",
    "a function whose name is a local elsewhere": """
def place(x, far=False): return x if far else -x
def other(place): return place + 1
print(place(1, True), place(2), other(3))
""",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_something_uses_stays(name: str) -> None:
    tree = flattened(KEPT[name])
    expected = printed(HEAD + KEPT[name])
    assert expected
    assert printed(ast.unparse(tree)) == expected
    assert printed(shortened(tree)) == expected


@pytest.mark.parametrize("content", [b"\x000", b"\x00", b"\x009\x00x", b"'''", bytes(range(256))])
def test_every_byte_survives_in_a_source(content: bytes) -> None:
    """Zeros before digits, quotes, backslashes and carriage returns among them."""
    found: dict[str, bytes] = {}
    exec(compile(in_source(b"found=", content, b""), "packed", "exec"), found)
    assert found["found"] == content


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pr1212", "pr1894"])
def test_the_published_recipes_pack_into_25_000_bytes(name):
    assert len(script(RECIPES[name].build())) <= 25_000
