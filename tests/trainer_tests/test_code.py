"""The counted code: complete, stripped without a change of meaning, always the same. CPU."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.code import counted_modules, packed_code, stripped, unpacked_code
from trainer.config import TrainConfig
from trainer.errors import ArtifactError

REPOSITORY = Path(__file__).parents[2]


class _WithoutStrings(ast.NodeTransformer):
    """The reference: the syntax tree without statements that are a string."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if isinstance(block, list) and block:
                kept = [statement for statement in block if not _is_string(statement)]
                setattr(node, part, kept or ([] if isinstance(node, ast.Module) else [ast.Pass()]))
        return node


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _same_meaning(source: str) -> bool:
    expected = _WithoutStrings().visit(ast.parse(source))
    return ast.dump(ast.parse(stripped(source))) == ast.dump(expected)


AWKWARD = '''#!/usr/bin/env python
# comment
"""Module."""
from __future__ import annotations

import os  # why


class Empty(Exception):
    """Only this."""


class Two:
    """One."""

    """Two."""


class Fields:
    first: int = 1
    """About first."""
    second: str = "# no comment"  # a comment

    def only(self) -> None:
        """Doc."""
        # and a comment


def sums(
    a: int,  # first
    # a line between

    b: str = """a
    # kept
  text""",
) -> list[int]:
    r"""Raw doc
    with rows."""

    def inner() -> str:
        """Inner doc."""
        return f"{a!r:>{10}} # not a comment {{literal}} {b}"

    total = a + \\
        2 if inner() else (
            3
        )
    if total:
        "dropped"
    else:
        "dropped"
        total = {"a": [1,
                       2]}["a"][0]
    text = (
        "one"  # why one
        f"two {total}"
    )
    assert text; return [total]
    "unreached"


f"{os.sep}"
x = 1
"last"'''


def test_stripping_an_awkward_file_keeps_its_meaning() -> None:
    assert _same_meaning(AWKWARD)
    result = stripped(AWKWARD)
    for gone in ("comment\n", "Module.", "About first", "# why", "a line between", "Inner doc"):
        assert gone not in result.replace("# no comment", "").replace("# not a comment", "")
    for kept in ("# no comment", "# kept\n  text", "# not a comment {{literal}}", 'f"{os.sep}"'):
        assert kept in result


@pytest.mark.parametrize("source", ["", "\n\n", "# only\n", '"""Only."""', "x = 1", "\n\nx=1 #c"])
def test_stripping_a_short_file_keeps_its_meaning(source: str) -> None:
    assert _same_meaning(source)


def test_stripping_twice_changes_nothing_more() -> None:
    assert stripped(stripped(AWKWARD)) == stripped(AWKWARD)


@pytest.mark.parametrize("package", ["trainer", "service", "search_spaces"])
def test_stripping_any_file_of_ours_keeps_its_meaning(package: str) -> None:
    for path in (REPOSITORY / package).rglob("*.py"):
        assert _same_meaning(path.read_text()), path


def test_the_counted_modules_are_what_a_run_needs_and_nothing_else() -> None:
    modules = counted_modules()
    for needed in (
        "trainer.loop",
        "trainer.artifact",
        "trainer.code",
        "trainer.config",
        "trainer.quantize.per_row",
        "trainer.compress.codecs",
        "trainer.model.gpt",
        "trainer.optim.muon",
        "trainer.evaluate.bits_per_byte",
    ):
        assert needed in modules
    for module in modules:
        assert not module.startswith(("trainer.recipes", "trainer.__main__")), module
        assert module not in (
            "trainer.data.prepare",
            "trainer.data.demo_corpus",
            "trainer.data.fetch",
        )


def test_the_packed_code_is_small_deterministic_and_made_without_torch() -> None:
    program = (
        "import sys, hashlib; from trainer.code import packed_code\n"
        "print(hashlib.sha256(packed_code()).hexdigest(), 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert runs == {f"{hashlib.sha256(packed_code()).hexdigest()} False\n"}
    text = sum(len(source) for source in unpacked_code(packed_code()).values())
    assert len(packed_code()) < text / 2
    assert len(packed_code()) < 100_000


def test_the_unpacked_code_imports_by_itself(tmp_path: Path) -> None:
    for name, source in unpacked_code(packed_code()).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    program = (
        "import sys; import trainer.loop; from trainer.config import TrainConfig\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'trainer']\n"
        "assert all(f.startswith(sys.argv[1]) for f in files), files\n"
        "print(len(files), TrainConfig().digest())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # What is written in Triton is imported at the first call on a GPU; it counts all the same.
    at_once = [name for name in counted_modules() if not name.endswith("_triton")]
    assert len(at_once) == len(counted_modules()) - 3
    assert run.stdout.split() == [str(len(at_once)), TrainConfig().digest()]


@pytest.mark.parametrize(
    "packed", [b"", b"B", b"Bxxxx", b"L", b"Lxxxx", b"B" + b"\x0b\x02\x80null\x03"]
)
def test_damaged_packed_code_is_refused(packed: bytes) -> None:
    with pytest.raises(ArtifactError, match="pack it again"):
        unpacked_code(packed)
