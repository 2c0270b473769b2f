"""The emulator and the compiler's report, on kernels that are small enough to see through."""

from __future__ import annotations

import numpy as np
import pytest
from requirements import require

require("cuda")

from cuda_emulator import ORDERS, Emulator, EmulatorError  # noqa: E402
from numba import cuda, float32, float64, int32, int64, types  # noqa: E402

import cuda_compile  # noqa: E402

THREADS = 8
VECTOR = types.Array(types.float32, 1, "C")
ANY = types.Array(types.float32, 2, "A")
WIDE = types.Array(types.float64, 1, "C")
LONG = types.Array(types.int64, 1, "C")


@cuda.jit
def block_sum(values, sums):
    part = cuda.shared.array(THREADS, float32)
    t = cuda.threadIdx.x
    part[t] = values[cuda.blockIdx.x * THREADS + t]
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            part[t] += part[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        sums[cuda.blockIdx.x] = part[t]


@cuda.jit
def least(values, found):
    least_one = cuda.shared.array(1, int64)
    t = cuda.threadIdx.x
    if t == 0:
        least_one[0] = 2**62
    cuda.syncthreads()
    cuda.atomic.min(least_one, 0, values[t])
    cuda.syncthreads()
    found[t] = values[t] == least_one[0]


@cuda.jit
def turned(source, target):
    tile = cuda.shared.array((4, 4), float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    i, j = cuda.blockIdx.y * 4 + y, cuda.blockIdx.x * 4 + x
    if i < source.shape[0] and j < source.shape[1]:
        tile[y, x] = source[i, j]
    cuda.syncthreads()
    i, j = cuda.blockIdx.x * 4 + y, cuda.blockIdx.y * 4 + x
    if i < target.shape[0] and j < target.shape[1]:
        target[i, j] = tile[x, y]


@cuda.jit
def residue(a, b, c, made):
    t = cuda.threadIdx.x
    made[t] = a[t] * b[t] - c[t]


@cuda.jit
def dynamic(values):
    memory = cuda.shared.array(0, float32)
    t = cuda.threadIdx.x
    memory[t] = values[t]
    cuda.syncthreads()
    values[t] = memory[memory.size - 1 - t]


@cuda.jit
def divergent(values):
    if values[cuda.threadIdx.x] > 0:
        cuda.syncthreads()
    values[cuda.threadIdx.x] = 0


@cuda.jit
def all_write_shared(values):
    one = cuda.shared.array(1, float32)
    one[0] = 1
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        values[0] = one[0]


@cuda.jit
def all_write(values):
    values[0] = 1


@cuda.jit
def astray(values, k):
    values[k] = 1


@cuda.jit
def lost_in_own_array(values, k):
    mine = cuda.local.array(4, float32)
    for i in range(4):
        mine[i] = values[i]
    mine[k] = 1
    values[0] = mine[values.size % 4]


@cuda.jit
def endless(values):
    while values[0] == 0:
        cuda.syncthreads()


@cuda.jit
def atomics(values, extremes):
    cuda.atomic.add(extremes, 0, values[cuda.threadIdx.x])
    cuda.atomic.max(extremes, 1, values[cuda.threadIdx.x])
    cuda.atomic.min(extremes, 2, values[cuda.threadIdx.x])


@cuda.jit
def uninitialised(made):
    real, whole = cuda.shared.array(1, float64), cuda.shared.array(1, int32)
    made[0] = real[0]
    made[1] = whole[0]


def summed(emulator, order, **options):
    values, sums = np.arange(24, dtype=np.float32), np.zeros(3, np.float32)
    emulator.launch(3, THREADS, values, sums, order=order, **options)
    return np.array_equal(sums, values.reshape(3, 8).sum(axis=1))


def found_least(emulator, order, **options):
    values, found = np.array([5, 7, 2**40, -3, 6, 9, 8, 4]), np.zeros(THREADS, np.int64)
    emulator.launch(1, THREADS, values, found, order=order, **options)
    return found.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def transposed(emulator, order, **options):
    source = np.arange(120, dtype=np.float32).reshape(10, 12)[::2, 1::2]
    target = np.zeros((12, 5), np.float32)[::-2]
    emulator.launch((2, 2), (4, 4), source, target, order=order, **options)
    return np.array_equal(target, source.T)


EXAMPLES = {
    "sum": (block_sum, (VECTOR, VECTOR), summed, 2),
    "least": (least, (LONG, LONG), found_least, 2),
    "turned": (turned, (ANY, ANY), transposed, 1),
}


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_answers_in_every_order(name, contract):
    kernel, signature, right, barriers = EXAMPLES[name]
    emulator = Emulator(kernel, signature, contract)
    assert emulator.barriers == barriers
    assert all(right(emulator, order) for order in ORDERS)


@pytest.mark.parametrize(
    ("name", "barrier"), [(name, k) for name, (*_, barriers) in EXAMPLES.items() for k in range(barriers)]
)
def test_every_barrier_is_missed(name, barrier):
    kernel, signature, right, _ = EXAMPLES[name]
    emulator = Emulator(kernel, signature)
    assert not all(right(emulator.without_barrier(barrier), order, races=False) for order in ORDERS)
    for order in ORDERS:
        with pytest.raises(EmulatorError, match="another thread"):
            right(emulator.without_barrier(barrier), order)
    assert right(emulator, "forward"), "the kernel itself is as it was"


@pytest.mark.parametrize(("real", "kind"), [(np.float32, VECTOR), (np.float64, WIDE)])
def test_contraction_shows(real, kind):
    tiny = np.finfo(real).eps
    a, made = np.full(4, 1 + tiny, real), np.zeros(4, real)
    rounded = a * a
    for contract, want in ((False, 0.0), (True, tiny**2)):
        Emulator(residue, (kind, kind, kind, kind), contract).launch(1, 4, a, a, rounded, made)
        assert np.array_equal(made, np.full(4, want, real))


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    values = np.arange(6, dtype=np.float32)
    Emulator(dynamic, (VECTOR,)).launch(1, 6, values, shared_bytes=24)
    assert np.array_equal(values, np.arange(6)[::-1])


@pytest.mark.parametrize(("real", "kind"), [(np.float32, VECTOR), (np.float64, WIDE)])
def test_atomics_on_reals(real, kind):
    values, extremes = np.array([3, -1, 5, 2], real), np.zeros(3, real)
    Emulator(atomics, (kind, kind)).launch(1, 4, values, extremes)
    assert extremes.tolist() == [9, 5, -1]


def test_shared_memory_starts_as_poison():
    made = np.zeros(2)
    Emulator(uninitialised, (WIDE,)).launch(1, 1, made)
    assert np.isnan(made[0])
    assert made[1] == -1


@pytest.mark.parametrize("order", ORDERS)
def test_a_divergent_barrier_is_an_error_and_leaves_nothing_behind(order):
    emulator = Emulator(divergent, (VECTOR,))
    for _ in range(3):
        with pytest.raises(EmulatorError, match="different barriers or have returned"):
            emulator.launch(1, 4, np.array([1, 0, 0, 1], np.float32), order=order)
    values = np.ones(4, np.float32)
    emulator.launch(1, 4, values, order=order)
    assert not values.any()


@pytest.mark.parametrize("kernel", [all_write_shared, all_write])
def test_a_race_is_an_error_though_the_answer_is_right(kernel):
    values = np.zeros(1, np.float32)
    with pytest.raises(EmulatorError, match="another thread"):
        Emulator(kernel, (VECTOR,)).launch(1, 2, values)
    Emulator(kernel, (VECTOR,)).launch(1, 2, values, races=False)
    assert values == 1


@pytest.mark.parametrize("kernel", [astray, lost_in_own_array])
@pytest.mark.parametrize("k", [-5, 4, 2**40])
def test_an_access_outside_is_an_error(kernel, k):
    guarded = np.zeros(6, np.float32)
    emulator = Emulator(kernel, (VECTOR, types.int64))
    emulator.launch(1, 1, guarded[1:5], 2)
    before = guarded.copy()
    with pytest.raises(EmulatorError, match="where no array is"):
        emulator.launch(1, 1, guarded[1:5], k)
    assert np.array_equal(guarded[[0, 5]], before[[0, 5]])


def test_a_kernel_that_does_not_end_is_an_error():
    emulator = Emulator(endless, (VECTOR,))
    for each in (emulator, emulator.without_barrier(0)):
        with pytest.raises(EmulatorError, match="after 50 barriers"):
            each.launch(1, 2, np.zeros(1, np.float32), rounds=50)


def test_arguments_are_those_of_the_signature():
    emulator = Emulator(astray, (VECTOR, types.int64))
    for wrong in (np.zeros(2), np.zeros((2, 2), np.float32), np.zeros(4, np.float32)[::2]):
        with pytest.raises(TypeError, match="the kernel takes"):
            emulator.launch(1, 1, wrong, 0)


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_report(cc):
    usage = cuda_compile.report(block_sum, (VECTOR, VECTOR), cc)
    assert usage.shared_bytes == 4 * THREADS
    assert 0 < usage.registers <= 40
    assert usage.spill_stores == usage.spill_loads == usage.local_bytes == 0
    assert not usage.f64
    assert cuda_compile.report(residue, (WIDE, WIDE, WIDE, WIDE), cc).f64


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "cc", "blocks"),
    [
        (32, 0, 256, (8, 0), 8),
        (40, 16, 128, (9, 0), 12),
        (72, 16, 512, (9, 0), 1),
        (65, 0, 256, (8, 0), 3),
        (16, 0, 32, (8, 0), 32),
        (16, 48 * 1024, 32, (8, 0), 3),
        (16, 48 * 1024, 32, (9, 0), 4),
        (255, 0, 512, (8, 0), 0),
    ],
)
def test_occupancy(registers, shared, threads, cc, blocks):
    usage = cuda_compile.Usage(registers, 0, 0, shared, False, 0)
    assert cuda_compile.blocks_at_once(usage, threads, cc) == blocks
    assert cuda_compile.occupancy(usage, threads, cc) == blocks * threads / 32 / 64
