"""A kernel's optimised LLVM IR, changed so that a CPU runs it thread by thread: what `cuda_emulator` compiles.

`instrumented` puts a check before every access to memory, and makes the kernel a coroutine that stops at its barriers.
"""

from __future__ import annotations

import re

import cuda_races

#: Bytes of shared memory that a launch may have.
SHARED_LIMIT = 48 * 1024
#: Stretches of memory that a kernel may be given.
RANGES = 64
#: What a thread reports when it has returned, in place of the number of the barrier where it waits.
ENDED = -1
#: What a check finds wrong: no array is there, or another thread may be there at the same time.
ASTRAY, RACE = 1, 2
#: Where a thread is, in the order in which the kernel's registers are kept; last the bytes of dynamic shared memory.
PLACES = [f"{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"] + ["dynamic"]

NAME = r"[%@](?:\"[^\"]*\"|[^\s,()]+)"
TYPE = r"(?:<[^<>]*>|\{[^{}]*\}|\[[^][]*\]|\w+)"
POINTER = rf"(?:{NAME}|(?:getelementptr|inttoptr) [^()]*\([^()]*\)|null|poison|undef)"
ACCESSES = [
    re.compile(rf"^  (?P<before>{NAME} = load (?:atomic |volatile )*(?P<type>{TYPE}), )ptr (?P<pointer>{POINTER})"),
    re.compile(
        rf"^  (?P<before>store (?:atomic |volatile )*(?P<type>{TYPE}) .+?, )ptr (?P<pointer>{POINTER})(?=[, ]|$)"
    ),
    re.compile(rf"^  (?P<before>{NAME} = atomicrmw .*?)ptr (?P<pointer>{POINTER})(?=, (?P<type>{TYPE}))"),
    re.compile(rf"^  (?P<before>{NAME} = cmpxchg .*?)ptr (?P<pointer>{POINTER})(?=, (?P<type>{TYPE}))"),
]
ACCESS = re.compile(r"^  (?:\S+ = (?:load|atomicrmw|cmpxchg) |store )")
BULK = re.compile(r"^  (?:tail )?call void @llvm\.mem\w+\S*\((?P<given>.*?)\)(?: #\d+)?$")
ALLOCA = re.compile(rf"^  ({NAME}) = alloca ({TYPE})")
DERIVED = re.compile(rf"^  ({NAME}) = getelementptr .*?, ptr ({NAME}),")
CHOSEN = re.compile(rf"^  ({NAME}) = (?:phi|select)\b.*\bptr\b")


def instrumented(text: str, entry: str) -> str:
    """Check every access of an optimised module, and make its kernel a coroutine."""
    head, kernel, tail = split_kernel(text, entry)
    if "emu.barrier" in re.sub(r"declare .*emu\.barrier.*", "", head + tail):
        raise NotImplementedError("a barrier in a device function that is not inlined")
    declared = re.compile(r"^(?:declare .*@\"?emu\.|@emu\.shared =).*\n", re.MULTILINE)
    return declared.sub("", head) + "\n".join(coroutine(checked(kernel))) + declared.sub("", tail) + runtime()


def split_kernel(text: str, entry: str) -> tuple[str, list[str], str]:
    """What is before the kernel's function, its lines, and what is after it."""
    start = re.search(rf'^define [^\n]*@"?{re.escape(entry)}"?\(', text, re.MULTILINE).start()
    end = text.index("\n}", start) + 2
    others = re.findall(r"^define .*", text[:start] + text[end:], re.MULTILINE)
    if any("linkonce_odr" not in line for line in others):
        raise NotImplementedError(f"functions beside the kernel: {others}")
    return text[:start], text[start:end].split("\n"), text[end:]


def checked(lines: list[str]) -> list[str]:
    """Put a check before each access; one that fails goes to a spare place instead and is reported."""
    home = locals_of(lines)
    made: list[str] = []
    for number, line in enumerate(lines):
        bulk = BULK.match(line)
        found = next((match for match in (pattern.match(line) for pattern in ACCESSES) if match), None)
        if bulk:
            raise NotImplementedError(f"memory set or copied as a whole: {line}")
        if found is None:
            if ACCESS.match(line):
                raise NotImplementedError(f"an access of unknown form: {line}")
            made.append(line)
            continue
        size, pointer = size_of(found["type"]), found["pointer"]
        if pointer in home:
            base, extent = home[pointer]
            check = f"@emu.check_local(ptr {pointer}, i64 {size}, ptr {base}, i64 {extent})"
        else:
            check = f"@emu.check(ptr {pointer}, i64 {size}, i32 {kind_of(found['before'])})"
        made.append(f"  %emu.{number} = call ptr {check}")
        made.append(f"  {found['before']}ptr %emu.{number}{line[found.end() :]}")
    return made


