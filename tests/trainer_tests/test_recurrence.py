"""Recurrence: the order of visits, its start along the budget, and what it must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer_tests.architectures import BASE, config_of
from tests.trainer_tests.small_data import VOCAB_SIZE, write_folder
from trainer import artifact, loop
from trainer.attention import select_backend
from trainer.clock import BudgetClock
from trainer.config import ModelConfig, TrainConfig
from trainer.config.recurrence import Phase, parse_phases, visits_at
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.errors import ConfigError
from trainer.evaluate.bits_per_byte import evaluate
from trainer.loop import Run, train
from trainer.model.attention import Context
from trainer.model.gpt import GPT
from trainer.optim import build_optimizer
from trainer.quantize import dequantize
from trainer.quantize.calibration import collect_hessians
from trainer.recipes import RECIPES
from trainer.report import NullReporter
from trainer.workspace import build_model


def build(config: ModelConfig, seed: int = 3) -> GPT:
    """In fp64 with random parameters."""
    torch.manual_seed(seed)
    model = GPT(config, select_backend("sdpa", "cpu", lambda line: None), 20).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, BASE["vocab_size"], (2, 8), generator=generator)


def loss_and_gradients(model: GPT) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    loss = model(rows()[:, :-1], rows()[:, 1:])
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("first", "encoder", "decoder"),
    [
        (4, [0, 1, 2, 3, 4, 5, 4], [5, 4, 5, 6, 7, 8, 9, 10]),
        (3, [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_order_and_skips_are_the_published_ones(
    first: int, encoder: list[int], decoder: list[int]
) -> None:
    config = ModelConfig(num_layers=11, recur_visits=3, recur_first=first, recur_last=5)
    order = [place.layer for place in config.visit_order(3)]
    assert order == encoder + decoder
    assert config.num_skips + config.num_recur_skips == len(encoder)
    assert [place.layer for place in config.visit_order(1)] == list(range(11))
    fewer = config.model_copy(update={"recur_skips": "plain"})
    assert (fewer.num_skips, fewer.num_recur_skips) == (5, 0)


@pytest.mark.parametrize(
    "name", ["recur", "recur_ab", "recur_untied", "pr1894", "recur_alpha", "recur_layers"]
)
def test_one_visit_equals_no_recurrence_and_leaves_what_it_does_not_use(name: str) -> None:
    config = config_of(name)
    off = {"recur_visits": 1, "recur_blend": "off", "recur_lora_rank": 0, "recur_untied_mlp": ""}
    model, plain = build(config), build(config.model_copy(update=off))
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    expected, expected_gradients = loss_and_gradients(plain)
    with model.visiting(1):
        loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, expected)
    for key, gradient in gradients.items():
        if key in expected_gradients:
            assert torch.equal(gradient, expected_gradients[key]), key
        else:
            assert gradient is None, key
    recurring, _ = loss_and_gradients(model)
    assert abs(float(recurring - expected)) > 1e-6


def test_two_of_three_visits_are_a_model_of_two_visits() -> None:
    model = build(config_of("recur_ab"))
    fewer = build(config_of("recur_ab").model_copy(update={"recur_visits": 2}))
    state = model.state_dict()
    fewer.load_state_dict({key: state[key] for key in fewer.state_dict()})
    expected, expected_gradients = loss_and_gradients(fewer)
    with model.visiting(2):
        loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, expected)
    assert {key for key, value in gradients.items() if value is not None} == set(expected_gradients)


def test_the_gradient_of_a_shared_matrix_is_the_sum_over_its_visits() -> None:
    """Give each repeat an MLP of its own with the same weights: the same numbers, and gradients
    apart that add up."""
    switches = {"recur_visits": 3, "recur_first": 1, "recur_last": 2}
    shared = build(ModelConfig(**(BASE | switches)))
    apart = build(ModelConfig(**(BASE | switches | {"recur_untied_mlp": "1,2"})))
    state = shared.state_dict()
    for key in apart.state_dict():
        if ".repeats." in key:
            state[key] = state[key.split("repeats.")[0] + key.split(".", 4)[4]]
    apart.load_state_dict(state)
    loss, gradients = loss_and_gradients(shared)
    loss_apart, parts = loss_and_gradients(apart)
    assert torch.equal(loss, loss_apart)
    for layer in (1, 2):
        name = f"blocks.{layer}.mlp.up.weight"
        of_visits = [
            parts[name],
            *(parts[f"blocks.{layer}.repeats.{i}.mlp.up.weight"] for i in (0, 1)),
        ]
        torch.testing.assert_close(gradients[name], sum(of_visits))
        assert all(part is not None and part.abs().max() > 1e-9 for part in of_visits)


@pytest.mark.parametrize(
    "switches",
    [{"recur_blend": "alpha"}, {"recur_blend": "ab"}, {"recur_lora_rank": 2}],
    ids=["alpha", "ab", "lora"],
)
def test_blends_and_adapters_begin_as_the_plain_repeat(switches: dict[str, Any]) -> None:
    recur = {"recur_visits": 3, "recur_first": 1, "recur_last": 2}
    plain = build(ModelConfig(**(BASE | recur)))
    torch.manual_seed(0)
    blended = GPT(ModelConfig(**(BASE | recur | switches)), plain.blocks[0].attn._attend).double()
    blended.compute_dtype = torch.float64
    blended.load_state_dict(plain.state_dict(), strict=False)
    assert set(blended.state_dict()) > set(plain.state_dict())
    torch.testing.assert_close(loss_and_gradients(blended)[0], loss_and_gradients(plain)[0])


def test_lanes_begin_as_published_and_factors_of_other_blocks_are_there_on_demand() -> None:
    lanes = {"parallel": "lanes", "parallel_start": 3}
    for factors, blocks in (("used", {3, 4}), ("all", set(range(5)))):
        torch.manual_seed(0)
        model = GPT(
            ModelConfig(**(BASE | lanes | {"parallel_factors": factors})),
            select_backend("sdpa", "cpu", print),
        )
        found = {key: value for key, value in model.state_dict().items() if ".lanes." in key}
        assert {int(key.split(".")[1]) for key in found} == blocks
        assert (found["blocks.3.lanes.resid"] == 1.1).all()
        assert (found["blocks.3.lanes.post"] == 1).all()


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("window", 1.0), ("dense", 0.5), ("sparse", 0.5), ("biased", 1 / (1 + np.exp(-4)))],
)
def test_gates_begin_as_published(kind: str, factor: float) -> None:
    config = ModelConfig(**(BASE | {"attn_gate": kind}))
    torch.manual_seed(0)
    gate = GPT(config, select_backend("sdpa", "cpu", print)).blocks[1].attn.gate
    y_BTHD, n_BTC = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 32)
    torch.testing.assert_close(gate(y_BTHD, n_BTC), factor * y_BTHD, rtol=0.05, atol=0)


def test_phases_are_read_in_order() -> None:
    phases = parse_phases("2@0.5,3@0.65")
    assert phases == (Phase(0.0, 1), Phase(0.5, 2), Phase(0.65, 3))
    seen = [visits_at(phases, progress) for progress in (0.0, 0.4999, 0.5, 0.64, 0.65, 1.0)]
    assert seen == [1, 1, 2, 2, 3, 3]
    assert parse_phases("2@0,3@0.5") == (Phase(0.0, 2), Phase(0.5, 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.recur_visits": 2, "model.recur_last": 9},
            r"recur_last = 9 are no range .* 0 to 8",
        ),
        (
            {"model.recur_visits": 2, "model.recur_first": 6},
            r"recur_first = 6 and model.recur_last",
        ),
        ({"model.recur_blend": "ab"}, r"recur_blend = 'ab' is about repeat visits, but"),
        ({"schedule.recur_start": 0.5}, r"recur_start = 0.5 .*recur_visits = 1 does not have"),
        ({"schedule.recur_start": 1.0}, r"schedule.recur_start = 1.0: input should be less than 1"),
        (
            {
                "model.recur_visits": 3,
                "schedule.recur_start": 0.5,
                "schedule.recur_phases": "3@0.5",
            },
            r"both say when recurrence begins",
        ),
        (
            {"model.recur_visits": 3, "schedule.recur_phases": "2@0.5"},
            r"ends with 2 visits, but evaluation makes model.recur_visits = 3",
        ),
        (
            {"model.recur_visits": 3, "schedule.recur_phases": "2@0.5,3@0.4"},
            r"schedule.recur_phases = '2@0.5,3@0.4': '3@0.4' does not come after",
        ),
        (
            {"model.recur_visits": 3, "schedule.recur_phases": "3 at 0.5"},
            r"'3 at 0.5' is no phase; write VISITS@SHARE",
        ),
        (
            {"model.recur_visits": 2, "model.recur_untied_mlp": "2,4"},
            r"recur_untied_mlp = '2,4' names layer 2, which does not recur; choose from 3 to 5",
        ),
        ({"model.no_attention_layers": "9"}, r"no_attention_layers = '9': no layer 9"),
        (
            {"model.no_attention_layers": "0", "model.value_residual": "half"},
            r"value_residual = .half. mixes in the values of layer 0",
        ),
        ({"model.parallel": "joint", "model.parallel_start": 9}, r"parallel_start = 9 is no block"),
        (
            {"model.parallel": "lanes", "model.parallel_start": 5, "model.recur_visits": 2},
            r"recur_last = 5 would recur in two lanes",
        ),
        (
            {"model.attn_gate": "sparse", "model.attn_gate_dim": 513},
            r"attn_gate_dim = 513 is above",
        ),
        ({"model.num_loops": 2, "model.recur_visits": 2}, r"recur_visits = 2 is not defined for"),
    ],
)
def test_settings_that_do_not_fit_name_their_path_and_the_remedy(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_overrides(overrides)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.empty(9_000, dtype=np.uint16)
    tokens[0] = 1
    for index in range(1, len(tokens)):
        tokens[index] = 4 + (int(tokens[index - 1]) * 7 + 3) % (VOCAB_SIZE - 4)
    return write_folder(tmp_path_factory.mktemp("recur") / "data", tokens[:8_000], tokens[8_000:])


@pytest.fixture
def configure(data_dir: Path) -> Callable[..., TrainConfig]:
    def make(**overrides: Any) -> TrainConfig:
        base = {
            "model.vocab_size": VOCAB_SIZE,
            "model.num_layers": 4,
            "model.model_dim": 32,
            "model.recur_visits": 3,
            "model.recur_first": 1,
            "model.recur_last": 2,
            "model.recur_blend": "ab",
            "model.gated_skips": True,
            "schedule.recur_start": 0.5,
            "data.dir": str(data_dir),
            "data.seq_len": 16,
            "data.batch_tokens": 128,
            "data.micro_batch_tokens": 64,
            "evaluate.seq_len": 16,
            "evaluate.batch_tokens": 1024,
            "optim.scalar_weight_decay": 0.1,
            "optim.weight_decay": 0.1,
            "schedule.progress": "steps",
            "budget.max_steps": 8,
            "budget.train_seconds": None,
        }
        return RECIPES["tiny"].build().with_overrides({**base, **overrides})

    return make


@contextmanager
def recorded_visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Visits of every forward pass that makes gradients, and of every other as a negative."""
    seen: list[int] = []
    run_blocks = GPT._unet

    def spy(self: GPT, x_BTC: Tensor, context: Context) -> Tensor:
        seen.append(self.visits_now if torch.is_grad_enabled() else -self.visits_now)
        return run_blocks(self, x_BTC, context)

    monkeypatch.setattr(GPT, "_unet", spy)
    yield seen


