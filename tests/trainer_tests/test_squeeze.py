"""Shortened code does what the code does: same bytecode, same run, same bytes everywhere. CPU."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer_tests.small_recipes import SMALL
from tests.trainer_tests.test_code import REPOSITORY
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer.code import PACKED_FILE, counted_modules, packed_modules, stripped, unpacked_code
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.recipes import RECIPES
from trainer.report import NullReporter, TrainResult
from trainer.squeeze import squeezed

AWKWARD = '''
from __future__ import annotations
from typing import Any, Protocol, TypeVar, overload
from collections.abc import Callable, Iterator
from torch import Tensor, nn
T = TypeVar("T")
total: int = 3
class Kept:
    field: Any = 4
    other: dict[str, "Callable"]
    def method(self, value: Tensor, *rest: int, named: str = "a  b", **more: Any) -> Iterator[T]:
        total: list[int] = [value]
        self.mine: int = len(total)
        longer, (nested, *stars) = 1, (2, 3)
        for index in range(3): longer += index
        shown = f"{longer!r:>{nested}} {{x}}  {'a' 'b'}"
        def inner(captured: int) -> int:
            nonlocal nested
            nested = captured; deeper = nested + longer
            return deeper if captured else -deeper
        pairs = {key: item for key, item in zip("ab", stars)}
        try:
            pass
        except ValueError as problem:
            fault = problem
        with open("x") as file, open("y") as (first):
            walrus = [seen for seen in "ab" if (again := seen)]
        found = (lambda found, other=index: found + other)(index)
        return longer if 1 .real else 0x1F and not - -longer
    @some.decorator
    def watched(self, value: int) -> int:
        local = value; return local
    @property
    def plain(self) -> int:
        return max(one for one in [len] if one is not None)
def uses_globals(x: int) -> int:
    global total
    total = x; len_ = 3; here = locals()
    return total
def makes_a_class() -> type:
    width = 3
    class Local:
        width = 4
        other = width
    return Local
async def later() -> None:
    text = """a
    b  c"""
    return text
'''


class _Unannotated(ast.NodeTransformer):
    """The reference: annotations of functions and variables taken out of the syntax tree."""

    def __init__(self) -> None:
        self.in_class = [False]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.in_class.append(True)
        self.generic_visit(node)
        self.in_class.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.in_class.append(False)
        self.generic_visit(node)
        self.in_class.pop()
        known = ("property", "cache", "contextmanager", "method", "lru_cache", "setter", "no_grad")
        decorators = [ast.unparse(each).split("(")[0] for each in node.decorator_list]
        if all(name.endswith(known) for name in decorators):
            node.returns = None
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in [*every, node.args.vararg, node.args.kwarg]:
                if argument is not None:
                    argument.annotation = None
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if self.in_class[-1] or node.value is None:
            return node
        return ast.Assign(targets=[node.target], value=node.value, lineno=node.lineno)


def _functions(code: types.CodeType, path: str = "") -> Iterator[tuple[str, types.CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            name = f"{path}.{constant.co_name}"
            yield name, constant
            yield from _functions(constant, name)


def _assert_same_bytecode(source: str) -> int:
    """Of every function whose variables no other function sees; returns their number."""
    tree = ast.fix_missing_locations(_Unannotated().visit(ast.parse(source)))
    reference = ast.unparse(tree)
    ours = list(_functions(compile(squeezed(source), "m", "exec")))
    theirs = list(_functions(compile(reference, "m", "exec")))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.co_varnames[: one.co_argcount] == other.co_varnames[: other.co_argcount]
        assert one.co_names == other.co_names, name
        if not (one.co_cellvars or one.co_freevars):
            assert one.co_code == other.co_code, name
            assert len(one.co_varnames) == len(other.co_varnames), name
    return len(ours)


def test_awkward_code_keeps_its_meaning() -> None:
    assert _assert_same_bytecode(AWKWARD) > 8
    short = squeezed(AWKWARD)
    assert "from typing import Any,TypeVar\n" in short and "Iterator" not in short
    assert "field:Any=4" in short and 'other:dict[str,"Callable"]' in short
    assert "def watched(self,value:int)->int" in short
    assert "f\"{longer!r:>{nested}} {{x}}  {'a' 'b'}\"" in short
    assert 'named="a  b"' in short and '"""a\n    b  c"""' in short
    assert "here=locals()" in short and "total=x" in short
    assert "def inner(captured)" in short and "problem" in short
    assert "deeper" not in short and "walrus" not in short and "stars" not in short


@pytest.mark.parametrize("module", counted_modules())
def test_every_counted_module_keeps_its_meaning(module: str) -> None:
    path = REPOSITORY.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = stripped(file.read_text())
    _assert_same_bytecode(source)
    assert len(squeezed(source)) <= len(source)


def test_modules_whose_annotations_are_read_keep_them_and_their_names() -> None:
    source = "import triton\ndef kernel(x, N: int):\n    block = x\n    return block\n"
    assert squeezed(source) == "import triton\ndef kernel(x,N:int):\n block=x\n return block\n"


OTHERS = [
    found
    for minor in (11, 12, 13, 14)
    if (found := shutil.which(f"python3.{minor}"))
    and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0
]


@pytest.mark.parametrize("python", OTHERS, ids=os.path.basename)
def test_other_versions_of_python_give_the_same_bytes(python: str) -> None:
    program = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from trainer.squeeze import squeezed\n"
        "print(hashlib.sha256(squeezed(sys.stdin.read()).encode()).hexdigest())"
    )
    texts = [AWKWARD, stripped((REPOSITORY / "trainer" / "artifact.py").read_text())]
    for text in texts:
        digests = {
            subprocess.run(
                [executable, "-c", program, str(REPOSITORY)],
                input=text, capture_output=True, text=True, check=True,
            ).stdout
            for executable in (sys.executable, python)
        }  # fmt: skip
        assert len(digests) == 1


TRAIN = """
import sys
from pathlib import Path
from trainer.config import TrainConfig
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.recipes import RECIPES
from trainer.report import NullReporter
config = TrainConfig.model_validate_json(Path(sys.argv[1], "config.json").read_text())
result = train(config, NullReporter(), Path(sys.argv[1]))
Path(sys.argv[1], "result.json").write_text(result.model_dump_json())
"""


MORE: dict[str, object] = {
    "quantize.method": "gptq",
    "quantize.calibration_tokens": 512,
    "quantize.clip": "sigma",
    "quantize.low_rank": "asymmetric",
    "compress.grouping": "role",
    "average.kind": "ema",
    "quantize.keep_float_max_numel": 100,
}


PR1212 = SMALL["pr1212"] | {"data.loader": "sequential"}
"""The data is too small for the order of rows that it has."""


@pytest.mark.parametrize("name", ["tiny", "more", *SMALL])
def test_a_training_from_the_packed_code_gives_the_same_artifact(
    name: str,
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of each recipe, without the modules that it does not need."""
    settings = {"tiny": {}, "more": MORE} | SMALL | {"pr1212": PR1212}
    plain_config = configure()
    config = (
        RECIPES[name if name in SMALL else "tiny"]
        .build()
        .with_overrides(
            {
                **plain_config.difference(RECIPES["tiny"].build()),
                "evaluate.batch_tokens": 768,
                **settings[name],
                "model.vocab_size": plain_config.model.vocab_size,
                "budget.max_steps": 3,
                "runtime.prime_steps": 0,
            }
        )
    )
    code = packed_modules(config)
    alone = tmp_path / "alone"
    for path, source in unpacked_code(code).items():
        (alone / path).parent.mkdir(parents=True, exist_ok=True)
        (alone / path).write_text(source)
    (alone / PACKED_FILE).write_bytes(code)
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(config.model_dump_json())
    run = subprocess.run(
        [sys.executable, "-c", TRAIN, str(out)],
        env=os.environ | {"PYTHONPATH": str(alone), "OMP_NUM_THREADS": "1"},
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    packed = TrainResult.model_validate_json((out / "result.json").read_text())
    torch.set_num_threads(1)
    plain = train(config, NullReporter(), tmp_path / "plain")
    assert packed.artifact_sha256 == plain.artifact_sha256
    assert (packed.val_bpb, packed.bytes_code) == (plain.val_bpb, len(code))
    assert len(code) < len(packed_modules())
