"""The calibration file: what to solve. `store` documents the format."""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks, gramfile, hdf5, reader, writing
from comq_np.counts import TokenCounts
from comq_np.crossgram import CrossGram
from comq_np.durable import Run
from comq_np.gramfile import AnyGram

CALIBRATION = "comq_np.calibration"
#: Where the file of one Gram has it, and the attribute of a layer's own file that names it.
ONLY_GRAM, DIGEST = "grams/0", "gram"


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer to quantize: its weights, and the Gram of its inputs.

    Parameters
    ----------
    name : str
        Name in its model.
    weight : ndarray of float32, shape (m, n) or (b, m, n)
        Weights; a column for each output channel. The rows of a convolution run over (input channel, height, width).
        With a leading axis, of many problems that are one layer, such as the groups of a convolution.
    gram : Gram, TokenCounts or NamedGrams
        Gram of the inputs, of width m, and of b problems; of an embedding, whose weights have a row for each token,
        how often each one came up; of named groups of batches, one Gram for each. A `CrossGram` where the inputs are
        quantized.
    bias : ndarray of float32, shape (n,) or (b, n), optional
        Bias.
    kind : str
        What it is, such as "linear", "embedding" or "conv2d": for people, the solver does not read it.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> comq_np.Layer("fc", np.ones((3, 2), np.float32), comq_np.Gram(3)).weight.shape
    (3, 2)
    """

    name: str
    weight: npt.NDArray[np.float32]
    gram: AnyGram
    bias: npt.NDArray[np.float32] | None = None
    kind: str = "linear"


class CalibrationWriter(writing.Writer):
    """Calibration file in the making: a context that puts the file in its place at the end.

    ``name in writer`` tells whether a layer of that name is finished: it is on the disk, in a folder beside the file.

    Parameters
    ----------
    path : str or path-like
        File to write.
    run : dict, optional
        What the file depends on, by name, in values that JSON can hold: options, and a digest of the weights. With it,
        what is finished is kept when the writing stops early, and a writer of the same path and run goes on there.
    order : iterable of str, optional
        Names in the order that the file shall have, of layers that are added in any order; without it, they are in the
        order in which they are added.
    restart : bool
        Whether to drop what an earlier run has finished.

    Raises
    ------
    InputError
        If `run` is no such dict.
    FileError
        If it cannot be written, another process is writing it, or there are finished layers of another run.

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

    def __init__(
        self, path: hdf5.Path, *, run: Run | None = None, order: Iterable[str] | None = None, restart: bool = False
    ) -> None:
        super().__init__(path, run=run, order=order, restart=restart)
        self._seen: weakref.WeakKeyDictionary[AnyGram, _Seen] = weakref.WeakKeyDictionary()
        self._numbers: dict[str, int] = {}

    def add(self, layer: Layer) -> None:
        """Add a layer; layers with equal Grams share one in the file.

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
        ...     "fc" in file
        True
        """
        if not isinstance(layer, Layer):
            raise checks.InputError(f"`layer` must be a comq_np.Layer, got {type(layer).__name__!r}.")
        self._check_name(layer.name)
        with checks.layer(layer.name):
            weight, bias = _checked(layer)
            self._check_unchanged(layer.gram)
        digest = self._store(layer)
        with self._layer(layer.name) as group:
            hdf5.fill(group, {"kind": layer.kind}, {"weight": weight, "bias": bias})
            hdf5.fill(group.file, {DIGEST: digest})

    def _check_unchanged(self, gram: AnyGram) -> None:
        """Refuse a Gram that the file holds as it was before."""
        seen = self._seen.get(gram)
        if seen and seen.counts != _counts(gram):
            raise checks.InputError(
                f"`gram` changed since layer {seen.layer!r} was added with it: it had seen {sum(seen.counts)} "
                f"samples then and has {gram.count} now."
            )

    def _store(self, layer: Layer) -> str:
        """Digest of the layer's Gram, whose file is named by it; it is written at its first use."""
        seen = self._seen.get(layer.gram) or _Seen(_digest(layer.gram), _counts(layer.gram), layer.name)
        place = self._place(seen.digest)
        if not place.exists():
            with hdf5.writing(self._path), self._new(place) as file:
                gramfile.write_gram(hdf5.new_group(file, ONLY_GRAM), layer.gram)
        self._seen[layer.gram] = seen
        return seen.digest

    def _place(self, digest: str) -> pathlib.Path:
        return self._folder.place / f"gram-{digest}.h5"

    def _complete(self, group: hdf5.Group, part: hdf5.File) -> None:
        """Number the layer's Gram, which is copied at its first use."""
        if reader.SKIPPED in group.attrs:
            return
        digest = hdf5.attribute(part, DIGEST, str)
        number = self._numbers.setdefault(digest, len(self._numbers))
        if f"grams/{number}" not in group.file:
            with hdf5.open_file(self._place(digest), (self._format,)) as source:
                hdf5.copy_group(source, ONLY_GRAM, group.file, f"grams/{number}")
        hdf5.fill(group, {"gram": number})


