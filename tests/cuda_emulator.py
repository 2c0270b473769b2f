"""Run a CUDA kernel on the CPU, from the LLVM IR that numba-cuda makes of it.

Each CUDA thread is a coroutine that stops at barriers, and a scheduler decides in which order the threads of a block
run from one barrier to the next. Shared memory holds NaNs, and integers of ones, before every block. These are errors:
an access outside of the arguments, the shared memory and the thread's own arrays; two threads of a block at one place
without a barrier between them, unless both read or both are atomic; threads that wait at different barriers, or at one
while others have returned.

Threads change places at barriers only and blocks run one after another, so what goes wrong between two accesses shows
where it depends on an order: run every kernel in all three. Only what kernels of this package use is there: no shuffles
and votes, no synchronisation of warps or grids.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import cuda_coroutine
import cuda_ir
import cuda_races
import llvmlite.binding as llvm
import numpy as np
from numba import types
from numba.np import numpy_support

#: Orders in which the threads of a block, and the blocks, may run.
ORDERS = ("forward", "reverse", "random")
#: Bytes of shared memory, before a block runs: a NaN in either precision, and -1 as an integer.
POISON = 0xFF
#: Numbers for the times between two barriers, of all kernels.
NOW = itertools.count()
FAULTS = {
    cuda_coroutine.ASTRAY: "reads or writes where no array is",
    cuda_coroutine.RACE: "reads or writes what another thread writes before the next barrier, or the reverse",
}


class EmulatorError(Exception):
    """A kernel did what a GPU does not allow."""


class Emulator:
    """A kernel compiled for this machine.

    Parameters
    ----------
    kernel : CUDADispatcher
        A kernel as `numba.cuda.jit` returns it.
    signature : tuple of numba types
        Types of its arguments: arrays and numbers.
    contract : bool, optional
        Whether a product and a sum may become one operation with one rounding, as they do on a GPU.

    Attributes
    ----------
    barriers : int
        How many calls of `syncthreads` the kernel has.
    """

    def __init__(self, kernel: Any, signature: tuple[Any, ...], contract: bool = False) -> None:
        source = cuda_ir.source_of(kernel, signature)
        self.signature = signature
        self.barriers = source.barriers
        self._removed: int | None = None
        machine = machine_for(contract)
        module = llvm.parse_assembly(
            cuda_coroutine.instrumented(cuda_ir.optimised(source, machine, contract), source.entry)
        )
        module.verify()
        statics = [variable for variable in module.global_variables if "_cudapy_smem" in variable.name]
        sizes = {each.name: machine.target_data.get_abi_size(each.global_value_type) for each in statics}
        cuda_ir.optimise(module, machine)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._statics = [(self._engine.get_global_value_address(name), size) for name, size in sizes.items()]
        self._places = self._global("emu.places", ctypes.c_int32 * len(cuda_coroutine.PLACES))
        self._where = self._global("emu.where", ctypes.c_int32)
        self._fault = self._global("emu.fault", ctypes.c_int32)
        self._now = self._global("emu.now", ctypes.c_int32)
        self._global("emu.seen", ctypes.c_void_p).value = cuda_races.SEEN.ctypes.data
        self._races = self._global("emu.races", ctypes.c_void_p)
        self._ranges = self._global("emu.ranges", ctypes.c_int64 * (2 * cuda_coroutine.RANGES))
        self._count = self._global("emu.count", ctypes.c_int64)
        self._resume = self._function("emu.resume", None, ctypes.c_void_p)
        self._destroy = self._function("emu.destroy", None, ctypes.c_void_p)

    def _global(self, name: str, kind: Any) -> Any:
        return kind.from_address(self._engine.get_global_value_address(name))

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        return ctypes.PYFUNCTYPE(result, *arguments)(self._engine.get_function_address(name))

    def without_barrier(self, k: int) -> Emulator:
        """The same kernel in which no thread waits at the call of `syncthreads` number `k`, counted from 0."""
        if not 0 <= k < self.barriers:
            raise ValueError(f"`k` must be a barrier from 0 to {self.barriers - 1}, got {k}.")
        other = copy.copy(self)
        other._removed = k
        return other

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
        order: str = "forward",
        seed: int = 0,
        shared_bytes: int = 0,
        rounds: int = 1_000_000,
        races: bool = True,
    ) -> None:
        """Run the kernel.

        Parameters
        ----------
        grid, block : int or up to three ints
            Blocks, and threads of each.
        *arguments : numpy.ndarray or number
            What the kernel is called with; it changes arrays in place.
        order : {"forward", "reverse", "random"}, optional
            Who runs first, of the blocks and of the threads between two barriers.
        seed : int, optional
            Of the random order.
        shared_bytes : int >= 0, optional
            Dynamic shared memory.
        rounds : int > 0, optional
            Stops of a thread after which the kernel is taken not to end.
        races : bool, optional
            Whether a race between threads of a block is an error; if not, it may show in what the kernel makes.

        Raises
        ------
        EmulatorError
            When the kernel does what a GPU does not allow.
        """
        if order not in ORDERS:
            raise ValueError(f"`order` must be one of {', '.join(ORDERS)}, got {order!r}.")
        extents, threads = three(grid), three(block)
        dynamic = self._engine.get_global_value_address("emu.shared")
        shared = [*self._statics, (dynamic, shared_bytes)]
        if sum(size for _, size in shared) > cuda_coroutine.SHARED_LIMIT:
            raise EmulatorError(f"more than {cuda_coroutine.SHARED_LIMIT} bytes of shared memory")
        call = Call(self.signature, arguments)
        self._allow([*call.ranges, *shared])
        self._races.value = cuda_races.races.address if races else None
        kernel = self._function("emu.kernel", ctypes.c_void_p, *call.kinds)
        self._places[6:] = [*threads, *extents, shared_bytes]
        turns = Turns(order, seed)
        for place in turns.of(indices(extents)):
            self._places[3:6] = place
            for address, size in shared:
                ctypes.memset(address, POISON, size)
            self._block(kernel, call, turns, place, rounds)

    def _allow(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the kernel's checks which stretches of memory, by start and bytes, it may touch."""
        self._ranges[: 2 * len(ranges)] = list(itertools.chain.from_iterable(ranges))
        self._count.value = len(ranges)

    def _block(self, kernel: Any, call: Call, turns: Turns, place: Sequence[int], rounds: int) -> None:
        threads = indices(self._places[6:9])
        handles: dict[tuple[int, ...], int] = {}
        self._now.value = next(NOW)
        try:
            waits = {}
            for thread in turns.of(threads):
                self._enter(thread)
                handles[thread] = kernel(*call.values)
                waits[thread] = self._arrive(handles[thread], thread, place, rounds)
            for _ in range(rounds):
                self._now.value = next(NOW)
                if not self._together(waits, place):
                    return
                for thread in turns.of(threads):
                    self._enter(thread)
                    self._resume(handles[thread])
                    waits[thread] = self._arrive(handles[thread], thread, place, rounds)
            raise EmulatorError(f"block {place} has not ended after {rounds} barriers")
        finally:
            for handle in handles.values():
                self._destroy(handle)

    def _enter(self, thread: tuple[int, ...]) -> None:
        self._places[:3] = thread

    def _arrive(self, handle: int, thread: Sequence[int], place: Sequence[int], rounds: int) -> int:
        """Where a thread that has run waits, after it has passed a barrier that is removed."""
        for _ in range(rounds):
            if self._fault.value:
                fault, self._fault.value = FAULTS[self._fault.value], 0
                raise EmulatorError(f"thread {thread} of block {place} {fault}")
            if self._where.value != self._removed:
                return self._where.value
            self._resume(handle)
        raise EmulatorError(f"thread {thread} of block {place} has not stopped after {rounds} barriers")

    @staticmethod
    def _together(waits: dict[tuple[int, ...], int], place: Sequence[int]) -> bool:
        """Whether the threads of a block wait at one barrier (else all have returned)."""
        found = set(waits.values())
        if len(found) > 1:
            raise EmulatorError(
                f"block {place}: threads wait at different barriers or have returned: "
                + ", ".join(f"{where}: {sum(each == where for each in waits.values())}" for where in sorted(found))
            )
        return found != {cuda_coroutine.ENDED}


