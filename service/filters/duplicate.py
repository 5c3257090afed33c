"""Duplicate: the same digest, seed included, computes the same result; ask the earlier trial."""

from __future__ import annotations


class Duplicates:
    """Which trial owns a digest. Failed trials own nothing: they said nothing about the digest."""

    def __init__(self) -> None:
        self._owner: dict[str, int] = {}

    def claim(self, digest: str, number: int) -> int | None:
        """The trial that has this digest already, finished or not; None = it is `number`'s now."""
        owner = self._owner.setdefault(digest, number)
        return None if owner == number else owner

    def release(self, digest: str, number: int) -> None:
        """Forget a trial that failed or was put back in the queue."""
        if self._owner.get(digest) == number:
            del self._owner[digest]
