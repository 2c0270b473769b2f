"""The backends by name, each imported when it is first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.backend import Backend
from comq_np.diagonal import Diagonal
from comq_np.host import Host
from comq_np.parallel import Workers
from comq_np.problem import Kind
from comq_np.recipes import Recipe

NOT_INSTALLED = "needs the package numba-cuda, of the extra `cuda`, which is not installed."
#: Multiplications of one product G @ W from which on "auto" takes a GPU: with fewer, launches are most of the work.
WORTH = 2**27


def chosen(
    name: str, steps: Recipe, kind: Kind, shape: tuple[int, ...], on_device: bool, pool: Workers, diagonal: bool = False
) -> tuple[Backend, list[str]]:
    """Backend for weights (b, m, n), maybe `on_device`, and a note where "auto" does without a GPU that is worth it."""
    checks.choice("backend", name, ("auto", "cpu", "cuda"))
    if diagonal:
        if name == "cuda" or on_device:
            raise checks.InputError('`backend` must be "cpu" or "auto" with TokenCounts, and `W` an array of NumPy.')
        return Diagonal(pool), []
    b, m, n = shape
    small = b * m * m * n < WORTH
    if not on_device and (name == "cpu" or (name == "auto" and small)):
        return Host(pool), []
    if name == "cpu":
        raise checks.InputError('`backend` must be "cuda" or "auto" with arrays on a GPU, got \'cpu\'.')
    lacking = device().lacking(steps, kind, shape) if installed() else NOT_INSTALLED
    if lacking is None:
        return device().Device(pool), []
    if name == "cuda" or on_device:
        raise checks.InputError(f"`backend` {name!r}: CUDA {lacking}")
    return Host(pool), [f"Solved on the CPU: CUDA {lacking}"] if installed() else []


def takes_gpu(name: str, steps: Recipe, shapes: Iterable[tuple[int, int, int]]) -> bool:
    """Whether weights (b, m, n) of one of these shapes are solved on a GPU, with that choice of a backend."""
    if name == "cpu" or not installed():
        return False
    worth = (shape for shape in shapes if name == "cuda" or math.prod(shape) * shape[1] >= WORTH)
    return any(device().lacking(steps, Kind(shape[1], False, 2, False, False), shape) is None for shape in worth)


def installed() -> bool:
    """Whether what the CUDA backend is made with is here."""
    return importlib.util.find_spec("numba_cuda") is not None


def device() -> Any:
    """Module `comq_np.gpu.device`."""
    return importlib.import_module("comq_np.gpu.device")


def weights(W: Any) -> Any:
    """Weights, checked, wherever they are."""
    if not checks.on_device(W):
        return checks.weights(W, ndim=(1, 2, 3))
    if not installed():
        raise checks.InputError(f"`W` is on a GPU: CUDA {NOT_INSTALLED}")
    return importlib.import_module("comq_np.gpu.problem").weights(W)


def on_host(values: Any) -> npt.NDArray[Any]:
    """Values in an array of NumPy."""
    return values if isinstance(values, np.ndarray) else values.copy_to_host()
