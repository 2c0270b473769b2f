"""The grid of a layer's inputs: against all scales and zero points, and the histogram against the values themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import comq_np


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


KINDS = {
    "normal": lambda rng: rng.normal(size=4000),
    "heavy tails": lambda rng: rng.standard_t(3, size=4000),
    "relu": lambda rng: np.maximum(rng.normal(size=4000), 0),
    "gelu": lambda rng: (lambda x: x / (1 + np.exp(-1.702 * x)))(rng.normal(size=4000)),
    "softmax": lambda rng: softmax(2 * rng.normal(size=(100, 40))),
    "outlier": lambda rng: np.append(rng.normal(size=4000), 60),
    "shifted": lambda rng: rng.normal(size=4000) - 3,
}


def values_of(kind, seed=0):
    return KINDS[kind](np.random.default_rng([seed, len(kind)])).astype(np.float32)


def histogram_of(*parts):
    histogram = comq_np.Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def error(x, scale, zero_point, levels):
    """Square error by the equations, in float64."""
    x = np.ravel(x).astype(np.float64)
    return float(np.square(scale * np.clip(np.rint(x / scale), -zero_point, levels - 1 - zero_point) - x).sum())


def best_error(x, levels, zero_points):
    """Least error over zero points and a thousand scales, each fitted to its codes."""
    x, found = np.ravel(x).astype(np.float64), np.inf
    largest = 2.2 * np.abs(x).max() / (levels - 1)
    for scale, z in itertools.product(largest * np.exp(-np.linspace(0, 3.5, 1000)), zero_points):
        q = np.clip(np.rint(x / scale), -z, levels - 1 - z)
        if q @ x > 0:
            found = min(found, error(x, (q @ x) / (q @ q), z, levels))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, True)])
def test_no_scale_and_zero_point_are_better(kind, bits, symmetric):
    x, levels = values_of(kind), 2**bits
    grid = comq_np.activation_grid(histogram_of(x), bits, symmetric=symmetric)
    zero_points = [levels // 2] if symmetric else range(levels)
    assert error(x, grid.scale, grid.zero_point, levels) <= 1.01 * best_error(x, levels, zero_points)
    assert grid.zero_point == levels // 2 or not symmetric


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_it_is_at_least_as_good_as_any_start_and_as_the_grid_of_fewer_bits(kind, bits):
    x, levels = values_of(kind, 1), 2**bits
    grid = comq_np.activation_grid(histogram_of(x), bits)
    found = error(x, grid.scale, grid.zero_point, levels)
    for share in (1, 0.999, 0.9999, 0.99999):
        low, high = min(np.quantile(x, 1 - share), 0), max(np.quantile(x, share), 0)
        scale = float(high - low) / (levels - 1)
        assert found <= 1.0001 * error(x, scale, np.rint(-low / scale), levels)
    plain = comq_np.activation_grid(histogram_of(x), bits, recipe="minmax")
    assert found <= error(x, plain.scale, plain.zero_point, levels)
    if bits > 2:
        fewer = comq_np.activation_grid(histogram_of(x), bits - 1)
        assert found < error(x, fewer.scale, fewer.zero_point, levels // 2)


def test_the_minmax_grid_is_that_of_the_range():
    grid = comq_np.activation_grid(histogram_of([-1.0, 0.3, 2.0]), 4, recipe="minmax")
    assert (grid.scale, grid.zero_point) == (np.float32(3 / 15), 5)
    grid = comq_np.activation_grid(histogram_of([-1.0, 0.3, 2.0]), 4, recipe="minmax", symmetric=True)
    assert (grid.scale, grid.zero_point) == (np.float32(2 / 7), 8)
    for x, zero_point in (([1.0, 2.0], 0), ([-1.0, -2.0], 255)):
        assert comq_np.activation_grid(histogram_of(x), 8, recipe="minmax").zero_point == zero_point


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["solved", "minmax"]),
)
def test_zero_stays_zero_and_nothing_moves_far(x, bits, symmetric, recipe):
    grid = comq_np.activation_grid(histogram_of(x), bits, symmetric=symmetric, recipe=recipe)
    assert not grid.quantize(np.zeros(3)).any()
    assert not np.signbit(grid.quantize([0.0, -0.0, -1e-9 * grid.scale])).any()
    values = np.array(x, np.float32)
    codes = grid.encode(values)
    np.testing.assert_array_equal(grid.decode(codes), grid.quantize(values))
    np.testing.assert_array_equal(grid.quantize(grid.quantize(values)), grid.quantize(values))
    low, high = grid.decode([0, 2**bits - 1]).astype(np.float64)
    nearest = np.clip(values.astype(np.float64), low, high)
    assert (np.abs(grid.quantize(values) - nearest) <= 0.5 * grid.scale * (1 + 1e-6) + 1e-6 * np.abs(nearest)).all()
    assert np.square(grid.quantize(values) - values.astype(np.float64)).sum() <= np.square(
        values, dtype=float
    ).sum() * (1 + 1e-6)


@pytest.mark.parametrize("constant", [3.5, -7e-20, 1e-44])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_constant_is_on_its_grid(constant, bits):
    x = np.full(1000, constant, np.float32)
    grid = comq_np.activation_grid(histogram_of(x), bits)
    np.testing.assert_allclose(grid.quantize(x), x, rtol=1e-6, atol=1e-38)
    some = np.append(x, np.zeros(17, np.float32))
    np.testing.assert_allclose(
        comq_np.activation_grid(histogram_of(some), bits).quantize(some), some, rtol=1e-6, atol=1e-38
    )


def test_zeros_alone_have_a_grid():
    for symmetric in (False, True):
        grid = comq_np.activation_grid(histogram_of(np.zeros(5)), 4, symmetric=symmetric)
        assert grid == comq_np.ActivationGrid(1.0, 8 * symmetric, 4)


def same(one, other):
    assert one.count == other.count
    assert one.range == other.range
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-9)


@given(st.data())
def test_neither_order_nor_division_matters(data):
    numbers = st.floats(-(2.0**50), 2.0**50, width=32) | st.integers(-40, 40).map(lambda k: float(np.float32(1.5**k)))
    x = data.draw(st.lists(numbers, min_size=1, max_size=50))
    cut = data.draw(st.integers(0, len(x)))
    whole = histogram_of(x)
    same(whole, histogram_of(*data.draw(st.permutations(x))))
    one, other = histogram_of(x[:cut]), histogram_of(np.array(x[cut:]))
    one.merge(other)
    same(whole, one)
    assert whole.squares == pytest.approx(np.square(np.array(x, np.float32), dtype=float).sum(), rel=1e-9)


def test_a_histogram_is_as_fine_as_it_says():
    x = np.sort(values_of("normal"))
    found = histogram_of(x)
    assert found.count == found.counts.sum() == len(x)
    width = 2.0 ** (np.ceil(np.log2(np.abs(x).max())) - 13)
    values, counts = np.unique(np.floor(x / width), return_counts=True)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(np.floor(found.values / width), values)
    np.testing.assert_allclose(found.values @ found.counts, x.sum(dtype=float), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint16])
def test_any_real_type(dtype):
    same(histogram_of(np.arange(100).astype(dtype)), histogram_of(np.arange(100, dtype=np.float32)))


def test_a_histogram_refuses_what_is_no_number():
    histogram = histogram_of([1.0])
    for bad, message in (
        ([1.0, np.nan], r"`X` must be finite, got 1 NaN or infinite of 2 entries, the first at \(1,\)"),
        ([[np.inf]], "`X` must be finite"),
        ([1e30], r"`X` must lie within ±1e\+17, got an entry of size 1e\+30"),
        (["a"], "`X` must hold real numbers"),
    ):
        with pytest.raises(comq_np.InputError, match=message):
            histogram.update(bad)
    histogram.update(np.empty((0, 3)))
    assert histogram.count == 1
    with pytest.raises(comq_np.InputError, match=r"`other` must be a comq_np\.Histogram, got 'list'"):
        histogram.merge([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0, 9), "`bits` must be an integer from 2 to 8, got 9"),
        ((1.0, 4, 2), "`zero_point` must be an integer from 0 to 3, got 4"),
        ((1.0, -1, 2), "`zero_point` must be an integer from 0 to 3, got -1"),
        ((0.0, 0, 2), "`scale` must be a number from 1.17549e-38 to 3.40282e"),
        ((np.inf, 0, 2), "`scale` must be a number from .* got inf"),
    ],
)
def test_a_grid_is_checked(arguments, message):
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.ActivationGrid(*arguments)


def test_what_a_grid_refuses():
    grid = comq_np.ActivationGrid(1.0, 0, 2)
    for call, bad, message in (
        (grid.encode, [np.nan], "`X` must be finite"),
        (grid.quantize, [np.inf], "`X` must be finite"),
        (grid.decode, [4], "`codes` must be integers from 0 to 3"),
        (grid.decode, [1.0], "`codes` must be integers from 0 to 3"),
    ):
        with pytest.raises(comq_np.InputError, match=message):
            call(bad)
    assert grid.encode([]).shape == grid.quantize(np.empty((0, 2)))[:, 0].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], 4), {}, "`histogram` must be a comq_np.Histogram, got 'list'"),
        ((comq_np.Histogram(), 4), {}, "`histogram` must have seen values, got one with count 0"),
        ((histogram_of([1.0]), 1), {}, "`bits` must be an integer from 2 to 8, got 1"),
        ((histogram_of([1.0]), 4), {"symmetric": 1}, "`symmetric` must be True or False, got 1"),
        ((histogram_of([1.0]), 4), {"recipe": "best"}, "`recipe` must be one of 'solved', 'minmax', got 'best'"),
    ],
)
def test_what_a_search_refuses(arguments, options, message):
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.activation_grid(*arguments, **options)
