"""A layer that cannot be solved stops no other: it stays float, and everything says so and why."""

from __future__ import annotations

import re
import warnings

import h5py
import numpy as np
import pytest

import comq_np
from comq_np import tasks
from comq_np.cli import main
from comq_np.gram import Fold

NEVER_REACHED = "`G` must have seen inputs, got a Gram with count 0."
INDEFINITE = np.eye(9) + 2 * (np.ones((9, 9)) - np.eye(9))


def gram_of(X):
    gram = comq_np.Gram(X.shape[1])
    gram.update(X)
    return gram


def write(path, problem, odd=None):
    """Calibration file of "first", maybe an odd layer, and "last"."""
    with comq_np.CalibrationWriter(path) as file:
        for name, m, n in (("first", 12, 5), ("odd", 9, 4), ("last", 20, 6)):
            W, X, _ = problem(m, n)
            if name != "odd":
                file.add(comq_np.Layer(name, W, gram_of(X), np.zeros(n, np.float32)))
            elif odd is not None:
                file.add(comq_np.Layer(name, W, odd))
    return path


def spoil(place, value):
    """Return what writes a value over the first entry of a dataset of the odd layer."""

    def change(path):
        with h5py.File(path, "r+") as file:
            file[place][0, 0] = value

    return change


ODD = comq_np.Gram(9)
GOOD = gram_of(np.random.default_rng(0).normal(size=(40, 9)))
FAILURES = {
    "never reached": (ODD, None, NEVER_REACHED.rstrip(".")),
    "indefinite": (
        comq_np.Gram.from_folds((Fold(INDEFINITE, np.zeros(9), 5), Fold(INDEFINITE, np.zeros(9), 5))),
        None,
        "`G` must be positive semidefinite, as a Gram matrix is, got one",
    ),
    "weight not finite": (GOOD, spoil("layers/1/weight", np.nan), "/layers/1"),
    "Gram not finite": (GOOD, spoil("grams/1/fold0/matrix", np.inf), "/grams/1"),
}


@pytest.fixture(params=FAILURES)
def failing(request, problem, tmp_path):
    """Calibration file whose layer "odd" cannot be solved, and the pattern of the reason."""
    odd, change, reason = FAILURES[request.param]
    path = write(tmp_path / "calibration.h5", problem, odd)
    if change:
        change(path)
    return path, reason


def test_the_others_are_solved(failing, problem, tmp_path):
    calibration, reason = failing
    comq_np.quantize_file(write(tmp_path / "good.h5", problem), tmp_path / "expected.h5", 3)
    with pytest.warns(UserWarning, match=rf"^Could not be solved and stay float: 'odd' \(.*{reason}"):
        reports = comq_np.quantize_file(calibration, tmp_path / "q.h5", 3)
    assert list(reports) == ["first", "last"]
    assert list(reports.kept) == ["odd"]
    assert re.match(f".*{reason}", reports.kept["odd"])
    assert str(tmp_path) not in reports.kept["odd"]
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file, comq_np.QuantizedFile(tmp_path / "expected.h5") as other:
        assert (list(file), len(file), "odd" in file) == (["first", "last"], 2, False)
        assert [row["layer"] for row in file.describe()] == ["first", "last"]
        assert file.kept == reports.kept
        assert other.kept == {}
        for name, q in file.items():
            np.testing.assert_array_equal(q.codes, other[name].codes)
            np.testing.assert_array_equal(q.dequantize(), other[name].dequantize())
    assert all(
        layer.matches for layer in comq_np.verify_file(write(tmp_path / "c.h5", problem, GOOD), tmp_path / "q.h5")
    )


def test_the_same_file_for_any_number_of_workers(failing, tmp_path):
    files = [tmp_path / f"{workers}.h5" for workers in (1, 2, 3)]
    for workers, path in enumerate(files, start=1):
        with pytest.warns(UserWarning, match="stay float: 'odd'"):
            comq_np.quantize_file(failing[0], path, workers=workers, memory="1 GB")
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_strict_stops(failing, tmp_path, workers):
    calibration, reason = failing
    with pytest.raises((comq_np.InputError, comq_np.FileError), match=reason):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", strict=True, workers=workers, memory="1 GB")
    assert not (tmp_path / "q.h5").exists()


def test_strict_names_the_layer(problem, tmp_path, capsys):
    calibration = write(tmp_path / "calibration.h5", problem, ODD)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(calibration, tmp_path / "q.h5", strict=True)
    assert str(error.value) == f"layer 'odd': {NEVER_REACHED}"
    assert main(["solve", str(calibration), str(tmp_path / "q.h5"), "--strict"]) == 2
    assert f"comq solve: error: layer 'odd': {NEVER_REACHED}" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="stay float"):
        comq_np.quantize_file(calibration, tmp_path / "q.h5")  # goes on after what is finished


