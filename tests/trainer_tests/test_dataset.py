"""Data folders: what is found, what is refused, and when content is read again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trainer_tests.small_data import (
    VOCAB_SIZE,
    random_tokens,
    tokenizer_bytes,
    write_folder,
    write_other_tokenizer,
)
from trainer.data.dataset import Dataset
from trainer.data.shards import HEADER_BYTES
from trainer.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", random_tokens(2500), random_tokens(1300, seed=1))


def patch_token(path: Path, position: int, token: int) -> None:
    """Change one token in place."""
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 2 * position)
        file.write(token.to_bytes(2, "little"))


def test_opens_shards_in_name_order(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert [path.name[-10:-4] for path in dataset.train_shards] == ["000000", "000001", "000002"]
    assert (dataset.vocab_size, dataset.train_tokens, dataset.val_tokens) == (
        VOCAB_SIZE,
        2500,
        1300,
    )
    assert dataset.read_val().tolist() == random_tokens(1300, seed=1).tolist()


def test_byte_sidecars_are_not_validation_shards(folder: Path) -> None:
    (folder / "small_val_bytes_000000.bin").write_bytes(b"not a shard")
    assert Dataset.open(folder).val_tokens == 1300


def test_digest_names_content_not_place_or_names(folder: Path, tmp_path: Path) -> None:
    digest = Dataset.open(folder).digest
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in folder.glob("small*"):
        shutil.copy(path, renamed / path.name.replace("small", "other"))
    assert Dataset.open(renamed).digest == digest
    patch_token(renamed / "other_train_000001.bin", 3, 99)
    (renamed / "dataset.json").unlink()
    assert Dataset.open(renamed).digest != digest


def test_scored_tokens_are_whole_rows_after_the_first_token(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.num_scored_tokens(100) == 1200
    assert dataset.num_scored_tokens(433) == 1299
    dataset.check_scored_tokens(100, 1200)
    dataset.check_scored_tokens(100, 0)
    with pytest.raises(DataError, match=r"would score 1200 tokens, but data\.val_tokens = 1299"):
        dataset.check_scored_tokens(100, 1299)
    with pytest.raises(DataError, match=r"not one row of evaluate\.seq_len = 1300"):
        dataset.check_scored_tokens(1300, 0)


def test_refuses_another_vocabulary_with_the_remedy(folder: Path) -> None:
    assert Dataset.open(folder, VOCAB_SIZE).vocab_size == VOCAB_SIZE
    with pytest.raises(DataError) as caught:
        Dataset.open(folder, 1024)
    for part in ("model.vocab_size = 1024", "400 pieces", "--set model.vocab_size=400"):
        assert part in str(caught.value)


@pytest.mark.parametrize("is_known", [False, True], ids=["first time", "with manifest"])
def test_finds_a_token_beyond_the_vocabulary_at_any_time(folder: Path, is_known: bool) -> None:
    if is_known:
        Dataset.open(folder)
    patch_token(folder / "small_train_000001.bin", 123, VOCAB_SIZE)
    with pytest.raises(DataError, match=r"small_train_000001\.bin: token 400 at position 123"):
        Dataset.open(folder)


def test_finds_content_that_is_not_the_manifest_s(folder: Path) -> None:
    Dataset.open(folder)
    patch_token(folder / "small_val_000000.bin", 5, 77)
    with pytest.raises(DataError, match=r"small_val_000000\.bin: content .* delete dataset\.json"):
        Dataset.open(folder)


def test_finds_missing_and_foreign_shards(folder: Path) -> None:
    Dataset.open(folder)
    (folder / "small_train_000001.bin").rename(folder / "small_train_000007.bin")
    with pytest.raises(DataError, match=r"missing small_train_000001\.bin; has small_train_000007"):
        Dataset.open(folder)


def test_finds_a_truncated_shard_behind_a_manifest(folder: Path) -> None:
    Dataset.open(folder)
    os.truncate(folder / "small_val_000001.bin", HEADER_BYTES + 100)
    with pytest.raises(DataError, match=r"small_val_000001\.bin: truncated"):
        Dataset.open(folder)


def test_an_untouched_shard_is_not_read_again(folder: Path, monkeypatch) -> None:
    first = Dataset.open(folder)
    reads: list[Path] = []
    monkeypatch.setattr("trainer.data.manifest.open_shard", lambda path: reads.append(path))
    assert Dataset.open(folder) == first
    assert reads == []


def test_a_copied_folder_is_read_again_and_accepted(folder: Path) -> None:
    first = Dataset.open(folder)
    for path in folder.glob("*.bin"):
        os.utime(path, ns=(1, 1))
    assert Dataset.open(folder).digest == first.digest
    stated = json.loads((folder / "dataset.json").read_text())
    assert {shard["mtime_ns"] for shard in stated["shards"]} == {1}


def test_a_foreign_tokenizer_is_refused(folder: Path) -> None:
    Dataset.open(folder)
    write_other_tokenizer(folder / "small.model", VOCAB_SIZE)
    assert (folder / "small.model").read_bytes() != tokenizer_bytes()
    with pytest.raises(DataError, match="not the tokenizer that the shards were made with"):
        Dataset.open(folder)


def test_a_broken_manifest_is_named(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"dataset\.json: not a data manifest"):
        Dataset.open(folder)


def test_tokenizer_in_the_challenge_s_layout_is_chosen_by_vocabulary(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "datasets" / f"fineweb10B_sp{VOCAB_SIZE}", random_tokens(300), random_tokens(200)
    )
    tokenizers = tmp_path / "tokenizers"
    tokenizers.mkdir()
    (folder / "small.model").rename(tokenizers / "fineweb_400_bpe.model")
    write_other_tokenizer(tokenizers / "fineweb_350_bpe.model", 350)
    assert Dataset.open(folder).tokenizer_path.name == "fineweb_400_bpe.model"
    (tokenizers / "fineweb_400_bpe.model").unlink()
    with pytest.raises(DataError, match="with 400 pieces"):
        Dataset.open(folder)


def test_names_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such data folder; .*caddie data demo"):
        Dataset.open(tmp_path / "none")
    folder = write_folder(tmp_path / "data", random_tokens(30), random_tokens(20))
    (folder / "small.model").rename(tmp_path / "small.model")
    with pytest.raises(DataError, match=r"SentencePiece \.model beside the shards.*found none"):
        Dataset.open(folder)
    (folder / "small.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Dataset.open(folder)
    (folder / "small_val_000000.bin").unlink()
    with pytest.raises(DataError, match="no shard named"):
        Dataset.open(folder)


def test_a_folder_that_cannot_be_written_to_works_without_a_manifest(folder: Path) -> None:
    (folder / f".dataset.json.{os.getpid()}").mkdir()  # in the way of the manifest, also for root
    assert np.array_equal(Dataset.open(folder).read_val(), random_tokens(1300, seed=1))
    assert not (folder / "dataset.json").exists()