def test_recurrence_begins_at_its_share_and_everything_else_always_recurs(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(
        **{
            "schedule.recur_start": 0.0,
            "schedule.recur_phases": "2@0.25,3@0.75",
            "runtime.prime_steps": 0,
            "runtime.val_every": 1,
            "data.micro_batch_tokens": 128,
            "quantize.method": "gptq",
            "quantize.calibration_tokens": 128,
        }
    )
    with recorded_visits(monkeypatch) as seen:
        train(config, NullReporter())
    assert [visits for visits in seen if visits > 0] == [1, 1, 2, 2, 2, 2, 3, 3]
    assert {visits for visits in seen if visits < 0} == {-3}


def test_the_clock_alone_can_begin_it(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published as a share of 20,000 steps, it never began under a clock."""
    config = configure(
        **{
            "schedule.progress": "clock",
            "budget.train_seconds": 1.5,
            "budget.max_steps": None,
            "data.micro_batch_tokens": 128,
        }
    )
    progress: list[float] = []
    step = Run._step
    monkeypatch.setattr(
        Run, "_step", lambda self, n, share: progress.append(share) or step(self, n, share)
    )
    with recorded_visits(monkeypatch) as seen:
        train(config, NullReporter())
    visits = [number for number in seen if number > 0]
    assert visits == [3 if share >= 0.5 else 1 for share in progress]
    assert {1, 3} <= set(visits[2 * config.runtime.prime_steps :])


def test_the_clock_is_told_what_a_step_of_each_phase_takes(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(BudgetClock, "expect_step", lambda self, seconds: told.append(seconds))
    config = configure(**{"schedule.recur_start": 0.0, "schedule.recur_phases": "2@0.25,3@0.75"})
    for prime_steps, times in ((2, 3), (1, 1)):  # the first step of a phase may be compilation
        told.clear()
        train(config.with_overrides({"runtime.prime_steps": prime_steps}), NullReporter())
        assert len(told) == times and all(seconds > 0 for seconds in told)


def test_priming_every_phase_leaves_no_trace(configure: Callable[..., TrainConfig]) -> None:
    results = [
        train(configure(**{"runtime.prime_steps": steps}), NullReporter()) for steps in (0, 2)
    ]
    assert results[0].train_loss == results[1].train_loss
    assert results[0].val_loss == results[1].val_loss


def test_the_score_is_that_of_a_model_that_recurs(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configure(**{"optim.matrix_lr": 0.1, "budget.max_steps": 20})
    result = train(config, NullReporter(), tmp_path)
    group = Group(torch.device("cpu"))
    model = build_model(config, group, lambda line: None)
    _, quantized = artifact.decode((tmp_path / "artifact.bin").read_bytes())
    model.load_state_dict(dequantize(quantized))
    dataset = Dataset.open(config.data.dir)
    table = ByteTable.from_tokenizer(dataset.tokenizer_path, config.model.vocab_size)
    assert evaluate(model, dataset, table, config.evaluate, group).val_bpb == result.val_bpb
    with model.visiting(1):
        assert evaluate(model, dataset, table, config.evaluate, group).val_bpb != result.val_bpb


def test_gptq_hears_of_every_visit() -> None:
    """The inputs of a shared matrix are those of all its visits."""
    model = build(config_of("recur_lora"))
    heard: list[Tensor] = []
    for block in model.blocks[2:3]:
        block.mlp.down.register_forward_hook(lambda module, inputs, out: heard.append(inputs[0]))
    with torch.no_grad():
        model(rows()[:, :-1], rows()[:, 1:])
    assert len(heard) == 3
    name, group = "blocks.2.mlp.down.weight", Group(torch.device("cpu"))
    seen = collect_hessians(model, [name], [(rows()[:, :-1], rows()[:, 1:])], group)[name]
    flat = torch.cat([inputs.flatten(0, 1) for inputs in heard[:3]]).float()
    torch.testing.assert_close(seen, flat.T @ flat / rows()[:, :-1].numel())


@pytest.mark.parametrize("muon_comm", ["all_reduce", "reduce_scatter"])
def test_what_is_not_in_use_yet_is_not_touched(muon_comm: str) -> None:
    """Weight decay would wear factors that begin at 1 down before they are first used."""
    switches = {"recur_visits": 3, "recur_first": 1, "recur_last": 2, "recur_blend": "ab"}
    switches |= {"recur_untied_mlp": "2", "recur_lora_rank": 1, "num_layers": 6}
    config = TrainConfig().with_overrides(
        {
            **{f"model.{key}": value for key, value in (BASE | switches).items()},
            "optim.scalar_weight_decay": 0.5,
            "optim.weight_decay": 0.5,
            "optim.recur_weight_decay": 0.5,
            "optim.grad_clip_norm": 0.5,
            "optim.muon_comm": muon_comm,
        }
    )
    torch.manual_seed(0)
    model = GPT(config.model, select_backend("sdpa", "cpu", print))
    nn.init.normal_(model.tok_emb.weight)
    optimizer = build_optimizer(model, config, Group(torch.device("cpu")))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    late = {name for name in start if ".repeats." in name or name.startswith("recur_skip")}
    assert len(late) > 20
    moved: list[set[str]] = []
    for visits in (1, 1, 2, 3, 3):
        with model.visiting(visits):
            model(rows()[:, :-1], rows()[:, 1:]).backward()
        optimizer.average_gradients([], 0.5)
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()
        moved.append(
            {
                name
                for name, value in model.named_parameters()
                if not torch.equal(value, start[name])
            }
        )
    assert moved[1] == set(start) - late
    of_the_third = {
        name for name in late if ".repeats.1." in name or name == "recur_skip_weights.1"
    }
    assert moved[2] & late and not moved[2] & of_the_third
    assert moved[4] == set(start)


@pytest.mark.parametrize(("name", "phases"), [("pr1894", (1, 3)), ("frontier", (3,))])
def test_every_phase_is_one_graph_with_the_same_numbers(name: str, phases: tuple[int]) -> None:
    torch._dynamo.reset()
    model = build(config_of(name))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for visits in phases:
        with model.visiting(visits):
            expected, gradients = loss_and_gradients(model)
            model.zero_grad()
            loss = compiled(rows()[:, :-1], rows()[:, 1:])
            loss.backward()
        assert torch.equal(loss, expected)
        for key, value in model.named_parameters():
            torch.testing.assert_close(value.grad, gradients[key])


@pytest.fixture
def compiled(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """Runs through three phases and says how often something was compiled inside the clock.
    Graphs are captured and guarded as ever, but run as they are: generating code takes a minute."""
    capture = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", capture)
    overrides = {"schedule.recur_start": 0.0, "schedule.recur_phases": "2@0.25,3@0.75"}
    overrides |= {"runtime.compile": "on", "runtime.val_every": 3, "runtime.prime_steps": 1}
    overrides |= {"model.num_layers": 2, "model.recur_last": 1, "model.recur_blend": "off"}

    def run() -> int:
        torch._dynamo.reset()
        return train(configure(**overrides), NullReporter()).compilations

    return run


def test_switching_compiles_nothing_inside_the_clock(compiled: Callable[[], int]) -> None:
    assert compiled() == 0


def test_a_phase_that_was_not_primed_is_noticed(
    compiled: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_prime = Run.prime

    def prime_the_first_phase(self: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "visits_at", lambda phases, progress: 1)
            run_prime(self)

    monkeypatch.setattr(Run, "prime", prime_the_first_phase)
    assert compiled() == 2
