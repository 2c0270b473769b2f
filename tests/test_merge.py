"""Merged calibration files: the same as one made from all batches, whatever reached which machine."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch

import comq_np
import comq_torch
from comq_np.cli import main


def write(path, layers):
    """Calibration file of layers, each a (name, rows, columns, Gram, ...)."""
    with comq_np.CalibrationWriter(path) as file:
        for layer in layers:
            file.add(layer)
    return path


def layer(name, gram, bias=True, kind="linear", columns=3, change=0.0):
    """Layer whose weights depend on its name only, but for a change."""
    rng = np.random.default_rng(list(name.encode()))
    W = rng.normal(size=(len(gram), columns)).astype(np.float32) + np.float32(change)
    return comq_np.Layer(name, W, gram, np.arange(columns, dtype=np.float32) if bias else None, kind)


def gram(m, seed, samples=12):
    made = comq_np.Gram(m)
    made.update(np.random.default_rng(seed).normal(size=(samples, m)))
    return made


def read(path):
    with comq_np.CalibrationFile(path) as file:
        return dict(file), {row["layer"]: row["gram"] for row in file.describe()}


def assert_same(found, expected, rtol=1e-13):
    assert list(found) == list(expected)
    for name, one in found.items():
        other = expected[name]
        assert one.kind == other.kind
        np.testing.assert_array_equal(one.weight, other.weight)
        np.testing.assert_equal(one.bias, other.bias)
        for a, b in zip(one.gram.folds, other.gram.folds, strict=True):
            size = np.abs(b.matrix).max()
            np.testing.assert_allclose(a.matrix, b.matrix, rtol=rtol, atol=rtol * size)
            np.testing.assert_allclose(a.sum, b.sum, rtol=rtol, atol=rtol * size)
            assert a.count == b.count


class Attention(torch.nn.Module):
    """Layers that share their inputs, and one that only some batches reach."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out, self.rare = (torch.nn.Linear(6, 6, bias=k != 2) for k in range(4))

    def forward(self, x):
        x = self.out(self.q(x) * self.k(x))
        return self.rare(x) if len(x) > 4 else x


@pytest.fixture
def captured(tmp_path):
    """Three files of the same model, each from two batches, and one from all of these."""
    torch.manual_seed(0)
    model, batches = Attention(), [torch.randn(size, 6) for size in (4, 2, 8, 4, 6, 10)]
    paths = [tmp_path / f"{number}.h5" for number in range(3)]
    for number, path in enumerate(paths):
        layers = None if number else ["q", "k", "out"]
        comq_torch.capture(model, batches[2 * number : 2 * number + 2], path, layers)
    comq_torch.capture(model, batches, tmp_path / "all.h5")
    return paths, tmp_path / "all.h5"


def test_merged_files_equal_one_capture_of_all_batches_in_any_order(captured, tmp_path):
    paths, whole = captured
    before = [path.read_bytes() for path in paths]
    expected, sharing = read(whole)
    assert expected["rare"].gram.count == 24
    for order in itertools.permutations(paths):
        comq_np.merge_files(order, tmp_path / "merged.h5")
        found, numbers = read(tmp_path / "merged.h5")
        assert_same(found, expected)
        assert numbers == sharing
    assert [path.read_bytes() for path in paths] == before
    assert len(list(tmp_path.iterdir())) == 5


def test_merging_in_steps_is_merging_at_once(captured, tmp_path):
    paths, whole = captured
    comq_np.merge_files(paths[1:], tmp_path / "some.h5")
    comq_np.merge_files([tmp_path / "some.h5", paths[0]], tmp_path / "merged.h5")
    assert_same(read(tmp_path / "merged.h5")[0], read(whole)[0])


def test_layers_share_a_gram_only_where_they_do_in_all_files(tmp_path):
    one, two, three = gram(4, 1), gram(4, 2), gram(4, 3)
    a = write(tmp_path / "a.h5", [layer("q", one), layer("k", one), layer("v", one), layer("expert 1", one)])
    b = write(tmp_path / "b.h5", [layer("q", two), layer("k", two), layer("v", three), layer("expert 2", two)])
    comq_np.merge_files([a, b], tmp_path / "c.h5")
    found, numbers = read(tmp_path / "c.h5")
    assert list(found) == ["q", "k", "v", "expert 1", "expert 2"]
    assert list(numbers.values()) == [0, 0, 1, 2, 3]
    for name, grams in (("q", (one, two)), ("v", (one, three)), ("expert 1", (one,)), ("expert 2", (two,))):
        total = sum(part.matrix for part in grams)
        np.testing.assert_allclose(found[name].gram.matrix, total, rtol=1e-13)
        assert found[name].gram.count == 12 * len(grams)


def test_layers_of_several_problems(tmp_path):
    X, W, files = np.random.default_rng(0).normal(size=(2, 20, 3, 4)), np.ones((3, 4, 2), np.float32), []
    for number, part in enumerate(X):
        made = comq_np.Gram(4, problems=3)
        made.update(part)
        files.append(write(tmp_path / f"{number}.h5", [comq_np.Layer(name, W, made) for name in ("a", "b")]))
    comq_np.merge_files(files, tmp_path / "merged.h5")
    found, numbers = read(tmp_path / "merged.h5")
    assert numbers == {"a": 0, "b": 0}
    assert (found["a"].gram.problems, found["a"].gram.count) == (3, 40)
    rows = X.reshape(40, 3, 4).transpose(1, 0, 2)
    np.testing.assert_allclose(found["a"].gram.matrix, rows.transpose(0, 2, 1) @ rows, rtol=1e-5, atol=1e-5)
    alone = write(tmp_path / "alone.h5", [layer("a", gram(4, 0))])
    with pytest.raises(comq_np.FileError, match=r"alone\.h5: layer 'a' must have the weight that it has in "):
        comq_np.merge_files([files[0], alone], tmp_path / "c.h5")


