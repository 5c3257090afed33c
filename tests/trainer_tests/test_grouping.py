"""Streams of codes by role: exact round trips, orders in plain Python, hostile files. CPU."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer_tests.test_artifact import _assert_same
from trainer import artifact
from trainer.artifact import _checksum
from trainer.compress import CODECS
from trainer.compress.grouping import ORDERS, near_rows_first, place
from trainer.config import QuantizeConfig, TrainConfig
from trainer.errors import ArtifactError
from trainer.quantize import QuantizedState, quantize
from trainer.streams import gather

GROUPINGS = ("type", "role", "role_transposed", "role_sorted")


def _model() -> QuantizedState:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tok_emb.weight": (30, 12),
        "blocks.0.attn.q.weight": (12, 12),
        "blocks.0.attn.k.weight": (6, 12),
        "blocks.0.attn.out.weight": (12, 12),
        "blocks.0.mlp.up.weight": (24, 12),
        "blocks.0.mlp.down.weight": (12, 24),
        "blocks.0.attn_scale": (12,),
        "bigram.table.weight": (9, 5),
        "thin": (1, 40),
        "none": (0, 5),
    }
    state = {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    settings: dict[str, Any] = {"low_rank": "asymmetric", "scale_bits": 8, "embed_bits": 7}
    return quantize(state, QuantizeConfig(scheme="int6", keep_float_max_numel=0, **settings))


def _config(grouping: str, codec: str = "brotli", shuffled: bool = False) -> TrainConfig:
    return TrainConfig().with_overrides(
        {
            "compress.grouping": grouping,
            "compress.codec": codec,
            "compress.byte_shuffle": shuffled,
        }
    )


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_array_comes_back_bit_for_bit(grouping: str, codec: str, shuffled: bool) -> None:
    model, config = _model(), _config(grouping, codec, shuffled)
    found_config, found = artifact.decode(artifact.encode(model, config))
    assert found_config == config
    _assert_same(found, model)


def test_streams_hold_one_role_each_column_after_column() -> None:
    model = _model()
    codes = {name: t.arrays["codes"] for name, t in model.tensors.items() if "codes" in t.arrays}
    q, out = codes["blocks.0.attn.q.weight"], codes["blocks.0.attn.out.weight"]
    by_role = gather(model, "role")
    assert by_role["|i1.qo"] == q.tobytes() + out.tobytes()
    assert set(by_role) == {"|i1.embed", "|i1.qo", "|i1.kv", "|i1.up", "|i1.down", "|i1.rest",
                            "|i1", "|u1", "<f2", "<f4"}  # fmt: skip
    turned = gather(model, "role_transposed")
    columns = [bytes(matrix[:, j].tobytes()) for matrix in (q, out) for j in range(12)]
    assert turned["|i1.qo"] == b"".join(columns)
    assert gather(model, "type")["|i1"] != turned["|i1"]
    near = gather(model, "role_sorted")
    orders = np.frombuffer(near[ORDERS], "<u2")
    assert len(orders) == 30 + 12 + 24  # embedding, query, up; nothing else
    up = codes["blocks.0.mlp.up.weight"]
    assert near["|i1.up"] == up[orders[42:]].T.tobytes()
    assert near["|i1.down"] == turned["|i1.down"]


def _row_distance(rows: list[list[int]], last: list[int], row: int) -> int:
    return sum(abs(a - b) for a, b in zip(rows[row], last, strict=True))


def _plain_order(rows: list[list[int]]) -> list[int]:
    left, order = set(range(1, len(rows))), [0]
    while left:
        last = rows[order[-1]]
        order.append(min(left, key=partial(_row_distance, rows, last)))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_followed_by_its_nearest(seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-127, 128, (40, 33)).astype(np.int8)
    assert near_rows_first(codes).tolist() == _plain_order(codes.tolist())


def test_sorting_helps_where_rows_repeat() -> None:
    dice = np.random.default_rng(0)
    kinds = dice.integers(-9, 10, (8, 64))
    codes = (kinds[dice.integers(0, 8, 400)] + dice.integers(0, 2, (400, 64))).astype(np.int8)
    settings = QuantizeConfig(keep_float_max_numel=0, clip_percentile=100.0)
    model = quantize({"tok_emb.weight": torch.from_numpy(codes).float()}, settings)
    sizes = {name: len(artifact.encode(model, _config(name))) for name in GROUPINGS}
    assert sizes["role_sorted"] < 0.9 * sizes["role_transposed"]


def test_what_cannot_be_sorted_is_not() -> None:
    wide = place("role_sorted", "tok_emb.weight", "codes", "|i1", (1 << 17, 8))
    assert wide.is_transposed and not wide.is_sorted
    assert place("role_sorted", "tok_emb.weight", "scales", "<f2", (30,)) == ("<f2", False, False)
    assert place("role", "x", "codes", "|i1", (30, 4)).stream == "|i1.rest"


@pytest.mark.parametrize("order", [[0, 0], [0, 2], [65535, 0], [1, 1]])
def test_an_order_that_is_none_is_refused(order: list[int]) -> None:
    codes = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model = quantize({"tok_emb.weight": codes}, QuantizeConfig(keep_float_max_numel=0))
    config = TrainConfig().with_overrides({"compress.grouping": "role_sorted"})
    good = artifact.encode(model, config)
    packed = CODECS["zlib"].compress(np.array([0, 1], "<u2").tobytes(), 9)
    broken = CODECS["zlib"].compress(np.array(order, "<u2").tobytes(), 9)
    assert packed in good and len(packed) == len(broken)
    body = good[:-16].replace(packed, broken)
    with pytest.raises(ArtifactError, match="order of rows is none"):
        artifact.decode(body + _checksum(body))


def test_thousands_of_broken_files_are_refused_quickly() -> None:
    dice, blob = random.Random(0), artifact.encode(_model(), _config("role_sorted"))
    started = time.perf_counter()
    for _ in range(2000):
        broken = bytearray(blob[:-16])
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        if dice.random() < 0.3:
            del broken[dice.randrange(len(broken)) :]
        try:
            artifact.decode(bytes(broken) + _checksum(bytes(broken)))
        except ArtifactError:
            continue
    assert time.perf_counter() - started < 20
