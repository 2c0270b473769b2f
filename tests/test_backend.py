"""Every backend, by the same tests: on the CPU, in a simulator of CUDA, and on a GPU where there is one.

`COMQ_BACKEND` names the backend, "cpu" unless it is set; `test_cuda_simulator.py` runs this file with "cuda" in the
simulator, and ``COMQ_BACKEND=cuda python -m pytest -m gpu`` does on a machine with a GPU.
"""

from __future__ import annotations

import os

import naive
import numpy as np
import pytest
from conftest import make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import comq_np

BACKEND = os.environ.get("COMQ_BACKEND", "cpu")
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
pytestmark = [pytest.mark.gpu] if BACKEND == "cuda" and not SIMULATED else []
#: Rows and columns of most problems: the simulator is slow.
M, N = (7, 2) if SIMULATED else (13, 5)
RECIPES = ("rtn", "paper", "fast", "balanced")
OPTIONS = (
    {},
    {"bits": 1},
    {"bits": 8},
    {"bits": 9},
    {"bits": 16},
    {"levels": 3},
    {"symmetric": True},
    {"group_size": 5},
    {"group_size": "tensor"},
    {"zero_point": "real"},
    {"scale": 0.4},
    {"scale": 0.4, "zero_point": 2.5},
    {"shrinkage": 0.1},
    {"scale_dtype": "float16"},
)


def solve(W, G, bits=3, **options):
    return comq_np.solve(W, G, bits=bits, **{"backend": BACKEND, **options})


def agree(q, other, tolerance=1e-5):
    """Objectives are the same, and codes up to ties."""
    assert q.report.objective == pytest.approx(other.report.objective, rel=tolerance, abs=1e-12)
    assert (q.codes == other.codes).mean() > 0.9
    assert q.scale == pytest.approx(other.scale, rel=1e-5)


@pytest.mark.parametrize("order", ["greedy", "shared", "cyclic"])
@pytest.mark.parametrize("options", [{}, {"refit": False}, {"sweeps": 5}], ids=str)
def test_paper_equals_the_oracle(problem, order, options):
    W, _, G = problem(M, N)
    q = solve(W, G, recipe=comq_np.recipe("paper").replace(order=order, **options))
    naive.assert_same(q, naive.solve(W, G, 8, order=order, **options), strict=0.75)
    assert q.report.backend == BACKEND


