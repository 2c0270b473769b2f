"""File to file: every layer solved as `solve` would, and verification that notices what was changed."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from edits import editing

import comq_np
from comq_np import gramfile


@pytest.fixture
def files(problem, tmp_path):
    """Calibration file with three layers, the last without a bias, and the name of the quantized file."""
    with comq_np.CalibrationWriter(tmp_path / "calibration.h5") as file:
        for name, m, n in (("one", 12, 5), ("two", 30, 8), ("three", 7, 3)):
            W, X, _ = problem(m, n)
            gram = comq_np.Gram(m)
            gram.update(X[::2])
            gram.update(X[1::2])
            file.add(comq_np.Layer(name, W, gram, None if name == "three" else np.zeros(n, np.float32)))
    return tmp_path / "calibration.h5", tmp_path / "quantized.h5"


OPTIONS = [
    {},
    {"bits": 2, "recipe": "rtn", "threads": 1},
    {"bits": 3, "recipe": "paper", "group_size": 8, "fit_bias": False},
    {"bits": 3, "zero_point": "real", "group_size": 8},
    {"bits": 3, "scale_dtype": "float16", "group_size": 8},
    {"levels": 3, "symmetric": True, "recipe": comq_np.recipe("paper").replace(sweeps=5)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_layer_is_solved_as_by_solve(files, options):
    reports = comq_np.quantize_file(*files, **options)
    with comq_np.CalibrationFile(files[0]) as source, comq_np.QuantizedFile(files[1]) as target:
        assert list(source) == list(target) == list(reports) == ["one", "two", "three"]
        for name, layer in source.items():
            fit_bias = options.get("fit_bias", True) and layer.bias is not None
            q, expected = target[name], comq_np.solve(layer.weight, layer.gram, **{**options, "fit_bias": fit_bias})
            np.testing.assert_array_equal(q.codes, expected.codes)
            np.testing.assert_array_equal(q.dequantize(), expected.dequantize())
            assert q.scale.dtype == expected.scale.dtype == options.get("scale_dtype", np.float32)
            assert (q.bias_shift is None) is not fit_bias
            assert q.report == reports[name]
            assert q.report.objective == expected.report.objective
    assert all(layer.matches for layer in comq_np.verify_file(*files))


@pytest.fixture
def groups(problem, tmp_path):
    """Calibration file with layers of 1, 5 and 60 problems, the first without a bias, and one of one problem."""
    with comq_np.CalibrationWriter(tmp_path / "calibration.h5") as file:
        for b, m, n in ((1, 9, 4), (5, 30, 3), (60, 9, 1), (0, 12, 5)):
            made = [problem(m, n, seed=seed) for seed in range(b or 1)]
            X, W = (
                np.stack(parts, axis) for parts, axis in (([one.X for one in made], 1), ([one.W for one in made], 0))
            )
            gram = comq_np.Gram(m, problems=b or None)
            gram.update(X if b else X[:, 0])
            bias = np.zeros((b, n) if b else n, np.float32) if b != 1 else None
            file.add(comq_np.Layer(f"{b}", W if b else W[0], gram, bias, "conv2d"))
    return tmp_path / "calibration.h5", tmp_path / "quantized.h5"


@pytest.mark.parametrize("options", [*OPTIONS, {"bits": 2, "group_size": "tensor"}, {"workers": 3, "threads": 2}])
def test_every_layer_of_several_problems_is_solved_as_by_solve(groups, options):
    reports = comq_np.quantize_file(*groups, **options)
    assert not reports.kept
    options = {name: value for name, value in options.items() if name != "workers"}
    with comq_np.CalibrationFile(groups[0]) as source, comq_np.QuantizedFile(groups[1]) as target:
        for name, layer in source.items():
            fit_bias = options.get("fit_bias", True) and layer.bias is not None
            q, expected = target[name], comq_np.solve(layer.weight, layer.gram, **{**options, "fit_bias": fit_bias})
            for field in ("codes", "scale", "zero_point", "bias_shift"):
                np.testing.assert_equal(getattr(q, field), getattr(expected, field))
            assert q.report == expected.report == reports[name]
    assert all(layer.matches for layer in comq_np.verify_file(*groups))


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("layers/2/codes", lambda codes: codes ^ (np.arange(codes.size).reshape(codes.shape) == 7)),
        ("layers/2/scale", lambda scale: scale * np.where(np.arange(60) == 31, np.float32(1.01), 1)[:, None, None]),
        ("layers/2/bias_shift", lambda shift: shift + (np.arange(60) == 31)[:, None] * np.float32(1e-2)),
    ],
)
def test_verify_notices_a_change_in_one_problem(groups, place, change):
    comq_np.quantize_file(*groups)
    edit(groups[1], place, lambda values: change(values).astype(values.dtype))
    assert [layer.matches for layer in comq_np.verify_file(*groups)] == [True, True, False, True]


def test_paper_on_a_stored_layer_equals_the_oracle(files):
    comq_np.quantize_file(*files, 3, recipe="paper", fit_bias=False)
    with comq_np.CalibrationFile(files[0]) as source, comq_np.QuantizedFile(files[1]) as target:
        layer = source["two"]
        naive.assert_same(target["two"], naive.solve(layer.weight, layer.gram.matrix, 8), strict=0.7)


def test_refused_options(files):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(*files, bits=17)
    assert str(error.value) == "`bits` must be an integer from 1 to 16, got 17."
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(*files, fit_bias=1)
    assert str(error.value) == "`fit_bias` must be True or False, got 1."
    assert not files[1].exists()


def test_one_file_for_both(files):
    with pytest.raises(comq_np.InputError, match="`quantized` must be another file than `calibration`"):
        comq_np.quantize_file(files[0], files[0])
    comq_np.quantize_file(*files)


def test_a_layer_that_saw_no_input_is_named(files, problem):
    with comq_np.CalibrationWriter(files[0]) as file:
        file.add(comq_np.Layer("never called", problem(3, 2).W, comq_np.Gram(3)))
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(*files, strict=True)
    assert str(error.value) == "layer 'never called': `G` must have seen inputs, got a Gram with count 0."
    assert not files[1].exists()


def edit(path, place, change):
    with editing(path) as file:
        dataset = file[place]
        dataset[...] = change(dataset[()])


@pytest.mark.parametrize(
    ("which", "place", "change"),
    [
        (
            1,
            "layers/1/codes",
            lambda codes: np.where(np.arange(codes.size).reshape(codes.shape) == 7, codes ^ 1, codes),
        ),
        (1, "layers/1/scale", lambda scale: scale * np.float32(1.001)),
        (1, "layers/1/zero_point", lambda zero_point: zero_point + np.eye(*zero_point.shape, dtype=zero_point.dtype)),
        (1, "layers/1/bias_shift", lambda shift: shift + np.float32(1e-3)),
        (0, "layers/1/weight", lambda weight: weight * np.float32(1.001)),
        (0, "grams/1/fold0/matrix", lambda matrix: matrix * 1.001),
    ],
)
def test_verify_notices_a_change(files, which, place, change):
    comq_np.quantize_file(*files, fit_bias=True)
    edit(files[which], place, change)
    assert [layer.matches for layer in comq_np.verify_file(*files)] == [True, False, True]


@pytest.mark.parametrize(("which", "place"), [(1, "layers/1/codes"), (1, "layers/1/bias_shift"), (0, "layers/1/bias")])
def test_verify_refuses_what_the_digests_tell(files, which, place):
    """Also the bias, which no objective depends on."""
    comq_np.quantize_file(*files)
    with editing(files[which], keep_digests=True) as file:
        values = file[place][()]
        file[place][...] = values + np.ones(1, values.dtype)
    with pytest.raises(comq_np.FileError, match=f"/{place}: is damaged: it has another SHA-256"):
        comq_np.verify_file(*files)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_verify_notices_the_least_change_of_one_code(problem, tmp_path, bits):
    """Also of weights whose output is so much larger than its error that next to it any objective is nothing."""
    W, X, _ = problem(12, 5)
    gram, files = comq_np.Gram(12), (tmp_path / "c.h5", tmp_path / "q.h5")
    gram.update(X)
    with comq_np.CalibrationWriter(files[0]) as file:
        file.add(comq_np.Layer("fc", W + np.float32(50), gram))
    report = comq_np.quantize_file(*files, bits)["fc"]
    assert report.relative_error < 1e-11 or bits < 16
    assert comq_np.verify_file(*files)[0].matches
    edit(files[1], "layers/0/codes", lambda codes: codes ^ (np.arange(codes.size).reshape(codes.shape) == 0))
    assert not comq_np.verify_file(*files)[0].matches


def test_verify_needs_the_same_layers(files, tmp_path, problem):
    comq_np.quantize_file(*files)
    with comq_np.CalibrationFile(files[0]) as source, comq_np.CalibrationWriter(tmp_path / "fewer.h5") as target:
        target.add(source["one"])
        target.add(source["two"])
    with pytest.raises(comq_np.FileError, match=r"fewer\.h5: must hold layer 'three'"):
        comq_np.verify_file(tmp_path / "fewer.h5", files[1])
    comq_np.quantize_file(tmp_path / "fewer.h5", tmp_path / "fewer-quantized.h5")
    with pytest.raises(comq_np.FileError, match=r"fewer-quantized\.h5: must hold layer 'three'"):
        comq_np.verify_file(files[0], tmp_path / "fewer-quantized.h5")


def test_verify_needs_the_same_shapes(files, problem):
    comq_np.quantize_file(*files)
    with comq_np.QuantizedFile(files[1]) as source:
        made = dict(source)
    W, _, G = problem(12, 4)
    with comq_np.QuantizedWriter(files[1]) as target:
        for name, q in (made | {"one": comq_np.solve(W, G)}).items():
            target.add(name, q)
    message = r"layer 'one': must have codes of shape \(12, 5\), as its weight has, has \(12, 4\)\."
    with pytest.raises(comq_np.FileError, match=message):
        comq_np.verify_file(*files)


def test_a_shared_gram_is_read_once(problem, tmp_path, monkeypatch):
    W, X, _ = problem(12, 5)
    gram, other = comq_np.Gram(12), comq_np.Gram(12)
    gram.update(X)
    other.update(X[1:])
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for name in ("q", "k", "v"):
            file.add(comq_np.Layer(name, W, gram))
        file.add(comq_np.Layer("out", W, other))
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5")
    reads, read_gram = [], gramfile.read_gram
    monkeypatch.setattr(gramfile, "read_gram", lambda group: reads.append(group.name) or read_gram(group))
    assert all(layer.matches for layer in comq_np.verify_file(tmp_path / "c.h5", tmp_path / "q.h5"))
    assert reads == ["/grams/0", "/grams/1"]


def test_progress_is_shown_when_asked_for(files, capsys):
    comq_np.quantize_file(*files)
    comq_np.verify_file(*files)
    assert capsys.readouterr().err == ""
    comq_np.verify_file(*files, progress=True)
    assert "verify: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(8))
def test_a_correct_file_is_verified_where_the_gram_is_nearly_singular(tmp_path, seed):
    rng = np.random.default_rng(seed)
    gram, W = comq_np.Gram(70), -np.abs(rng.normal(size=(70, 5))).astype(np.float32)
    gram.update(rng.normal(size=(3, 70)) * np.exp(3 * rng.normal(size=70)))
    files = tmp_path / "calibration.h5", tmp_path / "quantized.h5"
    with comq_np.CalibrationWriter(files[0]) as file:
        file.add(comq_np.Layer("fc", W, gram, np.zeros(5, np.float32)))
    comq_np.quantize_file(*files, bits=8)
    assert comq_np.verify_file(*files)[0].matches


@pytest.mark.parametrize("bits", [8, 12])
def test_a_correct_file_is_verified_where_single_precision_rounds_the_objective(problem, tmp_path, bits):
    W, X, _ = problem(200, 6)
    gram, files = comq_np.Gram(200), (tmp_path / "calibration.h5", tmp_path / "quantized.h5")
    gram.update(X)
    with comq_np.CalibrationWriter(files[0]) as file:
        file.add(comq_np.Layer("fc", W, gram))
    comq_np.quantize_file(*files, bits)
    assert comq_np.verify_file(*files)[0].matches
