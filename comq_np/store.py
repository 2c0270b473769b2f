"""The HDF5 files: calibration in, quantized arrays out.

Every file has the attributes ``format`` (a name), ``version`` (an integer, 2 for all three formats below) and
``software`` at its root. Version 1, which is read as well, had no layers of several problems, no embeddings, and none
that were skipped. Groups of layers and of Grams are numbered from 0 in the order of the model, and the root's
attributes ``layers`` and ``grams`` say how many there are; a layer's name is an attribute, since it may be any text of
up to 16,384 bytes. All numbers are little-endian; text is UTF-8, of fixed length, filled up with NUL.

``comq_np.calibration``: what to solve::

    layers/K            name, kind ("linear", "conv2d", ...), gram (number of the Gram of its inputs)
    layers/K/weight     (m, n) float32; a column for each output channel, so the layer computes X @ weight
    layers/K/bias       (n,) float32, where there is one
    grams/K             a Gram, as below; layers with the same inputs name the same one

Where the inputs X of a layer are quantized, its Gram is that of the quantized ones Xq, on the grid ``scale * (code -
zero_point)`` of codes from 0 to 2**bits - 1, and beside its own it has::

    grams/K                     activation_bits (2 to 8), activation_zero_point (0 to 2**bits - 1)
    grams/K/activation_scale    (1,) float32
    grams/K/foldK/apart         (m, m) float64, Xq.T @ (X - Xq) over the samples of that fold
    grams/K/foldK/exact_sum     (m,) float64, X.sum(axis=0)

or, where each channel of the inputs has a scale of its own, which the weights absorb::

    grams/K                     activation_bits
    grams/K/activation_scale    (channels,) float32; channel c is that of m / channels rows in a row (b * m / channels)
    grams/K/activation_zero_point   (channels,) uint8

Its sums are then of Xq = code - zero_point and of the inputs divided by their scales, in the place of X. The weight in
the file is that of the float layer all the same: what is solved for is each row of it times the scale of its channel.

With all these, ``matrix + apart`` is what `solve` takes as `cross`. (A Gram with the last two, but no grid, is of the
inputs Xq that a model has whose layers before this one are quantized.)

A layer of several problems, such as the groups of a convolution, has a weight (b, m, n), a bias (b, n) and a Gram of b
problems; each problem p computes X_p @ weight[p] of inputs X_p of its own.

``comq_np.quantized``: the solution, ``Wq = scale * (codes - zero_point)``::

    layers/K            name, rows (m), bits (1 to 16), levels, group_size ("column", "tensor" or a number of rows)
    layers/K/codes      (n, ceil(m * bits / 8)) uint8; packed as `pack_codes` says
    layers/K/scale      (groups, n) float32, or float16 where the solve was for that
    layers/K/zero_point (groups, n) integer, of the smallest type that holds them; float32 where any number may be one
    layers/K/bias_shift (n,) float32 to add to the layer's bias, where the solve fitted it
    layers/K            activation_bits, activation_zero_point, where the layer's inputs are quantized
    layers/K/activation_scale   (1,) float32, as in a calibration file; (channels,) where each channel has one, with
    layers/K/activation_zero_point  (channels,) uint8, in the place of the attribute: Wq multiplies code - zero_point
    layers/K/report     JSON text: the fields of `SolveReport` without seconds; null for an infinite relative_error

A layer of bit planes, ``Wq = sum_k plane_scale_k * bit_k(code) - offset``, has in the place of levels, scale and
zero_point::

    layers/K            codebook ("planes"); bits (1 to 8), and no group_size "tensor"
    layers/K/codes      (bits, n, ceil(m / 8)) uint8; plane by plane, bit i of a row is that of row i of the weights
    layers/K/plane_scale (bits, groups, n) float32, or float16 where the solve was for that: any finite number
    layers/K/offset     (groups, n) float32 or float16

In a layer of several problems, the codes, scales, zero_point, offset and bias_shift have an axis of b before the
others; each problem is as a layer of its own. All have the report in common.

A layer that could not be solved and stays float has only the attributes name and kept, the reason as text. In both
files one that is not to be quantized, for instance since the adapter does not know its kind, has name and skipped.

``comq_np.gram``: one Gram, at the root::

    fold0, fold1        count
    foldK/matrix        (m, m) float64, X.T @ X over the samples of that fold
    foldK/sum           (m,) float64, X.sum(axis=0)

and what is said above of those of quantized inputs. Of named groups of batches, a Gram in a calibration file has no
folds of its own, but an attribute ``groups``, their number, and for each a group groups/J with the attribute name and
the folds of its Gram. They are balanced as the layer is solved (`NamedGrams`).

Of an embedding, whose matrix is diagonal, each fold has in their place ``counts``, (m,) int64: how often each token
came up. Of several problems, these arrays have an axis of b before the others; all have the count in common.

How a layer is stored, to the bit. Code (i, j), of row i and column j, is an integer from 0 to levels - 1 of ``bits``
bits. Its bit k, which counts 2**k, is bit s = i * bits + k of row j of the codes: in byte s // 8, where it counts
2**(s % 8). The bits after those of the last code are 0. Row i belongs to group 0 with "column" and "tensor", and to
group i // group_size with a number, so that the last group may be smaller; with "tensor" all columns of the scale are
equal. A scale is a positive float32 or float16. A zero point is the code that stands for 0: an integer of -2**30 to
2**30, which need not be a code, or a float32. The weight is ``scale * (code - zero_point)``: the difference first,
exact in integers and then rounded to float32, or with a float32 zero point in float32; then one float32 product. So
rows of inputs that are always zero are stored as all others, rounded to nearest.

Of bit planes, bit k of the code of row i and column j is bit i % 8 of byte i // 8 of row j of plane k of the codes, and
counts plane_scale (k, group, j). The weight is the sum of those whose bit is 1, in float32 from k = 0 up, less the
offset.

Every group with data, and the root, has an attribute ``sha256``: a JSON object with the SHA-256, in hexadecimal, of
each of its attributes and datasets by name. Of a number it is that of its decimal digits, of text that of its UTF-8, of
an array that of a line with its type as NumPy writes it and its shape, such as ``<f4 3,2``, a newline, and its bytes in
C order. Readers check what they read, and that what is listed is there. In files without it they check nothing.

A reader ignores attributes, datasets and fields of the report that it does not know, and refuses a layer of more bits
than it knows. It follows no link but HDF5's own of a group to its member, and refuses data that are elsewhere or not
there, types that are none of NumPy's for real numbers, and filters other than gzip, shuffle and Fletcher-32, which
h5repack may apply: an array has at most 16 MiB then, or 32 times the bytes of the file, in chunks of 1 KiB or more.
Big-endian numbers, and smaller types that convert without loss, are taken.

No file holds a time: the same arrays make the same bytes.

A file in the making, NAME, is a folder beside its place, ``.NAME.parts``, which only one process holds at a time: the
library filelock locks ``lock`` in it. A finished layer is a file ``layer-N.h5`` in it, of the format of the whole, with
that one layer; in a calibration file's folder the attribute ``gram`` of its root is the SHA-256 of its Gram, which is
in ``gram-SHA256.h5``. Each is written under a name that ends in ``.partial``, flushed to the disk and then renamed. At
the end the layers are copied into one file in the same way, which is moved to its place, and the folder is removed.
``run.json`` says what the file depends on; where that is the same, the next writer goes on in the folder, and without
``run.json`` it clears the folder.

Examples
--------
A layer decoded from its bytes, by NumPy alone:

>>> import comq_np, h5py, numpy as np, os, tempfile
>>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
>>> q = comq_np.solve(np.arange(20.0).reshape(5, 4) ** 2, np.eye(5), bits=3, group_size=2)
>>> with comq_np.QuantizedWriter(path) as file:
...     file.add("fc", q)
>>> with h5py.File(path) as file:
...     rows, bits, size = (int(file["layers/0"].attrs[name]) for name in ("rows", "bits", "group_size"))
...     codes, scale, zero_point = (file[f"layers/0/{name}"][()] for name in ("codes", "scale", "zero_point"))
>>> stream = np.unpackbits(codes, axis=1, count=rows * bits, bitorder="little").reshape(-1, rows, bits)
>>> codes = (stream * 2 ** np.arange(bits)).sum(axis=2).T
>>> group = np.arange(rows) // size
>>> steps = (codes - zero_point[group]).astype(np.float32)
>>> np.array_equal(scale[group] * steps, q.dequantize())
True
"""

