"""What adapters share, seen through one of models that are lists of NumPy matrices."""

from __future__ import annotations

import numpy as np
import pytest

import comq_np
from comq_np import adapter

WIDTH = 6


class Matrix(adapter.WeightLayer):
    kind, has_bias = "linear", False

    def __init__(self, name, model, place, geometry):
        self.names, self.geometry, self._model, self._place = [name], geometry, model, place
        self.shape = model[place].shape

    def arrays(self):
        return self._model[self._place].astype(np.float32), None

    def rows(self, x):
        yield x

    def write(self, W, bias_shift, q):  # noqa: ARG002
        self._model[self._place] = W


class Fan(adapter.Model):
    """All matrices multiply the input, and those of a second one its negative."""

    needs = "a matrix"

    def __init__(self, model, by_geometry, skipped=None):
        self.model, self.shared_by_geometry, self.skipped = model, by_geometry, skipped or {}
        self.layers = [
            Matrix(f"{place}", model, place, place % 2 if by_geometry else WIDTH) for place in range(len(model))
        ]
        self.seen, self.stop_at = [], None

    def digest(self):
        return repr([W.tolist() for W in self.model])

    def run(self, batch, observe, wanted):
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(set())
        inputs = batch, -batch
        for place, layer in enumerate(self.layers):
            if layer.name in wanted or not self.shared_by_geometry:
                self.seen[-1].add(layer.name)
                observe(layer, inputs[place % 2])


def matrices():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(WIDTH, n)) for n in (3, 4, 5, 6)]


def batches(count=3):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(8, WIDTH)) for _ in range(count)]


def memory_for_one():
    """Bytes that one Gram takes, shared by two layers."""
    shapes = {"a": (WIDTH, 3), "b": (WIDTH, 6)}
    return comq_np.plan_calibration(shapes, shared=[["a", "b"]]).passes[0].memory


def captured(path, model, **options):
    adapter.capture(model, batches(), path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("by_geometry", [False, True])
def test_several_passes_make_the_file_of_one(tmp_path, by_geometry):
    one, several = Fan(matrices(), by_geometry), Fan(matrices(), by_geometry)
    expected = captured(tmp_path / "a.h5", one)
    assert captured(tmp_path / "b.h5", several, memory=memory_for_one()) == expected
    assert one.seen == [{"0", "1", "2", "3"}] * 3
    if by_geometry:  # what is known needs no run to find it out, and what is not wanted is not looked at
        assert several.seen == [{"0", "2"}] * 3 + [{"1", "3"}] * 3
    else:
        assert several.seen == [{"0", "1", "2", "3"}] * 7
    with comq_np.CalibrationFile(tmp_path / "a.h5") as file:
        assert [row["gram"] for row in file.describe()] == [0, 1, 0, 1]


@pytest.mark.parametrize("by_geometry", [False, True])
def test_going_on_where_layers_that_share_are_finished_in_part(tmp_path, monkeypatch, by_geometry):
    expected = captured(tmp_path / "a.h5", Fan(matrices(), by_geometry))
    add = comq_np.CalibrationWriter.add

    def add_one(self, layer):
        if layer.name == "2":
            raise KeyboardInterrupt
        add(self, layer)

    options = {"memory": memory_for_one()}
    with monkeypatch.context() as patched:
        patched.setattr(comq_np.CalibrationWriter, "add", add_one)
        with pytest.raises(KeyboardInterrupt):
            captured(tmp_path / "b.h5", Fan(matrices(), by_geometry), **options)
    assert captured(tmp_path / "b.h5", Fan(matrices(), by_geometry), **options) == expected


def test_a_model_that_is_stopped_goes_on_with_its_next_pass(tmp_path):
    expected = captured(tmp_path / "a.h5", Fan(matrices(), True))
    stopped, again = Fan(matrices(), True), Fan(matrices(), True)
    stopped.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        captured(tmp_path / "b.h5", stopped, memory=memory_for_one())
    assert captured(tmp_path / "b.h5", again, memory=memory_for_one()) == expected
    assert again.seen == [{"1", "3"}] * 3


def test_layers_that_a_model_does_not_observe_are_missed(tmp_path):
    model = Fan(matrices(), True)
    del model.layers[2].names[:]
    model.layers[2].names.append("never")
    run = model.run
    model.run = lambda batch, observe, wanted: run(batch, observe, wanted - {"never"})
    with pytest.warns(UserWarning, match="No batch reached these layers, which are left out: 'never'"):
        captured(tmp_path / "a.h5", model, memory=memory_for_one())
    with comq_np.CalibrationFile(tmp_path / "a.h5") as file:
        assert list(file) == ["0", "1", "3"]


def test_quantize_writes_every_layer_and_tells_what_is_skipped():
    model = Fan(matrices(), True, {"rnn": "recurrent layers are not supported.", "x.rnn": "neither."})
    reports = adapter.quantize(model, batches(), {"*": 3, "1": 2}, ["[01]", "0*", "1"], recipe="rtn")
    assert (list(reports), reports.skipped) == (["0", "1"], {})
    assert [max(len(np.unique(column)) for column in W.T) for W in model.model] == [6, 4, 6, 6]
    assert list(adapter.quantize(model, batches(), layers=["*"]).skipped) == ["rnn", "x.rnn"]


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = Fan(matrices(), True)
    before = [W.copy() for W in model.model]
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        for name, W in (("0", model.model[0]), ("3", model.model[1])):
            file.add(name, comq_np.solve(W, np.eye(WIDTH)))
    for names, message in (
        ({}, r"^layer '3': must have codes of shape \(6, 6\) to match the model, has \(6, 4\)\.$"),
        ({"3": "0"}, r"^layer '3': must have codes of shape \(6, 3\) to match the model, has \(6, 4\)\.$"),
        ({"3": "7"}, r"^layer '3': must be layer '7' of the model, to take codes of shape \(6, 4\)\.$"),
        ({"7": "1"}, r"^`names` must map names of layers in the file, got '7', which it lacks\.$"),
    ):
        with pytest.raises(comq_np.InputError, match=message):
            adapter.apply(model, tmp_path / "q.h5", names=names)
    assert all(np.array_equal(a, b) for a, b in zip(model.model, before, strict=True))
    adapter.apply(model, tmp_path / "q.h5", names={"3": "1"})
    assert not np.array_equal(model.model[1], before[1])
