"""What `solve` reports, and what it promises whatever the recipe."""

from __future__ import annotations

import itertools

import naive
import numpy as np
import pytest

import comq_np

RECIPES = ("rtn", "paper", "fast", "balanced", "best")


# Every objective of a report.


@pytest.mark.parametrize("recipe", ["paper", "fast", "balanced", "best"])
@pytest.mark.parametrize("size", [None, 9, "tensor"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_every_objective_is_that_of_the_codes(problem, recipe, size, shrinkage):
    """Those after each sweep are seen by stopping there; they are of the matrix that is minimised."""
    W, _, G = problem(40, 12, seed=7)
    minimised = (1 - shrinkage) * G + shrinkage * np.diag(G).mean() * np.eye(40)
    steps = comq_np.recipe(recipe).replace(trial=0, leaps=0)
    if steps.refit == "ends":  # where a solve that stops earlier ends with a refit, this one has none
        at_the_end = comq_np.solve(W, G, 3, recipe=steps, group_size=size, shrinkage=shrinkage)
        found = naive.objective_of(at_the_end, W, minimised).sum()
        assert not steps.sweeps or at_the_end.report.objectives[-1] == pytest.approx(found, rel=1e-4)
        assert at_the_end.report.objective == pytest.approx(naive.objective_of(at_the_end, W, G).sum(), rel=1e-4)
        steps = steps.replace(refit=False)
    report = comq_np.solve(W, G, 3, recipe=steps, group_size=size, shrinkage=shrinkage).report
    stops = [
        comq_np.solve(W, G, 3, recipe=steps.replace(sweeps=k), group_size=size, shrinkage=shrinkage)
        for k in range(report.sweeps + 1)
    ]
    assert not any("keep plain rounding" in note for q in stops[1:] for note in q.report.notes)
    for objective, q in zip(report.objectives, stops[1:], strict=True):
        assert objective == pytest.approx(naive.objective_of(q, W, minimised).sum(), rel=1e-4)
    for q in stops:
        assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-4)
        assert q.report.objective_start == pytest.approx(report.objective_start, rel=1e-4)
    if not any("keep plain rounding" in note for note in stops[0].report.notes):
        assert report.objective_start == pytest.approx(naive.objective_of(stops[0], W, minimised).sum(), rel=1e-4)
    d, z, _ = naive.grids_of("minmax", W, G, 8, size, False)
    rounding = naive.rounded(W, G, d, z, 8, size).objective.sum()
    assert report.objective_rounding == pytest.approx(rounding, rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"trial": 1.0, "leaps": 0},
        {"trial": 1.0, "leap_rows": 0},
        {"trial": 1.0},
        {"sweeps": 0},
        {"sweeps": 0, "leaps": 2},
    ],
)
@pytest.mark.parametrize(("m", "size"), [(40, None), (90, None), (90, 20)])
def test_a_refit_at_the_ends_comes_last_whatever_the_steps(problem, fields, m, size):
    W, _, G = problem(m, 20)
    G = G.astype(np.float32)  # whose objective is followed, not computed anew
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("balanced").replace(exact=0, **fields), group_size=size)
    assert q.report.objectives[-1] == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-5)
    assert q.report.objective == pytest.approx(q.report.objectives[-1], rel=1e-5)
    if size is None:
        steps = q.codes.astype(float) - q.zero_point
        gain = np.einsum("ij,ij->j", steps, G @ (W - q.dequantize())) / np.einsum("ij,ij->j", steps, G @ steps)
        assert (np.abs(gain) <= 1e-5 * q.scale[0]).all()


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("recipe", ["fast", "balanced", "paper"])
@pytest.mark.parametrize(("m", "shrinkage"), [(70, 0.0), (300, 0.0), (300, 0.05)])
def test_the_objective_is_as_exact_as_the_matrix(problem, bits, recipe, m, shrinkage):
    W, _, G = problem(m, 40)
    q = comq_np.solve(W, G, bits, recipe=recipe, shrinkage=shrinkage)
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-10)


