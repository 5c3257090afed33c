"""Data of a CaseOps tokenizer: the bytes of its tokens are those of the original text."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.cli import main
from tests.ranks import run_ranks
from tests.trainer_tests.small_data import UNICODE_TEXT, VOCAB_SIZE, write_tokenizer
from tests.trainer_tests.test_fetch import REPOSITORY, Hub, hub, run_fetch  # noqa: F401
from tests.trainer_tests.test_prepare import DOCUMENTS, decoded, write_plain
from trainer.config import EvaluateConfig
from trainer.data.byte_side_car import original_bytes_counter
from trainer.data.byte_table import ByteTable
from trainer.data.case_marks import MARKS, case_mark_ids, decode_case
from trainer.data.dataset import Dataset
from trainer.data.documents import document_starts
from trainer.data.prepare import prepare
from trainer.data.shards import HEADER_BYTES, ShardWriter, open_shard
from trainer.data.tokenizer import load_tokenizer
from trainer.distributed import Group
from trainer.errors import DataError
from trainer.evaluate.bits_per_byte import EvalResult, evaluate

T, A, C, E = MARKS
CASES = [
    "The NASA launch of iPhone McDonald, A B CD. E\u0301t\u00e9 \u00c9COLE \U0001f600 \ufb01N.",
    "  Leading   white\n\nSPACE and Trailing  ",
    f"Marks in the text: {T}a {A}B{C} {E}{E}{T}Word {E} {E}{A} end{E}",
    UNICODE_TEXT.strip() + " \u0130\u0131 \u00dfS\u1e9e \u03a3\u03c2 \u01c5 \u212aELVIN \u2163",
]
VAL = CASES + DOCUMENTS[:6]
SEQ_LEN = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same texts with CaseOps and without."""
    base = tmp_path_factory.mktemp("side_car")
    train, val = write_plain(base / "train.txt"), write_plain(base / "val.txt", VAL)
    for name in ("caseops", "plain"):
        prepare(
            [train],
            VOCAB_SIZE,
            base / name,
            val_texts=[val],
            case_ops=name == "caseops",
        )
    return base / "caseops", base / "plain"