def test_the_command_says_so(problem, tmp_path, capsys):
    calibration, quantized = write(tmp_path / "calibration.h5", problem, ODD), tmp_path / "q.h5"
    assert main(["solve", str(calibration), str(quantized)]) == 3
    captured = capsys.readouterr()
    assert f"odd: stays float: {NEVER_REACHED}" in captured.out.splitlines()
    assert [line.split()[0] for line in captured.out.splitlines()[2:4]] == ["first", "last"]
    said = f"Could not be solved and stay float: 'odd' ({NEVER_REACHED.rstrip('.')})."
    assert captured.err.splitlines()[-1].endswith(f"comq solve: warning: {said}")
    assert main(["info", str(quantized)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"odd: stays float: {NEVER_REACHED}"
    assert main(["verify", str(calibration), str(quantized)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"odd: stays float: {NEVER_REACHED}",
        f"{quantized}: 2 of 2 layers match their report",
    ]


def test_verify_needs_layers_that_are_kept_too(problem, tmp_path):
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.keep("other", "no reason")
    with comq_np.CalibrationWriter(tmp_path / "c.h5"):
        pass
    with pytest.raises(comq_np.FileError, match=r"c\.h5: must hold layer 'other', as the other file does"):
        comq_np.verify_file(tmp_path / "c.h5", tmp_path / "q.h5")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("Unable to allocate 7 TiB"), "MemoryError: Unable to allocate 7 TiB"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("a\0b\udcff"), r"RuntimeError: a\0b\udcff"),
        (ValueError("x" * 100_000), f"ValueError: {'x' * (tasks.LONGEST - 12)}..."),
    ],
)
def test_whatever_stops_a_layer(problem, tmp_path, monkeypatch, error, reason):
    def fail(W, G, **options):
        if len(W) == 12:
            raise error
        return solve(W, G, **options)

    solve, calibration = tasks.solve, write(tmp_path / "calibration.h5", problem)
    monkeypatch.setattr(tasks, "solve", fail)
    with pytest.warns(UserWarning, match="stay float: 'first'"):
        reports = comq_np.quantize_file(calibration, tmp_path / "q.h5")
    assert (reports.kept, list(reports)) == ({"first": reason}, ["last"])
    with pytest.raises(type(error)):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", strict=True)


def test_a_result_that_no_file_can_hold_is_kept_float(problem, tmp_path, monkeypatch):
    def huge(W, G, **options):
        q = solve(W, G, **options)
        return q if len(W) < 20 else comq_np.QuantizedArray(**{**vars(q), "zero_point": np.full((1, 6), 2**40)})

    solve, calibration = tasks.solve, write(tmp_path / "calibration.h5", problem)
    monkeypatch.setattr(tasks, "solve", huge)
    with pytest.warns(UserWarning, match="stay float: 'last'"):
        reports = comq_np.quantize_file(calibration, tmp_path / "q.h5")
    assert reports.kept["last"].startswith("`zero_point` must fit in int32")


def test_a_run_that_goes_on_tries_kept_layers_again(problem, tmp_path, monkeypatch):
    def fail(W, G, **options):
        if len(W) == 12:
            raise MemoryError
        if len(W) == 20:
            raise KeyboardInterrupt
        return solve(W, G, **options)

    solve, calibration = tasks.solve, write(tmp_path / "calibration.h5", problem, GOOD)
    comq_np.quantize_file(calibration, tmp_path / "expected.h5")
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "solve", fail)
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(calibration, tmp_path / "q.h5", workers=1)
    reports = comq_np.quantize_file(calibration, tmp_path / "q.h5", strict=True)
    assert (reports["first"].seconds is None, reports["odd"].seconds is None) == (False, True)
    assert (tmp_path / "q.h5").read_bytes() == (tmp_path / "expected.h5").read_bytes()


def test_many_kept_layers_in_one_warning(problem, tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for k in range(8):
            file.add(comq_np.Layer(f"expert {k}", problem(3, 2).W, comq_np.Gram(3)))
    with pytest.warns(UserWarning, match="^Could not be solved") as warned:
        reports = comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5")
    (text,) = (str(warning.message) for warning in warned)
    assert text.endswith(f"'expert 4' ({NEVER_REACHED.rstrip('.')}) and 3 more.")
    assert reports.kept == dict.fromkeys([f"expert {k}" for k in range(8)], NEVER_REACHED)


def test_a_file_that_is_not_there_stops_the_run(tmp_path):
    with pytest.raises(comq_np.FileError, match="there is no such file"):
        comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5")


def test_refused_reasons(tmp_path):
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.keep("a", "why")
        for name, reason, message in (
            ("a", "why", "layer 'a': a file can hold only one layer of that name."),
            ("b", 1, "layer 'b': `reason` must be a string, got 1."),
            ("b", "\0", "layer 'b': `reason` must be text that UTF-8 can hold, without NUL, got '\\x00'."),
        ):
            with pytest.raises(comq_np.InputError) as error:
                file.keep(name, reason)
            assert str(error.value) == message
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        assert (dict(file), file.kept) == ({}, {"a": "why"})


def test_reports_are_a_mapping(problem, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = comq_np.quantize_file(write(tmp_path / "c.h5", problem, ODD), tmp_path / "q.h5")
    assert dict(reports) == {name: reports[name] for name in ("first", "last")}
    assert repr(reports).startswith("Reports({'first': SolveReport(")
    with pytest.raises(KeyError):
        reports["odd"]


@pytest.mark.parametrize(
    ("samples", "options", "done"),
    [
        (12, {}, None),
        (11, {"shrinkage": 0.25}, "it is shrunk by 0.25"),
        (11, {"shrinkage": 0}, "it is not shrunk"),
        (11, {"recipe": "paper"}, "it is not shrunk"),
        (1, {}, "it is not shrunk"),
        (2, {"recipe": "fast"}, r"it is shrunk by 0\.\d+"),
    ],
)
def test_too_few_samples_are_noted(problem, samples, options, done):
    W, X, _ = problem(12, 5)
    gram = gram_of(X[:samples])
    notes = comq_np.solve(W, gram, **options).report.notes
    found = [note for note in notes if note.startswith("`G` has seen")]
    assert bool(found) == (done is not None)
    for note in found:
        said = f"`G` has seen {samples} samples for 12 rows, too few to tell their inputs apart: {done}."
        assert re.fullmatch(said, note)