@pytest.mark.parametrize("size", [3, 5, M])
def test_groups_equal_the_oracle(problem, size):
    W, _, G = problem(M, N, seed=size)
    naive.assert_same(
        solve(W, G, recipe="paper", group_size=size), naive.solve(W, G, 8, size=size), strict=0.7, rtol=1e-4
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_what_it_gives_on_the_cpu(problem, recipe, options):
    W, _, G = problem(M, N, seed=1)
    q, other = (solve(W, G, recipe=recipe, **{**options, "backend": where}) for where in (BACKEND, "cpu"))
    agree(q, other, tolerance=1e-5 if options.get("bits", 3) <= 8 else 1e-3)
    assert q.report.notes == other.report.notes
    assert q.report.backend == BACKEND


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_longer_layer_gives_what_it_gives_on_the_cpu(problem, recipe):
    W, _, G = problem(20 if SIMULATED else 90, N)
    agree(solve(W, G, recipe=recipe), solve(W, G, recipe=recipe, backend="cpu"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_gives_what_its_problems_give(problem, recipe):
    one = [problem(5, 2, seed=k) for k in range(3)]
    W, G = np.stack([p.W for p in one]), np.stack([p.G for p in one])
    q = solve(W, G, recipe=recipe)
    for k, single in enumerate(solve(p.W, p.G, recipe=recipe) for p in one):
        assert np.array_equal(q.codes[k], single.codes)
        assert q.scale[k] == pytest.approx(single.scale, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_objective_is_that_of_the_codes(problem, recipe, dtype):
    W, _, G = problem(M, N)
    G = G.astype(dtype)
    q = solve(W, G, recipe=recipe)
    objective = naive.objective_of(q, W, G.astype(np.float64)).sum()
    assert q.report.objective == pytest.approx(objective, rel=1e-9 if dtype == np.float64 else 1e-5)
    assert q.report.objective <= q.report.objective_rounding * (1 + 1e-6)


def test_the_same_comes_out_twice(problem):
    W, _, G = problem(M, N)
    first, second = solve(W, G), solve(W, G)
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scale, second.scale)
    assert first.report.objective == second.report.objective


def test_the_inputs_stay_as_they_are(problem):
    W, _, G = problem(M, N)
    before = W.copy(), G.copy()
    solve(W, G)
    assert np.array_equal(W, before[0])
    assert np.array_equal(G, before[1])


def test_searches_from_neighbours_lead_where_they_lead_on_the_cpu(problem):
    W, _, G = problem(M, N)
    recipe = comq_np.recipe("best").replace(paths=1, other_orders=(), neighbours=2, leaps=1, moves=2.0, exact=0)
    q, other = solve(W, G, recipe=recipe), solve(W, G, recipe=recipe, backend="cpu")
    agree(q, other)
    assert q.report.sweeps == len(q.report.objectives)


def test_dead_rows_are_rounded(problem):
    W, _, G = problem(M, N)
    G[4] = G[:, 4] = 0
    q, other = solve(W, G), solve(W, G, backend="cpu")
    agree(q, other)
    assert q.report.notes == other.report.notes != ()


def test_zero_and_constant_columns_are_exact(problem):
    W, _, G = problem(M, N)
    W[:, 0], W[:, 1] = 0, 0.7
    assert np.abs(solve(W, G).dequantize()[:, :2] - W[:, :2]).max() < 1e-7


def test_a_matrix_that_cannot_be_factored_is_no_obstacle(problem):
    W, _, G = problem(M, N)
    values, vectors = np.linalg.eigh(G)
    values[0] = -1e-3 * values[-1]
    G = (vectors * values) @ vectors.T
    G = (G + G.T) / 2
    q, other = solve(W, G, recipe="fast"), solve(W, G, recipe="fast", backend="cpu")
    agree(q, other)
    assert any("could not be factored" in note for note in q.report.notes)


def test_a_singular_matrix_is_solved(problem):
    W, X, _ = problem(M, N)
    G = X[:5].T @ X[:5]
    agree(solve(W, G), solve(W, G, backend="cpu"), tolerance=1e-3)


@pytest.mark.parametrize("shrinkage", ["auto", "nonlinear"])
@pytest.mark.parametrize(
    ("problems", "options"), [(None, {}), (None, {"fit_bias": True}), (2, {"fit_bias": True})], ids=str
)
def test_a_gram_is_shrunk_as_on_the_cpu(monkeypatch, problem, problems, options, shrinkage):
    m = 4 if SIMULATED else M  # each of many shares is a solve of its own
    if SIMULATED and options:
        m = 3
        monkeypatch.setattr(comq_np.shrinkage, "SHRINKAGES", (0.0, 0.1, 0.6))
        monkeypatch.setattr(comq_np.shrinkage, "SWEEPS", 1)
    made = [problem(m, N, seed=seed, samples=2 * m) for seed in range(problems or 1)]
    W, X = np.stack([one.W for one in made]), np.stack([one.X for one in made], axis=1)
    if problems is None:
        W, X = W[0], X[:, 0]
    gram = comq_np.Gram(m, problems)
    for part in np.array_split(X, 4):
        gram.update(part)
    q, other = (solve(W, gram, shrinkage=shrinkage, **options, **where) for where in ({}, {"backend": "cpu"}))
    assert q.report.shrinkage == pytest.approx(other.report.shrinkage, rel=1e-3)
    agree(q, other)
    if options:
        assert q.bias_shift == pytest.approx(other.bias_shift, rel=1e-4, abs=1e-6)


def test_cross_is_solved(problem):
    W, X, _ = problem(M, N)
    Xq = X + 0.01
    G, cross = Xq.T @ Xq, Xq.T @ X
    agree(solve(W, G, cross=cross), solve(W, G, cross=cross, backend="cpu"))


def test_the_callback_hears_of_every_sweep(problem):
    W, _, G = problem(M, N)
    heard = []
    q = solve(W, G, recipe="paper", callback=lambda sweep, objective: heard.append((sweep, objective)))
    assert heard == list(enumerate(q.report.objectives, start=1))


@settings(max_examples=4 if SIMULATED else 20)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.sampled_from(RECIPES), st.integers(0, 10**6))
def test_no_result_is_worse_than_rounding(m, n, bits, recipe, seed):
    rng = np.random.default_rng(seed)
    X, W = rng.normal(size=(2 * m, m)), rng.normal(size=(m, n))
    q = solve(W, X.T @ X, bits=bits, recipe=recipe)
    assert q.report.objective <= q.report.objective_rounding * (1 + 1e-6) + 1e-9
    assert q.codes.max() < 2**bits


#: Starts that "balanced" and "paper" do not have.
STARTS = (
    {"start": "gram", "order": "shared"},
    {"start": "gram", "order": "cyclic", "refit": True, "sweeps": 2},
    {"start": "rounding", "order": "greedy", "sweeps": 2},
    {"start": "babai", "order": "pivoted", "grids": ("minmax", "shrunk"), "refit": True, "sweeps": 1},
)


def made(start="babai", grids=("minmax",), sweeps=0, **fields):
    return comq_np.Recipe("made", grids, start=start, sweeps=sweeps, **{"refit": False, **fields})


def clear(find, problem, m, n, margin=naive.MARGIN):
    """The first of some problems whose answer keeps clear of rounding edges in all columns, and that answer."""
    for seed in range(8):
        W, _, G = problem(m, n, seed=seed)
        answer = find(W, G)
        if answer.margin.min() > margin:
            break
    return W, G, answer


@pytest.mark.parametrize("order", ["shared", "cyclic", "pivoted"])
@pytest.mark.parametrize("size", [None, 5, "tensor"])
def test_nearest_plane_equals_the_oracle(problem, order, size):
    def plane(W, G):
        d, z, _ = naive.grids_of("minmax", W, G, 8, size, False)
        found = naive.nearest_plane(W, G, d, z, 8, naive.order_of(order, W[:, 0], G)[0], size)
        return naive.better(found, naive.rounded(W, G, d, z, 8, size), size)

    W, G, answer = clear(plane, problem, M, N, margin=3e-4)
    q = solve(W, G, recipe=made(order=order, damping=0.0), group_size=size)
    naive.assert_same(q, answer, strict=0.5, margin=3e-4)


@pytest.mark.parametrize("order", ["greedy", "shared", "cyclic"])
@pytest.mark.parametrize("options", [{"size": 4}, {"size": "tensor"}, {"symmetric": True}], ids=str)
def test_every_order_equals_the_oracle_on_every_grid(problem, order, options):
    W, G, answer = clear(lambda W, G: naive.solve(W, G, 8, order=order, **options), problem, M, N)
    given = {"group_size" if name == "size" else name: value for name, value in options.items()}
    q = solve(W, G, recipe=comq_np.recipe("paper").replace(order=order), **given)
    naive.assert_same(q, answer, strict=0.5, rtol=1e-4)


@pytest.mark.parametrize("size", [None, 4])
def test_given_grids_equal_the_oracle(problem, size):
    groups = len(naive.groups_of(M, size))
    d = np.random.default_rng(0).uniform(0.2, 0.6, (groups, N)).astype(np.float32)
    zero = np.random.default_rng(1).integers(2, 6, (groups, N))

    def descended(W, G):
        found = naive.descend(W, G, d, -zero, 8, size, refit=False)
        return naive.better(found, naive.rounded(W, G, d, -zero, 8, size), size)

    W, G, answer = clear(descended, problem, M, N)
    q = solve(W, G, recipe="paper", group_size=size, scale=d, zero_point=zero)
    naive.assert_same(q, answer, strict=0.5)
    assert np.array_equal(q.scale, d)
    assert np.array_equal(q.zero_point, zero)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (16, 3), (17, 6), (5, 9)])
