"""Gram matrices: what is summed, where it goes, and what is refused."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import comq_np
import memory


def inputs(samples, m, seed=0):
    rng = np.random.default_rng([samples, m, seed])
    return (rng.normal(size=(samples, m)) * rng.lognormal(size=m) + rng.normal(size=m)).astype(np.float32)


def assert_close(found, X, tolerance=1e-6):
    """Within the tolerance of the exact ``X.T @ X``, relative to the inputs' sizes."""
    exact = X.T.astype(np.float64) @ X.astype(np.float64)
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert (np.abs(found - exact) <= tolerance * size).all()


@given(m=st.integers(1, 40), batches=st.lists(st.integers(0, 300), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_streaming_equals_one_product(m, batches, seed):
    X = inputs(sum(batches), m, seed)
    gram, start = comq_np.Gram(m), 0
    for count in batches:
        gram.update(X[start : start + count])
        start += count
    assert_close(gram.matrix, X)
    assert gram.count == len(X)
    if len(X):
        np.testing.assert_allclose(gram.mean, X.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.1, 3000.7, -1e-3, 1e6])
def test_a_constant_input_is_exactly_still(value):
    X = inputs(3000, 8)
    X[:, 5] = value
    gram = comq_np.Gram(8)
    for part in np.array_split(X, 7):
        gram.update(part)
    assert not gram.centred[5].any()
    assert not gram.centred[:, 5].any()
    assert (np.delete(gram.centred.diagonal(), 5) > 0).all()


@pytest.mark.parametrize("mean", [0.0, 10.0, 3000.0, 1e4, -1e5])
def test_what_varies_about_a_large_mean_is_kept(mean):
    X = (np.random.default_rng(0).normal(size=(5000, 6)) + mean).astype(np.float32)
    gram = comq_np.Gram(6)
    for part in np.array_split(X, 4):
        gram.update(part)
    exact = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(gram.centred, exact.T @ exact, rtol=1e-4, atol=1e-4 * len(X))
    assert_close(gram.matrix, X)


def test_one_large_batch_is_as_exact_as_many_small_ones():
    X = inputs(20_000, 24) + 5
    whole, parts = comq_np.Gram(24), comq_np.Gram(24)
    whole.update(X)
    for part in np.split(X, 100):
        parts.update(part)
    assert_close(whole.matrix, X)
    assert_close(parts.matrix, X)
    assert whole.count == parts.count == 20_000


def test_many_inputs_with_some_far_from_zero():
    X = inputs(3000, 1000)
    X[:, ::7] += 300
    gram = comq_np.Gram(1000)
    gram.update(X)
    assert_close(gram.matrix, X)
    np.testing.assert_array_equal(gram.matrix, gram.matrix.T)
    exact = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    size = np.linalg.norm(exact, axis=0)
    assert (np.abs(gram.centred - exact.T @ exact) <= 1e-4 * np.outer(size, size)).all()


def test_the_first_samples_may_differ_from_the_rest():
    X = np.random.default_rng(0).normal(size=(2048, 60)).astype(np.float32)
    X[:1000, 0] = 50  # still, until it varies about another mean
    X[:, 1] += 1e4 + np.arange(2048) / 30  # drifts
    X[130:, 2] += 1e4  # rises from zero
    X[:130, 3:] += np.geomspace(1e2, 1e4, 57)  # fall to zero
    gram = comq_np.Gram(60)
    gram.update(X, fold=0)
    assert_close(gram.matrix, X, tolerance=4e-6)
    exact = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    size = np.linalg.norm(exact, axis=0)
    assert (np.abs(gram.centred - exact.T @ exact) <= 1e-5 * np.outer(size, size)).all()


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda X: np.repeat(X, 2, axis=1)[:, ::2], lambda X: X[::-1]])
def test_any_layout_in_memory(layout):
    X = layout(inputs(3000, 20))
    gram = comq_np.Gram(20)
    gram.update(X)
    assert_folds(gram, X[:1500], X[1500:])


def of_problem(gram, p):
    """Gram of one of several problems."""
    return comq_np.Gram.from_folds(tuple((fold.matrix[p], fold.sum[p], fold.count) for fold in gram.folds))


