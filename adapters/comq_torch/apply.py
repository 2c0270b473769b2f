"""From a quantized file back into the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import comq_np
from comq_np import InputError, QuantizedArray, Reports
from comq_torch.capture import Path, capture
from comq_torch.layers import WeightLayer, find
from comq_torch.observer import Forward, Select
from comq_torch.packed import can_pack, pack


def apply(model: nn.Module, path: Path, *, packed: bool = False) -> nn.Module:
    """Write the quantized weights of a file into a model, in place.

    Every weight becomes what its codes stand for, in the parameter's own type; whatever else uses the parameter, such
    as an embedding, sees it, too. A bias shift is added to the bias: apply a file once, to the model it was made from.

    Parameters
    ----------
    model : torch.nn.Module
        Model to change.
    path : str or path-like
        Quantized file, as `comq_np.quantize_file` writes it.
    packed : bool
        Whether to put modules that keep only the packed codes in place of the layers. They decode them at every use.

    Returns
    -------
    torch.nn.Module
        The model; with `packed`, and if it is itself a layer, the module in its place.

    Raises
    ------
    InputError
        If a layer of the file is not in the model or of another shape, has a bias shift but no bias of its own, or
        cannot be packed. The model is unchanged then.
    FileError
        If the file cannot be read.

    Examples
    --------
    >>> import comq_np, comq_torch, os, tempfile, torch
    >>> model, path = torch.nn.Sequential(torch.nn.Linear(2, 1)), os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("0", comq_np.solve([[0.25], [1.0]], [[2.0, 1.0], [1.0, 2.0]]))
    >>> comq_torch.apply(model, path)[0].weight.shape
    torch.Size([1, 2])
    """
    layers = {name: layer for layer in find(model) for name in layer.names}
    with comq_np.QuantizedFile(path) as file:
        taken: dict[WeightLayer, str] = {}
        for name, q in file.items():
            _check(name, q, layers.get(name), packed)
            other = taken.setdefault(layers[name], name)
            if other != name:
                raise InputError(f"layer {name!r}: shares its weight with layer {other!r}, the file holds both.")
        for name, q in file.items():
            layer = layers[name]
            layer.write(torch.from_numpy(q.dequantize()))
            if layer.bias is not None and q.bias_shift is not None:
                with torch.no_grad():
                    layer.bias.add_(torch.from_numpy(q.bias_shift).to(layer.bias.device))
            if packed:
                model = _swap(model, dict(zip(layer.modules, pack(layer.modules, q), strict=True)), layer.names)
    return model


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int = 4,
    *,
    layers: Iterable[str] | None = None,
    forward: Forward | None = None,
    select: Select | None = None,
    memory: int | str | None = None,
    packed: bool = False,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model in place: `capture`, `comq_np.quantize_file` and `apply` through temporary files.

    Parameters
    ----------
    model : torch.nn.Module
        Model with its trained weights.
    batches : iterable
        Inputs, as in `capture`, like `layers`, `forward` and `select`.
    bits : int from 1 to 16
        Bits of one code.
    layers : iterable of str, optional
        Names of layers, or patterns.
    forward : callable, optional
        Called in place of the model.
    select : callable, optional
        Picks the samples that count.
    memory : int or str, optional
        Bytes for the Grams of one pass over the batches and the work on them, as in `capture`.
    packed : bool
        Whether to keep only packed codes, as in `apply`.
    progress : bool
        Whether to show progress bars on standard error.
    **options : keyword arguments
        Options of `comq_np.quantize_file`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` has the reason why each other one stays float.

    Raises
    ------
    InputError
        As in the three; also if the model is itself a layer and to be packed, which only `apply` can return.

    Examples
    --------
    >>> import comq_torch, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> list(comq_torch.quantize(model, [torch.randn(20, 4)], bits=3))
    ['0', '2']
    """
    if packed and any("" in layer.names for layer in find(model)):
        raise InputError(f"`model` must not be a layer itself with `packed`, got {type(model).__name__!r}.")
    with tempfile.TemporaryDirectory() as folder:
        calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "quantized.h5"))
        with comq_np.CalibrationWriter(calibration):
            pass
        comq_np.quantize_file(calibration, quantized, bits, **options)  # refuses wrong options before the model runs
        capture(model, batches, calibration, layers, forward=forward, select=select, memory=memory, progress=progress)
        reports = comq_np.quantize_file(calibration, quantized, bits, progress=progress, **options)
        apply(model, quantized, packed=packed)
    return reports


def _check(name: str, q: QuantizedArray, layer: WeightLayer | None, packed: bool) -> None:
    if layer is None:
        raise InputError(f"layer {name!r}: must be a layer of the model, to take codes of shape {q.codes.shape}.")
    shape = tuple(layer.matrix.shape)
    if q.codes.shape != shape:
        raise InputError(f"layer {name!r}: must have codes of shape {shape} to match the model, has {q.codes.shape}.")
    if q.bias_shift is not None and layer.bias is None:
        raise InputError(f"layer {name!r}: must have a bias of its own, as the file has a `bias_shift` for it.")
    for module in layer.modules if packed else ():
        if not can_pack(module):
            kind = type(module).__name__
            raise InputError(f"layer {name!r}: must have the forward of its kind to be packed, {kind!r} has its own.")


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module], names: list[str]) -> nn.Module:
    """Put new modules in the place of those with these names; the model, or what replaces it."""
    for name in names:
        old = model.get_submodule(name)
        new = swaps.get(old, old)  # reached under another name of its parent, it is new already
        if not name:
            return new
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model
