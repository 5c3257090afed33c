"""The published recipes: their numbers, and small copies of them from first step to score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from tests.trainer_tests.small_recipes import SMALL
from trainer import artifact
from trainer.account import count_parameters
from trainer.layer_pattern import select_layers
from trainer.legality import illegal_in_use
from trainer.loop import train
from trainer.mix import Lane, lanes_of
from trainer.recipes import RECIPES
from trainer.report import NullReporter
from trainer.schedule import extra_weight_decay, lr_multiplier, muon_momentum

PR675 = RECIPES["pr675"].build()
PR1212 = RECIPES["pr1212"].build()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("golf_baseline", 17_059_912),
        ("pr675", 18_897_488),
        ("pr1212", 29_751_910),
        ("pr1894", 35_947_108),
        ("frontier", 35_945_671),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert count_parameters(RECIPES[name].build().model) == parameters


PUBLISHED_675: dict[str, Any] = {
    "model.num_layers": 10,
    "model.mlp_mult": 2.0,
    "model.leaky_slope": 0.5,
    "model.qk_gain_init": 1.5,
    "optim.matrix_lr": 0.04,
    "optim.scalar_lr": 0.04,
    "optim.tied_embed_lr": 0.05,
    "average.kind": "lawa",
    "average.interval": 50,
    "average.keep": 0,
    "data.seq_len": 1024,
    "data.batch_tokens": 524_288,
    "quantize.scheme": "int8",
    "quantize.method": "round",
    "compress.codec": "lzma",
    "evaluate.stride": 0,
}
PUBLISHED_1212: dict[str, Any] = {
    "model.num_layers": 12,
    "model.mlp_mult": 3.0,
    "model.leaky_slope": 0.5,
    "model.qk_gain_init": 2.5,
    "model.ln_scale": True,
    "model.gated_skips": True,
    "model.backout_layer": 7,
    "model.backout_init": 0.1,
    "model.bigram_buckets": 5120,
    "model.bigram_dim": 128,
    "model.smear": "channel",
    "model.value_embed_dim": 128,
    "model.value_embed_layers": "5,9,10",
    "model.window": 512,
    "model.xsa_last_n": 7,
    "model.rope_dims": 16,
    "model.rope_ntk_len": 1024,
    "optim.matrix_lr": 0.024,
    "optim.matrix_lr_late": 0.019,
    "optim.scalar_lr": 0.020,
    "optim.scalar_lr_late": 0.038,
    "optim.tied_embed_lr": 0.022,
    "optim.muon_momentum": 0.985,
    "optim.weight_decay": 0.04,
    "optim.grad_clip_norm": 0.3,
    "optim.muon_comm": "reduce_scatter",
    "loss.kind": "mile",
    "loss.mile_gamma": 0.75,
    "loss.mile_clamp_min": 0.2,
    "loss.mile_peak_frac": 0.4,
    "average.kind": "ema",
    "average.decay": 0.997,
    "quantize.method": "gptq",
    "quantize.calibration": "train",
    "quantize.reserve_seconds": 14.0,
    "compress.codec": "brotli",
    "compress.byte_shuffle": True,
    "evaluate.seq_len": 6144,
    "evaluate.stride": 128,
}

PUBLISHED_1894: dict[str, Any] = {
    "model.vocab_size": 8192,
    "model.num_layers": 11,
    "model.mlp_mult": 4.0,
    "model.qk_gain_init": 5.25,
    "model.rope_dims": 16,
    "model.rope_ntk_len": 0,
    "model.xsa_last_n": 0,
    "model.gated_skips": True,
    "model.ln_scale": True,
    "model.recur_visits": 3,
    "model.recur_first": 3,
    "model.recur_last": 5,
    "model.recur_skips": "plain",
    "model.recur_blend": "ab",
    "model.recur_a_init": 1.0,
    "model.recur_b_init": 0.0,
    "model.parallel": "joint",
    "model.parallel_start": 7,
    "optim.matrix_lr": 0.022,
    "optim.scalar_lr": 0.02,
    "optim.tied_embed_lr": 0.03,
    "optim.muon_momentum": 0.99,
    "optim.muon_momentum_warmup_start": 0.92,
    "optim.weight_decay": 0.095,
    "optim.scalar_weight_decay": 0.02,
    "optim.embed_weight_decay": 0.085,
    "optim.adam_beta2": 0.95,
    "optim.grad_clip_norm": 0.3,
    "schedule.warmdown_frac": 0.72,
    "schedule.recur_start": 0.42,
    "data.seq_len": 2048,
    "data.batch_tokens": 786_432,
    "average.kind": "none",
    "quantize.method": "gptq",
    "quantize.embed_bits": 8,
    "compress.codec": "brotli",
    "compress.byte_shuffle": True,
    "evaluate.seq_len": 2048,
    "evaluate.stride": 64,
}


@pytest.mark.parametrize(
    ("name", "published"),
    [("pr675", PUBLISHED_675), ("pr1212", PUBLISHED_1212), ("pr1894", PUBLISHED_1894)],
)
def test_settings_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    flat = RECIPES[name].build().flat()
    assert {path: flat[path] for path in published} == published


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_breaks_a_rule(name: str) -> None:
    assert illegal_in_use(RECIPES[name].build()) == {}


def test_shares_of_the_budget_are_the_published_steps() -> None:
    assert PR1212.schedule.warmdown_frac * 8428 == pytest.approx(4000)
    assert lr_multiplier(PR1212.schedule, 0, 1 - 2000 / 8428) == pytest.approx(0.5)
    assert muon_momentum(PR1212.optim, 0, 0.0) == pytest.approx(0.92)
    assert muon_momentum(PR1212.optim, 9, 750 / 8428) == pytest.approx((0.92 + 0.985) / 2)
    assert muon_momentum(PR1212.optim, 9, 1500 / 8428) == pytest.approx(0.985)
    assert PR1212.step_seconds == 586


def test_pr675_averages_below_half_of_the_rate_while_decay_grows() -> None:
    assert lr_multiplier(PR675.schedule, 0, PR675.average.start) == pytest.approx(0.5)
    snapshots = (1 - PR675.average.start) * 1399 / PR675.average.interval
    assert round(snapshots) == 12, "and the final weights"
    decay = [PR675.optim.weight_decay + extra_weight_decay(PR675.optim, m) for m in (1, 0.5, 0)]
    assert decay == pytest.approx([0.02, 0.05, 0.08])


def test_frontier_is_that_of_the_record() -> None:
    config = RECIPES["frontier"].build()
    model = config.model
    assert (model.num_skips, model.num_recur_skips, len(model.visit_order(3))) == (5, 3, 17)
    assert (model.parallel, model.parallel_start, model.parallel_merge) == ("lanes", 8, "mean")
    assert (model.attn_gate, model.attn_gate_scale, model.smear) == ("sparse", 0.5, "token")
    assert model.mask_documents and model.xsa_last_n == 11
    assert (config.schedule.warmdown_frac, config.schedule.min_lr) == (0.85, 0.1)
    assert (config.schedule.recur_start, config.average.decay) == (0.35, 0.9965)
    assert muon_momentum(config.optim, 9, 1500 / 4931) == pytest.approx(0.97)
    used = config.with_overrides({"model.parallel_factors": "used"})
    assert count_parameters(model) - count_parameters(used.model) == 8 * 6


def test_windows_and_lanes_of_pr1212() -> None:
    model = PR1212.model
    assert select_layers(model.window_layers, 12) == (2, 4, 6, 8, 10)
    assert [model.window_of(layer) for layer in range(3)] == [None, None, 512]
    assert lanes_of(PR1212.data) == (Lane(2048, 36),) * 5 + (Lane(6144, 12),) * 3
    published = PR1212.with_overrides(
        {
            "data.mix": "5x2048@36+3x6144@10",
            "data.batch_tokens": 552_960,
            "data.mix_weighting": "worker",
        }
    )
    assert [lane.num_tokens for lane in lanes_of(published.data)] == [73_728] * 5 + [61_440] * 3


def test_bits_of_pr1212_are_six_in_the_blocks_and_eight_in_the_tables() -> None:
    bits = {
        name: PR1212.quantize.bits_of(name, 12)
        for name in (
            "blocks.3.attn.q.weight",
            "blocks.3.mlp.down.weight",
            "tok_emb.weight",
            "bigram.table.weight",
            "value_embed.table.weight",
        )
    }
    assert list(bits.values()) == [6, 6, 8, 8, 8]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that mostly follow from the one before, in documents of about a hundred."""
    generator = np.random.default_rng(0)
    tokens = np.empty(30_000, dtype=np.uint16)
    tokens[0] = 1
    for index in range(1, len(tokens)):
        follows = 4 + (int(tokens[index - 1]) * 7 + 3) % (VOCAB_SIZE - 4)
        tokens[index] = follows if generator.random() < 0.9 else generator.integers(4, VOCAB_SIZE)
    tokens[::97] = 1
    folder = tmp_path_factory.mktemp("recipes") / "data"
    return write_folder(folder, tokens[:28_000], tokens[28_000:], tokens_per_shard=8000)


