"""Published shards and their tokenizer, downloaded through huggingface_hub and counted.

The challenge's repositories have a manifest.json that lists data sets with their numbers of files
and tokens. It is fetched anew each time: an old copy does not know of later variants. Shards go
through huggingface_hub's own cache, so an interrupted download goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.data.build_folder import build_folder, sole_maker
from trainer.data.case_marks import case_mark_ids
from trainer.data.dataset import Dataset
from trainer.data.encode import Progress, describe_dataset
from trainer.data.manifest import read_manifest
from trainer.data.shards import num_tokens
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import DataError

REPOSITORY = "willdepueoai/parameter-golf"
ROOT = "datasets"
"""Folder of the repository that holds the manifest."""
SCORED_TOKENS: Mapping[tuple[str, str], tuple[int, int]] = {
    (REPOSITORY, "sp1024"): (1024, 62_021_632),
    ("kevclark/parameter-golf", "sp4096"): (2048, 45_508_608),
    ("kevclark/parameter-golf", "sp8192"): (2048, 40_540_160),
    ("romeerp/parameter-golf-caseops-v1", "sp8192_lossless_caps_caseops_v1_reserved"): (
        2048,
        47_851_520,
    ),
}
"""(repository, variant) -> (row length, validation tokens scored at it), as the published logs have
them. A truncated validation shard once went unnoticed in published runs."""


def fetch(
    variant: str,
    out: Path,
    num_train_shards: int | None = 1,
    repository: str = REPOSITORY,
    root: str = ROOT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Download a variant into the folder `out`, all validation shards and the tokenizer included,
    and the byte side-car when the tokenizer is a CaseOps one.

    Args:
        variant: such as "sp1024": the data set fineweb10B_<variant> of the manifest.
        out: folder to make; a folder of shards is replaced, any other refused.
        num_train_shards: of 100 M tokens each; None = all.
        repository: a Hugging Face data set repository. HF_ENDPOINT, HF_TOKEN and HF_HOME mean what
            they mean to huggingface_hub.
        root: folder of the repository that holds manifest.json; "" = its top.
        progress: called with ("download", files done, files in all).

    Returns {dir, vocab_size, train_tokens, val_tokens, digest}. Raises DataError when the download
    fails, the manifest lacks the variant or as many shards, or a count differs from it.
    """
    manifest = _read_remote_manifest(repository, root)
    entry = _named(manifest, "datasets", f"fineweb10B_{variant}")
    tokenizer = _named(manifest, "tokenizers", entry.get("tokenizer_name"))
    stats = entry.get("stats") or {}
    names = _shard_names(variant, stats, num_train_shards)
    remote = [_join(root, "datasets", entry["name"], name) for name in names]
    remote.append(_join(root, tokenizer["model_path"]))
    with sole_maker(out), build_folder(out) as folder:
        for done, path in enumerate(remote, start=1):
            _place(_download(repository, path), folder / path.rsplit("/", 1)[-1])
            if progress is not None:
                progress("download", done, len(remote))
        _place_side_car(repository, remote, folder)
        _check_counts(variant, folder, names, stats)
        dataset = Dataset.open(folder)
        dataset.read_val_bytes()
        if scored := SCORED_TOKENS.get((repository, variant)):
            dataset.check_scored_tokens(*scored)
        made = read_manifest(folder)
    assert made is not None
    return describe_dataset(out, made)


def _place_side_car(repository: str, remote: list[str], folder: Path) -> None:
    """`remote`: the shards, then the tokenizer."""
    if not case_mark_ids(load_tokenizer(folder / remote[-1].rsplit("/", 1)[-1])):
        return
    for folder_name, _, name in (path.rpartition("/") for path in remote[:-1]):
        if "_val_" in name:
            name = name.replace("_val_", "_val_bytes_")
            _place(_download(repository, f"{folder_name}/{name}"), folder / name)


def _read_remote_manifest(repository: str, root: str) -> dict[str, Any]:
    path = _download(repository, _join(root, "manifest.json"), force=True)
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(
            f"{repository}: its manifest.json is not JSON ({error}); check the repository"
        ) from None
    return dict(manifest)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _named(manifest: dict[str, Any], kind: str, name: str | None) -> dict[str, Any]:
    entries = {entry.get("name"): entry for entry in manifest.get(kind, [])}
    if name not in entries:
        raise DataError(
            f"the manifest has no {kind} entry {name}; it has "
            f"{', '.join(sorted(map(str, entries))) or 'none'}"
        )
    return dict(entries[name])


def _shard_names(variant: str, stats: Mapping[str, Any], num_train: int | None) -> list[str]:
    available = {split: int(stats.get(f"files_{split}", 0)) for split in ("train", "val")}
    if num_train is None:
        num_train = available["train"]
    if not 1 <= num_train <= available["train"]:
        raise DataError(
            f"{num_train} training shards of {variant} asked for, the manifest has "
            f"{available['train']}; ask for 1 to {available['train']}"
        )
    counts = {"train": num_train, "val": available["val"]}
    return [
        f"fineweb_{split}_{index:06d}.bin" for split in counts for index in range(counts[split])
    ]


def _check_counts(variant: str, folder: Path, names: list[str], stats: Mapping[str, Any]) -> None:
    for split in ("train", "val"):
        paths = [folder / name for name in names if f"_{split}_" in name]
        found = sum(num_tokens(path) for path in paths)
        expected = stats.get(f"tokens_{split}")
        is_whole = len(paths) == int(stats[f"files_{split}"])
        if expected is not None and is_whole and found != int(expected):
            raise DataError(
                f"{variant}: {found} {split} tokens downloaded, the manifest states {expected}; "
                "empty huggingface_hub's cache of this repository and fetch again"
            )


def _download(repository: str, path: str, force: bool = False) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DataError(
            "downloading needs huggingface_hub; install it with `pip install huggingface_hub`"
        ) from None
    try:
        local = hf_hub_download(repository, path, repo_type="dataset", force_download=force)
    except Exception as error:  # each major version has another network library's errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{repository}: cannot download {path} ({reason}); check the network, HF_ENDPOINT and "
            "the repository's name"
        ) from error
    return Path(local).resolve()


def _place(source: Path, target: Path) -> None:
    # A hard link costs no space; the cache may lie on another file system.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
