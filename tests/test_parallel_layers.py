"""Several layers at once: the same file for any number of workers, within the memory that is allowed, ended cleanly."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

import comq_np
import layers
from comq_np import backends, gramfile, memory, parts, schedule, tasks
from comq_np.solver import solve_columns

PACKAGE = pathlib.Path(comq_np.__file__).parents[1]
SHAPES = ((12, 5), (40, 300), (30, 8), (64, 64), (7, 3), (40, 20), (40, 20), (33, 70))


def write(path, problem, shapes):
    """Calibration file with layers of these shapes; those next to each other with as many rows share a Gram."""
    grams = {}
    with comq_np.CalibrationWriter(path) as file:
        for k, (m, n) in enumerate(shapes):
            W, X, _ = problem(m, n, seed=k)
            if (k - 1, m) in grams:
                gram = grams[k - 1, m]
            else:
                gram = comq_np.Gram(m)
                gram.update(X[::2])
                gram.update(X[1::2])
            grams[k, m] = gram
            file.add(comq_np.Layer(f"layer {k}", W, gram, np.zeros(n, np.float32) if k % 2 else None))
    return path


@pytest.fixture
def calibration(problem, tmp_path):
    return write(tmp_path / "calibration.h5", problem, SHAPES)


@pytest.fixture
def expected(calibration, tmp_path):
    """Bytes of the file that one worker on one thread makes."""
    comq_np.quantize_file(calibration, tmp_path / "expected.h5", 3, workers=1, threads=1)
    return (tmp_path / "expected.h5").read_bytes()


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"workers": 2, "memory": "1 GiB"},
        {"workers": 3, "memory": 10**9, "threads": 2},
        {"workers": 8, "memory": "1 TB", "threads": 4},
        {"workers": 1024, "threads": 1},
    ],
)
def test_the_same_file_for_any_number_of_workers(calibration, expected, tmp_path, limits, capsys):
    before = threading.active_count()
    reports = comq_np.quantize_file(calibration, tmp_path / "q.h5", 3, progress=True, **limits)
    assert (tmp_path / "q.h5").read_bytes() == expected
    assert list(reports) == [f"layer {k}" for k in range(len(SHAPES))]
    assert all(report.seconds > 0 for report in reports.values())
    assert "solve: 100%" in capsys.readouterr().err
    assert threading.active_count() <= before + 1  # the bar may have a monitor


def test_a_shared_gram_is_read_once(calibration, tmp_path, monkeypatch):
    reads, read_gram = [], gramfile.read_gram
    monkeypatch.setattr(gramfile, "read_gram", lambda group: reads.append(group.name) or read_gram(group))
    comq_np.quantize_file(calibration, tmp_path / "q.h5", workers=1)
    assert reads == [f"/grams/{k}" for k in range(len(SHAPES) - 1)]


class Watch:
    """Stands for `solve`, and sees how many solves there are at once, each of which waits for so many."""

    def __init__(self, monkeypatch, together, need=100):
        self.most, self.threads, self.calls = 0, [], 0
        self._inside, self._lock, self._solve = 0, threading.Lock(), tasks.solve
        self._together = threading.Barrier(together)
        monkeypatch.setattr(schedule.memory, "with_gram", lambda *_, **__: need)
        monkeypatch.setattr(tasks, "solve", self)

    def __call__(self, W, G, **options):
        if len(W) > 1:
            with self._lock:
                self._inside += 1
                self.calls += 1
                self.most = max(self.most, self._inside)
                self.threads.append(options["threads"])
            self._together.wait(timeout=60)
            with self._lock:
                self._inside -= 1
            self._together.wait(timeout=60)
        return self._solve(W, G, **options)


@pytest.mark.parametrize(
    ("limits", "together", "threads"),
    [
        ({"workers": 4, "memory": 250}, 2, 2),
        ({"workers": 4, "memory": 400}, 4, 1),
        ({"workers": 2, "memory": 10**6}, 2, 2),
        ({"memory": 10**6}, 4, 1),
        ({"workers": 1, "memory": 10**6}, 1, 4),
        ({}, 1, 4),
    ],
)
def test_as_many_layers_at_once_as_there_are_workers_and_memory_for(
    calibration, tmp_path, monkeypatch, limits, together, threads
):
    watch = Watch(monkeypatch, together)
    comq_np.quantize_file(calibration, tmp_path / "q.h5", threads=4, strict=True, **limits)
    assert watch.most == together
    assert watch.threads == [threads] * len(SHAPES)


def test_one_layer_at_a_time_where_a_gpu_solves(calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "takes_gpu", lambda *given: set(given[-1]) == {(1, *shape) for shape in SHAPES})
    watch = Watch(monkeypatch, 1)
    comq_np.quantize_file(calibration, tmp_path / "q.h5", threads=4, memory=10**6, strict=True)
    assert watch.most == 1
    assert watch.threads == [4] * len(SHAPES)


def test_a_layer_that_takes_more_than_the_memory_is_solved_alone(calibration, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, 1)
    with pytest.warns(UserWarning, match="Solved alone") as warned:
        comq_np.quantize_file(calibration, tmp_path / "q.h5", threads=4, memory=99, strict=True)
    assert watch.most == 1
    assert watch.threads == [1] * len(SHAPES)
    several = ", ".join(f"'layer {k}' (100 bytes)" for k in range(5))
    what = "Solved alone, since they take more than the `memory` of 99 bytes"
    assert [str(warning.message) for warning in warned] == [f"{what}: {several} and 3 more."]


@pytest.mark.parametrize(("m", "n"), [(384, 384), (200, 1200), (600, 100)])
@pytest.mark.parametrize("recipe", ["balanced", "rtn"])
def test_what_a_layer_is_said_to_take_is_what_it_takes(problem, tmp_path, m, n, recipe):
    path, options = write(tmp_path / "c.h5", problem, [(m, n), (m, n)]), {"recipe": recipe, "threads": 1, "workers": 1}
    comq_np.quantize_file(path, tmp_path / "q.h5", **options)  # with all that is loaded and kept at the first time
    tracemalloc.start()
    comq_np.quantize_file(path, tmp_path / "q.h5", **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.warns(UserWarning, match="Solved alone"):
        comq_np.quantize_file(path, tmp_path / "q.h5", **options, memory=int(0.95 * peak))
    comq_np.quantize_file(path, tmp_path / "q.h5", **options, memory=int(2 * peak))


def test_layers_at_once_keep_within_the_memory(problem, tmp_path):
    path, memory = write(tmp_path / "c.h5", problem, [(300, 300)] * 6), 2**25
    comq_np.quantize_file(path, tmp_path / "q.h5")
    tracemalloc.start()
    comq_np.quantize_file(path, tmp_path / "q.h5", workers=6, memory=memory, threads=6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.4 * memory < peak <= memory


def test_an_interruption_cancels_what_is_not_begun(calibration, expected, tmp_path, monkeypatch):
    def add(self, name, q):
        if solved:
            raise KeyboardInterrupt
        solved.append(name)
        return real(self, name, q)

    def endless(W, G, callback=None, **options):
        if np.shape(W) in ((1, 1), *SHAPES[:2]):
            return solve(W, G, **options)
        begun.append(W.shape)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            callback(1, 1.0)
        endured.append(W.shape)
        return None

    solved, begun, endured, real, solve = [], [], [], comq_np.QuantizedWriter.add, tasks.solve
    with monkeypatch.context() as patch:
        patch.setattr(comq_np.QuantizedWriter, "add", add)
        patch.setattr(tasks, "solve", endless)
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(calibration, tmp_path / "q.h5", 3, workers=3, memory="1 GB")
    assert len(begun) <= 3
    assert not endured
    assert not (tmp_path / "q.h5").exists()
    comq_np.quantize_file(calibration, tmp_path / "q.h5", 3, workers=3, memory="1 GB")
    assert (tmp_path / "q.h5").read_bytes() == expected


@pytest.mark.skipif(os.name != "posix", reason="other systems end a process without asking it")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_command(problem, tmp_path, name, status):
    path = write(tmp_path / "c.h5", problem, [(160, 200)] * 60)
    arguments = ["solve", str(path), str(tmp_path / "q.h5"), "--workers", "3", "--memory", "1GB", "--threads", "3"]
    heard = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job ignores it
    )
    code = f"{heard}; import sys; from comq_np.cli import main; sys.exit(main({arguments}))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    parts, end = tmp_path / ".q.h5.parts", time.monotonic() + 120
    while not list(parts.glob("layer-*.h5")) and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(getattr(signal, name))
    *_, said, note = process.communicate()[1].splitlines()
    assert process.returncode == status
    assert said.endswith(f"comq solve: {'interrupted' if name == 'SIGINT' else 'terminated'}")
    assert "finished so far, kept in" in note
    reports = comq_np.quantize_file(path, tmp_path / "q.h5")
    assert sum(report.seconds is None for report in reports.values()) == int(note.split()[2])
    comq_np.quantize_file(path, tmp_path / "expected.h5", workers=1)
    assert (tmp_path / "q.h5").read_bytes() == (tmp_path / "expected.h5").read_bytes()


def test_the_benchmark_of_layers_at_once(tmp_path, monkeypatch, capsys):
    options = ["--case", "3x8x4", "blocks", "--recipe", "rtn", "--runs", "1", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(layers, "BLOCK", [(12, 12)] * 4 + [(12, 20), (20, 12)])
    monkeypatch.setattr(sys, "argv", ["layers.py", *options])
    layers.main()
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {row["case"] for row in rows} == {"3x8x4", "blocks"}
    values = {row["metric"]: row["value"] for row in rows if row["case"] == "blocks"}
    assert values["most_speedup"] == values["one_seconds"] / values["most_seconds"]
    assert len(values) == 5


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"workers": 0}, "`workers` must be an integer from 1 to 1024, got 0."),
        ({"workers": True}, "`workers` must be an integer from 1 to 1024, got True."),
        ({"threads": 0}, "`threads` must be an integer from 1 to 1024, got 0."),
        ({"memory": "much"}, "`memory` must be a positive number of bytes, an integer or a text such as "),
        ({"client": 1}, "`client` must be a dask.distributed.Client that is not asynchronous, got 1."),
        ({"strict": 1}, "`strict` must be True or False, got 1."),
    ],
)
def test_refused_limits(calibration, tmp_path, limits, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(calibration, tmp_path / "q.h5", **limits)
    assert str(error.value).startswith(message)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.h5"]


WIDE = ((12, 5), (30, 100), (40, 64), (40, 64), (9, 130))


@pytest.fixture
def narrow(monkeypatch):
    """Layers of more than 40 columns are several parts."""
    monkeypatch.setattr(parts, "WIDE", 20)
    monkeypatch.setattr(parts, "WIDE_ROWS", 0.5)


@pytest.fixture
def wide(problem, tmp_path, narrow):
    return write(tmp_path / "wide.h5", problem, WIDE)


def parts_of(calibration, **options):
    """Names and parts of the jobs of a run."""
    given = {"levels": None, "fit_bias": True, "group_size": None, "recipe": "balanced", **options}
    with comq_np.CalibrationFile(calibration) as source:
        return [(job.name, job.part) for job in schedule.jobs(source, dict.fromkeys(source, 3), given)]


@pytest.mark.parametrize(
    ("m", "n", "widths"),
    [
        (576, 49152, [8192] * 6),
        (576, 16383, [16383]),
        (64, 20001, [10000, 10001]),
        (4096, 32767, [32767]),
        (4096, 32768, [16384] * 2),
        (1, 1, [1]),
    ],
)
def test_parts_of_a_layer(m, n, widths):
    found = parts.columns_of(m, n, None)
    assert [part.stop - part.start for part in found] == widths
    assert [part.start for part in found[1:]] == [part.stop for part in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, n)
    assert parts.columns_of(m, n, "tensor") == [slice(0, n)]


@pytest.mark.parametrize("options", [{}, {"recipe": "rtn", "bits": 9}, {"group_size": 8, "shrinkage": 0.1}])
def test_a_wide_layer_is_solved_in_parts_of_its_columns(wide, tmp_path, options):
    names = [name for name, part in parts_of(wide) if part]
    assert names == [f"layer {k}" for k, count in ((1, 5), (2, 3), (3, 3), (4, 6)) for _ in range(count)]
    made = []
    for workers in (1, 2, 3):
        path = tmp_path / f"{workers}.h5"
        reports = comq_np.quantize_file(wide, path, **options, workers=workers, memory="1 GB", strict=True)
        assert list(reports) == [f"layer {k}" for k in range(len(WIDE))]
        assert all(report.seconds > 0 for report in reports.values())
        made.append(path.read_bytes())
    assert len(set(made)) == 1
    assert all(layer.matches for layer in comq_np.verify_file(wide, path))
    with comq_np.CalibrationFile(wide) as source, comq_np.QuantizedFile(path) as target:
        for name in source:
            check_same(source[name], target[name], options)


def check_same(layer, q, options):
    """Check that what was joined is as good as the whole, is shrunk as that, and is what its parts are."""
    options = {"shrinkage": "auto", **options, "fit_bias": layer.bias is not None}
    whole = comq_np.solve(layer.weight, layer.gram, **options)
    assert q.report.shrinkage == whole.report.shrinkage
    for figure in ("objective", "relative_error", "objective_rounding"):
        assert getattr(q.report, figure) == pytest.approx(getattr(whole.report, figure), rel=1e-2)
    if layer.weight.shape[-1] > 40:
        columns = parts.columns_of(*layer.weight.shape[-2:], None)
        pieces = [solve_columns(layer.weight, layer.gram, part, **options) for part in columns]
        whole = parts.joined(*zip(*pieces, strict=True))
        assert vars(q.report) == {**vars(whole.report), "seconds": None}
    for name in ("codes", "scale", "zero_point", "bias_shift"):
        np.testing.assert_array_equal(getattr(q, name), getattr(whole, name))


def test_a_wide_layer_of_several_problems_is_solved_in_parts(problem, tmp_path, narrow):
    made = [problem(12, 50, seed=seed) for seed in range(3)]
    gram = comq_np.Gram(12, problems=3)
    gram.update(np.stack([one.X[:20] for one in made], axis=1))
    layer = comq_np.Layer("groups", np.stack([one.W for one in made]), gram, np.zeros((3, 50)))
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(layer)
    assert [part.stop for _, part in parts_of(tmp_path / "c.h5")] == [25, 50]
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 3, workers=2)
    assert all(found.matches for found in comq_np.verify_file(tmp_path / "c.h5", tmp_path / "q.h5"))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        check_same(layer, file["groups"], {"bits": 3})


def test_a_part_tells_what_its_columns_weigh(problem):
    W, X, G = problem(30, 40)
    gram = comq_np.Gram(30)
    gram.update(X)
    W[:, 20:] = 0  # without an error to tell it by
    for part in (slice(0, 20), slice(20, 40), slice(3, 40)):
        _, norm = solve_columns(W, gram, part, bits=3, shrinkage="auto", fit_bias=False)
        assert norm == pytest.approx(np.vdot(W[:, part], G @ W[:, part]), rel=1e-4)


def test_a_scale_for_all_keeps_a_layer_whole(wide, tmp_path):
    assert all(part is None for _, part in parts_of(wide, group_size="tensor"))


def test_a_wide_layer_is_read_once(wide, tmp_path, monkeypatch):
    reads, read = [], comq_np.CalibrationFile.__getitem__
    monkeypatch.setattr(
        comq_np.CalibrationFile, "__getitem__", lambda self, name: reads.append(name) or read(self, name)
    )
    comq_np.quantize_file(wide, tmp_path / "q.h5", workers=1)
    assert reads == [f"layer {k}" for k in range(len(WIDE))]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("slow_first", [False, True])
def test_a_part_that_fails_keeps_its_layer_float(wide, tmp_path, monkeypatch, workers, slow_first):
    def fail(W, G, part, **options):
        begun.append((W.shape, part.start))
        if len(W) == 30 and part.start >= 20:
            if part.start == 20 and slow_first and workers > 1:
                assert later.wait(60)
            later.set()
            raise MemoryError(f"from {part.start}")
        return solve_columns(W, G, part, **options)

    begun, later = [], threading.Event()
    monkeypatch.setattr(tasks, "solve_columns", fail)
    with pytest.warns(UserWarning, match="stay float: 'layer 1'"):
        reports = comq_np.quantize_file(wide, tmp_path / "q.h5", workers=workers, memory="1 GB")
    assert reports.kept == {"layer 1": "MemoryError: from 20"}
    assert list(reports) == ["layer 0", "layer 2", "layer 3", "layer 4"]
    assert len([start for shape, start in begun if shape == (30, 100)]) <= workers + 1 < 5
    with pytest.raises(MemoryError, match="from 20"):
        comq_np.quantize_file(wide, tmp_path / "strict.h5", workers=workers, memory="1 GB", strict=True)


def test_an_interruption_within_a_layer(wide, tmp_path, monkeypatch):
    def interrupted(W, G, part, **options):
        if part.start == 21:
            raise KeyboardInterrupt
        return solve_columns(W, G, part, **options)

    comq_np.quantize_file(wide, tmp_path / "expected.h5")
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "solve_columns", interrupted)
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(wide, tmp_path / "q.h5", workers=1)
    assert len(list((tmp_path / ".q.h5.parts").glob("layer-*.h5"))) == 2
    reports = comq_np.quantize_file(wide, tmp_path / "q.h5")
    assert [report.seconds is None for report in reports.values()] == [True, True, False, False, False]
    assert (tmp_path / "q.h5").read_bytes() == (tmp_path / "expected.h5").read_bytes()


@pytest.mark.parametrize(("b", "m", "n"), [(300, 25, 1), (40, 24, 20), (100, 64, 4)])
def test_memory_of_many_problems(b, m, n):
    """What is proven, and what is tried for the shrinkage, takes more than the sweeps do in so short columns."""
    rng, gram = np.random.default_rng(0), comq_np.Gram(m, problems=b)
    gram.update(rng.normal(size=(2 * m, b, m)))
    W = rng.normal(size=(b, m, n))
    comq_np.solve(W, gram, threads=1, fit_bias=True)
    tracemalloc.start()
    comq_np.solve(W, gram, threads=1, fit_bias=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = memory.with_gram((b, m, n), 4, True, None, "balanced", n, False, 1) - gram.nbytes - W.nbytes // 2
    assert 0.5 * estimate < peak < 1.05 * estimate


@pytest.mark.parametrize(("b", "m", "n"), [(None, 700, 100), (None, 300, 800), (3, 300, 40), (300, 25, 1)])
@pytest.mark.parametrize("fit_bias", [False, True])
def test_memory_of_nonlinear_shrinkage(b, m, n, fit_bias):
    rng, gram = np.random.default_rng(0), comq_np.Gram(m, b)
    gram.update(rng.normal(size=(60, m) if b is None else (60, b, m)))
    W = rng.normal(size=(b or 1, m, n)).astype(np.float32)
    W = W[0] if b is None else W
    options = {"fit_bias": fit_bias, "shrinkage": "nonlinear", "recipe": "fast", "threads": 1}
    comq_np.solve(W[..., :2], gram, **options)
    tracemalloc.start()
    comq_np.solve(W, gram, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = memory.with_gram((b or 1, m, n), 4, fit_bias, None, "fast", n, False, 1, nonlinear=True)
    assert 0.5 * estimate < peak + gram.nbytes + W.nbytes < 1.05 * estimate


@pytest.mark.parametrize(("m", "n"), [(300, 40), (300, 300), (128, 1024)])
@pytest.mark.parametrize("fit_bias", [False, True])
def test_memory_of_quantized_inputs(tmp_path, m, n, fit_bias):
    """Beside the matrices, their products with the float inputs and what matching weights takes."""
    rng, gram = np.random.default_rng(0), comq_np.CrossGram(m, grid=comq_np.ActivationGrid(0.05, 7, 4))
    gram.update(rng.normal(size=(2 * m, m)))
    W = rng.normal(size=(m, n)).astype(np.float32)
    with comq_np.CalibrationWriter(tmp_path / "file.h5") as file:
        file.add(comq_np.Layer("fc", W, gram))
    comq_np.solve(W[:, :2], np.eye(m), threads=1)
    tracemalloc.start()
    with comq_np.CalibrationFile(tmp_path / "file.h5") as file:
        layer = file["fc"]
        comq_np.solve(layer.weight, layer.gram, threads=1, fit_bias=fit_bias, recipe="fast")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = memory.with_gram((1, m, n), 4, fit_bias, None, "fast", n, True, 1)
    assert 0.4 * estimate < peak < 1.05 * estimate


def test_memory_of_parts():
    whole, part = (
        memory.with_gram((1, 64, 4096), 4, False, None, "balanced", columns, False, 1) for columns in (4096, 512)
    )
    assert part < whole
    assert part > memory.with_gram((1, 64, 512), 4, False, None, "balanced", 512, False, 1) + 4 * 64 * 4096
