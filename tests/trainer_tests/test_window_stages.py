"""Windows that grow: their text, YaRN's numbers, what a model sees in each stage, and a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer_tests.architectures import BASE
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer.attention import select_backend
from trainer.config import ModelConfig
from trainer.config.window_stages import (
    WindowStage,
    parse_window_stages,
    score_scale,
    stretched,
    window_stage_at,
)
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.model.gpt import GPT
from trainer.recipes import RECIPES
from trainer.report import NullReporter

SDPA = select_backend("sdpa", "cpu", lambda line: None)
PUBLISHED = "256:768,768:1792@0.272727,1280:2048@0.590909"
STAGED = {"window": 4, "window_layers": "SSL", "window_stages": "2:5,4:9@0.5"}


def build(**settings: Any) -> GPT:
    torch.manual_seed(3)
    model = GPT(ModelConfig(**(BASE | settings)), SDPA, 40).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def rows(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, BASE["vocab_size"], (2, num_tokens), generator=generator)


def test_stages_are_read_and_followed() -> None:
    stages = parse_window_stages("2:4,4:8@0.25,6:8@.5")
    assert stages == (WindowStage(2, 4, 0), WindowStage(4, 8, 0.25), WindowStage(6, 8, 0.5))
    shares = (0.0, 0.249, 0.25, 0.5, 1.0)
    assert [window_stage_at(stages, share) for share in shares] == [0, 0, 1, 2, 2]
    assert window_stage_at((), 0.7) == 0 and parse_window_stages("") == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("4:2", "SHORT must not be above LONG"),
        ("2:8,4:6@0.5", "nor LONG shrink"),
        ("2:4@0.1", "no stage"),
        ("2:4,4:8", "no stage"),
        ("2:4,3:6@0.5,4:8@0.5", "raise its share"),
        ("2-4", "SHORT:LONG"),
    ],
)
def test_a_bad_text_is_told_with_the_setting(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.window_stages: .*{complaint}"):
        ModelConfig(**(BASE | {"window": 4, "window_layers": "SSL", "window_stages": text}))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"window": 3}, r"model\.window = 3; make them equal"),
        ({"iha": "interleaved"}, r"model\.iha = 'interleaved'"),
        ({"rope_ntk_len": 8}, r"model\.rope_ntk_len = 8"),
        ({"half_rope": True}, r"model\.half_rope = True"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**(BASE | STAGED | settings))


def test_a_window_wider_than_any_row_is_refused() -> None:
    settings = {"model.window": 1280, "model.window_layers": "SSSL", "data.seq_len": 1024}
    with pytest.raises(ConfigError, match=r"model\.window_stages = .* is above 1024"):
        RECIPES["golf_baseline"].build().with_overrides(
            settings | {"model.window_stages": "256:768,1280:2048@0.5"}
        )


def test_yarn_is_the_published_one() -> None:
    """slowrun's final scale of the scores at heads of 128, and its rule for a frequency."""
    stages = parse_window_stages(PUBLISHED)
    assert score_scale(stages) / math.sqrt(128) == pytest.approx(0.10613, abs=1e-5)
    assert score_scale(stages[:1]) == 1.0
    plain = [10_000 ** (-2 * j / 128) for j in range(64)]
    got = stretched(plain, stages)
    assert stretched(plain, stages[:1]) == plain
    assert got[0] == plain[0]  # 122 turns within 768 tokens
    assert got[-1] == pytest.approx(plain[-1] * 768 / 2048)  # 0.01 turns
    want = plain[20]
    for old, new in ((768, 1792), (1792, 2048)):
        gamma = np.clip((old * want / (2 * np.pi) - 1) / 31, 0, 1)
        want = want * ((1 - gamma) * old / new + gamma)
    assert got[20] == pytest.approx(want) and want < plain[20]


def test_one_stage_as_wide_as_the_row_is_the_model_without_stages() -> None:
    tokens = rows(20)
    plain = build(window=4, window_layers="SSL")
    staged = build(window=4, window_layers="SSL", window_stages="4:19")
    assert torch.equal(plain.logits(tokens), staged.logits(tokens))


