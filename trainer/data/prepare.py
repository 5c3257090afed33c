"""Text to a data folder: tokenizer, training and validation shards, manifest.

Every document becomes BOS and its tokens, without an end mark. With CaseOps, validation shards get
a byte side-car (trainer/data/byte_side_car.py). The result depends on the texts and
the arguments only: the same call gives the same bytes.

The tokenizer normalises text before it cuts it (nmt_nfkc: compatibility characters folded, every
run of white space one space). Bits per byte on such data are per byte of the normalised text, which
is also what the challenge's own shards hold; indentation and line ends are not learned.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.data.build_folder import build_folder, sole_maker
from trainer.data.case_marks import MARKS, case_mark_ids, encode_case
from trainer.data.encode import (
    LabelledDocument,
    Progress,
    cut_before,
    describe_dataset,
    write_dataset,
)
from trainer.data.shards import Split
from trainer.data.texts import read_documents
from trainer.data.tokenizer import load_tokenizer, sample_sentences, train_tokenizer
from trainer.errors import DataError

VAL_FRACTION = 0.05


def prepare(
    texts: Sequence[Path],
    vocab_size: int,
    out: Path,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
    *,
    val_texts: Sequence[Path] = (),
    val_fraction: float = VAL_FRACTION,
    val_docs: int = 0,
    name: str = "corpus",
    case_ops: bool = False,
) -> dict[str, Any]:
    """Make the data folder `out` from text files.

    Args:
        texts: files as `read_documents` takes them.
        vocab_size: pieces of the tokenizer.
        out: folder to make; must be absent or empty.
        tokenizer: a SentencePiece .model to use instead of training one.
        progress: called as work proceeds, in bytes of the files on disk.
        val_texts: validation documents; without them a deterministic share of `texts` is held out.
        val_fraction: that share, of documents.
        val_docs: hold out the first so many documents instead, as the challenge does (50,000).
        name: first part of the shards' file names.
        case_ops: train a CaseOps tokenizer (trainer/data/case_marks.py). One that is given as
            `tokenizer` says for itself what it is.

    Returns {dir, vocab_size, train_tokens, val_tokens, digest}. Raises DataError.
    """
    if not texts:
        raise DataError("no text files given; name at least one")
    if val_texts and val_docs:
        raise DataError(
            f"validation texts and the first {val_docs} documents were both asked for; give one"
        )
    if not 0 < val_fraction < 1:
        raise DataError(f"a validation share of {val_fraction} is not between 0 and 1")
    hold = partial(hold_out, fraction=val_fraction)
    if val_docs:
        hold = partial(hold_out_first, count=val_docs)
    with sole_maker(out):
        if out.is_dir() and any(out.iterdir()):
            raise DataError(f"{out}: is not empty; choose another --out, or remove it")
        with build_folder(out) as folder:
            model = folder / (tokenizer.name if tokenizer else f"{name}_{vocab_size}_bpe.model")
            if tokenizer:
                _check_marks(tokenizer, case_ops)
                shutil.copyfile(tokenizer, model)
            else:
                labelled = _labelled(texts, val_texts, hold, "tokenizer", progress)
                train_texts: Iterator[str] = (text for split, text in labelled if split == "train")
                if case_ops:
                    train_texts = map(encode_case, train_texts)
                symbols = MARKS if case_ops else ()
                train_tokenizer(sample_sentences(train_texts), vocab_size, model, symbols)
            documents = _labelled(texts, val_texts, hold, "encode", progress)
            source = {"kind": "text", "files": [path.name for path in (*texts, *val_texts)]}
            manifest = write_dataset(folder, documents, model, vocab_size, source, name)
    return describe_dataset(out, manifest)


def _check_marks(tokenizer: Path, case_ops: bool) -> None:
    has_marks = bool(case_mark_ids(load_tokenizer(tokenizer)))
    if case_ops and not has_marks:
        raise DataError(
            f"{tokenizer}: lacks the marks of CaseOps (U+E001 to U+E004); give a tokenizer with "
            "them, or none to have one trained"
        )


def hold_out(documents: Iterable[str], fraction: float) -> Iterator[LabelledDocument]:
    """Label documents "val" by a hash of their text, so that copies stay on one side and the split
    does not depend on order.

    When the hash chooses none of several, the last one is held out; a lone document is cut in two.
    """
    previous: str | None = None
    num_seen, any_held = 0, False
    for text in documents:
        if previous is not None:
            split = _split_of(previous, fraction)
            any_held |= split == "val"
            yield split, previous
        previous = text
        num_seen += 1
    if previous is None:
        return
    if num_seen == 1:
        cut = cut_before(previous, int(len(previous) * (1 - fraction)))
        yield "train", previous[:cut]
        yield "val", previous[cut:]
    else:
        yield _split_of(previous, fraction) if any_held else "val", previous


def hold_out_first(documents: Iterable[str], count: int) -> Iterator[LabelledDocument]:
    """Label the first `count` documents "val", so that the validation set is the published one."""
    for number, text in enumerate(documents):
        yield "val" if number < count else "train", text


def _split_of(text: str, fraction: float) -> Split:
    number = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])
    return "val" if number < fraction * 2**64 else "train"


def _labelled(
    texts: Sequence[Path],
    val_texts: Sequence[Path],
    hold: Callable[[Iterable[str]], Iterator[LabelledDocument]],
    stage: str,
    progress: Progress | None,
) -> Iterator[LabelledDocument]:
    sizes = [path.stat().st_size if path.is_file() else 0 for path in (*texts, *val_texts)]
    ends = list(accumulate(sizes, initial=0))

    def read(paths: Sequence[Path], first: int) -> Iterator[str]:
        for index, path in enumerate(paths, start=first):
            yield from read_documents(path, partial(_tell, progress, stage, ends, index))

    documents = read(texts, 0)
    if not val_texts:
        yield from hold(documents)
        return
    yield from (("train", text) for text in documents)
    yield from (("val", text) for text in read(val_texts, len(texts)))


def _tell(
    progress: Progress | None, stage: str, ends: list[int], index: int, position: int
) -> None:
    if progress is not None:
        progress(stage, ends[index] + position, ends[-1])