class _Seen(NamedTuple):
    """A Gram that was added: its digest, the counts of its folds at that time, and the layer that brought it."""

    digest: str
    counts: tuple[int, ...]
    layer: str


def _counts(gram: AnyGram) -> tuple[int, ...]:
    return tuple(fold.count for part in gramfile.parts_of(gram).values() for fold in part.folds)


def _digest(gram: AnyGram) -> str:
    """SHA-256 of what the file holds of a Gram, in hexadecimal."""
    digest = hashlib.sha256()
    for group, part in gramfile.parts_of(gram).items():
        digest.update(f"{len(group)} {group} ".encode() if group else b"")
        for count, arrays in gramfile.folds_of(part):
            for name, array in arrays.items():
                digest.update(f"{name} {array.shape} {count} ".encode())
                digest.update(array.data)
        if isinstance(part, CrossGram):
            grid = ({}, {}) if part.grid is None else gramfile.grid_of(part.grid)
            digest.update(
                repr([*grid[0].items(), *((name, array.tolist()) for name, array in grid[1].items())]).encode()
            )
    return digest.hexdigest()


def _checked(layer: Layer) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Weight and bias as float32, if they fit each other and the Gram, and the file can hold the kind."""
    hdf5.check_text("kind", layer.kind)
    weight = checks.weights(layer.weight, name="weight", ndim=(2, 3))
    gramfile.check_gram(layer.gram)
    rows, problems = weight.shape[-2], weight.shape[0] if weight.ndim == 3 else None
    if len(layer.gram) != rows:
        raise checks.InputError(f"`gram` must be of width {rows}, as `weight` has rows, is of {len(layer.gram)}.")
    if layer.gram.problems != problems:
        raise checks.InputError(
            f"`gram` must have `problems` {problems}, as `weight` has shape {weight.shape}, has {layer.gram.problems}."
        )
    if isinstance(layer.gram, TokenCounts) and layer.bias is not None:
        raise checks.InputError("`bias` must be None with TokenCounts, since an embedding has none.")
    return weight, None if layer.bias is None else _bias(layer.bias, _bias_shape(weight))


def _bias_shape(weight: npt.NDArray[np.float32]) -> tuple[int, ...]:
    return (*weight.shape[:-2], weight.shape[-1])


def _bias(value: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    given = checks.real_array("bias", value, (len(shape),))
    if given.shape != shape:
        raise checks.InputError(f"`bias` must have shape {shape}, got {given.shape}.")
    with np.errstate(over="ignore"):  # judged below
        bias = given.astype(np.float32)
    if not np.isfinite(bias).all():
        raise checks.InputError(f"`bias` must fit in float32, got an entry of size {np.abs(given).max():g}.")
    return bias


class CalibrationFile(reader.Reader[Layer]):
    """Calibration file, open for reading: a mapping from layer names to `Layer`, in the order of the model.

    Layers that are not to be quantized are not in it: `skipped` is a dict with the reason why each one is not.

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
        self._grams: weakref.WeakValueDictionary[int, AnyGram] = weakref.WeakValueDictionary()

    def _read(self, name: str, group: hdf5.Group) -> Layer:
        weight, bias, kind = _parameters(group)
        return Layer(name, weight, self._gram(group, weight.shape[:-1]), bias, kind)

    def _parameters_of(self, name: str) -> Parameters:
        """Weight, bias and kind of a layer, without the Gram of its inputs."""
        with hdf5.reading(self._path):
            return _parameters(self._groups[name])

    def _gram_of(self, name: str, shape: tuple[int, ...]) -> AnyGram:
        """Gram of the inputs of a layer with so many rows, (m,) or (b, m), without its weight."""
        with hdf5.reading(self._path):
            return self._gram(self._groups[name], shape)

    def describe(self) -> list[dict[str, Any]]:
        """Describe every layer without reading its arrays.

        Returns
        -------
        list of dict
            For each layer: its name, kind, problems (1 but for groups), rows, columns, whether it has a bias, the
            number of the Gram of its inputs, whether that is diagonal (`TokenCounts`) or crossed (`CrossGram`), the
            bits of the inputs or "float", and how many samples it saw; where each channel of the inputs has a scale,
            ``activation_axis``; where the samples are from named groups of batches, their names, ``groups``.

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
        return [self.summary(name) for name in self]

    def summary(self, name: str) -> dict[str, Any]:
        """Describe one layer without reading its arrays.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        dict
            As in `describe`.

        Raises
        ------
        KeyError
            If there is no such layer.
        FileError
            If something in the file is not as it must be.

        Examples
        --------
        >>> import comq_np, numpy as np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
        >>> with comq_np.CalibrationWriter(path) as file:
        ...     file.add(comq_np.Layer("fc", np.ones((2, 3), np.float32), comq_np.Gram(2)))
        >>> with comq_np.CalibrationFile(path) as file:
        ...     file.summary("fc")["rows"]
        2
        """
        group = self._groups[name]
        with hdf5.reading(self._path):
            return self._describe(name, group)

    def _describe(self, name: str, group: hdf5.Group) -> dict[str, Any]:
        *problems, rows, columns = hdf5.dataset(group, "weight", np.float32, (None, None), batched=True).shape
        number = self._gram_number(group)
        inputs = self._gram_groups[number]
        names = gramfile.names(inputs)
        return {
            "layer": name,
            "kind": hdf5.attribute(group, "kind", str),
            "problems": math.prod(problems),
            "rows": rows,
            "columns": columns,
            "bias": hdf5.holds(group, "bias"),
            "gram": number,
            "diagonal": gramfile.is_diagonal(inputs),
            "crossed": gramfile.is_crossed(inputs),
            **gramfile.describe_grid(inputs),
            "samples": gramfile.read_count(inputs),
            **({"groups": names} if names else {}),
        }

    @functools.cached_property
    def _gram_groups(self) -> list[hdf5.Group]:
        return hdf5.numbered(self._file, "grams")

    def _gram_number(self, group: hdf5.Group) -> int:
        number = hdf5.attribute(group, "gram", int)
        if not 0 <= number < len(self._gram_groups):
            raise hdf5.broken(group, f"must name one of {len(self._gram_groups)} Grams, names number {number}")
        return number

    def _gram(self, group: hdf5.Group, shape: tuple[int, ...]) -> AnyGram:
        number = self._gram_number(group)
        gram = self._grams.get(number)
        if gram is None:
            gram = self._grams[number] = gramfile.read_gram(self._gram_groups[number])
        *batch, rows = shape
        problems = batch[0] if batch else None
        if len(gram) != rows:
            raise hdf5.broken(group, f"must name a Gram of width {rows}, as its weight has rows, names {len(gram)}")
        if gram.problems != problems:
            what = f"with `problems` {problems}, as its weight has axes"
            raise hdf5.broken(group, f"must name a Gram {what}, names one with {gram.problems}")
        return gram


class Parameters(NamedTuple):
    """What a layer computes with, and its kind."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    kind: str


def _parameters(group: hdf5.Group) -> Parameters:
    weight = hdf5.array(group, "weight", np.float32, (None, None), batched=True)
    bias = hdf5.array(group, "bias", np.float32, _bias_shape(weight)) if hdf5.holds(group, "bias") else None
    return Parameters(weight, bias, hdf5.attribute(group, "kind", str))