from __future__ import annotations

import math
from typing import Any

from comq_np import hdf5
from comq_np.calibration import CALIBRATION, CalibrationFile, CalibrationWriter, Layer
from comq_np.gramfile import GRAM, load_gram, parts_of, save_gram
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
    infinite, beside the reasons of the layers that are ``skipped``, or ``kept`` float in a quantized file; or for a
    Gram its ``problems``, ``width``, ``samples``, and those of its ``folds`` and of its named ``groups``.
    """
    name = file_format(path)
    with hdf5.reading(path), hdf5.open_file(path, (name,)) as file:
        root = {"format": name, "version": hdf5.attribute(file, "version", int)}
        root["software"] = hdf5.attribute(file, "software", str)
    if name == GRAM:
        gram = load_gram(path)
        sizes = {"problems": gram.problems or 1, "width": len(gram), "samples": gram.count}
        parts = parts_of(gram)
        folds = [sum(part.folds[k].count for part in parts.values()) for k in (0, 1)]
        groups = {"groups": {name: part.count for name, part in parts.items()}} if "" not in parts else {}
        return {**root, **sizes, "folds": folds, **groups}
    reader: CalibrationFile | QuantizedFile
    with CalibrationFile(path) if name == CALIBRATION else QuantizedFile(path) as reader:
        rows = reader.describe()
        others = {"kept": reader.kept} if isinstance(reader, QuantizedFile) else {}
        others["skipped"] = reader.skipped
    layers = [{key: _sayable(value) for key, value in row.items()} for row in rows]
    return {**root, "layers": layers, **others}


def _sayable(value: Any) -> Any:
    """What JSON can say of it."""
    if isinstance(value, dict):
        return {key: _sayable(one) for key, one in value.items()}
    return None if value == math.inf else value


def file_format(path: Path) -> str:
    """Format of a file of ours: `CALIBRATION`, `QUANTIZED` or `GRAM`."""
    with hdf5.reading(path), hdf5.open_file(path, (CALIBRATION, QUANTIZED, GRAM)) as file:
        return hdf5.attribute(file, "format", str)
