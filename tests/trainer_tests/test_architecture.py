"""Every switch of the architecture against the plain model, forward and backward."""

import pytest
import torch
from torch import Tensor

from tests.trainer_tests.architectures import BASE, SWITCHES, config_of
from tests.trainer_tests.baseline_gpt import baseline_loss, parameter_names
from tests.trainer_tests.plain_gpt import plain_loss
from trainer.account import parameter_table
from trainer.attention import select_backend
from trainer.config import ModelConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.model.gpt import GPT
from trainer.optim.rules import assign, param_rules
from trainer.quantize.rules import choose_scheme


def build(config: ModelConfig, attention: str = "sdpa") -> GPT:
    """A model in fp64 whose every parameter is random: fresh zeros and ones would hide mistakes."""
    torch.manual_seed(3)
    model = GPT(config, select_backend(attention, "cpu", lambda line: None), 20, {6}).double()
    model.compute_dtype = torch.float64
    torch.manual_seed(3)  # again: how a model begins must not decide what it is tested with
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(0.1)
    return model


def tokens_with_documents(num_tokens: int = 6) -> Tensor:
    """[2, T + 1]; documents begin (token 1) inside the first row and at the start of the second."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(2, BASE["vocab_size"], (2, num_tokens + 1), generator=generator)
    rows[0, 3] = rows[1, 0] = 1
    return rows


def assert_equals_plain_model(config: ModelConfig, attention: str) -> None:
    model = build(config, attention)
    rows = tokens_with_documents()
    tokens, targets = rows[:, :-1], rows[:, 1:]
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    expected = plain_loss(config, weights, tokens, targets)
    expected.mean().backward()
    each = model(tokens, targets, reduction="none")
    torch.testing.assert_close(each.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    each.mean().backward()
    for name, parameter in model.named_parameters():
        want = weights[name].grad
        assert parameter.grad is not None and want is not None, name
        assert want.abs().max() > 1e-7, name
        worst = (parameter.grad - want).abs().max() / want.abs().max()
        assert worst < 1e-5, (name, float(worst))


@pytest.mark.parametrize("name", SWITCHES)
def test_loss_and_gradients_equal_the_plain_model(name: str) -> None:
    assert_equals_plain_model(config_of(name), "sdpa")


@pytest.mark.parametrize("name", ["pr1212", "everything_else"])
def test_windows_through_flex_equal_the_plain_model(name: str) -> None:
    assert_equals_plain_model(config_of(name), "flex")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_token_changes_only_what_comes_after_it(name: str) -> None:
    model = build(config_of(name))
    tokens = tokens_with_documents()[:, :-1]
    changed = tokens.clone()
    changed[:, 2] = tokens[:, 2] % 17 + 2  # another ordinary token
    with torch.no_grad():
        difference = (model.logits(tokens) - model.logits(changed)).abs().amax((0, 2))
    assert (difference[:2] == 0).all()
    assert difference[2] > 1e-6 and difference[-1] > 1e-9


@pytest.mark.parametrize("name", ["pr1212", "everything_else", "loops_with_the_rest"])
def test_compiles_as_one_graph_with_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    model = build(config_of(name))
    rows = tokens_with_documents()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        loss = forward(rows[:, :-1], rows[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_leaves_the_other_initial_weights_alone(name: str) -> None:
    """So that trials of a sweep with one seed differ in what is swept and in nothing else."""
    shapes = {"num_layers", "num_kv_heads", "tie_embeddings", "no_attention_layers"}
    shapes |= {"padded_vocab"}
    off = {key: value for key, value in SWITCHES[name].items() if key in shapes}
    starts = []
    for config in (ModelConfig(**(BASE | off)), config_of(name)):
        torch.manual_seed(0)
        starts.append(GPT(config, lambda q, k, v, *, window=None: q).state_dict())
    if "matrix_init" in SWITCHES[name] or "diff_attention" in SWITCHES[name]:
        assert torch.equal(starts[0]["tok_emb.weight"], starts[1]["tok_emb.weight"])
        return  # these draw the matrices otherwise
    matrices = {key for key in starts[0] if key.endswith(".weight")}
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in matrices)


@pytest.mark.parametrize("name", SWITCHES)
def test_no_parameter_is_cut_off_from_learning(name: str) -> None:
    """Two factors that both begin at zero never learn: neither gives the other a gradient."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(BASE | SWITCHES[name])), select_backend("sdpa", "cpu", print), 16)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens = tokens_with_documents(15)
    for _ in range(4):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still


