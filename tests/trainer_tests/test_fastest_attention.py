"""`runtime.attention = fastest`: what it takes where what runs. CPU, with a table of stand-ins."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.plain_attention import plain_attention
from trainer.attention import ATTENTION, Documents, select_backend
from trainer.attention.base import Attend, Backend
from trainer.attention.measured import TABLE, Row, build_fastest, fastest_of, nearest
from trainer.errors import BackendError


def stand_ins(missing: dict[str, str]) -> tuple[dict[str, Backend], list[tuple[str, Any]]]:
    """The table's backends as plain attention that notes its calls; `missing` cannot run."""
    calls: list[tuple[str, Any]] = []

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, /, **options: Any) -> Tensor:
        calls.append((name, options["window"]))
        return plain_attention(q, k, v, window=options["window"])

    def backend(name: str) -> Backend:
        built: Attend = partial(attend, name)
        return Backend(name, lambda device, log: built, lambda device: missing.get(name))

    return {name: backend(name) for name in ATTENTION}, calls


def qkv(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, num_tokens, h, 4, generator=generator) for h in (2, 1, 1)]


def test_every_line_is_served_by_its_fastest_backend_that_runs() -> None:
    lines: list[str] = []
    backends, calls = stand_ins({})
    attend = build_fastest(backends, "cuda", lines.append, windowed=True, documents=False)
    for window in (None, 3):
        inputs = qkv(16)
        torch.testing.assert_close(
            attend(*inputs, window=window), plain_attention(*inputs, window=window)
        )
    assert calls == [("flash4", None), ("flash4", 3)]
    assert sum("takes flash4" in line for line in lines) == 4
    assert len(set(lines)) == len(lines)


def test_what_cannot_run_is_passed_over_and_told() -> None:
    lines: list[str] = []
    backends, calls = stand_ins({"flash4": "it cannot be imported"})
    attend = build_fastest(backends, "cuda", lines.append, windowed=True, documents=False)
    attend(*qkv(16)), attend(*qkv(16), window=2)
    assert calls == [("cudnn", None), ("flex", 2)]
    assert "attention: fastest passes over flash4: it cannot be imported" in lines


def test_float32_leaves_flash_attention_out() -> None:
    backends, calls = stand_ins({})
    attend = build_fastest(backends, "cuda", lambda line: None, True, False, half=False)
    attend(*qkv(16), window=2)
    assert calls == [("flex", 2)]


def test_documents_go_to_what_skips_blocks() -> None:
    backends, calls = stand_ins({})
    attend = build_fastest(backends, "cuda", lambda line: None, windowed=False, documents=True)
    attend(*qkv(16), documents=Documents(torch.ones(1, 16, dtype=torch.int64), 1))
    assert calls == [("flex", None)]


def test_nothing_that_runs_is_an_error() -> None:
    backends, _ = stand_ins(dict.fromkeys(ATTENTION, "no"))
    with pytest.raises(BackendError, match="'fastest': no backend runs full attention here"):
        build_fastest(backends, "cuda", lambda line: None, False, False)


def test_the_nearest_measured_length_decides() -> None:
    rows: list[Any] = [(2048, "short"), (6144, "long")]
    lengths = [1, 2048, 3000, 4096, 6144, 9999]
    assert [nearest(rows, n) for n in lengths] == ["short"] * 3 + ["long"] * 3


def test_a_line_is_ordered_by_its_figures() -> None:
    row = Row("full", 1, {"flex": 2.0, "sdpa": 1.0, "cudnn": 3.0})
    assert fastest_of(row, {"flex": None, "sdpa": None}) == "sdpa"
    assert fastest_of(row, {"flex": None, "sdpa": "no"}) == "flex"
    assert all(set(row.milliseconds) <= set(ATTENTION) for row in TABLE)


def test_on_cpu_it_is_sdpa_and_cudnn_says_why_not() -> None:
    lines: list[str] = []
    inputs = qkv(9)
    attend = select_backend("fastest", "cpu", lines.append, windowed=True)
    torch.testing.assert_close(attend(*inputs, window=2), plain_attention(*inputs, window=2))
    assert lines[0] == "attention: fastest takes sdpa for full rows of about 0"
    with pytest.raises(BackendError, match=r"'cudnn': it runs on cuda, not on cpu; set runtime"):
        select_backend("cudnn", "cpu", lambda line: None)