@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_every_shape_gives_what_it_gives_on_the_cpu(problem, m, n, recipe):
    """Blocks and tiles that are full, that are not, and more than one of them along either side."""
    W, _, G = problem(m, n)
    agree(solve(W, G, recipe=recipe), solve(W, G, recipe=recipe, backend="cpu"))


def test_a_wide_layer_equals_the_oracle(problem):
    W, G, answer = clear(lambda W, G: naive.solve(W, G, 8), problem, 5, 9)
    naive.assert_same(solve(W, G, recipe="paper"), answer, strict=0.5)


def test_a_vector_is_a_column(problem):
    W, _, G = problem(M, N)
    q, other = solve(W[:, 0], G), solve(W[:, :1], G)
    assert np.array_equal(q.codes, other.codes[:, 0])
    assert np.array_equal(q.scale, other.scale)


@pytest.mark.parametrize("options", STARTS, ids=str)
def test_other_starts_lead_where_they_lead_on_the_cpu(problem, options):
    W, _, G = problem(M, N, seed=2)
    q, other = (solve(W, G, recipe=made(**options), backend=where) for where in (BACKEND, "cpu"))
    agree(q, other)
    assert len(q.report.objectives) == len(other.report.objectives)


@pytest.mark.parametrize(
    "options",
    [{"group_size": 4}, {"group_size": "tensor"}, {"zero_point": "real"}, {"scale": 0.4}, {"shrinkage": 0.1}],
    ids=str,
)
def test_a_batch_has_every_option(problem, options):
    one = [problem(6, 2, seed=k) for k in range(3)]
    W, G = np.stack([p.W for p in one]), np.stack([p.G * 10.0**k for k, p in enumerate(one)])
    q = solve(W, G, **options)
    for k in range(3):
        single = solve(W[k], G[k], backend="cpu", **options)
        assert np.array_equal(q.codes[k], single.codes)
        assert q.scale[k] == pytest.approx(single.scale, rel=1e-5)
        assert q.zero_point[k] == pytest.approx(single.zero_point, rel=1e-5, abs=1e-5)


