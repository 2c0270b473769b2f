"""Many problems in one call, and working in the memory of G."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import comq_np

RECIPES = ["rtn", "paper", "fast", "balanced", "best"]


def batch(problem, b, m, n):
    """Weights (b, m, n) and Gram matrices (b, m, m) of unequal sizes."""
    made = [problem(m, n, seed=seed) for seed in range(b)]
    return np.stack([one.W for one in made]), np.stack([one.G * 10.0**k for k, one in enumerate(made)])


def assert_each_as_alone(W, G, bits=3, **options):
    q = comq_np.solve(W, G, bits, **options)
    alone = [comq_np.solve(*one, bits, **options) for one in zip(W, G, strict=True)]
    assert q.codes.shape == W.shape
    for name in ("codes", "scale", "zero_point"):
        expected = np.stack([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(q, name), expected, rtol=1e-6 * (name == "scale"), atol=0)
    np.testing.assert_allclose(q.dequantize(), np.stack([one.dequantize() for one in alone]), rtol=1e-6)
    return q, alone


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("b", "m", "n"), [(1, 6, 4), (30, 9, 1), (3, 9, 150), (4, 70, 3), (2, 140, 90)])
def test_each_problem_is_solved_as_if_alone(problem, recipe, b, m, n):
    W, G = batch(problem, b, m, n)
    q, alone = assert_each_as_alone(W, G, recipe=recipe)
    for name in ("objective", "objective_rounding", "objective_start"):
        assert getattr(q.report, name) == pytest.approx(sum(getattr(one.report, name) for one in alone), rel=1e-9)
    assert q.report.optimal == all(one.report.optimal for one in alone)


@pytest.mark.parametrize("recipe", ["paper", "balanced"])
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 7},
        {"group_size": "tensor"},
        {"symmetric": True},
        {"zero_point": "real"},
        {"scale": 0.5},
        {"scale": 0.5, "zero_point": 3},
        {"shrinkage": 0.1},
    ],
)
def test_with_every_option(problem, recipe, options):
    assert_each_as_alone(*batch(problem, 5, 30, 4), recipe=recipe, **options)


def test_scales_of_their_own(problem):
    W, G = batch(problem, 5, 30, 4)
    scale = np.linspace(0.3, 0.8, 20).reshape(5, 1, 4)
    q = comq_np.solve(W, G, 3, scale=scale)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    alone = comq_np.solve(W[3], G[3], 3, scale=scale[3])
    np.testing.assert_array_equal(q.codes[3], alone.codes)


def test_one_matrix_that_cannot_be_factored_leaves_the_others_alone(problem):
    W, G = batch(problem, 4, 12, 3)
    values, vectors = np.linalg.eigh(G[2])
    values[0] = -1e-5 * values[-1]
    G[2] = (vectors * values) @ vectors.T
    q, alone = assert_each_as_alone(W, G, recipe=comq_np.recipe("balanced").replace(damping=0.0, exact=0))
    assert any("could not be factored" in note for note in q.report.notes)
    assert [any("could not be factored" in note for note in one.report.notes) for one in alone] == [0, 0, 1, 0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(problem, threads):
    W, G = batch(problem, 40, 30, 20)
    one, other = comq_np.solve(W, G, 3, threads=1), comq_np.solve(W, G, 3, threads=threads)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale, other.scale)


@pytest.mark.parametrize(
    ("W", "G", "message"),
    [
        ((2, 3, 4), (3, 3), "`G` must have shape (2, 3, 3) to match `W` with 3 rows in 2 matrices, got (3, 3)."),
        ((2, 3, 4), (4, 3, 3), "`G` must have shape (2, 3, 3) to match `W` with 3 rows in 2 matrices, got (4, 3, 3)."),
        ((3, 4), (1, 3, 3), "`G` must be 2-D, got 3-D of shape (1, 3, 3)."),
    ],
)
def test_refused(W, G, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(np.ones(W), np.broadcast_to(np.eye(3), G))
    assert str(error.value) == message


def test_what_is_wrong_with_which_matrix():
    W, G = np.ones((3, 2, 1)), np.stack([np.eye(2)] * 3)
    G[1, 1, 1] = -1
    with pytest.raises(comq_np.InputError, match=r"no negative diagonal entry, got G\[1, 1, 1\] = -1"):
        comq_np.solve(W, G)
    G[1] = [[1, 0.5], [0, 1]]
    with pytest.raises(comq_np.InputError, match=r"symmetric, got G\[1, 0, 1\] = 0.5 and G\[1, 1, 0\] = 0"):
        comq_np.solve(W, G)
    G[1] = [[1, 0.5], [0.5, 0]]
    with pytest.raises(comq_np.InputError, match="row 1 of matrix 1 has a zero on the diagonal"):
        comq_np.solve(W, G)


def gram_of(problem, b, m, n, samples=None):
    """Weights (b, m, n), the Gram of all problems, and one of each."""
    made = [problem(m, n, seed=seed, samples=samples) for seed in range(b)]
    gram = comq_np.Gram(m, problems=b)
    gram.update(np.stack([one.X for one in made], axis=1))
    alone = [
        comq_np.Gram.from_folds(tuple((fold.matrix[p], fold.sum[p], fold.count) for fold in gram.folds))
        for p in range(b)
    ]
    return np.stack([one.W for one in made]), gram, alone


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("b", "m", "n", "samples"), [(1, 6, 4, 20), (30, 9, 1, None), (3, 40, 5, 30), (2, 70, 20, 90)])
def test_a_gram_of_many_problems(problem, recipe, b, m, n, samples):
    """All have the shrinkage in common, that of all of them."""
    W, gram, alone = gram_of(problem, b, m, n, samples)
    q = comq_np.solve(W, gram, 3, recipe=recipe, fit_bias=True)
    options = {"recipe": recipe, "fit_bias": True, "shrinkage": q.report.shrinkage}
    found = [comq_np.solve(*one, 3, **options) for one in zip(W, alone, strict=True)]
    for name in ("codes", "scale", "zero_point", "bias_shift"):
        expected = np.stack([getattr(one, name) for one in found])
        np.testing.assert_allclose(getattr(q, name), expected, rtol=1e-5 * (name != "codes"), atol=1e-6)
    assert q.report.objective == pytest.approx(sum(one.report.objective for one in found), rel=1e-7)
    for p in range(b):
        error = W[p].astype(np.float64) - q.dequantize()[p]
        np.testing.assert_allclose(q.bias_shift[p], gram.mean[p] @ error, rtol=1e-5, atol=1e-6)


def test_one_problem_with_an_axis_for_it_is_that_problem(problem):
    W, gram, (alone,) = gram_of(problem, 1, 12, 40, samples=20)
    q, expected = comq_np.solve(W, gram, 3, fit_bias=True), comq_np.solve(W[0], alone, 3, fit_bias=True)
    assert q.report == expected.report
    for name in ("codes", "scale", "zero_point", "bias_shift"):
        np.testing.assert_array_equal(getattr(q, name)[0], getattr(expected, name))


@pytest.mark.parametrize("recipe", ["balanced", "best"])
@pytest.mark.parametrize(("b", "m", "n"), [(40, 9, 1), (6, 24, 5), (20, 25, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_up_to_25_rows_are_proven(problem, recipe, b, m, n, bits):
    W, gram, alone = gram_of(problem, b, m, n)
    q = comq_np.solve(W, gram, bits, recipe=recipe, shrinkage=0.0)
    assert q.report.optimal
    assert q.report.gap == 0
    for p in range(0, b, 5):
        one = dataclasses.replace(q, codes=q.codes[p], scale=q.scale[p], zero_point=q.zero_point[p])
        assert comq_np.certify(W[p], alone[p], one).optimal.all()
        np.testing.assert_array_equal(comq_np.certify(W[p], alone[p], one).codes, one.codes)


def test_one_gram_is_for_one_problem(problem):
    gram = comq_np.Gram(5)
    gram.update(np.ones((3, 5)))
    with pytest.raises(comq_np.InputError, match="`G` must have shape"):
        comq_np.solve(np.ones((2, 5, 1)), gram)
    for problems, got in ((3, "(3, 5, 5)"), (1, "(1, 5, 5)")):
        with pytest.raises(comq_np.InputError) as error:
            comq_np.solve(np.ones((2, 5, 1)), comq_np.Gram(5, problems=problems))
        assert str(error.value) == (f"`G` must have shape (2, 5, 5) to match `W` with 5 rows in 2 matrices, got {got}.")
    with pytest.raises(comq_np.InputError, match="`G` must be 2-D, got 3-D of shape"):
        comq_np.solve(np.ones((5, 1)), comq_np.Gram(5, problems=1))
    with pytest.raises(comq_np.InputError, match="`G` must have seen inputs, got a Gram with count 0"):
        comq_np.solve(np.ones((2, 5, 1)), comq_np.Gram(5, problems=2))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("m", [1, 40, 70, 300])
def test_overwriting_changes_no_code(problem, kind, recipe, m):
    W, _, G = problem(m, 12)
    G = (G / G.max()).astype(kind)
    expected = comq_np.solve(W, G, 3, recipe=recipe)
    ours = G.copy()
    q = comq_np.solve(W, ours, 3, recipe=recipe, overwrite=True)
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.scale, expected.scale)
    assert q.report.objective == pytest.approx(expected.report.objective, rel=1e-4)


def test_overwriting_a_batch(problem):
    W, G = batch(problem, 3, 70, 5)
    expected = comq_np.solve(W, G, 3)
    np.testing.assert_array_equal(comq_np.solve(W, G.copy(), 3, overwrite=True).codes, expected.codes)


def test_what_may_be_overwritten(problem):
    W, _, G = problem(8, 3)
    for value, got in ((G.tolist(), "'list'"), (G.astype(int), "dtype int64"), (comq_np.Gram(8), "'Gram'")):
        with pytest.raises(comq_np.InputError) as error:
            comq_np.solve(W, value, overwrite=True)
        assert str(error.value) == f"`G` must be an array of float32 or float64 with `overwrite`, got {got}."
    fixed = G.copy()
    fixed.flags.writeable = False
    for value in (fixed, np.asfortranarray(G)):
        with pytest.raises(comq_np.InputError, match="must be C-contiguous and writeable"):
            comq_np.solve(W, value, overwrite=True)
    with pytest.raises(comq_np.InputError, match="`overwrite` must be True or False, got 1"):
        comq_np.solve(W, G, overwrite=1)


@pytest.mark.parametrize(
    "options",
    [{"scale": -1.0}, {"scale": 1.0, "zero_point": np.nan}, {"shrinkage": 2}, {"zero_point": 3}, {"threads": 0}],
)
def test_what_is_refused_overwrites_nothing(problem, options):
    W, _, G = problem(100, 3)
    ours = G.copy()
    with pytest.raises(comq_np.InputError):
        comq_np.solve(W, ours, overwrite=True, **options)
    np.testing.assert_array_equal(ours, G)