def test_initial_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    switches = SWITCHES["pr1212"] | {"value_residual": "gated", "matrix_init": "orthogonal"}
    switches |= {"resid_lambda_init": 1.1**0.5, "value_embed_dim": 100, "bigram_dim": 8}
    weights = GPT(ModelConfig(**(BASE | switches)), lambda q, k, v, *, window=None: q).state_dict()
    constants = {
        "skip_gates": 0.0,
        "backout": 0.1,
        "bigram.table.weight": 0.0,
        "bigram.scale": 0.05,
        "channel_smear.gate": 0.0,
        "value_embed.proj.weight": 0.0,
        "value_embed.scale": 0.1,
        "blocks.2.attn.value_embed.scale": 1.0,
        "blocks.1.attn.value_residual.gate": -1.5,
        "blocks.0.resid_lambdas": 1.1**0.5,
    }
    for name, value in constants.items():
        torch.testing.assert_close(weights[name], torch.full_like(weights[name], value))
    assert float(weights["value_embed.table.weight"].std()) == pytest.approx(0.01, rel=0.05)
    for name in ("blocks.0.attn.k.weight", "bigram.proj.weight"):
        matrix = weights[name]
        columns = matrix if matrix.size(0) < matrix.size(1) else matrix.T
        torch.testing.assert_close(
            columns @ columns.T, torch.eye(len(columns)), atol=1e-5, rtol=0, msg=name
        )
    assert not weights["blocks.0.attn.out.weight"].any()


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_smear_and_bigrams_stop_at_document_starts(kind: str) -> None:
    """With the mask the first token of a document hears nothing of the last one of the document
    before; without it, as published, it does."""
    heard = []
    for masked in (True, False):
        switches = {"smear": kind, "bigram_buckets": 11, "mask_documents": masked}
        model = build(ModelConfig(**(BASE | switches)))
        tokens = tokens_with_documents()[:1, :-1]
        changed = tokens.clone()
        changed[0, 2] = tokens[0, 2] % 17 + 2
        with torch.no_grad():
            heard.append((model._embed(tokens) - model._embed(changed))[0, 3].abs().max())
    assert heard[0] == 0 < heard[1]


