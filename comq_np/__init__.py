"""Post-training quantization solver: integer codes and scales that change a layer's output as little as possible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from comq_np.activations import ActivationGrid, Histogram, activation_grid
from comq_np.certify import certify
from comq_np.channels import ChannelGrid, ChannelHistogram, channel_grid
from comq_np.checks import FileError, InputError
from comq_np.convolution import patches, transposed_patches
from comq_np.counts import TokenCounts
from comq_np.cross import matched_weights
from comq_np.crossgram import CrossGram
from comq_np.exact import Certificate
from comq_np.gram import Gram
from comq_np.memory import estimate
from comq_np.modalities import NamedGrams
from comq_np.packing import pack_codes, unpack_codes
from comq_np.planning import CalibrationPass, CalibrationPlan, plan_calibration
from comq_np.recipes import Recipe, recipe
from comq_np.result import PlaneArray, QuantizedArray, SolveReport
from comq_np.solver import solve
from comq_np.version import __version__
from comq_np.widths import layer_bits

if TYPE_CHECKING:
    from comq_np.allocation import Allocation, allocate_bits
    from comq_np.merge import merge_files
    from comq_np.pipeline import Reports, quantize_file
    from comq_np.store import (
        CalibrationFile,
        CalibrationWriter,
        Layer,
        QuantizedFile,
        QuantizedWriter,
        load_gram,
        save_gram,
    )
    from comq_np.verify import Verification, verify_file

__all__ = [
    "ActivationGrid",
    "Allocation",
    "CalibrationFile",
    "CalibrationPass",
    "CalibrationPlan",
    "CalibrationWriter",
    "Certificate",
    "ChannelGrid",
    "ChannelHistogram",
    "CrossGram",
    "FileError",
    "Gram",
    "Histogram",
    "InputError",
    "Layer",
    "NamedGrams",
    "PlaneArray",
    "QuantizedArray",
    "QuantizedFile",
    "QuantizedWriter",
    "Recipe",
    "Reports",
    "SolveReport",
    "TokenCounts",
    "Verification",
    "__version__",
    "activation_grid",
    "allocate_bits",
    "certify",
    "channel_grid",
    "estimate",
    "layer_bits",
    "load_gram",
    "matched_weights",
    "merge_files",
    "pack_codes",
    "patches",
    "plan_calibration",
    "quantize_file",
    "recipe",
    "save_gram",
    "solve",
    "transposed_patches",
    "unpack_codes",
    "verify_file",
]

# What works on files needs h5py, so it is imported when first asked for.
_LAZY = {
    "Allocation": "allocation",
    "allocate_bits": "allocation",
    "CalibrationFile": "store",
    "CalibrationWriter": "store",
    "Layer": "store",
    "QuantizedFile": "store",
    "QuantizedWriter": "store",
    "load_gram": "store",
    "save_gram": "store",
    "merge_files": "merge",
    "Reports": "pipeline",
    "Verification": "verify",
    "quantize_file": "pipeline",
    "verify_file": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"comq_np.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
