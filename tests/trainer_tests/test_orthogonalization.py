"""Orthogonalisations against what they do to singular values, and against the polar factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import configure, data_dir, losses  # noqa: F401
from tests.trainer_tests.test_muon import STEPS, new_gradients, new_params
from trainer.config import OptimConfig, TrainConfig
from trainer.config.optim import MOST_STEPS
from trainer.distributed import Group
from trainer.optim import orthogonalization
from trainer.optim.muon import Muon
from trainer.optim.orthogonalization import ORTHOGONALIZATIONS, PLAIN, UpdateRule
from trainer.optim.sharded_muon import ShardedMuon

ONE = Group(torch.device("cpu"))
SHAPES = [(9, 9), (6, 11), (4, 21), (22, 5)]
"""Square, below and above the aspect where "gram" pays, tall."""
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]
PUBLISHED = [
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
]
"""Of #1344 and #1787, to four places."""


def mapped(values: np.ndarray, polynomials: list[tuple[float, float, float]]) -> np.ndarray:
    for a, b, c in polynomials:
        values = a * values + b * values**3 + c * values**5
    return values


def plain(matrix: np.ndarray, method: str, num_steps: int) -> np.ndarray:
    """fp64, through the singular values; no product of the iteration is formed."""
    polynomials = {
        "newton_schulz": num_steps * [(3.4445, -4.7750, 2.0315)],
        "polar_express": list(orthogonalization.POLAR_EXPRESS[:num_steps]),
        "gram": [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in PAPER[:num_steps]],
        "turbo": [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in PAPER[1 : 1 + num_steps]],
    }[method]
    if method == "turbo":
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        wide = wide / np.sqrt(np.abs(wide @ wide.T).sum(1))[:, None]
        scaled = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
    else:
        scaled = matrix / (np.linalg.norm(matrix) + 1e-7)
    u, values, vt = np.linalg.svd(scaled, full_matrices=False)
    return np.asarray(u * mapped(values, polynomials) @ vt)


def stack(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)) * 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", ORTHOGONALIZATIONS)
def test_each_maps_singular_values_by_its_polynomials(
    method: str, num_steps: int, shape: tuple[int, int]
) -> None:
    matrices = stack(shape)
    got = ORTHOGONALIZATIONS[method](matrices.double(), num_steps, torch.float64)
    for matrix, result in zip(matrices, got, strict=True):
        want = plain(matrix.double().numpy(), method, num_steps)
        np.testing.assert_allclose(result.numpy(), want, rtol=1e-5, atol=1e-6)


def test_the_published_table_is_the_one_in_use() -> None:
    np.testing.assert_allclose(orthogonalization.POLAR_EXPRESS, PUBLISHED, atol=5.01e-5)
    np.testing.assert_array_equal(orthogonalization.POLAR_EXPRESS_PAPER[:6], PAPER)


BANDS = {
    "newton_schulz": (5, 0.66, 1.22),
    "polar_express": (5, 0.84, 1.16),
    "gram": (5, 0.83, 1.14),
    "turbo": (4, 0.72, 1.14),
}
"""Iterations, and where they bring singular values from 0.01 to 1, also in half precision."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32), (24, 200)])
@pytest.mark.parametrize("method", ORTHOGONALIZATIONS)
def test_each_comes_near_the_polar_factor(
    method: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    u, _, vt = torch.linalg.svd(stack(shape, 3).double(), full_matrices=False)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    matrices = (u * values @ vt).float()
    num_steps, lowest, highest = BANDS[method]
    got = ORTHOGONALIZATIONS[method](matrices, num_steps, dtype)
    assert got.dtype == dtype
    found = torch.linalg.svdvals(got.double())
    assert float(found.min()) > lowest and float(found.max()) < highest
    if method != "turbo":  # whose rows are scaled before: the polar factor of another matrix
        error = torch.linalg.matrix_norm(got.double() - u @ vt, ord=2)
        assert float(error.max()) < max(1 - lowest, highest - 1) + 0.01


@pytest.mark.parametrize("seed", range(4))
def test_turbo_does_not_run_away_in_half_precision(seed: int) -> None:
    """Nearly orthogonal rows start at 1, and rounding puts some above it."""
    matrices = torch.randn(16, 16, 160, generator=torch.Generator().manual_seed(seed))
    found = torch.linalg.svdvals(ORTHOGONALIZATIONS["turbo"](matrices, 4, torch.bfloat16).float())
    assert float(found.max()) < 1.14


@pytest.mark.parametrize("method", ORTHOGONALIZATIONS)
def test_zero_gradient_stays_zero(method: str) -> None:
    for shape in SHAPES:
        assert not ORTHOGONALIZATIONS[method](torch.zeros(2, *shape), 4, torch.float32).any()


def test_iterations_that_the_tables_do_not_hold_are_refused() -> None:
    tables = {"polar_express": "POLAR_EXPRESS", "gram": "GRAM", "turbo": "TURBO"}
    assert {k: len(getattr(orthogonalization, name)) for k, name in tables.items()} == MOST_STEPS
    for method, most in MOST_STEPS.items():
        OptimConfig(orthogonalization=method, muon_backend_steps=most)  # type: ignore[arg-type]
        with pytest.raises(ValidationError, match=f"is above {most}.*{method}.*lower it"):
            OptimConfig(orthogonalization=method, muon_backend_steps=most + 1)  # type: ignore[arg-type]


def plain_rule(matrix: np.ndarray, rule: UpdateRule, num_steps: int) -> np.ndarray:
    """Row by row and column by column."""
    matrix = matrix.copy()
    if rule.row_eps is not None:
        for row in matrix:
            row /= max(np.sqrt((row * row).sum()), rule.row_eps)
    matrix = plain(matrix, rule.orthogonalization, num_steps)
    if "row" in rule.post_norm:
        for row in matrix:
            row /= np.sqrt((row * row).sum()) + 1e-7
    if "col" in rule.post_norm:
        for column in matrix.T:
            column /= np.sqrt((column * column).sum()) + 1e-7
    return matrix


RULES = [
    UpdateRule(row_eps=1e-7),
    UpdateRule("polar_express", row_eps=1e-7),
    UpdateRule("gram", row_eps=0.5),
    UpdateRule("turbo", post_norm="row_col"),
    UpdateRule(post_norm="row"),
    UpdateRule(post_norm="col", row_eps=30.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_are_brought_to_norm_one(shape: tuple[int, int], rule: UpdateRule) -> None:
    matrices = stack(shape, 5)
    matrices[1] *= 1e-3  # below the floor of some rules
    matrices[2, 0] *= 100
    got = rule(matrices.double(), 4, torch.float64)
    for matrix, result in zip(matrices, got, strict=True):
        want = plain_rule(matrix.double().numpy(), rule, 4)
        np.testing.assert_allclose(result.numpy(), want, rtol=1e-5, atol=1e-6)


def test_row_norms_are_taken_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 norms would leave rows off by up to 1/256."""
    monkeypatch.setitem(ORTHOGONALIZATIONS, "newton_schulz", lambda stack, steps, dtype: stack)
    rows = UpdateRule(row_eps=1e-7)(stack((20, 33)).bfloat16(), 5, torch.float32)
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(3, 20), rtol=1e-5, atol=0)