def test_layers_keep_the_order_of_every_file(tmp_path):
    files = []
    for number, names in enumerate(("z b a", "z c b", "y z", "a x")):
        files.append(write(tmp_path / f"{number}.h5", [layer(name, gram(2, number)) for name in names.split()]))
    for order in (files, files[::-1], files[2:] + files[:2]):
        comq_np.merge_files(order, tmp_path / "merged.h5")
        assert list(read(tmp_path / "merged.h5")[0]) == ["y", "z", "c", "b", "a", "x"]


def test_one_gram_is_in_memory_at_a_time(tmp_path):
    m = 200
    files = [
        write(tmp_path / f"{number}.h5", [layer(f"layer {k}", gram(m, [number, k])) for k in range(6)])
        for number in range(5)
    ]
    comq_np.merge_files(files, tmp_path / "merged.h5")
    tracemalloc.start()
    comq_np.merge_files(files, tmp_path / "merged.h5")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * 2 * 8 * m * m  # the sum, what is added to it, and one fold while that is read


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"change": 1e-6}, "weight"),
        ({"columns": 4}, "weight"),
        ({"bias": False}, "bias"),
        ({"kind": "conv2d"}, "kind"),
    ],
)
def test_another_model_is_refused(tmp_path, other, field):
    a = write(tmp_path / "a.h5", [layer("first", gram(3, 0)), layer("fc", gram(3, 1))])
    b = write(tmp_path / "b.h5", [layer("fc", gram(3, 2), **other)])
    before = write(tmp_path / "c.h5", []).read_bytes()
    with pytest.raises(comq_np.FileError) as error:
        comq_np.merge_files([a, b], tmp_path / "c.h5")
    assert str(error.value) == f"{b}: layer 'fc' must have the {field} that it has in {a}."
    assert (tmp_path / "c.h5").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_the_sign_of_zero_is_a_difference(tmp_path):
    one = layer("fc", gram(3, 0))
    a = write(tmp_path / "a.h5", [one])
    bias = np.array([-0.0, *one.bias[1:]], np.float32)
    b = write(tmp_path / "b.h5", [comq_np.Layer("fc", one.weight, one.gram, bias)])
    with pytest.raises(comq_np.FileError, match=r"b\.h5: layer 'fc' must have the bias that it has in "):
        comq_np.merge_files([a, b], tmp_path / "c.h5")


def test_a_layer_of_other_width_is_refused(tmp_path):
    a = write(tmp_path / "a.h5", [layer("fc", gram(3, 0))])
    b = write(tmp_path / "b.h5", [layer("fc", gram(4, 0))])
    with pytest.raises(comq_np.FileError, match=r"b\.h5: layer 'fc' must have the weight that it has in "):
        comq_np.merge_files([a, b], tmp_path / "c.h5")


def test_another_order_is_refused(tmp_path):
    a = write(tmp_path / "a.h5", [layer("x", gram(3, 0)), layer("y", gram(3, 1))])
    b = write(tmp_path / "b.h5", [layer("y", gram(3, 0)), layer("x", gram(3, 1))])
    with pytest.raises(comq_np.FileError, match=r"a\.h5, .*b\.h5: must hold their layers in one order, but '[xy]' and"):
        comq_np.merge_files([a, b], tmp_path / "c.h5")


def test_refused_paths(tmp_path):
    a, b = (write(tmp_path / name, [layer("fc", gram(3, 0))]) for name in ("a.h5", "b.h5"))
    (tmp_path / "link.h5").symlink_to(a)
    cases = [
        ([a], "c.h5", f"`paths` must be at least two files, got ['{a}']."),
        (str(a), "c.h5", f"`paths` must be at least two files, got one path, '{a}'."),
        ([a, b, tmp_path / "link.h5"], "c.h5", f"`paths` must be different files, got '{a}' more than once."),
        ([a, b], "b.h5", f"`merged` must be another file than those in `paths`, got '{b}'."),
        ([b, a], "link.h5", f"`merged` must be another file than those in `paths`, got '{tmp_path / 'link.h5'}'."),
    ]
    for paths, merged, message in cases:
        with pytest.raises(comq_np.InputError) as error:
            comq_np.merge_files(paths, tmp_path / merged)
        assert str(error.value) == message
    with pytest.raises(comq_np.FileError, match=r"none\.h5: there is no such file\."):
        comq_np.merge_files([a, tmp_path / "none.h5"], tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


def test_the_command(captured, tmp_path, capsys):
    paths, whole = captured
    merged = tmp_path / "merged.h5"
    assert main(["merge", *map(str, paths), "-o", str(merged)]) == 0
    printed = capsys.readouterr().out.splitlines()
    columns = "layer kind problems rows columns bias gram diagonal crossed activation_bits samples"
    assert " ".join(printed[0].split()) == columns
    assert [line.split()[0] for line in printed[2:-1]] == ["q", "k", "out", "rare"]
    assert printed[-1] == f"{merged}: 4 layers from 3 files"
    assert main(["merge", str(whole), str(merged), "-o", str(merged)]) == 2
    assert capsys.readouterr().err.startswith("comq merge: error: `merged` must be another file")
