"""A layer solved in parts of its columns."""

import numpy as np
import pytest

import comq_np
from comq_np.parts import joined

M, N = 40, 24
SLICES = slice(0, 10), slice(10, 23), slice(23, 24)
OPTIONS = [{"recipe": "rtn"}, {"recipe": "paper"}, {"group_size": 16}, {"symmetric": True}]


def solved(problem, slices=SLICES, seed=0, **options):
    """The whole, and what was joined, of a problem."""
    W, _, G = problem(M, N, seed)
    whole = comq_np.solve(W, G, 3, **options)
    parts = [comq_np.solve(W[:, one], G, 3, **options) for one in slices]
    norms = [np.vdot(W[:, one], G @ W[:, one]) for one in slices]
    return whole, joined(parts, norms), parts


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(1, 7))
def test_no_digit_of_a_short_layer_depends_on_the_columns_beside_it(problem, options, seed):
    whole, made, _ = solved(problem, seed=seed, **options)
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(made, name), getattr(whole, name))


@pytest.mark.parametrize("options", OPTIONS)
def test_parts_give_what_the_whole_gives(problem, options):
    whole, made, _ = solved(problem, **options)
    for name in ("codes", "scale", "zero_point"):
        assert getattr(whole, name).dtype == getattr(made, name).dtype
        assert np.array_equal(getattr(whole, name), getattr(made, name))
    there, here = whole.report.to_dict(), made.report.to_dict()
    del there["seconds"], here["seconds"]
    assert here.pop("objectives") == pytest.approx(there.pop("objectives"), rel=1e-3)  # of products in another order
    numbers = {name for name, value in there.items() if isinstance(value, float)}
    assert {name: here[name] for name in numbers} == pytest.approx({name: there[name] for name in numbers}, rel=1e-6)
    assert {name: here[name] for name in here.keys() - numbers} == {
        name: there[name] for name in there.keys() - numbers
    }


def test_a_part_with_fewer_sweeps_rests(problem):
    _, made, parts = solved(problem, recipe="best")
    reports = [part.report for part in parts]
    assert len({report.sweeps for report in reports}) > 1
    assert made.report.sweeps == max(report.sweeps for report in reports)
    assert made.report.objectives[-1] == pytest.approx(sum(report.objectives[-1] for report in reports))
    assert sum(made.report.codes_changed) == sum(sum(report.codes_changed) for report in reports)
    assert made.report.optimal == all(report.optimal for report in reports)


def test_notes_name_the_columns_of_a_part():
    W = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    W[:, 3] = 0
    G = np.diag([1.0, 2, 0])
    parts = [comq_np.solve(W[:, one], G, 3) for one in (slice(0, 2), slice(2, 4))]
    (dead,) = parts[0].report.notes
    zero, same = parts[1].report.notes
    assert ("always zero" in dead, "columns are zero" in zero, same) == (True, True, dead)
    assert joined(parts, [1.0, 1.0]).report.notes == (dead, f"Columns 2 to 3: {zero}")


def test_columns_without_weight_or_error_do_not_count():
    W = np.array([[1.0, 0.0, 0.3], [2.0, 0.0, 0.7], [0.1, 0.0, 0.9]], np.float32)
    G = np.eye(3)
    whole = comq_np.solve(W, G, 2, recipe="rtn")
    parts = [comq_np.solve(W[:, [j]], G, 2, recipe="rtn") for j in range(3)]
    norms = [float(np.square(W[:, j]).sum()) for j in range(3)]
    assert joined(parts, norms).report.relative_error == pytest.approx(whole.report.relative_error, rel=1e-6)


def test_proofs_are_joined(problem):
    W, _, G = problem(6, 4)
    parts = [comq_np.solve(W[:, one], G, 2, recipe="best") for one in (slice(0, 1), slice(1, 4))]
    report = joined(parts, [1.0, 1.0]).report
    assert report.optimal
    assert report.gap == 0


def test_bias_shifts_are_joined(problem):
    W, X, _ = problem(M, N)
    gram = comq_np.Gram(M)
    gram.update(X)
    parts = [comq_np.solve(W[:, one], gram, 3, fit_bias=True, shrinkage=0) for one in SLICES]
    whole = comq_np.solve(W, gram, 3, fit_bias=True, shrinkage=0)
    assert joined(parts, [1.0] * 3).bias_shift == pytest.approx(whole.bias_shift, rel=1e-5, abs=1e-6)
