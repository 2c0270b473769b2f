"""Tests that need more than the package are not skipped where they must run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import requirements


@pytest.fixture
def lacking(monkeypatch):
    monkeypatch.setitem(requirements.NEEDS, "much", ("json", "no_such_package.at_all"))


def test_skipped_where_nothing_is_required(lacking, monkeypatch):
    monkeypatch.setenv("COMQ_REQUIRE", "cuda")
    with pytest.raises(pytest.skip.Exception, match=r"needs no_such_package\.at_all"):
        requirements.require("much")


def test_fails_where_it_is_required(lacking, monkeypatch):
    monkeypatch.setenv("COMQ_REQUIRE", "cuda,much")
    with pytest.raises(RuntimeError, match=r"needs no_such_package\.at_all"):
        requirements.require("much")


def test_nothing_is_missing(monkeypatch):
    monkeypatch.setitem(requirements.NEEDS, "little", ("json",))
    requirements.require("little")


def test_the_package_does_not_load_numba_cuda():
    code = "import comq_np; comq_np.solve([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])"
    code += "\nimport sys; print([name for name in sys.modules if name.startswith(('numba.cuda', 'cupy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
