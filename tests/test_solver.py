"""`solve` against the oracle: which codes and which scales."""

from __future__ import annotations

import naive
import numpy as np
import pytest

import comq_np

ORDERS = ("greedy", "shared", "cyclic")
RECIPES = ("rtn", "paper", "fast", "balanced", "best")


# Against the oracle.


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", ORDERS)
def test_paper_equals_the_oracle(problem, bits, order):
    W, _, G = problem(40, 24, seed=bits)
    q = comq_np.solve(W, G, bits, recipe=comq_np.recipe("paper").replace(order=order))
    naive.assert_same(q, naive.solve(W, G, 2**bits, order=order))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (2, 1), (3, 5), (17, 1), (31, 130), (129, 9), (260, 12)])
@pytest.mark.parametrize("bits", [2, 4])
def test_paper_equals_the_oracle_in_every_shape(problem, m, n, bits):
    W, _, G = problem(m, n)
    naive.assert_same(comq_np.solve(W, G, bits, recipe="paper"), naive.solve(W, G, 2**bits), strict=0.75)


@pytest.mark.parametrize("order", ORDERS)
def test_more_sweeps_equal_the_oracle(problem, order):
    W, _, G = problem(48, 16, seed=3)
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(order=order, sweeps=12))
    naive.assert_same(q, naive.solve(W, G, 8, order=order, sweeps=12), strict=0.75)


@pytest.mark.parametrize("sweeps", [1, 2, 3, 5])
@pytest.mark.parametrize("refit", [False, True])
def test_each_number_of_sweeps_equals_the_oracle(problem, sweeps, refit):
    W, _, G = problem(32, 20, seed=sweeps)
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(sweeps=sweeps, refit=refit))
    naive.assert_same(q, naive.solve(W, G, 8, sweeps=sweeps, refit=refit))


def test_a_first_sweep_that_only_rounds_is_not_the_last(problem):
    W, _, G = problem(7, 2)
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(order="cyclic", refit=False))
    naive.assert_same(q, naive.solve(W, G, 8, order="cyclic", refit=False))
    assert q.report.codes_changed[0] == 0 < q.report.codes_changed[1]


@pytest.mark.parametrize(("m", "size"), [(40, 7), (90, 3), (90, 11), (200, 48), (300, 140), (300, None)])
@pytest.mark.parametrize("zero_point", ["integer", "real"])
@pytest.mark.parametrize("seed", range(3))
def test_a_refit_equals_the_oracle(problem, m, size, zero_point, seed):
    W, _, G = problem(m, 7, seed)
    options = {"group_size": size, "zero_point": zero_point}
    before = comq_np.solve(W, G, 3, recipe="rtn", **options)
    once = comq_np.Recipe("once", ("minmax",), start="rounding", sweeps=0, refit="ends")
    after = comq_np.solve(W, G, 3, recipe=once, **options)
    np.testing.assert_array_equal(after.codes, before.codes)
    scale, zero = (naive.rows_of(values.astype(float), m, size) for values in (before.scale, before.zero_point))
    if zero_point == "integer":
        naive.refit_columns(W.astype(float), after.codes - zero, scale, G, naive.groups_of(m, size))
        np.testing.assert_allclose(naive.rows_of(after.scale, m, size), scale, rtol=3e-6)
        return
    for rows in naive.groups_of(m, size):  # one group after the other, least squares in scale and offset
        for j in range(W.shape[1]):
            rest = W[:, j] - scale[:, j] * (after.codes[:, j] - zero[:, j])
            rest[rows] = W[rows, j]
            B = np.zeros((m, 2))
            B[rows] = np.stack([after.codes[rows, j], np.ones(len(rows))], axis=1)
            found, shift = np.linalg.lstsq(B.T @ G @ B, B.T @ G @ rest)[0]
            if found > 0:
                scale[rows, j], zero[rows, j] = found, -shift / found
    np.testing.assert_allclose(after.dequantize(), scale * (after.codes - zero), rtol=0, atol=1e-5 * np.abs(W).max())


