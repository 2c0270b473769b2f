"""What a solve returns: the quantized array and the report of how it came about."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from comq_np import checks, grid
from comq_np.channels import InputGrid


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """How a solve went. Objectives are ``sum_j e_j.T @ G @ e_j`` with the given `G` and ``E = W - Wq``.

    The sweeps follow theirs in single precision. The last one is computed in double precision if `G` has it; if not, it
    and the one of plain rounding are so where single precision might leave too few digits.

    Parameters
    ----------
    recipe : str
        Name of the recipe.
    backend : str
        What computed it, "cpu" or "cuda".
    objective_rounding : float
        Objective of plain rounding on the min-max grid (on the given grid, where `scale` was given).
    objective_start : float
        Objective of the codes that the sweeps started from, of the matrix that is minimised, which with `shrinkage` is
        not `G`; where these were the real ones, of plain rounding on their grid.
    objectives : tuple of float
        Objective after every sweep and every tabu search, of the same matrix; from the second on it never rises by more
        than the rounding of single precision.
    objective : float
        Objective of the result.
    relative_error : float
        ``objective / ||X W||**2``, and 0 where both are zero.
    sweeps : int
        Sweeps and tabu searches made.
    codes_changed : tuple of int
        Codes that each of them changed; for one from the real codes, against plain rounding on the same grid.
    converged : bool
        Whether another sweep would change nothing.
    shrinkage : float
        Share of ``mean(diag(G)) * I`` that was mixed into `G`, and by which the spread of its eigenvalues is less; by
        nonlinear shrinkage, the latter. 0 is none.
    notes : tuple of str
        A sentence for every substitution made.
    optimal : bool
        Whether the codes are proven to be the best at their scales, for the matrix that is minimised.
    gap : float or None
        Share of the objective of that matrix that better codes could take off at most; None if none was sought.
    modalities : dict of float, or None
        Relative error of the outputs of each group of batches, where these were captured with names; see `NamedGrams`.
    seconds : float or None
        Time it took. It does not count where reports are compared, and files do not hold it: None in one that was read.

    Examples
    --------
    >>> import comq_np
    >>> report = comq_np.solve([[0.3, 1.0], [0.1, 2.0]], [[2.0, 1.0], [1.0, 2.0]], bits=2).report
    >>> report.objective <= report.objective_rounding
    True
    """

    recipe: str
    backend: str
    objective_rounding: float
    objective_start: float
    objectives: tuple[float, ...]
    objective: float
    relative_error: float
    sweeps: int
    codes_changed: tuple[int, ...]
    converged: bool
    shrinkage: float
    notes: tuple[str, ...]
    optimal: bool = False
    gap: float | None = None
    modalities: dict[str, float] | None = None
    seconds: float | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold.

        Returns
        -------
        dict
            Field names and values; None for a relative error that is infinite, which JSON cannot say.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.solve([1.0], [[1.0]], bits=2).report.to_dict()["recipe"]
        'balanced'
        """
        values = dataclasses.asdict(self)
        if self.modalities is not None:
            values["modalities"] = {name: _finite(error) for name, error in self.modalities.items()}
        return {**values, "relative_error": _finite(self.relative_error)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SolveReport:
        """Undo `to_dict`, also after a way through JSON.

        Parameters
        ----------
        values : dict
            What `to_dict` returned. Fields that this version does not know are ignored.

        Returns
        -------
        SolveReport
            The report.

        Raises
        ------
        InputError
            If a field is missing that has no default, or of another type.

        Examples
        --------
        >>> import comq_np
        >>> report = comq_np.solve([1.0], [[1.0]], bits=2).report
        >>> comq_np.SolveReport.from_dict(report.to_dict()) == report
        True
        """
        if not isinstance(values, dict):
            raise checks.InputError(f"`values` must be a dict, got {type(values).__name__!r}.")
        fields = dataclasses.fields(cls)
        missing = [field.name for field in fields if field.name not in values and field.default is dataclasses.MISSING]
        if missing:
            raise checks.InputError(f"`values` must have the fields {missing}, which are missing.")
        known = {field.name: values[field.name] for field in fields if field.name in values}
        if known["relative_error"] is None:
            known["relative_error"] = float("inf")
        if known.get("modalities") is not None:
            known["modalities"] = _by_group(known["modalities"])
        return cls(**{field.name: _typed(field, known[field.name]) for field in fields if field.name in known})


def _finite(error: float) -> float | None:
    return None if np.isinf(error) else error


def _by_group(errors: Any) -> dict[str, float]:
    """Relative errors by the names of groups, from what JSON holds of them."""
    if not isinstance(errors, dict) or not all(isinstance(name, str) for name in errors):
        raise checks.InputError(f"`modalities` must be a dict of names and errors, got {errors!r}.")
    for error in errors.values():
        if error is not None and (not isinstance(error, int | float) or isinstance(error, bool)):
            raise checks.InputError(f"`modalities` must hold float, got {error!r}.")
    return {name: float("inf") if error is None else float(error) for name, error in errors.items()}


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as that field of a report holds it, a JSON list as a tuple."""
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "float": (int, float), "int": (int,), "bool": (bool,)}
    listed = str(field.type).startswith("tuple")
    if listed and not isinstance(value, list | tuple):
        raise checks.InputError(f"`{field.name}` must be a list, got {value!r}.")
    if field.name == "modalities":
        return value
    kind = str(field.type).removeprefix("tuple[").removesuffix(", ...]").removesuffix(" | None")
    if value is None and str(field.type).endswith(" | None"):
        return None
    for item in value if listed else (value,):
        if not isinstance(item, kinds[kind]) or (isinstance(item, bool) and kind != "bool"):
            raise checks.InputError(f"`{field.name}` must hold {kind}, got {item!r}.")
    return tuple(value) if listed else value


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """Integer codes with their scale and zero point: ``Wq = scale * (codes - zero_point)``.

    Parameters
    ----------
    codes : ndarray of uint8, or of uint16 above 8 bits, shape (m, n), (m,) or (b, m, n)
        Codes from 0 to ``levels - 1``.
    scale : ndarray of float32 or float16, shape ([b,] groups, n)
        Positive scales, one for each group of rows and column.
    zero_point : ndarray of int32 or float32, shape ([b,] groups, n)
        Code that stands for 0, float32 where it may be any real number. It lies outside the codes for a group of
        weights that are all on one side of zero.
    bits : int
        Bits that store a code.
    levels : int
        Number of codes.
    group_size : int, "tensor" or None
        Rows that share a scale, the last group maybe fewer; "tensor" is one scale for all, None one for each column.
    bias_shift : ndarray of float32, shape ([b,] n), or None
        What to add to the layer's bias, where the solve fitted it.
    report : SolveReport
        How it came about.
    activation : ActivationGrid or ChannelGrid, optional
        Codes of the layer's inputs, where these are quantized, too.

    Examples
    --------
    >>> import comq_np
    >>> q = comq_np.solve([[-1.0], [0.0], [2.0]], [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], bits=2)
    >>> q.codes.ravel(), q.scale.item(), q.zero_point.item()
    (array([0, 1, 3], dtype=uint8), 1.0, 1)
    >>> q.dequantize().ravel()
    array([-1.,  0.,  2.], dtype=float32)
    """

    codes: npt.NDArray[np.uint8 | np.uint16]
    scale: npt.NDArray[np.float32 | np.float16]
    zero_point: grid.ZeroPoint
    bits: int
    levels: int
    group_size: int | Literal["tensor"] | None
    bias_shift: npt.NDArray[np.float32] | None
    report: SolveReport
    activation: InputGrid | None = None

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the weights that the codes stand for.

        Returns
        -------
        ndarray of float32, with the shape of `codes`
            ``scale * (codes - zero_point)``, each group's on its rows: first the difference, of integers or, with a
            real zero point, in float32; then one float32 product.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.solve([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], bits=4).dequantize().shape
        (2,)
        """
        rows = self.codes.shape[0 if self.codes.ndim == 1 else -2]
        group = np.arange(rows) // (self.group_size if isinstance(self.group_size, int) else rows)
        scale, zero_point = (np.take(values, group, axis=-2) for values in (self.scale, self.zero_point))
        return grid.decode(self.codes.reshape(scale.shape), scale, zero_point).reshape(self.codes.shape)

    def __repr__(self) -> str:
        return (
            f"QuantizedArray(codes={self.codes.shape}, bits={self.bits}, group_size={self.group_size!r}, "
            f"relative_error={self.report.relative_error:.3g})"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PlaneArray:
    """Codes whose bits have scales of their own: ``Wq = sum_k plane_scale_k * bit_k(codes) - offset``.

    Parameters
    ----------
    codes : ndarray of uint8, shape (m, n), (m,) or (b, m, n)
        Codes from 0 to ``2**bits - 1``.
    plane_scale : ndarray of float32 or float16, shape ([b,] bits, groups, n)
        Scale of each bit, the least significant one first, for each group of rows and column.
    offset : ndarray of float32 or float16, shape ([b,] groups, n)
        What is taken off.
    bits : int
        Bits of a code.
    group_size : int or None
        Rows that share scales and an offset, the last group maybe fewer; None is all of a column.
    bias_shift : ndarray of float32, shape ([b,] n), or None
        What to add to the layer's bias, where the solve fitted it.
    report : SolveReport
        How it came about.
    activation : ActivationGrid or ChannelGrid, optional
        Codes of the layer's inputs, where these are quantized, too.

    References
    ----------
    .. [1] C. Xu et al., "Alternating Multi-bit Quantization for Recurrent Neural Networks", arXiv:1802.00150.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> q = comq_np.solve([[-1.0], [0.0], [2.0], [3.0]], np.eye(4), bits=2, codebook="planes")
    >>> q.codes.ravel(), q.plane_scale.ravel(), q.offset.ravel()
    (array([0, 1, 2, 3], dtype=uint8), array([1., 3.], dtype=float32), array([1.], dtype=float32))
    """

    codes: npt.NDArray[np.uint8]
    plane_scale: npt.NDArray[np.float32 | np.float16]
    offset: npt.NDArray[np.float32 | np.float16]
    bits: int
    group_size: int | None
    bias_shift: npt.NDArray[np.float32] | None
    report: SolveReport
    activation: InputGrid | None = None

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Return the weights that the codes stand for.

        Returns
        -------
        ndarray of float32, with the shape of `codes`
            ``sum_k plane_scale_k * bit_k(codes) - offset``, each group's on its rows: in float32, from the least
            significant bit up, and then the offset.

        Examples
        --------
        >>> import comq_np
        >>> comq_np.solve([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], bits=4, codebook="planes").dequantize().shape
        (2,)
        """
        rows, columns = (self.codes.shape[0], 1) if self.codes.ndim == 1 else self.codes.shape[-2:]
        codes = self.codes.reshape(-1, rows, columns)
        levels = grid.plane_levels(np.moveaxis(self.plane_scale, -3, 0), self.offset)
        levels = levels.reshape(len(levels), len(codes), -1, columns)
        group = np.arange(rows) // (self.group_size or rows)
        problem = np.arange(len(codes))[:, None, None]
        return levels[codes, problem, group[:, None], np.arange(columns)].reshape(self.codes.shape)

    def __repr__(self) -> str:
        return (
            f"PlaneArray(codes={self.codes.shape}, bits={self.bits}, group_size={self.group_size!r}, "
            f"relative_error={self.report.relative_error:.3g})"
        )


#: What a solve returns.
Solved = QuantizedArray | PlaneArray
