"""Post-training quantization solver: integer codes and scales that change a layer's output as little as possible."""

from comq_np.checks import FileError, InputError
from comq_np.gram import Gram
from comq_np.packing import pack_codes, unpack_codes
from comq_np.recipes import Recipe, recipe
from comq_np.result import QuantizedArray, SolveReport
from comq_np.solver import solve

__version__ = "0.1.0"

__all__ = [
    "FileError",
    "Gram",
    "InputError",
    "QuantizedArray",
    "Recipe",
    "SolveReport",
    "pack_codes",
    "recipe",
    "solve",
    "unpack_codes",
]
