"""Problems that the tests share, and how hypothesis runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, settings

# Of processes that test side by side each has one core for its products, and so have those that it starts: more threads
# would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    threadpoolctl.threadpool_limits(1)

# Keras runs on PyTorch, unless a process is to try another one, and keeps no settings.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ["KERAS_HOME"] = os.devnull

# The same examples on every run; `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=500)
settings.load_profile("repeatable")


class Problem(NamedTuple):
    """Weights of a layer, its inputs, and their Gram matrix."""

    W: np.ndarray
    X: np.ndarray
    G: np.ndarray


def make_problem(m: int, n: int, seed: int = 0, samples: int | None = None) -> Problem:
    """Make a layer whose inputs are correlated, of unequal size and off centre, as activations are."""
    rng = np.random.default_rng([m, n, seed])
    mixing = rng.normal(size=(m, m)) * rng.lognormal(sigma=0.7, size=m)
    X = rng.normal(size=(samples or 4 * m + 8, m)) @ mixing + rng.normal(size=m)
    X = X.astype(np.float32).astype(np.float64)
    W = (rng.normal(size=(m, n)) * rng.lognormal(sigma=0.5, size=(m, 1))).astype(np.float32)
    return Problem(W, X, X.T @ X)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """Maker of problems, `problem(m, n, seed=0, samples=None)`."""
    return make_problem
