"""From a quantized file back into the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from comq_np import checks
from comq_np.adapter.capture import Path, capture, choose
from comq_np.adapter.inputs import ActivationBits, ActivationOptions, activations, check_inputs
from comq_np.adapter.interface import Model, Select, WeightLayer
from comq_np.adapter.sequential import quantize_in_sequence
from comq_np.calibration import CalibrationWriter
from comq_np.channels import ChannelGrid
from comq_np.checks import InputError
from comq_np.pipeline import Reports, quantize_file
from comq_np.quantized import QuantizedFile
from comq_np.result import Solved
from comq_np.widths import layer_bits


def apply(model: Model, path: Path, *, names: Mapping[str, str] | None = None) -> None:
    """Write the quantized weights of a file into a model, once all of them are known to fit.

    Parameters
    ----------
    model : Model
        Model to change.
    path : str or path-like
        Quantized file, as `comq_np.quantize_file` writes it.
    names : mapping from str to str, optional
        Names in the model of layers that have others in the file.

    Raises
    ------
    InputError
        If a layer of the file is not in the model or of another shape, has a bias shift but no bias of its own, or its
        `check` refuses it; or if `names` has a name that is not in the file. The model is unchanged then.
    FileError
        If the file cannot be read.
    """
    layers = {name: layer for layer in model.layers for name in layer.names}
    with QuantizedFile(path) as file:
        targets = _targets(list(file), list(file.kept), names or {})
        taken: dict[WeightLayer, str] = {}
        for name, q in file.items():
            found = layers.get(targets[name])
            with checks.layer(name):
                _check(q, found, targets[name] if targets[name] != name else "")
            other = taken.setdefault(layers[targets[name]], name)
            if other != name:
                raise InputError(f"layer {name!r}: shares its weight with layer {other!r}, the file holds both.")
        for name, q in file.items():
            layers[targets[name]].write(q.dequantize(), q.bias_shift, q)


def _targets(inside: list[str], kept: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Name in the model of each layer in the file."""
    for name in names:
        if name not in inside and name not in kept:
            raise InputError(f"`names` must map names of layers in the file, got {name!r}, which it lacks.")
    return {name: names.get(name, name) for name in inside}


def _check(q: Solved, found: WeightLayer | None, target: str) -> None:
    if found is None:
        where = f"layer {target!r} of the model" if target else "a layer of the model"
        raise InputError(f"must be {where}, to take codes of shape {q.codes.shape}.")
    if q.codes.shape != found.shape:
        raise InputError(f"must have codes of shape {found.shape} to match the model, has {q.codes.shape}.")
    if q.bias_shift is not None and not found.has_bias:
        raise InputError("must have a bias of its own, as the file has a `bias_shift` for it.")
    if q.activation is not None:
        check_inputs(found)
    if isinstance(q.activation, ChannelGrid) and q.activation.channels != found.channels:
        has = f"of {found.channels} channels" if found.channels else "that something else uses, too"
        raise InputError(
            f"must have a weight of {q.activation.channels} channels to absorb their scales, has one {has}."
        )
    found.check_writable()
    found.check(q)


def quantize(
    model: Model,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    layers: Iterable[str] | None = None,
    *,
    select: Select | None = None,
    memory: int | str | None = None,
    sequential: bool = False,
    activation_bits: ActivationBits = None,
    activation_options: ActivationOptions = None,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model: `capture`, `comq_np.quantize_file` and `apply` through temporary files.

    Parameters
    ----------
    model : Model
        Model to change.
    batches : iterable
        Inputs, as in `capture`, like `layers`, `select`, `memory`, the `activation_` options and `progress`.
    bits : int from 1 to 16, or mapping from str to such an int
        Bits of one code; or those of layers by their names, or by patterns of which the last that matches counts.
    layers : iterable of str, optional
        Names of layers, or patterns.
    select : callable, optional
        Picks the samples that count.
    memory : int or str, optional
        Bytes for the Grams of one pass over the batches and the work on them.
    sequential : bool
        Whether to call `quantize_in_sequence` in their place.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of layers.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`.
    progress : bool
        Whether to show progress bars on standard error.
    **options : keyword arguments
        Options of `comq_np.quantize_file`, or of `quantize_in_sequence`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` has the reason why each other one stays float.

    Raises
    ------
    InputError
        As in the three; of wrong options before the model runs. Also for `memory` with `sequential`.
    """
    inputs: dict[str, Any] = {"activation_bits": activation_bits, "activation_options": activation_options}
    if checks.boolean("sequential", sequential):
        if memory is not None:
            raise InputError(
                f"`memory` must be None with `sequential`, which gathers one Gram at a time, got {memory!r}."
            )
        return quantize_in_sequence(model, batches, bits, layers, select=select, progress=progress, **inputs, **options)
    layers = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    chosen, skipped = choose(model, layers)
    layer_bits(bits, [layer.name for layer in chosen], skipped=skipped)
    quantized_inputs = activations(activation_bits, activation_options, chosen, skipped).bits
    for layer in chosen:
        with checks.layer(layer.name):
            layer.check_writable()
            if layer.name in quantized_inputs:
                check_inputs(layer)
    with tempfile.TemporaryDirectory() as folder:
        calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "quantized.h5"))
        with CalibrationWriter(calibration):
            pass
        quantize_file(calibration, quantized, bits, **options)  # refuses wrong options before the model runs
        capture(model, batches, calibration, layers, select=select, memory=memory, progress=progress, **inputs)
        reports = quantize_file(calibration, quantized, bits, progress=progress, **options)
        apply(model, quantized)
    return reports