def muon_weights(group: Group, form: str, rule: UpdateRule) -> list[list[list[float]]]:
    """The matrices after all steps of either form, with equal gradients on all ranks."""
    params = new_params()
    kind = {"all_reduce": Muon, "reduce_scatter": ShardedMuon}[form]
    muon = kind(params, 5, group, rule)
    for step, (lr_mult, momentum) in enumerate(STEPS):
        for (_, param, _), gradient in zip(params, new_gradients(step), strict=True):
            param.grad = gradient
        muon.step(lr_mult, momentum)
        muon.zero_grad()
    return [param.detach().tolist() for _, param, _ in params]


def plain_muon(rule: UpdateRule) -> list[np.ndarray]:
    """The same, each matrix by itself, in fp64."""
    results = []
    for index, (_, param, row) in enumerate(new_params()):
        weight = param.detach().double().numpy()
        momentum_buffer = np.zeros_like(weight)
        for step, (lr_mult, momentum) in enumerate(STEPS):
            gradient = new_gradients(step)[index].double().numpy()
            momentum_buffer = momentum * momentum_buffer + gradient
            update = plain_rule(gradient + momentum * momentum_buffer, rule, 5)
            lr = row.lr * lr_mult
            scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight = weight * (1 - lr * row.weight_decay) - lr * scale * update
        results.append(weight)
    return results


@pytest.mark.parametrize("form", ["all_reduce", "reduce_scatter"])
@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_whole_steps_of_either_form_follow_the_rule(form: str, rule: UpdateRule) -> None:
    for got, want in zip(muon_weights(ONE, form, rule), plain_muon(rule), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["all_reduce", "reduce_scatter"])
def test_two_ranks_give_the_weights_of_one(form: str) -> None:
    rule = UpdateRule("polar_express", row_eps=1e-7)
    want = plain_muon(rule)
    for answer in run_ranks(muon_weights, 2, form, rule):
        for got, expected in zip(answer, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_settings_reach_the_rule_and_default_to_plain_muon() -> None:
    assert UpdateRule.from_config(OptimConfig()) == PLAIN
    settings = OptimConfig(
        orthogonalization="turbo",
        muon_row_normalize=True,
        muon_row_eps=1e-5,
        muon_post_norm="row_col",
    )
    assert UpdateRule.from_config(settings) == UpdateRule("turbo", 1e-5, "row_col")
    plain_stack = stack((6, 8))
    assert torch.equal(
        PLAIN(plain_stack, 5, torch.float32),
        ORTHOGONALIZATIONS["newton_schulz"](plain_stack, 5, torch.float32),
    )


@pytest.mark.parametrize(
    ("overrides", "first"),
    [
        ({"optim.muon_row_normalize": True}, 1),
        ({"optim.orthogonalization": "polar_express"}, 1),
        ({"optim.muon_post_norm": "row"}, 1),
        ({"optim.weight_decay_taper_start": 0.5}, 6),
    ],
    ids=str,
)
def test_a_run_changes_after_the_first_step_that_a_switch_is_for(
    configure: Callable[..., TrainConfig],  # noqa: F811
    overrides: dict[str, Any],
    first: int,
) -> None:
    """8 steps under strong decay: the taper acts first on the step at 5/8 of the budget."""
    base = {"optim.weight_decay": 5.0, "budget.max_steps": 8}
    plain, changed = losses(configure(**base)), losses(configure(**base, **overrides))
    assert changed[:first] == plain[:first]
    assert changed[first] != plain[first]
