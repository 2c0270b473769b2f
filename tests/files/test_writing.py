"""Files are written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat
import subprocess
import sys

import h5py
import pytest
from stored import assert_holds

import comq_np

DATA = pathlib.Path(__file__).parents[1] / "data"


def test_a_failure_leaves_the_old_file(calibration, layers, tmp_path):
    before = calibration.read_bytes()

    def fail():
        with comq_np.CalibrationWriter(calibration) as file:
            file.add(layers[0])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert calibration.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.h5"]


def test_a_file_appears_only_when_it_is_complete(layers, tmp_path):
    path = tmp_path / "calibration.h5"
    with comq_np.CalibrationWriter(path) as file:
        file.add(layers[0])
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.h5"]


def test_what_is_synced_is_open_for_writing(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    synced = []

    def sync(file):
        if stat.S_ISREG(os.fstat(file).st_mode):
            synced.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", sync)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", comq_np.solve([[1.0]], [[1.0]]))
    assert synced == [os.O_RDWR] * 2


@pytest.mark.parametrize("path", ["", ".", "folder", "/"])
def test_a_folder_is_no_place_for_a_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for make in (comq_np.CalibrationWriter, comq_np.QuantizedWriter, lambda path: comq_np.save_gram(path, GRAM)):
        with pytest.raises(comq_np.FileError) as error:
            make(path)
        assert str(error.value) == f"{path or repr('')}: cannot be written: it is a folder."
    with pytest.raises(comq_np.FileError) as error:
        comq_np.load_gram(path)
    assert str(error.value) == f"{path or repr('')}: cannot be read: it is a folder."
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder"]


GRAM = comq_np.Gram(2)

FULL = """
import resource, sys
import numpy as np, comq_np
limit, size, path = *map(int, sys.argv[1:3]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with comq_np.CalibrationWriter(path) as file:
        file.add(comq_np.Layer("x", np.ones((2, size), np.float32), comq_np.Gram(2)))
except comq_np.FileError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="no other system limits the size of a file")
@pytest.mark.parametrize(("limit", "size"), [(100, 2), (3000, 2), (3000, 100_000), (100_000, 100_000)])
def test_a_full_disk(tmp_path, limit, size):
    path = tmp_path / "c.h5"
    command = [sys.executable, "-c", FULL, str(limit), str(size), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    assert done.stdout == f"{path}: cannot be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_cannot_be_written_is_gone(layers, tmp_path, monkeypatch):
    put_in = h5py.Group.__setitem__

    def fail(group, name, value):
        if name in ("bias", "sum", "scale"):
            raise RuntimeError("Unable to write")
        put_in(group, name, value)

    calibration, quantized = tmp_path / "c.h5", tmp_path / "q.h5"
    q = comq_np.solve([[1.0]], [[1.0]])
    unbiased = dataclasses.replace(layers[0], bias=None)
    with comq_np.CalibrationWriter(calibration) as file, comq_np.QuantizedWriter(quantized) as target:
        with monkeypatch.context() as broken:
            broken.setattr(h5py.Group, "__setitem__", fail)
            for add in (lambda: file.add(layers[0]), lambda: file.add(unbiased), lambda: target.add("q", q)):
                with pytest.raises(comq_np.FileError, match=r"\.h5: cannot be written: Unable to write\."):
                    add()
        target.add("q", q)
        for layer in layers:
            file.add(layer)
    assert_holds(calibration, layers)
    with comq_np.QuantizedFile(quantized) as file:
        assert list(file) == ["q"]
