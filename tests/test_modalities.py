"""Named groups of batches: balanced, and judged one by one, against the inputs themselves in double precision."""

from __future__ import annotations

import json

import numpy as np
import pytest

import comq_np
from comq_np.cli import main

SIZES = {"image": (300, 20.0), "text": (40, 0.5), "sound": (60, 1.0)}


def inputs(m, problems=None, seed=0):
    """Samples of each group: some are many, some large, each with a mean of its own."""
    rng, shape = np.random.default_rng(seed), () if problems is None else (problems,)
    return {
        name: scale * (rng.normal(size=(count, *shape, m)) @ rng.normal(size=(m, m)) + rng.normal(size=m))
        for name, (count, scale) in SIZES.items()
    }


def gathered(X):
    first = next(iter(X.values()))
    grams = comq_np.NamedGrams(first.shape[-1], X, first.shape[1] if first.ndim == 3 else None)
    for name, some in X.items():
        for part in np.array_split(some, 4):
            grams.update(name, part)
    return grams


def weights(m, n, problems=None):
    return np.random.default_rng(9).normal(size=(m, n) if problems is None else (problems, m, n)).astype(np.float32)


def squares(X, W, centred=False):
    """Sum of the squares of X @ W, of one problem or several."""
    Y = np.einsum("k...m,...mn->k...n", X, W)
    return np.square(Y - Y.mean(axis=0) * centred).sum()