@pytest.mark.parametrize("fused", [{}, {"iha": "fused"}])
@pytest.mark.parametrize(("stage", "reach"), [(0, 2 + 5), (1, 4 + 9)])
def test_a_stage_reaches_as_far_as_its_windows_and_sees_nothing_ahead(
    stage: int, reach: int, fused: dict[str, str]
) -> None:
    """Of two layers, one short and one long; every place of a row in turn."""
    settings = STAGED | {"num_layers": 2, "window_layers": "SL"} | fused
    model, tokens = build(**settings), rows(30)
    with torch.no_grad(), model.in_window_stage(stage):
        before = model.logits(tokens)
        for place in (0, 7, 15):
            changed = tokens.clone()
            changed[:, place] = tokens[:, place] % 17 + 2
            moved = (model.logits(changed) - before).abs().amax((0, 2))
            seen = torch.nonzero(moved).flatten().tolist()
            assert (seen[0], seen[-1]) == (place, min(29, place + reach))


def test_outside_a_stage_the_last_one_holds() -> None:
    model, tokens = build(**STAGED), rows(20)
    with model.in_window_stage(1):
        last = model.logits(tokens)
    assert torch.equal(model.logits(tokens), last)
    with model.in_window_stage(0):
        assert not torch.equal(model.logits(tokens), last)
    assert model.stage_now == 1


def test_a_stage_scales_scores_and_stretches_positions() -> None:
    """Against a model whose first layers are told by hand."""
    model, tokens = build(**STAGED), rows(12)
    by_hand = build(window=4, window_layers="SSL")
    stages = parse_window_stages(STAGED["window_stages"])
    width = BASE["model_dim"] // BASE["num_heads"]
    base = model.config.rope_base
    plain = [base ** (-2 * j / width) for j in range(width // 2)]
    angle = torch.outer(
        torch.arange(40.0, dtype=torch.float64), torch.tensor(stretched(plain, stages))
    )
    by_hand.rotary.cos, by_hand.rotary.sin = angle.cos().float(), angle.sin().float()
    model.rotary.float()  # tables as fp32 in both
    with torch.no_grad():
        for block in by_hand.blocks:
            block.attn.q_gain *= 1 + 0.2 * math.log(9 / 5)
    # Rows of ten tokens: the long window of 9 is all of them.
    got, want = model.logits(tokens[:, :10]), by_hand.logits(tokens[:, :10])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_compiles_to_one_graph_in_each_stage() -> None:
    torch._dynamo.reset()
    model, tokens = build(**STAGED), rows(12)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for stage in (0, 1):
        with model.in_window_stage(stage):
            got = compiled(tokens[:, :-1], tokens[:, 1:])
            torch.testing.assert_close(got, model(tokens[:, :-1], tokens[:, 1:]))


def test_a_run_goes_through_its_stages_and_is_scored_in_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(4, 16, 3000).astype(np.uint16)
    folder = write_folder(tmp_path / "data", tokens[:2000], tokens[2000:], tokens_per_shard=2000)
    small = {
        "model.vocab_size": VOCAB_SIZE,
        "model.model_dim": 16,
        "model.num_layers": 2,
        "model.window": 8,
        "model.window_layers": "SL",
        "model.window_stages": "2:4,4:8@0.5,8:16@0.75",
        "data.dir": str(folder),
        "data.seq_len": 16,
        "data.batch_tokens": 64,
        "data.micro_batch_tokens": 64,
        "evaluate.seq_len": 16,
        "evaluate.batch_tokens": 256,
        "schedule.progress": "steps",
        "budget.max_steps": 4,
        "runtime.prime_steps": 1,
    }
    config = RECIPES["tiny"].build().with_overrides(small)
    seen: list[tuple[bool, int]] = []
    run_blocks = GPT._unet

    def spy(self: GPT, *rest: Any) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), self.stage_now))
        return run_blocks(self, *rest)

    monkeypatch.setattr(GPT, "_unet", spy)
    train(config, NullReporter(), tmp_path / "out")
    assert [stage for trains, stage in seen if trains] == [0, 1, 2, 0, 0, 1, 2]  # primed first
    assert {stage for trains, stage in seen if not trains} == {2}
