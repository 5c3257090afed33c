"""The challenge's own tokenizers on real English, where a checkout has them beside it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import sentencepiece
import torch

from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.data.documents import document_lengths
from trainer.data.prepare import prepare
from trainer.data.shards import open_shard
from trainer.data.texts import read_documents
from trainer.data.tokenizer import load_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CORPUS = DATA / "corpus" / "val.txt.xz"
TOKENIZERS = DATA / "tokenizers"
UNKNOWN = 3
PLAIN = "A closing line of plain words, with no mark that the tokenizer does not know."

pytestmark = pytest.mark.skipif(
    not (CORPUS.is_file() and TOKENIZERS.is_dir()), reason="no corpus beside the checkout"
)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [*itertools.islice(read_documents(CORPUS), 60), PLAIN]


def test_slice_becomes_the_tokens_of_the_published_tokenizer(
    documents: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "slice.txt"
    text.write_bytes("\0".join(documents).encode())
    model = TOKENIZERS / "fineweb_1024_bpe.model"
    prepare([text], 1024, tmp_path / "out", tokenizer=model, val_texts=[text])
    dataset = Dataset.open(tmp_path / "out", 1024)
    tokens = open_shard(dataset.train_shards[0])
    tokenizer = load_tokenizer(model)
    expected = [len(tokenizer.encode(document)) + 1 for document in documents]
    assert document_lengths(tokens).tolist() == expected
    assert dataset.train_tokens == dataset.val_tokens == sum(expected)
    assert tokenizer.decode(tokens[1 - expected[-1] :].tolist()) == PLAIN


@pytest.mark.parametrize("vocab_size", [1024, 2048, 4096, 8192])
def test_bytes_of_real_documents(documents: list[str], vocab_size: int) -> None:
    path = TOKENIZERS / f"fineweb_{vocab_size}_bpe.model"
    tokenizer = load_tokenizer(path)
    table = ByteTable.from_tokenizer(path, vocab_size)
    for document in documents:
        text = tokenizer.normalize(document).replace("\u2581", " ")
        tokens = torch.tensor([1, *tokenizer.encode(document)])
        counted = int(table.count(tokens[:-1], tokens[1:]).sum())
        assert counted + uncounted_bytes(tokenizer, document) == len(text.encode())


def uncounted_bytes(tokenizer: sentencepiece.SentencePieceProcessor, document: str) -> int:
    """Bytes of unknown pieces and of the spaces after them, which the challenge does not count. The
    models of up to 4096 pieces lack byte pieces and meet "#" or "_" as unknown."""
    pieces = tokenizer.encode(document, out_type=str)
    after = [*pieces[1:], ""]
    tokens = tokenizer.encode(document)
    return sum(
        len(piece.encode()) + following.startswith("\u2581")
        for piece, following, token in zip(pieces, after, tokens, strict=True)
        if token == UNKNOWN
    )
