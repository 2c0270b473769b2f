"""One layer to solve, or one part of its columns, as plain functions that any thread, process or machine can call."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from comq_np import checks
from comq_np.durable import fingerprint
from comq_np.gram import Gram
from comq_np.modalities import NamedGrams
from comq_np.result import Solved
from comq_np.solver import solve, solve_columns
from comq_np.store import CalibrationFile, Layer, Path
from comq_np.version import __version__

#: What a layer is read with, wherever it is solved.
Read = Callable[[], Layer]
#: Options of `solve`.
Options = dict[str, Any]
#: What became of a layer: an exception, where it could not be solved.
Outcome = Solved | Exception
#: What became of some of its columns, with the objective that they would have without weights.
Piece = tuple[Solved, float] | Exception

#: Letters of a reason that are kept: a file holds no text of any length.
LONGEST = 1000

_hashing = threading.Lock()


class UnseenError(Exception):
    """A process does not see the calibration file, or another one in its place."""


class StrangerError(Exception):
    """A process has another version of comq_np, which may come to other results."""


@dataclasses.dataclass(frozen=True)
class Given:
    """A layer that comes along."""

    layer: Layer

    def __call__(self) -> Layer:
        """Return it."""
        return self.layer


@dataclasses.dataclass(frozen=True)
class Stored:
    """A layer of a calibration file with that fingerprint."""

    path: str
    content: str
    name: str

    def __call__(self) -> Layer:
        """Read it, if the file is here."""
        try:
            with _hashing:  # so that the threads of a process do it once
                found = _content(self.path, *_state(self.path))
        except OSError as error:
            raise UnseenError(f"{self.path}: {error}") from None
        if found != self.content:
            raise UnseenError(f"{self.path}: is another file here.")
        with CalibrationFile(self.path) as file:
            return file[self.name]


def _state(path: str) -> tuple[int, ...]:
    """What changes with a file."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _content(path: str, *_: int) -> str:
    return fingerprint(path)


def check(options: Options, version: str = __version__) -> None:
    """Refuse wrong options before there is any work done, by solving for a single weight."""
    if version != __version__:
        raise StrangerError(f"has {__version__}")
    gram = Gram(1)
    gram.update([[1.0]])
    solve([[1.0]], gram, **options)


def attempt(read: Read, options: Options, version: str = __version__, part: slice | None = None) -> Outcome | Piece:
    """Solve a layer, or a part of it; return what came of it, or what stopped it, which is no reason to stop others."""
    if version != __version__:
        return StrangerError(f"has {__version__}")
    try:
        layer = read()
        fit_bias = options["fit_bias"] and layer.bias is not None
        options = {**options, "fit_bias": fit_bias}
        gram, named = layer.gram, None
        if isinstance(gram, NamedGrams):
            named, gram = gram, gram.balanced(layer.weight, centred=fit_bias)
        if part is not None:
            assert isinstance(gram, Gram), "only the columns of a Gram's layer are divided"
            q, norm = solve_columns(layer.weight, gram, part, **options)
            return _judged(named, layer, q, part), norm
        return _judged(named, layer, solve(layer.weight, gram, **options))
    except Exception as error:  # whatever it is, the other layers are none the worse
        error.__traceback__ = error.__cause__ = error.__context__ = None  # which hold on to all that was at work
        return error


def _judged(named: NamedGrams | None, layer: Layer, q: Solved, part: slice = slice(None)) -> Solved:
    """The result with the errors of each named group of batches in its report."""
    if named is None:
        return q
    errors = named.errors(layer.weight, q.dequantize(), q.bias_shift, part)
    return dataclasses.replace(q, report=dataclasses.replace(q.report, modalities=errors))


def reason(error: Exception, path: Path) -> str:
    """Why a layer could not be solved, in words that name no file of this machine."""
    known = isinstance(error, checks.InputError | checks.FileError)
    text = str(error) if known else f"{type(error).__name__}: {error}".removesuffix(": ")
    text = text.removeprefix(f"{os.fspath(path)}: ").encode(errors="backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
