"""One pass over the rows, against the oracle, and the tabu search."""

from __future__ import annotations

import naive
import numpy as np
import pytest

import comq_np
from comq_np import feedback, layouts, starts
from comq_np.orders import ORDERS as ORDER_FUNCTIONS
from comq_np.parallel import Workers
from comq_np.problem import Problem

# One pass, with any feedback.


def pass_of(start, grid="minmax", **fields):
    return comq_np.Recipe("pass", (grid,), order=fields.pop("order", "shared"), start=start, sweeps=0, **fields)


@pytest.mark.parametrize(
    ("m", "size"), [(1, None), (2, None), (23, None), (70, None), (140, 32), (600, None), (23, 5), (30, "tensor")]
)
@pytest.mark.parametrize("order", ["shared", "cyclic", "pivoted"])
def test_nearest_plane_equals_the_oracle(problem, m, size, order):
    W, _, G = problem(m, 13, samples=6 * m)
    q = comq_np.solve(W, G, 3, recipe=pass_of("babai", order=order, damping=0.0), group_size=size)
    d, z, _ = naive.grids_of("minmax", W, G, 8, size, False)
    rows = naive.order_of(order, W[:, 0], G)[0]
    answer = naive.nearest_plane(W, G, d, z, 8, rows, size)
    expected = naive.better(answer, naive.rounded(W, G, d, z, 8, size), size)
    naive.assert_same(q, expected, strict=0.5, margin=3e-4)  # float32 feedback passes through an inverse of G


@pytest.mark.parametrize(("m", "size"), [(1, None), (70, None), (140, 32)])
def test_gram_feedback_is_the_first_sweep_of_the_paper(problem, m, size):
    W, _, G = problem(m, 13)
    q = comq_np.solve(W, G, 3, recipe=pass_of("gram"), group_size=size)
    d, z, _ = naive.grids_of("minmax", W, G, 8, size, False)
    answer = naive.descend(W, G, d, z, 8, size, order="shared", sweeps=1, refit=False)
    naive.assert_same(q, naive.better(answer, naive.rounded(W, G, d, z, 8, size), size), strict=0.6)


@pytest.mark.parametrize("columns", [1, 13])
@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 129, 320, 511, 513, 577, 900, 1100])
def test_half_products_equal_whole_ones(m, columns):
    rng = np.random.default_rng(m)
    below, vectors = rng.normal(size=(2, m, m)), rng.normal(size=(2 * columns, m))
    lower, G, apart = np.tril(below), below + below.transpose(0, 2, 1), vectors.reshape(2, columns, m)
    one = feedback.Feedback(below.astype(np.float32), np.empty((2, m)), np.full(2, True), np.zeros(2))
    for multiply, matrix in ((one.times, lower.transpose(0, 2, 1)), (one.back, lower)):
        made = vectors.astype(np.float32)
        multiply(slice(0, 2), made)
        np.testing.assert_allclose(made, (apart @ matrix).reshape(-1, m), atol=2e-6 * m)
        made = vectors[columns:].astype(np.float32)
        multiply(slice(1, 2), made)
        np.testing.assert_allclose(made, apart[1] @ matrix[1], atol=2e-6 * m)
    expected = np.einsum("kcm,kmi,kci->kc", apart, G, apart).ravel()
    made = layouts.forms(G.astype(np.float32), vectors.astype(np.float32))
    np.testing.assert_allclose(made, expected, atol=2e-6 * m**1.5)


def test_an_indefinite_matrix_falls_back_to_the_feedback_that_needs_no_factor(problem):
    W, X, _ = problem(12, 8)
    G = X.T @ X
    values, vectors = np.linalg.eigh(G)
    values[0] = -1e-5 * values[-1]
    G = (vectors * values) @ vectors.T
    q = comq_np.solve(W, G, 4, recipe=pass_of("babai", search=2, neighbours=3, damping=0.0))
    expected = comq_np.solve(W, G, 4, recipe=pass_of("gram"))
    np.testing.assert_array_equal(q.codes, expected.codes)
    assert any("could not be factored" in note for note in q.report.notes)
    assert not any("could not be factored" in note for note in expected.report.notes)


def test_search_lowers_the_error_of_the_pass(problem):
    W, _, G = problem(60, 40)
    before, after = (
        comq_np.solve(W, G, 3, recipe=pass_of("babai", "shrunk", search=rounds)).report.objective for rounds in (0, 2)
    )
    assert after < 0.97 * before