@pytest.mark.parametrize("name", SMALL)
def test_small_copy_trains_quantises_packs_and_scores(
    name: str, data_dir: Path, tmp_path: Path
) -> None:
    config = (
        RECIPES[name]
        .build()
        .with_overrides(
            {
                "model.vocab_size": VOCAB_SIZE,
                "data.dir": str(data_dir),
                "evaluate.batch_tokens": 768,
                "schedule.progress": "steps",
                "budget.train_seconds": None,
                "runtime.prime_steps": 1,
                **SMALL[name],
            }
        )
    )
    result = train(config, NullReporter(), tmp_path)
    assert (result.status, result.steps, result.illegal) == ("finished", 24, {})
    assert result.num_params == count_parameters(config.model)
    averaged = {"averaged"} if config.average.kind != "none" else set()
    assert set(result.stages) == {"trained", config.evaluate.method} | averaged
    assert result.val_bpb == result.stages[config.evaluate.method]
    assert ("calibrate" in result.phases) == (config.quantize.method == "gptq")
    guessing = math.log(VOCAB_SIZE)
    assert result.val_loss is not None and result.val_loss < guessing
    _, quantized = artifact.decode((tmp_path / "artifact.bin").read_bytes())
    schemes = {tensor.scheme.split("+")[0] for tensor in quantized.tensors.values()}
    assert {"pr675": {"int8"}}.get(name, {"int6", "int8"}) <= schemes
