"""The tests of the Keras adapter on JAX: in a process of its own, as one has one back end."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from requirements import require

require("keras")

TESTS = [pathlib.Path(__file__).with_name(name) for name in ("test_keras.py", "test_keras_layers.py")]
#: Fewest tests that are the whole files.
FEWEST = 75


def test_every_test_passes_on_jax():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TESTS)]
    # Compiling takes most of the time.
    jax = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, "KERAS_BACKEND": "jax", **jax}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=TESTS[0].parents[2]
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert passed is not None
    assert int(passed[1]) >= FEWEST
