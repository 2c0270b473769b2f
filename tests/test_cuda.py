"""The kernels of `comq_np.cuda` without a GPU: run in an emulator of their LLVM IR, and compiled for real devices."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from requirements import require

require("cuda")

from cuda_cases import Case, cases, differs  # noqa: E402
from cuda_emulator import ORDERS, Emulator, EmulatorError  # noqa: E402

import cuda_compile  # noqa: E402
from comq_np.cuda import KERNELS  # noqa: E402

#: Kernels that do the work; the rest is done once in a solve.
STEPS = ("sweep", "pass", "tabu")
#: All of them are compiled; of those that differ in a size alone, these run.
RUN = [
    name
    for name in KERNELS
    if not name.startswith(("sweep", "tabu")) or name.split()[1] in ("32x1", "32x4", "128x4", "512x32")
]
made_for = functools.cache(cases)


@functools.cache
def emulator(name: str, contract: bool) -> Emulator:
    return Emulator(KERNELS[name].kernel, KERNELS[name].signature, contract)


def run(runner: Emulator, name: str, case: Case, order: str, races: bool = True) -> list[str]:
    """What a launch does not do as it must."""
    arguments: tuple[Any, ...] = tuple(
        value.copy() if isinstance(value, np.ndarray) else value for value in case.arguments
    )
    runner.launch(case.grid, KERNELS[name].threads, *arguments, order=order, rounds=100_000, races=races)
    return differs(case, arguments)


@pytest.mark.parametrize("contract", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("name", RUN)
def test_a_kernel_does_what_the_host_does(name, contract):
    for case in made_for(name):
        for order in ORDERS:
            assert not run(emulator(name, contract), name, case, order), f"threads in {order} order"


def breaks(runner: Emulator, name: str) -> bool:
    """Whether some launch in some order goes wrong."""
    for case in made_for(name):
        for order in ORDERS:
            try:
                if run(runner, name, case, order, races=False):
                    return True
            except EmulatorError:
                return True
    return False


@pytest.mark.parametrize("name", RUN)
def test_no_barrier_is_idle(name):
    whole = emulator(name, False)
    idle = [k for k in range(whole.barriers) if not breaks(whole.without_barrier(k), name)]
    assert not idle


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_fits_the_device(name, cc):
    kernel, signature, threads = KERNELS[name][:3]
    usage = cuda_compile.report(kernel, signature, cc)
    assert usage.spill_stores == usage.spill_loads == 0
    assert usage.shared_bytes <= 48 * 1024
    assert cuda_compile.blocks_at_once(usage, threads, cc) >= 1
    if name.startswith(STEPS):
        assert not usage.f64
