"""The scale of the benchmark of memory: it weighs what was allocated, whatever was before."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import memory

MB = 2**20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def run_that(tmp_path):
    """Maker of a run that does something else than to solve."""

    def make(do):
        class Other(memory.Run):
            def solve(self, W, G):
                do(W, G)

        np.save(tmp_path / "W.npy", np.ones((4, 2), dtype=np.float32))
        np.save(tmp_path / "G.npy", np.eye(4))
        return Other(tmp_path, 4, "rtn", 1, overwrite=False)

    return make


@pytest.mark.parametrize("size", [64 * MB, 128 * MB])
def test_peak_is_what_was_allocated_at_once(run_that, size):
    def allocate(W, G):
        for share in (2, 1, 4):
            np.ones(size // share, dtype=np.uint8)

    assert memory.peak(run_that(allocate)) == pytest.approx(size, abs=4 * MB)


def test_what_was_before_does_not_count(run_that):
    def allocate(W, G):
        if len(W) == memory.WARM[0]:
            np.ones(256 * MB, dtype=np.uint8)

    assert memory.peak(run_that(allocate)) < 4 * MB


def test_figures_are_in_bytes_of_the_inputs(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measured", lambda _: 4 * 4 * 8 * 2 + 3 * 8 * 8 * 8)
    monkeypatch.setattr(memory, "estimated", lambda *_: 1024.0)
    figures = memory.figures_of((8, 2), "float64", memory.Run(tmp_path, 4, "rtn", 1, overwrite=False))
    assert figures == {
        "peak_mb": 1792 / 1e6,
        "gram_copies": 3.0,
        "estimate_mb": 1024 / 1e6,
        "peak_over_estimate": 1.75,
    }


def test_a_solve_is_weighed_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    path, options = tmp_path / "figures.json", ["--case", "256x512", "--recipe", "rtn", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *options, "--json", str(path)])
    monkeypatch.setattr(memory, "TYPES", ("float64",))
    memory.main()
    rows = json.loads(path.read_text())
    assert {tuple(row) for row in rows} == {("case", "bits", "recipe", "metric", "value")}
    assert {row["case"] for row in rows} == {"256x512_float64", "256x512_float64_overwrite"}
    peaks = [row["value"] for row in rows if row["metric"] == "peak_mb"]
    assert all(256 * 512 / 1e6 < peak < 100 for peak in peaks)  # the codes at least
    assert {row["metric"] for row in rows} >= {"peak_mb", "gram_copies"}


def test_inputs_are_read_and_solved_as_asked(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(memory.comq_np, "solve", lambda *args, **options: seen.append((args, options)))
    memory.Run(tmp_path, 3, "fast", 2, overwrite=True).solve("W", "G")
    memory.Run(tmp_path, 3, "fast", 2, overwrite=False).solve("W", "G")
    options = {"recipe": "fast", "threads": 2, "backend": "cpu"}
    assert seen == [(("W", "G", 3), {**options, "overwrite": overwrite}) for overwrite in (True, False)]


def test_the_estimate_is_asked_for_the_same_solve(tmp_path):
    run = memory.Run(tmp_path, 4, "balanced", 1, overwrite=False)
    sizes = [memory.estimated((m, m), "float32", run) for m in (512, 1024)]
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize("case", ["24", "4x9x1", "24xtwo"])
def test_refused_cases(monkeypatch, capsys, case):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--case", case])
    with pytest.raises(SystemExit) as stopped:
        memory.main()
    assert stopped.value.code == 2
    assert f"argument --case: must be MxN, got {case!r}" in capsys.readouterr().err
