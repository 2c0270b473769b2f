"""A scale for each channel of a layer's inputs, which the weights absorb: against the equations in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import comq_np

RANGES = np.array([0.01, 0.1, 1.0, 3.0, 10.0, 100.0, 0.5, 30.0])
GRID = comq_np.ChannelGrid(RANGES / 8, [0, 1, 7, 15, 8, 8, 3, 2], bits=4)


def inputs(count=600, seed=0, positions=1):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(count, 8, positions)) + rng.normal(size=(count, 1, positions))
    X = np.where(np.arange(8)[:, None] % 2, X, np.maximum(X, 0)) * RANGES[:, None]
    return X.reshape(count, -1).astype(np.float32)


def weights(positions=1, n=6):
    """Of a layer to whose outputs all channels contribute alike."""
    W = np.random.default_rng(9).normal(size=(8, positions, n)) / RANGES[:, None, None]
    return W.reshape(-1, n).astype(np.float32)


def histogram_of(*parts, positions=1):
    histogram = comq_np.ChannelHistogram(parts[0].shape[-1] // positions, positions)
    for part in parts:
        histogram.update(part)
    return histogram


def steps_of(X, scale, zero_point, bits):
    """Codes without zero points by the equations, in float64."""
    return np.clip(np.rint(X.astype(np.float32) / scale), -zero_point, 2.0**bits - 1 - zero_point)


def crossed(X, grid, problems=None):
    gram = comq_np.CrossGram(X.shape[-1], problems, grid)
    for k, part in enumerate(np.array_split(X, 2)):
        gram.update(part, fold=k)
    return gram


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_channel_has_a_grid_as_good_as_its_own_search_finds(bits, symmetric):
    X = inputs(4000)
    grid = comq_np.channel_grid(histogram_of(X), bits, symmetric=symmetric)
    for channel in range(8):
        x, histogram = X[:, channel], comq_np.Histogram()
        histogram.update(x)
        best = comq_np.activation_grid(histogram, bits, symmetric=symmetric)
        found = grid.scale[channel] * steps_of(x, grid.scale[channel], float(grid.zero_point[channel]), bits)
        assert np.square(found - x).sum() <= 1.03 * np.square(best.quantize(x).astype(float) - x).sum()
    assert set(grid.zero_point) == {2**bits // 2} or not symmetric


def test_minmax_is_the_range_of_each_channel():
    grid = comq_np.channel_grid(histogram_of(np.array([[-1.0, 0, 0], [2.0, 30, 0]])), 4, recipe="minmax")
    np.testing.assert_array_equal(grid.scale, np.array([3 / 15, 2, (3 / 15 + 2) / 2], np.float32))
    np.testing.assert_array_equal(grid.zero_point, [5, 0, 0])


@given(st.data())
def test_neither_order_nor_division_of_the_values_matters(data):
    numbers = st.floats(-(2.0**50), 2.0**50, width=32) | st.integers(-40, 40).map(lambda k: float(np.float32(1.5**k)))
    X = np.array(data.draw(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=20)), np.float32)
    cut = data.draw(st.integers(0, len(X)))
    whole, one, other = (histogram_of(part, positions=2) for part in (X, X[:cut], X[:cut:-1]))
    other.update(X[cut : cut + 1])
    one.merge(other)
    assert one.count == whole.count == len(X)
    np.testing.assert_array_equal(one.ranges, whole.ranges)
    for channel in range(2):
        x = np.sort(X[:, 2 * channel : 2 * channel + 2].ravel().astype(float))
        for values, counts, squares in (one.channel(channel), whole.channel(channel)):
            assert counts.sum() == len(x)
            np.testing.assert_allclose(squares, x @ x, rtol=1e-6)
            width = 2.0 ** (np.ceil(np.log2(max(np.abs(x).max(), 1e-300))) - 9)
            np.testing.assert_allclose(np.repeat(values, counts.astype(int)), x, rtol=1e-6, atol=width)


def test_steps_codes_and_values():
    X = inputs(50)
    expected = steps_of(X, GRID.scale, GRID.zero_point.astype(float), 4)
    np.testing.assert_array_equal(GRID.steps(X), expected)
    np.testing.assert_array_equal(GRID.encode(X), expected + GRID.zero_point)
    np.testing.assert_allclose(GRID.quantize(X), expected * GRID.scale, rtol=1e-6)
    images = X.reshape(2, 5, 5, 8).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(GRID.steps(images, axis=1).transpose(0, 2, 3, 1).reshape(50, 8), expected)
    assert not GRID.steps(np.zeros((1, 8))).any()
    assert comq_np.ChannelGrid(GRID.scale.copy(), GRID.zero_point.astype(int), 4) == GRID
    assert len({GRID, dataclasses.replace(GRID, bits=4), dataclasses.replace(GRID, bits=5)}) == 2


@pytest.mark.parametrize(("problems", "positions"), [(None, 1), (None, 3), (2, 3), (4, 1)])
def test_sums_are_those_of_what_is_multiplied(problems, positions):
    X = inputs(300, positions=positions)
    scale, points = (np.repeat(each, positions) for each in (GRID.scale, GRID.zero_point.astype(float)))
    Xq, exact = steps_of(X, scale, points, 4), X / scale.astype(float)
    shape = (300, 8 * positions) if problems is None else (300, problems, 8 * positions // problems)
    gram = crossed(X.reshape(shape), GRID, problems)
    Xq, exact = Xq.reshape(shape), exact.reshape(shape)
    np.testing.assert_allclose(gram.matrix, np.einsum("k...i,k...j->...ij", Xq, Xq), rtol=1e-6)
    products = np.einsum("k...i,k...j->...ij", Xq, exact)
    np.testing.assert_allclose(gram.cross.sum(axis=0), products, rtol=1e-5, atol=1e-5 * np.abs(products).max())
    np.testing.assert_allclose(gram.exact_mean, exact.mean(axis=0), rtol=1e-5)
    W = np.random.default_rng(1).normal(size=(*shape[1:], 5)).astype(np.float32)
    outputs = np.einsum("k...i,...in->k...n", exact, gram.absorbed(W).astype(float))
    np.testing.assert_allclose(outputs, np.einsum("k...i,...in->k...n", X.reshape(shape), W), rtol=1e-3, atol=1e-3)


def output_error(X, W, bits, activation_bits, grid, of_inputs):
    q = comq_np.solve(W, crossed(X, grid), bits, fit_bias=True)
    Y = X.astype(float) @ W
    return np.square(of_inputs(X).astype(float) @ q.dequantize() + q.bias_shift - Y).sum() / np.square(Y).sum(), q


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("positions", [1, 3])
def test_of_channels_of_very_different_ranges_the_error_is_far_less(activation_bits, positions):
    X, W = inputs(positions=positions), weights(positions)
    plain, apart = comq_np.Histogram(), histogram_of(X, positions=positions)
    plain.update(X)
    common = comq_np.activation_grid(plain, activation_bits)
    grid = comq_np.channel_grid(apart, activation_bits)
    error, _ = output_error(X, W, 8, activation_bits, common, common.quantize)
    least, q = output_error(X, W, 8, activation_bits, grid, grid.repeated(positions).steps)
    assert least < 0.05 * error
    codes = grid.repeated(positions).encode(X).astype(np.int64) - np.repeat(grid.zero_point.astype(int), positions)
    sums = codes @ (q.codes.astype(np.int64) - q.zero_point)  # integers, and one scale for each column
    expected = grid.repeated(positions).steps(X).astype(float) @ q.dequantize()
    np.testing.assert_allclose(sums * q.scale.astype(float), expected, rtol=1e-5, atol=1e-5)
    assert q.activation == grid


def test_dead_channels_and_small_ones():
    X = inputs()
    X[:, 3], X[:, 4] = 0, X[:, 4] * np.float32(1e-20)
    grid = comq_np.channel_grid(histogram_of(X), 8)
    assert grid.scale[3] == pytest.approx(np.median(np.delete(grid.scale, 3)), rel=1e-6)
    assert grid.scale[4] == np.float32(2.0**-24 * grid.scale[5])
    assert not grid.steps(X)[:, 3:5].any()
    q = comq_np.solve(weights(), crossed(X, grid), 8)
    assert np.isfinite(q.dequantize()).all()
    zeros = histogram_of(np.zeros((4, 2)))
    np.testing.assert_array_equal(comq_np.channel_grid(zeros, 8).scale, [1, 1])


def test_a_dead_channel_takes_no_codes_from_the_others():
    rng = np.random.default_rng(3)
    X, W = 1e-3 * rng.normal(size=(200, 8)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    X[:, 3] = 0
    grid = comq_np.channel_grid(histogram_of(X), 8)
    fewer = comq_np.ChannelGrid(np.delete(grid.scale, 3), np.delete(grid.zero_point, 3), 8)
    every, some = (
        comq_np.solve(weights, crossed(rows, its), 8, shrinkage=0.1).report.relative_error
        for weights, rows, its in ((W, X, grid), (np.delete(W, 3, axis=0), np.delete(X, 3, axis=1), fewer))
    )
    assert every < 4 * some


@pytest.fixture
def calibrated(tmp_path):
    path, X = tmp_path / "calibration.h5", inputs(positions=2)
    rng = np.random.default_rng(5)
    with comq_np.CalibrationWriter(path) as file:
        gram = crossed(X, GRID)
        for name, W in (("one", weights(2)), ("two", rng.normal(size=(16, 3)).astype(np.float32))):
            file.add(comq_np.Layer(name, W, gram, np.zeros(W.shape[1], np.float32)))
        groups = crossed(X.reshape(-1, 4, 4), GRID, 4)
        file.add(comq_np.Layer("groups", rng.normal(size=(4, 4, 2)).astype(np.float32), groups))
    return path


def test_files_hold_the_grids_and_verify_recomputes(calibrated, tmp_path):
    quantized, changed = tmp_path / "quantized.h5", tmp_path / "changed.h5"
    comq_np.quantize_file(calibrated, quantized, 4)
    with comq_np.CalibrationFile(calibrated) as file, comq_np.QuantizedFile(quantized) as solved:
        layers, found = dict(file), dict(solved)
        for reader in (file, solved):
            assert {(row["activation_bits"], row["activation_axis"]) for row in reader.describe()} == {(4, "channel")}
    assert layers["one"].gram is layers["two"].gram
    for name, q in found.items():
        layer = layers[name]
        assert q.activation == layer.gram.grid == GRID
        expected = comq_np.solve(layer.weight, layer.gram, 4, fit_bias=layer.bias is not None)
        np.testing.assert_array_equal(q.codes, expected.codes)
    assert all(one.matches for one in comq_np.verify_file(calibrated, quantized))
    with comq_np.QuantizedWriter(changed) as file:
        for name, q in found.items():
            other = comq_np.ChannelGrid(GRID.scale, GRID.zero_point // 2, 4)
            file.add(name, dataclasses.replace(q, activation=other) if name == "two" else q)
    assert [one.matches for one in comq_np.verify_file(calibrated, changed)] == [True, False, True]


def test_columns_solved_in_parts_are_the_same(calibrated, tmp_path):
    made = []
    for number, options in enumerate(({}, {"memory": "1GiB", "threads": 2})):
        comq_np.quantize_file(calibrated, tmp_path / f"{number}.h5", 4, **options)
        made.append((tmp_path / f"{number}.h5").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation_scale", -1.0, "`scale` must hold numbers from"),
        ("activation_zero_point", 16, "`zero_point` must hold integers from 0 to 15"),
    ],
)
def test_damaged_grids_are_refused(calibrated, name, value, message):
    import h5py

    with h5py.File(calibrated, "r+") as file:
        del file["grams/0"].attrs["sha256"]
        file[f"grams/0/{name}"][1] = value
    with comq_np.CalibrationFile(calibrated) as file, pytest.raises(comq_np.FileError, match=f"/grams/0: {message}"):
        file["one"]


@pytest.mark.parametrize("same", [True, False])
def test_merge_wants_equal_grids(tmp_path, same):
    X, paths = inputs(), [tmp_path / "a.h5", tmp_path / "b.h5"]
    other = GRID if same else comq_np.ChannelGrid(GRID.scale * 2, GRID.zero_point, 4)
    for path, part, grid in zip(paths, np.array_split(X, 2), (GRID, other), strict=True):
        with comq_np.CalibrationWriter(path) as file:
            file.add(comq_np.Layer("fc", weights(), crossed(part, grid)))
    if not same:
        with pytest.raises(comq_np.FileError, match=r"on the grid that they have in .*ChannelGrid\(8 channels"):
            comq_np.merge_files(paths, tmp_path / "c.h5")
        return
    comq_np.merge_files(paths, tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert file["fc"].gram.grid == GRID
        np.testing.assert_allclose(file["fc"].gram.matrix, crossed(X, GRID).matrix, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: comq_np.ChannelGrid([1.0, 0.0], [0, 0], 8), "`scale` must hold numbers from .* got 0"),
        (lambda: comq_np.ChannelGrid([1.0, np.inf], [0, 0], 8), "`scale` must be finite"),
        (lambda: comq_np.ChannelGrid(1.0, 0, 8), "`scale` must be 1-D"),
        (lambda: comq_np.ChannelGrid([1.0], [0, 0], 8), r"`zero_point` must have shape \(1,\), as `scale` has"),
        (lambda: comq_np.ChannelGrid([1.0], [4], 2), "`zero_point` must hold integers from 0 to 3"),
        (lambda: comq_np.ChannelGrid([1.0], [0.0], 2), "`zero_point` must hold integers from 0 to 3"),
        (lambda: comq_np.ChannelGrid([1.0], [0], 9), "`bits` must be an integer from 2 to 8, got 9"),
        (lambda: GRID.steps(np.ones((2, 7))), r"`X` must have 8 channels along axis -1, got shape \(2, 7\)"),
        (lambda: GRID.encode(np.full((1, 8), np.nan)), "`X` must be finite"),
        (lambda: comq_np.CrossGram(12, grid=GRID), "`grid` must have a number of channels that divides 12 rows, has 8"),
        (lambda: comq_np.ChannelHistogram(0), "`channels` must be an integer from 1"),
        (lambda: histogram_of(np.ones((1, 2))).update([[1.0] * 3]), "`X` must have 2 values in a sample, got shape"),
        (lambda: histogram_of(np.ones((1, 2))).update([[1.0, np.nan]]), "`X` must be finite"),
        (lambda: histogram_of(np.ones((1, 2))).merge([]), "`other` must be a comq_np.ChannelHistogram, got 'list'"),
        (lambda: histogram_of(np.ones((1, 2))).merge(comq_np.ChannelHistogram(3)), "`other` must be like Channel"),
        (lambda: comq_np.channel_grid(comq_np.ChannelHistogram(2), 8), "`histogram` must have seen samples"),
        (lambda: comq_np.channel_grid(comq_np.Histogram(), 8), "`histogram` must be a comq_np.ChannelHistogram"),
        (lambda: comq_np.channel_grid(histogram_of(np.ones((1, 2))), 8, recipe="x"), "`recipe` must be one of"),
        (lambda: crossed(inputs(), GRID).absorbed(np.ones((7, 2))), "`W` must have rows .8,., as the Gram has"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(comq_np.InputError, match=message):
        call()


def test_codes_of_other_rows_are_not_written(tmp_path):
    q = dataclasses.replace(comq_np.solve(np.eye(3), np.eye(3)), activation=GRID)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        with pytest.raises(comq_np.InputError, match="layer 'a': `grid` must have a number of channels that divides 3"):
            file.add("a", q)
        assert "a" not in file
