"""The byte side-car: how many bytes of the original text each validation token stands for.

Data of a CaseOps tokenizer needs one, because a mark is no text unless it is escaped, which a
token and the one before it do not tell. It is a file *_val_bytes_N.bin for each *_val_N.bin, in the
format of shards, with a count for each token; published data has the same (parameter-golf #1729).

Ours count as `ByteTable` does, so that scores with and without CaseOps are per byte of the same
text: BOS, other control pieces and marks 0, an escaped mark 3, a space in front of a word 1 unless
the token before it is a boundary such as BOS. The sum over a document is the UTF-8 length of its
text as the tokenizer's normaliser leaves it. (The published files count the text before the
normaliser, which has more white space.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainer.data.case_marks import ESCAPE, MARK_BYTES, MARKS, case_mark_ids
from trainer.data.documents import BOS_ID
from trainer.data.shards import GET_AGAIN, Tokens, num_tokens
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import DataError


def original_bytes_counter(model: Path) -> Callable[[Tokens], Tokens]:
    """What counts the original bytes of each token of a document that begins with BOS, for the
    CaseOps tokenizer in `model`."""
    from trainer.data.byte_table import ByteTable  # brings torch in, which nothing else here needs

    tokenizer = load_tokenizer(model)
    table = ByteTable.from_tokenizer(model, tokenizer.vocab_size())
    marks = np.array(case_mark_ids(tokenizer))
    base = table.base_bytes.numpy().copy()
    base[marks] = 0
    is_boundary, has_space = table.is_boundary.numpy(), table.has_leading_space.numpy()

    def count(tokens: Tokens) -> Tokens:
        num_bytes = base[tokens]
        num_bytes[1:] += has_space[tokens[1:]] & ~is_boundary[tokens[:-1]]
        literal = -1
        for place in np.flatnonzero(tokens == marks[MARKS.index(ESCAPE)]).tolist():
            if place != literal:
                literal = place + 1
                num_bytes[literal] = MARK_BYTES
        return num_bytes.astype(np.uint16)

    return count


def check_side_car(folder: Path, shards: Sequence[Path], side_car: Sequence[Path]) -> None:
    """Raises DataError unless every validation shard has a file of as many counts."""
    if len(shards) != len(side_car):
        raise DataError(
            f"{folder}: {len(side_car)} byte side-car files (*_val_bytes_*.bin) for "
            f"{len(shards)} validation shards; data of a CaseOps tokenizer has one for each: "
            f"{GET_AGAIN}"
        )
    for shard, counts in zip(shards, side_car, strict=True):
        expected, found = num_tokens(shard), num_tokens(counts)
        if expected != found:
            raise DataError(
                f"{counts}: has bytes for {found} tokens, but {shard.name} has {expected}; they do "
                f"not belong together: {GET_AGAIN}"
            )


def check_aligned(folder: Path, tokens: Tokens, num_bytes: Tokens) -> None:
    """Raises DataError when some BOS stands for text, or nothing does: the counts are those of
    other tokens, or moved against them."""
    wrong = np.flatnonzero((tokens == BOS_ID) & (num_bytes > 0))
    if len(wrong):
        raise DataError(
            f"{folder}: the byte side-car gives {int(num_bytes[wrong[0]])} bytes to BOS at "
            f"validation token {int(wrong[0])} and to {len(wrong) - 1} more, expected 0: it is "
            f"misaligned or of other text; {GET_AGAIN}"
        )
    if not num_bytes.any():
        raise DataError(f"{folder}: the byte side-car has no bytes at all; {GET_AGAIN}")
