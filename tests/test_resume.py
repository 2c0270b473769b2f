"""Stopped at any instant and started again: nothing finished is lost, and the file is the one of an undisturbed run."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import tempfile
import time

import forks
import h5py
import numpy as np
import pytest

import comq_np
import comq_torch
from comq_np import tasks

LAYERS, OLD = 24, b"an older file"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def children():
    process = forks.Forks(comq_np, comq_torch)
    yield process
    process.close()


def make_calibration(path, count, m=16, n=8):
    """Calibration file of layers, each two of which share a Gram."""
    with comq_np.CalibrationWriter(path) as file:
        for number in range(count):
            if number % 2 == 0:
                gram, X = comq_np.Gram(m), np.random.default_rng(number).normal(size=(3 * m, m))
                gram.update(X)
            W = np.random.default_rng([number, 1]).normal(size=(m, n))
            file.add(comq_np.Layer(f"layer {number}", W, gram, np.zeros(n) if number % 3 else None))
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return make_calibration(tmp_path_factory.mktemp("calibration") / "calibration.h5", LAYERS)


def solving(calibration, quantized, *options):
    return ["solve", calibration, quantized, "--recipe", "fast", "--shrinkage", "0", "--threads", "1", *options]


@pytest.fixture(scope="module")
def undisturbed(children, calibration, tmp_path_factory):
    """What an undisturbed run writes, and how long it takes."""
    path = tmp_path_factory.mktemp("undisturbed") / "q.h5"
    seconds = []
    for _ in range(3):
        status, spent = children.run(command=solving(calibration, path))
        assert status == 0
        seconds.append(spent)
    assert [entry.name for entry in path.parent.iterdir()] == ["q.h5"]
    assert all(layer.matches for layer in comq_np.verify_file(calibration, path))
    return path.read_bytes(), min(seconds)


def folder(path):
    """Folder beside a file in the making."""
    return path.with_name(f".{path.name}.parts")


def finished(path):
    """Number of finished layers in it."""
    return len(list(folder(path).glob("layer-*.h5")))


def kept(path):
    """Number of those that a run goes on from: none once their record is gone, which is after they are in the file."""
    return finished(path) if (folder(path) / "run.json").exists() else 0


def instants(count, seconds, found, last):
    """Random instants of a span of time, in each of equal parts, until `count` killed, enough of them amid the layers.

    `found` gets the number of layers that were finished at each kill, up to the `last`: the machine may be busy.
    """
    rng = np.random.default_rng(0)
    for _ in range(4):
        for instant in seconds * (rng.permutation(count) + rng.random(count)) / count:
            if len(found) >= count and sum(0 < layers < last for layers in found) >= count // 4:
                return
            yield instant
    pytest.fail(f"too few kills, or amid the layers: {found}")


# Killed.


def test_solve_killed_at_random_instants(children, calibration, undisturbed, tmp_path):
    expected, seconds = undisturbed
    path, output = tmp_path / "q.h5", tmp_path / "printed"
    found, before = [], 0
    for number, instant in enumerate(instants(25, seconds, found, LAYERS)):
        if number % 4 == 0:
            path.write_bytes(OLD)
        left = path.read_bytes() if path.exists() else None
        status, _ = children.run(command=solving(calibration, path), kill_after=instant)
        assert status in (0, forks.KILLED)
        assert (path.read_bytes() if path.exists() else None) in (left, expected)
        assert kept(path) >= before or path.read_bytes() == expected
        before = kept(path)
        found += [before] if status else []
        if number % 2:  # else the next kill is of a run that goes on
            assert children.run(command=solving(calibration, path), output=output)[0] == 0
            assert path.read_bytes() == expected
            assert output.read_text().count(" earlier ") == before
            assert {entry.name for entry in tmp_path.iterdir()} == {"q.h5", "printed"}
            path.unlink()
            before = 0
    assert len(set(found)) > 5


CAPTURE = """
import torch, comq_torch
torch.manual_seed(0)
layers = [torch.nn.Linear(24, 24) for _ in range({count})]
model = torch.nn.Sequential(*layers)
comq_torch.capture(model, [torch.randn(8, 24) for _ in range(6)], {path!r}, memory={memory})
"""


@pytest.mark.parametrize("passes", [1, 6])
def test_capture_killed_at_random_instants(children, tmp_path, passes):
    path = tmp_path / "c.h5"
    shapes = {f"layer {number}": (24, 24) for number in range(16)}
    memory = None if passes == 1 else comq_np.plan_calibration(dict([*shapes.items()][:3])).passes[0].memory
    assert len(comq_np.plan_calibration(shapes, memory).passes) == passes
    assert children.run(code=CAPTURE.format(path=str(path), count=16, memory=None))[0] == 0
    whole = path.read_bytes()
    code = CAPTURE.format(path=str(path), count=16, memory=memory)
    spent = [children.run(code=code) for _ in range(2)]
    assert [status for status, _ in spent] == [0, 0]
    expected, seconds = path.read_bytes(), min(seconds for _, seconds in spent)
    assert expected == whole
    found = []
    for number, instant in enumerate(instants(10, seconds, found, 16)):
        path.unlink()
        if number % 2:
            path.write_bytes(OLD)
        status, _ = children.run(code=code, kill_after=instant)
        assert status in (0, forks.KILLED)
        assert (path.read_bytes() if path.exists() else None) in ((None, OLD)[number % 2], expected)
        found += [finished(path)] if status else []
        assert children.run(code=code)[0] == 0
        assert path.read_bytes() == expected
        assert [entry.name for entry in tmp_path.iterdir()] == ["c.h5"]
    assert len(set(found)) > 2


GRAM = """
import comq_np
gram = comq_np.Gram(2)
gram.update([[1.0, 2.0]])
comq_np.save_gram({path!r}, gram)
"""


@pytest.mark.parametrize("what", ["solve", "merge", "capture", "gram"])
def test_killed_before_every_operation_on_files(children, tmp_path, what):
    work, inputs = tmp_path / "work", tmp_path / "inputs"
    work.mkdir()
    inputs.mkdir()
    path = work / "made.h5"
    files = [make_calibration(inputs / f"{name}.h5", 2, m=2, n=2) for name in "ab"]
    job = {
        "solve": {"command": solving(files[0], path, "--recipe", "rtn")},
        "merge": {"command": ["merge", *files, "-o", path]},
        "capture": {"code": CAPTURE.format(path=str(path), count=2, memory=None)},
        "gram": {"code": GRAM.format(path=str(path))},
    }[what]
    assert children.run(**job)[0] == 0
    expected, status, count = path.read_bytes(), forks.KILLED, 0
    while status == forks.KILLED:
        path.write_bytes(OLD)
        count += 1
        status, _ = children.run(**job, kill_at=count, folder=work)
        assert path.read_bytes() in (OLD, expected)
        if status == forks.KILLED:
            assert children.run(**job)[0] == 0
        assert path.read_bytes() == expected
        assert [entry.name for entry in work.iterdir()] == ["made.h5"]
    assert status == 0
    assert count > {"gram": 8}.get(what, 20)


# Stopped in other ways, seen from a command line.

NOTE = "{} finished so far, kept in {}: the same run, started again, goes on there"
REFUSED = (
    "{}: cannot be written: {} keeps {} of another run{}. Finish that run, or drop what it has finished: by "
    "`restart=True`, by --restart on the command line, or by deleting the folder."
)


def ended(children, job, path, end):
    """Exit status of a command, and lines it printed, that `end` ends by its number, once a layer is finished."""
    output = path.with_name("printed")
    number = children.start(**job, output=output)
    deadline = time.monotonic() + 60
    while not kept(path) and time.monotonic() < deadline:
        time.sleep(0.001)
    end(number)
    return children.end()[0], output.read_text().splitlines()


@pytest.mark.parametrize(
    ("ending", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
def test_signals(children, calibration, undisturbed, tmp_path, ending, status, message):
    path, command = tmp_path / "q.h5", solving(calibration, tmp_path / "q.h5")
    path.write_bytes(OLD)
    found, printed = ended(children, {"command": command}, path, lambda number: os.kill(number, ending))
    assert (found, path.read_bytes()) == (status, OLD)
    assert printed[-2].endswith(f"comq solve: {message}")
    assert printed[-1] == "comq solve: " + NOTE.format(layers(kept(path)), folder(path))
    assert children.run(command=command)[0] == 0
    assert path.read_bytes() == undisturbed[0]


def layers(count):
    return f"{count} layer{'s' * (count != 1)}"


def test_a_file_that_grows_too_large(children, calibration, undisturbed, tmp_path):
    path, printed = tmp_path / "q.h5", tmp_path / "printed"
    limit = len(undisturbed[0]) // 2  # enough for every layer, not for all together
    assert children.run(command=solving(calibration, path), limit=limit, output=printed)[0] == 2
    error, note = printed.read_text().splitlines()[-2:]
    assert error.endswith(f"comq solve: error: {path}: cannot be written: File too large.")
    assert note.startswith(f"comq solve: {LAYERS} layers finished so far, kept in ")
    assert children.run(command=solving(calibration, path), output=printed)[0] == 0
    assert printed.read_text().count(" earlier ") == LAYERS
    assert path.read_bytes() == undisturbed[0]


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", place]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(children, calibration, undisturbed, small_disk, tmp_path):
    path, filler = small_disk / "q.h5", small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(64 * 1024))
    assert children.run(command=solving(calibration, path), output=tmp_path / "printed")[0] == 2
    error, note = (tmp_path / "printed").read_text().splitlines()[-2:]
    assert error.endswith(f"comq solve: error: {path}: cannot be written: No space left on device.")
    count = kept(path)
    assert 0 < count < LAYERS
    assert note.startswith(f"comq solve: {layers(count)} finished so far, kept in ")
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert children.run(command=solving(calibration, path))[0] == 0
    assert path.read_bytes() == undisturbed[0]


def test_a_folder_that_is_read_only(children, calibration):
    with tempfile.TemporaryDirectory() as place:  # that of pytest is closed to other users
        place = pathlib.Path(place)
        source, path, printed = place / "c.h5", place / "closed" / "q.h5", place / "printed"
        source.write_bytes(calibration.read_bytes())
        path.parent.mkdir()
        path.write_bytes(OLD)
        path.parent.chmod(0o555)
        place.chmod(0o755)
        other = {"user": 65534} if os.geteuid() == 0 else {}  # root writes everywhere
        try:
            status, _ = children.run(command=solving(source, path), output=printed, **other)
        finally:
            path.parent.chmod(0o755)
        assert status == 2
        assert printed.read_text() == f"comq solve: error: {path}: cannot be written: Permission denied.\n"
        assert [entry.read_bytes() for entry in path.parent.iterdir()] == [OLD]


def test_an_output_that_is_a_folder(children, calibration, tmp_path):
    printed = tmp_path / "printed"
    (tmp_path / "q.h5").mkdir()
    for command in (solving(calibration, tmp_path / "q.h5"), ["merge", calibration, printed, "-o", tmp_path / "q.h5"]):
        (tmp_path / "printed").write_bytes(calibration.read_bytes())
        assert children.run(command=command, output=tmp_path / "error")[0] == 2
        error = f"comq {command[0]}: error: {tmp_path / 'q.h5'}: cannot be written: it is a folder.\n"
        assert (tmp_path / "error").read_text() == error


def test_one_writer_at_a_time(children, calibration, tmp_path):
    path, printed = tmp_path / "q.h5", tmp_path / "printed"
    with comq_np.QuantizedWriter(path) as file:
        file.add("fc", comq_np.solve([[1.0]], [[1.0]]))
        assert children.run(command=solving(calibration, path), output=printed)[0] == 2
        expected = f"comq solve: error: {path}: cannot be written: another process is writing it.\n"
        assert printed.read_text() == expected
        with pytest.raises(comq_np.FileError, match="another process is writing it"):
            comq_np.QuantizedWriter(path, restart=True)
    with comq_np.QuantizedFile(path) as file:
        assert list(file) == ["fc"]


def test_another_run_is_refused_until_it_is_restarted(children, calibration, undisturbed, tmp_path):
    path, printed = tmp_path / "q.h5", tmp_path / "printed"
    command = solving(calibration, path)
    ended(children, {"command": command}, path, lambda number: os.kill(number, signal.SIGKILL))
    count = kept(path)
    assert children.run(command=[*command, "--bits", "3"], output=printed)[0] == 2
    difference = " (bits was 4, not 3; levels was 16, not 8)"
    expected = REFUSED.format(path, folder(path), layers(count), difference)
    assert printed.read_text() == f"comq solve: error: {expected}\n"
    assert kept(path) == count
    assert children.run(command=[*command, "--bits", "3", "--restart"], output=printed)[0] == 0
    assert " earlier " not in printed.read_text()
    assert {q.bits for q in read(path).values()} == {3}


def read(path):
    with comq_np.QuantizedFile(path) as file:
        return dict(file)


# Stopped and started again in Python.


class StopError(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Calibration file, and a quantized file that was stopped in the third of its six layers."""
    files = make_calibration(tmp_path / "c.h5", 6), tmp_path / "q.h5"
    solve, calls = tasks.solve, []

    def stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 3:  # the first is the check of the options
            raise StopError
        return solve(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "solve", stop)
        with pytest.raises(StopError) as error:
            comq_np.quantize_file(*files, recipe="rtn", workers=1, strict=True)
    assert error.value.__notes__ == [NOTE.format("2 layers", folder(files[1]))]
    return files


