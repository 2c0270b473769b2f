"""What a CUDA kernel compiles to, on a machine without a GPU: its LLVM IR, its PTX, and ptxas' report.

Everything here works from a kernel as `numba.cuda.jit` returns it, the types of its arguments, and a compute capability
such as (8, 0).
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import re
import subprocess
import tempfile
import types
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

from numba.cuda import compiler, dispatcher

WARP = 32
#: Warps, blocks and registers of a multiprocessor of either capability.
WARPS, BLOCKS, REGISTERS = 64, 32, 65536
#: Parts of a multiprocessor, each with its share of the registers.
PARTS = 4
#: Registers are given to a warp, and bytes of shared memory to a block, in multiples of these.
REGISTER_UNIT, SHARED_UNIT = 256, 128
#: Bytes of shared memory of a multiprocessor, by capability, and those that the system keeps for each block.
SHARED, RESERVED = {(8, 0): 164 * 1024, (9, 0): 228 * 1024}, 1024

Capability = tuple[int, int]


class Usage(NamedTuple):
    """What a compiled kernel takes.

    Attributes
    ----------
    registers : int
        Of each thread.
    spill_stores, spill_loads : int
        Bytes of registers that did not fit and live in memory.
    shared_bytes : int
        Shared memory of a block, without what the launch adds to it.
    f64 : bool
        Whether any instruction works in double precision.
    local_bytes : int
        Local arrays of a thread that are not in registers.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    f64: bool
    local_bytes: int


@functools.lru_cache(maxsize=256)
def to_library(kernel: Any, signature: tuple[Any, ...], cc: Capability) -> Any:
    """Numba-cuda's code library of a kernel: its LLVM IR in `llvm_strs`, the name of its function in `_entry_name`.

    Parameters
    ----------
    kernel : CUDADispatcher
        A kernel, not compiled yet or for any types.
    signature : tuple of numba types
        Types of its arguments.
    cc : (int, int)
        Compute capability.

    Returns
    -------
    CUDACodeLibrary
    """
    with device_of(cc):
        return compiler._compile_pyfunc_with_fixup(
            kernel.py_func, signature, device=False, abi="numba", **options(kernel, cc)
        )[0]


def to_ptx(kernel: Any, signature: tuple[Any, ...], cc: Capability) -> str:
    """PTX of a kernel; the parameters are those of `to_library`."""
    [code] = to_library(kernel, signature, cc).get_asm_strs(cc=cc)
    return str(code)


def device_of(cc: Capability) -> AbstractContextManager[Any]:
    """Let numba-cuda find a device of some capability, which it asks for where a kernel calls another function."""
    found = types.SimpleNamespace(compute_capability=cc)
    return mock.patch.object(dispatcher, "get_current_device", return_value=found)


def options(kernel: Any, cc: Capability) -> dict[str, Any]:
    """Options of the compiler that a kernel was declared with."""
    declared = kernel.targetoptions
    return {"cc": cc, "fastmath": declared.get("fastmath", False), "launch_bounds": declared.get("launch_bounds")}


def ptxas() -> pathlib.Path:
    """The assembler among the files of the installed packages.

    Raises
    ------
    FileNotFoundError
        When no package brings it.
    """
    for package in importlib.metadata.distributions():
        if (package.name or "").startswith("nvidia-cuda-nvcc"):
            for file in package.files or ():
                if file.stem == "ptxas":
                    return pathlib.Path(str(file.locate()))
    raise FileNotFoundError("no installed package brings ptxas; nvidia-cuda-nvcc does")


def report(kernel: Any, signature: tuple[Any, ...], cc: Capability) -> Usage:
    """Compile a kernel to machine code and read what ptxas says of it; the parameters are those of `to_library`."""
    code = to_ptx(kernel, signature, cc)
    limit = kernel.targetoptions.get("max_registers")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(code, encoding="utf-8")
        command = [ptxas(), "-v", f"-arch=sm_{cc[0]}{cc[1]}", source, "-o", source.with_suffix(".cubin")]
        command += [f"--maxrregcount={limit}"] if limit else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel: {done.stdout}{done.stderr}")
    return usage(done.stdout + done.stderr, code)


def usage(log: str, code: str) -> Usage:
    """Read ptxas' report of one kernel, and the kernel's PTX."""

    def figure(pattern: str) -> int:
        found = re.findall(pattern, log)
        return int(found[-1]) if found else 0

    return Usage(
        registers=figure(r"Used (\d+) registers"),
        spill_stores=figure(r"(\d+) bytes spill stores"),
        spill_loads=figure(r"(\d+) bytes spill loads"),
        shared_bytes=figure(r"(\d+) bytes smem"),
        f64=re.search(r"^\s[^/]*\.f64\b", code, re.MULTILINE) is not None,
        local_bytes=figure(r"(\d+) bytes stack frame"),
    )


def blocks_at_once(usage: Usage, threads: int, cc: Capability, shared_dynamic_bytes: int = 0) -> int:
    """Blocks that a multiprocessor holds at a time, by the rules of the CUDA occupancy calculator.

    Parameters
    ----------
    usage : Usage
        What the kernel takes.
    threads : int > 0
        Threads of a block.
    cc : (8, 0) or (9, 0)
        Compute capability.
    shared_dynamic_bytes : int >= 0, optional
        Shared memory that the launch adds.

    Returns
    -------
    int
    """
    warps = -(-threads // WARP)
    of_warp = rounded_up(max(usage.registers, 1) * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTS // of_warp * PARTS // warps
    by_shared = SHARED[cc] // (rounded_up(usage.shared_bytes + shared_dynamic_bytes, SHARED_UNIT) + RESERVED)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


def occupancy(usage: Usage, threads: int, cc: Capability, shared_dynamic_bytes: int = 0) -> float:
    """Share of the warps of a multiprocessor that are busy; the parameters are those of `blocks_at_once`."""
    return blocks_at_once(usage, threads, cc, shared_dynamic_bytes) * -(-threads // WARP) / WARPS


def rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
