"""From a quantized file back into the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from comq_keras.model import KerasModel
from comq_np import Reports, adapter


def apply(model: keras.Model, path: adapter.Path, *, names: Mapping[str, str] | None = None) -> keras.Model:
    """Write the quantized weights of a file into a model, in place.

    Every weight becomes what its codes stand for, in the variable's own type. A bias shift is added to the bias: apply
    a file once, to the model it was made from.

    Parameters
    ----------
    model : keras.Model
        Model to change.
    path : str or path-like
        Quantized file, as `comq_np.quantize_file` writes it.
    names : mapping from str to str, optional
        Names in the model of layers that have others in the file, such as one of another adapter.

    Returns
    -------
    keras.Model
        The model.

    Raises
    ------
    InputError
        If a layer of the file is not in the model or of another shape, or has a bias shift but no bias of its own; or
        if `names` has a name that is not in the file. The model is unchanged then.
    FileError
        If the file cannot be read.

    Examples
    --------
    >>> import comq_keras, comq_np, keras, os, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="output")])
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("output", comq_np.solve([[0.25], [1.0]], [[2.0, 1.0], [1.0, 2.0]]))
    >>> comq_keras.apply(model, path) is model
    True
    """
    adapter.apply(KerasModel(model), path, names=names)
    return model


def quantize(
    model: keras.Model,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    layers: Iterable[str] | None = None,
    forward: adapter.Forward | None = None,
    select: adapter.Select | None = None,
    memory: int | str | None = None,
    sequential: bool = False,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model in place: `capture`, `comq_np.quantize_file` and `apply` through temporary files.

    With `sequential`, layer after layer: each is calibrated on the inputs that it gets from the quantized ones before
    it, to give the outputs of the float model, whose weights are kept meanwhile. What is on the way between two layers
    is in memory for all batches. Each of them runs once.

    Parameters
    ----------
    model : keras.Model
        Model with its trained weights.
    batches : iterable
        Inputs, as in `capture`, like `layers`, `forward` and `select`.
    bits : int from 1 to 16, or mapping from str to such an int
        Bits of one code; or those of layers by their names, or by patterns of which the last that matches counts.
    layers : iterable of str, optional
        Names of layers, or patterns.
    forward : callable, optional
        Called in place of the model.
    select : callable, optional
        Picks the samples that count.
    memory : int or str, optional
        Bytes for the Grams of one pass over the batches and the work on them, as in `capture`.
    sequential : bool
        Whether each layer is calibrated on what the quantized ones before it make of the batches.
    progress : bool
        Whether to show progress bars on standard error.
    **options : keyword arguments
        Options of `comq_np.quantize_file`; with `sequential`, those of `comq_np.solve`, and `fit_bias` and `strict`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` and `skipped` have the reasons why others stay float.

    Raises
    ------
    InputError
        As in the three; also for `memory` with `sequential`.

    Examples
    --------
    >>> import comq_keras, keras, numpy as np
    >>> layers = [keras.layers.Dense(3, activation="relu", name="hidden"), keras.layers.Dense(2, name="output")]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> list(comq_keras.quantize(model, [np.random.default_rng(0).normal(size=(20, 4))], bits=3))
    ['hidden', 'output']
    """
    found = KerasModel(model, forward)
    return adapter.quantize(
        found,
        batches,
        bits,
        layers,
        select=select,
        memory=memory,
        sequential=sequential,
        progress=progress,
        **options,
    )