def test_one_matrix_that_cannot_be_factored_leaves_the_others_alone(problem):
    one = [problem(6, 2, seed=k) for k in range(3)]
    W, G = np.stack([p.W for p in one]), np.stack([p.G for p in one])
    values, vectors = np.linalg.eigh(G[1])
    values[0] = -1e-5 * values[-1]
    G[1] = (vectors * values) @ vectors.T
    G = (G + G.transpose(0, 2, 1)) / 2
    steps = comq_np.recipe("balanced").replace(damping=0.0, exact=0)
    q = solve(W, G, recipe=steps)
    assert any("could not be factored" in note for note in q.report.notes)
    for k in range(3):
        assert np.array_equal(q.codes[k], solve(W[k], G[k], recipe=steps, backend="cpu").codes)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_of_dead_rows_are_the_nearest(problem, recipe, size):
    W, _, G = problem(M, N)
    G[[0, 4]] = G[:, [0, 4]] = 0
    q = solve(W, G, recipe=recipe, group_size=size)
    scale, zero = naive.rows_of(q.scale, M, size), naive.rows_of(q.zero_point, M, size)
    wanted = np.clip(W / scale + zero, 0, 7)
    assert (np.abs(q.codes - wanted)[[0, 4]] <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_that_may_be_overwritten_gives_the_same(problem, dtype):
    W, _, G = problem(M, N)
    G = (G / G.max()).astype(dtype)
    q, ours = solve(W, G), G.copy()
    other = solve(W, ours, overwrite=True)
    assert np.array_equal(q.codes, other.codes)
    assert np.array_equal(q.scale, other.scale)
    assert q.report.objective == pytest.approx(other.report.objective, rel=1e-5)


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 16}, {"group_size": 3}, {"zero_point": "real"}], ids=str)
def test_the_objective_is_that_of_the_codes_on_every_grid(problem, options):
    W, _, G = problem(M, N)
    q = solve(W, G, **options)
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-9)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_column_is_worse_than_rounding(problem, recipe):
    W, _, G = problem(M, N, seed=4)
    found, rounded = (naive.objective_of(solve(W, G, 2, recipe=name), W, G) for name in (recipe, "rtn"))
    assert (found <= rounded * (1 + 1e-6)).all()