@pytest.fixture
def folder(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the CaseOps data that may be broken."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folders[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_every_document_has_the_bytes_of_its_original_text(folders: tuple[Path, Path]) -> None:
    """UTF-8 bytes of the text as the normaliser leaves it; it drops a space after BOS, so that
    the challenge's rule for that space never has to be used."""
    caseops, plain = (Dataset.open(path) for path in folders)
    counts = caseops.read_val_bytes()
    assert counts is not None and plain.read_val_bytes() is None
    starts = document_starts(caseops.read_val())
    normaliser = load_tokenizer(plain.tokenizer_path)
    texts = [normaliser.normalize(text).replace("\u2581", " ") for text in VAL]
    expected = [len(text.encode()) for text in texts]
    assert [int(part.sum()) for part in np.split(counts, starts[1:])] == expected
    # Without CaseOps the tokenizer's table gives the same denominator.
    table = ByteTable.from_tokenizer(plain.tokenizer_path, VOCAB_SIZE)
    tokens = torch.from_numpy(plain.read_val().astype(np.int64))
    assert int(table.count(tokens[:-1], tokens[1:]).sum()) == sum(expected)


def test_every_token_has_its_own_bytes(folders: tuple[Path, Path]) -> None:
    """A walk over the pieces that knows when an escape is open."""
    dataset = Dataset.open(folders[0])
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    found = dataset.read_val_bytes()
    assert found is not None
    previous, is_escaped = 1, False
    for token, count in zip(dataset.read_val().tolist(), found.tolist(), strict=True):
        piece = tokenizer.id_to_piece(token)
        if piece in MARKS:
            expected = 3 if is_escaped else 0
            is_escaped = piece == E and not is_escaped
        elif tokenizer.is_control(token):
            expected = 0
        elif tokenizer.is_byte(token):
            expected = 1
        else:
            text = piece.replace("\u2581", " ")
            if text[0] == " " and tokenizer.is_control(previous):
                text = text[1:]
            expected = len(text.encode())
        assert count == expected, piece
        previous = token


def test_tokens_that_no_text_gives_follow_the_rules_too(folders: tuple[Path, Path]) -> None:
    dataset = Dataset.open(folders[0])
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    title, _, _, escape = case_mark_ids(tokenizer)
    pieces = {tokenizer.id_to_piece(token): token for token in range(VOCAB_SIZE)}
    word = next(piece for piece in pieces if piece[0] == "\u2581" and piece[1:].isascii())
    spaced, length = pieces[word], len(word)
    tokens = [1, spaced, spaced, title, spaced, escape, escape, spaced, escape, escape, title, 3]
    expected = [0, length - 1, length, 0, length, 0, 3, length, 0, 3, 0, 0]
    count = original_bytes_counter(dataset.tokenizer_path)
    assert count(np.array([*tokens, spaced], dtype=np.uint16)).tolist() == [*expected, length - 1]


def test_tokens_decode_to_the_normalised_original(folders: tuple[Path, Path]) -> None:
    dataset = Dataset.open(folders[0])
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    texts = decoded(tokenizer, open_shard(dataset.train_shards[0]))
    assert [decode_case(text) for text in texts] == [" ".join(text.split()) for text in DOCUMENTS]
    mark_ids = case_mark_ids(tokenizer)
    assert [tokenizer.id_to_piece(token) for token in mark_ids] == list(MARKS)
    pieces = [tokenizer.id_to_piece(token) for token in range(VOCAB_SIZE)]
    assert not any(set(piece) & set(MARKS) for piece in pieces if piece not in MARKS)


@cache
def logits_table() -> Tensor:
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def table_model(tokens_BT: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
    logits_BVT = logits_table()[tokens_BT].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits_BVT, targets_BT, reduction="none")


def score(group: Group, dataset: Dataset, stride: int) -> EvalResult:
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    config = EvaluateConfig(seq_len=SEQ_LEN, batch_tokens=5 * SEQ_LEN, stride=stride)
    return evaluate(table_model, dataset, table, config, group)


@pytest.mark.parametrize("stride", [0, 7])
def test_bits_are_per_byte_of_the_side_car(folders: tuple[Path, Path], stride: int) -> None:
    dataset = Dataset.open(folders[0])
    tokens = dataset.read_val().astype(int)
    num_targets = (len(tokens) - 1) // SEQ_LEN * SEQ_LEN
    log_p = torch.log_softmax(logits_table().double(), dim=-1).numpy()
    nats = -sum(log_p[tokens[i], tokens[i + 1]] for i in range(num_targets))
    counts = dataset.read_val_bytes()
    assert counts is not None
    num_bytes = int(counts[1 : num_targets + 1].sum())
    alone = score(Group(torch.device("cpu")), dataset, stride)
    for found in [alone, *run_ranks(score, 2, dataset, stride)]:
        assert (found.num_tokens, found.num_bytes) == (num_targets, num_bytes)
        assert found.val_bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def write_side_car(folder: Path, counts: np.ndarray) -> None:
    with ShardWriter(folder, "corpus", "val_bytes") as writer:
        writer.append(counts)
    (folder / "dataset.json").unlink()


def test_a_missing_or_shorter_side_car_is_refused(folder: Path) -> None:
    counts = Dataset.open(folder).read_val_bytes()
    assert counts is not None
    write_side_car(folder, counts[:-1])
    says = rf"bytes for {len(counts) - 1} tokens, but corpus_val_000000\.bin has {len(counts)}"
    with pytest.raises(DataError, match=says):
        Dataset.open(folder)
    os.truncate(folder / "corpus_val_bytes_000000.bin", HEADER_BYTES + 100)
    with pytest.raises(DataError, match=r"corpus_val_bytes_000000\.bin: truncated"):
        Dataset.open(folder)
    (folder / "corpus_val_bytes_000000.bin").unlink()
    with pytest.raises(DataError, match=r"0 byte side-car files .* for 1 validation shards"):
        Dataset.open(folder)


def test_a_side_car_of_other_tokens_is_refused(folder: Path) -> None:
    counts = Dataset.open(folder).read_val_bytes()
    assert counts is not None
    write_side_car(folder, np.roll(counts, 1))
    with pytest.raises(DataError, match=r"to BOS at validation token \d+ .*misaligned"):
        Dataset.open(folder).read_val_bytes()
    with ShardWriter(folder, "corpus", "val_bytes") as writer:
        writer.append(np.zeros_like(counts))
    with pytest.raises(DataError, match=r"content .* differs"):
        Dataset.open(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match="no bytes at all"):
        Dataset.open(folder).read_val_bytes()


def test_the_side_car_is_part_of_the_digest_and_no_shard(folder: Path) -> None:
    before = Dataset.open(folder)
    assert [path.name for path in before.val_shards] == ["corpus_val_000000.bin"]
    counts = before.read_val_bytes()
    assert counts is not None
    changed = counts.copy()
    changed[np.flatnonzero(changed)[5]] += 1
    write_side_car(folder, changed)
    assert Dataset.open(folder).digest != before.digest


def test_a_given_tokenizer_says_what_it_is(folders: tuple[Path, Path], tmp_path: Path) -> None:
    caseops = Dataset.open(folders[0])
    val = write_plain(tmp_path / "val.txt", VAL)
    arguments = {"tokenizer": caseops.tokenizer_path, "val_texts": [val]}
    made = prepare([write_plain(tmp_path / "t.txt")], VOCAB_SIZE, tmp_path / "out", **arguments)
    assert made["digest"] == caseops.digest
    without = write_tokenizer(tmp_path / "plain")
    with pytest.raises(DataError, match=r"small\.model: lacks the marks of CaseOps"):
        prepare([val], VOCAB_SIZE, tmp_path / "no", tokenizer=without, case_ops=True)


def test_the_command_makes_the_same_data(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(write_plain(tmp_path / "train.txt"))]
    texts += ["--val-text", str(write_plain(tmp_path / "val.txt", VAL))]
    options = ["--vocab-size", str(VOCAB_SIZE), "--out", str(tmp_path / "out"), "--caseops"]
    assert main(["data", "prepare", *texts, *options, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["digest"] == Dataset.open(folders[0]).digest


def test_the_first_documents_are_held_out_where_asked(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together = str(write_plain(tmp_path / "all.txt", VAL + DOCUMENTS))
    size = ["--vocab-size", str(VOCAB_SIZE), "--caseops"]
    options = ["--out", str(tmp_path / "out"), "--val-docs", str(len(VAL))]
    assert main(["data", "prepare", together, *size, *options, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["digest"] == Dataset.open(folders[0]).digest
    options = ["--out", str(tmp_path / "none"), "--val-docs", "3", "--val-text", together]
    assert main(["data", "prepare", together, *size, *options]) == 1
    assert "were both asked for; give one" in capsys.readouterr().err


def test_published_data_comes_with_its_side_car(
    hub: Hub,  # noqa: F811
    folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    root = hub.folder / "root"
    model = Dataset.open(folders[0]).tokenizer_path
    (root / "tokenizers" / "fineweb_400_bpe.model").write_bytes(model.read_bytes())
    out = tmp_path / "out"
    shards = next((root / "datasets").iterdir())
    assert "cannot download" in run_fetch(hub, out, 1)["error"]
    expected = []
    for path in sorted(shards.glob("fineweb_val_0*.bin")):
        tokens = open_shard(path)
        expected += (counts := np.where(tokens == 1, 0, tokens % 7)).tolist()
        with ShardWriter(tmp_path, path.stem, "val_bytes") as writer:
            writer.append(counts.astype(np.uint16))
        writer.paths[0].rename(shards / path.name.replace("_val_", "_val_bytes_"))
    assert run_fetch(hub, out, 1)["made"]["val_tokens"] == 1300
    found = Dataset.open(out).read_val_bytes()
    assert found is not None and found.tolist() == expected
