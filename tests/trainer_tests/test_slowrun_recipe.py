"""The recipe of slowrun #78: its published numbers, and its copy for a CPU from step to score.

What an implementation of slowrun can be held to, and the tests that hold this one to it:

1. Fused identities are no mixing, to the bit: test_iha
   (test_fused_identities_are_plain_attention_to_the_bit).
2. Parameter counts: here (test_sizes_are_the_published_ones), test_iha
   (test_published_numbers_of_parameters), test_slowrun_parts
   (test_the_published_size_of_the_tiny_track).
3. First loss ln V: here (test_the_first_loss_is_that_of_a_uniform_guess), test_iha.
4. Interleaving is causal, and with P = 1 plain attention: test_iha
   (test_no_variant_sees_what_comes_after,
   test_one_pseudo_head_with_equal_windows_begins_as_plain_attention), test_iha_extra_block,
   test_window_stages.
5. The no-op start: test_iha (test_the_no_op_start_is_plain_attention).
6. Equal neurons keep the norm, cautious decay its signs: test_neurons
   (test_equal_neurons_keep_the_norm_of_the_update,
   test_cautious_decay_never_acts_where_update_and_weight_differ_in_sign).
7. Repeats that do not repeat: test_recurrence
   (test_one_visit_equals_no_recurrence_and_leaves_what_it_does_not_use).
8. Rate and decay by epoch: here (test_the_record_of_two_hours_grows_its_windows_by_epoch),
   test_schedule (test_cycles_begin_at_the_published_factors_and_end_at_the_floor).
9. Two copies of a checkpoint are one: test_ensemble
   (test_two_copies_of_one_checkpoint_score_as_one).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer.account import count_parameters, parameter_table
from trainer.attention import select_backend
from trainer.config.recurrence import visits_at
from trainer.config.window_stages import window_stage_at
from trainer.layer_pattern import select_layers
from trainer.loop import train
from trainer.model.gpt import GPT
from trainer.optim.rules import assign, param_rules
from trainer.recipes import RECIPES
from trainer.recipes.slowrun_pr78 import PUBLISHED_STEPS, RECORD_STEPS
from trainer.report import NullReporter
from trainer.schedule import decay_multiplier, lr_multiplier, muon_momentum

RUN = RECIPES["slowrun_pr78"].build()


def test_sizes_are_the_published_ones() -> None:
    """The reference's counts, 3.1 with fused heads and 4b with interleaved ones."""
    assert count_parameters(RUN.model) == 1_443_741_871
    fused = RUN.with_overrides({"model.iha": "fused"}).model
    assert count_parameters(fused) == 1_443_722_775
    table = parameter_table(fused)
    of = {
        prefix: sum(math.prod(s) for n, s in table.items() if n.startswith(prefix))
        for prefix in ("head.", "tok_emb.", "mtp.")
    }
    assert of == {"head.": 90_144_768, "tok_emb.": 90_144_768, "mtp.": 45_417_204}
    blocks = sum(
        math.prod(shape)
        for name, shape in table.items()
        if name.startswith("blocks.") and not name.endswith(("_factor", "value_proj.proj.weight"))
    )
    assert blocks == 1_169_847_000
    projections = [math.prod(s) for n, s in table.items() if "value_proj.proj" in n]
    assert (len(projections), sum(projections)) == (15, 48_168_960)


def test_the_optimiser_is_the_published_table() -> None:
    shapes = parameter_table(RUN.model)
    rules = assign(shapes, param_rules(RUN))
    wanted = {
        "head.weight": ("adam", 0.0005, 1.3, 0.0),
        "tok_emb.weight": ("adam", 0.0375, 1.3, 0.0),
        "blocks.4.keep_factor": ("adam", 0.00025, 0.0, 0.0),
        "blocks.4.embed_factor": ("adam", 0.025, 0.0, 0.96),
        "skip_weights": ("adam", 0.00025, 0.0, 0.0),
        "blocks.4.attn.iha.q": ("adam", 0.02, 0.0, 0.0),
        "mtp.block.attn.iha.collapse": ("adam", 0.02, 0.0, 0.0),
    }
    for name, want in wanted.items():
        rule = rules[name]
        assert (rule.optimizer, rule.lr, rule.weight_decay, rule.beta1) == want, name
    muon = [name for name, rule in rules.items() if rule.optimizer == "muon"]
    assert {(rules[name].lr, rules[name].weight_decay) for name in muon} == {(0.01, 1.3)}
    counts: dict[tuple[int, ...], int] = {}
    for name in muon:
        counts[shapes[name]] = counts.get(shapes[name], 0) + 1
    assert counts == {
        (14, 12): 31,
        (14, 32): 15,
        (1792, 1792): 139,
        (1792, 3584): 1,
        (1792, 4864): 31,
        (4864, 1792): 62,
    }


