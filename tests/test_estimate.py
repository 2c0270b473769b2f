"""What `estimate` says of the memory of a solve, beside what Python and NumPy allocate."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import comq_np

M, N = 256, 1024


@pytest.mark.parametrize("zero_point", ["integer", "real"])
@pytest.mark.parametrize("size", [None, 64, 200, "tensor"])
@pytest.mark.parametrize("recipe", ["fast", "balanced", "paper"])
def test_the_estimate_holds(problem, recipe, size, zero_point):
    W, _, G = problem(M, N)
    G = G.astype(np.float32)
    options = {"recipe": recipe, "group_size": size, "zero_point": zero_point, "threads": 1}
    comq_np.solve(W, G, 4, **options)  # compiles
    tracemalloc.start()
    comq_np.solve(W, G, 4, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = comq_np.estimate(M, N, **options)
    assert 0.8 * estimate <= peak <= 1.2 * estimate


def test_a_zero_point_of_no_known_kind_is_refused():
    with pytest.raises(comq_np.InputError, match="`zero_point` must be one of 'integer', 'real', got 'whole'"):
        comq_np.estimate(M, N, zero_point="whole")
