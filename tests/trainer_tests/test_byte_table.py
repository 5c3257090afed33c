"""Bytes per token: a vocabulary made by hand piece by piece, and texts counted by Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

from tests.trainer_tests.small_data import UNICODE_TEXT, VOCAB_SIZE, write_tokenizer
from trainer.data.byte_table import ByteTable
from trainer.errors import DataError

CONTROL, UNKNOWN, UNUSED, USER, BYTE, NORMAL = 3, 2, 5, 4, 6, 1
PIECES = [
    ("<pad>", CONTROL),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<unk>", UNKNOWN),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    ("\u2581", NORMAL),
    ("\u2581the", NORMAL),
    ("the", NORMAL),
    ("\u00e9", NORMAL),
    ("\u2581\u00e9t\u00e9", NORMAL),
    ("\u65e5\u672c", NORMAL),
    ("\U0001f600", NORMAL),
    ("\u2581\u2581", NORMAL),
    ("gone", UNUSED),
    ("a\u2581b", USER),
]
IDS = {piece: token for token, (piece, _) in enumerate(PIECES)}


def write_model(path: Path, pieces: list[tuple[str, int]]) -> Path:
    model = sentencepiece_model_pb2.ModelProto()
    for piece, kind in pieces:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ByteTable:
    path = write_model(tmp_path_factory.mktemp("model") / "hand.model", PIECES)
    return ByteTable.from_tokenizer(path, vocab_size=len(PIECES) + 4)


@pytest.mark.parametrize(
    ("previous", "target", "num_bytes"),
    [
        ("the", "<s>", 0),  # BOS stands for no text
        ("the", "</s>", 0),
        ("the", "<pad>", 0),
        ("the", "<unk>", 0),
        ("the", "gone", 0),
        ("<s>", "the", 3),
        ("<s>", "\u2581the", 3),  # nothing is decoded for a space after BOS
        ("</s>", "\u2581the", 3),
        ("<unk>", "\u2581the", 3),
        ("gone", "\u2581the", 3),
        ("the", "\u2581the", 4),
        ("<0xE6>", "\u2581the", 4),
        ("\u2581", "\u2581the", 4),
        ("the", "\u2581", 1),
        ("<s>", "\u2581", 0),
        ("the", "<0xE6>", 1),
        ("<s>", "<0xE6>", 1),
        ("the", "<0x20>", 1),
        ("the", "\u00e9", 2),
        ("the", "\u2581\u00e9t\u00e9", 6),
        ("<s>", "\u2581\u00e9t\u00e9", 5),
        ("the", "\u65e5\u672c", 6),
        ("the", "\U0001f600", 4),
        ("the", "\u2581\u2581", 4),  # one mark is a space, the other counts as its own 3 bytes
        ("the", "a\u2581b", 5),  # only a mark in front is a space
    ],
)
def test_hand_made_cases(table: ByteTable, previous: str, target: str, num_bytes: int) -> None:
    pair = torch.tensor([IDS[previous]]), torch.tensor([IDS[target]])
    assert table.count(*pair).tolist() == [num_bytes]


def test_ids_beyond_the_tokenizer_are_boundaries_without_bytes(table: ByteTable) -> None:
    beyond = torch.tensor([0, 3, 2]) + len(PIECES)
    the = torch.full((3,), IDS["\u2581the"])
    assert table.count(the, beyond).tolist() == [0, 0, 0]
    assert table.count(beyond, the).tolist() == [3, 3, 3]


def test_keeps_the_shape_of_a_batch(table: ByteTable) -> None:
    bos, word, spaced, accent = (IDS[piece] for piece in ("<s>", "the", "\u2581the", "\u00e9"))
    previous = torch.tensor([[bos, word], [word, word]])
    targets = torch.tensor([[spaced, spaced], [accent, bos]])
    assert table.count(previous, targets).tolist() == [[3, 4], [2, 0]]


def test_refuses_a_tokenizer_without_a_bare_space(tmp_path: Path) -> None:
    pieces = [(piece, kind) for piece, kind in PIECES if piece != "\u2581"]
    path = write_model(tmp_path / "no_space.model", pieces)
    with pytest.raises(DataError, match=r"no piece for a lone space \(U\+2581\)"):
        ByteTable.from_tokenizer(path, len(PIECES))


def test_refuses_more_pieces_than_the_model_has_rows(tmp_path: Path) -> None:
    path = write_model(tmp_path / "hand.model", PIECES)
    with pytest.raises(DataError, match=r"270 pieces, .* 269; set model\.vocab_size = 270"):
        ByteTable.from_tokenizer(path, 269)


@pytest.mark.parametrize(
    "text",
    [
        "plain words and numbers 12345",
        "x",
        UNICODE_TEXT.strip(),
        "\u00e9\u00e9 \u00e9 def f(x): return x**2 # \u2192 \u00b1",
        "\u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0939\u093f \U0001f680\U0001f680 \U00010348",
        "a \u0416 b \u0416\u0416 c" * 50,
    ],
)
def test_bytes_of_an_encoded_text_are_its_utf8_bytes(tmp_path: Path, text: str) -> None:
    path = write_tokenizer(tmp_path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.normalize(text).replace("\u2581", " ") == text  # else the bytes may differ
    tokens = torch.tensor([1, *tokenizer.encode(text)])
    counted = ByteTable.from_tokenizer(path, VOCAB_SIZE).count(tokens[:-1], tokens[1:])
    assert int(counted.sum()) == len(text.encode())
