"""Threads: the same bits for any number, callable from several at once, and BLAS left as it was."""

from __future__ import annotations

import concurrent.futures
import threading

import numpy as np
import pytest
import threadpoolctl

import comq_np
from comq_np.parallel import Workers


def bits_of(q):
    """Everything of a result that must not depend on threads."""
    return (
        q.codes.tobytes(),
        q.scale.tobytes(),
        q.zero_point.tobytes(),
        None if q.bias_shift is None else q.bias_shift.tobytes(),
        q.report.objective,
        q.report.objective_rounding,
        q.report.objective_start,
        q.report.objectives,
        q.report.codes_changed,
        q.report.notes,
    )


def blas_threads():
    """BLAS libraries that NumPy may use, with their numbers of threads; SciPy's own copy is none of them."""
    libraries = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]
    return {(info["filepath"], info["num_threads"]) for info in libraries if "scipy.libs" not in info["filepath"]}


@pytest.fixture(autouse=True)
def two_blas_threads():
    """BLAS has more than one thread to be held back from, whatever `conftest` does."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        yield


@pytest.mark.parametrize("size", [None, 32, "tensor"])
@pytest.mark.parametrize("recipe", ["paper", "balanced", "rtn", "shared", "fast", "best"])
def test_the_same_bits_for_any_number_of_threads(problem, size, recipe):
    W, _, G = problem(70, 600)
    steps = comq_np.recipe("paper").replace(order="shared") if recipe == "shared" else recipe
    one = bits_of(comq_np.solve(W, G, 3, recipe=steps, group_size=size, threads=1))
    for threads in (2, 3, 7, None):
        assert bits_of(comq_np.solve(W, G, 3, recipe=steps, group_size=size, threads=threads)) == one


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_workers_map_in_order_and_on_the_calling_thread_too(threads):
    """As many threads as asked for are at work at once, and this one is among them."""
    at_work, names = threading.Barrier(threads, timeout=30), set()

    def one(item):
        if item < threads:
            at_work.wait()
            names.add(threading.current_thread())
        return item**2

    with Workers(threads) as pool:
        assert pool.map(one, range(40)) == [item**2 for item in range(40)]
        assert pool.map(one, []) == []
    assert len(names) == threads
    assert threading.current_thread() in names


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_workers_raise_the_error_of_the_first_item_and_begin_no_other(threads):
    begun = []

    def one(item):
        begun.append(item)
        if item >= 5:
            raise IndexError(item)

    with Workers(threads) as pool:
        for _ in range(20):
            begun.clear()
            with pytest.raises(IndexError, match="5"):
                pool.map(one, range(1000))
            assert len(begun) < 6 + threads
        assert pool.map(str, [1, 2, 3]) == ["1", "2", "3"]


def test_columns_do_not_depend_on_their_neighbours(problem):
    """A column gets the same answer alone, in a tile and across the edge of one."""
    W, _, G = problem(40, 300)
    whole = comq_np.solve(W, G, 3)
    for part in (slice(0, 1), slice(100, 160), slice(299, 300)):
        alone = comq_np.solve(W[:, part], G, 3)
        np.testing.assert_array_equal(alone.codes, whole.codes[:, part])
        np.testing.assert_allclose(alone.scale, whole.scale[:, part], rtol=1e-6)


def test_eight_python_threads_that_solve_two_hundred_times_each(problem):
    W, _, G = problem(30, 20)
    recipes = ("balanced", "fast", "paper", "rtn")
    expected = {recipe: bits_of(comq_np.solve(W, G, 3, recipe=recipe)) for recipe in recipes}
    together = threading.Barrier(8)

    def work(k):
        together.wait()
        return [
            bits_of(comq_np.solve(W, G, 3, recipe=recipe, threads=1 + k % 3)) == expected[recipe]
            for recipe in recipes * 50
        ]

    before = blas_threads()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert answers == [[True] * 200] * 8
    assert blas_threads() == before


def test_many_python_threads_with_several_tiles(problem):
    W, _, G = problem(60, 300)
    expected = {bits: bits_of(comq_np.solve(W, G, bits)) for bits in (2, 3, 4, 5)}
    together = threading.Barrier(8)

    def work(k):
        together.wait()
        return [(bits, bits_of(comq_np.solve(W, G, bits, threads=1 + k % 3))) for bits in (2, 3, 4, 5)]

    before = blas_threads()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for answers in pool.map(work, range(8)):
            for bits, answer in answers:
                assert answer == expected[bits]
    assert blas_threads() == before


@pytest.mark.parametrize("limit", [1, 2])
def test_blas_threads_are_given_back(problem, limit):
    W, _, G = problem(60, 200)
    with threadpoolctl.threadpool_limits(limit, user_api="blas"):
        before = blas_threads()
        assert before
        comq_np.solve(W, G, 3, threads=2)
        assert blas_threads() == before

        def stop(sweep, value):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            comq_np.solve(W, G, 3, threads=2, callback=stop)
        assert blas_threads() == before


def test_blas_is_held_to_one_thread_meanwhile(problem):
    W, _, G = problem(60, 200)
    seen = []
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        comq_np.solve(W, G, 3, callback=lambda *_: seen.append({count for _, count in blas_threads()}))
    assert seen
    assert all(counts == {1} for counts in seen)


def test_no_thread_is_left_behind(problem):
    W, _, G = problem(40, 300)
    before = threading.active_count()
    comq_np.solve(W, G, 3, threads=3)
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 1025])
def test_refused_thread_counts(problem, threads):
    W, _, G = problem(4, 2)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(W, G, threads=threads)
    assert str(error.value) == f"`threads` must be an integer from 1 to 1024, got {threads!r}."
