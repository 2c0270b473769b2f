"""What an error of each layer does to the output of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from comq_np import checks
from comq_np.adapter.batches import Batches
from comq_np.adapter.capture import Path
from comq_np.adapter.interface import Model
from comq_np.checks import InputError
from comq_np.quantized import QuantizedFile


def sensitivities(model: Model, batches: Iterable[Any], path: Path, *, progress: bool = False) -> dict[str, float]:
    """Relative error of a model's output with one quantized layer after another, by the relative error of the layer.

    With ``y`` the output of the float model and ``y_k`` that with layer k alone quantized, whose own outputs have the
    relative error ``r_k``, the sensitivity is ``||y_k - y||**2 / ||y||**2 / r_k``. Only forward passes are made: one
    over the batches for each layer, on a copy of the model.

    Parameters
    ----------
    model : Model
        Model; it must have a `copy` and an `output`, and stays as it is.
    batches : iterable
        What `Model.output` takes; all of them, and the outputs of the float model, are in memory.
    path : str or path-like
        Quantized file of the model with few bits, so that the errors are those that matter.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    dict of float
        Sensitivity of each layer of the file, by its name there; 0 of one whose error the output does not show.

    Raises
    ------
    InputError
        If a layer is not in the model or has no error in the file, there is no batch, or an output is 0 or not finite.
    FileError
        If the file cannot be read.
    """
    progress, samples = checks.boolean("progress", progress), list(Batches(batches, model.leaf).one_pass(1, False))
    found: dict[str, float] = {}
    with QuantizedFile(path) as file:
        _check(file, model)
        exact = _outputs(model, samples)
        size = sum(float(np.vdot(y, y)) for y in exact)
        if not 0 < size < np.inf:
            raise InputError(f"`model` must have outputs that are finite and not all 0, got a sum of squares {size:g}.")
        for name in tqdm(file, desc="sensitivities", unit="layer", disable=not progress):
            q, changed = file[name], model.copy()
            layer = next(layer for layer in changed.layers if name in layer.names)
            layer.write(q.dequantize(), q.bias_shift, q)
            apart = (got - y for got, y in zip(_outputs(changed, samples), exact, strict=True))
            error = sum(float(np.vdot(e, e)) for e in apart) / size
            with checks.layer(name):
                if not error < np.inf:
                    raise InputError("must leave the model's outputs finite when it is quantized.")
            found[name] = error / q.report.relative_error
    return found


def _check(file: QuantizedFile, model: Model) -> None:
    shapes = {name: layer.shape for layer in model.layers for name in layer.names}
    for name in file:
        with checks.layer(name):
            if name not in shapes:
                raise InputError("must be a layer of the model.")
            error = file.report(name).relative_error
            if not 0 < error < np.inf:
                raise InputError(f"must have a relative error in the file, has {error:g}: take fewer bits.")


def _outputs(model: Model, batches: list[Any]) -> list[npt.NDArray[np.float64]]:
    with model.evaluating():
        return [np.asarray(model.output(batch), np.float64) for batch in batches]
