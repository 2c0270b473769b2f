"""The HDF5 files: calibration in, quantized arrays out.

Every file has the attributes ``format`` (a name), ``version`` (an integer, 1 for all three formats below) and
``software`` at its root. Groups of layers and of Grams are numbered from 0 in the order they were added; a layer's
name is an attribute, since it may be any text. All numbers are little-endian; text is UTF-8.

``comq_np.calibration``: what to solve::

    layers/K            name, kind ("linear", "conv2d", ...), gram (number of the Gram of its inputs)
    layers/K/weight     (m, n) float32; a column for each output channel, so the layer computes X @ weight
    layers/K/bias       (n,) float32, where there is one
    grams/K             a Gram, as below; layers with the same inputs name the same one

``comq_np.quantized``: the solution, ``Wq = scale * (codes - zero_point)``::

    layers/K            name, rows (m), bits (1 to 16), levels, group_size ("column", "tensor" or a number of rows)
    layers/K/codes      (n, ceil(m * bits / 8)) uint8; packed as `pack_codes` says
    layers/K/scale      (groups, n) float32, or float16 where the solve was for that
    layers/K/zero_point (groups, n) integer, of the smallest type that holds them; float32 where any number may be one
    layers/K/bias_shift (n,) float32 to add to the layer's bias, where the solve fitted it
    layers/K/report     JSON text: the fields of `SolveReport` without seconds; null for an infinite relative_error

A layer that could not be solved and stays float has only the attributes name and kept, the reason as text.

``comq_np.gram``: one Gram, at the root::

    fold0, fold1        count
    foldK/matrix        (m, m) float64, X.T @ X over the samples of that fold
    foldK/sum           (m,) float64, X.sum(axis=0)

A reader ignores attributes, datasets and fields of the report that it does not know, and refuses a layer of more bits
than it knows.

No file holds a time: the same arrays make the same bytes.

A file in the making, NAME, is a folder beside its place, ``.NAME.parts``, which only one process holds at a time: the
library filelock locks ``lock`` in it. A finished layer is a file ``layer-N.h5`` in it, of the format of the whole, with
that one layer; in a calibration file's folder the attribute ``gram`` of its root is the SHA-256 of its Gram, which is
in ``gram-SHA256.h5``. Each is written under a name that ends in ``.partial``, flushed to the disk and then renamed. At
the end the layers are copied into one file in the same way, which is moved to its place, and the folder is removed.
``run.json`` says what the file depends on; where that is the same, the next writer goes on in the folder, and without
``run.json`` it clears the folder.
"""

from __future__ import annotations

import math
from typing import Any

from comq_np import hdf5
from comq_np.calibration import CALIBRATION, CalibrationFile, CalibrationWriter, Layer
from comq_np.gramfile import GRAM, load_gram, save_gram
from comq_np.hdf5 import VERSION, Path
from comq_np.quantized import QUANTIZED, QuantizedFile, QuantizedWriter

__all__ = [
    "CALIBRATION",
    "GRAM",
    "QUANTIZED",
    "VERSION",
    "CalibrationFile",
    "CalibrationWriter",
    "Layer",
    "Path",
    "QuantizedFile",
    "QuantizedWriter",
    "about",
    "file_format",
    "load_gram",
    "save_gram",
]


def about(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself, as JSON can hold it: `comq info --json` prints that.

    ``format``, ``version``, ``software``, and ``layers`` as `describe` has them, with None for an error that is
    infinite, beside the reasons of the layers that are ``kept`` float in a quantized file; or for a Gram its ``width``,
    ``samples``, and those of its ``folds``.
    """
    name = file_format(path)
    with hdf5.reading(path), hdf5.open_file(path, (name,)) as file:
        root = {"format": name, "version": VERSION, "software": hdf5.attribute(file, "software", str)}
    if name == GRAM:
        gram = load_gram(path)
        return {**root, "width": len(gram), "samples": gram.count, "folds": [fold.count for fold in gram.folds]}
    reader: CalibrationFile | QuantizedFile
    with CalibrationFile(path) if name == CALIBRATION else QuantizedFile(path) as reader:
        rows = reader.describe()
        kept = {"kept": reader.kept} if isinstance(reader, QuantizedFile) else {}
    layers = [{key: None if value == math.inf else value for key, value in row.items()} for row in rows]
    return {**root, "layers": layers, **kept}


def file_format(path: Path) -> str:
    """Format of a file of ours: `CALIBRATION`, `QUANTIZED` or `GRAM`."""
    with hdf5.reading(path), hdf5.open_file(path, (CALIBRATION, QUANTIZED, GRAM)) as file:
        return hdf5.attribute(file, "format", str)
