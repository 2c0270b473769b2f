"""Whether a quantized file is what its reports say, by its calibration file."""

from __future__ import annotations

import dataclasses

import numpy as np
from tqdm import tqdm

from comq_np import checks
from comq_np.counts import TokenCounts
from comq_np.cross import matched_weights
from comq_np.crossgram import CrossGram
from comq_np.layouts import Float64, combined
from comq_np.modalities import NamedGrams
from comq_np.result import Solved
from comq_np.store import CalibrationFile, Layer, Path, QuantizedFile

#: Relative difference that the order of a float64 sum may leave between two computations of an objective.
ROUNDING = 1e-6
#: The same for an objective that is next to nothing, relative to (sum_i sqrt(G_ii) |e_i|)**2, which no error e exceeds.
FLOOR = 1e-12
#: The first where the weights that the objective refers to are computed anew, in float32.
MATCHED = 1e-3


@dataclasses.dataclass(frozen=True)
class Verification:
    """What came of recomputing the objective of one layer from its stored codes.

    Parameters
    ----------
    name : str
        Name of the layer.
    reported : float
        Objective in the stored report.
    recomputed : float
        Objective of the stored codes on the Gram of the calibration file.
    matches : bool
        Whether they are the same up to rounding, and so is the bias shift, where there is one.

    Examples
    --------
    >>> import comq_np
    >>> comq_np.Verification("fc", 1.0, 2.0, matches=False).name
    'fc'
    """

    name: str
    reported: float
    recomputed: float
    matches: bool


def verify_file(calibration: Path, quantized: Path, *, progress: bool = False) -> list[Verification]:
    """Recompute the objective of every layer from its stored codes and compare it with the stored report.

    What that proves: everything in both files is what was written, as far as their digests tell; the codes, scales and
    zero points have the objective that their report says, on the weights and Grams of the calibration file, in double
    precision; and a bias shift is the mean error of the outputs. Of a layer whose inputs are quantized, the objective
    is that of the weights that match the float model's outputs best, and the grid of the inputs is the one that they
    were calibrated on. It does not prove that no better codes exist (see `certify`), nor anything of other inputs, nor
    who wrote the files.

    Parameters
    ----------
    calibration : str or path-like
        Calibration file that `quantized` was solved from.
    quantized : str or path-like
        Quantized file.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    list of Verification
        One for each layer that is solved in the quantized file; what it says of others, `QuantizedFile.kept`, proves
        itself: the model has them as they were.

    Raises
    ------
    FileError
        If a file cannot be read or is damaged, or the files do not hold the same layers.

    Examples
    --------
    >>> import comq_np, numpy as np, os, tempfile
    >>> folder, gram = tempfile.mkdtemp(), comq_np.Gram(2)
    >>> gram.update([[1.0, 2.0], [3.0, 0.0]])
    >>> calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "quantized.h5"))
    >>> with comq_np.CalibrationWriter(calibration) as file:
    ...     file.add(comq_np.Layer("fc", np.array([[0.3, 1.0], [0.1, 2.0]]), gram))
    >>> reports = comq_np.quantize_file(calibration, quantized, bits=3)
    >>> [layer.matches for layer in comq_np.verify_file(calibration, quantized)]
    [True]
    """
    with CalibrationFile(calibration) as source, QuantizedFile(quantized) as target:
        held = [*target, *target.kept]
        for here, there, path in ((source, held, quantized), (held, source, calibration)):
            missing = [name for name in here if name not in there]
            if missing:
                raise checks.FileError(f"{path}: must hold layer {missing[0]!r}, as the other file does, but lacks it.")
        layers = []
        for name in tqdm(target, desc="verify", unit="layer", disable=not progress):
            layer = source[name]  # the layer before is let go only now: a Gram that they share is not read again
            layers.append(_verify(layer, target[name]))
        return layers


def _verify(layer: Layer, q: Solved) -> Verification:
    if q.codes.shape != layer.weight.shape:
        raise checks.FileError(
            f"layer {layer.name!r}: must have codes of shape {layer.weight.shape}, as its weight has, "
            f"has {q.codes.shape}."
        )
    if isinstance(layer.gram, CrossGram):
        return _verify_crossed(layer, layer.gram, q)
    E = layer.weight.astype(np.float64) - q.dequantize()
    if isinstance(layer.gram, TokenCounts):
        recomputed = float(layer.gram.counts @ np.square(E).sum(axis=1))
        matches = abs(recomputed - q.report.objective) <= ROUNDING * max(recomputed, q.report.objective)
        return Verification(layer.name, q.report.objective, recomputed, bool(matches))
    gram = layer.gram
    if isinstance(gram, NamedGrams):
        gram = gram.balanced(layer.weight, centred=q.bias_shift is not None)
    G = gram.matrix if q.bias_shift is None else gram.centred
    return _compared(layer.name, q, E, G, combined(gram.mean, E), ROUNDING)


def _verify_crossed(layer: Layer, gram: CrossGram, q: Solved) -> Verification:
    """The same of what was solved for the outputs of the float model, on the grid of the inputs that is in the file."""
    plain, cross = gram.problem(centred=q.bias_shift is not None)
    weight = gram.absorbed(layer.weight)
    E = matched_weights(weight, plain, cross).astype(np.float64) - q.dequantize()
    shift = combined(gram.exact_mean, weight) - combined(gram.mean, q.dequantize())
    found = _compared(layer.name, q, E, plain.matrix, shift, MATCHED)
    return dataclasses.replace(found, matches=found.matches and q.activation == gram.grid)


def _compared(name: str, q: Solved, E: Float64, G: Float64, shift: Float64, rounding: float) -> Verification:
    """Objective of errors E on a matrix, beside the one in the report, and the bias shift beside the right one."""
    recomputed, reported = max(float(np.vdot(E, G @ E)), 0.0), q.report.objective  # as `solve` reports it
    most = combined(np.sqrt(np.maximum(np.diagonal(G, axis1=-2, axis2=-1), 0)), np.abs(E))
    matches = abs(recomputed - reported) <= rounding * max(recomputed, reported) + FLOOR * float(np.vdot(most, most))
    if q.bias_shift is not None:
        matches = matches and np.allclose(q.bias_shift, shift, rtol=1e-5, atol=1e-6 * np.abs(shift).max())
    return Verification(name, reported, recomputed, bool(matches))
