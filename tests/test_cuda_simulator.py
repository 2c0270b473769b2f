"""The tests of every backend, in numba-cuda's simulator of a GPU: in a process of its own, as it must be."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from requirements import require

require("cuda")

TESTS = pathlib.Path(__file__).with_name("test_backend.py")
#: Fewest tests that are the whole file.
FEWEST = 150


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