@pytest.mark.parametrize("options", [{}, {"group_size": 3}, {"group_size": "tensor"}, {"bits": 1}], ids=str)
def test_a_leap_leads_where_it_leads_on_the_cpu(problem, options):
    """Two searches after sweeps, without a proof that would hide where they led."""
    W, _, G = problem(M, N, seed=3)
    steps = made(start="rounding", order="shared", sweeps=20, leaps=2, moves=3.0)
    q, other = (solve(W, G, recipe=steps, backend=where, **options) for where in (BACKEND, "cpu"))
    agree(q, other)
    stayed = solve(W, G, recipe=steps.replace(leaps=0), **options)
    assert q.report.objective <= stayed.report.objective * (1 + 1e-6)


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"group_size": 3}, {"zero_point": "real"}], ids=str)
def test_the_same_comes_out_twice_with_every_option(problem, options):
    W, _, G = problem(M, N)
    first, second = solve(W, G, **options), solve(W, G, **options)
    for name in ("codes", "scale", "zero_point"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    assert first.report.objectives == second.report.objectives


@settings(max_examples=4 if SIMULATED else 30)
@given(
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([2, 3, 8, 300]),
    st.sampled_from(["rtn", "paper"]),
    st.sampled_from([None, 3, "tensor"]),
    st.integers(0, 10**4),
)
def test_any_result_is_as_good_as_that_of_the_cpu(m, n, levels, recipe, size, seed):
    W, _, G = make_problem(m, n, seed)
    options = {"levels": levels, "recipe": recipe, "group_size": size}
    q, other = (comq_np.solve(W, G, backend=where, **options) for where in (BACKEND, "cpu"))
    assert q.report.objective == pytest.approx(other.report.objective, rel=1e-3, abs=1e-9)
    assert q.codes.max() < levels
    assert np.isfinite(q.scale).all()


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_what_ties_decide_is_as_good_on_average(recipe):
    """Of the tiniest problems, many grids are equally good: the last digit decides where the search goes on from."""
    made = [make_problem(4, 3, seed) for seed in range(10 if SIMULATED else 300)]
    W, G = np.stack([one.W for one in made]), np.stack([one.G for one in made])
    found, others = (comq_np.solve(W, G, levels=3, recipe=recipe, backend=where) for where in (BACKEND, "cpu"))
    errors = (W.astype(np.float64) - q.dequantize() for q in (found, others))
    here, there = (np.einsum("bij,bik,bkj->b", E, G, E) for E in errors)
    assert abs(np.log(here / there).mean()) < 0.5 / np.sqrt(len(W))


needs_cuda = pytest.mark.skipif(BACKEND != "cuda", reason="what the CUDA backend refuses")


@needs_cuda
def test_paths_and_other_orders_are_refused(problem):
    W, _, G = problem(M, N)
    with pytest.raises(comq_np.InputError, match=r"`backend` 'cuda': CUDA has no `paths` and no `other_orders`"):
        solve(W, G, recipe="best")


@needs_cuda
def test_too_many_rows_are_refused(monkeypatch, problem):
    from comq_np import cuda

    monkeypatch.setattr(cuda, "MOST_ROWS", 4)
    W, _, G = problem(M, N)
    with pytest.raises(comq_np.InputError, match=rf"takes at most 4 rows, got {M}"):
        solve(W, G)


@needs_cuda
def test_a_layer_that_does_not_fit_is_refused(monkeypatch, problem):
    from comq_np.gpu import arrays

    monkeypatch.setattr(arrays, "free_bytes", lambda: 1000)
    W, _, G = problem(M, N)
    with pytest.raises(comq_np.InputError, match="GiB of the device's memory"):
        solve(W, G)


@needs_cuda
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_does_not_fit_is_solved_in_parts_of_its_columns(monkeypatch, problem, there, recipe, place):
    from comq_np.gpu import arrays, device

    W, _, G = problem(M, 2 * device.LEAST + 1)
    whole = solve(W, G, recipe=recipe)
    matrices, column = device._needed(comq_np.recipe(recipe), 1, M)
    monkeypatch.setattr(arrays, "free_bytes", lambda: matrices + column * (device.LEAST + 1))
    calls = []
    q = solve(W if place == "host" else there(W), G, recipe=recipe, callback=lambda *seen: calls.append(seen))
    assert [sweep for sweep, _ in calls].count(1) == 2 * bool(whole.report.sweeps)
    for name in ("codes", "scale", "zero_point"):
        assert np.array_equal(getattr(q, name), getattr(whole, name))
    assert q.report.objective == pytest.approx(whole.report.objective, rel=1e-6)
    assert q.report.relative_error == pytest.approx(whole.report.relative_error, rel=1e-6)


@needs_cuda
@pytest.mark.parametrize("shrinkage", ["auto", "nonlinear"])
def test_parts_of_the_columns_share_the_shrinkage_of_the_whole(monkeypatch, problem, shrinkage):
    from comq_np.gpu import arrays, device

    rows = 3 if SIMULATED else M
    if SIMULATED:
        monkeypatch.setattr(comq_np.shrinkage, "SHRINKAGES", (0.0, 0.1, 0.6))
        monkeypatch.setattr(comq_np.shrinkage, "SWEEPS", 1)
    W, X, _ = problem(rows, 2 * device.LEAST + 1, samples=rows - 1 if shrinkage == "auto" else 2 * rows)
    gram = comq_np.Gram(rows)
    for fold in (0, 1):
        gram.update(X[fold::2], fold=fold)
    options = {"recipe": "fast", "fit_bias": True, "shrinkage": shrinkage}
    whole = solve(W, gram, **options)
    matrices, column = device._needed(comq_np.recipe("fast"), 1, rows)
    monkeypatch.setattr(arrays, "free_bytes", lambda: matrices + column * (device.LEAST + 1))
    q = solve(W, gram, **options)
    assert q.report.shrinkage == whole.report.shrinkage > 0
    assert np.array_equal(q.codes, whole.codes)
    assert np.array_equal(q.bias_shift, whole.bias_shift)


@needs_cuda
def test_what_shares_one_scale_is_not_solved_in_parts(monkeypatch, problem):
    from comq_np.gpu import arrays, device

    W, _, G = problem(M, 2 * device.LEAST + 1)
    matrices, column = device._needed(comq_np.recipe("balanced"), 1, M)
    monkeypatch.setattr(arrays, "free_bytes", lambda: matrices + column * (device.LEAST + 1))
    with pytest.raises(comq_np.InputError, match="GiB of the device's memory"):
        solve(W, G, group_size="tensor")


@needs_cuda
def test_a_zero_point_that_single_precision_cannot_hold_is_refused(problem):
    W, _, G = problem(M, N)
    with pytest.raises(comq_np.InputError, match=r"`backend` must be \"cpu\" for `W` and scales whose zero points"):
        solve(W + 1000, G, scale=1e-3)


@needs_cuda
def test_such_a_zero_point_is_left_to_the_cpu_where_the_backend_is_free(monkeypatch, problem):
    monkeypatch.setattr(comq_np.backends, "WORTH", 1)
    W, _, G = problem(M, N)
    q = solve(W + 1000, G, scale=1e-3, backend="auto")
    assert q.report.backend == "cpu"
    assert "zero points" in q.report.notes[0]
    assert np.array_equal(q.codes, solve(W + 1000, G, scale=1e-3, backend="cpu").codes)


@needs_cuda
def test_norms_are_exact_where_the_weights_hardly_matter(problem):
    W, X, _ = problem(M, N)
    X[:, 1] = X[:, 0] * 1.001
    W[2:], W[1] = 0, -W[0]
    G = (X.T @ X).astype(np.float32)
    norm = np.einsum("ij,ik,kj->", W.astype(np.float64), G.astype(np.float64), W)
    report = solve(W, G, recipe="fast").report
    assert report.objective / report.relative_error == pytest.approx(norm, rel=1e-4)


class OnDevice:
    """Array on the device that the simulator takes for one of another library's."""

    def __init__(self, values):
        from comq_np.gpu import arrays

        self.array = arrays.upload(values, values.dtype)
        self.__cuda_array_interface__ = None


@pytest.fixture
def there(monkeypatch):
    """Puts an array on the device: one that has the CUDA array interface, which the simulator's have not."""
    from comq_np.gpu import arrays

    if not SIMULATED:
        return lambda values: arrays.upload(values, values.dtype)
    monkeypatch.setattr(arrays, "adopted", lambda values: values.array)
    return OnDevice


@needs_cuda
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_on_the_device_are_used_where_they_are(problem, there, dtype):
    W, _, G = problem(M, N)
    G = G.astype(dtype)
    W_there, G_there = there(W), there(G)
    q, other = solve(W_there, G_there, backend="auto"), solve(W, G)
    assert q.report.backend == "cuda"
    assert np.array_equal(q.codes, other.codes)
    assert q.report.objective == other.report.objective
    for array, before in ((W_there, W), (G_there, G)):
        assert np.array_equal(getattr(array, "array", array).copy_to_host(), before)


@needs_cuda
def test_a_batch_and_a_vector_may_be_on_the_device(problem, there):
    one = [problem(5, 2, seed=k) for k in range(2)]
    W, G = np.stack([p.W for p in one]), np.stack([p.G for p in one])
    assert np.array_equal(solve(there(W), there(G), recipe="fast").codes, solve(W, G, recipe="fast").codes)
    W, _, G = problem(5, 1)
    assert np.array_equal(solve(there(W[:, 0].copy()), G, recipe="fast").codes, solve(W[:, 0], G, recipe="fast").codes)


@needs_cuda
def test_arrays_on_the_device_are_checked(problem, there):
    W, _, G = problem(M, N)
    with pytest.raises(comq_np.InputError, match="`W` must be C-contiguous, of float32"):
        solve(there(W.astype(np.float64)), G)
    W[2, 1] = np.nan
    with pytest.raises(comq_np.InputError, match=r"`W` must be finite, got 1 NaN or infinite .* the first at \(2, 1\)"):
        solve(there(W), G)
    W[2, 1] = 0
    with pytest.raises(comq_np.InputError, match="`G` must have shape"):
        solve(W, there(G[1:, 1:].copy()))
    with pytest.raises(comq_np.InputError, match="`G` must be C-contiguous and of float32 or float64"):
        solve(W, there(G.astype(np.int32)))
    G[1, 2] += G.max()
    with pytest.raises(comq_np.InputError, match=r"`G` must be symmetric, got G\[1, 2\]"):
        solve(W, there(G))
    with pytest.raises(comq_np.InputError, match="`W` and `G` must be arrays of NumPy with `cross`"):
        solve(there(W), G, cross=G)
