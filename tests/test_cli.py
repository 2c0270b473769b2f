"""The `comq` command, as a user types it."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest

import comq_np
from comq_np.cli import main


@pytest.fixture
def calibration(problem, tmp_path):
    path = tmp_path / "calibration.h5"
    with comq_np.CalibrationWriter(path) as file:
        for name, m, n in (("encoder.fc1", 12, 5), ("encoder.fc2", 30, 8)):
            W, X, _ = problem(m, n)
            gram = comq_np.Gram(m)
            gram.update(np.where(np.arange(m) == 3, 0, X))
            file.add(comq_np.Layer(name, W, gram, np.zeros(n, np.float32)))
    return path


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_solve_prints_a_row_for_each_layer_and_every_note(calibration, capsys):
    quantized = calibration.with_name("quantized.h5")
    assert main(["solve", str(calibration), str(quantized), "--bits", "3"]) == 0
    header, _, first, second, *notes, last = lines(capsys)
    columns = "layer rows columns bits levels group_size bytes recipe relative_error sweeps seconds notes"
    assert " ".join(header.split()) == columns
    assert first.split()[:8] == ["encoder.fc1", "12", "5", "3", "8", "column", "50", "balanced"]
    assert second.split()[0] == "encoder.fc2"
    assert "encoder.fc1: 1 of 12 inputs are always zero: the codes of their rows are rounded to nearest." in notes
    assert last == f"{quantized}: 2 layers, 300 weights, 1,200 bytes as float32, {quantized.stat().st_size:,} now"


def test_solve_takes_every_option(calibration, tmp_path, capsys):
    quantized = tmp_path / "quantized.h5"
    options = ["--levels", "3", "--recipe", "paper", "--group-size", "8", "--symmetric", "--fit-bias", "--threads", "1"]
    assert main(["solve", str(calibration), str(quantized), *options]) == 0
    with comq_np.QuantizedFile(quantized) as file:
        q = file["encoder.fc2"]
    assert (q.levels, q.report.recipe, q.group_size, q.bias_shift is None) == (3, "paper", 8, False)
    assert (q.zero_point == 1).all()
    assert main(["solve", str(calibration), str(quantized), "--group-size", "tensor"]) == 0
    with comq_np.QuantizedFile(quantized) as file:
        assert file["encoder.fc2"].group_size == "tensor"


def test_info(calibration, tmp_path, capsys):
    assert main(["info", str(calibration)]) == 0
    title, header, _, first, _ = lines(capsys)
    assert title == f"{calibration}: comq_np.calibration, version 1"
    assert header.split() == ["layer", "kind", "rows", "columns", "bias", "gram", "samples"]
    assert first.split() == ["encoder.fc1", "linear", "12", "5", "True", "0", "56"]
    comq_np.quantize_file(calibration, tmp_path / "q.h5")
    assert main(["info", str(tmp_path / "q.h5")]) == 0
    assert lines(capsys)[0] == f"{tmp_path / 'q.h5'}: comq_np.quantized, version 1"
    gram = comq_np.Gram(2)
    gram.update([[1.0, 2.0]])
    comq_np.save_gram(tmp_path / "gram.h5", gram)
    assert main(["info", str(tmp_path / "gram.h5")]) == 0
    assert lines(capsys)[-1].split() == ["2", "1", "(1,", "0)"]


def test_info_of_an_empty_file(tmp_path, capsys):
    with comq_np.QuantizedWriter(tmp_path / "empty.h5"):
        pass
    assert main(["info", str(tmp_path / "empty.h5")]) == 0
    assert lines(capsys)[-1] == "no layers"


def test_verify(calibration, tmp_path, capsys):
    quantized = tmp_path / "q.h5"
    comq_np.quantize_file(calibration, quantized)
    assert main(["verify", str(calibration), str(quantized)]) == 0
    assert lines(capsys)[-1] == f"{quantized}: 2 of 2 layers match their report"
    with h5py.File(quantized, "r+") as file:
        file["layers/0/scale"][...] = file["layers/0/scale"][()] * np.float32(1.1)
    assert main(["verify", str(calibration), str(quantized)]) == 1
    *_, first, second, last = lines(capsys)
    assert first.split()[-1] == "DIFFERENT"
    assert second.split()[-1] == "same"
    assert last == f"{quantized}: 1 of 2 layers match their report"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "none.h5"], "comq info: error: none.h5: there is no such file."),
        (["solve", "none.h5", "q.h5"], "comq solve: error: none.h5: there is no such file."),
        (["verify", "none.h5", "q.h5"], "comq verify: error: none.h5: there is no such file."),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == message
    assert captured.out == ""


def test_refused_option_names_the_value(calibration, capsys):
    assert main(["solve", str(calibration), "q.h5", "--bits", "12"]) == 1
    assert "comq solve: error: `bits` must be an integer from 1 to 8, got 12." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantise"],
        ["solve", "a.h5"],
        ["solve", "a", "b", "--recipe", "gptq"],
        ["solve", "a", "b", "--group-size", "row"],
    ],
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: comq" in capsys.readouterr().err


def test_the_installed_command():
    command = [sys.executable, "-c", "import sys; from comq_np.cli import main; sys.exit(main(['--version']))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"comq_np {comq_np.__version__}\n"
