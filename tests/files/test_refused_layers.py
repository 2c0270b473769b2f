"""What is refused on the way into a file, naming file, place and reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import comq_np


def test_refused_layers(tmp_path, problem):
    W, X, _ = problem(4, 3)
    gram, groups = comq_np.Gram(4), comq_np.Gram(4, problems=2)
    gram.update(X)
    cases = [
        (comq_np.Layer("x", W[:, 0], gram), "layer 'x': `weight` must be 2-D or 3-D, got 1-D of shape (4,)."),
        (comq_np.Layer("x", W + np.inf, gram), "layer 'x': `weight` must be finite, got 12 NaN or infinite of 12 ..."),
        (comq_np.Layer("x", W[:3], gram), "layer 'x': `gram` must be of width 3, as `weight` has rows, is of 4."),
        (comq_np.Layer("x", W, gram, np.zeros(4)), "layer 'x': `bias` must have shape (3,), got (4,)."),
        (
            comq_np.Layer("x", W[None], gram),
            "layer 'x': `gram` must have `problems` 1, as `weight` has shape (1, 4, ...",
        ),
        (
            comq_np.Layer("x", W, groups),
            "layer 'x': `gram` must have `problems` None, as `weight` has shape (4, 3), ...",
        ),
        (
            comq_np.Layer("x", np.stack([W] * 2), groups, np.zeros(3)),
            "layer 'x': `bias` must be 2-D, got 1-D of shape (3,).",
        ),
        (
            comq_np.Layer("x", np.stack([W] * 2), groups, np.zeros((3, 2))),
            "layer 'x': `bias` must have shape (2, 3), got (3, 2).",
        ),
        (
            comq_np.Layer("x", W, gram, np.full(3, 1e39)),
            "layer 'x': `bias` must fit in float32, got an entry of size 1e+39.",
        ),
        (comq_np.Layer("x", W, gram.matrix), "layer 'x': `gram` must be a comq_np.Gram or TokenCounts, got 'ndarray'."),
        (comq_np.Layer("x", W, gram, kind=3), "layer 'x': `kind` must be a string, got 3."),
        (
            comq_np.Layer("x", W, gram, kind="\0"),
            "layer 'x': `kind` must be text that UTF-8 can hold, without NUL, ...",
        ),
        (comq_np.Layer(3, W, gram), "`name` must be a string, got 3."),
        (comq_np.Layer("a\0b", W, gram), "`name` must be text that UTF-8 can hold, without NUL, got 'a\\x00b'."),
        (comq_np.Layer("\udc80", W, gram), "`name` must be text that UTF-8 can hold, without NUL, got '\\udc80'."),
        (("x", W, gram), "`layer` must be a comq_np.Layer, got 'tuple'."),
    ]
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for layer, message in cases:
            with pytest.raises(comq_np.InputError) as error:
                file.add(layer)
            assert str(error.value).startswith(message.removesuffix("..."))
        file.add(comq_np.Layer("x", W, gram))
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert list(file) == ["x"]


def test_refused_results(tmp_path):
    q = comq_np.solve([[1.0, 2.0]], [[1.0]])
    cases = [
        ("x", q.codes, "layer 'x': `q` must be a comq_np.QuantizedArray or PlaneArray, got 'ndarray'."),
        (b"x", q, "`name` must be a string, got b'x'."),
        ("x", dataclasses.replace(q, scale=q.scale[0]), "layer 'x': `scale` must have shape (1, 2), got (2,)."),
        (
            "x",
            dataclasses.replace(q, codes=q.codes[None]),
            "layer 'x': `scale` must have shape (1, 1, 2), got (1, 2).",
        ),
        (
            "x",
            dataclasses.replace(q, zero_point=np.array([[2**31, 0]])),
            "layer 'x': `zero_point` must fit in int32, got 0 to 2147483648.",
        ),
        (
            "x",
            dataclasses.replace(q, report=dataclasses.replace(q.report, objective=np.nan)),
            "layer 'x': `report` must hold text and finite numbers, got ...",
        ),
    ]
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        for name, value, message in cases:
            with pytest.raises(comq_np.InputError) as error:
                file.add(name, value)
            assert str(error.value).startswith(message.removesuffix("..."))
        file.add("x", q)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert list(file) == ["x"]


def test_a_gram_that_changed_since_it_was_written(tmp_path):
    gram = comq_np.Gram(1)
    gram.update([[1.0], [2.0]])
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("a", np.ones((1, 2)), gram))
        gram.update([[3.0]])
        with pytest.raises(comq_np.InputError) as error:
            file.add(comq_np.Layer("b", np.ones((1, 2)), gram))
    assert str(error.value) == (
        "layer 'b': `gram` changed since layer 'a' was added with it: it had seen 2 samples then and has 3 now."
    )


def test_a_name_only_once(tmp_path, layers):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(layers[0])
        with pytest.raises(comq_np.InputError) as error:
            file.add(layers[0])
    assert str(error.value) == "layer 'q': a file can hold only one layer of that name."


def test_one_dimensional_codes_are_no_layer(tmp_path):
    with (
        comq_np.QuantizedWriter(tmp_path / "q.h5") as file,
        pytest.raises(comq_np.InputError, match="layer 'x': `codes`"),
    ):
        file.add("x", comq_np.solve([1.0, 2.0], np.eye(2)))