@given(
    m=st.integers(1, 12),
    b=st.integers(1, 9),
    batches=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_several_problems_at_once_are_each_as_alone(m, b, batches, seed):
    X = inputs(sum(batches), b * m, seed).reshape(-1, b, m)
    gram, alone, start = comq_np.Gram(m, problems=b), [comq_np.Gram(m) for _ in range(b)], 0
    for count in batches:
        part = X[start : start + count]
        gram.update(part)
        for p in range(b):
            alone[p].update(part[:, p])
        start += count
    assert (gram.problems, len(gram), gram.count) == (b, m, len(X))
    assert (gram.matrix.shape, gram.centred.shape, gram.mean.shape) == ((b, m, m), (b, m, m), (b, m))
    for p in range(b):
        assert_close(gram.matrix[p], X[:, p])
        assert [fold.count for fold in of_problem(gram, p).folds] == [fold.count for fold in alone[p].folds]
        np.testing.assert_allclose(gram.mean[p], alone[p].mean, rtol=1e-5, atol=1e-6)
        size = np.abs(alone[p].matrix).max()
        np.testing.assert_allclose(gram.centred[p], alone[p].centred, rtol=1e-5, atol=1e-5 * size)
        np.testing.assert_allclose(gram.fold_matrix(0)[p], alone[p].fold_matrix(0), rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize(("b", "m"), [(3, 500), (700, 9)])
def test_many_problems_some_with_inputs_far_from_zero(b, m):
    """Wider than a panel, and so many that few samples are multiplied at a time."""
    X = inputs(400, b * m).reshape(-1, b, m)
    X[:, 1, ::4] += 3000
    X[:, 2, 0] = 7
    gram = comq_np.Gram(m, problems=b)
    gram.update(X)
    for p in (0, 1, 2, b - 1):
        assert_close(gram.matrix[p], X[:, p])
        exact = X[:, p] - X[:, p].mean(axis=0, dtype=np.float64)
        size = np.linalg.norm(exact, axis=0)
        assert (np.abs(gram.centred[p] - exact.T @ exact) <= 1e-4 * np.outer(size, size)).all()
    assert not gram.centred[2, 0].any()
    np.testing.assert_array_equal(gram.matrix, gram.matrix.transpose(0, 2, 1))


@pytest.mark.parametrize("shape", [(6, 3, 5), (6, 4, 3, 5), (6, 2, 2, 3, 5)])
def test_entries_of_the_first_axis_stay_whole_in_several_problems(shape):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    gram = comq_np.Gram(5, problems=3)
    gram.update(X)
    gram.update(X[:1], fold=1)
    rows = X.reshape(6, -1, 3, 5)
    for p in range(3):
        first, second = (rows[some, :, p].reshape(-1, 5) for some in ([0, 1, 2], [3, 4, 5, 0]))
        assert_folds(of_problem(gram, p), first, second)
    gram.update(X.reshape(-1, 3, 5)[0])  # a single sample
    assert gram.count == 7 * len(X.reshape(6, -1, 3, 5)[0]) + 1


def test_several_problems_merge_and_travel():
    X = inputs(40, 12).reshape(-1, 4, 3)
    one, two = comq_np.Gram(3, problems=4), comq_np.Gram(3, problems=4)
    one.update(X[:10], fold=0)
    two.update(X[10:])
    one.merge(pickle.loads(pickle.dumps(two)))
    for p in range(4):
        assert_close(one.matrix[p], X[:, p])
    again = comq_np.Gram.from_folds(one.folds)
    np.testing.assert_array_equal(again.matrix, one.matrix)
    assert (again.problems, again.count) == (4, 40)
    assert repr(again) == "Gram(3, problems=4, count=40)"
    assert again.nbytes == sum(fold.matrix.nbytes + fold.sum.nbytes for fold in again.folds)


def test_matrix_is_symmetric_float64():
    gram = comq_np.Gram(7)
    gram.update(inputs(50, 7))
    assert gram.matrix.dtype == gram.mean.dtype == np.float64
    assert gram.matrix.shape == (7, 7)
    np.testing.assert_array_equal(gram.matrix, gram.matrix.T)


def assert_folds(gram, *folds):
    """The folds hold just these rows each."""
    for (matrix, total, count), rows in zip(gram.folds, folds, strict=True):
        assert_close(matrix, rows)
        np.testing.assert_allclose(total, rows.sum(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-5)
        assert count == len(rows)


def test_each_half_of_the_rows_goes_to_a_fold():
    X = inputs(60, 5)
    gram = comq_np.Gram(5)
    gram.update(X)
    assert_folds(gram, X[:30], X[30:])


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 2, 2, 5)])
def test_entries_of_the_first_axis_stay_whole(shape):
    X = inputs(24, 5)
    gram = comq_np.Gram(5)
    gram.update(X.reshape(shape))
    assert_folds(gram, X[:12], X[12:])


