"""The HDF5 files: calibration in, quantized arrays out. The only module that imports h5py.

Every file has the attributes ``format`` (a name), ``version`` (an integer, 1 for all three formats below) and
``software`` at its root. Groups of layers and of Grams are numbered from 0 in the order they were added; a layer's
name is an attribute, since it may be any text. All numbers are little-endian; text is UTF-8.

``comq_np.calibration``: what to solve::

    layers/K            name, kind ("linear", "conv2d", ...), gram (number of the Gram of its inputs)
    layers/K/weight     (m, n) float32; a column for each output channel, so the layer computes X @ weight
    layers/K/bias       (n,) float32, where there is one
    grams/K             a Gram, as below; layers with the same inputs name the same one

``comq_np.quantized``: the solution, ``Wq = scale * (codes - zero_point)``::

    layers/K            name, rows (m), bits, levels, group_size ("column", "tensor" or a number of rows)
    layers/K/codes      (n, ceil(m * bits / 8)) uint8; packed as `pack_codes` says
    layers/K/scale      (groups, n) float32
    layers/K/zero_point (groups, n) integer, of the smallest type that holds them
    layers/K/bias_shift (n,) float32 to add to the layer's bias, where the solve fitted it
    layers/K/report     JSON text: the fields of `SolveReport`

``comq_np.gram``: one Gram, at the root::

    fold0, fold1        count
    foldK/matrix        (m, m) float64, X.T @ X over the samples of that fold
    foldK/sum           (m,) float64, X.sum(axis=0)

A file is written beside its place under another name and moved there when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.gram import Fold, Gram
from comq_np.packing import pack_codes, unpack_codes
from comq_np.result import QuantizedArray, SolveReport
from comq_np.version import __version__

Path = str | os.PathLike[str]
Entry = TypeVar("Entry")

VERSION = 1
FOLDS = ("fold0", "fold1")
CALIBRATION, QUANTIZED, GRAM = "comq_np.calibration", "comq_np.quantized", "comq_np.gram"


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer to quantize: its weights, and the Gram of its inputs.

    Parameters
    ----------
    name : str
        Name in its model.
    weight : ndarray of float32, shape (m, n)
        Weights; a column for each output channel. The rows of a convolution run over (input channel, height, width).
    gram : Gram
        Gram of the inputs, of width m.
    bias : ndarray of float32, shape (n,), optional
        Bias.
    kind : str
        What it is, such as "linear" or "conv2d": for people, the solver does not read it.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> comq_np.Layer("fc", np.ones((3, 2), np.float32), comq_np.Gram(3)).weight.shape
    (3, 2)
    """

    name: str
    weight: npt.NDArray[np.float32]
    gram: Gram
    bias: npt.NDArray[np.float32] | None = None
    kind: str = "linear"


class _Writer:
    """A file in the making. Leaving the context puts it in its place, or drops it after an exception."""

    _format: str

    def __init__(self, path: Path) -> None:
        self._path = pathlib.Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._names: set[str] = set()
        try:
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            raise checks.FileError(f"{self._path}: cannot be written: {error}") from error
        self._file.attrs.update(format=self._format, version=VERSION, software=f"comq_np {__version__}")

    def __enter__(self):  # type: ignore[no-untyped-def]  # Self is new in Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                with self._partial.open("rb") as file:
                    os.fsync(file.fileno())
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _layer(self, name: str) -> h5py.Group:
        """New group for the layer `name`."""
        if not isinstance(name, str):
            raise checks.InputError(f"`name` must be a string, got {name!r}.")
        if name in self._names:
            raise checks.InputError(f"layer {name!r}: a file can hold only one layer of that name.")
        group = self._file.create_group(f"layers/{len(self._names)}")
        group.attrs["name"] = name
        self._names.add(name)
        return group


