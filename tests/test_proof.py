"""Codes that `solve` proves optimal at their scales, and what its report says of them."""

from __future__ import annotations

import naive
import numpy as np
import pytest

import comq_np

UNPROVEN = comq_np.recipe("balanced").replace(exact=0)


@pytest.mark.parametrize(("m", "levels"), [(1, 16), (2, 16), (3, 8), (4, 4), (5, 4), (6, 3)])
@pytest.mark.parametrize("recipe", ["balanced", "best"])
def test_the_codes_are_the_best_of_all(problem, m, levels, recipe):
    W, _, G = problem(m, 20, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe=recipe)
    assert q.report.optimal
    assert q.report.gap == 0
    tiny = 1e-7 * naive.objective(W, 0 * W, G)
    for j, found in enumerate(naive.objective_of(q, W, G)):
        best = naive.brute_force(W[:, j], G, float(q.scale[0, j]), -int(q.zero_point[0, j]), levels)
        assert found <= best * (1 + 1e-6) + tiny[j]


@pytest.mark.parametrize("size", [None, 6, "tensor"])
@pytest.mark.parametrize("m", [9, 24])
@pytest.mark.parametrize("bits", [2, 4])
def test_short_problems_are_proven_and_never_above_what_was_found_without(problem, size, m, bits):
    W, _, G = problem(m, 30)
    q = comq_np.solve(W, G, bits, group_size=size)
    plain = comq_np.solve(W, G, bits, group_size=size, recipe=UNPROVEN)
    before, after = naive.objective_of(plain, W, G), naive.objective_of(q, W, G)
    if size == "tensor":
        assert after.sum() <= before.sum() * (1 + 1e-6)
    else:
        assert (after <= before * (1 + 1e-6) + 1e-12 * naive.objective(W, 0 * W, G)).all()
    if m == 24 and size is None:
        assert after.sum() < 0.99 * before.sum()
    assert q.report.objective == pytest.approx(after.sum(), rel=1e-6)
    proof = comq_np.certify(W, G, q)
    if q.report.optimal:
        assert q.report.gap == 0
        assert proof.optimal.all()
        np.testing.assert_allclose(proof.objective, after, rtol=1e-6, atol=1e-9 * after.max())
    else:
        assert 0 < q.report.gap < 0.1
        assert proof.bound.sum() <= after.sum() * (1 + 1e-9)
    assert plain.report.gap is None
    assert not plain.report.optimal


def test_longer_problems_are_proven_on_request_only(problem):
    W, _, G = problem(30, 6)
    assert comq_np.solve(W, G, 3).report.gap is None
    asked = comq_np.solve(W, G, 3, recipe=comq_np.recipe("balanced").replace(exact=30)).report
    assert asked.optimal or 0 < asked.gap < 1


def test_where_the_limit_ends_the_search_a_gap_remains(problem):
    W, _, G = problem(64, 4)
    q = comq_np.solve(W, G, 2, recipe=comq_np.recipe("balanced").replace(exact=64))
    assert not q.report.optimal
    assert 0 < q.report.gap < 1
    optimum = comq_np.certify(W, G, q, node_limit=3_000_000).objective.sum()
    assert optimum >= (1 - q.report.gap) * q.report.objective * (1 - 1e-9)


def test_it_is_the_minimised_matrix_that_is_proven():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 10)) @ rng.normal(size=(10, 10))
    W, G = rng.normal(size=(10, 5)).astype(np.float32), X.T @ X
    q = comq_np.solve(W, G, 3, shrinkage=0.2)
    assert q.report.optimal
    shrunk = 0.8 * G + 0.2 * np.diag(G).mean() * np.eye(10)
    at_its_scales = comq_np.certify(W, shrunk, q)
    assert at_its_scales.optimal.all()
    np.testing.assert_allclose(at_its_scales.objective, naive.objective(W, q.dequantize(), shrunk), rtol=1e-6)


@pytest.mark.parametrize("recipe", ["rtn", "paper", "fast"])
def test_other_recipes_claim_nothing(problem, recipe):
    W, _, G = problem(8, 5)
    report = comq_np.solve(W, G, 3, recipe=recipe).report
    assert (report.optimal, report.gap) == (False, None)


def test_a_report_with_a_gap_survives_json(problem):
    W, _, G = problem(8, 5)
    for steps in (UNPROVEN, "balanced"):
        report = comq_np.solve(W, G, 3, recipe=steps).report
        assert comq_np.SolveReport.from_dict(report.to_dict()) == report
    old = {name: value for name, value in report.to_dict().items() if name not in ("optimal", "gap")}
    assert comq_np.SolveReport.from_dict(old).gap is None
    with pytest.raises(comq_np.InputError, match="`gap` must hold float"):
        comq_np.SolveReport.from_dict({**old, "gap": "none"})


def test_a_table_too_large_is_not_searched(problem):
    W, _, G = problem(24, 3)
    assert comq_np.solve(W, G, 12).report.gap is not None
    assert comq_np.solve(W, G, 13).report.gap is None


@pytest.mark.parametrize("recipe", ["balanced", "best", "paper"])
def test_a_matrix_that_is_no_gram_matrix_is_refused(recipe):
    W, G, message = [1.0, -2.0], [[1, 100], [100, 1]], "`G` must be positive semidefinite"
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.solve(W, G, recipe=recipe)
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.certify(W, G, comq_np.solve(W, np.eye(2), recipe=recipe))


@pytest.mark.parametrize("seed", range(20))
def test_gaps_are_shares(seed):
    """Few samples: objectives and bounds are next to nothing, and rounding could take them below it."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 25))
    X = rng.normal(size=(int(rng.integers(1, 4)), m)) * np.exp(2 * rng.normal(size=m))
    report = comq_np.solve(rng.normal(size=(m, 4)), X.T @ X, 4, zero_point="real", shrinkage=seed % 2 / 100).report
    assert 0 <= report.gap <= 1
    assert min(report.objectives) >= 0
