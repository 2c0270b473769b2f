"""Grams of quantized inputs, and what is solved with them for the outputs of the float model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import comq_np

GRID = comq_np.ActivationGrid(0.25, 3, bits=4)


def inputs(count=300, m=10, seed=0, problems=None):
    rng = np.random.default_rng(seed)
    shape = (count, m) if problems is None else (count, problems, m)
    X = np.maximum(rng.normal(size=shape) @ rng.normal(size=(m, m)) / np.sqrt(m) + 0.3, -0.4)
    return X.astype(np.float32)


def cross_gram(X, exact=None, grid=GRID, parts=2):
    gram = comq_np.CrossGram(X.shape[-1], X.shape[1] if X.ndim == 3 else None, grid)
    others = X if exact is None else exact
    for k, (part, other) in enumerate(zip(np.array_split(X, parts), np.array_split(others, parts), strict=True)):
        gram.update(part, fold=k % 2, exact=None if exact is None else other)
    return gram


def product(A, B):
    return np.einsum("k...i,k...j->...ij", A.astype(float), B.astype(float))


@pytest.mark.parametrize("problems", [None, 3])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("count", [7, 5000])
def test_sums_are_those_of_the_samples(problems, apart, count):
    X = inputs(count, problems=problems)
    exact = inputs(count, seed=1, problems=problems) if apart else X
    gram, Xq = cross_gram(X, exact if apart else None), GRID.quantize(X).astype(float)
    np.testing.assert_allclose(gram.matrix, product(Xq, Xq), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gram.cross.sum(axis=0), product(Xq, exact), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gram.mean, Xq.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(gram.exact_mean, exact.mean(axis=0, dtype=float), rtol=1e-6)
    assert gram.count == count
    half = len(np.array_split(X, 2)[0])
    np.testing.assert_allclose(gram.cross[0], product(Xq[:half], exact[:half]), rtol=1e-5, atol=1e-3)


def test_halves_go_to_the_folds_as_in_a_gram():
    X = inputs(31)
    gram, plain = comq_np.CrossGram(10, grid=GRID), comq_np.Gram(10)
    for part in (X[:9], X[9:]):
        gram.update(part)
        plain.update(GRID.quantize(part))
    for one, other in zip(gram.folds, plain.folds, strict=True):
        assert one.count == other.count
        np.testing.assert_array_equal(one.matrix, other.matrix)


def test_merged_and_through_a_file(tmp_path):
    X = inputs()
    whole, one, other = cross_gram(X, parts=4), cross_gram(X[:150]), cross_gram(X[150:])
    one.merge(other)
    np.testing.assert_allclose(one.cross, whole.cross, rtol=1e-6, atol=1e-4)
    comq_np.save_gram(tmp_path / "gram.h5", one)
    read = comq_np.load_gram(tmp_path / "gram.h5")
    assert type(read) is comq_np.CrossGram
    assert read.grid == GRID
    for name in ("matrix", "cross", "mean", "exact_mean"):
        np.testing.assert_array_equal(getattr(read, name), getattr(one, name))
    for bad, message in (
        (comq_np.Gram(10), r"`other` must be a comq_np\.CrossGram, got 'Gram'"),
        (comq_np.CrossGram(10), r"`other` must have inputs on the grid ActivationGrid\(.*\), has None"),
        (comq_np.CrossGram(9, grid=GRID), "`other` must be a Gram of width 10, got of width 9"),
    ):
        with pytest.raises(comq_np.InputError, match=message):
            one.merge(bad)


def test_what_it_refuses():
    gram = comq_np.CrossGram(2, grid=GRID)
    for X, exact, message in (
        ([[1.0, np.nan]], None, "`X` must be finite"),
        ([[1.0, 2.0]], [[np.inf, 0]], "`exact` must be finite"),
        ([[1.0, 2.0]], [[1.0, 2.0]] * 2, r"`exact` must have shape \(1, 2\), as `X` has, got \(2, 2\)"),
        ([1.0], None, r"`X` must have shape \(\.\.\., 2\), got \(1,\)"),
    ):
        with pytest.raises(comq_np.InputError, match=message):
            gram.update(X, exact=exact)
    assert gram.count == 0
    with pytest.raises(
        comq_np.InputError, match=r"`grid` must be a comq_np\.ActivationGrid, a comq_np\.ChannelGrid or None, got 'int'"
    ):
        comq_np.CrossGram(2, grid=8)
    W = np.ones((2, 3))
    with pytest.raises(comq_np.InputError, match="`G` must have seen inputs, got a CrossGram with count 0"):
        comq_np.solve(W, gram)
    gram.update([[1.0, 2.0]])
    with pytest.raises(comq_np.InputError, match="`cross` must be None with a CrossGram, which has it"):
        comq_np.solve(W, gram, cross=np.eye(2))


@pytest.mark.parametrize("problems", [None, 2])
def test_solve_takes_it_as_gram_and_cross(problems):
    X = inputs(problems=problems)
    W = np.random.default_rng(3).normal(size=(*X.shape[1:], 5)).astype(np.float32)
    gram = cross_gram(X)
    q = comq_np.solve(W, gram, 4)
    expected = comq_np.solve(W, comq_np.Gram.from_folds(gram.folds), 4, cross=gram.cross)
    np.testing.assert_array_equal(q.codes, expected.codes)
    assert q.report == expected.report
    assert q.activation == GRID
    assert expected.activation is None


def outputs_error(q, X, W, shift=0.0):
    return float(np.square(GRID.quantize(X).astype(float) @ q.dequantize() + shift - X.astype(float) @ W).sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_take_up_a_part_of_the_error_of_the_inputs(bits):
    X, W = inputs(2000), np.random.default_rng(3).normal(size=(10, 40)).astype(np.float32)
    X[:, 0] = X[:, 1:4].sum(axis=1)  # reaches beyond the grid, which the others can make up for
    plain = comq_np.Gram(10)
    plain.update(X)
    q, apart = comq_np.solve(W, cross_gram(X), bits), comq_np.solve(W, plain, bits)
    assert outputs_error(q, X, W) < 0.95 * outputs_error(apart, X, W)
    fitted = comq_np.solve(W, cross_gram(X), bits, fit_bias=True)
    found = GRID.quantize(X).astype(float) @ fitted.dequantize() + fitted.bias_shift - X.astype(float) @ W
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    assert np.square(found).sum() < outputs_error(q, X, W)


def test_with_the_float_inputs_on_no_grid_it_is_a_gram():
    X, W = inputs(), np.random.default_rng(3).normal(size=(10, 5)).astype(np.float32)
    plain = comq_np.Gram(10)
    for k, part in enumerate(np.array_split(X, 2)):
        plain.update(part, fold=k)
    for fit_bias in (False, True):
        q, expected = (comq_np.solve(W, G, 4, fit_bias=fit_bias) for G in (cross_gram(X, grid=None), plain))
        error, of_expected = (
            np.square(X @ (one.dequantize() - W) + (one.bias_shift if fit_bias else 0)).sum() for one in (q, expected)
        )
        assert error == pytest.approx(of_expected, rel=0.02)


@pytest.fixture
def calibrated(tmp_path):
    """Calibration file with two layers on one grid and another on none."""
    path, X = tmp_path / "calibration.h5", inputs()
    shared, plain = cross_gram(X), comq_np.Gram(10)
    plain.update(X)
    rng = np.random.default_rng(5)
    with comq_np.CalibrationWriter(path) as file:
        for name, gram, bias in (("one", shared, True), ("two", shared, False), ("float", plain, True)):
            W, b = rng.normal(size=(10, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
            file.add(comq_np.Layer(name, W, gram, b if bias else None))
    return path


def test_files_hold_the_grids_and_verify_recomputes(calibrated, tmp_path):
    quantized = tmp_path / "quantized.h5"
    reports = comq_np.quantize_file(calibrated, quantized, 4)
    assert list(reports) == ["one", "two", "float"]
    with comq_np.CalibrationFile(calibrated) as file:
        assert [(row["gram"], row["crossed"], row["activation_bits"]) for row in file.describe()] == [
            (0, True, 4),
            (0, True, 4),
            (1, False, "float"),
        ]
        layer = file["one"]
        expected = comq_np.solve(layer.weight, layer.gram, 4, fit_bias=True)
    with comq_np.QuantizedFile(quantized) as file:
        found = dict(file)
        assert [row["activation_bits"] for row in file.describe()] == [4, 4, "float"]
    assert [q.activation for q in found.values()] == [GRID, GRID, None]
    np.testing.assert_array_equal(found["one"].codes, expected.codes)
    np.testing.assert_array_equal(found["one"].bias_shift, expected.bias_shift)
    assert found["two"].bias_shift is None
    assert all(one.matches for one in comq_np.verify_file(calibrated, quantized))
    for change in (
        {"activation": comq_np.ActivationGrid(0.5, 3, 4)},
        {"codes": found["one"].codes ^ 1},
        {"bias_shift": found["one"].bias_shift + np.float32(0.1)},
    ):
        changed = tmp_path / "changed.h5"
        with comq_np.QuantizedWriter(changed) as file:
            for name, q in found.items():
                file.add(name, dataclasses.replace(q, **change) if name == "one" else q)
        assert [one.matches for one in comq_np.verify_file(calibrated, changed)] == [False, True, True]


def test_a_grid_that_is_none_is_not_written(tmp_path):
    q = dataclasses.replace(comq_np.solve(np.eye(2), np.eye(2)), activation=8)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        with pytest.raises(
            comq_np.InputError,
            match=r"layer 'a': `activation` must be a comq_np\.ActivationGrid, a comq_np\.ChannelGrid or None",
        ):
            file.add("a", q)
        assert "a" not in file


def test_the_file_is_the_same_for_any_memory(calibrated, tmp_path):
    made = []
    for number, memory in enumerate((None, "1GiB")):
        comq_np.quantize_file(calibrated, tmp_path / f"{number}.h5", 4, memory=memory, threads=2)
        made.append((tmp_path / f"{number}.h5").read_bytes())
    assert made[0] == made[1]


def test_damaged_grids_are_refused(calibrated):
    import h5py

    with h5py.File(calibrated, "r+") as file:
        group = file["grams/0"]
        del group.attrs["sha256"]
        group.attrs["activation_zero_point"] = 16
    with comq_np.CalibrationFile(calibrated) as file, pytest.raises(comq_np.FileError, match="/grams/0: `zero_point`"):
        file["one"]
    with h5py.File(calibrated, "r+") as file:
        file["grams/0"].attrs["activation_zero_point"] = 3
        file["grams/0/activation_scale"][0] = -1
    with comq_np.CalibrationFile(calibrated) as file, pytest.raises(comq_np.FileError, match="/grams/0: `scale`"):
        file["one"]


@pytest.mark.parametrize("other", [GRID, comq_np.ActivationGrid(0.5, 3, 4), None])
def test_merge_wants_equal_grids(tmp_path, other):
    X, W, paths = inputs(), np.ones((10, 2), np.float32), [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path, part, grid in zip(paths, np.array_split(X, 2), (GRID, other), strict=True):
        with comq_np.CalibrationWriter(path) as file:
            file.add(comq_np.Layer("fc", W, cross_gram(part, grid=grid)))
    if other == GRID:
        comq_np.merge_files(paths, tmp_path / "c.h5")
        with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
            gram = file["fc"].gram
        assert gram.grid == GRID
        np.testing.assert_allclose(gram.cross.sum(axis=0), cross_gram(X).cross.sum(axis=0), rtol=1e-6, atol=1e-4)
    else:
        message = r"b\.h5: layer 'fc' must have its inputs on the grid that they have in .*a\.h5, .*, has "
        with pytest.raises(comq_np.FileError, match=message):
            comq_np.merge_files(paths, tmp_path / "c.h5")


def test_merge_wants_grams_of_one_kind(tmp_path):
    X, paths, plain = inputs(), [tmp_path / "a.h5", tmp_path / "b.h5"], comq_np.Gram(10)
    plain.update(X)
    for path, gram in zip(paths, (cross_gram(X), plain), strict=True):
        with comq_np.CalibrationWriter(path) as file:
            file.add(comq_np.Layer("fc", np.ones((10, 2), np.float32), gram))
    with pytest.raises(comq_np.FileError, match="must have a Gram of the kind that it has in"):
        comq_np.merge_files(paths, tmp_path / "c.h5")


def test_about_says_it_in_json(calibrated, capsys):
    from comq_np.cli import main

    assert main(["info", str(calibrated), "--json"]) == 0
    assert [row["activation_bits"] for row in json.loads(capsys.readouterr().out)["layers"]] == [4, 4, "float"]


def test_the_plan_counts_the_products():
    shapes = {"a": (256, 32), "b": (256, 32)}
    (plain,), (crossed,) = (comq_np.plan_calibration(shapes, crossed=names).passes for names in ((), shapes))
    assert crossed.gram_bytes == 2 * plain.gram_bytes == 2 * comq_np.CrossGram(256).nbytes
    assert crossed.memory > 2 * plain.gram_bytes + (plain.memory - plain.gram_bytes)
