"""Layers that are not to be quantized: their names and the reason go from file to file."""

from __future__ import annotations

import json

import numpy as np
import pytest

import comq_np
from comq_np.cli import main

REASON = "recurrent layers are not supported."


def write(path, rows=(("first", 4), ("rnn", 0), ("last", 6)), seed=0):
    """Calibration file with these layers in this order; those without rows are skipped."""
    rng = np.random.default_rng(seed)
    with comq_np.CalibrationWriter(path, order=[name for name, _ in rows]) as file:
        for name, m in rows:
            if not m:
                file.skip(name, REASON)
                assert name in file
                continue
            gram = comq_np.Gram(m)
            gram.update(rng.normal(size=(20, m)))
            file.add(comq_np.Layer(name, np.linspace(-1, 1, 3 * m).reshape(m, 3), gram))
    return path


def test_from_file_to_file(tmp_path):
    calibration, quantized = write(tmp_path / "c.h5"), tmp_path / "q.h5"
    with comq_np.CalibrationFile(calibration) as file:
        assert (list(file), file.skipped) == (["first", "last"], {"rnn": REASON})
        assert [row["layer"] for row in file.describe()] == ["first", "last"]
    reports = comq_np.quantize_file(calibration, quantized)
    assert (list(reports), reports.kept, reports.skipped) == (["first", "last"], {}, {"rnn": REASON})
    with comq_np.QuantizedFile(quantized) as file:
        assert (list(file), file.kept, file.skipped) == (["first", "last"], {}, {"rnn": REASON})
    assert all(layer.matches for layer in comq_np.verify_file(calibration, quantized))


def test_the_command_is_content_and_says_why(tmp_path, capsys):
    calibration, quantized = str(write(tmp_path / "c.h5")), str(tmp_path / "q.h5")
    for arguments in (["solve", calibration, quantized], ["info", calibration], ["info", quantized]):
        assert main(arguments) == 0
        assert f"rnn: stays float: {REASON}" in capsys.readouterr().out.splitlines()
    for path in (calibration, quantized):
        assert main(["info", "--json", path]) == 0
        assert json.loads(capsys.readouterr().out)["skipped"] == {"rnn": REASON}


def test_a_run_that_goes_on_has_them_once(tmp_path, monkeypatch):
    calibration, quantized = write(tmp_path / "c.h5"), tmp_path / "q.h5"
    with monkeypatch.context() as patch:
        patch.setattr("comq_np.schedule.outcomes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(calibration, quantized)
    comq_np.quantize_file(calibration, quantized)
    comq_np.quantize_file(calibration, tmp_path / "again.h5")
    assert quantized.read_bytes() == (tmp_path / "again.h5").read_bytes()


def test_merged(tmp_path):
    paths = [write(tmp_path / "a.h5"), write(tmp_path / "b.h5", seed=1)]
    comq_np.merge_files(paths, tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert (list(file), file.skipped) == (["first", "last"], {"rnn": REASON})
        assert file["first"].gram.count == 40


def test_not_merged_with_a_file_that_has_the_layer(tmp_path):
    paths = [write(tmp_path / "a.h5"), write(tmp_path / "b.h5", rows=(("first", 4), ("rnn", 5), ("last", 6)))]
    with pytest.raises(comq_np.FileError, match=r"b\.h5: layer 'rnn' must be skipped, as it is in another file\."):
        comq_np.merge_files(paths, tmp_path / "c.h5")


def test_refused(tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.skip("a", "why")
        with pytest.raises(comq_np.InputError, match="layer 'a': a file can hold only one layer of that name"):
            file.skip("a", "why")
        with pytest.raises(comq_np.InputError, match="layer 'b': `reason` must be a string, got 1"):
            file.skip("b", 1)