# Other promises.


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [None, 10, "tensor"])
@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
def test_report_fits_the_result(problem, recipe, size, bits):
    W, X, G = problem(36, 14, seed=bits)
    q = comq_np.solve(W, G, bits, recipe=recipe, group_size=size)
    report = q.report
    assert report.recipe == recipe
    assert report.backend == "cpu"
    assert report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-5)
    assert report.objective == pytest.approx(np.linalg.norm(X @ q.dequantize() - X @ W) ** 2, rel=1e-5)
    assert report.relative_error == pytest.approx(report.objective / np.linalg.norm(X @ W) ** 2, rel=1e-5)
    d, z, _ = naive.grids_of("minmax", W, G, 2**bits, size, False)
    rounding = naive.rounded(W, G, d, z, 2**bits, size).objective.sum()
    near = 1e-3 if bits <= 12 else 1e-2  # that the scale is float32 tips some of the codes
    assert report.objective_rounding == pytest.approx(rounding, rel=near)
    assert report.objective <= report.objective_rounding
    assert len(report.objectives) == len(report.codes_changed) == report.sweeps
    assert report.sweeps == 0 if recipe in ("rtn", "fast") else report.sweeps >= 1
    assert report.sweeps <= 3 or recipe != "paper"
    assert all(0 <= changed <= W.size for changed in report.codes_changed)
    assert report.objective_start > 0
    assert report.seconds > 0


@pytest.mark.parametrize("size", [None, 10, "tensor"])
def test_start_and_sweeps_equal_the_oracle(problem, size):
    """The report's course: plain rounding on the first grid, then the objective and the changes of every sweep."""
    for seed in range(20):
        W, _, G = problem(22, 7, seed=seed)
        answers = [naive.solve(W, G, 8, size=size, sweeps=sweeps) for sweeps in (1, 2, 3, 4)]
        if min(answer.margin.min() for answer in answers) > naive.MARGIN:
            break
    else:
        pytest.fail("no problem keeps clear of rounding edges")
    report = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(sweeps=4), group_size=size).report
    d, z, _ = naive.grids_of("paper", W, G, 8, size, False)
    start = naive.rounded(W, G, d, z, 8, size)
    assert report.objective_start == pytest.approx(start.objective.sum(), rel=1e-4)
    courses = [naive.descend(W, G, d, z, 8, size, sweeps=sweeps) for sweeps in (1, 2, 3, 4)]
    expected = [course.objective.sum() for course in courses]
    changed = tuple((a.codes != b.codes).sum() for a, b in itertools.pairwise([start, *courses]))
    done = report.sweeps  # it stops early where a sweep changes nothing
    assert done == 4 or (report.converged and changed[done - 1 :] == (0,) * (5 - done))
    np.testing.assert_allclose(report.objectives, expected[:done], rtol=1e-4)
    assert report.codes_changed == changed[:done]


@pytest.mark.parametrize("recipe", ["paper", "balanced"])
def test_callback_hears_of_every_sweep(problem, recipe):
    W, _, G = problem(20, 6)
    heard = []
    report = comq_np.solve(W, G, 3, recipe=recipe, callback=lambda sweep, value: heard.append((sweep, value))).report
    assert heard == [(k + 1, value) for k, value in enumerate(report.objectives)]


def test_a_callback_that_raises_ends_the_solve(problem):
    W, _, G = problem(20, 6)

    def stop(sweep, value):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        comq_np.solve(W, G, 3, callback=stop)
    assert comq_np.solve(W, G, 3, recipe="paper").report.sweeps == 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_grids_are_no_worse_than_either(problem, bits):
    W, _, G = problem(64, 48, seed=bits)
    both = naive.objective_of(comq_np.solve(W, G, bits, recipe=comq_np.Recipe("two", ("paper", "shrunk"))), W, G)
    for grid in ("paper", "minmax", "shrunk"):
        alone = naive.objective_of(comq_np.solve(W, G, bits, recipe=comq_np.Recipe(grid, (grid,))), W, G)
        assert (both <= alone * (1 + 1e-5)).all()
    assert both.sum() < 0.98 * naive.objective_of(comq_np.solve(W, G, bits, recipe="paper"), W, G).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_recipes_get_better_from_one_to_the_next(problem, bits):
    W, _, G = problem(64, 48, seed=bits)
    rtn, paper, fast, balanced, best = (comq_np.solve(W, G, bits, recipe=name).report.objective for name in RECIPES)
    assert best < 0.98 * balanced < 0.9 * fast < 0.85 * paper < 0.4 * rtn


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("samples", [32, 64, 1000])
def test_damping_helps_where_inputs_nearly_depend_on_each_other(problem, samples, bits):
    """Then the nearest plane asks of rows what is far outside of their codes, and clipping undoes its plan."""
    ratios = []
    for seed in range(3):
        W, _, G = problem(64, 32, seed=seed, samples=samples)
        damped, plain = (
            comq_np.solve(W, G, bits, recipe=comq_np.recipe("balanced").replace(damping=damping)).report.objective
            for damping in (None, 1e-6)
        )
        ratios.append(damped / plain)
    assert np.exp(np.mean(np.log(ratios))) < (0.98 if samples < 1000 else 1.02)