def test_rotary_base_follows_the_row_length_whether_or_not_it_was_announced() -> None:
    config = config_of("rope_ntk")
    tokens = tokens_with_documents(num_tokens=9)
    announced, found_late = build(config), build(config)
    torch.manual_seed(3)
    announced = GPT(config, announced.blocks[0].attn._attend, 20, {6, 10}).double()
    announced.compute_dtype = torch.float64
    announced.load_state_dict(found_late.state_dict())
    assert hasattr(announced.rotary, "cos_10") and not hasattr(found_late.rotary, "cos_10")
    torch.testing.assert_close(announced.logits(tokens), found_late.logits(tokens))
    shorter = announced.logits(tokens[:, :6])
    assert (announced.logits(tokens)[:, :6] - shorter).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window": 128}, r"model\.window = 128 and model\.window_layers = '': .*set both"),
        ({"window_layers": "even"}, r"model\.window = 0 and model\.window_layers = 'even'"),
        ({"window": 8, "window_layers": "9"}, r"window_layers = '9': no layer 9; choose from 0"),
        ({"window": 4097, "window_layers": "odd"}, r"model\.window = 4097 is above 1024, the long"),
        ({"value_embed_dim": 8}, r"model\.value_embed_dim = 8 and .* set both"),
        ({"value_embed_dim": 8, "value_embed_layers": "5,9"}, r"value_embed_layers = '5,9': no l"),
        ({"backout_layer": 8}, r"model\.backout_layer = 8 .* choose from 0 to 7, or -1 for none"),
        ({"xsa_last_n": 10}, r"model\.xsa_last_n = 10 is above model\.num_layers = 9; lower it"),
        ({"rope_dims": 7}, r"model\.rope_dims = 7 is not an even number from 0 to 64"),
        ({"rope_dims": 40, "diff_attention": "full"}, r"rope_dims = 40 is not .* from 0 to 32"),
        ({"rope_dims": 2, "rope_ntk_len": 9}, r"rope_ntk_len = 9 needs at least 4 rotated dim"),
        ({"bigram_buckets": 1}, r"model\.bigram_buckets = 1 leaves no bucket"),
        ({"smear": "token", "smear_gate_dim": 513}, r"model\.smear_gate_dim = 513 is above"),
        ({"num_heads": 256, "diff_attention": "split"}, r"diff_attention = .split. rotates half"),
        ({"lora_rank": 4}, r"model\.lora_rank = 4 tells visits apart, but model\.num_loops = 1"),
        ({"num_loops": 2, "gated_skips": True}, r"model\.gated_skips = True is not defined .*2 t"),
        ({"num_loops": 3, "value_residual": "half"}, r"model\.value_residual = 'half' is not def"),
    ],
)
def test_settings_that_do_not_fit_name_their_path_and_the_remedy(
    overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_overrides({f"model.{key}": value for key, value in overrides.items()})


def test_all_faults_of_the_model_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides(
            {"model.num_heads": 7, "model.xsa_last_n": 99, "model.window": 3, "model.lora_rank": 1}
        )
    for path in ("num_heads", "xsa_last_n", "window", "lora_rank"):
        assert f"model.{path} = " in str(caught.value)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_parameter_has_an_optimiser_and_control_tensors_keep_32_bits(name: str) -> None:
    config = TrainConfig(model=config_of(name))
    table = parameter_table(config.model)
    for parameter, rule in assign(table, param_rules(config)).items():
        is_matrix = parameter.startswith("blocks.") and len(table[parameter]) == 2
        is_small = any(
            part in parameter for part in (".lora.", ".gate.", ".iha.", ".lanes.", "resid_mix")
        )
        in_muon = is_matrix and not is_small
        assert (rule.optimizer == "muon") == in_muon, parameter
        is_table = parameter in (
            "tok_emb.weight",
            "bigram.table.weight",
            "value_embed.table.weight",
        )
        if is_table:
            assert rule.lr == (0.05 if config.model.tie_embeddings else 0.6), parameter
        elif parameter.endswith("resid_lambdas"):
            assert rule.lr == 5 * config.optim.scalar_lr
        scheme = choose_scheme(
            parameter, table[parameter], config.quantize, config.model.num_layers
        )
        is_control = ".lora." not in parameter and not parameter.endswith(".weight")
        assert (scheme == "float32") == is_control, (parameter, scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_with_every_switch_off_bits_are_those_of_the_baseline(
    tied: bool, dtype: torch.dtype
) -> None:
    config = ModelConfig(**BASE, tie_embeddings=tied)
    attend = select_backend("sdpa", "cpu", lambda line: None)
    torch.manual_seed(4)
    model = GPT(config, attend)
    model.compute_dtype = dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    assert list(weights) == parameter_names(config)
    rows = tokens_with_documents(num_tokens=13)
    expected = baseline_loss(config, weights, attend, dtype, rows)
    expected.backward()
    loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, weights[name].grad), name


@pytest.mark.parametrize(
    "name", ["pr1212", "pr1894", "frontier", "everything_else", "loops_with_the_rest"]
)
def test_activations_stay_in_bfloat16_and_gradients_near_the_exact_ones(name: str) -> None:
    model = build(config_of(name))
    rows = tokens_with_documents(num_tokens=13)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        model.to(torch.float64 if dtype == torch.float64 else torch.float32).zero_grad()
        model.compute_dtype = dtype
        assert model._hidden(rows[:, :-1]).dtype == dtype
        model(rows[:, :-1], rows[:, 1:]).backward()
        matrices = [p for n, p in model.named_parameters() if n.endswith(".weight")]
        gradients.append(torch.cat([p.grad.flatten().double() for p in matrices]))
    exact, rounded = gradients
    # A difference of two maps that is normalised again enlarges what rounding left: 0.17 there.
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.25
