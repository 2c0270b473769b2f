"""The `comq` command, as a user types it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from edits import editing

import comq_np
from comq_np import pipeline, store, tasks
from comq_np.cli import main
from comq_np.demo import runner

PACKAGE = pathlib.Path(comq_np.__file__).parents[1]
RUN = "import sys; from comq_np.cli import main; sys.exit(main(sys.argv[1:]))"


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
    columns = "layer problems rows columns bits levels codebook group_size activation_bits bytes recipe relative_error"
    assert " ".join(header.split()) == f"{columns} sweeps seconds notes"
    assert first.split()[:9] == ["encoder.fc1", "1", "12", "5", "3", "8", "uniform", "column", "float"]
    assert first.split()[9:11] == ["70", "balanced"]
    assert second.split()[0] == "encoder.fc2"
    dead = "never vary, which the bias takes up: the codes of their rows are rounded to nearest."
    assert f"encoder.fc1: 1 of 12 inputs {dead}" in notes
    assert last == f"{quantized}: 2 layers, 300 weights, 1,200 bytes as float32, {quantized.stat().st_size:,} now"


def test_solve_takes_every_option(calibration, tmp_path, capsys):
    quantized = tmp_path / "quantized.h5"
    options = ["--levels", "3", "--recipe", "paper", "--group-size", "8", "--symmetric", "--threads", "1"]
    assert main(["solve", str(calibration), str(quantized), *options]) == 0
    with comq_np.QuantizedFile(quantized) as file:
        q = file["encoder.fc2"]
    assert (q.levels, q.report.recipe, q.group_size, q.bias_shift is None) == (3, "paper", 8, False)
    assert (q.zero_point == 1).all()
    options = ["--group-size", "tensor", "--no-fit-bias", "--zero-point", "real", "--scale-dtype", "float16"]
    assert main(["solve", str(calibration), str(quantized), *options]) == 0
    with comq_np.QuantizedFile(quantized) as file:
        q = file["encoder.fc2"]
    assert (q.group_size, q.bias_shift) == ("tensor", None)
    assert (q.zero_point.dtype, q.scale.dtype) == (np.float32, np.float16)


def test_info(calibration, tmp_path, capsys):
    assert main(["info", str(calibration)]) == 0
    title, header, _, first, _ = lines(capsys)
    assert title == f"{calibration}: comq_np.calibration, version 2"
    columns = "layer kind problems rows columns bias gram diagonal crossed activation_bits samples"
    assert " ".join(header.split()) == columns
    assert first.split() == ["encoder.fc1", "linear", "1", "12", "5", "True", "0", "False", "False", "float", "56"]
    comq_np.quantize_file(calibration, tmp_path / "q.h5")
    assert main(["info", str(tmp_path / "q.h5")]) == 0
    assert lines(capsys)[0] == f"{tmp_path / 'q.h5'}: comq_np.quantized, version 2"
    gram = comq_np.Gram(2)
    gram.update([[1.0, 2.0]])
    comq_np.save_gram(tmp_path / "gram.h5", gram)
    assert main(["info", str(tmp_path / "gram.h5")]) == 0
    assert lines(capsys)[-1].split() == ["1", "2", "1", "[1,", "0]"]


def test_info_as_json(calibration, problem, tmp_path, capsys):
    quantized, gram, wild = (tmp_path / name for name in ("q.h5", "g.h5", "w.h5"))
    comq_np.quantize_file(calibration, quantized)
    with comq_np.CalibrationFile(calibration) as file:
        layers = {"calibration": file.describe()}
        comq_np.save_gram(gram, file["encoder.fc1"].gram)
    with comq_np.QuantizedFile(quantized) as file:
        layers["quantized"] = file.describe()
    q = comq_np.solve([[1.0]], [[1.0]])
    report = dataclasses.replace(q.report, relative_error=float("inf"))
    with comq_np.QuantizedWriter(wild) as file:
        file.add("a\nb\x1b[31m \u202e ä", dataclasses.replace(q, report=report))
        file.keep("expert", "no inputs")
    found = {}
    for path in (calibration, quantized, gram, wild):
        assert main(["info", str(path), "--json"]) == 0
        printed = capsys.readouterr().out
        assert printed.isascii()
        assert "\x1b" not in printed
        found[path] = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    software = f"comq_np {comq_np.__version__}"
    for path, form in ((calibration, "calibration"), (quantized, "quantized")):
        root = {"format": f"comq_np.{form}", "version": 2, "software": software}
        kept = {"skipped": {}, **({"kept": {}} if form == "quantized" else {})}
        assert found[path] == {**root, "layers": layers[form], **kept}
    root = {"format": "comq_np.gram", "version": 2, "software": software}
    assert found[gram] == {**root, "problems": 1, "width": 12, "samples": 56, "folds": [28, 28]}
    (row,) = found[wild]["layers"]
    assert (row["layer"], row["relative_error"]) == ("a\nb\x1b[31m \u202e ä", None)
    assert found[wild]["kept"] == {"expert": "no inputs"}


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
    with editing(quantized) as file:
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
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.strip() == message
    assert captured.out == ""


def test_refused_option_names_the_value(calibration, capsys):
    assert main(["solve", str(calibration), "q.h5", "--bits", "17"]) == 2
    assert "comq solve: error: `bits` must be an integer from 1 to 16, got 17." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantise"],
        ["solve", "a.h5"],
        ["solve", "a", "b", "--recipe", "gptq"],
        ["solve", "a", "b", "--group-size", "row"],
        ["solve", "a", "b", "--bits", "4", "--levels", "3"],
        ["solve", "a", "b", "--bits", "four"],
        ["solve", "a", "b", "--bits", "fc=four"],
        ["solve", "a", "b", "--bits", "fc="],
        ["solve", "a", "b", "--bits", "@no.json"],
    ],
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: comq" in capsys.readouterr().err


def test_help_tells_defaults_and_exit_status(capsys):
    for arguments, wanted in (
        (["--help"], "0 done; 1 verify found a difference; 2 wrong command line, or an error;"),
        (["demo", "--help"], "folder for the files (default: comq-demo)"),
        (["solve", "--help"], "bits of one code, 1 to 16, of all layers or of those whose names match a pattern"),
        (["solve", "--help"], "@FILE is such patterns in JSON, or a plan of allocate (default: 4)"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert wanted in " ".join(capsys.readouterr().out.split())


def start(arguments, **options):
    """Process of its own that runs the command."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
        **options,
    )