def test_the_odd_one_goes_to_the_fold_with_fewer_samples():
    X = inputs(46, 5)
    gram = comq_np.Gram(5)
    gram.update(X[:21].reshape(3, 7, 5))  # two to fold 0, one to fold 1
    gram.update(X[21:31].reshape(5, 2, 5))  # three to fold 1, two to fold 0
    gram.update(X[31:36][None])
    gram.update(X[36:45][None])
    gram.update(X[45])
    assert_folds(gram, X[np.r_[0:14, 27:31, 36:45]], X[np.r_[14:27, 31:36, 45]])


@given(calls=st.lists(st.integers(0, 9), max_size=12))
def test_the_folds_stay_balanced(calls):
    gram = comq_np.Gram(2)
    for count in calls:
        gram.update(np.ones((count, 3, 2)))
        assert abs(gram.folds[0].count - gram.folds[1].count) in (0, 3)


def test_a_named_fold_takes_all_samples():
    X = inputs(40, 5)
    gram = comq_np.Gram(5)
    gram.update(X[:10], fold=1)
    gram.update(X[10:25], fold=0)
    gram.update(X[25:40].reshape(5, 3, 5), fold=1)
    assert_folds(gram, X[10:25], X[np.r_[0:10, 25:40]])


def test_merge_adds_fold_by_fold():
    X = inputs(40, 5)
    one, two = comq_np.Gram(5), comq_np.Gram(5)
    one.update(X[:10])
    two.update(X[10:15], fold=0)
    two.update(X[15:40], fold=1)
    before = two.matrix
    one.merge(two)
    assert_close(one.matrix, X)
    assert_folds(one, X[np.r_[0:5, 10:15]], X[np.r_[5:10, 15:40]])
    np.testing.assert_allclose(one.mean, X.mean(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(two.matrix, before)
    one.update(X)
    np.testing.assert_array_equal(two.matrix, before)


def test_merge_with_itself_doubles():
    X = inputs(10, 3)
    gram = comq_np.Gram(3)
    gram.update(X)
    before = gram.matrix
    gram.merge(gram)
    np.testing.assert_array_equal(gram.matrix, 2 * before)
    assert gram.count == 20


@pytest.mark.parametrize("shape", [(6,), (8, 6), (2, 4, 6), (3, 5, 6), (2, 2, 2, 6), (0, 6), (3, 0, 6)])
def test_leading_axes_are_samples(shape):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    gram = comq_np.Gram(6)
    gram.update(X)
    assert_close(gram.matrix, X.reshape(-1, 6))
    assert gram.count == X.size // 6


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8, ">f4"])
def test_any_real_type(dtype):
    X = np.random.default_rng(0).integers(0, 9, (30, 4)).astype(dtype)
    gram = comq_np.Gram(4)
    gram.update(X)
    np.testing.assert_array_equal(gram.matrix, X.astype(np.int64).T @ X.astype(np.int64))


def test_inputs_are_not_modified():
    X = inputs(30, 4)
    X.flags.writeable = False
    before = X.tobytes()
    gram = comq_np.Gram(4)
    gram.update(X)
    gram.update(np.asfortranarray(X)[::2])
    assert X.tobytes() == before
    assert gram.count == 45


def test_a_new_gram_is_empty():
    gram = comq_np.Gram(3)
    assert gram.count == 0
    np.testing.assert_array_equal(gram.matrix, np.zeros((3, 3)))
    np.testing.assert_array_equal(gram.mean, np.zeros(3))


