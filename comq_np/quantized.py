"""The quantized file: the solution. `store` documents the format."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from comq_np import checks, gramfile, hdf5, reader, writing
from comq_np.activations import ActivationGrid
from comq_np.channels import ChannelGrid, of_rows
from comq_np.packing import pack_codes, unpack_codes
from comq_np.result import PlaneArray, QuantizedArray, Solved, SolveReport

QUANTIZED = "comq_np.quantized"
#: The attribute of a layer that could not be solved: why.
KEPT = "kept"
#: The attribute of a layer that says what its codes stand for, where that is no uniform grid, and its value for planes.
CODEBOOK, PLANES = "codebook", "planes"
#: Types of a whole zero point, the smallest first. All of them convert to int32 without loss.
ZERO_POINT_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32)


class QuantizedWriter(writing.Writer):
    """Quantized file in the making: a context that puts the file in its place at the end.

    ``name in writer`` tells whether a layer of that name is finished: it is on the disk, in a folder beside the file.

    Parameters
    ----------
    path : str or path-like
        File to write.
    run : dict, optional
        What the file depends on, by name, in values that JSON can hold: options, and a digest of the input. With it,
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
    >>> import comq_np, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], bits=3))
    >>> with comq_np.QuantizedFile(path) as file:
    ...     file["fc"].bits
    3
    """

    _format = QUANTIZED

    def add(self, name: str, q: Solved) -> None:
        """Add a layer.

        Parameters
        ----------
        name : str
            Name of the layer.
        q : QuantizedArray or PlaneArray
            What `solve` returned for its weights (m, n) or (b, m, n).

        Raises
        ------
        InputError
            If `q` is no such result or one-dimensional, or there is a layer of that name.
        FileError
            If it cannot be written. Either way the file stays as it was before.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> with comq_np.QuantizedWriter(os.path.join(tempfile.mkdtemp(), "quantized.h5")) as file:
        ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]))
        """
        self._check_name(name)
        with checks.layer(name):
            if not isinstance(q, Solved):
                raise checks.InputError(
                    f"`q` must be a comq_np.QuantizedArray or PlaneArray, got {type(q).__name__!r}."
                )
            _check_activation(q)
            (attributes, arrays), report = _parts(q), _report_text(q.report)
            inputs, scale = gramfile.grid_of(q.activation) if q.activation else ({}, {})
        with self._layer(name) as group:
            hdf5.fill(
                group,
                {"rows": q.codes.shape[-2], **attributes, "group_size": q.group_size or "column", **inputs},
                {**arrays, "report": report, **scale},
            )

    def keep(self, name: str, reason: str) -> None:
        """Add a layer that stays as it is, float, since it could not be solved.

        A writer that goes on with a run does not count it as finished: it may be tried again.

        Parameters
        ----------
        name : str
            Name of the layer.
        reason : str
            Why it stays float.

        Raises
        ------
        InputError
            If there is a layer of that name, or either is no text that the file can hold.
        FileError
            If it cannot be written. Either way the file stays as it was before.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
        >>> with comq_np.QuantizedWriter(path) as file:
        ...     file.keep("expert.7", "`G` must have seen inputs, got a Gram with count 0.")
        >>> with comq_np.QuantizedFile(path) as file:
        ...     file.kept
        {'expert.7': '`G` must have seen inputs, got a Gram with count 0.'}
        """
        self._without_data(name, KEPT, reason)

    def _is_finished(self, group: hdf5.Group) -> bool:
        return KEPT not in group.attrs


#: What a layer is in the file: attributes and arrays.
Parts = tuple[dict[str, int | str], dict[str, npt.NDArray[Any] | None]]


def stored_bytes(q: Solved) -> int:
    """Bytes that the arrays of a result take in a file, as `describe` counts them."""
    _, arrays = _parts(q)
    return sum(array.nbytes for array in arrays.values() if array is not None)


def _parts(q: Solved) -> Parts:
    """A layer, as it is in the file, but for the report."""
    attributes, arrays = _of_planes(q) if isinstance(q, PlaneArray) else _of_grid(q)
    return attributes, {**arrays, "bias_shift": q.bias_shift}


def _of_grid(q: QuantizedArray) -> Parts:
    """Codes on a uniform grid, as they are in the file."""
    packed = pack_codes(q.codes, q.bits)
    _check_shapes(q, {"scale": q.scale, "zero_point": q.zero_point})
    zero_point = q.zero_point.astype(_smallest_type(q.zero_point))
    return {"bits": q.bits, "levels": q.levels}, {"codes": packed, "scale": q.scale, "zero_point": zero_point}


def _of_planes(q: PlaneArray) -> Parts:
    """Bit planes, as they are in the file."""
    bits = checks.integer("bits", q.bits, 1, checks.MAX_PLANES)
    pack_codes(q.codes[:0], 1)  # refuses what is no matrix
    if q.codes.dtype != np.uint8 or q.codes.max(initial=0) >= 2**bits:
        raise checks.InputError(f"`codes` must be uint8 below {2**bits} for {bits} planes, got {q.codes.dtype}.")
    problems = q.codes.shape[:-2]
    _check_shapes(q, {"offset": q.offset})
    shape = (*problems, bits, *np.shape(q.offset)[-2:])
    if np.shape(q.plane_scale) != shape:
        raise checks.InputError(f"`plane_scale` must have shape {shape}, got {np.shape(q.plane_scale)}.")
    for name, array in (("plane_scale", q.plane_scale), ("offset", q.offset)):
        if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
            raise checks.InputError(f"`{name}` must hold finite numbers of float32 or float16.")
    packed = np.stack([pack_codes(q.codes >> k & 1, 1) for k in range(bits)], axis=len(problems))
    return {"bits": bits, "codebook": PLANES}, {"codes": packed, "plane_scale": q.plane_scale, "offset": q.offset}


def _check_activation(q: Solved) -> None:
    """Refuse a grid of inputs that is none, or has channels that are not those of the codes."""
    if isinstance(q.activation, ChannelGrid):
        of_rows(q.activation, math.prod(q.codes.shape[:-1]))
    elif q.activation is not None and not isinstance(q.activation, ActivationGrid):
        what = "comq_np.ActivationGrid, a comq_np.ChannelGrid or None"
        raise checks.InputError(f"`activation` must be a {what}, got {type(q.activation).__name__!r}.")


def _check_shapes(q: Solved, grid: dict[str, npt.NDArray[Any]]) -> None:
    """Refuse arrays that do not fit the codes: those of the grid, and the bias shift."""
    *problems, rows, columns = q.codes.shape
    channels = (*problems, columns)
    shape = _grid_shape(rows, channels, checks.group_size(q.group_size))
    for name, array, wanted in (
        *((name, array, shape) for name, array in grid.items()),
        ("bias_shift", q.bias_shift, channels),
    ):
        if array is not None and np.shape(array) != wanted:
            raise checks.InputError(f"`{name}` must have shape {wanted}, got {np.shape(array)}.")


def _grid_shape(rows: int, channels: tuple[int, ...], size: int | Literal["tensor"] | None) -> tuple[int, ...]:
    """Shape of the scales and zero points of output channels (n,) or (b, n)."""
    return (*channels[:-1], -(-rows // size) if isinstance(size, int) else 1, channels[-1])


def _smallest_type(values: npt.NDArray[Any]) -> np.dtype[Any]:
    """First of the types of a zero point in the file that holds all values; float32 if they may be any numbers."""
    if values.dtype == np.float32:
        return values.dtype
    low, high = int(values.min()), int(values.max())
    for kind in ZERO_POINT_TYPES:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise checks.InputError(f"`zero_point` must fit in int32, got {low} to {high}.")


def _report_text(report: SolveReport) -> str:
    """Report as JSON, if JSON can say it, without the time, which would make each file another one."""
    values = report.to_dict()
    del values["seconds"]
    try:
        return json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        raise checks.InputError(f"`report` must hold text and finite numbers, got {report}.") from None


class QuantizedFile(reader.Reader[Solved]):
    """Quantized file, open for reading: a mapping from layer names to `QuantizedArray`, or `PlaneArray`, in order.

    Layers that stay float are not in the mapping: `kept` is a dict with the reason why each one could not be solved,
    `skipped` one with the reason why each one was not to be.

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

    def __init__(self, path: hdf5.Path) -> None:
        super().__init__(path)
        with hdf5.reading(path):
            self.kept = self._set_aside(KEPT)

    def describe(self) -> list[dict[str, Any]]:
        """Describe every layer that is solved without reading its arrays.

        Returns
        -------
        list of dict
            For each layer: its name, problems (1 but for groups), rows, columns, bits, levels, codebook ("uniform" or
            "planes"), group size, bits of its inputs or "float", bytes, and from the report the recipe and the relative
            error, of each named group of batches, too, in `modalities`.

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
        with hdf5.reading(self._path):
            return [self._describe(name, group) for name, group in self._groups.items()]

    def report(self, name: str) -> SolveReport:
        """Report of a layer, without its arrays.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        SolveReport
            The report, in which ``seconds`` is None.

        Raises
        ------
        KeyError
            If there is no such layer.
        FileError
            If the report in the file is not as it must be.

        Examples
        --------
        >>> import comq_np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
        >>> with comq_np.QuantizedWriter(path) as file:
        ...     file.add("fc", comq_np.solve([[0.5, 2.0], [1.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]))
        >>> with comq_np.QuantizedFile(path) as file:
        ...     file.report("fc").recipe
        'balanced'
        """
        group = self._groups[name]
        with hdf5.reading(self._path):
            return _report(group)

    def _describe(self, name: str, group: hdf5.Group) -> dict[str, Any]:
        sizes, report = _sizes(group), _report(group)
        codes = hdf5.dataset(group, "codes", np.uint8, (*sizes.planes, None, sizes.row_bytes), batched=True)
        *problems, columns = _channels(sizes, codes.shape)
        others = _others(group, sizes, (*problems, columns))
        arrays = [codes, *(hdf5.dataset(group, *entry) for entry in others)]
        return {
            "layer": name,
            "problems": math.prod(problems),
            "rows": sizes.rows,
            "columns": columns,
            "bits": sizes.bits,
            "levels": sizes.levels,
            "codebook": PLANES if sizes.planes else "uniform",
            "group_size": sizes.group_size or "column",
            **gramfile.describe_grid(group),
            "bytes": sum(array.nbytes for array in arrays),
            "recipe": report.recipe,
            "relative_error": report.relative_error,
            **({"modalities": report.modalities} if report.modalities else {}),
        }

    def _read(self, name: str, group: hdf5.Group) -> Solved:  # noqa: ARG002
        sizes = _sizes(group)
        packed = hdf5.array(group, "codes", np.uint8, (*sizes.planes, None, sizes.row_bytes), batched=True)
        others = _others(group, sizes, _channels(sizes, packed.shape))
        first, second, *shift = (hdf5.array(group, *entry) for entry in others)
        inputs = gramfile.read_grid(group)
        if isinstance(inputs, ChannelGrid) and math.prod(packed.shape[:-2]) * sizes.rows % inputs.channels:
            raise hdf5.broken(group["activation_scale"], f"must divide its rows, holds {inputs.channels} channels")
        rest = shift[0] if shift else None, _report(group), inputs
        if sizes.planes:
            bits = np.moveaxis(packed, -3, 0)
            single = [unpack_codes(plane, 1, sizes.rows).astype(np.uint8) << k for k, plane in enumerate(bits)]
            codes = np.bitwise_or.reduce(single)
            assert not isinstance(sizes.group_size, str), "planes have scales for each column"
            return PlaneArray(codes, first, second, sizes.bits, sizes.group_size, *rest)
        if not (first > 0).all():
            raise hdf5.broken(group["scale"], f"must be positive, holds {first.min():g}")
        if checks.largest(second) > checks.MAX_ZERO_POINT:
            raise hdf5.broken(group["zero_point"], f"must lie within ±{checks.MAX_ZERO_POINT}")
        codes = unpack_codes(packed, sizes.bits, sizes.rows)
        if codes.max() >= sizes.levels:
            raise hdf5.broken(group["codes"], f"must lie below {sizes.levels}, holds {codes.max()}")
        return QuantizedArray(codes, first, second, sizes.bits, sizes.levels, sizes.group_size, *rest)


class _Sizes(NamedTuple):
    """What the attributes of a layer say."""

    rows: int
    bits: int
    levels: int
    group_size: int | Literal["tensor"] | None
    planes: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one output channel, or of one plane of them."""
        return -(-self.rows * (1 if self.planes else self.bits) // 8)


def _sizes(group: hdf5.Group) -> _Sizes:
    rows, bits = (hdf5.attribute(group, name, int) for name in ("rows", "bits"))
    if CODEBOOK in group.attrs:
        return _plane_sizes(group, rows, bits)
    levels = hdf5.attribute(group, "levels", int)
    if rows < 1 or not 1 <= bits <= checks.MAX_BITS or not 2 <= levels <= 2**bits:
        raise hdf5.broken(group, f"cannot have {rows} rows, {bits} bits and {levels} levels")
    return _Sizes(rows, bits, levels, _group_size(group, rows), ())


def _plane_sizes(group: hdf5.Group, rows: int, bits: int) -> _Sizes:
    kind, size = hdf5.attribute(group, CODEBOOK, str), _group_size(group, rows)
    if kind != PLANES:
        raise hdf5.broken(group, f"must have the codebook {PLANES!r} or none, has {kind!r}")
    if rows < 1 or not 1 <= bits <= checks.MAX_PLANES or size == "tensor":
        raise hdf5.broken(group, f"cannot have {rows} rows, {bits} planes and the group size {size!r}")
    return _Sizes(rows, bits, 2**bits, size, (bits,))


def _channels(sizes: _Sizes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Output channels (n,) or (b, n) of codes of a shape."""
    return (*shape[:-3], shape[-2]) if sizes.planes else shape[:-1]


def _others(
    group: hdf5.Group, sizes: _Sizes, channels: tuple[int, ...]
) -> list[tuple[str, type[np.number[Any]], tuple[int | None, ...]]]:
    """Name, type and shape of each array of a layer beside its codes, of output channels (n,) or (b, n)."""
    shape = _grid_shape(sizes.rows, channels, sizes.group_size)
    shift = [("bias_shift", np.float32, channels)] * hdf5.holds(group, "bias_shift")
    if sizes.planes:
        planes = (*shape[:-2], sizes.bits, *shape[-2:])
        return [
            ("plane_scale", _scale_type(group, "plane_scale"), planes),
            ("offset", _scale_type(group, "offset"), shape),
            *shift,
        ]
    return [("scale", _scale_type(group, "scale"), shape), ("zero_point", _zero_point_type(group), shape), *shift]


def _scale_type(group: hdf5.Group, name: str) -> type[np.number[Any]]:
    """Type that the scales of that name in the file are read as."""
    return np.float16 if getattr(hdf5.member(group, name), "dtype", None) == np.float16 else np.float32


def _zero_point_type(group: hdf5.Group) -> type[np.number[Any]]:
    """Type that the zero points of the file are read as."""
    kind = getattr(getattr(hdf5.member(group, "zero_point"), "dtype", None), "kind", "i")
    return np.float32 if kind == "f" else np.int32


def _group_size(group: hdf5.Group, rows: int) -> int | Literal["tensor"] | None:
    value = hdf5.attribute(group, "group_size", object)
    if isinstance(value, str) and value in ("column", "tensor"):
        return "tensor" if value == "tensor" else None
    size = hdf5.attribute(group, "group_size", int)
    if size < 1:
        raise hdf5.broken(group, f'must have "column", "tensor" or a positive `group_size`, has {size} for {rows} rows')
    return size


def _report(group: hdf5.Group) -> SolveReport:
    text = hdf5.text(group, "report")
    try:
        report = SolveReport.from_dict(json.loads(text))
        _report_text(report)  # refuses numbers that are not finite
    except (ValueError, RecursionError) as error:  # broken JSON, also too deep, and InputError
        raise hdf5.broken(group["report"], str(error).rstrip(".")) from error
    return report
