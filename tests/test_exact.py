"""The proof of optimality: against every code there is, in exact arithmetic where rounding could hide a false bound."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import naive
import numpy as np
import pytest
from conftest import make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import comq_np
from comq_np.exact import Certificate, search

#: How many rows the problems for brute force may have with each number of levels.
SMALL = {2: 6, 3: 6, 4: 5, 7: 4, 16: 3}


def certify(W, G, codes, scale, zero_point, levels, *limit):
    """`search` of one problem: none of the arrays has an axis for the problem."""
    found = search(*(values[None] for values in (W, G, codes, scale, zero_point)), levels, *limit)
    return Certificate(*(values[0] for values in vars(found).values()))


def assert_identical(one, two):
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(two, name), err_msg=name, strict=True)


def exhaust(w, G, values):
    """Least objective of one column over all choices of one of `values` (m, levels) in each row."""
    picks = np.array(list(itertools.product(range(values.shape[1]), repeat=len(w))))
    errors = np.asarray(w, dtype=np.float64) - np.take_along_axis(values[None], picks[:, :, None], axis=2)[:, :, 0]
    return np.einsum("pi,ik,pk->p", errors, G, errors).min()


def values_of(scale, zero_point, levels):
    """What the codes of one column stand for, (m, levels)."""
    steps = (np.arange(levels) - np.asarray(zero_point)[:, None]).astype(scale.dtype)
    return (scale[:, None] * steps).astype(np.float64)


def rounded(W, scale, zero_point, levels):
    return np.clip(np.rint(W / scale + zero_point), 0, levels - 1).astype(np.int64)


@st.composite
def problems(draw):
    """W (n, m), G, scale, zero_point (n, m) and levels, small; G may be singular and have dead rows."""
    levels = draw(st.sampled_from(sorted(SMALL)))
    m, n = draw(st.integers(1, SMALL[levels])), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    W, X, _ = make_problem(m, n, draw(st.integers(0, 10_000)), draw(st.sampled_from([None, None, 1, 2, m])))
    if draw(st.booleans()):
        X[:, :: draw(st.integers(2, 4))] = 0
    if draw(st.booleans()):
        X[:, -1] = X[:, 0] * (1 + draw(st.sampled_from([0, 1e-9, 1e-5])))
    scale = (np.ptp(W) + 0.1) / (levels - 1) * rng.uniform(0.2, 1.2, (n, m))
    zero_point = rng.uniform(-1, levels, (n, m))
    if draw(st.booleans()):
        scale, zero_point = scale.astype(np.float32), np.rint(zero_point).astype(np.int32)
    return W.T, X.T @ X, scale, zero_point, levels


def check(found, W, G, start, scale, zero_point):
    """What any certificate must be, whatever the limit."""
    rows = np.arange(W.shape[1])
    for j in range(len(W)):
        values = values_of(scale[j], zero_point[j], 1 + max(found.codes[j].max(), start[j].max()))
        errors = [W[j] - values[rows, codes] for codes in (found.codes[j], start[j])]
        now, before = (error @ G @ error for error in errors)
        rounding = 1e-15 * max((np.sqrt(G.diagonal()) @ np.abs(error)) ** 2 for error in errors)
        assert found.objective[j] == pytest.approx(now, rel=1e-12, abs=rounding)
        assert found.objective[j] <= before * (1 + 1e-12) + rounding
    assert (found.bound <= found.objective).all()


@given(problem=problems(), limit=st.sampled_from([0, 1, 2, 10, 50, 100_000]))
@settings(max_examples=300)
def test_bound_optimum_and_objective_come_in_this_order(problem, limit):
    W, G, scale, zero_point, levels = problem
    start = rounded(W, scale, zero_point, levels)
    found = certify(W, G, start, scale, zero_point, levels, limit)
    check(found, W, G, start, scale, zero_point)
    assert found.codes.max() < levels
    assert found.codes.min() >= 0
    assert (found.nodes <= 2 * limit).all()
    for j in range(len(W)):
        values = values_of(scale[j], zero_point[j], levels)
        optimum = exhaust(W[j], G, values)
        size = (np.sqrt(G.diagonal()) @ np.abs(W[j][:, None] - values).max(axis=1)) ** 2
        assert found.bound[j] <= optimum + 1e-15 * size
        assert found.objective[j] >= optimum - 1e-15 * size
        assert found.optimal[j] or limit < 100_000
        if found.optimal[j]:
            assert found.objective[j] <= optimum * (1 + 2e-9) + 1e-12 * size
            assert found.bound[j] >= found.objective[j] * (1 - 2e-9) - 1e-12 * size


@pytest.mark.parametrize(("m", "levels"), [(6, 2), (5, 4), (3, 16)])
def test_the_oracle_agrees(m, levels):
    W, _, G = make_problem(m, 4)
    d, z, _ = naive.grids_of("minmax", W, G, levels, None, False)
    scale, zero_point = d.T, -z.T
    found = certify(W.T, G, rounded(W.T, scale, zero_point, levels), scale, zero_point, levels)
    assert found.optimal.all()
    for j in range(4):
        optimum = naive.brute_force(W[:, j], G, d[0, j], z[0, j], levels)
        assert found.objective[j] == pytest.approx(optimum, rel=1e-8)
        assert found.bound[j] == pytest.approx(optimum, rel=1e-8)


def exact_optimum(w, G, values):
    """Least objective of one column as a fraction: nothing is rounded."""
    G = [[Fraction(float(x)) for x in row] for row in G]
    errors = [[Fraction(float(x)) - Fraction(float(v)) for v in row] for x, row in zip(w, values, strict=True)]
    rows = range(len(w))
    return min(sum(e[i] * G[i][k] * e[k] for i in rows for k in rows) for e in itertools.product(*errors))


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 0.0])
@pytest.mark.parametrize("single", [False, True])
def test_no_rounding_lifts_a_bound_above_the_optimum(spread, single):
    """Inputs that nearly depend on each other, with a Gram in float32 besides, and errors that they nearly hide."""
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(2, 4))
    X = rng.normal(size=(20, 2)) @ mixing + spread * rng.normal(size=(20, 4))
    G, W = X.T @ X, rng.normal(size=(12, 4))
    hidden = np.linalg.svd(mixing)[2][2:]
    W[6:] = 0.7 * (rng.integers(0, 4, (6, 4)) - 1.3) + 0.3 * rng.normal(size=(6, 2)) @ hidden
    if single:
        G = G.astype(np.float32).astype(np.float64)
    scale, zero_point = np.full((12, 4), 0.7), np.full((12, 4), 1.3)
    start = rounded(W, scale, zero_point, 4)
    for limit in (3, 10_000):
        found = certify(W, G, start, scale, zero_point, 4, limit)
        check(found, W, G, start, scale, zero_point)
        for j in range(12):
            optimum = exact_optimum(W[j], G, values_of(scale[j], zero_point[j], 4))
            assert Fraction(found.bound[j]) <= max(optimum, 0)
    assert found.optimal.all()


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_24_correlated_inputs_are_solved_to_the_end(levels):
    W, _, G = make_problem(24, 16)
    q = comq_np.solve(W, G, levels=levels)
    start, scale, zero_point = q.codes.T, q.scale.T, q.zero_point.T
    found = certify(W.T, G, start, scale, zero_point, levels)
    assert found.optimal.all()
    assert found.codes.dtype == q.codes.dtype
    assert (found.nodes < 100_000).all()
    before = naive.objective(W, q.dequantize(), G)
    assert (found.objective <= before * (1 + 1e-12)).all()
    assert (found.bound >= found.objective * (1 - 1e-7)).all()
    for j in range(16):
        scales, zeros = np.full(24, scale[j]), np.full(24, zero_point[j])
        single = naive.best_single_change(W[:, j], G, scales, found.codes[j], zeros, levels)
        assert single >= found.objective[j] * (1 - 1e-6)


def test_past_the_limit_there_is_still_a_bound():
    W, _, G = make_problem(64, 6)
    q = comq_np.solve(W, G, levels=4, recipe="fast")
    given_codes = q.codes.T, q.scale.T, q.zero_point.T, 4
    bounds = [certify(W.T, G, *given_codes, limit) for limit in (0, 1, 100, 5000)]
    assert not bounds[-1].optimal.any()
    assert (bounds[-1].nodes <= 10_000).all()
    assert (bounds[-1].bound > 0.25 * bounds[-1].objective).all()
    for one, two in itertools.pairwise(bounds):
        assert (two.objective <= one.objective).all()
        assert (one.bound <= two.objective).all()


def test_dead_rows_keep_their_codes():
    W, X, _ = make_problem(8, 3)
    X[:, [1, 4, 5]] = 0
    scale, zero_point = np.full((3, 1), 0.5), np.full((3, 1), 2)
    start = np.full((3, 8), 3)
    found = certify(W.T, X.T @ X, start, scale, zero_point, 4)
    assert found.optimal.all()
    assert (found.codes[:, [1, 4, 5]] == 3).all()
    nothing = certify(W.T, 0 * X.T @ X, start, scale, zero_point, 4)
    assert nothing.optimal.all()
    assert not nothing.objective.any()
    np.testing.assert_array_equal(nothing.codes, start)


def test_codes_stay_where_others_are_only_as_good():
    """Also where the matrix that is factored, a little above a singular G, does prefer the others."""
    start = np.array([[0, 3]])
    found = certify(np.full((1, 2), 1.5), np.ones((2, 2)), start, np.ones((1, 1)), np.zeros((1, 1)), 4)
    assert found.optimal.all()
    assert not found.objective.any()
    np.testing.assert_array_equal(found.codes, start)


def test_weights_on_the_grid_are_found():
    rng = np.random.default_rng(0)
    _, _, G = make_problem(12, 1)
    codes, scale, zero_point = rng.integers(0, 8, (5, 12)), rng.uniform(0.1, 1, (5, 12)), rng.uniform(0, 8, (5, 12))
    W = scale * (codes - zero_point)
    found = certify(W, G, np.zeros_like(codes), scale, zero_point, 8)
    assert found.optimal.all()
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.objective, 0)
    again = certify(W, G, codes, scale, zero_point, 8)
    assert not again.nodes.any()
    assert again.optimal.all()


@pytest.mark.parametrize("power", [24, 25, 26, 27])
def test_a_zero_point_beyond_what_float32_counts(power):
    """Codes far from the zero point stand for values that float32 rounds unevenly, many to the same one."""
    _, _, G = make_problem(3, 1)
    scale, zero_point = np.full((40, 3), 0.3, np.float32), np.full((40, 3), -(2**power) - 3, np.int32)
    values = values_of(scale[0], zero_point[0], 16)
    W = np.random.default_rng(power).uniform(values[0, 0], values[0, -1], (40, 3))
    found = certify(W, G, np.zeros((40, 3)), scale, zero_point, 16)
    assert found.optimal.all()
    np.testing.assert_allclose(found.objective, [exhaust(w, G, values) for w in W], rtol=1e-8)


def test_same_to_the_bit_whatever_the_columns_beside_it():
    W, _, G = make_problem(20, 8)
    scale = np.linspace(0.3, 0.6, 8, dtype=np.float32)[:, None]
    zero_point, before = np.full((8, 1), 4), W.copy()
    start = rounded(W.T, scale, zero_point, 8).astype(np.float32)
    whole = certify(W.T, G, start, scale, zero_point, 8, 2000)
    parts = [certify(W.T[[j]], G, start[[j]], scale[[j]], zero_point[[j]], 8, 2000) for j in range(8)]
    assert_identical(
        whole, Certificate(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))
    )
    assert whole.codes.dtype == np.float32
    np.testing.assert_array_equal(W, before)
    np.testing.assert_array_equal(start, rounded(W.T, scale, zero_point, 8))


@pytest.mark.parametrize("limit", [0, 30, 100_000])
@pytest.mark.parametrize("single", [False, True])
def test_a_batch_is_solved_as_its_problems_are_one_by_one(limit, single):
    """To the bit, whatever the problem before left behind: dead rows elsewhere, none alive, a singular G."""
    layers = [make_problem(9, 3, seed, samples) for seed, samples in enumerate([None, 2, None, None, 12, None])]
    layers[1].X[:, [0, 5]], layers[2].X[:], layers[4].X[:, [2, 8]] = 0, 0, 0
    W, G = np.stack([layer.W.T for layer in layers]), np.stack([layer.X.T @ layer.X for layer in layers])
    scale, zero_point = np.full((6, 3, 1), 0.4), np.array([3, 4, 5]).reshape(3, 1) + np.zeros((6, 3, 1), np.int32)
    if single:
        scale, zero_point = np.broadcast_to(scale.astype(np.float32), W.shape), zero_point.astype(np.float32)
    start = rounded(W, scale, zero_point, 8).astype(np.uint8)
    whole = search(W, G, start, scale, zero_point, 8, limit)
    ones = [certify(W[p], G[p], start[p], scale[p], zero_point[p], 8, limit) for p in range(6)]
    assert_identical(whole, Certificate(*map(np.stack, zip(*(vars(one).values() for one in ones), strict=True))))
    assert whole.codes.shape == (6, 3, 9)
    assert whole.optimal[2].all()
    assert whole.optimal.all() == (limit == 100_000)
    assert (whole.codes != start).any() == (limit > 0)


def test_one_problem_without_a_gram_matrix_is_enough_to_refuse_a_batch():
    W, _, G = make_problem(4, 2)
    bad = G.copy()
    bad[0, 1] = bad[1, 0] = 100 * np.sqrt(G[0, 0] * G[1, 1])
    given_codes = np.zeros((3, 2, 4)), np.ones((3, 2, 1)), np.zeros((3, 2, 1)), 4
    assert search(np.stack([W.T] * 3), np.stack([G] * 3), *given_codes).optimal.all()
    with pytest.raises(comq_np.InputError, match="`G` must be positive semidefinite"):
        search(np.stack([W.T] * 3), np.stack([G, G, bad]), *given_codes)


# The public function.


@pytest.mark.parametrize("size", [None, 5, "tensor"])
def test_certify_a_result(size):
    W, _, G = make_problem(12, 9, seed=3)
    q = comq_np.solve(W, G, 3, recipe="paper", group_size=size)
    proof = comq_np.certify(W, G, q)
    assert (proof.codes.shape, proof.codes.dtype) == (q.codes.shape, q.codes.dtype)
    assert proof.optimal.all()
    better = dataclasses.replace(q, codes=proof.codes)
    np.testing.assert_allclose(proof.objective, naive.objective(W, better.dequantize(), G), rtol=1e-9)
    before = naive.objective(W, q.dequantize(), G)
    assert (proof.objective <= before * (1 + 1e-9)).all()
    assert proof.objective.sum() < 0.97 * before.sum()


def test_certify_more_columns_than_a_tile():
    W, _, G = make_problem(4, 300)
    q = comq_np.solve(W, G, 2, recipe="paper")
    proof = comq_np.certify(W, G, q)
    assert proof.codes.shape == W.shape
    for columns in (slice(0, 3), slice(126, 131), slice(297, 300)):
        part = dataclasses.replace(q, codes=q.codes[:, columns], scale=q.scale[:, columns])
        part = dataclasses.replace(part, zero_point=q.zero_point[:, columns])
        found = comq_np.certify(W[:, columns], G, part)
        assert_identical(found, Certificate(*(values[..., columns] for values in vars(proof).values())))


@pytest.mark.parametrize("levels", [257, 1000, 2**12, 2**16])
def test_certify_wide_codes(levels):
    W, _, G = make_problem(2, 12, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe="paper")
    proof = comq_np.certify(W, G, q)
    assert proof.codes.dtype == np.uint16
    assert proof.optimal.all()
    best = [naive.best_of_two(W[:, j], G, float(q.scale[0, j]), int(q.zero_point[0, j]), levels) for j in range(12)]
    np.testing.assert_allclose(proof.objective, best, rtol=1e-8)
    W, _, G = make_problem(12, 5, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe="best")
    proof = comq_np.certify(W, G, q)
    assert proof.optimal.all()
    assert (proof.bound >= 0.999 * proof.objective).all()
    assert proof.objective.sum() > 0.7 * q.report.objective


def test_certify_one_column():
    W, _, G = make_problem(8, 1)
    q = comq_np.solve(W[:, 0], G, 2)
    assert comq_np.certify(W[:, 0], G, q).codes.shape == (8,)


def test_refused_results():
    W, _, G = make_problem(8, 2)
    q = comq_np.solve(W, G, 2)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.certify(W[:, :1], G, q)
    assert str(error.value) == "`q` must be a QuantizedArray of shape (8, 1), as `W` has, got of shape (8, 2)."
    with pytest.raises(comq_np.InputError, match="got 'ndarray'"):
        comq_np.certify(W, G, q.codes)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.certify(W, G, dataclasses.replace(q, codes=q.codes + np.uint8(4)))
    assert str(error.value) == "`q` must have codes from 0 to 3, got some from 4 to 7."
    with pytest.raises(comq_np.InputError, match="`node_limit` must be an integer from 0"):
        comq_np.certify(W, G, q, node_limit=-1)
    W, _, G = make_problem(513, 1)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.certify(W, G, comq_np.solve(W, G, 16, recipe="rtn"))
    assert str(error.value) == "`q` must have at most 512 rows with 65536 levels to be searched, got 513."