class Turns:
    """Who runs first."""

    def __init__(self, order: str, seed: int) -> None:
        self.order = order
        self.random = random.Random(seed)

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """The items in their order, which a random one draws anew at each call."""
        if self.order == "random":
            return self.random.sample(items, len(items))
        return items if self.order == "forward" else items[::-1]


class Call:
    """Arguments of a kernel as its machine code takes them: an array is a pointer, shape and strides among others.

    Attributes
    ----------
    kinds, values : list
        Types for ctypes, and values.
    ranges : list of (int, int)
        Start and bytes of each array.
    """

    def __init__(self, signature: Sequence[Any], arguments: Iterable[Any]) -> None:
        self.kinds: list[Any] = []
        self.values: list[Any] = []
        self.ranges: list[tuple[int, int]] = []
        for kind, value in zip(signature, arguments, strict=True):
            if isinstance(kind, types.Array):
                self._array(kind, value)
            else:
                number = numpy_support.as_dtype(kind).type(value)
                self.kinds.append(np.ctypeslib.as_ctypes_type(number.dtype))
                self.values.append(number.item())

    def _array(self, kind: types.Array, value: np.ndarray) -> None:
        if value.dtype != numpy_support.as_dtype(kind.dtype) or value.ndim != kind.ndim:
            raise TypeError(f"the kernel takes {kind}, got an array of {value.dtype} in {value.ndim} dimensions.")
        if kind.layout == "C" and not value.flags.c_contiguous:
            raise TypeError(f"the kernel takes {kind}, got an array that is not C-contiguous.")
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self.kinds += [pointer, pointer, long, long, pointer] + [long] * (2 * value.ndim)
        self.values += [None, None, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]
        first, last = np.lib.array_utils.byte_bounds(value)
        self.ranges.append((first, last - first if value.size else 0))


def machine_for(contract: bool) -> llvm.TargetMachine:
    """What compiles for this machine, with one operation for a product and a sum where they may be contracted."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    if not contract:
        return target.create_target_machine(opt=2, jit=True)
    if not llvm.get_host_cpu_features().get("fma"):
        raise EmulatorError("this processor cannot contract a product and a sum")
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features="+fma", opt=2, jit=True)


def three(extents: int | Sequence[int]) -> tuple[int, ...]:
    """Extents in three dimensions."""
    given = (extents,) if isinstance(extents, (int, np.integer)) else tuple(extents)
    return given + (1,) * (3 - len(given))


def indices(extents: Sequence[int]) -> list[tuple[int, ...]]:
    """All (x, y, z), x first."""
    return [place[::-1] for place in itertools.product(*(range(extent) for extent in reversed(extents)))]
