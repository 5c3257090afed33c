"""A program as one small file that Python runs: a line that unpacks what follows and executes it.

The packed bytes stand in a string literal of a source in latin-1, which has a letter for each byte;
only four values need an escape. (Base 85, as published, costs a quarter; this costs a hundredth.)
"""

from __future__ import annotations

import lzma
import re

import brotli

_LZMA = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0}


def packed(source: str) -> bytes:
    """The file. Equal source gives equal bytes."""
    text = source.encode()
    by_brotli = in_source(
        b"import brotli;exec(brotli.decompress(", brotli.compress(text, lgwin=24), b"))"
    )
    filters = "[{'id':0x4000000000000001,'preset':9|1<<31,'lc':3,'lp':0,'pb':0}]"
    by_lzma = in_source(
        b"import lzma;exec(lzma.decompress(",
        lzma.compress(text, lzma.FORMAT_RAW, filters=[_LZMA]),
        f",3,None,{filters}))".encode(),
    )
    return min(by_brotli, by_lzma, key=len)


def in_source(before: bytes, content: bytes, after: bytes) -> bytes:
    """A source of Python in which these bytes stand as an expression."""
    return b"#coding:l1\n" + before + b"'''" + _escaped(content) + b"'''.encode('l1')" + after


def _escaped(content: bytes) -> bytes:
    text = content.replace(b"\\", b"\\\\").replace(b"\r", b"\\r")
    text = text.replace(b"'''", b"\\'\\'\\'")
    text = re.sub(rb"\0(?=[0-7])", rb"\\000", text).replace(b"\0", b"\\0")
    return text[:-1] + b"\\'" if text.endswith(b"'") and not text.endswith(b"\\'") else text