@pytest.mark.parametrize(("m", "size"), [(40, 8), (43, 8), (20, 1), (20, 19), (20, 20), (20, 64), (300, 128)])
@pytest.mark.parametrize("order", ORDERS)
def test_groups_equal_the_oracle(problem, m, size, order):
    W, _, G = problem(m, 12, seed=size)
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(order=order), group_size=size)
    assert q.scale.shape == q.zero_point.shape == (-(-m // size), 12)
    naive.assert_same(q, naive.solve(W, G, 8, size=size, order=order), strict=0.7, rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
def test_one_scale_for_all_equals_the_oracle(problem, bits, order):
    for seed in range(6):
        W, _, G = problem(18, 9, seed=seed)
        answer = naive.solve(W, G, 2**bits, size="tensor", order=order)
        if answer.margin.min() > naive.MARGIN:
            break
    q = comq_np.solve(W, G, bits, recipe=comq_np.recipe("paper").replace(order=order), group_size="tensor")
    assert q.group_size == "tensor"
    assert q.scale.shape == (1, 9)
    assert len(np.unique(q.scale)) == len(np.unique(q.zero_point)) == 1
    naive.assert_same(q, answer)


@pytest.mark.parametrize("size", [None, 16, "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 5, 16, 200, 256])
def test_rounding_equals_the_oracle(problem, size, symmetric, levels):
    W, _, G = problem(50, 30, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe="rtn", group_size=size, symmetric=symmetric)
    answer = naive.solve(W, G, levels, size=size, symmetric=symmetric, sweeps=0, grids=("minmax",))
    naive.assert_same(q, answer, strict=0.9 if levels < 200 else 0.5)
    assert q.report.sweeps == 0
    assert q.report.objective == q.report.objective_rounding


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("size", [None, 8, "tensor"])
def test_symmetric_equals_the_oracle(problem, levels, size):
    for seed in range(6):
        W, _, G = problem(21, 10, seed=seed)
        answer = naive.solve(W, G, levels, size=size, symmetric=True)
        if answer.margin.min() > naive.MARGIN:
            break
    q = comq_np.solve(W, G, levels=levels, recipe="paper", group_size=size, symmetric=True)
    naive.assert_same(q, answer)
    assert (q.zero_point == levels // 2).all()


def test_ternary(problem):
    W, _, G = problem(64, 32, seed=1)
    q = comq_np.solve(W, G, levels=3, recipe="paper", symmetric=True)
    assert (q.bits, q.levels) == (2, 3)
    assert set(np.unique(q.codes)) == {0, 1, 2}
    assert (q.zero_point == 1).all()
    naive.assert_same(q, naive.solve(W, G, 3, symmetric=True), strict=0.85)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [None, 16, "tensor"])
def test_two_grids_equal_the_better_of_two_solves(problem, bits, size):
    for seed in range(6):
        W, _, G = problem(40, 12, seed=seed)
        answer = naive.solve(W, G, 2**bits, size=size, grids=("paper", "shrunk"))
        if answer.margin.min() > naive.MARGIN:
            break
    steps = comq_np.Recipe("two", ("paper", "shrunk"))
    q = comq_np.solve(W, G, bits, group_size=size, recipe=steps)
    naive.assert_same(q, answer, strict=0.8, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_shrunk_grid_alone_equals_the_oracle(problem, bits):
    W, _, G = problem(40, 24, seed=bits)
    q = comq_np.solve(W, G, bits, recipe=comq_np.Recipe("shrunk", ("shrunk",), sweeps=0))
    d, z, close = naive.grids_of("shrunk", W, G, 2**bits, None, False)
    sure = close[0] > 0
    assert sure.mean() > 0.9
    worse = naive.objective_of(q, W, G) > naive.rounded(W, G, d, z, 2**bits).objective * (1 + 1e-5)
    assert not worse.any()
    kept = q.scale[0] < naive.grids_of("minmax", W, G, 2**bits, None, False)[0][0] * (1 - 1e-6)
    assert kept.any()
    np.testing.assert_allclose(q.scale[0, sure & kept], d[0, sure & kept], rtol=1e-5)


# Above 8 bits, where float32 holds a real code less and less well.

WIDE = (257, 1000, 2**12, 2**16)


@pytest.mark.parametrize("levels", WIDE)
@pytest.mark.parametrize("order", ORDERS)
def test_wide_codes_equal_the_oracle(problem, levels, order):
    W, _, G = problem(6, 60, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe=comq_np.recipe("paper").replace(order=order))
    margin = naive.MARGIN * max(1, levels / 1024)  # a code of 2**16 has 7 places after the point, halved
    naive.assert_same(q, naive.solve(W, G, levels, order=order), strict=0.5, margin=margin, rtol=1e-6)


@pytest.mark.parametrize("levels", WIDE)
@pytest.mark.parametrize("size", [None, 7, "tensor"])
def test_wide_rounding_is_to_nearest(problem, levels, size):
    W, _, G = problem(50, 60, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe="rtn", group_size=size)
    answer = naive.rounded(W, G, q.scale.astype(float), -q.zero_point, levels, size)
    sure = answer.margin > 1e-9
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(q.codes[:, sure], answer.codes[:, sure])
    assert q.codes.max() >= levels - 2
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-9)


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("size", [None, 16, "tensor"])
def test_wide_codes_gain_as_much_as_narrow_ones(problem, bits, size):
    """The gain over rounding does not fade with the step of the grid, for any recipe."""
    layers = [problem(64, 40, seed=seed) for seed in (bits, bits + 1, bits + 2)]
    for recipe in ("paper", "fast", "balanced", "best")[size == "tensor" :]:  # the paper's grid for all clips, too much
        gains = []
        for W, _, G in layers if recipe == "fast" else layers[:1]:  # without sweeps, it is up to luck in a single one
            reports = [comq_np.solve(W, G, b, recipe=recipe, group_size=size).report for b in (8, bits)]
            gains.append([report.objective / report.objective_rounding for report in reports])
        narrow, wide = np.mean(gains, axis=0)
        assert wide < 0.6
        assert wide < 1.25 * narrow


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("size", [None, 7])
def test_no_step_of_a_wide_code_is_left_to_gain(problem, bits, size):
    """Judged in float64: steps that float32 misjudges are worth less than a thousandth of the objective."""
    W, _, G = problem(40, 30, seed=bits)
    q = comq_np.solve(W, G, bits, recipe=comq_np.recipe("paper").replace(sweeps=200, refit=False), group_size=size)
    assert q.report.converged
    scale, error = naive.rows_of(q.scale, 40, size), W.astype(float) - q.dequantize()
    gain = 2 * scale * np.abs(G @ error) - scale**2 * np.diag(G)[:, None]
    inside = (q.codes > 0) & (q.codes < 2**bits - 1)
    assert (np.where(inside, gain, 0).max(axis=0) <= 1e-3 * naive.objective_of(q, W, G)).all()


@pytest.mark.parametrize("levels", WIDE)
def test_tabu_search_finds_the_optimum_of_two_wide_codes(problem, levels):
    W, _, G = problem(2, 40, seed=levels)
    steps = comq_np.Recipe("leaps", ("minmax",), order="shared", sweeps=50, refit=False, leaps=4, moves=100.0)
    q = comq_np.solve(W, G, levels=levels, recipe=steps)
    found = naive.objective_of(q, W, G)
    best = [naive.best_of_two(W[:, j], G, float(q.scale[0, j]), int(q.zero_point[0, j]), levels) for j in range(40)]
    assert (found >= np.array(best) * (1 - 1e-9)).all()
    assert (found <= np.array(best) * 1.05).mean() >= 0.7


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", [9, 12, 16])
def test_a_narrow_range_far_from_zero_does_not_need_all_codes(problem, recipe, bits):
    _, _, G = problem(20, 6)
    W = (1000 + 0.004 * np.random.default_rng(0).uniform(size=(20, 6))).astype(np.float32)
    q = comq_np.solve(W, G, bits, recipe=recipe)
    assert np.abs(W - q.dequantize()).max() < 2e-3
    assert 2**24 < np.abs(q.zero_point).max() < 2**29
    assert q.report.objective <= q.report.objective_rounding
    assert any("unused" in note for note in q.report.notes) == (bits > 9)


# Fixed scales.


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("as_number", [True, False])
def test_fixed_scale_and_zero_point_equal_the_oracle(problem, size, as_number):
    W, _, G = problem(20, 11, seed=2)
    groups = len(naive.groups_of(20, size))
    scale = 0.25 if as_number else np.random.default_rng(0).uniform(0.1, 0.5, (groups, 11)).astype(np.float32)
    zero = 7 if as_number else np.random.default_rng(1).integers(4, 12, (groups, 11))
    q = comq_np.solve(W, G, 4, recipe="paper", group_size=size, scale=scale, zero_point=zero)
    d, zero = np.broadcast_to(scale, (groups, 11)), np.broadcast_to(zero, (groups, 11))
    np.testing.assert_array_equal(q.scale, d.astype(np.float32))
    np.testing.assert_array_equal(q.zero_point, zero)
    answer = naive.descend(W, G, d, -zero, 16, size, refit=False)
    naive.assert_same(q, naive.better(answer, naive.rounded(W, G, d, -zero, 16, size), size))


@pytest.mark.parametrize("recipe", ["paper", "rtn", "balanced"])
def test_fixed_scale_is_kept_and_its_zero_point_is_chosen(problem, recipe):
    W, _, G = problem(24, 10)
    scale = (np.ptp(W, axis=0) / 12).astype(np.float32)  # room for 16 codes around every column
    q = comq_np.solve(W, G, 4, recipe=recipe, scale=scale[None])
    np.testing.assert_array_equal(q.scale, scale[None])
    low, high = -q.zero_point[0] * scale, (15 - q.zero_point[0]) * scale
    assert (low <= W.min(axis=0) + scale / 2).all()
    assert (high >= W.max(axis=0) - scale / 2).all()
    assert (naive.objective_of(q, W, G) <= naive.rounded(W, G, q.scale, -q.zero_point, 16).objective * (1 + 1e-5)).all()


def test_fixed_scale_for_a_symmetric_grid(problem):
    W, _, G = problem(24, 10)
    q = comq_np.solve(W, G, 4, scale=0.2, symmetric=True)
    assert (q.scale == np.float32(0.2)).all()
    assert (q.zero_point == 8).all()


def test_one_fixed_scale_for_all(problem):
    W, _, G = problem(24, 10)
    q = comq_np.solve(W, G, 4, scale=0.2, group_size="tensor")
    assert q.scale.shape == (1, 10)
    assert (q.scale == np.float32(0.2)).all()
    assert len(np.unique(q.zero_point)) == 1


# All codes tried.


@pytest.mark.parametrize(("m", "levels"), [(1, 16), (2, 16), (3, 8), (4, 4), (4, 6)])
def test_against_all_codes(problem, m, levels):
    """No code choice is missed by more than descent must miss, and no single change improves what descent ends with."""
    W, _, G = problem(m, 40, seed=levels)
    q = comq_np.solve(W, G, levels=levels, recipe=comq_np.recipe("paper").replace(sweeps=100, refit=False))
    found = naive.objective_of(q, W, G)
    tiny = 1e-5 * naive.objective(W, 0 * W, G)
    optimal = 0
    for j in range(W.shape[1]):
        d, zero = float(q.scale[0, j]), int(q.zero_point[0, j])
        best = naive.brute_force(W[:, j], G, d, -zero, levels)
        assert found[j] >= best - tiny[j]
        assert found[j] <= naive.best_single_change(W[:, j], G, d, q.codes[:, j], zero, levels) + tiny[j]
        optimal += found[j] <= best + tiny[j]
    assert optimal >= (40 if m == 1 else 16)
    assert q.report.converged


@pytest.mark.parametrize("size", [None, 7, "tensor"])
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_left_to_gain_at_convergence(problem, size, order):
    """With refits, at convergence neither one code nor one scale can lower the objective."""
    W, _, G = problem(20, 8, seed=5)
    steps = comq_np.recipe("paper").replace(order=order, sweeps=500)
    q = comq_np.solve(W, G, 2, recipe=steps, group_size=size)
    assert q.report.converged
    assert q.report.sweeps < 500
    scale, zero = naive.rows_of(q.scale, 20, size), naive.rows_of(q.zero_point, 20, size)
    found, tiny = naive.objective_of(q, W, G), 1e-5 * naive.objective(W, 0 * W, G)
    for j in range(8):
        best = naive.best_single_change(W[:, j], G, scale[:, j], q.codes[:, j], zero[:, j], 4)
        assert found[j] <= best + tiny[j]
    for factor in (0.999, 1.001):
        for group in naive.groups_of(20, size):
            moved = scale.copy()
            moved[group] *= factor
            after = naive.objective(W, moved * (q.codes - zero), G)
            if size == "tensor":
                assert found.sum() <= after.sum() + tiny.sum()
            else:
                assert (found <= after + tiny).all()