class CalibrationWriter(_Writer):
    """Calibration file in the making: a context that puts the file in its place at the end.

    Parameters
    ----------
    path : str or path-like
        File to write.

    Raises
    ------
    FileError
        If it cannot be written.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> gram = comq_np.Gram(2)
    >>> gram.update([[1.0, 2.0]])
    >>> with comq_np.CalibrationWriter(path) as file:
    ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), gram))
    >>> with comq_np.CalibrationFile(path) as file:
    ...     file["fc"].gram.count
    1
    """

    _format = CALIBRATION

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._grams: weakref.WeakKeyDictionary[Gram, int] = weakref.WeakKeyDictionary()
        self._gram_count = 0

    def add(self, layer: Layer) -> None:
        """Add a layer; layers whose `gram` is the same object share it in the file, too.

        Parameters
        ----------
        layer : Layer
            The layer.

        Raises
        ------
        InputError
            If its arrays do not fit together or are not finite, or there is one of that name.

        Examples
        --------
        >>> import comq_np, numpy as np, os, tempfile
        >>> with comq_np.CalibrationWriter(os.path.join(tempfile.mkdtemp(), "calibration.h5")) as file:
        ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), comq_np.Gram(2)))
        """
        with checks.layer(layer.name):
            weight, bias = _checked(layer)
        group = self._layer(layer.name)
        group.attrs.update(kind=layer.kind, gram=self._gram(layer.gram))
        group["weight"] = weight
        if bias is not None:
            group["bias"] = bias

    def _gram(self, gram: Gram) -> int:
        """Number of the Gram in the file, written at its first use."""
        if gram not in self._grams:
            _write_gram(self._file.create_group(f"grams/{self._gram_count}"), gram)
            self._grams[gram] = self._gram_count
            self._gram_count += 1
        return self._grams[gram]


class QuantizedWriter(_Writer):
    """Quantized file in the making: a context that puts the file in its place at the end.

    Parameters
    ----------
    path : str or path-like
        File to write.

    Raises
    ------
    FileError
        If it cannot be written.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], bits=3))
    >>> with comq_np.QuantizedFile(path) as file:
    ...     file["fc"].bits
    3
    """

    _format = QUANTIZED

    def add(self, name: str, q: QuantizedArray) -> None:
        """Add a layer.

        Parameters
        ----------
        name : str
            Name of the layer.
        q : QuantizedArray
            What `solve` returned for its weights (m, n).

        Raises
        ------
        InputError
            If `q` is not two-dimensional, or there is a layer of that name.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> with comq_np.QuantizedWriter(os.path.join(tempfile.mkdtemp(), "quantized.h5")) as file:
        ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]))
        """
        with checks.layer(name):
            packed = pack_codes(q.codes, q.bits)
        group = self._layer(name)
        group.attrs.update(rows=len(q.codes), bits=q.bits, levels=q.levels, group_size=q.group_size or "column")
        group["codes"], group["scale"] = packed, q.scale
        group["zero_point"] = q.zero_point.astype(_smallest_type(q.zero_point))
        if q.bias_shift is not None:
            group["bias_shift"] = q.bias_shift
        group["report"] = json.dumps(q.report.to_dict())


