"""Scales of float16: what is stored is what was solved for."""

import dataclasses

import naive
import numpy as np
import pytest
from conftest import make_problem
from hypothesis import given
from hypothesis import strategies as st

import comq_np
from comq_np import kernels

RECIPES = ("rtn", "paper", "fast", "balanced", "best")
OPTIONS = [{}, {"group_size": 5}, {"group_size": "tensor"}, {"zero_point": "real"}, {"symmetric": True}, {"bits": 8}]


def solve(W, G, bits=3, **options):
    return comq_np.solve(W, G, bits, scale_dtype="float16", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reported_objective_is_that_of_the_stored_scale(problem, recipe, options):
    W, _, G = problem(13, 5)
    q = solve(W, G, recipe=recipe, **options)
    assert q.scale.dtype == np.float16
    assert (q.scale > 0).all()
    assert q.dequantize().dtype == np.float32
    assert q.report.objective == pytest.approx(naive.objective_of(q, W, G).sum(), rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_better_than_rounding_the_scale_afterwards(options):
    inside, afterwards = [], []
    for seed in range(12):
        W, _, G = make_problem(40, 12, seed)
        W *= np.float32(1e-5)  # scales of some 30 units of the last digit that float16 has there
        single = comq_np.solve(W, G, **{"bits": 6, **options})
        rounded = dataclasses.replace(single, scale=single.scale.astype(np.float16))
        afterwards.append(naive.objective_of(rounded, W, G).sum())
        inside.append(solve(W, G, **{"bits": 6, **options}).report.objective)
    assert np.log(inside).mean() < np.log(afterwards).mean() - 0.1


@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from(RECIPES[:4]), st.integers(0, 10**4))
def test_no_result_is_worse_than_rounding_to_scales_of_that_type(m, n, recipe, seed):
    W, _, G = make_problem(m, n, seed)
    found, rounded = solve(W, G, recipe=recipe), solve(W, G, recipe="rtn")
    assert found.report.objective <= rounded.report.objective * (1 + 1e-6)
    assert rounded.report.objective == rounded.report.objective_rounding


def test_the_nearest_float16_is_numpys():
    all_halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (all_halves[1:] + all_halves[:-1]) / 2
    values = np.concatenate([all_halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)])
    found = np.array([kernels.nearest_half(value) for value in values])
    np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float64))
    assert kernels.nearest_half(0.0) == kernels.nearest_half(-1.0) == all_halves[0]
    assert kernels.nearest_half(1e9) == all_halves[-1]


def test_a_refit_never_makes_it_worse(problem):
    for options in ({}, {"zero_point": "real"}, {"group_size": 5}):
        W, _, G = problem(30, 8, seed=3)
        objectives = solve(W, G, recipe=comq_np.recipe("paper").replace(sweeps=8), **options).report.objectives
        assert (np.diff(objectives) <= 1e-6 * objectives[0]).all()


def test_scales_that_float16_holds_badly_are_named():
    W, G = np.array([[1e-9, 1.0], [3e-9, 2.0], [-2e-9, 0.5]]), np.eye(3)
    q = solve(W, G)
    assert q.scale[0, 0] == np.float16(2.0**-24)
    assert "1 of 2 columns have a scale so small that float16 holds it with fewer digits." in q.report.notes


def test_a_small_scale_of_the_whole_matrix_is_named_too():
    W = np.array([[1e-6, 2e-6], [3e-6, -2e-6]])
    q = solve(W, np.eye(2), recipe="paper", group_size="tensor")
    assert any("float16 holds it with fewer digits" in note for note in q.report.notes)


def test_a_constant_is_not_said_to_be_exact():
    q = solve(np.full((3, 1), 0.1), np.eye(3), recipe="rtn")
    assert q.report.objective > 0
    assert q.report.notes[0] == "1 of 1 columns hold one constant: their scale is its size."


def test_scales_beyond_float16_are_refused():
    with pytest.raises(
        comq_np.InputError, match=r"`W` must be smaller with `scale_dtype=\"float16\"`.* scale is 1e\+06"
    ):
        solve([[0.0], [7e6]], np.eye(2))
    with pytest.raises(comq_np.InputError, match="`W` must be smaller"):
        solve([[0.0], [7e6]], np.eye(2), group_size="tensor", recipe="paper")


def test_a_given_scale_must_be_of_the_type():
    with pytest.raises(comq_np.InputError, match="`scale` must hold numbers of float16"):
        solve([[1.0], [2.0]], np.eye(2), scale=0.1)
    assert solve([[1.0], [2.0]], np.eye(2), scale=0.25).scale.dtype == np.float16


def test_an_unknown_type_is_refused():
    with pytest.raises(comq_np.InputError, match="`scale_dtype` must be one of 'float32', 'float16', got 'int8'"):
        comq_np.solve([[1.0]], [[1.0]], scale_dtype="int8")
