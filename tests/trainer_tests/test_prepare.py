"""Text to shards: same bytes for the same text however it is packed, and clear errors."""

from __future__ import annotations

import inspect
import json
import lzma
import multiprocessing
import optparse
import resource
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.trainer_tests.small_data import UNICODE_TEXT, VOCAB_SIZE, write_tokenizer
from trainer.data.dataset import Dataset
from trainer.data.documents import document_starts
from trainer.data.encode import encode_documents
from trainer.data.prepare import hold_out, prepare
from trainer.data.shards import open_shard
from trainer.data.texts import read_documents
from trainer.data.tokenizer import load_tokenizer, sample_sentences, train_tokenizer
from trainer.errors import DataError

SOURCE = inspect.getsource(optparse)
DOCUMENTS = [
    f"Document {n}: {UNICODE_TEXT}\n{SOURCE[n * 500 : (n + 1) * 500]}\tend" for n in range(60)
]


def write_plain(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    path.write_bytes("\0".join(documents).encode())
    return path


def decoded(tokenizer: sentencepiece.SentencePieceProcessor, shard: np.ndarray) -> list[str]:
    """The texts of a shard, cut at BOS."""
    return [
        tokenizer.decode(part[1:].tolist()) for part in np.split(shard, document_starts(shard))[1:]
    ]


def test_every_document_is_bos_and_its_normalised_text(tmp_path: Path) -> None:
    made = prepare([write_plain(tmp_path / "a.txt")], VOCAB_SIZE, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out", VOCAB_SIZE)
    assert made == {
        "dir": str(tmp_path / "out"),
        "vocab_size": VOCAB_SIZE,
        "train_tokens": dataset.train_tokens,
        "val_tokens": dataset.val_tokens,
        "digest": dataset.digest,
    }
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    train = np.concatenate([open_shard(path) for path in dataset.train_shards])
    texts = decoded(tokenizer, train), decoded(tokenizer, dataset.read_val())
    held = {text for split, text in hold_out(DOCUMENTS, 0.05) if split == "val"}
    expected = [
        [" ".join(text.split()) for text in DOCUMENTS if (text in held) == is_val]
        for is_val in (False, True)
    ]
    assert list(texts) == expected
    assert 0 < len(held) < 10
    assert 2 not in train  # no end mark


def test_packing_of_the_text_does_not_matter(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "a.txt")
    packed = tmp_path / "a.txt.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n\n".join(json.dumps({"id": 1, "text": text}) for text in DOCUMENTS))
    packed_lines = tmp_path / "a.jsonl.xz"
    packed_lines.write_bytes(lzma.compress(lines.read_bytes()))
    halves = [
        write_plain(tmp_path / "1", DOCUMENTS[:31]),
        write_plain(tmp_path / "2", DOCUMENTS[31:]),
    ]
    for number, texts in enumerate([[plain], [packed], [lines], [packed_lines], halves, [plain]]):
        prepare(texts, VOCAB_SIZE, tmp_path / f"out{number}")
    digests = {Dataset.open(tmp_path / f"out{number}").digest for number in range(6)}
    assert len(digests) == 1


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_documents_are_cut_at_nul_whatever_the_chunk(tmp_path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr("trainer.data.texts.CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes("one\0\0 \n\0zw\u00f6lf\0three\0".encode())
    assert list(read_documents(path)) == ["one", "zw\u00f6lf", "three"]


def test_given_tokenizer_and_validation_texts_are_used_as_they_are(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    train = write_plain(tmp_path / "train.txt")
    val = write_plain(tmp_path / "val.txt", ["Held out \u00e9.", "And this."])
    seen: list[tuple[str, int, int]] = []
    prepare(
        [train],
        VOCAB_SIZE,
        tmp_path / "out",
        tokenizer=model,
        val_texts=[val],
        progress=lambda *told: seen.append(told),
    )
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.tokenizer_path.read_bytes() == model.read_bytes()
    tokenizer = load_tokenizer(model)
    assert dataset.read_val().tolist() == [
        1,
        *tokenizer.encode("Held out \u00e9."),
        1,
        *tokenizer.encode("And this."),
    ]
    assert dataset.train_tokens == 60 + sum(len(tokenizer.encode(text)) for text in DOCUMENTS)
    total = train.stat().st_size + val.stat().st_size
    assert seen[-1] == ("encode", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("size", [5, 40, 333])
def test_segments_of_a_long_document_give_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch, size: int
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = "  " + "\n \t".join(DOCUMENTS[:9]) + " x" * 100 + "   end.  " + "y" * 500
    expected = [1, *tokenizer.encode(text)]
    monkeypatch.setattr("trainer.data.encode.SEGMENT_CHARS", size)
    ((split, tokens),) = encode_documents(tokenizer, [("val", text)])
    assert split == "val"
    assert tokens.tolist() == expected


@pytest.mark.parametrize("batch", [1, 100, 10_000_000])
def test_batches_keep_the_order(tmp_path: Path, monkeypatch, batch: int) -> None:
    monkeypatch.setattr("trainer.data.encode.BATCH_CHARS", batch)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    found = [
        tokens.tolist()
        for _, tokens in encode_documents(tokenizer, [("train", text) for text in DOCUMENTS])
    ]
    assert found == [[1, *tokenizer.encode(text)] for text in DOCUMENTS]


def test_hold_out_follows_content_not_order() -> None:
    texts = [f"text {n}" for n in range(4000)]
    held = {text for split, text in hold_out(texts, 0.05) if split == "val"}
    assert 150 < len(held) < 250
    assert {text for split, text in hold_out(texts[::-1], 0.05) if split == "val"} == held
    labelled = list(hold_out(texts * 2, 0.05))
    assert [text for _, text in labelled] == texts * 2
    assert {text for split, text in labelled if split == "val"} == held


def test_hold_out_always_finds_something() -> None:
    assert list(hold_out([], 0.05)) == []
    assert list(hold_out(["a", "b", "c"], 1e-9)) == [("train", "a"), ("train", "b"), ("val", "c")]
    assert list(hold_out(["ten words " * 10], 0.3)) == [
        ("train", "ten words " * 7 + "ten"),
        ("val", " words " + "ten words " * 2),
    ]


def test_sample_is_even_ordered_and_short() -> None:
    texts = [f"{n} " * 150 for n in range(1000, 1400)]
    sample = sample_sentences(texts, 50)
    assert sample == sample_sentences(texts, 50)
    numbers = [int(sentence.split()[0]) for sentence in sample]
    assert numbers == sorted(numbers)
    assert len(sample) == 50
    assert 1150 < sum(numbers) / 50 < 1250  # uniform over 1000..1399: deviation of the mean is 16
    assert "".join(sample_sentences(texts, 10**6)) == "".join(texts)
    assert [len(part) for part in sample_sentences(["x" * 2500], 9)] == [1000, 1000, 500]


def test_tokenizer_has_the_challenge_s_options(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer.id_to_piece(4) == "<0x00>"
    assert tokenizer.id_to_piece(259) == "<0xFF>"
    assert not tokenizer.encode("word", out_type=str)[0].startswith("\u2581")  # no dummy prefix
    assert len(tokenizer.encode("1234567", out_type=str)) == 7  # digits apart
    assert tokenizer.normalize("\ufb01  \uff21\n") == "fi\u2581A"
    assert tokenizer.encode("\U0001f9ff", out_type=str) == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]


def test_vocabulary_that_the_text_cannot_fill(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5000 pieces"):
        train_tokenizer(["few words here"] * 5, 5000, tmp_path / "m.model")
    with pytest.raises(DataError, match=r"200 pieces.*at least 260"):
        train_tokenizer(["few words here"] * 5, 200, tmp_path / "m.model")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9 au lait", r"document 1 is not UTF-8 at its byte 3 \(0xe9\)"),
        ("a.txt.xz", b"not xz", "broken xz archive"),
        ("a.txt.xz", lzma.compress(b"some text " * 99)[:-20], "broken xz archive"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 is not a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.txt", b" \n\0 ", "leaves no document for the train split"),
        ("a.txt", b"oneword", "leaves no document for the val split"),
    ],
)
def test_bad_text_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    model = write_tokenizer(tmp_path / "model")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare([path], VOCAB_SIZE, tmp_path / "out", tokenizer=model)
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted([name, "model"])


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    text = write_plain(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"small\.model has 400 pieces, asked for 512"):
        prepare([text], 512, tmp_path / "out", tokenizer=model)
    with pytest.raises(DataError, match="no such text file"):
        prepare([tmp_path / "none.txt"], VOCAB_SIZE, tmp_path / "out", tokenizer=model)
    with pytest.raises(DataError, match="no such tokenizer"):
        prepare([text], 512, tmp_path / "out", tokenizer=tmp_path / "none.model")
    with pytest.raises(DataError, match="name at least one"):
        prepare([], 512, tmp_path / "out")
    with pytest.raises(DataError, match="validation share of 1"):
        prepare([text], 512, tmp_path / "out", val_fraction=1)
    with pytest.raises(DataError, match=r"a\.txt/out: cannot make a folder there"):
        prepare([text], VOCAB_SIZE, text / "out", tokenizer=model)


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        prepare([write_plain(tmp_path / "a.txt")], VOCAB_SIZE, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_leftovers_of_a_killed_build_do_not_matter(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "corpus_train_000009.bin").write_bytes(b"half")
    prepare([write_plain(tmp_path / "a.txt")], VOCAB_SIZE, tmp_path / "out")
    assert not left.exists()
    assert len(Dataset.open(tmp_path / "out").train_shards) == 1


def _prepare_with_little_space(text: Path, model: Path, out: Path, answers) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (model.stat().st_size + 1, resource.RLIM_INFINITY))
    try:
        prepare([text], VOCAB_SIZE, out, tokenizer=model)
        answers.put("no error")
    except DataError as error:
        answers.put(str(error))


def test_no_space_left_is_one_clear_error(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    text = write_plain(tmp_path / "a.txt", DOCUMENTS * 200)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(
        target=_prepare_with_little_space, args=(text, model, tmp_path / "out", answers)
    )
    process.start()
    said = answers.get(timeout=60)
    process.join(timeout=10)
    assert "cannot write there (File too large); free space" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
