"""The tests of every backend, in numba-cuda's simulator of a GPU: in a process of its own, as it must be."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from requirements import require

require("cuda")

TESTS = pathlib.Path(__file__).with_name("test_backend.py")
#: Fewest tests that are the whole file.
FEWEST = 150


@pytest.fixture
def one_core():
    """Start processes on one core: a simulated GPU is threads that take turns, in twice the time if on two cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("one_core")
def test_every_test_of_a_backend_passes_in_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "COMQ_BACKEND": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=TESTS.parent.parent
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert passed is not None
    assert int(passed[1]) >= FEWEST
