"""Layers of several problems in files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from edits import editing
from stored import assert_equal_grams, drop, put, refused

import comq_np


@pytest.fixture
def groups(problem):
    """Layers of 1, 3 and 40 problems; the first has no bias, the last two share a Gram."""
    made = []
    for b, m, n in ((1, 6, 4), (3, 20, 5), (40, 9, 1)):
        found = [problem(m, n, seed=seed) for seed in range(b)]
        gram = comq_np.Gram(m, problems=b)
        gram.update(np.stack([one.X[:30] for one in found], axis=1))
        W, bias = np.stack([one.W for one in found]), np.arange(b * n, dtype=np.float32).reshape(b, n)
        made.append(comq_np.Layer(f"{b} groups", W, gram, bias if b > 1 else None, "conv2d"))
    return [*made, dataclasses.replace(made[-1], name="again")]


def test_groups_round_trip(groups, tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for layer in groups:
            file.add(layer)
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        rows = file.describe()
        for layer in groups:
            found = file[layer.name]
            np.testing.assert_array_equal(found.weight, layer.weight)
            np.testing.assert_equal(found.bias, layer.bias)
            assert_equal_grams(found.gram, layer.gram)
            assert found.gram.problems == len(layer.weight)
    assert [(row["problems"], row["rows"], row["columns"], row["gram"]) for row in rows] == [
        (1, 6, 4, 0), (3, 20, 5, 1), (40, 9, 1, 2), (40, 9, 1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [None, "tensor", 8])
@pytest.mark.parametrize("bits", [3, 8, 11])
def test_quantized_groups_round_trip(groups, tmp_path, size, bits):
    options = {"group_size": size, "recipe": "fast"}
    solved = {
        layer.name: comq_np.solve(layer.weight, layer.gram, bits, fit_bias=layer.bias is not None, **options)
        for layer in groups
    }
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        for name, q in solved.items():
            file.add(name, q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        rows, found = file.describe(), dict(file)
    for name, q in solved.items():
        for field in dataclasses.fields(q):
            np.testing.assert_equal(getattr(found[name], field.name), getattr(q, field.name))
        np.testing.assert_array_equal(found[name].dequantize(), q.dequantize())
    assert [(row["problems"], row["rows"], row["columns"]) for row in rows] == [
        layer.weight.shape for layer in groups
    ]  # fmt: skip


def test_gram_of_several_problems(groups, tmp_path):
    comq_np.save_gram(tmp_path / "gram.h5", groups[1].gram)
    found = comq_np.load_gram(tmp_path / "gram.h5")
    assert (found.problems, len(found)) == (3, 20)
    assert_equal_grams(found, groups[1].gram)


def test_equal_numbers_in_other_shapes_are_other_grams(groups, tmp_path):
    """A Gram of one problem with an axis for it has the bytes of one without."""
    first, *_ = groups
    alone = comq_np.Gram.from_folds(tuple((fold.matrix[0], fold.sum[0], fold.count) for fold in first.gram.folds))
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(first)
        file.add(comq_np.Layer("alone", first.weight[0], alone))
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert [row["gram"] for row in file.describe()] == [0, 1]
        assert (file["1 groups"].gram.problems, file["alone"].gram.problems) == (1, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight", np.zeros((3, 20, 5, 1), np.float32)), "/layers/1/weight: must have shape ([any,] any, any), "),
        (
            put("weight", np.zeros((3, 21, 5), np.float32)),
            "/layers/1: must name a Gram of width 21, as its weight has ",
        ),
        (put("bias", np.zeros(5, np.float32)), "/layers/1/bias: must have shape (3, 5), has (5,)."),
        (drop("bias"), "/layers/1: must name a Gram with `problems` 3, as its weight has axes, names one with 40."),
    ],
)
def test_broken_groups(groups, tmp_path, change, message):
    path = tmp_path / "c.h5"
    with comq_np.CalibrationWriter(path) as file:
        for layer in groups:
            file.add(layer)
    with editing(path) as file:
        if "names one" in message:
            file["layers/1"].attrs["gram"] = 2
            put("weight", np.zeros((3, 9, 5), np.float32))(file["layers/1"])
        change(file["layers/1"])
    assert refused(comq_np.CalibrationFile, path).startswith(message)


def test_broken_gram_of_several_problems(groups, tmp_path):
    path = tmp_path / "gram.h5"
    for matrix, total, message in (
        ((3, 20, 20), (2, 20), "/fold1/matrix: must have shape (2, 20, 20), has (3, 20, 20)."),
        ((2, 20, 20), (2, 20), "/: `matrix` must have shape (3, 20, 20), got (2, 20, 20)."),
        ((3, 20, 20), (1, 3, 20), "/fold1/sum: must have shape ([any,] any,), has (1, 3, 20)."),
    ):
        comq_np.save_gram(path, groups[1].gram)
        with editing(path) as file:
            put("matrix", np.zeros(matrix))(file["fold1"])
            put("sum", np.zeros(total))(file["fold1"])
        with pytest.raises(comq_np.FileError) as error:
            comq_np.load_gram(path)
        assert str(error.value) == f"{path}: {message}"
