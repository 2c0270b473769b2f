"""Bit planes: each bit of a code with a scale of its own; and codes found bit by bit."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import h5py
import naive
import numpy as np
import pytest
from edits import editing
from hypothesis import given, settings
from hypothesis import strategies as st

import comq_np
from comq_np import cli
from comq_np.parts import joined

#: What a solve with planes must take.
OPTIONS = [
    {"bits": 1},
    {"bits": 2, "recipe": "best"},
    {"bits": 3, "group_size": 8},
    {"bits": 2, "scale_dtype": "float16", "group_size": 5},
    {"bits": 8, "recipe": "fast"},
    {"bits": 4, "recipe": "paper"},
    {"bits": 2, "recipe": "rtn"},
]


def planes(*args, **options):
    return comq_np.solve(*args, codebook="planes", **options)


def check(q, W, G):
    """Judge a result by the equations: its formula, its objective, and that plain rounding is no better."""
    columns = q.codes.reshape(len(W), -1)
    expected = naive.dequantize_planes(columns, q.plane_scale, q.offset, q.group_size)
    np.testing.assert_array_equal(q.dequantize().reshape(columns.shape), expected)
    objective = naive.objective(W.reshape(columns.shape), expected, G).sum()
    np.testing.assert_allclose(q.report.objective, objective, rtol=1e-6, atol=1e-12 * np.trace(G))
    assert q.codes.dtype == np.uint8
    assert q.codes.max() < 2**q.bits


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_result_is_what_its_report_says(problem, options):
    W, _, G = problem(20, 7)
    q = planes(W, G, **options)
    check(q, W, G)
    assert q.plane_scale.dtype == q.offset.dtype == options.get("scale_dtype", np.float32)
    assert q.report.objective <= q.report.objective_rounding * (1 + (1e-6 if q.offset.dtype == np.float32 else 0.1))


@settings(max_examples=15)
@given(
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([None, 3, 8]),
    st.sampled_from(["fast", "balanced", "best", "paper"]),
    st.sampled_from([1e-25, 1.0, 1e25]),
    st.integers(0, 10**6),
)
def test_no_turn_raises_the_objective_and_none_is_above_uniform_codes(m, n, bits, size, recipe, unit, seed):
    rng = np.random.default_rng(seed)
    X, W = rng.normal(size=(2 * m, m)) @ rng.normal(size=(m, m)), rng.normal(size=(m, n)) * unit
    G = X.T @ X
    q = planes(W, G, bits, group_size=size, recipe=recipe)
    uniform = comq_np.solve(W, G, bits, group_size=size, recipe=recipe, zero_point="real")
    slack = 1e-5 * naive.objective(W, np.zeros(W.shape), G).sum() * 1e-3
    for before, after in zip(q.report.objectives[1:], q.report.objectives[2:], strict=False):
        assert after <= before * (1 + 1e-4) + slack
    assert q.report.objective <= min(uniform.report.objective, uniform.report.objective_rounding) * (1 + 1e-4) + slack


@pytest.mark.parametrize(("bits", "m"), [(1, 5), (2, 4), (2, 5)])
def test_tiny_problems_come_to_the_best_of_all_codes_and_scales(bits, m):
    rng = np.random.default_rng([bits, m])
    X, W = rng.normal(size=(3 * m, m)), rng.normal(size=(m, 8)).astype(np.float32)
    G = X.T @ X
    best = np.array([naive.brute_force_planes(w, G, bits) for w in W.T])
    found = naive.objective(W, planes(W, G, bits, recipe="best").dequantize(), G)
    assert (found >= best * (1 - 1e-4) - 1e-9).all()
    assert (found <= best * (1 + 1e-4) + 1e-6).mean() >= 0.6
    uniform = naive.objective(W, comq_np.solve(W, G, bits, recipe="best", zero_point="real").dequantize(), G)
    assert found.sum() < (0.9 if bits > 1 else 1 + 1e-6) * uniform.sum()  # two levels are uniform


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_scales_are_the_least_squares_of_their_planes_and_codes_cannot_be_bettered_one_by_one(problem, bits):
    W, _, G = problem(30, 6)
    q = planes(W, G, bits, recipe="best")
    Wq, found = q.dequantize(), naive.objective(W, q.dequantize(), G)
    for j in range(6):
        assert found[j] <= naive.best_planes(W[:, j], G, q.codes[:, j], bits) * (1 + 1e-4)
        levels = naive.dequantize_planes(
            np.arange(2**bits)[:, None], q.plane_scale[:, :, j : j + 1], q.offset[:, j : j + 1], None
        )
        for i in range(30):
            moved = np.repeat(Wq[:, j : j + 1], 2**bits, axis=1)
            moved[i] = levels[:, 0]
            assert naive.objective(W[:, j : j + 1], moved, G).min() >= found[j] * (1 - 1e-3)


def test_more_freedom_has_less_error(problem):
    W, _, G = problem(48, 16)
    errors = [planes(W, G, 2, group_size=size).report.objective for size in (None, 24, 12)]
    uniform = comq_np.solve(W, G, 2, zero_point="real").report.objective
    assert uniform > errors[0] > errors[1] > errors[2]


def test_weights_that_planes_can_hold_are_held_exactly():
    codes = np.random.default_rng(0).integers(0, 8, size=(40, 3))
    W = (codes & 1) * 0.5 + (codes >> 1 & 1) * 3.0 + (codes >> 2) * 1.25 - 2.0
    assert planes(W, np.eye(40), 3).report.relative_error < 1e-10
    assert comq_np.solve(W, np.eye(40), 3, zero_point="real").report.relative_error > 1e-3


def test_the_result_is_the_same_for_any_number_of_threads(problem):
    W, _, G = problem(64, 600)
    one, three = (planes(W, G, 2, threads=threads) for threads in (1, 3))
    for name in ("codes", "plane_scale", "offset"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))


@pytest.mark.parametrize("options", [{}, {"group_size": 4}, {"scale_dtype": "float16"}], ids=str)
def test_problems_of_a_batch_are_as_if_alone(problem, options):
    made = [problem(10, 3, seed=seed) for seed in range(3)]
    W, G = np.stack([one.W for one in made]), np.stack([one.G for one in made])
    q = planes(W, G, 2, **options)
    assert q.dequantize().shape == W.shape
    for k, one in enumerate(made):
        alone = planes(one.W, one.G, 2, **options)
        np.testing.assert_array_equal(q.codes[k], alone.codes)
        np.testing.assert_allclose(q.plane_scale[k], alone.plane_scale, rtol=1e-5)
        np.testing.assert_array_equal(
            q.dequantize()[k], naive.dequantize_planes(q.codes[k], q.plane_scale[k], q.offset[k], q.group_size)
        )


def test_the_bias_takes_up_the_mean_error(problem):
    W, X, _ = problem(12, 5)
    gram = comq_np.Gram(12)
    gram.update(X[::2] + 1)
    gram.update(X[1::2] + 1)
    q = planes(W, gram, 2, fit_bias=True)
    np.testing.assert_allclose(q.bias_shift, gram.mean @ (W - q.dequantize()), rtol=1e-4, atol=1e-5)
    check(q, W, gram.centred)


def test_cross_solves_for_the_matched_weights(problem):
    W, X, _ = problem(12, 5)
    Xq = X + 0.1 * np.random.default_rng(0).normal(size=X.shape)
    G, cross = Xq.T @ Xq, Xq.T @ X
    q, other = planes(W, G, 2, cross=cross), planes(comq_np.matched_weights(W, G, cross), G, 2)
    np.testing.assert_array_equal(q.dequantize(), other.dequantize())


def test_inputs_that_are_always_zero_get_the_nearest_level(problem):
    W, X, _ = problem(12, 5)
    X[:, 3] = 0.0
    q = planes(W, X.T @ X, 2)
    for j in range(5):
        levels = naive.dequantize_planes(np.arange(4)[:, None], q.plane_scale[:, :, [j]], q.offset[:, [j]], None)
        assert q.dequantize()[3, j] == levels[np.abs(levels - W[3, j]).argmin()]
    assert any("always zero" in note for note in q.report.notes)


def test_columns_of_zeros_and_of_one_number_stay_exact(problem):
    W, _, G = problem(12, 5)
    W[:, 1], W[:, 2] = 0.0, 3.0
    Wq = planes(W, G, 2).dequantize()
    assert not Wq[:, 1].any()
    np.testing.assert_allclose(Wq[:, 2], 3.0, rtol=1e-6)


def test_the_callback_hears_every_entry_of_the_report(problem):
    heard = []
    q = planes(*problem(12, 5)[::2], 2, callback=lambda *args: heard.append(args))
    assert heard == list(enumerate(q.report.objectives, start=1))
    assert q.report.sweeps == len(heard) == len(q.report.codes_changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "`bits` must be an integer from 1 to 8, got 9"),
        ({"levels": 3}, "`levels` must be None"),
        ({"symmetric": True}, "`symmetric` must be False"),
        ({"group_size": "tensor"}, "`group_size` must be None or a number of rows"),
        ({"zero_point": "real"}, "`zero_point` must be left out"),
        ({"scale": 0.5}, "`scale` must be None"),
        ({"backend": "cuda"}, '`backend` must be "cpu" or "auto"'),
        ({"codebook": "bits"}, "`codebook` must be one of"),
    ],
)
def test_what_planes_do_not_have_is_refused(options, message):
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.solve([[1.0], [2.0]], np.eye(2), **{"codebook": "planes", **options})


def test_embeddings_are_refused():
    counts = comq_np.TokenCounts(3)
    counts.update([0, 1, 2])
    with pytest.raises(comq_np.InputError, match="`G` must be a Gram or an array of NumPy"):
        planes(np.ones((3, 2)), counts, 2)


@pytest.fixture
def files(problem, tmp_path):
    """Calibration file with two layers and one of three problems, and the name of the quantized file."""
    with comq_np.CalibrationWriter(tmp_path / "calibration.h5") as file:
        for name, b, m, n in (("one", 0, 12, 5), ("groups", 3, 7, 2), ("two", 0, 30, 8)):
            made = [problem(m, n, seed=seed) for seed in range(b or 1)]
            X, W = np.stack([one.X for one in made], axis=1), np.stack([one.W for one in made])
            gram = comq_np.Gram(m, problems=b) if b else comq_np.Gram(m)
            for half in (X[::2], X[1::2]):
                gram.update(half if b else half[:, 0])
            file.add(comq_np.Layer(name, W if b else W[0], gram, np.zeros(W.shape[::2] if b else n, np.float32)))
    return tmp_path / "calibration.h5", tmp_path / "quantized.h5"


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "group_size": 8, "scale_dtype": "float16"}], ids=str)
def test_from_file_to_file(files, options):
    reports = comq_np.quantize_file(*files, codebook="planes", **options)
    with comq_np.CalibrationFile(files[0]) as source, comq_np.QuantizedFile(files[1]) as target:
        rows = {row["layer"]: row for row in target.describe()}
        for name, layer in source.items():
            q, expected = target[name], planes(layer.weight, layer.gram, fit_bias=True, **options)
            for field in ("codes", "plane_scale", "offset", "bias_shift"):
                np.testing.assert_array_equal(getattr(q, field), getattr(expected, field))
                assert getattr(q, field).dtype == getattr(expected, field).dtype
            assert (q.bits, q.group_size, q.report) == (options["bits"], options.get("group_size"), reports[name])
            planes_bytes = np.prod(q.codes.shape[:-2]) * q.bits * q.codes.shape[-1] * -(-q.codes.shape[-2] // 8)
            assert rows[name]["bytes"] == planes_bytes + q.plane_scale.nbytes + q.offset.nbytes + q.bias_shift.nbytes
            assert (rows[name]["codebook"], rows[name]["levels"]) == ("planes", 2 ** options["bits"])
    assert all(layer.matches for layer in comq_np.verify_file(*files))


def test_a_layer_in_the_file_is_a_row_of_bits_for_each_plane_and_column(problem, tmp_path):
    W, _, G = problem(11, 3)
    q = planes(W, G, 3, group_size=4)
    with comq_np.QuantizedWriter(tmp_path / "quantized.h5") as file:
        file.add("fc", q)
    with h5py.File(tmp_path / "quantized.h5") as file:
        layer = file["layers/0"]
        bits = np.unpackbits(layer["codes"][()], axis=-1, count=11, bitorder="little")
        scale, offset = layer["plane_scale"][()], layer["offset"][()]
    group = np.arange(11) // 4
    Wq = np.zeros((11, 3), np.float32)
    for k in range(3):
        Wq += bits[k].T * scale[k][group]
    np.testing.assert_array_equal(Wq - offset[group], q.dequantize())


@pytest.mark.parametrize(
    ("path", "edit", "message"),
    [
        (
            "layers/0",
            lambda group: group.attrs.modify("codebook", np.bytes_("bits")),
            "must have the codebook 'planes'",
        ),
        ("layers/0", lambda group: group.attrs.modify("bits", 9), "9 planes"),
        ("layers/0", lambda group: group.attrs.modify("group_size", np.bytes_("tensor")), "group size 'tensor'"),
        ("layers/0", lambda group: group.attrs.modify("bits", 3), "must have shape"),
        ("layers/0", lambda group: group.__delitem__("offset"), "must have a dataset 'offset'"),
        ("layers/0/plane_scale", lambda data: data.write_direct(np.full(data.shape, np.nan, "f4")), "must be finite"),
    ],
)
def test_a_broken_layer_is_refused(files, path, edit, message):
    comq_np.quantize_file(*files, 2, codebook="planes")
    with editing(files[1]) as file:
        edit(file[path])
    with comq_np.QuantizedFile(files[1]) as file, pytest.raises(comq_np.FileError, match=message):
        file["one"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": np.zeros((2, 3), np.float32)}, "`offset` must have shape"),
        ({"plane_scale": np.zeros((1, 1, 3), np.float32)}, "`plane_scale` must have shape"),
        ({"plane_scale": np.full((2, 1, 3), np.inf, np.float32)}, "`plane_scale` must hold finite"),
        ({"offset": np.zeros((1, 3))}, "`offset` must hold finite numbers of float32"),
        ({"codes": np.full((6, 3), 4, np.uint8)}, "`codes` must be uint8 below 4"),
        ({"codes": np.zeros(6, np.uint8)}, "`codes` must be a 2-D or 3-D array"),
    ],
)
def test_what_no_file_can_hold_is_refused(problem, tmp_path, changes, message):
    W, _, G = problem(6, 3)
    q = dataclasses.replace(planes(W, G, 2), **changes)
    with comq_np.QuantizedWriter(tmp_path / "quantized.h5") as file, pytest.raises(comq_np.InputError, match=message):
        file.add("fc", q)


def test_the_command_solves_tells_and_verifies(files, capsys):
    assert cli.main(["solve", *map(str, files), "--bits", "2", "--codebook", "planes"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "--json", str(files[1])]) == 0
    assert {layer["codebook"] for layer in json.loads(capsys.readouterr().out)["layers"]} == {"planes"}
    assert cli.main(["verify", *map(str, files)]) == 0


def test_parts_of_a_layer_are_joined(problem):
    W, _, G = problem(9, 8)
    options = {"group_size": 4, "recipe": "fast"}
    whole, parts = planes(W, G, 2, **options), [planes(W[:, k : k + 4], G, 2, **options) for k in (0, 4)]
    q = joined(parts, [1.0, 1.0])
    for name in ("codes", "plane_scale", "offset"):
        assert getattr(q, name).shape == getattr(whole, name).shape
    np.testing.assert_array_equal(q.dequantize(), np.hstack([part.dequantize() for part in parts]))


@pytest.mark.parametrize(("bits", "size"), [(3, None), (8, None), (2, 64)])
def test_the_estimate_holds(problem, bits, size):
    W, _, G = problem(256, 1024)
    G, options = G.astype(np.float32), {"group_size": size, "recipe": "fast", "codebook": "planes", "threads": 2}
    comq_np.solve(W[:, :2], G, bits, **options)  # compiles
    tracemalloc.start()
    comq_np.solve(W, G, bits, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        0.6 * comq_np.estimate(256, 1024, bits, **options)
        <= peak
        <= 1.05 * comq_np.estimate(256, 1024, bits, **options)
    )


def split_recipe(**fields):
    return comq_np.Recipe(
        "split", ("minmax",), start="bitsplit", order="shared", refit=False, **{"sweeps": 0, **fields}
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_bit_by_bit_are_those_of_the_oracle(problem, bits):
    W, _, G = problem(9, 12)
    q = comq_np.solve(W, G, bits, recipe=split_recipe(), scale=0.6, zero_point=2)
    codes, margin = naive.split(W, G, np.full(12, np.float64(np.float32(0.6))), np.full(12, 2), bits)
    objective = naive.objective(W, naive.dequantize(codes, np.full((1, 12), 0.6), np.full((1, 12), 2), None), G)
    rounded = comq_np.solve(W, G, bits, recipe="rtn", scale=0.6, zero_point=2).codes
    kept = naive.objective(W, naive.dequantize(rounded, np.full((1, 12), 0.6), np.full((1, 12), 2), None), G)
    sure = (margin > naive.MARGIN) & (objective < kept * (1 - naive.NEAR))  # else plain rounding stays
    assert sure.mean() > 0.25
    np.testing.assert_array_equal(q.codes[:, sure], codes[:, sure])


def test_sweeps_go_on_from_codes_bit_by_bit(problem):
    W, _, G = problem(20, 6)
    first, after = (comq_np.solve(W, G, 3, recipe=split_recipe(sweeps=sweeps)).report.objective for sweeps in (0, 9))
    assert after < first


def test_bit_by_bit_needs_a_power_of_two():
    with pytest.raises(comq_np.InputError, match="`levels` must be a power of two with `start` 'bitsplit', got 3"):
        comq_np.solve([[1.0], [2.0]], np.eye(2), levels=3, recipe=split_recipe())