@pytest.mark.parametrize("size", [None, 4, "tensor"])
@pytest.mark.parametrize("recipe", ["paper", "balanced", comq_np.Recipe("short", ("shrunk",), sweeps=1, refit=False)])
def test_never_worse_than_rounding(problem, size, recipe):
    """Nearly uncorrelated inputs: here a descent from zero error now and then ends above plain rounding."""
    replaced = 0
    for seed in range(8):
        W, X, _ = problem(6, 40, seed=seed)
        G = np.eye(6) + 3 * X.T @ X / np.trace(X.T @ X)
        q = comq_np.solve(W, G, 3, recipe=recipe, group_size=size)
        rounding = comq_np.solve(W, G, 3, recipe="rtn", group_size=size)
        assert q.report.objective_rounding == pytest.approx(rounding.report.objective, rel=1e-12)
        assert q.report.objective <= q.report.objective_rounding
        if size != "tensor":
            assert (naive.objective_of(q, W, G) <= naive.objective_of(rounding, W, G) * (1 + 1e-5)).all()
        replaced += any("rounding" in note for note in q.report.notes)
    if recipe == "paper" and size is None:
        assert replaced > 0


def test_recipe_and_its_name_are_the_same(problem):
    W, _, G = problem(20, 6)
    for name in RECIPES:
        one, two = comq_np.solve(W, G, recipe=name), comq_np.solve(W, G, recipe=comq_np.recipe(name))
        np.testing.assert_array_equal(one.codes, two.codes)
        np.testing.assert_array_equal(one.scale, two.scale)


def test_replace_changes_only_what_it_names():
    paper = comq_np.recipe("paper")
    assert paper == comq_np.Recipe("paper", ("paper",), order="greedy", start="float", sweeps=3, refit=True)
    assert paper.replace(order="cyclic") == comq_np.Recipe("paper", ("paper",), order="cyclic")
    assert paper.order == "greedy"
    assert comq_np.recipe("best").replace(name="balanced") != comq_np.recipe("balanced")
    assert comq_np.recipe("rtn").sweeps == 0


def test_default_is_four_bits_balanced(problem):
    W, _, G = problem(30, 8)
    q, same = comq_np.solve(W, G), comq_np.solve(W, G, 4, recipe="balanced")
    np.testing.assert_array_equal(q.codes, same.codes)
    assert (q.bits, q.levels, q.group_size, q.bias_shift, q.report.recipe) == (4, 16, None, None, "balanced")


@pytest.mark.parametrize(
    ("levels", "bits"),
    [(2, 1), (3, 2), (4, 2), (5, 3), (9, 4), (16, 4), (17, 5), (256, 8), (257, 9), (1000, 10), (65536, 16)],
)
def test_levels_take_the_place_of_bits(problem, levels, bits):
    W, _, G = problem(30, 8)
    q = comq_np.solve(W, G, levels=levels)
    assert (q.bits, q.levels) == (bits, levels)
    assert q.codes.max() < levels
    assert q.codes.dtype == (np.uint8 if bits <= 8 else np.uint16)
    if levels == 2**bits:
        np.testing.assert_array_equal(q.codes, comq_np.solve(W, G, bits).codes)


