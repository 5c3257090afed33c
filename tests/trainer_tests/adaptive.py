"""A small transformer, a text and a scorer that remembers, for tests of test-time training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.trainer_tests.small_data import VOCAB_SIZE, random_tokens, write_folder
from trainer.attention import select_backend
from trainer.config import EvaluateConfig, ModelConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.scorer import Scorer
from trainer.evaluate.subject import Subject
from trainer.model.gpt import GPT

CPU_GROUP = Group(torch.device("cpu"))


def repeating_tokens(count: int, bos_every: int = 61) -> np.ndarray:
    """A few phrases again and again, some tokens replaced, BOS now and then."""
    generator = np.random.default_rng(3)
    phrases = generator.integers(4, VOCAB_SIZE, (4, 9)).astype(np.uint16)
    tokens = phrases[generator.integers(0, 4, count)].reshape(-1)[:count]
    noise = generator.random(count) < 0.05
    tokens[noise] = generator.integers(4, VOCAB_SIZE, noise.sum())
    tokens[::bos_every] = 1
    return tokens


def open_text(folder: Path, val: np.ndarray) -> Dataset:
    return Dataset.open(write_folder(folder, random_tokens(99), val, 400))


def small_gpt(**settings: object) -> GPT:
    """Weights large enough that attention and order matter."""
    torch.manual_seed(2)
    shape = ModelConfig.model_validate(
        {
            "vocab_size": VOCAB_SIZE,
            "num_layers": 3,
            "model_dim": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            **settings,
        }
    )
    model = GPT(shape, select_backend("sdpa", "cpu", lambda line: None), max_seq_len=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


class RememberingScorer(Scorer):
    """Keeps the nats of every target by its index."""

    nats: dict[int, float]

    def _record(
        self, nats_BT: Tensor, bytes_BT: Tensor, indices_BT: Tensor, counted_BT: Tensor
    ) -> None:
        super()._record(nats_BT, bytes_BT, indices_BT, counted_BT)
        found = zip(indices_BT[counted_BT].tolist(), nats_BT[counted_BT].tolist(), strict=True)
        self.nats.update(found)


class RememberingSubject(Subject):
    """A Subject whose last scorer can be asked afterwards."""

    nats: dict[int, float]

    def scorer(self, config: EvaluateConfig) -> Scorer:
        scorer = super().scorer(config)
        scorer.__class__ = RememberingScorer
        assert isinstance(scorer, RememberingScorer)
        scorer.nats = {}
        object.__setattr__(self, "nats", scorer.nats)
        return scorer


def subject(
    dataset: Dataset, group: Group = CPU_GROUP, model: GPT | None = None, micro: int = 1 << 20
) -> RememberingSubject:
    model = model or small_gpt()
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, VOCAB_SIZE)
    return RememberingSubject(model, model, dataset, table, micro, group)
