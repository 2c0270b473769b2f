"""The search for a grid: its candidates, and what is said of each of them."""

from __future__ import annotations

import numpy as np
import pytest

from comq_np import grid as grids

LEVELS = 8


def error_on(grid, values, weight, size):
    """Weighted squared error of the values (n, m), rounded on a grid, in each of its groups."""
    found = np.empty(grid.scale.shape)
    for g in range(grid.scale.shape[1]):
        rows = slice(g * size, (g + 1) * size)
        scale, zero = (array[:, g, None].astype(float) for array in (grid.scale, grid.zero_point))
        codes = np.clip(np.rint(values[:, rows] / scale + zero), 0, LEVELS - 1)
        found[:, g] = (weight[rows] * (values[:, rows] - scale * (codes - zero)) ** 2).sum(axis=1)
    return found


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("shifts", [(), (0, -1, 1)])
@pytest.mark.parametrize("size", [50, 16])
def test_what_is_judged_is_what_is_picked(real, shifts, size):
    rng = np.random.default_rng(0)
    values, weight = rng.normal(size=(12, 50)).astype(np.float32), rng.uniform(size=50).astype(np.float32)
    shape = 12, -(-50 // size)
    zero_point = rng.uniform(1, 6, size=shape).astype(np.float32) if real else rng.integers(1, 7, shape, np.int32)
    grid = grids.Grid(rng.uniform(0.3, 0.6, size=shape).astype(np.float32), zero_point)
    candidates = grids.Candidates(np.array([1.0, 0.9, 1.07, 0.6]), shifts)
    errors = grids.errors(values, weight[None], grid, candidates, LEVELS, size)
    assert errors.shape == (*shape, 4 * max(len(shifts), 1))
    picked = [
        grids.picked(grid, candidates, np.full(shape, number, dtype=np.intp), LEVELS)
        for number in range(errors.shape[2])
    ]
    assert picked[0].equals(grid)
    assert len({(one.scale[0, 0], one.zero_point[0, 0]) for one in picked}) > 3
    for number, one in enumerate(picked):
        assert one.zero_point.dtype == zero_point.dtype
        np.testing.assert_allclose(
            errors[:, :, number] * grid.scale.astype(float) ** 2, error_on(one, values, weight, size), rtol=1e-4
        )