def test_only_what_is_not_finished_is_solved(stopped, tmp_path):
    reports = comq_np.quantize_file(*stopped, recipe="rtn", threads=1)
    assert list(reports) == [f"layer {k}" for k in range(6)]
    assert [report.seconds is None for report in reports.values()] == [True] * 2 + [False] * 4
    assert reports == comq_np.quantize_file(stopped[0], tmp_path / "other.h5", recipe="rtn")
    assert stopped[1].read_bytes() == (tmp_path / "other.h5").read_bytes()
    assert not folder(stopped[1]).exists()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"bits": 5}, "bits was 4, not 5; levels was 16, not 32"),
        ({"bits": {"*": 5}}, "bits was 4, not 5; levels was 16, not 32"),
        (
            {"bits": {"*": 4, "layer 5": 8}},
            'bits was 4, not {"layer 0": 4, "layer 1": 4, "layer 2": ...; levels was 16, not null',
        ),
        ({"levels": 15}, "levels was 16, not 15"),
        ({"group_size": 8}, "group_size was null, not 8"),
        ({"symmetric": True}, "symmetric was false, not true"),
        ({"zero_point": "real"}, 'zero_point was "integer", not "real"'),
        ({"fit_bias": False}, "fit_bias was true, not false"),
        ({"shrinkage": 0.5}, 'shrinkage was "auto", not 0.5'),
        ({"backend": "cpu"}, 'backend was "auto", not "cpu"'),
        ({"codebook": "planes"}, 'codebook was "uniform", not "planes"'),
        ({"recipe": comq_np.recipe("rtn").replace(sweeps=1)}, "the recipe's sweeps was 0, not 1"),
        (
            {"recipe": "paper"},
            (
                'recipe was "rtn", not "paper"; the recipe\'s grids was ["minmax"], not ["paper"]; '
                'the recipe\'s start was "rounding", not "float"; 3 more differ'
            ),
        ),
    ],
)
def test_other_options_are_another_run(stopped, options, difference):
    with pytest.raises(comq_np.FileError) as error:
        comq_np.quantize_file(*stopped, **{"recipe": "rtn", **options})
    assert str(error.value) == REFUSED.format(stopped[1], folder(stopped[1]), "2 layers", f" ({difference})")
    assert kept(stopped[1]) == 2
    comq_np.quantize_file(*stopped, **{"recipe": "rtn", **options}, restart=True)
    assert len(read(stopped[1])) == 6


