"""Which backend solves, on a machine without a GPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import comq_np
from comq_np import backends

INSTALLED = importlib.util.find_spec("numba_cuda") is not None


@pytest.fixture
def no_gpu(monkeypatch):
    if INSTALLED:
        monkeypatch.setattr("comq_np.gpu.arrays.missing", lambda: "needs a GPU.")


def test_a_backend_of_another_name_is_refused(problem):
    W, _, G = problem(6, 2)
    with pytest.raises(comq_np.InputError, match=r"`backend` must be one of .*'cuda'.*, got 'gpu'"):
        comq_np.solve(W, G, backend="gpu")


def test_cuda_says_what_is_missing(problem, no_gpu):
    W, _, G = problem(6, 2)
    with pytest.raises(comq_np.InputError, match=r"`backend` 'cuda': CUDA needs"):
        comq_np.solve(W, G, backend="cuda")


def test_cuda_says_which_package_is_missing(problem, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: False)
    W, _, G = problem(6, 2)
    with pytest.raises(comq_np.InputError, match="needs the package numba-cuda, of the extra `cuda`"):
        comq_np.solve(W, G, backend="cuda")


@pytest.mark.skipif(not INSTALLED, reason="needs numba-cuda")
def test_auto_says_why_it_does_without_a_gpu(problem, monkeypatch, no_gpu):
    W, _, G = problem(6, 2)
    assert comq_np.solve(W, G).report.notes == ()
    monkeypatch.setattr(backends, "WORTH", 1)
    report = comq_np.solve(W, G).report
    assert report.backend == "cpu"
    assert report.notes == ("Solved on the CPU: CUDA needs a GPU.",)
    assert comq_np.solve(W, G, backend="cpu").report.notes == ()


def test_auto_is_silent_where_cuda_is_not_installed(problem, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: False)
    monkeypatch.setattr(backends, "WORTH", 1)
    W, _, G = problem(6, 2)
    assert comq_np.solve(W, G).report.notes == ()


class OnDevice:
    """What looks like an array on a GPU."""

    __cuda_array_interface__ = {"shape": (6, 2), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


def test_the_cpu_takes_no_array_on_a_gpu(problem, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: False)
    _, _, G = problem(6, 2)
    with pytest.raises(comq_np.InputError, match="`W` is on a GPU: CUDA needs the package numba-cuda"):
        comq_np.solve(OnDevice(), G, backend="cpu")
    with pytest.raises(comq_np.InputError, match=r'`backend` must be "cuda" or "auto" with arrays on a GPU'):
        comq_np.solve(np.ones((6, 2)), OnDevice(), backend="cpu")
