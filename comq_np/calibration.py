"""The calibration file: what to solve. `store` documents the format."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks, gramfile, hdf5
from comq_np.gram import Gram

CALIBRATION = "comq_np.calibration"


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


class CalibrationWriter(hdf5.Writer):
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

    def __init__(self, path: hdf5.Path) -> None:
        super().__init__(path)
        self._grams: weakref.WeakKeyDictionary[Gram, _Stored] = weakref.WeakKeyDictionary()
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
            If its arrays do not fit together or are not finite, there is one of that name, or its Gram has seen more
            since a layer with the same one was added.
        FileError
            If it cannot be written. Either way the file stays as it was before.

        Examples
        --------
        >>> import comq_np, numpy as np, os, tempfile
        >>> with comq_np.CalibrationWriter(os.path.join(tempfile.mkdtemp(), "calibration.h5")) as file:
        ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), comq_np.Gram(2)))
        """
        if not isinstance(layer, Layer):
            raise checks.InputError(f"`layer` must be a comq_np.Layer, got {type(layer).__name__!r}.")
        self._check_name(layer.name)
        with checks.layer(layer.name):
            weight, bias = _checked(layer)
            self._check_unchanged(layer.gram)
        with self._layer(layer.name) as group:
            group["weight"] = weight
            if bias is not None:
                group["bias"] = bias
            group.attrs.update(kind=layer.kind, gram=self._gram(layer))

    def _check_unchanged(self, gram: Gram) -> None:
        """Refuse a Gram that the file holds as it was before."""
        stored = self._grams.get(gram)
        if stored and stored.counts != _counts(gram):
            raise checks.InputError(
                f"`gram` changed since layer {stored.layer!r} was added with it: it had seen {sum(stored.counts)} "
                f"samples then and has {gram.count} now."
            )

    def _gram(self, layer: Layer) -> int:
        """Number of the layer's Gram in the file, written at its first use."""
        if layer.gram not in self._grams:
            with self._group(f"grams/{self._gram_count}") as group:
                gramfile.write_gram(group, layer.gram)
            self._grams[layer.gram] = _Stored(self._gram_count, _counts(layer.gram), layer.name)
            self._gram_count += 1
        return self._grams[layer.gram].number


class _Stored(NamedTuple):
    """A Gram in the file: its number, the counts of its folds when it was written, and the layer that brought it."""

    number: int
    counts: tuple[int, ...]
    layer: str


def _counts(gram: Gram) -> tuple[int, ...]:
    return tuple(fold.count for fold in gram.folds)


def _checked(layer: Layer) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Weight and bias as float32, if they fit each other and the Gram, and the file can hold the kind."""
    hdf5.check_text("kind", layer.kind)
    weight = checks.weights(layer.weight, name="weight", ndim=(2,))
    gramfile.check_gram(layer.gram)
    if len(layer.gram) != len(weight):
        raise checks.InputError(
            f"`gram` must be of width {len(weight)}, as `weight` has rows, is of {len(layer.gram)}."
        )
    return weight, None if layer.bias is None else _bias(layer.bias, weight.shape[1])


def _bias(value: npt.ArrayLike, columns: int) -> npt.NDArray[np.float32]:
    given = checks.real_array("bias", value, (1,))
    if len(given) != columns:
        raise checks.InputError(f"`bias` must have shape ({columns},), got {given.shape}.")
    with np.errstate(over="ignore"):  # judged below
        bias = given.astype(np.float32)
    if not np.isfinite(bias).all():
        raise checks.InputError(f"`bias` must fit in float32, got an entry of size {np.abs(given).max():g}.")
    return bias


class CalibrationFile(hdf5.Reader[Layer]):
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

    def __init__(self, path: hdf5.Path) -> None:
        super().__init__(path)
        # Layers that share a Gram come one after another: each finds it still in memory.
        self._grams: weakref.WeakValueDictionary[int, Gram] = weakref.WeakValueDictionary()

    def _read(self, name: str, group: hdf5.Group) -> Layer:
        weight = hdf5.array(group, "weight", np.float32, (None, None))
        gram = self._gram(group)
        if len(gram) != len(weight):
            raise hdf5.broken(
                group, f"must name a Gram of width {len(weight)}, as its weight has rows, names {len(gram)}"
            )
        bias = hdf5.array(group, "bias", np.float32, weight.shape[1:]) if "bias" in group else None
        return Layer(name, weight, gram, bias, hdf5.attribute(group, "kind", str))

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
        with hdf5.reading(self._path):
            return [self._describe(name, group) for name, group in self._groups.items()]

    def _describe(self, name: str, group: hdf5.Group) -> dict[str, Any]:
        rows, columns = hdf5.dataset(group, "weight", np.float32, (None, None)).shape
        number = self._gram_number(group)
        return {
            "layer": name,
            "kind": hdf5.attribute(group, "kind", str),
            "rows": rows,
            "columns": columns,
            "bias": "bias" in group,
            "gram": number,
            "samples": gramfile.read_count(self._gram_groups[number]),
        }

    @functools.cached_property
    def _gram_groups(self) -> list[hdf5.Group]:
        return hdf5.numbered(self._file, "grams")

    def _gram_number(self, group: hdf5.Group) -> int:
        number = hdf5.attribute(group, "gram", int)
        if not 0 <= number < len(self._gram_groups):
            raise hdf5.broken(group, f"must name one of {len(self._gram_groups)} Grams, names number {number}")
        return number

    def _gram(self, group: hdf5.Group) -> Gram:
        number = self._gram_number(group)
        gram = self._grams.get(number)
        if gram is None:
            gram = self._grams[number] = gramfile.read_gram(self._gram_groups[number])
        return gram