@pytest.mark.parametrize(("size", "middle"), [(None, 0.03), (20, 0.15), ("tensor", 0.03)])
def test_only_columns_that_stand_to_lose_more_than_the_promise_are_visited_again(problem, size, middle):
    W, _, G = problem(60, 40)
    objective, found = {}, {}
    for promise in (0.0, middle, 1.0):
        found[promise] = comq_np.solve(
            W, G, 3, recipe=pass_of("babai", "shrunk", search=1, promise=promise), group_size=size
        )
        objective[promise] = naive.objective_of(found[promise], W, G)
    never, always = (np.isclose(objective[middle], objective[promise], rtol=1e-5) for promise in (1.0, 0.0))
    assert (never | always).all()
    assert (objective[0.0] <= objective[1.0] * (1 + 1e-5)).all() or size == "tensor"
    if size != "tensor":  # some gain so much, others do not
        assert (never & ~always).any()
        assert (always & ~never).any()


def test_where_leaps_are_made_any_promise_will_do(problem):
    W, _, G = problem(60, 40)
    steps = pass_of("babai", "shrunk", search=1, leaps=1)
    always, never = (comq_np.solve(W, G, 3, recipe=steps.replace(promise=promise)) for promise in (0.0, 1.0))
    without = comq_np.solve(W, G, 3, recipe=steps.replace(promise=1.0, leap_rows=59))
    assert np.array_equal(always.codes, never.codes)
    assert without.report.objective > 1.01 * never.report.objective


def on_given_grid(W, G, levels, size=None, symmetric=False, **fields):
    """Codes of a pass on the min-max grid, and the objectives of all columns."""
    d, z, _ = naive.grids_of("minmax", W, G, levels, size, symmetric)
    steps = pass_of("babai", **fields)
    q = comq_np.solve(W, G, levels=levels, recipe=steps, group_size=size, scale=d, zero_point=-z)
    return q, naive.objective_of(q, W, G)


@pytest.mark.parametrize(("m", "levels"), [(1, 4), (2, 16), (3, 4), (4, 2), (6, 2), (3, 3)])
@pytest.mark.parametrize("order", ["shared", "pivoted"])
def test_as_many_paths_as_there_are_codes_find_the_optimum(problem, m, levels, order):
    W, _, G = problem(m, 30, seed=levels)
    d, z, _ = naive.grids_of("minmax", W, G, levels, None, False)
    # Of the last row the path with the least error takes the nearest code: no more paths than those before it matter.
    _, found = on_given_grid(W, G, levels, order=order, damping=0.0, paths=max(1, levels ** (m - 1)))
    best = [naive.brute_force(W[:, j], G, d[0, j], z[0, j], levels) for j in range(30)]
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-9 * G.max())


@pytest.mark.parametrize("paths", [2, 3, 8])
@pytest.mark.parametrize(("m", "levels"), [(7, 4), (12, 3), (20, 16)])
def test_paths_equal_the_oracle(problem, m, levels, paths):
    W, _, G = problem(m, 24, seed=levels, samples=8 * m)
    d, z, _ = naive.grids_of("minmax", W, G, levels, None, False)
    order = naive.order_of("shared", W[:, 0], G)[0]
    fields = {"damping": 0.0}
    _, found = on_given_grid(W, G, levels, paths=paths, **fields)
    _, single = on_given_grid(W, G, levels, **fields)
    oracle = [naive.cheapest_paths(W[:, j], G, d[0, j], z[0, j], levels, order, paths) for j in range(24)]
    expected = np.minimum(oracle, single)
    assert (np.abs(found - expected) <= 1e-3 * expected).mean() >= 0.9  # else a tie that float32 decides otherwise
    assert found.sum() < single.sum()