def test_another_calibration_file_is_another_run(stopped):
    with h5py.File(stopped[0], "r+") as file:
        file["layers/5/weight"][0, 0] += 1
    with pytest.raises(comq_np.FileError, match=r'\(the content of the calibration file was "[0-9a-f]{39}'):
        comq_np.quantize_file(*stopped, recipe="rtn")


def test_another_version_is_another_run(stopped, monkeypatch):
    monkeypatch.setattr("comq_np.writing.__version__", "7.0")
    with pytest.raises(comq_np.FileError, match=rf'the version of comq_np was "{comq_np.__version__}", not "7\.0"'):
        comq_np.quantize_file(*stopped, recipe="rtn")


def test_a_calibration_file_moved_elsewhere_is_the_same(stopped, tmp_path):
    moved = stopped[0].rename(tmp_path / "moved.h5")
    assert comq_np.quantize_file(moved, stopped[1], recipe="rtn")["layer 0"].seconds is None


def test_a_writer_without_a_run_does_not_clear_what_is_kept(stopped):
    with pytest.raises(comq_np.FileError, match=r"keeps 2 layers of another run\. Finish that run, or drop"):
        comq_np.QuantizedWriter(stopped[1])
    assert kept(stopped[1]) == 2
    with comq_np.QuantizedWriter(stopped[1], restart=True):
        pass
    assert read(stopped[1]) == {}


