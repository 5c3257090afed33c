"""Make a data folder whole or not at all, with only one maker at a time.

Work happens in a hidden folder beside the target and is renamed into place at the end, so a crash
at any moment leaves at most the hidden folder, which the next attempt removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import DataError

OUR_SUFFIXES = (".bin", ".model", ".json")
CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def sole_maker(out: Path) -> Iterator[None]:
    """Wait until no other process makes a folder beside `out`, and keep others waiting meanwhile.

    The lock is on the parent folder itself and dies with the process. Not reentrant. Raises
    DataError when the parent folder cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(out.parent, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{out}: cannot make a folder there ({error.strerror}); choose another --out"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def build_folder(out: Path) -> Iterator[Path]:
    """A fresh hidden folder that takes the place of `out` when the block ends well.

    Call under `sole_maker`. An `out` that holds nothing but files of ours is replaced. Raises
    DataError when it holds anything else, when the device is full, or may not be written to.
    """
    check_replaceable(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        _put_in_place(partial, out)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise DataError(
            f"{out}: cannot write there ({error.strerror}); free space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raises DataError when `out` exists and is anything but a folder of shards of ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file, expected a folder; choose another --out")
    foreign = sorted(path.name for path in out.iterdir() if path.suffix not in OUR_SUFFIXES)
    if foreign:
        raise DataError(
            f"{out}: holds files that are not a data set's ({', '.join(foreign[:3])}); choose "
            "another --out"
        )


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