class _Reader(Mapping[str, Entry], Generic[Entry]):
    """A file open for reading: a mapping from layer names to what it holds of each, read when asked for."""

    _format: str

    def __init__(self, path: Path) -> None:
        self._file = _open(path, self._format)
        try:
            groups = _numbered(self._file, "layers")
            self._groups = {_attribute(group, "name", str): group for group in groups}
            if len(self._groups) < len(groups):
                raise _broken(self._file["layers"], "must have a name of its own for each layer")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):  # type: ignore[no-untyped-def]  # Self is new in Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
        >>> with comq_np.QuantizedWriter(path) as file:
        ...     pass
        >>> comq_np.QuantizedFile(path).close()
        """
        self._file.close()

    def __getitem__(self, name: str) -> Entry:
        return self._read(name, self._groups[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def _read(self, name: str, group: h5py.Group) -> Entry:
        raise NotImplementedError


class CalibrationFile(_Reader[Layer]):
    """Calibration file, open for reading: a mapping from layer names to `Layer`, in the order of the model.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Raises
    ------
    FileError
        If it is no such file; reading a layer raises it, too, where something in the file is not as it must be.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> with comq_np.CalibrationWriter(path) as file:
    ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), comq_np.Gram(2)))
    >>> with comq_np.CalibrationFile(path) as file:
    ...     {name: layer.weight.shape for name, layer in file.items()}
    {'fc': (2, 3)}
    """

    _format = CALIBRATION

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Layers that share a Gram come one after another: each finds it still in memory.
        self._grams: weakref.WeakValueDictionary[int, Gram] = weakref.WeakValueDictionary()

    def _read(self, name: str, group: h5py.Group) -> Layer:
        weight = _array(group, "weight", np.float32, (None, None))
        gram = self._gram(group, _attribute(group, "gram", int))
        if len(gram) != len(weight):
            raise _broken(group, f"must name a Gram of width {len(weight)}, as its weight has rows, names {len(gram)}")
        bias = _array(group, "bias", np.float32, weight.shape[1:]) if "bias" in group else None
        return Layer(name, weight, gram, bias, _attribute(group, "kind", str))

    def describe(self) -> list[dict[str, Any]]:
        """Describe every layer without reading its arrays.

        Returns
        -------
        list of dict
            For each layer: its name, kind, rows, columns, whether it has a bias, the number of the Gram of its inputs,
            and how many samples that has seen.

        Examples
        --------
        >>> import comq_np, numpy as np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
        >>> with comq_np.CalibrationWriter(path) as file:
        ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), comq_np.Gram(2)))
        >>> with comq_np.CalibrationFile(path) as file:
        ...     file.describe()[0]["columns"]
        3
        """
        return [self._describe(name, group) for name, group in self._groups.items()]

    def _describe(self, name: str, group: h5py.Group) -> dict[str, Any]:
        rows, columns = _dataset(group, "weight", np.float32, (None, None)).shape
        number = _attribute(group, "gram", int)
        gram = self._gram_group(group, number)
        return {
            "layer": name,
            "kind": _attribute(group, "kind", str),
            "rows": rows,
            "columns": columns,
            "bias": "bias" in group,
            "gram": number,
            "samples": sum(_attribute(_group(gram, fold), "count", int) for fold in FOLDS),
        }

    def _gram_group(self, group: h5py.Group, number: int) -> h5py.Group:
        grams = _numbered(self._file, "grams")
        if not 0 <= number < len(grams):
            raise _broken(group, f"must name one of {len(grams)} Grams, names number {number}")
        return grams[number]

    def _gram(self, group: h5py.Group, number: int) -> Gram:
        gram = self._grams.get(number)
        if gram is None:
            gram = self._grams[number] = _read_gram(self._gram_group(group, number))
        return gram


class QuantizedFile(_Reader[QuantizedArray]):
    """Quantized file, open for reading: a mapping from layer names to `QuantizedArray`, in the order of the model.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Raises
    ------
    FileError
        If it is no such file; reading a layer raises it, too, where something in the file is not as it must be.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]))
    >>> with comq_np.QuantizedFile(path) as file:
    ...     {name: q.codes.shape for name, q in file.items()}
    {'fc': (2, 2)}
    """

    _format = QUANTIZED

    def describe(self) -> list[dict[str, Any]]:
        """Describe every layer without reading its arrays.

        Returns
        -------
        list of dict
            For each layer: its name, rows, columns, bits, levels, group size, bytes, and from the report the recipe and
            the relative error.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
        >>> with comq_np.QuantizedWriter(path) as file:
        ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]))
        >>> with comq_np.QuantizedFile(path) as file:
        ...     file.describe()[0]["recipe"]
        'balanced'
        """
        return [self._describe(name, group) for name, group in self._groups.items()]

    def _describe(self, name: str, group: h5py.Group) -> dict[str, Any]:
        rows, report = _attribute(group, "rows", int), _report(group)
        return {
            "layer": name,
            "rows": rows,
            "columns": _dataset(group, "codes", np.uint8, (None, None)).shape[0],
            "bits": _attribute(group, "bits", int),
            "levels": _attribute(group, "levels", int),
            "group_size": _group_size(group, rows) or "column",
            "bytes": sum(item.nbytes for item in group.values() if item.dtype.kind in "iuf"),
            "recipe": report.recipe,
            "relative_error": report.relative_error,
        }

    def _read(self, name: str, group: h5py.Group) -> QuantizedArray:  # noqa: ARG002
        rows = _attribute(group, "rows", int)
        bits, levels = _attribute(group, "bits", int), _attribute(group, "levels", int)
        if rows < 1 or not 1 <= bits <= checks.MAX_BITS or not 2 <= levels <= 2**bits:
            raise _broken(group, f"cannot have {rows} rows, {bits} bits and {levels} levels")
        packed = _array(group, "codes", np.uint8, (None, -(-rows * bits // 8)))
        size = _group_size(group, rows)
        shape = (-(-rows // size) if isinstance(size, int) else 1, len(packed))
        scale, zero_point = _array(group, "scale", np.float32, shape), _array(group, "zero_point", np.int32, shape)
        if not (scale > 0).all():
            raise _broken(group["scale"], f"must be positive, holds {scale.min():g}")
        if (np.abs(zero_point) > checks.MAX_ZERO_POINT).any():
            raise _broken(group["zero_point"], f"must lie within ±{checks.MAX_ZERO_POINT}")
        codes = unpack_codes(packed, bits, rows)
        if codes.max() >= levels:
            raise _broken(group["codes"], f"must lie below {levels}, holds {codes.max()}")
        shift = _array(group, "bias_shift", np.float32, shape[1:]) if "bias_shift" in group else None
        return QuantizedArray(codes, scale, zero_point, bits, levels, size, shift, _report(group))


def save_gram(path: Path, gram: Gram) -> None:
    """Write a Gram to a file of its own.

    Parameters
    ----------
    path : str or path-like
        File to write.
    gram : Gram
        The Gram, with both of its folds.

    Raises
    ------
    FileError
        If it cannot be written.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "gram.h5")
    >>> comq_np.save_gram(path, comq_np.Gram(3))
    >>> comq_np.load_gram(path)
    Gram(3, count=0)
    """
    with _GramWriter(path) as writer:
        _write_gram(writer._file, gram)


def load_gram(path: Path) -> Gram:
    """Read what `save_gram` wrote.

    Parameters
    ----------
    path : str or path-like
        File to read.

    Returns
    -------
    Gram
        The Gram, equal to the bit.

    Raises
    ------
    FileError
        If it is no such file.

    Examples
    --------
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "gram.h5")
    >>> gram = comq_np.Gram(1)
    >>> gram.update([[2.0], [3.0]])
    >>> comq_np.save_gram(path, gram)
    >>> comq_np.load_gram(path).matrix
    array([[13.]])
    """
    with _open(path, GRAM) as file:
        return _read_gram(file)


class _GramWriter(_Writer):
    _format = GRAM


def file_format(path: Path) -> str:
    """Format of a file of ours: `CALIBRATION`, `QUANTIZED` or `GRAM`."""
    with _open(path, None) as file:
        return str(file.attrs["format"])


def _checked(layer: Layer) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Weight and bias as float32, if they fit each other and the Gram."""
    weight = checks.weights(layer.weight, name="weight", ndim=(2,))
    if len(layer.gram) != len(weight):
        raise checks.InputError(
            f"`gram` must be of width {len(weight)}, as `weight` has rows, is of {len(layer.gram)}."
        )
    if layer.bias is None:
        return weight, None
    bias = checks.real_array("bias", layer.bias, (1,)).astype(np.float32)
    if len(bias) != weight.shape[1]:
        raise checks.InputError(f"`bias` must have shape ({weight.shape[1]},), got {bias.shape}.")
    return weight, bias


