"""Capitals as marks: every text comes back, and marks are where the published rules put them."""

from __future__ import annotations

import itertools
import random
import string
import time

import pytest

from trainer.data.case_marks import MARKS, decode_case, encode_case
from trainer.errors import DataError

T, A, C, E = MARKS
AWKWARD = (
    "\u0130\u0131"  # Turkish: lower() of the first is two characters
    "\u00df\u1e9e\u03a3\u03c3\u03c2"  # sharp s, sigma and final sigma
    "\u01c4\u01c5\u01c6\u212a\ufb01E\u0301"  # titlecase digraph, Kelvin sign, ligature, accent
    "\u0000\ufffe\U0001f600\U0010ffff"
)
LETTERS = frozenset(string.ascii_letters)


def plain_encode(text: str) -> str:
    """The rules, one word after another."""
    parts: list[str] = []
    for is_word, characters in itertools.groupby(text, LETTERS.__contains__):
        word = "".join(characters)
        if not is_word:
            parts += [E + mark if mark in MARKS else mark for mark in word]
        elif len(word) > 1 and word == word.upper():
            parts += [A, word.lower()]
        else:
            for place, letter in enumerate(word):
                if letter in string.ascii_uppercase:
                    parts.append(C if place else T)
                parts.append(letter.lower())
    return "".join(parts)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("The cat", f"{T}the cat"),
        ("A I'M", f"{T}a {T}i'{T}m"),
        ("NASA's", f"{A}nasa's"),
        ("iPhone McDonald", f"i{C}phone {T}mc{C}donald"),
        ("ABc aBC", f"{T}a{C}bc a{C}b{C}c"),
        ("x1Y2ZZ", f"x1{T}y2{A}zz"),
        ("\u00c9COLE stra\u00dfE", f"\u00c9{A}cole stra\u00df{T}e"),
        (f"{T}a{E}{E}{C}B", f"{E}{T}a{E}{E}{E}{E}{E}{C}{T}b"),
        ("", ""),
    ],
)
def test_hand_made_cases(text: str, encoded: str) -> None:
    assert encode_case(text) == encoded
    assert decode_case(encoded) == text


@pytest.mark.parametrize("alphabet", [AWKWARD + "aAbB .1" + "".join(MARKS), "aAbBcC" + E, None])
def test_any_text_comes_back_and_has_no_capital_on_the_way(alphabet: str | None) -> None:
    generator = random.Random(7)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for _ in range(8000):
        length = generator.randrange(16)
        if alphabet is None:
            text = "".join(map(chr, generator.choices(codes, k=length)))
        else:
            text = "".join(generator.choices(alphabet, k=length))
        encoded = encode_case(text)
        assert decode_case(encoded) == text
        assert encoded == plain_encode(text)
        assert not set(string.ascii_uppercase) & set(encoded)


@pytest.mark.parametrize("broken", [f"a{T}", f"{A} b", f"{C}1", f"{T}{T}a", f"x{E}y", f"{T}\u00e9"])
def test_what_was_never_encoded_is_refused(broken: str) -> None:
    with pytest.raises(DataError, match=r"not CaseOps text: U\+E00\d at character"):
        decode_case(broken)


def test_a_word_without_end_takes_no_more_than_its_length() -> None:
    started = time.perf_counter()
    for text in ("a" * 1_000_000 + "B", "aB" * 500_000, "A" * 1_000_000, E * 1_000_000):
        assert decode_case(encode_case(text)) == text
    assert time.perf_counter() - started < 20
