"""The shard format: bytes written as specified, and one clear error for each way to be wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from trainer.data.documents import document_lengths, document_starts
from trainer.data.shards import ShardWriter, check_range, num_tokens, open_shard
from trainer.errors import DataError


def shard_bytes(
    tokens: list[int], magic: int = 20240520, version: int = 1, count: int = -1
) -> bytes:
    """A shard put together from the specification, without the writer."""
    count = len(tokens) if count < 0 else count
    header = struct.pack("<3i", magic, version, count) + bytes(4 * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def test_reads_a_shard_made_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(shard_bytes([1, 258, 65535, 7]))
    assert num_tokens(path) == 4
    assert open_shard(path).tolist() == [1, 258, 65535, 7]


def test_writes_the_bytes_of_the_specification(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x", "val") as writer:
        writer.append(np.array([1, 2], np.uint16))
        writer.append(np.array([65535], np.uint16))
    (path,) = writer.paths
    assert path.name == "x_val_000000.bin"
    assert path.read_bytes() == shard_bytes([1, 2, 65535])


@pytest.mark.parametrize("portions", [[23], [1] * 23, [5, 5, 13], [10, 10, 3]])
def test_writer_fills_shards_whatever_the_portions(tmp_path: Path, portions: list[int]) -> None:
    tokens = np.arange(23, dtype=np.uint16)
    with ShardWriter(tmp_path, "x", "train", tokens_per_shard=10) as writer:
        for part in np.split(tokens, np.cumsum(portions)[:-1]):
            writer.append(part)
    assert [num_tokens(path) for path in writer.paths] == [10, 10, 3]
    assert np.concatenate([open_shard(path) for path in writer.paths]).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["0 bytes", "1024"]),
        (b"plain text", ["10 bytes", "1024"]),
        (shard_bytes([1, 2], magic=20240521), ["20240521", "expected 20240520"]),
        (shard_bytes([1, 2], version=2), ["version 2", "expected 1"]),
        (shard_bytes([], count=0), ["0 tokens"]),
        (shard_bytes([1, 2, 3])[:-2], ["truncated", "1028 bytes", "1030"]),
        (shard_bytes([1, 2, 3])[:-1], ["truncated", "1029 bytes"]),
        (shard_bytes([1, 2, 3]) + b"\0\0", ["too long", "1032 bytes"]),
    ],
)
def test_refuses_what_is_not_a_whole_shard(tmp_path: Path, content: bytes, says: list[str]) -> None:
    path = tmp_path / "bad_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_shard(path)
    for part in [*says, str(path), "prepare it again"]:
        assert part in str(caught.value)


def test_refuses_an_absent_shard_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(DataError, match="no such shard"):
            num_tokens(path)


def test_a_writer_killed_half_way_leaves_no_valid_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "x", "train")
    writer.append(np.ones(100_000, np.uint16))
    with pytest.raises(DataError, match="0 tokens"):
        num_tokens(writer.paths[0])


def test_range_check_names_the_first_token_outside(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.data.shards.SCAN_TOKENS", 8)
    tokens = np.full(50, 9, np.uint16)
    check_range(tmp_path, tokens, 10)
    tokens[[21, 40]] = 10, 500
    with pytest.raises(DataError, match=r"token 10 at position 21, .*vocabulary of 10"):
        check_range(tmp_path, tokens, 10)


@pytest.mark.parametrize("scan", [3, 1000])
def test_documents_begin_at_bos_and_at_the_start(monkeypatch, scan: int) -> None:
    monkeypatch.setattr("trainer.data.documents.SCAN_TOKENS", scan)
    with_bos = np.array([1, 5, 6, 1, 1, 7], np.uint16)
    assert document_starts(with_bos).tolist() == [0, 3, 4]
    assert document_lengths(with_bos).tolist() == [3, 1, 2]
    without = np.array([8, 8, 1, 7], np.uint16)
    assert document_starts(without).tolist() == [0, 2]
    assert document_lengths(without).tolist() == [2, 2]
    assert document_starts(np.array([5, 5], np.uint16)).tolist() == [0]
    assert document_starts(np.array([], np.uint16)).tolist() == []
