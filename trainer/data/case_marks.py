"""CaseOps: capitals written as marks before lower-case words, and back, exactly.

A tokenizer then needs one piece for "the", not three (parameter-golf #1729). Marks are characters
of the private use area, which CaseOps tokenizers have as pieces of their own:

    U+E001 Title       the word begins with a capital          "The"    -> T the
    U+E002 all caps    the word is in capitals, two or more    "NASA"   -> A nasa
    U+E003 cap next    a capital inside a word                 "iPhone" -> i C phone
    U+E004 escape      the mark after it is text, not a mark

A word is a longest run of A-Z and a-z, as published: other letters stay as they are, because their
case does not always come back (dotless i, sharp s, final sigma, digraphs such as U+01C5). So any
text survives, marks in it included. Works on a document at a time, tens of megabytes a second.
"""

from __future__ import annotations

import re

import sentencepiece

from trainer.errors import DataError

TITLE, ALL_CAPS, CAP_NEXT, ESCAPE = MARKS = ("\ue001", "\ue002", "\ue003", "\ue004")
MARK_BYTES = 3
"""UTF-8 bytes of a mark that is text."""

_CAPITALS = re.compile(r"[A-Z][A-Za-z]*|[\ue001-\ue004]")
"""A word from its first capital on, or a mark in the text."""
_CAPITAL = re.compile(r"[A-Z]")
_MARKED = re.compile(
    f"{ESCAPE}([{''.join(MARKS)}])|{ALL_CAPS}([a-z]+)|[{TITLE}{CAP_NEXT}]([a-z])|([{''.join(MARKS)}])"
)


def encode_case(text: str) -> str:
    """The text in lower case (A-Z only) with marks. `decode_case` inverts it for every text."""
    return _CAPITALS.sub(_marked, text)


def decode_case(text: str) -> str:
    """Inverse of encode_case. Raises DataError at a mark that does not stand before a letter, or
    an escape before anything but a mark."""
    return _MARKED.sub(_unmarked, text)


def case_mark_ids(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[int, ...]:
    """Ids of the four marks in the order of MARKS; empty when the tokenizer is not a CaseOps one,
    which has them all."""
    ids = tuple(int(tokenizer.piece_to_id(mark)) for mark in MARKS)
    return () if tokenizer.unk_id() in ids else ids


def _marked(match: re.Match[str]) -> str:
    found = match[0]
    if found in MARKS:
        return ESCAPE + found
    if match.start() and "a" <= match.string[match.start() - 1] <= "z":
        return _marked_inside(found)
    if len(found) > 1 and found.isupper():
        return ALL_CAPS + found.lower()
    return TITLE + found[0].lower() + _marked_inside(found[1:])


def _marked_inside(part: str) -> str:
    if part.islower():
        return part
    return _CAPITAL.sub(lambda capital: CAP_NEXT + capital[0].lower(), part)


def _unmarked(match: re.Match[str]) -> str:
    literal, word, letter, stray = match.groups()
    if stray is not None:
        raise DataError(
            f"not CaseOps text: U+{ord(stray):04X} at character {match.start()} stands before no "
            "letter; decode only what was encoded, in whole documents"
        )
    return literal or (word or letter).upper()
