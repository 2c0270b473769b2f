"""The clock of the benchmarks: what it calls a stage, what it divides by what, and the figures of tiny sizes."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading

import numpy as np
import pytest

import comq_np
import problems
import speed
import stopwatch

NAMES = [name for names in stopwatch.STAGES.values() for name in names]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Let no test wait for a quiet machine."""
    monkeypatch.setattr(stopwatch, "PAUSE", 0.0)
    monkeypatch.setattr(stopwatch, "BLOCK", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """Clock that goes on only when it is told to: ``clock(seconds)``."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


def run(monkeypatch, tmp_path, *options):
    """Values of a run of the script, by case, recipe and metric."""
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--json", str(path)])
    speed.main()
    rows = json.loads(path.read_text())
    assert {tuple(row) for row in rows} == {("case", "bits", "recipe", "metric", "value")}
    assert {row["bits"] for row in rows} == {4}
    return {(row["case"], row["recipe"], row["metric"]): row["value"] for row in rows}


def test_time_is_that_of_the_innermost_stage(clock):
    watch = stopwatch.Stopwatch()
    inner = watch.timed("passes", clock)

    def body():
        clock(1.0)
        inner(2.0)
        inner(4.0)
        clock(8.0)

    outer = watch.timed("grid", body)
    watch.start()
    clock(16.0)
    outer()
    outer()
    watch.lap()
    assert {stage: seconds for stage, seconds in watch.stages.items() if seconds} == {
        "grid": 18.0,
        "passes": 12.0,
        stopwatch.OTHER: 16.0,
    }
    assert watch.first == {"grid": 15.0, "passes": 2.0}


def test_a_stage_that_fails_ends(clock):
    watch = stopwatch.Stopwatch()
    watch.start()
    with pytest.raises(TypeError):
        watch.timed("grid", clock)()
    clock(1.0)
    watch.lap()
    assert watch.stages[stopwatch.OTHER] == 1.0


def test_other_threads_are_waited_for(clock):
    watch = stopwatch.Stopwatch()
    thread = threading.Thread(target=watch.timed("passes", clock), args=(1.0,))
    watch.start()
    thread.start()
    thread.join()
    watch.lap()
    assert watch.stages["passes"] == 0.0
    assert watch.stages[stopwatch.OTHER] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_functions_of_the_package(name):
    function, places = stopwatch.places_of(name)
    assert places
    assert all(getattr(owner, attribute) is function for owner, attribute in places)


def test_a_solve_is_seen_from_wherever_it_calls_a_stage():
    before = {name: stopwatch.places_of(name) for name in NAMES}
    timing = stopwatch.Timing()
    timing.run(speed.task_of("balanced", speed.layers_of((64, 64)), 2), 1)
    assert all(
        timing.stages[stage] > 0 for stage in ("check", "grid", "factor", "passes", "sweep", "tabu", "objective")
    )
    assert timing.seconds == pytest.approx(sum(timing.stages.values()))
    assert 0 < timing.first["sweep"] < timing.stages["sweep"]
    assert before == {name: stopwatch.places_of(name) for name in before}


def test_everything_takes_turns_until_its_time_is_up(clock, monkeypatch):
    turns, products = [], itertools.cycle([1.0, 2.0])

    def product(timing, W, G):
        turns.append("product")
        timing.runs.append(next(products))

    def task(name, seconds):
        def go(threads):
            turns.append((name, threads))
            clock(seconds)

        return go

    monkeypatch.setattr(stopwatch.Timing, "run_product", product)
    how = speed.How(threads=(1, 2), repeat=3, limit=5.0)
    found = speed.alternate(speed.Layers(None, None), {"short": task("short", 2.0), "long": task("long", 8.0)}, how)
    assert turns[1::2] == [
        *[("short", 1), ("long", 1), ("short", 2), ("long", 2)],
        *[("short", 1), ("short", 2)],
        *[("short", 1), ("short", 2)],
    ]
    assert set(turns[::2]) == {"product"}
    assert found[2].tasks["long"].seconds == found[2].products(8.0) == 8.0
    assert [found[2].tasks[name].ratios for name in ("short", "long")] == [[2.0, 1.0, 1.0], [4.0]]


def test_the_fastest_run_counts(clock):
    timing, seconds = stopwatch.Timing(), iter([3.0, 2.0, 4.0])
    for _ in range(3):
        timing.run(lambda _: clock(next(seconds)), 1)
    assert (timing.seconds, timing.slowest, timing.spent) == (2.0, 4.0, 9.0)
    assert timing.stages[stopwatch.OTHER] == 2.0


def test_groups_are_part_of_the_name():
    layers = speed.layers_of((64, 32))
    found = speed.task_of("fast-16", layers, 4)(1)
    assert (found.group_size, found.report.recipe) == (16, "fast")
    assert speed.recipe_name("fast-16") == "fast-16"


def test_errors_are_those_of_the_report():
    layers = speed.layers_of((24, 16))
    q = comq_np.solve(*layers, 4)
    timings = speed.Timings(
        stopwatch.Timing(), {"array": stopwatch.Timing(found=q), "floats": stopwatch.Timing(found=layers.W)}
    )
    errors = speed.relative_errors(layers, timings)
    assert errors == {"array": pytest.approx(q.report.relative_error, rel=1e-3), "floats": 0.0}


def test_exponents_of_a_power_law():
    shapes = tuple(itertools.product((2, 8, 32), repeat=2))
    assert speed.exponents(shapes, [5 * m**2.5 * n**0.5 for m, n in shapes]) == pytest.approx((2.5, 0.5))


def test_a_size_has_products_stages_and_threads(monkeypatch, tmp_path, capsys):
    found = run(monkeypatch, tmp_path, "--case", "32x24", "--recipe", "fast", "paper", "--threads", "2", "1", "2")
    assert "BLAS: " in capsys.readouterr().out
    for recipe in ("fast", "paper"):
        for case in ("32x24", "32x24_threads_1"):
            product = found[case, "product", "seconds"]
            assert found[case, recipe, "products"] == pytest.approx(found[case, recipe, "seconds"] / product)
        stages = [found["32x24", recipe, f"products_{stage}"] for stage in (*stopwatch.STAGES, stopwatch.OTHER)]
        assert sum(stages) == pytest.approx(found["32x24", recipe, "products"])
        first, all_of_them = (found["32x24", recipe, f"products_{name}"] for name in ("first_sweep", "sweep"))
        assert first == all_of_them == 0 if recipe == "fast" else 0 < first < all_of_them
        slow, fast = (found[case, recipe, "seconds"] for case in ("32x24_threads_1", "32x24"))
        assert found["32x24", recipe, "thread_speedup"] == pytest.approx(slow / fast)
    slow, fast = (found[case, "product", "seconds"] for case in ("32x24_threads_1", "32x24"))
    assert found["32x24", "product", "thread_speedup"] == pytest.approx(slow / fast)
    assert found["32x24", "fast", "relative_error"] < found["32x24", "paper", "relative_error"] < 0.1
    assert found["32x24", "product", "product_spread"] >= 1


def test_a_batch_is_compared_with_as_many_calls(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "--case", "5x9x1", "--recipe", "fast", "--threads", "1")
    assert {metric for _, recipe, metric in found if recipe == "fast"} == {
        "products",
        "products_median",
        "seconds",
        "relative_error",
        "speedup_one_call",
    }
    assert found["5x9x1", "fast", "speedup_one_call"] > 0
    assert 0 < found["5x9x1", "fast", "relative_error"] < 0.1


def test_many_calls_solve_each_problem():
    layers = speed.layers_of((3, 9, 2))
    found = speed.one_by_one("fast", layers, 4)(1)
    for q, W, G in zip(found, *layers, strict=True):
        np.testing.assert_array_equal(q.codes, comq_np.solve(W, G, 4, recipe="fast").codes)


def test_shrinkage_is_what_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "SHRINKAGE", (48, 16))
    found = run(monkeypatch, tmp_path, "--case", "shrinkage", "--repeat", "1", "--threads", "1")
    expected = comq_np.solve(problems.weights(48, 16), problems.gram(48), 4).report.shrinkage
    metrics = {metric for case, recipe, metric in found if (case, recipe) == ("48x16", "balanced")}
    assert metrics == {"products_shrinkage", "shrinkage"}
    assert found["48x16", "balanced", "shrinkage"] == expected > 0


def test_growth_has_exponents_of_recipes_and_of_the_product(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "GROWTH", ((16, 16), (16, 32), (32, 16)))
    found = run(monkeypatch, tmp_path, "--case", "growth", "--recipe", "fast", "--repeat", "1")
    for recipe in ("fast", "product"):
        metrics = {metric for case, name, metric in found if (case, name) == ("growth", recipe)}
        assert metrics == {"exponent_m", "exponent_n"}


def test_what_cannot_run_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setitem(speed.peers.PACKAGES, "torch_gptq", ("no_such_package",))
    monkeypatch.setitem(speed.peers.PACKAGES, "keras_gptq", ())
    assert speed.runnable(("fast", "torch_gptq", "keras_gptq"), 5) == ("fast",)
    assert capsys.readouterr().err.splitlines() == [
        "torch_gptq is left out: no_such_package missing",
        "keras_gptq is left out: it does not take 5 bits",
    ]


def test_peers_run_where_there_is_one_matrix(monkeypatch):
    monkeypatch.setattr(speed.peers, "PACKAGES", {})
    names = ["fast", "torch_gptq"]
    assert speed.planned(["24x16", "4x9x1", "shrinkage", "growth"], names, 4) == {
        "24x16": ("fast", "torch_gptq"),
        "4x9x1": ("fast",),
        "shrinkage": ("fast",),
        "growth": ("fast", "torch_gptq"),
    }
    assert speed.planned(["4x9x1"], ["torch_gptq"], 4) == {}
    assert speed.planned(["768x768"], None, 4) == {"768x768": ("paper",)}


def test_a_run_with_nothing_to_run_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.peers.PACKAGES, "torch_gptq", ("no_such_package",))
    with pytest.raises(SystemExit, match="nothing is left to run"):
        run(monkeypatch, tmp_path, "--recipe", "torch_gptq")


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="ticks are POSIX")
def test_work_of_this_process_is_no_load_of_others(monkeypatch, tmp_path):
    monkeypatch.setattr(stopwatch, "STAT", tmp_path / "stat")
    assert math.isnan(stopwatch.busy_seconds())
    ticks = os.sysconf("SC_CLK_TCK") * np.array([8, 4, 2, 64, 32, 1, 1, 1, 128, 128])
    (tmp_path / "stat").write_text("cpu  " + " ".join(map(str, ticks)) + "\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: 5.0)
    assert stopwatch.busy_seconds() == 12.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "24"], "argument --case: must be MxN, BxMxN, shrinkage or growth, got '24'"),
        (["--case", "24x0"], "argument --case: must be MxN, BxMxN, shrinkage or growth, got '24x0'"),
        (["--repeat", "0"], "argument --repeat: must be a whole number of at least 1, got '0'"),
        (["--threads", "1", "two"], "argument --threads: must be a whole number of at least 1, got 'two'"),
        (["--recipe", "none"], "argument --recipe: must be one of fast, balanced, best, paper, rtn, "),
        (["--recipe", "fast-0"], "or a recipe and rows such as balanced-128, got 'fast-0'"),
        (["--recipe", "ort_gptq-32"], "or a recipe and rows such as balanced-128, got 'ort_gptq-32'"),
    ],
)
def test_refused_arguments(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_layers_are_correlated_and_the_same_every_time():
    W, G = speed.layers_of((64, 8))
    np.testing.assert_array_equal(G, G.T)
    np.testing.assert_array_equal(G, problems.matrix(64))
    np.testing.assert_array_equal(W, problems.weights(64, 8))
    assert W.dtype == G.dtype == np.float32
    size = np.sqrt(G.diagonal())
    eigenvalues = np.linalg.eigvalsh((G / np.outer(size, size)).astype(np.float64))
    assert 0 < eigenvalues[0] < 0.1 < 5 < eigenvalues[-1]
    gram = problems.gram(64)
    np.testing.assert_allclose(gram.matrix, G, rtol=1e-4, atol=1e-4 * G.max())
    assert [fold.count for fold in gram.folds] == [64, 64]


def test_what_warms_up_is_small_and_of_the_same_kind():
    assert speed.warm_shape((2048, 20)) == (64, 20)
    assert speed.warm_shape((672, 9, 1)) == (4, 9, 1)
    layers, tasks = speed.tasks_of(("fast",), (80, 8), speed.How())
    assert layers.W.shape == (80, 8)
    assert tasks["fast"](1).codes.shape == (80, 8)