def locals_of(lines: list[str]) -> dict[str, tuple[str, str]]:
    """Pointers into a thread's own arrays: for each the array and its bytes."""
    home = {}
    for line in lines:
        if found := ALLOCA.match(line):
            home[found[1]] = (found[1], size_of(found[2]))
    grown = -1
    while grown != len(home):  # blocks are in no order, so an address may come before what it is derived from
        grown = len(home)
        for line in lines:
            if (found := DERIVED.match(line)) and found[2] in home:
                home[found[1]] = home[found[2]]
            elif (found := CHOSEN.match(line)) and any(name in home for name in re.findall(NAME, line)[1:]):
                raise NotImplementedError(f"a choice between local arrays: {line}")
    return home


def kind_of(access: str) -> int:
    """How an instruction accesses memory."""
    if " = load " in access and " atomic " not in access:
        return cuda_races.READ
    return cuda_races.WRITE if access.startswith("store ") and " atomic " not in access else cuda_races.ATOMIC


def size_of(kind: str) -> str:
    return f"ptrtoint (ptr getelementptr ({kind}, ptr null, i32 1) to i64)"


def coroutine(lines: list[str]) -> list[str]:
    """Make a kernel a coroutine: it stops at each barrier, and once more when it is done."""
    made: list[str] = [header(lines[0])]
    after: dict[str, str] = {}  # block that a barrier divides -> its last part, which is what follows it
    label = ""
    for line in lines[1:-1]:
        if found := re.match(r'^("[^"]*"|[^\s:]+):', line):
            label = found[1]
            made.append(line)
            made += PROLOGUE if len(made) == 2 else []
        elif found := re.match(r"^  (?:tail )?call void @emu\.barrier\(i32 (.*?)\)", line):
            after[label] = f"emu.after.{len(made)}"
            made += [
                f"  store i32 {found[1]}, ptr @emu.where",
                f"  %emu.stop.{len(made)} = call i8 @llvm.coro.suspend(token none, i1 false)",
                f"  switch i8 %emu.stop.{len(made)}, label %emu.suspend [ i8 0, label %{after[label]}",
                "    i8 1, label %emu.cleanup ]",
                f"{after[label]}:",
            ]
        else:
            made.append("  br label %emu.end" if line == "  ret void" else line)
    return [renamed(line, after) for line in made] + EPILOGUE


def header(line: str) -> str:
    """The first line of the coroutine: the kernel's arguments without what the optimiser found out about them."""
    given = re.findall(rf"\b(ptr|i\d+|float|double)\b[^%]*?({NAME})", line[line.index("(") :])
    return f"define ptr @emu.kernel({', '.join(map(' '.join, given))}) presplitcoroutine {{"


def renamed(line: str, after: dict[str, str]) -> str:
    """Let a phi that follows a divided block name its last part."""
    if " = phi " not in line:
        return line
    return re.sub(r', %("[^"]*"|\S+) \]', lambda found: f", %{after.get(found[1], found[1])} ]", line)


PROLOGUE = [
    "  %emu.id = call token @llvm.coro.id(i32 0, ptr null, ptr null, ptr null)",
    "  %emu.size = call i64 @llvm.coro.size.i64()",
    "  %emu.memory = call ptr @malloc(i64 %emu.size)",
    "  %emu.handle = call ptr @llvm.coro.begin(token %emu.id, ptr %emu.memory)",
]

EPILOGUE = f"""\
emu.end:
  store i32 {ENDED}, ptr @emu.where
  %emu.last = call i8 @llvm.coro.suspend(token none, i1 true)
  switch i8 %emu.last, label %emu.suspend [ i8 0, label %emu.never
    i8 1, label %emu.cleanup ]
emu.never:
  unreachable
emu.cleanup:
  %emu.freed = call ptr @llvm.coro.free(token %emu.id, ptr %emu.handle)
  call void @free(ptr %emu.freed)
  br label %emu.suspend
emu.suspend:
  call void @llvm.coro.end(ptr %emu.handle, i1 false, token none)
  ret ptr %emu.handle
}}""".split("\n")


