"""What only training does: dropout, stochastic depth, the extra block, tokens further ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer_tests import plain_gpt
from tests.trainer_tests.architectures import BASE, SWITCHES
from tests.trainer_tests.test_architecture import build, tokens_with_documents
from trainer.account import count_parameters, parameter_table
from trainer.config import LossConfig, ModelConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.loss import AheadLoss, ahead_weights
from trainer.model.gpt import GPT
from trainer.optim.rules import assign, param_rules
from trainer.schedule import step_seed


def small(**switches: Any) -> ModelConfig:
    return ModelConfig(**(BASE | switches))


def training_loss(model: GPT, seed: int = 0) -> Tensor:
    rows = tokens_with_documents()
    torch.manual_seed(seed)
    return model(rows[:, :-1], rows[:, 1:], reduction="objective")


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_dropout_thins_what_each_branch_adds() -> None:
    model = build(small(num_layers=1, attn_dropout=0.4, mlp_dropout=0.25))
    rows = tokens_with_documents()
    got = training_loss(model, seed=7)
    # The same by hand: a mask per branch, in the order of the branches, the rest scaled up.
    block, context = model.blocks[0], model._context(rows[:, :-1])
    torch.manual_seed(7)
    masks = [torch.nn.functional.dropout(torch.ones_like(context.x0_BTC), p) for p in (0.4, 0.25)]
    assert set(masks[0].unique().tolist()) == {0.0, 1 / 0.6}
    x = block.resid_mix[0] * context.x0_BTC + block.resid_mix[1] * context.x0_BTC
    attended, _ = block.attn(block._norm(x), context)
    x = x + block.attn_scale * masks[0] * attended
    x = x + block.mlp_scale * masks[1] * block.mlp(block._norm(x))
    logits = 2.0 * torch.tanh(plain_gpt._rms(x) @ model.tok_emb.weight.T / 2.0)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(got, want)


def test_a_dropped_block_is_passed_by_after_its_mix() -> None:
    model = build(small(num_layers=2, stoch_depth=0.999))
    got = training_loss(model)
    seen = gradients(model, got)
    for scale in (model.blocks[1].attn_scale, model.blocks[1].mlp_scale):
        scale.data.zero_()
    rows = tokens_with_documents()
    torch.testing.assert_close(got, model(rows[:, :-1], rows[:, 1:]))
    assert seen["blocks.1.resid_mix"].abs().max() > 0  # the mix comes before the choice
    assert not seen["blocks.1.attn.q.weight"].any() and seen["blocks.0.attn.q.weight"].any()


def test_blocks_are_dropped_as_often_as_their_place_says() -> None:
    model = build(small(num_layers=3, stoch_depth=0.6))
    dropped = torch.zeros(3)
    for seed in range(80):
        found = gradients(model, training_loss(model, seed))
        dropped += torch.tensor([not found[f"blocks.{i}.mlp.up.weight"].any() for i in range(3)])
    assert dropped[0] == 0
    assert abs(float(dropped[1]) / 80 - 0.3) < 0.16 and abs(float(dropped[2]) / 80 - 0.6) < 0.16


@pytest.mark.parametrize("switch", [{"attn_dropout": 0.3}, {"stoch_depth": 0.5}])
def test_noise_is_seeded_and_never_in_scores(switch: dict[str, float]) -> None:
    model, quiet = build(small(**switch)), build(small())
    rows = tokens_with_documents()
    assert torch.equal(model.logits(rows), quiet.logits(rows))
    with torch.no_grad():
        assert torch.equal(training_loss(model), training_loss(quiet))
    assert torch.equal(training_loss(model, 1), training_loss(model, 1))
    assert len({float(training_loss(model, seed).detach()) for seed in range(12)}) > 1
    seeds = {step_seed(s, t, r) for s in (1, 2) for t in range(50) for r in range(8)}
    assert len(seeds) == 2 * 50 * 8


MTP = {**SWITCHES["slowrun"], "mtp_weight": 0.3, "window": 2, "window_layers": "1,3"}


@pytest.mark.parametrize("switches", [{"mtp_weight": 0.3}, MTP], ids=["alone", "slowrun"])
def test_the_extra_block_equals_its_equations(switches: dict[str, Any]) -> None:
    config = small(**switches)
    model = build(config)
    rows = tokens_with_documents()
    tokens, targets = rows[:, :-1], rows[:, 1:]
    got = gradients(model, loss := training_loss(model))
    w = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    first = plain_gpt.plain_loss(config, w, tokens, targets).mean()
    head = w["tok_emb.weight"] if config.tie_embeddings else w["head.weight"]
    off = {"num_layers": config.num_layers + 1, "xsa_last_n": 0, "window_layers": ""}
    extra = config.model_copy(update=off)
    nats = []
    for row, answer in zip(tokens.tolist(), targets.tolist(), strict=True):
        x0 = plain_gpt._embed(config, w, row)
        shared = plain_gpt.Row(x0, None)
        h = plain_gpt._rms(plain_gpt._unet(config, w, x0, shared))[:-1]
        y = plain_gpt._rms(w["tok_emb.weight"][answer[:-1]])
        m = torch.cat((h, y), -1) @ w["mtp.merge.weight"].T
        n = plain_gpt._block(extra, w, config.num_layers, "mtp.block.", m, shared)
        capped = 2.0 * torch.tanh(plain_gpt._rms(n) @ head[: config.vocab_size].T / 2.0)
        nats.append(-torch.log_softmax(capped, -1)[range(len(row) - 1), answer[1:]])
    want = first + 0.3 * torch.cat(nats).mean()
    torch.testing.assert_close(loss.detach(), want.detach(), rtol=1e-6, atol=1e-6)
    want.backward()
    for name, gradient in got.items():
        expected = w[name].grad
        assert expected is not None, name
        assert (gradient - expected).abs().max() < 2e-5 * expected.abs().max(), name
    assert set(got) == set(w)


def test_the_extra_block_sees_no_later_token_and_leaves_scores_alone() -> None:
    model, plain = build(small(mtp_weight=0.3)), build(small())
    rows = tokens_with_documents()
    context = model._context(rows[:, :-1])
    hidden = torch.randn_like(context.x0_BTC)
    later = torch.randn_like(hidden)
    before = model.mtp(hidden, later, context)
    changed, moved = hidden.clone(), later.clone()
    changed[:, 3:] += 1
    moved[:, 3:] += 1
    difference = (model.mtp(changed, moved, context) - before).abs().amax((0, 2))
    assert not difference[:3].any() and difference[3] > 1e-6
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.logits(rows), plain.logits(rows))


def test_weights_on_tokens_ahead_fall_the_farthest_first() -> None:
    config = LossConfig(kind="ahead")
    for progress, want in {
        0.0: (1, 0.5, 0.25),
        0.165: (1, 0.5, 0.125),
        0.33: (1, 0.5, 0),
        0.495: (1, 0.25, 0),
        0.66: (1, 0, 0),
        1.0: (1, 0, 0),
    }.items():
        assert ahead_weights(config, progress) == pytest.approx(want)


def test_the_ahead_loss_equals_its_sum_and_stays_in_its_row() -> None:
    objective = AheadLoss(LossConfig(kind="ahead")).double()
    objective.set_progress(0.1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(7, (2, 5), generator=generator)
    got = objective(logits, targets)
    log_p = torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    want = torch.zeros((), dtype=torch.float64)
    for ahead, weight in enumerate(ahead_weights(LossConfig(kind="ahead"), 0.1)):
        terms = [-log_p[b, t, targets[b, t + ahead]] for b in range(2) for t in range(5 - ahead)]
        want = want + weight * sum(terms) / len(terms)
    torch.testing.assert_close(got, want)
    first = torch.autograd.grad(got, logits, retain_graph=True)[0]
    torch.testing.assert_close(first, torch.autograd.grad(want, logits)[0])


def test_training_compiles_as_one_graph_that_does_not_change() -> None:
    torch._dynamo.reset()
    model = build(small(num_layers=2, attn_dropout=0.2, stoch_depth=0.3, mtp_weight=0.3))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    rows = tokens_with_documents()
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = []
        for seed in (step_seed(1, 0, 0), step_seed(1, 1, 0), step_seed(1, 0, 0)):
            torch.manual_seed(seed)
            losses.append(float(compiled(rows[:, :-1], rows[:, 1:], reduction="objective")))
    assert losses[0] == losses[2] != losses[1]


def test_the_account_and_the_table_know_the_extra_block() -> None:
    config = small(**MTP)
    model = build(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_table(config) == shapes
    settings = {"optim.gate_optimizer": "muon", "optim.mix_lr": 0.025, "optim.mix_beta1": 0.96}
    settings |= {"optim.xsa_lr": 0.2, "optim.scalar_lr": 0.00025}
    run = TrainConfig(model=config).with_overrides(settings)
    for name, rule in assign(shapes, param_rules(run)).items():
        inside = name.startswith(("mtp.", "blocks."))
        assert (rule.optimizer == "muon") == (inside and len(shapes[name]) == 2), name
        if name.endswith("embed_factor"):
            assert (rule.lr, rule.beta1) == (0.025, 0.96)
        if name.endswith("xsa.strength"):
            assert rule.lr == 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.num_passes": 2, "model.recur_visits": 2}, r"model\.num_passes = 2 and .*set one"),
        ({"model.stoch_depth": 0.1, "model.parallel": "lanes"}, r"stoch_depth = 0\.1 needs two bl"),
        ({"model.half_rope": True, "model.rope_dims": 8}, r"model\.half_rope = true needs heads"),
        ({"model.mtp_weight": 0.3, "model.num_loops": 2}, r"model\.mtp_weight = 0\.3 is not def"),
        ({"loss.ahead_weights": "1,x"}, r"loss\.ahead_weights = '1,x' are no weights"),
        ({"model.padded_vocab": 8}, r"model\.padded_vocab = 8 is below model\.vocab_size"),
        ({"model.recur_skips": "layers", "model.recur_visits": 2}, r"raise it to 4"),
    ],
)
def test_parts_that_do_not_fit_name_their_path_and_the_remedy(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_overrides(overrides)


def test_the_published_size_of_the_tiny_track() -> None:
    config = ModelConfig(
        vocab_size=50257,
        padded_vocab=50304,
        num_layers=16,
        model_dim=1024,
        num_heads=8,
        num_kv_heads=8,
        mlp_mult=2816 / 1024,
        tie_embeddings=False,
        mlp_kind="swiglu",
        resid_mix="scalar",
        branch_scales="none",
        qk_gain="off",
        skip_kind="scalar",
        value_proj_layers="odd",
        attn_gate="sparse",
        attn_gate_scale=1.0,
        xsa_last_n=16,
        xsa_strength="learned",
        half_rope=True,
        num_passes=2,
    )
    assert count_parameters(config) == 316_935_848
