"""The embedded corpus: what is in it, and that building it survives crashes and company."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from trainer.data.dataset import Dataset
from trainer.data.demo_corpus import MAX_CHARS, _module_texts, build_demo, demo_documents
from trainer.data.shards import HEADER_BYTES
from trainer.errors import DataError


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the text: same code, less waiting. Forked processes inherit it."""
    monkeypatch.setattr("trainer.data.demo_corpus.MAX_CHARS", 600_000)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    out = tmp_path / "first" / "demo"
    build_demo(out)
    return out


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "dataset.json"
    }


def test_is_the_same_each_time(built: Path, tmp_path: Path) -> None:
    made = build_demo(tmp_path / "again")
    dataset = Dataset.open(built, 512)
    assert made["digest"] == dataset.digest
    assert content(tmp_path / "again") == content(built)
    assert (made["train_tokens"], made["val_tokens"]) == (dataset.train_tokens, dataset.val_tokens)


def test_whole_corpus_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.demo_corpus.MAX_CHARS", MAX_CHARS)
    documents = demo_documents()
    sizes = {
        side: sum(len(text) for split, text in documents if split == side)
        for side in ("train", "val")
    }
    assert sizes["train"] > 5_000_000
    assert 100_000 < sizes["val"] < 500_000
    assert {len(text) > 0 for _, text in documents} == {True}


def test_code_and_docstrings_are_apart_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module\n\n  words."""\nimport os  # kept\n\ndef f():\n    "One line."\n    return "x"\n'
        'class C:\n    """Of C."""\n    def g(self): return 1\n'
    )
    docstrings, code = _module_texts(path)
    assert docstrings == "Module\n\nwords.\n\nOne line.\n\nOf C."
    assert code == (
        'import os  # kept\n\ndef f():\n    return "x"\nclass C:\n    def g(self): return 1'
    )
    path.write_bytes(b"not ( python")
    assert _module_texts(path) == []


def test_no_document_is_in_both_splits() -> None:
    documents = demo_documents()
    sides = {
        side: {text for split, text in documents if split == side} for side in ("train", "val")
    }
    assert sides["train"].isdisjoint(sides["val"])
    assert min(map(len, sides.values())) > 1


def test_returns_at_once_when_it_is_there(built: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    told: list[str] = []
    made = build_demo(built, progress=lambda stage, done, total: told.append(stage))
    assert told == []
    assert made["digest"] == Dataset.open(built).digest
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_rebuilds_what_is_broken(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "demo_train_000000.bin").write_bytes(b"half a shard")
    build_demo(out)
    assert content(out) == content(built)
    with (out / "demo_val_000000.bin").open("r+b") as shard:
        shard.seek(HEADER_BYTES)
        shard.write(b"\xff\xff")
    build_demo(out)
    assert content(out) == content(built)


def test_leaves_a_folder_with_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.md"):
        build_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


@pytest.mark.parametrize("is_killed", [False, True], ids=["both live", "first killed"])
def test_two_builders_at_once(built: Path, tmp_path: Path, is_killed: bool) -> None:
    context = multiprocessing.get_context("fork")
    out = tmp_path / "second" / "demo"
    first = context.Process(target=build_demo, args=(out,))
    first.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "second" / ".demo.partial").exists():
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    second = context.Process(target=build_demo, args=(out,))
    second.start()
    assert first.pid is not None
    if is_killed:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        assert not out.exists()
    first.join(timeout=120)
    second.join(timeout=120)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL if is_killed else 0, 0)
    assert content(out) == content(built)
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