def _smallest_type(values: npt.NDArray[np.int32]) -> np.dtype[Any]:
    return np.result_type(np.min_scalar_type(int(values.min())), np.min_scalar_type(int(values.max())))


def _write_gram(group: h5py.Group, gram: Gram) -> None:
    for name, fold in zip(FOLDS, gram.folds, strict=True):
        part = group.create_group(name)
        part.attrs["count"] = fold.count
        part["matrix"], part["sum"] = fold.matrix, fold.sum


def _read_gram(group: h5py.Group) -> Gram:
    def fold(part: h5py.Group) -> Fold:
        total = _array(part, "sum", np.float64, (None,))
        matrix = _array(part, "matrix", np.float64, (len(total), len(total)))
        return Fold(matrix, total, _attribute(part, "count", int))

    try:
        first, second = (fold(_group(group, name)) for name in FOLDS)
        return Gram.from_folds((first, second))
    except checks.InputError as error:
        raise _broken(group, str(error)) from error


def _group_size(group: h5py.Group, rows: int) -> int | Literal["tensor"] | None:
    value = group.attrs.get("group_size")
    if isinstance(value, str) and value == "column":
        return None
    if isinstance(value, str) and value == "tensor":
        return "tensor"
    size = _attribute(group, "group_size", int)
    if size < 1:
        raise _broken(group, f'must have "column", "tensor" or a positive `group_size`, has {size} for {rows} rows')
    return size


