"""What is written stays written: complete files put in their place, and the locked folder of a file in the making."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping

import filelock

from comq_np import checks

#: What identifies a run: by name, whatever its result depends on.
Run = Mapping[str, object]

LOCK, RECORD, PARTIAL = "lock", "run.json", ".partial"
#: What systems say that cannot sync a folder.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
#: Most differences of two runs that a message lists, and longest value that it shows whole.
FEW, LONG = 3, 40


def put(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Move a complete file to its place; afterwards its content and its name are on the disk."""
    with partial.open("r+b") as file:  # Windows refuses to sync what is open for reading
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    if os.name == "nt":
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


class Folder:
    """Folder beside a file in the making, for one writer at a time; what it holds is on the disk when it is complete.

    The folder of a run is kept when the writer stops early, and opened again by a writer of the same run. The lock
    vanishes with its holder, whatever ends that.
    """

    def __init__(self, path: pathlib.Path, run: Run | None, restart: bool) -> None:
        self.place = path.with_name(f".{path.name}.parts")
        self._path = path
        self._lock = filelock.FileLock(self.place / LOCK, blocking=False, thread_local=False)
        self.place.mkdir(exist_ok=True)
        try:
            self._lock.acquire()
        except (filelock.Timeout, FileNotFoundError):  # the latter where its holder removes it at this moment
            raise checks.FileError(f"{path}: cannot be written: another process is writing it.") from None
        except BaseException:
            with contextlib.suppress(OSError):
                self.place.rmdir()
            raise
        try:
            self._begin(run, restart)
            parts = self.parts
            self._numbers = itertools.count(_number(parts[-1]) + 1 if parts else 0)
        except BaseException:
            self.leave()
            raise

    def _begin(self, run: Run | None, restart: bool) -> None:
        """Clear what was left behind, unless it is of this run."""
        if restart or not self.kept:
            self._clear()
            if run is not None:
                self._record(run)
            sync_folder(self.place.parent)
            return
        before = self._recorded()
        if run != before:
            raise checks.FileError(
                f"{self._path}: cannot be written: {self.place} keeps {_layers(self.kept)} of another run"
                f"{_difference(before, run)}. Finish that run, or drop what it has finished: by `restart=True`, by "
                "--restart on the command line, or by deleting the folder."
            )
        for partial in self.place.glob(f"*{PARTIAL}"):
            partial.unlink()

    @property
    def parts(self) -> list[pathlib.Path]:
        """Finished layers, in the order of their numbers."""
        return sorted(self.place.glob("layer-*.h5"), key=_number)

    @property
    def kept(self) -> int:
        """Number of finished layers that a writer of the same run can go on from."""
        return len(self.parts) if (self.place / RECORD).exists() else 0

    def next_part(self) -> pathlib.Path:
        """Place of the next layer."""
        return self.place / f"layer-{next(self._numbers)}.h5"

    def leave(self) -> str | None:
        """Let the folder go, and say what is in it for the same run; it is removed where that is nothing."""
        kept = self.kept
        if not kept:
            self.remove()
            return None
        self._lock.release()
        return f"{_layers(kept)} finished so far, kept in {self.place}: the same run, started again, goes on there"

    def remove(self) -> None:
        """Remove the folder and let it go; what stops that is no news."""
        lock = self.place / LOCK
        try:
            with contextlib.suppress(OSError):
                self._clear()
                if os.name != "nt":  # which refuses to remove what is open
                    lock.unlink()
        finally:
            self._lock.release()
        with contextlib.suppress(OSError):
            if os.name == "nt":
                lock.unlink()
            self.place.rmdir()

    def _clear(self) -> None:
        """Remove what is in it, first the record, without which the rest is kept for nobody."""
        (self.place / RECORD).unlink(missing_ok=True)
        for entry in self.place.iterdir():
            if entry.name != LOCK:
                entry.unlink()

    def _record(self, run: Run) -> None:
        partial = self.place / f"{RECORD}{PARTIAL}"
        partial.write_text(json.dumps(run), encoding="utf-8")
        put(partial, self.place / RECORD)

    def _recorded(self) -> Run:
        try:
            run = json.loads((self.place / RECORD).read_text(encoding="utf-8"))
        except ValueError:
            run = None
        if not isinstance(run, dict):
            raise checks.FileError(f"{self.place / RECORD}: must hold JSON; delete the folder to start afresh.")
        return run


def _number(part: pathlib.Path) -> int:
    return int(part.stem.removeprefix("layer-"))


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _difference(before: Run, now: Run | None) -> str:
    """What is not the same in another run, as the continuation of a sentence."""
    if now is None:
        return ""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = [f"{name} was {_shown(before, name)}, not {_shown(now, name)}" for name in names[:FEW]]
    more = [f"{len(names) - FEW} more differ"] if len(names) > FEW else []
    return f" ({'; '.join(found + more)})"


def _shown(run: Run, name: str) -> str:
    text = json.dumps(run.get(name), ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[:LONG]}..."