def test_schedules_are_those_of_twelve_epochs() -> None:
    short = select_layers(RUN.model.window_layers, 30)
    assert sorted(set(range(30)) - set(short)) == [3, 7, 11, 15, 19, 23, 27, 29]
    assert list(RUN.recur_phases) == [(0.0, 1), (0.5, 3)]
    order = [place.layer for place in RUN.model.visit_order(3)]
    assert order == [*range(15), *(3 * [*range(15, 21)]), *range(21, 30)]
    assert [muon_momentum(RUN.optim, step) for step in (0, 150, 300)] == pytest.approx(
        [0.85, 0.90, 0.95]
    )
    for epoch, factor in ((1, 1.0), (10, 1.0), (11, 2 / 12 / 0.2), (12, 1 / 12 / 0.2)):
        progress = (epoch - 1) / 12
        got = lr_multiplier(RUN.schedule, round(progress * PUBLISHED_STEPS), progress)
        assert got == pytest.approx(min(1.0, factor))
    assert round(12 * 99_942_400 / 524_288) == RUN.budget.max_steps == PUBLISHED_STEPS


def test_the_record_of_two_hours_grows_its_windows_by_epoch() -> None:
    """Factors at the first step of epochs 15 to 22, and of the weight decay: the reference's."""
    run = RECIPES["slowrun_2h"].build()
    assert count_parameters(run.model) == 1_443_722_775
    assert round(22 * 99_942_400 / 524_288) == run.budget.max_steps == RECORD_STEPS
    by_epoch = [window_stage_at(run.model.stages, (e - 0.999) / 22) for e in range(1, 23)]
    assert by_epoch == 6 * [0] + 7 * [1] + 9 * [2]
    assert [stage[:2] for stage in run.model.stages] == [(256, 768), (768, 1792), (1280, 2048)]
    assert [phase.visits for phase in run.recur_phases] == [1, 3]
    assert run.recur_phases[1].start == run.model.stages[2].start  # no graph for a sliver between
    assert [visits_at(run.recur_phases, (e - 0.999) / 22) for e in (13, 14)] == [1, 3]
    factors = [lr_multiplier(run.schedule, RECORD_STEPS, (e - 1) / 22) for e in range(15, 23)]
    published = [1, 1, 1, 1, 0.95, 0.83, 0.67, 0.48]
    assert factors == pytest.approx(published, abs=0.006)
    decay = {0.2: 1.0, 0.4: 1.0, 14 / 22: 0.65, (14 + 0.5) / 22: 1.075, 1.0: 1.5}
    for progress, factor in decay.items():
        assert decay_multiplier(run.schedule, progress) == pytest.approx(factor)
    assert RUN.with_overrides({"model.iha": "fused"}).digest() != run.digest()


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    """Of the copy for a CPU, whose head begins as the published one."""
    model = RECIPES["slowrun_cpu"].build().model
    torch.manual_seed(0)
    gpt = GPT(model, select_backend("sdpa", "cpu", lambda line: None), 64)
    tokens = torch.randint(model.vocab_size, (2, 33))
    loss = gpt(tokens[:, :-1], tokens[:, 1:]).detach()
    assert float(loss) == pytest.approx(math.log(model.vocab_size), abs=0.002)


def test_the_copy_for_a_cpu_trains_the_same_twice(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, 4 + 12, 9000).astype(np.uint16)
    folder = write_folder(tmp_path / "data", tokens[:7000], tokens[7000:], tokens_per_shard=3000)
    small = {
        "model.vocab_size": VOCAB_SIZE,
        "model.padded_vocab": 0,
        "model.model_dim": 32,
        "model.window": 8,
        "data.dir": str(folder),
        "data.seq_len": 32,
        "data.batch_tokens": 512,
        "data.micro_batch_tokens": 256,
        "evaluate.seq_len": 32,
        "evaluate.batch_tokens": 768,
        "schedule.progress": "steps",
        "budget.train_seconds": None,
        "budget.max_steps": 8,
    }
    config = RECIPES["slowrun_cpu"].build().with_overrides(small)
    primed, plain = (
        train(config.with_overrides({"runtime.prime_steps": steps}), NullReporter(), tmp_path)
        for steps in (1, 0)
    )
    assert (primed.status, primed.steps) == ("finished", 8)
    assert primed.num_params == count_parameters(config.model)
    assert primed.val_loss is not None and primed.val_loss < math.log(VOCAB_SIZE)
    assert primed.val_loss == plain.val_loss  # noise follows the step, not what came before