def test_the_installed_command():
    process = start(["--version"], stdout=subprocess.PIPE)
    assert process.communicate() == (f"comq_np {comq_np.__version__}\n", "")


def test_control_characters_in_names_are_escaped(problem, tmp_path, capsys):
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("a\nb\x1b[31m", comq_np.solve([[1.0]], [[1.0]]))
    assert main(["info", str(tmp_path / "q.h5")]) == 0
    assert lines(capsys)[-1].startswith(r"a\nb\x1b[31m ")


def test_names_that_the_terminal_cannot_show(tmp_path):
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("Schicht ä", comq_np.solve([[1.0]], [[1.0]]))
    process = start(["info", tmp_path / "q.h5"], stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    printed, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert r"Schicht \xe4" in printed


def test_a_reader_that_goes_away_is_no_error(calibration):
    read, write = os.pipe()
    os.close(read)
    process = start(["info", calibration], stdout=write)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_output_on_a_full_disk_is_one_line(calibration):
    with open("/dev/full", "w") as full:
        process = start(["info", calibration], stdout=full)
        assert process.communicate()[1] == "comq info: error: No space left on device\n"
    assert process.returncode == 2


def test_an_interruption_is_one_line(calibration, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "solve", interrupted)
    monkeypatch.setattr(tasks, "check", lambda *_: None)
    assert main(["solve", str(calibration), str(calibration.with_name("q.h5"))]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("comq solve: interrupted")
    assert [entry.name for entry in calibration.parent.iterdir()] == ["calibration.h5"]


@pytest.mark.skipif(os.name != "posix", reason="other systems end a process without asking it")
def test_termination_leaves_no_partial_file(calibration, monkeypatch, capsys):
    def terminated(*_, **__):
        assert len(list(calibration.parent.iterdir())) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(tasks, "solve", terminated)
    monkeypatch.setattr(tasks, "check", lambda *_: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["solve", str(calibration), str(calibration.with_name("q.h5"))]) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.splitlines()[-1].endswith("comq solve: terminated")
    assert [entry.name for entry in calibration.parent.iterdir()] == ["calibration.h5"]


@pytest.mark.skipif(os.name != "posix", reason="other systems end a process without asking it")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_not_lost_where_python_drops_its_exception(calibration, monkeypatch, number, status, capsys):
    class Dying:
        def __del__(self):
            signal.raise_signal(number)

    def interrupted(*_, **__):
        Dying()
        time.sleep(10)

    monkeypatch.setattr(pipeline, "quantize_file", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["solve", str(calibration), str(calibration.with_name("q.h5"))]) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Exception ignored" not in capsys.readouterr().err


def test_what_else_python_drops_is_told_as_before(calibration, monkeypatch):
    class Dying:
        def __del__(self):
            raise ValueError("told")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(str(dropped.exc_value)))
    monkeypatch.setattr(store, "about", lambda _: Dying() and {"format": "x", "version": 1, "layers": []})
    assert main(["info", str(calibration)]) == 0
    assert told == ["told"]


def test_the_command_runs_on_any_thread(calibration, capsys):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(["info", str(calibration)])))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_a_demo_that_breaks_leaves_the_json_as_it_was(tmp_path, monkeypatch, capsys):
    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "load_images", fail)
    figures = tmp_path / "figures.json"
    for before in (None, "[]"):
        if before:
            figures.write_text(before)
        assert main(["demo", "--output", str(tmp_path / "demo"), "--json", str(figures)]) == 2
        assert capsys.readouterr().err == "comq demo: error: No space left on device\n"
        assert (figures.read_text() if figures.exists() else None) == before