def runtime() -> str:
    """What an instrumented kernel calls."""
    parts = [RUNTIME]
    for k, place in enumerate(PLACES):
        parts.append(f'define i32 @"emu.{place}"() alwaysinline {{')
        parts.append(f"  %p = getelementptr i32, ptr @emu.places, i64 {k}\n  %v = load i32, ptr %p\n  ret i32 %v\n}}")
    return "\n".join(parts)


RUNTIME = f"""
declare token @llvm.coro.id(i32, ptr, ptr, ptr)
declare i64 @llvm.coro.size.i64()
declare ptr @llvm.coro.begin(token, ptr)
declare i8 @llvm.coro.suspend(token, i1)
declare ptr @llvm.coro.free(token, ptr)
declare void @llvm.coro.end(ptr, i1, token)
declare void @llvm.coro.resume(ptr)
declare void @llvm.coro.destroy(ptr)
declare ptr @malloc(i64)
declare void @free(ptr)
@emu.places = global [{len(PLACES)} x i32] zeroinitializer
@emu.where = global i32 0
@emu.fault = global i32 0
@emu.spare = global [64 x i8] zeroinitializer
@emu.shared = global [{SHARED_LIMIT} x i8] zeroinitializer, align 16
@emu.ranges = global [{RANGES} x [2 x i64]] zeroinitializer
@emu.count = global i64 0
@emu.now = global i32 0
@emu.seen = global ptr null
@emu.races = global ptr null
define void @emu.resume(ptr %handle) {{
  call void @llvm.coro.resume(ptr %handle)
  ret void
}}
define void @emu.destroy(ptr %handle) {{
  call void @llvm.coro.destroy(ptr %handle)
  ret void
}}
define ptr @emu.check(ptr %pointer, i64 %size, i32 %kind) noinline {{
entry:
  %count = load i64, ptr @emu.count
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k1, %look ]
  %k1 = add i64 %k, 1
  %all = icmp uge i64 %k, %count
  br i1 %all, label %outside, label %look
look:
  %start.p = getelementptr [2 x i64], ptr @emu.ranges, i64 %k, i64 0
  %extent.p = getelementptr [2 x i64], ptr @emu.ranges, i64 %k, i64 1
  %start = load ptr, ptr %start.p
  %extent = load i64, ptr %extent.p
  %within = call i1 @emu.within(ptr %pointer, i64 %size, ptr %start, i64 %extent)
  br i1 %within, label %inside, label %next
inside:
  %races = load ptr, ptr @emu.races
  %off = icmp eq ptr %races, null
  br i1 %off, label %good, label %watch
watch:
  %thread = call i32 @emu.thread()
  %now = load i32, ptr @emu.now
  %seen = load ptr, ptr @emu.seen
  %race = call i32 %races(ptr %seen, ptr %pointer, i32 %kind, i32 %thread, i32 %now)
  %bad = icmp ne i32 %race, 0
  br i1 %bad, label %raced, label %good
raced:
  store i32 {RACE}, ptr @emu.fault
  br label %good
good:
  ret ptr %pointer
outside:
  %place = call ptr @emu.astray(ptr %pointer)
  ret ptr %place
}}
define i32 @emu.thread() alwaysinline {{
  %x = call i32 @emu.tid.x()
  %y = call i32 @emu.tid.y()
  %z = call i32 @emu.tid.z()
  %y1 = shl i32 %y, 10
  %z1 = shl i32 %z, 20
  %xy = or i32 %x, %y1
  %xyz = or i32 %xy, %z1
  ret i32 %xyz
}}
define ptr @emu.check_local(ptr %pointer, i64 %size, ptr %start, i64 %extent) noinline {{
  %within = call i1 @emu.within(ptr %pointer, i64 %size, ptr %start, i64 %extent)
  br i1 %within, label %inside, label %outside
inside:
  ret ptr %pointer
outside:
  %place = call ptr @emu.astray(ptr %pointer)
  ret ptr %place
}}
define i1 @emu.within(ptr %pointer, i64 %size, ptr %start, i64 %extent) alwaysinline {{
  %address = ptrtoint ptr %pointer to i64
  %first = ptrtoint ptr %start to i64
  %offset = sub i64 %address, %first
  %room = sub i64 %extent, %size
  %fits = icmp ule i64 %size, %extent
  %early = icmp ule i64 %offset, %room
  %within = and i1 %fits, %early
  ret i1 %within
}}
define ptr @emu.astray(ptr %pointer) {{
  store i32 {ASTRAY}, ptr @emu.fault
  ret ptr @emu.spare
}}
"""
