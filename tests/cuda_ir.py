"""LLVM IR of a CUDA kernel, out of NVIDIA's dialect: `source_of` a kernel, and what of it is `optimised`."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import llvmlite.binding as llvm

import cuda_compile

#: Types that a `*` may follow, once what they hold is written as `ptr`.
POINTEE = r"(?:void|half|float|double|i\d+|ptr|%\"[^\"]*\"|\[(?:[^][*]|\[[^][*]*\])*\]|\{[^{}*]*\})"
#: What llvmlite prints of a kernel that is of no use here: its target, metadata, and what tells the linker to keep it.
HEADERS = re.compile(r'^(?:target .*|!.*|@"llvm\.used".*)\n', re.MULTILINE)
DYNAMIC_SIZE = re.compile(r'asm sideeffect "mov\.u32 \$0, %dynamic_smem_size;", "=r"')
DYNAMIC_ARRAY = re.compile(r'^@"(\w+)" = external global .*\n', re.MULTILINE)
BARRIER = re.compile(r'call void @"llvm\.nvvm\.barrier0"\(\)')


class Source(NamedTuple):
    """IR of a kernel in terms of any machine: its modules, the name of its function, how many barriers it has."""

    modules: tuple[str, ...]
    entry: str
    barriers: int


@functools.lru_cache(maxsize=64)
def source_of(kernel: Any, signature: tuple[Any, ...]) -> Source:
    """IR of a kernel with arguments of some types, in terms of any machine."""
    library = cuda_compile.to_library(kernel, signature, (8, 0))
    numbers = itertools.count()
    modules = tuple(plain(text, numbers) for text in library.llvm_strs)
    return Source(modules, library._entry_name, next(numbers))


def plain(text: str, numbers: Iterator[int]) -> str:
    """Rewrite a module of numba-cuda: one address space, pointers without types, barriers that carry a number."""
    text = re.sub(r", !\w+ !\d+", "", HEADERS.sub("", text))
    text = re.sub(r" addrspace\(\d+\)", "", text).replace("addrspacecast", "bitcast")
    found = 1
    while found:
        text, found = re.subn(rf"{POINTEE}\s*\*", "ptr", text)
    # The optimiser may take an address within an array as a promise; here it is what is to be checked.
    text = re.sub(r"getelementptr (?:inbounds |nuw |nusw )+", "getelementptr ", text)
    text = re.sub(r"^(define linkonce_odr .*)\n\{", r"\1 alwaysinline\n{", text, flags=re.MULTILINE)
    # Loops stay loops: the optimiser would write some as memset or memcpy.
    text = re.sub(r"^(define .*)\n\{", r'\1 "no-builtins"\n{', text, flags=re.MULTILINE)
    text = BARRIER.sub(lambda _: f'call void @"emu.barrier"(i32 {next(numbers)})', text)
    text = text.replace('declare void @"llvm.nvvm.barrier0"()', 'declare void @"emu.barrier"(i32)')
    text = text.replace("llvm.nvvm.read.ptx.sreg.", "emu.").replace("llvm.nvvm.", "emu.")
    return dynamic_shared(text)


def dynamic_shared(text: str) -> str:
    """Let every array of dynamic shared memory start where that memory starts, and ask the emulator for its size."""
    for name in DYNAMIC_ARRAY.findall(text):
        text = text.replace(f'@"{name}"', "@emu.shared")
    text, found = re.subn(r"^@emu\.shared = external global .*\n", "", text, flags=re.MULTILINE)
    sized = DYNAMIC_SIZE.sub("@emu.dynamic", text)
    declared = "declare i32 @emu.dynamic()\n" if sized != text else ""
    return ("@emu.shared = external global i8\n" if found else "") + sized + declared


def functions() -> str:
    """Definitions of what numba-cuda leaves to libdevice and NVVM: mathematics, and atomic operations on reals.

    Threads change places at barriers only, so a load and a store are as good as one atomic operation.
    """
    lines = []
    for real, suffix, bits in (("float", "f", 32), ("double", "", 64)):
        for name, intrinsic, arguments in MATH:
            given = ", ".join(f"{real} %{k}" for k in range(arguments))
            lines.append(f"declare {real} @llvm.{intrinsic}.f{bits}({', '.join([real] * arguments)})")
            lines.append(f"define linkonce_odr {real} @__nv_{name}{suffix}({given}) alwaysinline {{")
            lines.append(f"  %r = call {real} @llvm.{intrinsic}.f{bits}({given})\n  ret {real} %r\n}}")
        for name, step in ATOMICS:
            title = f"___numba_atomic_{real}_{name}" if name != "add" else f"emu.atomic.load.add.f{bits}.p0f{bits}"
            lines.append(f'define linkonce_odr {real} @"{title}"(ptr %p, {real} %v) alwaysinline {{')
            at = f"ptr %p monotonic, align {bits // 8}"
            lines.append(f"  %old = load atomic {real}, {at}\n{step.format(real)}")
            lines.append(f"  store atomic {real} %new, {at}\n  ret {real} %old\n}}")
    return "\n".join(lines)


#: Names in libdevice (with an f for single precision) and in LLVM, and how many arguments there are.
MATH = [
    ("fmax", "maxnum", 2),
    ("fmin", "minnum", 2),
    ("fabs", "fabs", 1),
    ("sqrt", "sqrt", 1),
    ("rint", "rint", 1),
    ("floor", "floor", 1),
    ("ceil", "ceil", 1),
    ("trunc", "trunc", 1),
    ("fma", "fma", 3),
]
#: The least and largest stay as they are where either number is a NaN, as numba-cuda has it.
ATOMICS = [
    ("add", "  %new = fadd {} %old, %v"),
    ("sub", "  %new = fsub {} %old, %v"),
    ("max", "  %c = fcmp olt {0} %old, %v\n  %new = select i1 %c, {0} %v, {0} %old"),
    ("min", "  %c = fcmp ogt {0} %old, %v\n  %new = select i1 %c, {0} %v, {0} %old"),
]


def optimised(source: Source, machine: llvm.TargetMachine, contract: bool) -> str:
    """One module of everything, optimised while the barriers are still calls of something unknown."""
    texts = [*source.modules, functions()]
    if contract:
        texts = [re.sub(r" = (fmul|fadd|fsub) ", r" = \1 contract ", text) for text in texts]
    module = llvm.parse_assembly(texts[0])
    for text in texts[1:]:
        module.link_in(llvm.parse_assembly(text))
    optimise(module, machine)
    return str(module)


def optimise(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Optimise without vectors, whose accesses would be checked as one."""
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