@pytest.mark.parametrize("recipe", ["paper", "rtn", "balanced"])
@pytest.mark.parametrize("size", [None, 8, "tensor"])
def test_types_and_shapes(problem, recipe, size):
    W, _, G = problem(20, 6)
    q = comq_np.solve(W, G, 5, recipe=recipe, group_size=size)
    groups = 3 if size == 8 else 1
    assert (q.codes.dtype, q.codes.shape) == (np.uint8, (20, 6))
    assert (q.scale.dtype, q.scale.shape) == (np.float32, (groups, 6))
    assert (q.zero_point.dtype, q.zero_point.shape) == (np.int32, (groups, 6))
    assert (q.scale > 0).all()
    assert q.codes.max() <= 31
    Wq = q.dequantize()
    assert (Wq.dtype, Wq.shape) == (np.float32, (20, 6))
    scale, zero = (naive.rows_of(values, 20, size).astype(np.float32) for values in (q.scale, q.zero_point))
    np.testing.assert_array_equal(Wq, scale * (q.codes.astype(np.float32) - zero))


@pytest.mark.parametrize("size", [None, 8, "tensor"])
def test_one_dimensional_weights_are_one_column(problem, size):
    W, _, G = problem(20, 1)
    q, column = comq_np.solve(W[:, 0], G, 3, group_size=size), comq_np.solve(W, G, 3, group_size=size)
    assert q.codes.shape == q.dequantize().shape == (20,)
    assert q.scale.shape == (3 if size == 8 else 1, 1)
    np.testing.assert_array_equal(q.codes, column.codes[:, 0])
    np.testing.assert_array_equal(q.dequantize(), column.dequantize()[:, 0])


# The bias.


@pytest.mark.parametrize("recipe", ["paper", "balanced", "rtn"])
@pytest.mark.parametrize("size", [None, 8, "tensor"])
def test_fitted_bias_takes_up_the_mean_error(problem, recipe, size):
    W, X, _ = problem(24, 10, seed=4)
    gram = comq_np.Gram(24)
    gram.update(X[:70])
    gram.update(X[70:])
    q = comq_np.solve(W, gram, 3, recipe=recipe, group_size=size, fit_bias=True)
    error = X @ q.dequantize() - X @ W
    assert (q.bias_shift.dtype, q.bias_shift.shape) == (np.float32, (10,))
    np.testing.assert_allclose(q.bias_shift, -error.mean(axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(q.bias_shift, gram.mean @ (W - q.dequantize()), rtol=1e-4, atol=1e-5)
    centred = X - X.mean(axis=0)
    assert q.report.objective == pytest.approx(np.linalg.norm(error + q.bias_shift) ** 2, rel=1e-4)
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, centred.T @ centred).sum(), rel=1e-4)
    assert q.report.relative_error == pytest.approx(q.report.objective / np.linalg.norm(centred @ W) ** 2, rel=1e-4)


def test_fitted_bias_solves_the_centred_problem(problem):
    W, X, _ = problem(24, 20, seed=4)
    gram = comq_np.Gram(24)
    gram.update(X)
    centred = X - X.mean(axis=0)
    naive.assert_same(
        comq_np.solve(W, gram, 3, recipe="paper", fit_bias=True), naive.solve(W, centred.T @ centred, 8), strict=0.8
    )


def test_fitted_bias_helps_on_inputs_not_seen():
    """Off-centre inputs, judged on other samples of the same kind: with the bias, less error than without."""
    rng = np.random.default_rng(0)
    mixing, offset = rng.normal(size=(48, 48)), 3 * rng.normal(size=48)
    seen, unseen = (rng.normal(size=(400, 48)) @ mixing + offset for _ in range(2))
    W = rng.normal(size=(48, 32)).astype(np.float32)
    gram = comq_np.Gram(48)
    gram.update(seen)
    plain, fitted = (comq_np.solve(W, gram, 3, fit_bias=fit) for fit in (False, True))
    without = np.linalg.norm(unseen @ plain.dequantize() - unseen @ W)
    with_bias = np.linalg.norm(unseen @ fitted.dequantize() + fitted.bias_shift - unseen @ W)
    assert plain.bias_shift is None
    assert with_bias < 0.99 * without


def test_a_gram_and_its_matrix_give_the_same(problem):
    W, X, _ = problem(24, 10)
    gram = comq_np.Gram(24)
    gram.update(X)
    one, two = comq_np.solve(W, gram, 3, shrinkage=0), comq_np.solve(W, gram.matrix, 3)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(one.scale, two.scale)
    assert one.report.objective == two.report.objective
