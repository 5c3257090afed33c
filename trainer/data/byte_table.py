"""How many bytes of text a token stands for: the denominator of bits per byte.

A token's bytes depend on the token before it: the space in front of a word is not counted when the
previous token is a boundary (BOS and other control pieces), because nothing is decoded there. The
rules are the challenge's, so that scores compare.

For text on which the tokenizer's normaliser is the identity, the bytes of a document equal
len(text.encode()). For other text they equal those of the normalised text. A tokenizer without byte
pieces spells rare characters as unknown, whose bytes, and the space after them, are not counted:
its scores look worse than they are and compare only with scores of the same tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.tokenizer import SPACE_MARK, load_tokenizer
from trainer.errors import DataError


@dataclass(frozen=True)
class ByteTable:
    """Three columns over the vocabulary, each [V]."""

    base_bytes: Tensor
    """int64: UTF-8 bytes of the piece without its leading space."""
    has_leading_space: Tensor
    """bool: the piece begins with a space."""
    is_boundary: Tensor
    """bool: control, unknown and unused pieces, and ids beyond the tokenizer's."""

    @classmethod
    def from_tokenizer(cls, path: str | Path, vocab_size: int) -> ByteTable:
        """The table of a SentencePiece model. Raises DataError when the tokenizer cannot be read or
        has more pieces than `vocab_size`."""
        tokenizer = load_tokenizer(Path(path))
        num_pieces = tokenizer.vocab_size()
        if num_pieces > vocab_size:
            raise DataError(
                f"{path}: has {num_pieces} pieces, more than the model's vocabulary of "
                f"{vocab_size}; set model.vocab_size = {num_pieces}"
            )
        base_bytes = torch.zeros(vocab_size, dtype=torch.int64)
        has_leading_space = torch.zeros(vocab_size, dtype=torch.bool)
        is_boundary = torch.ones(vocab_size, dtype=torch.bool)
        for token in range(num_pieces):
            if (
                tokenizer.is_control(token)
                or tokenizer.is_unknown(token)
                or tokenizer.is_unused(token)
            ):
                continue
            is_boundary[token] = False
            if tokenizer.is_byte(token):
                base_bytes[token] = 1
                continue
            piece = tokenizer.id_to_piece(token)
            has_leading_space[token] = piece.startswith(SPACE_MARK)
            base_bytes[token] = len(piece.removeprefix(SPACE_MARK).encode())
        return cls(base_bytes, has_leading_space, is_boundary)

    def to(self, device: torch.device) -> ByteTable:
        """The same table on another device."""
        return ByteTable(
            self.base_bytes.to(device),
            self.has_leading_space.to(device),
            self.is_boundary.to(device),
        )

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target, given the token before it. Integer tensors of one shape on the
        table's device; int64 of that shape comes back."""
        spaced = self.has_leading_space[targets] & ~self.is_boundary[previous]
        return self.base_bytes[targets] + spaced
