"""Zero points that may be any real number, chosen by the solver or given."""

from __future__ import annotations

import itertools

import naive
import numpy as np
import pytest

import comq_np

RECIPES = ("rtn", "paper", "fast", "balanced", "best")


def dequantized(codes, scale, zero_point, size):
    """Scale * (codes - zero_point) in float64, each group's on its rows."""
    Wq = np.zeros(codes.shape)
    for g, rows in enumerate(naive.groups_of(len(codes), size)):
        Wq[rows] = scale[g] * (codes[rows] - zero_point[g])
    return Wq


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [None, 7, "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 12])
def test_the_result_is_what_its_arrays_say(problem, recipe, size, bits):
    W, _, G = problem(30, 12, seed=bits)
    q = comq_np.solve(W, G, bits, recipe=recipe, group_size=size, zero_point="real")
    assert q.zero_point.dtype == np.float32
    assert q.zero_point.shape == q.scale.shape
    if recipe != "rtn" or size != 7:
        assert (q.zero_point != np.rint(q.zero_point)).any()
    Wq = dequantized(q.codes, q.scale.astype(float), q.zero_point.astype(float), size)
    np.testing.assert_allclose(q.dequantize(), Wq, rtol=1e-6, atol=1e-6 * np.abs(W).max())
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-6)
    assert q.report.objective <= q.report.objective_rounding
    rounding = 1e-5 if bits < 12 else 1e-4  # errors of some 1e-5 of the weights leave float32 fewer places
    falls = [after <= before * (1 + rounding) for before, after in itertools.pairwise(q.report.objectives[1:])]
    assert all(falls)


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_rounding_spans_the_weights_to_both_ends(problem, levels):
    W, _, G = problem(25, 9)
    q = comq_np.solve(W, G, levels=levels, recipe="rtn", zero_point="real")
    low, high = W.min(axis=0), W.max(axis=0)
    np.testing.assert_allclose(q.scale[0], (high - low) / (levels - 1), rtol=1e-6)
    np.testing.assert_allclose(q.zero_point[0], -low / q.scale[0], rtol=1e-5, atol=1e-6)
    ends = q.dequantize()
    np.testing.assert_allclose(ends.min(axis=0), low, rtol=1e-5)
    np.testing.assert_allclose(ends.max(axis=0), high, rtol=1e-5)


@pytest.mark.parametrize("size", [None, 7, "tensor"])
def test_neither_scale_nor_zero_point_is_left_to_improve(problem, size):
    W, _, G = problem(20, 8, seed=5)
    steps = comq_np.recipe("fast").replace(sweeps=2000, refit=True)
    q = comq_np.solve(W, G, 2, recipe=steps, group_size=size, zero_point="real")
    assert q.report.converged
    found = naive.objective_of(q, W, G)
    tiny = 1e-5 * naive.objective(W, 0 * W, G)
    scale, zero_point = q.scale.astype(float), q.zero_point.astype(float)
    for g in range(len(scale)):
        for factor, shift in ((0.999, 0), (1.001, 0), (1, 0.01), (1, -0.01), (0.999, 0.01), (1.001, -0.01)):
            moved = scale.copy(), zero_point.copy()
            moved[0][g] *= factor
            moved[1][g] += shift
            after = naive.objective(W, dequantized(q.codes, *moved, size), G)
            if size == "tensor":
                assert found.sum() <= after.sum() + tiny.sum()
            else:
                assert (found <= after + tiny).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("recipe", ["paper", "balanced"])
def test_a_real_zero_point_takes_out_more_of_the_error(problem, recipe, bits):
    ratios = []
    for seed in range(6):
        W, _, G = problem(64, 32, seed=seed)
        whole, real = (
            comq_np.solve(W, G, bits, recipe=recipe, zero_point=kind).report.objective for kind in ("integer", "real")
        )
        ratios.append(real / whole)
    assert np.exp(np.mean(np.log(ratios))) < 0.98


def test_rows_that_take_one_code_only_leave_the_zero_point_undecided():
    """Then scale and zero point are one variable, and the equations for both are singular."""
    W = np.full((6, 3), [0.5, -2.0, 0.0]) + 1e-9
    q = comq_np.solve(W, np.eye(6) + 1, 3, zero_point="real", recipe="paper")
    np.testing.assert_allclose(q.dequantize(), W, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("m", [1, 3, 5])
def test_given_real_zero_points_make_boxes_of_odd_numbers(m):
    """The symbols -3, -1, 1, 3 of a transmitter are 2 * (code - 1.5): the best of them all."""
    rng = np.random.default_rng(m)
    A = rng.normal(size=(m + 2, m))
    x = rng.choice([-3.0, -1.0, 1.0, 3.0], size=(m, 10))
    W = np.linalg.lstsq(A, A @ x + 0.5 * rng.normal(size=(m + 2, 10)), rcond=None)[0]
    q = comq_np.solve(W, A.T @ A, 2, scale=2.0, zero_point=1.5)
    assert q.report.optimal
    assert set(np.unique(q.dequantize())) <= {-3.0, -1.0, 1.0, 3.0}
    np.testing.assert_array_equal(q.zero_point, np.float32(1.5))
    choices = np.array(list(itertools.product([-3.0, -1.0, 1.0, 3.0], repeat=m)))
    for j in range(10):
        errors = W[:, j].astype(np.float32) - choices
        best = np.einsum("pi,ik,pk->p", errors, A.T @ A, errors).min()
        assert naive.objective_of(q, W.astype(np.float32), A.T @ A)[j] == pytest.approx(best, rel=1e-5)


def test_a_file_keeps_it(problem, tmp_path):
    W, _, G = problem(20, 6)
    q = comq_np.solve(W, G, 3, zero_point="real", group_size=6)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        back = file["fc"]
        assert file.describe()[0]["bytes"] > 0
    assert back.zero_point.dtype == np.float32
    np.testing.assert_array_equal(back.zero_point, q.zero_point)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"zero_point": "real", "symmetric": True},
            "must be \"integer\" with `symmetric`, which fixes it, got 'real'.",
        ),
        ({"zero_point": 1.5, "symmetric": True, "scale": 1.0}, "which fixes it, got numbers."),
        ({"zero_point": "real", "scale": 1.0}, "must be \"integer\" or numbers with `scale`, got 'real'."),
        ({"zero_point": 1.5}, 'must be "integer" or "real" without `scale`, got numbers.'),
        ({"zero_point": "middle"}, "must be one of 'integer', 'real', got 'middle'."),
    ],
)
def test_refused(problem, options, message):
    W, _, G = problem(5, 3)
    with pytest.raises(comq_np.InputError, match="`zero_point`") as error:
        comq_np.solve(W, G, 2, **options)
    assert str(error.value).endswith(message)