def test_nothing_finished_is_nothing_to_keep(tmp_path):
    with pytest.raises(StopError) as error, comq_np.QuantizedWriter(tmp_path / "q.h5", run={"bits": 4}):
        raise StopError
    assert not hasattr(error.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_named(stopped):
    part = folder(stopped[1]) / "layer-1.h5"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(comq_np.FileError, match=rf"^{part}: cannot be read as HDF5: "):
        comq_np.quantize_file(*stopped, recipe="rtn")
    (folder(stopped[1]) / "run.json").write_text("[")
    with pytest.raises(comq_np.FileError, match=r"run\.json: must hold JSON; delete the folder to start afresh\."):
        comq_np.quantize_file(*stopped, recipe="rtn")
    assert len(comq_np.quantize_file(*stopped, recipe="rtn", restart=True)) == 6


@pytest.mark.parametrize("run", [{"path": pathlib.Path("x")}, {"share": float("nan")}, {1: 2}, "text", 3])
def test_a_run_is_what_json_can_hold(tmp_path, run):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.CalibrationWriter(tmp_path / "c.h5", run=run)
    assert str(error.value) == f"`run` must be a dict of text to what JSON can hold, got {run!r}."
    assert list(tmp_path.iterdir()) == []


def calibrated(path, names, stop=None, **options):
    """Write layers of these names, all of even length with one Gram, until one is to stop it."""
    even = comq_np.Gram(2)
    even.update([[1.0, 2.0], [3.0, 4.0]])
    with comq_np.CalibrationWriter(path, run={"a": 1}, **options) as file:
        for name in names:
            if name == stop:
                raise StopError
            if name not in file:
                gram = comq_np.Gram(2)
                gram.update([[len(name), 1.0]])
                file.add(comq_np.Layer(name, np.ones((2, 1)), gram if len(name) % 2 else even))
    return path.read_bytes()


def test_layers_come_in_the_order_asked_for(tmp_path):
    expected = calibrated(tmp_path / "a.h5", ["dd", "a", "ccc", "bb"])
    order = iter(["dd", "a", "missed", "ccc", "bb"])
    assert calibrated(tmp_path / "b.h5", ["bb", "ccc", "dd", "a"], order=order) == expected
    with pytest.raises(comq_np.InputError) as error:
        calibrated(tmp_path / "b.h5", ["b", "c"], order=["a", "b"])
    assert str(error.value) == "layer 'c': must be one of the 2 layers in `order`."


@pytest.mark.parametrize("stop", ["a", "ccc", "bb"])
def test_a_gram_is_shared_across_an_interruption(tmp_path, stop):
    names = ["dd", "a", "ccc", "bb"]
    with pytest.raises(StopError):
        calibrated(tmp_path / "c.h5", names, stop)
    with pytest.raises(StopError):
        calibrated(tmp_path / "c.h5", names, stop)
    assert kept(tmp_path / "c.h5") == names.index(stop)
    assert calibrated(tmp_path / "c.h5", names) == calibrated(tmp_path / "whole.h5", names)
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert [row["gram"] for row in file.describe()] == [0, 1, 2, 0]


def test_files_hold_no_times(stopped, tmp_path):
    comq_np.quantize_file(*stopped, recipe="rtn")
    for path in stopped:
        with h5py.File(path) as file:
            places = []
            file.visit(places.append)
            found = [h5py.h5o.get_info(file[place].id) for place in places]
        assert len(found) > 20
        assert {(info.atime, info.mtime, info.ctime, info.btime) for info in found} == {(0, 0, 0, 0)}