@pytest.mark.parametrize("problems", [None, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_balanced_is_the_gram_of_weighted_samples(problems, centred):
    X, W = inputs(7, problems), weights(7, 4, problems)
    found = gathered(X).balanced(W, centred)
    share = {name: 1 / squares(some, W, centred) for name, some in X.items()}
    scale = 400 / sum(len(some) * share[name] for name, some in X.items())
    rows = np.concatenate([some * np.sqrt(scale * share[name]) for name, some in X.items()])
    mass = np.concatenate([np.full(len(some), np.sqrt(scale * share[name])) for name, some in X.items()])
    matrix = np.einsum("k...i,k...j->...ij", rows, rows)
    mean = np.einsum("k,k...->...", mass, rows) / np.square(mass).sum()
    np.testing.assert_allclose(found.matrix, matrix, rtol=1e-5, atol=1e-5 * np.abs(matrix).max())
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())
    apart = rows - mass.reshape(-1, *[1] * mean.ndim) * mean
    np.testing.assert_allclose(
        found.centred, np.einsum("k...i,k...j->...ij", apart, apart), rtol=1e-4, atol=1e-5 * np.abs(matrix).max()
    )
    assert found.count == 400
    assert sum(found.fold_matrix(fold) for fold in (0, 1)) == pytest.approx(found.matrix)


def test_each_group_has_the_same_share_of_the_objective():
    X, W = inputs(7), weights(7, 4)
    balanced, alone = gathered(X).balanced(W), {name: gathered({name: some}) for name, some in X.items()}
    total = np.vdot(W, balanced.matrix @ W)
    for name, grams in alone.items():
        share = np.vdot(W, grams.balanced(W).matrix @ W)  # of itself it has any weight: that of its number of samples
        assert share == pytest.approx(squares(X[name], W), rel=1e-5)
    shares = [squares(X[name], W) * balanced.count for name in X]
    assert len(shares) == 3
    mass = sum(len(X[name]) / squares(X[name], W) for name in X)
    assert total == pytest.approx(3 * balanced.count / mass, rel=1e-5)


@pytest.fixture
def files(tmp_path):
    """Calibration file of layers with and without a bias, of several problems, and reached by one group only."""
    made = {}
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for name, m, n, problems in (("biased", 12, 6, None), ("plain", 9, 5, None), ("grouped", 4, 3, 5)):
            X, W = inputs(m, problems, seed=m), weights(m, n, problems)
            bias = np.zeros(n, np.float32) if name == "biased" else None
            file.add(comq_np.Layer(name, W, gathered(X), bias))
            made[name] = X, W
        X, W = inputs(6), weights(6, 4)
        grams = comq_np.NamedGrams(6, SIZES)
        grams.merge(gathered({"text": X["text"]}))
        file.add(comq_np.Layer("late", W, grams))
        made["late"] = {"text": X["text"]}, W
    return tmp_path / "c.h5", tmp_path / "q.h5", made


def test_reports_have_the_error_of_each_group(files):
    calibration, quantized, made = files
    reports = comq_np.quantize_file(calibration, quantized, 3)
    with comq_np.QuantizedFile(quantized) as file:
        for name, (X, W) in made.items():
            q = file[name]
            assert q.report == reports[name]
            E = q.dequantize().astype(np.float64) - W
            for group, some in X.items():
                Y = np.einsum("k...m,...mn->k...n", some, E) + (0 if q.bias_shift is None else q.bias_shift)
                by_hand = np.square(Y).sum() / squares(some, W, q.bias_shift is not None)
                assert q.report.modalities[group] == pytest.approx(by_hand, rel=1e-4)
            assert set(q.report.modalities) == set(X)
            if q.bias_shift is None:
                mean = np.mean(list(q.report.modalities.values()))
                assert q.report.relative_error == pytest.approx(mean, rel=1e-4)
    assert all(layer.matches for layer in comq_np.verify_file(calibration, quantized))


def test_balancing_helps_the_small_at_little_cost_to_the_large(tmp_path):
    X, other, W = inputs(24, seed=1), inputs(24, seed=1), weights(24, 16)
    errors = {}
    for how in ("together", "balanced"):
        gram = gathered(X)
        if how == "together":
            gram = comq_np.Gram(24)
            for some in X.values():
                gram.update(some)
        with comq_np.CalibrationWriter(tmp_path / f"{how}.h5") as file:
            file.add(comq_np.Layer("fc", W, gram))
        comq_np.quantize_file(tmp_path / f"{how}.h5", tmp_path / "q.h5", 3)
        with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
            E = file["fc"].dequantize().astype(np.float64) - W
        errors[how] = {name: squares(some, E) / squares(some, W) for name, some in other.items()}
    assert errors["balanced"]["text"] < 0.5 * errors["together"]["text"]
    assert sum(errors["balanced"].values()) < sum(errors["together"].values())


def test_files_give_them_back(files, tmp_path, capsys):
    calibration, quantized, made = files
    with comq_np.CalibrationFile(calibration) as file:
        for name, (X, _) in made.items():
            gram = file[name].gram
            assert gram.counts == {group: len(some) for group, some in X.items()}
            for group, one in gathered(X).grams.items():
                assert np.array_equal(gram.grams[group].matrix, one.matrix)
        assert file.summary("biased")["groups"] == [*SIZES]
        assert file.summary("biased")["samples"] == 400
    with comq_np.CalibrationFile(calibration) as file:
        gram = file["plain"].gram
    comq_np.save_gram(tmp_path / "g.h5", gram)
    assert comq_np.load_gram(tmp_path / "g.h5").counts == gram.counts
    assert main(["info", str(tmp_path / "g.h5")]) == main(["info", str(calibration)]) == 0
    said = capsys.readouterr().out
    assert "samples of sound" in said
    assert "image text sound" in said
    comq_np.quantize_file(calibration, quantized, 3, recipe="rtn")
    assert main(["info", str(quantized)]) == 0
    assert "error of sound" in capsys.readouterr().out
    assert main(["info", str(quantized), "--json"]) == 0
    errors = json.loads(capsys.readouterr().out)["layers"][0]["modalities"]
    with comq_np.QuantizedFile(quantized) as file:
        assert errors == file.report("biased").modalities


def test_merged_group_by_group(files, tmp_path):
    calibration, _, made = files
    again = tmp_path / "d.h5"
    with comq_np.CalibrationWriter(again) as file:
        for name, (X, W) in made.items():
            bias = np.zeros(W.shape[-1], np.float32) if name == "biased" else None
            file.add(comq_np.Layer(name, W, gathered({"text": X["text"], "new": X["text"]}), bias))
    comq_np.merge_files([calibration, again], tmp_path / "m.h5")
    with comq_np.CalibrationFile(tmp_path / "m.h5") as file:
        assert file["biased"].gram.counts == {"image": 300, "text": 80, "sound": 60, "new": 40}
        assert file["late"].gram.counts == {"text": 80, "new": 40}


def test_parts_of_a_layer_add_up():
    X, W = inputs(6), weights(6, 10)
    grams, Wq = gathered(X), weights(6, 10).round()
    shift = np.arange(10) / 10
    whole = grams.errors(W, Wq, shift)
    parts = [grams.errors(W, Wq[:, part], shift[part], part) for part in (slice(0, 4), slice(4, 10))]
    for name in X:
        assert sum(part[name] for part in parts) == pytest.approx(whole[name])


def test_a_group_without_outputs_is_left_out():
    grams = comq_np.NamedGrams(2, ["dark", "lit"])
    grams.update("dark", [[1.0, 0.0]] * 3)
    grams.update("lit", [[0.0, 2.0]] * 2)
    W = [[0.0], [1.0]]
    assert np.array_equal(grams.balanced(W).matrix, [[0, 0], [0, 5 / 2 * 8]])
    assert grams.errors(W, [[0.0], [0.5]]) == {"dark": 0.0, "lit": 0.25}
    report = comq_np.solve(W, np.eye(2)).report
    report = type(report).from_dict({**report.to_dict(), "modalities": grams.errors(W, [[0.5], [1.0]])})
    assert report.modalities == {"dark": np.inf, "lit": 0.0}
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: comq_np.NamedGrams(2, []), "`names` must be different names of groups, at least one, got []."),
        (lambda: comq_np.NamedGrams(2, ["a", "a"]), "`names` must be different names"),
        (lambda: comq_np.NamedGrams.from_grams({"a": 1}), "`grams` must map names to comq_np.Gram, got {'a': 1}."),
        (
            lambda: comq_np.NamedGrams.from_grams({"a": comq_np.Gram(2), "b": comq_np.Gram(3)}),
            "`grams` must be of one width and number of problems",
        ),
        (lambda: comq_np.NamedGrams(2, ["a"]).update("b", [[1, 2]]), "`name` must be one of 'a', got 'b'."),
        (lambda: comq_np.NamedGrams(2, ["a"]).merge(comq_np.Gram(2)), "`other` must be NamedGrams, got 'Gram'."),
        (lambda: comq_np.NamedGrams(2, ["a"]).balanced([[1.0]]), "`W` must have shape (2, n), got (1, 1)."),
    ],
)
def test_refused(call, message):
    with pytest.raises(comq_np.InputError) as error:
        call()
    assert str(error.value).startswith(message)


def test_files_hold_no_samples_with_weights(tmp_path):
    grams = comq_np.NamedGrams(1, ["a", "b"])
    grams.update("a", [[1.0]])
    grams.update("b", [[3.0], [3.0]])
    with pytest.raises(comq_np.InputError, match="`gram` must hold samples without weights"):
        comq_np.save_gram(tmp_path / "g.h5", grams.balanced([[1.0]]))