@pytest.mark.parametrize("order", ["shared", "pivoted", "cyclic"])
@pytest.mark.parametrize("size", [None, 8, "tensor"])
@pytest.mark.parametrize("levels", [16, 200, 2**16])
def test_paths_never_end_above_a_single_one(problem, order, size, levels):
    """In panels of 64 rows, the last one of 6."""
    W, _, G = problem(134, 20, seed=levels)
    one, *more = (
        on_given_grid(W, G, levels, size, levels == 200, order=order, damping=0.0, paths=k) for k in (1, 4, 32)
    )
    for q, several in more:
        assert several.sum() < 0.985 * one[1].sum()
        if not one[0].report.notes and not q.report.notes:  # neither is plain rounding
            assert (several <= one[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("paths", [1, 5])
@pytest.mark.parametrize(("size", "levels", "symmetric"), [(130, 4, False), (30, 16, True), (7, 1000, False)])
def test_the_error_of_a_pass_is_the_objective_with_its_damping(problem, paths, size, levels, symmetric):
    W, _, G = problem(130, 20, seed=levels)
    G, damping = G / G.diagonal().max(), 0.003
    order = np.array(naive.order_of("shared", W[:, 0], G)[0])[None]
    single = G[np.ix_(order[0], order[0])].astype(np.float32)[None]
    layer = Problem(W[None], single.copy(), order, np.ones(1), size, False, levels, symmetric)
    with Workers(1) as pool:
        grid = starts.start_grid(layer, "minmax", pool)
        (tile,) = layer.tiles
        rows = layer.weights(tile)
        with feedback.triangular(layer, damping, pool) as factored:
            empty = feedback.Pass.like(rows, pool.scratch, "pass")
            found = feedback.visit(layer, tile, rows, grid, factored, paths, empty)
    np.testing.assert_array_equal(layer.G, single)  # whose memory the factor had
    codes = np.empty_like(W)
    codes[order[0]] = found.codes[0]
    Wq = naive.dequantize(codes, grid.scale.T, grid.zero_point.T, size)
    expected = naive.objective(W, Wq, G + damping * np.diag(G).mean() * np.eye(130))
    np.testing.assert_allclose(found.price, expected, rtol=1e-4)


def test_paths_from_a_real_zero_point(problem):
    W, _, G = problem(70, 20)
    scale = (np.ptp(W, axis=0) / 7).astype(np.float32)[None]
    zero = (-W.min(axis=0) / scale).astype(np.float32)
    one, several = (
        comq_np.solve(W, G, 3, recipe=pass_of("babai", damping=0.0, paths=k), scale=scale, zero_point=zero)
        for k in (1, 16)
    )
    assert (naive.objective_of(several, W, G) <= naive.objective_of(one, W, G) * (1 + 1e-5)).all()
    assert several.report.objective < 0.95 * one.report.objective


def test_a_dead_row_takes_no_path(problem):
    W, X, _ = problem(12, 40)
    X[:, ::2] = 0
    G = X.T @ X
    live = np.diag(G) > 0
    d, z, _ = naive.grids_of("minmax", W, G, 4, None, False)
    steps = pass_of("babai", order="cyclic", damping=1e-6, paths=64)
    some = comq_np.solve(W, G, 2, recipe=steps, scale=d, zero_point=-z)
    alone = comq_np.solve(W[live], G[np.ix_(live, live)], 2, recipe=steps, scale=d, zero_point=-z)
    np.testing.assert_array_equal(some.codes[live], alone.codes)


def test_a_pass_in_two_orders_keeps_the_better_for_each_column(problem):
    W, _, G = problem(40, 30)
    apart = [on_given_grid(W, G, 8, order=order, damping=0.0)[1] for order in ("shared", "pivoted")]
    _, together = on_given_grid(W, G, 8, order="shared", other_orders=("pivoted",), damping=0.0)
    assert 0 < (apart[0] < apart[1]).mean() < 1
    np.testing.assert_allclose(together, np.minimum(*apart), rtol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 9, 64, 65, 140])
def test_pivoted_order_makes_each_pivot_from_the_last_one_on_as_small_as_it_can_be(problem, m):
    W, _, G = problem(m, 3)
    if m > 2:
        G[1] = G[:, 1] = 0.0
    rows, near = naive.order_of("pivoted", W[:, 0], G)
    assert near > 0
    assert m <= 2 or rows[-1] == 1
    np.testing.assert_array_equal(ORDER_FUNCTIONS["pivoted"](G[None]), [rows])


# Tabu search.


@pytest.mark.parametrize(("m", "levels"), [(2, 16), (3, 8), (4, 4), (4, 6), (5, 3)])
def test_tabu_search_finds_the_optimum_of_small_problems(problem, m, levels):
    W, _, G = problem(m, 40, seed=levels)
    steps = comq_np.Recipe("leaps", ("minmax",), order="shared", sweeps=50, refit=False, leaps=2, moves=100.0)
    q = comq_np.solve(W, G, levels=levels, recipe=steps)
    found, tiny = naive.objective_of(q, W, G), 1e-5 * naive.objective(W, 0 * W, G)
    best = [
        naive.brute_force(W[:, j], G, float(q.scale[0, j]), -int(q.zero_point[0, j]), levels) for j in range(W.shape[1])
    ]
    assert (found >= best - tiny).all()
    assert (found <= best + tiny).mean() >= 0.95


@pytest.mark.parametrize("size", [None, 7, "tensor"])
def test_tabu_search_never_ends_above_its_start(problem, size):
    W, _, G = problem(40, 30)
    for moves in (0.1, 1.0, 5.0):
        short = comq_np.Recipe("short", ("shrunk",), order="shared", sweeps=4)
        long = short.replace(leaps=1, moves=moves)
        before, after = (
            naive.objective_of(comq_np.solve(W, G, 3, recipe=r, group_size=size), W, G) for r in (short, long)
        )
        if size == "tensor":
            assert after.sum() <= before.sum() * (1 + 1e-6)
        else:
            assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < (0.995 if moves < 1 else 0.95) * before.sum()