def _report(group: h5py.Group) -> SolveReport:
    text = group.get("report")
    if not isinstance(text, h5py.Dataset) or text.shape != () or h5py.check_string_dtype(text.dtype) is None:
        raise _broken(group, "must have a text `report`")
    try:
        return SolveReport.from_dict(json.loads(text.asstr()[()]))
    except ValueError as error:  # broken JSON, broken text, and InputError
        raise _broken(text, str(error)) from error


# Reading with care: whatever is not as documented is a FileError that says where.


def _open(path: Path, expected: str | None) -> h5py.File:
    """File of the `expected` format, or of any of ours, open for reading."""
    if not pathlib.Path(path).is_file():
        raise checks.FileError(f"{path}: there is no such file.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise checks.FileError(f"{path}: cannot be read as HDF5: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        found, version = file.attrs.get("format"), file.attrs.get("version")
        if found not in ((expected,) if expected else (CALIBRATION, QUANTIZED, GRAM)):
            wanted = expected or "comq_np"
            raise checks.FileError(f"{path}: must be a {wanted} file, its `format` is {found!r}.")
        if version != VERSION:
            raise checks.FileError(f"{path}: must have `version` {VERSION} of {found}, has {version!r}.")
        stack.pop_all()
    return file


def _broken(place: h5py.Group | h5py.Dataset, what: str) -> checks.FileError:
    return checks.FileError(f"{place.file.filename}: {place.name}: {what}.")


def _group(parent: h5py.Group, name: str) -> h5py.Group:
    group = parent.get(name)
    if not isinstance(group, h5py.Group):
        raise _broken(parent, f"must have a group {name!r}")
    return group


def _numbered(file: h5py.File, name: str) -> list[h5py.Group]:
    """Groups 0, 1, ... in the group `name`, which an empty file lacks."""
    if name not in file:
        return []
    parent = _group(file, name)
    return [_group(parent, str(number)) for number in range(len(parent))]


def _attribute(group: h5py.Group, name: str, kind: type[Entry]) -> Entry:
    value = group.attrs.get(name)
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, kind):
        raise _broken(group, f"must have an attribute {name!r} of type {kind.__name__}, has {value!r}")
    return value


def _dataset(group: h5py.Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> h5py.Dataset:
    """Dataset of that shape, None for any length, and that type, or one that it holds without loss."""
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise _broken(group, f"must have a dataset {name!r}")
    fits = dataset.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, dataset.shape, strict=True))
    wanted = ", ".join("any" if n is None else str(n) for n in shape) + "," * (len(shape) == 1)
    if not fits or dataset.size == 0:
        raise _broken(dataset, f"must have shape ({wanted}), has {dataset.shape}")
    if not np.can_cast(dataset.dtype, dtype):
        raise _broken(dataset, f"must hold {np.dtype(dtype)}, holds {dataset.dtype}")
    return dataset


def _array(group: h5py.Group, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """Finite numbers of such a dataset."""
    dataset = _dataset(group, name, dtype, shape)
    array: npt.NDArray[Any] = dataset[()].astype(dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _broken(dataset, "must be finite")
    return array