def test_matrix_is_the_callers_own():
    gram = comq_np.Gram(3)
    gram.update(inputs(9, 3))
    before = gram.matrix
    gram.matrix[:] = 0
    np.testing.assert_array_equal(gram.matrix, before)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((5, 4)), r"`X` must have shape (..., 3), got (5, 4)."),
        (np.zeros(2), r"`X` must have shape (..., 3), got (2,)."),
        (np.float32(1), r"`X` must have shape (..., 3), got ()."),
        (
            [[0.0, 0.0, 0.0], [0.0, np.nan, np.inf]],
            "`X` must be finite, got 2 NaN or infinite of 6 entries, the first at (1, 1).",
        ),
        (np.zeros((2, 3), complex), "`X` must hold real numbers, got dtype complex128."),
        (np.full((1, 3), 1e30), "`X` must lie within ±1e+17, got an entry of size 1e+30."),
    ],
)
def test_refused_inputs_leave_the_gram_as_it_was(X, message):
    gram = comq_np.Gram(3)
    gram.update(inputs(9, 3))
    before, folds = gram.matrix, [fold.count for fold in gram.folds]
    with pytest.raises(comq_np.InputError) as error:
        gram.update(X)
    assert str(error.value) == message
    np.testing.assert_array_equal(gram.matrix, before)
    assert [fold.count for fold in gram.folds] == folds


@pytest.mark.parametrize("fold", [2, -1, 0.5, "even", True])
def test_refused_fold(fold):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3).update(np.zeros((2, 3)), fold=fold)
    assert str(error.value) == f"`fold` must be an integer from 0 to 1, got {fold!r}."


@pytest.mark.parametrize("folds", [3, (), (comq_np.Gram(2).folds[0],), (1, 2), [comq_np.Gram(2).folds[0]] * 3])
def test_refused_folds(folds):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram.from_folds(folds)
    assert str(error.value) == "`folds` must be two of (matrix, sum, count)."


@pytest.mark.parametrize("m", [0, -3, 2.5, None, "768"])
def test_refused_width(m):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(m)
    assert str(error.value) == f"`m` must be an integer from 1 to 536870912, got {m!r}."


def test_refused_merge():
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3).merge(comq_np.Gram(4))
    assert str(error.value) == "`other` must be a Gram of width 3, got of width 4."
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3).merge(np.eye(3))
    assert str(error.value) == "`other` must be a Gram of width 3, got 'ndarray'."
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3, problems=2).merge(comq_np.Gram(3))
    assert str(error.value) == "`other` must be a Gram of width 3 and 2 problems, got of width 3."


@pytest.mark.parametrize("problems", [0, 2.5, True, "2"])
def test_refused_problems(problems):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3, problems)
    assert str(error.value) == f"`problems` must be an integer from 1 to 536870912, got {problems!r}."


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4), (7, 3, 2), (7, 1, 3), ()])
def test_refused_inputs_of_several_problems(shape):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Gram(3, problems=2).update(np.zeros(shape))
    assert str(error.value) == f"`X` must have shape (..., 2, 3), got {shape}."


@pytest.mark.parametrize("bound", [1, 2**40])
def test_a_gram_on_pages_of_its_own_is_like_any_other(monkeypatch, bound):
    monkeypatch.setattr("comq_np.gram.OWN_PAGES", bound)
    gram, X = comq_np.Gram(5), np.arange(30.0).reshape(6, 5)
    assert not gram.matrix.any()
    gram.update(X)
    other = pickle.loads(pickle.dumps(copy.deepcopy(gram)))
    other.merge(gram)
    np.testing.assert_array_equal(other.matrix, 2 * X.T @ X)
    np.testing.assert_array_equal(gram.matrix, X.T @ X)
    fold = gram.folds[0].matrix
    del gram
    np.testing.assert_array_equal(fold, X[:3].T @ X[:3])


@pytest.mark.parametrize("m", [2**28, 2**29])
def test_a_gram_beyond_all_memory_is_refused(m):
    with pytest.raises(MemoryError):
        comq_np.Gram(m)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_of_a_gram_is_the_systems_again_when_it_is_let_go():
    before, grams = memory.resident("VmRSS"), []
    for _ in range(8):
        grams.append(comq_np.Gram(600))
        for fold in grams[-1].folds:
            fold.matrix.fill(1)
    size = sum(gram.nbytes for gram in grams)
    assert memory.resident("VmRSS") - before > 0.8 * size
    del grams, fold
    assert memory.resident("VmRSS") - before < 0.2 * size
