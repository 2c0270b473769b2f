"""From a quantized file back into the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from comq_np import InputError, Reports, adapter
from comq_torch.model import TorchModel


def apply(
    model: nn.Module, path: adapter.Path, *, names: Mapping[str, str] | None = None, packed: bool = False
) -> nn.Module:
    """Write the quantized weights of a file into a model, in place.

    Every weight becomes what its codes stand for, in the parameter's own type; whatever else uses the parameter, such
    as an embedding, sees it, too. A bias shift is added to the bias: apply a file once, to the model it was made from.

    A layer whose inputs the file has a grid for (`activation_bits`) quantizes them from then on, before it multiplies:
    its module has a child `input_quantizer`, with scale, zero point and levels in its state dict, and a hook that calls
    it. Sums of such inputs times codes are those of integers, up to the rounding of float32. A later `apply` of a file
    without grids takes them off.

    Parameters
    ----------
    model : torch.nn.Module
        Model to change.
    path : str or path-like
        Quantized file, as `comq_np.quantize_file` writes it.
    names : mapping from str to str, optional
        Names in the model of layers that have others in the file, such as one of another adapter.
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
        cannot be packed; or if `names` has a name that is not in the file. The model is unchanged then.
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
    found = TorchModel(model, packed=packed)
    adapter.apply(found, path, names=names)
    return found.module


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    layers: Iterable[str] | None = None,
    forward: adapter.Forward | None = None,
    select: adapter.Select | None = None,
    memory: int | str | None = None,
    activation_bits: adapter.ActivationBits = None,
    activation_options: adapter.ActivationOptions = None,
    sequential: bool = False,
    packed: bool = False,
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model in place: `capture`, `comq_np.quantize_file` and `apply` through temporary files.

    With `sequential`, layer after layer: each is calibrated on the inputs that it gets from the quantized ones before
    it, to give the outputs that the float model has, of which there is a copy meanwhile. What is on the way between two
    layers is in memory for all batches. Each of them runs once.

    Parameters
    ----------
    model : torch.nn.Module
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
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of layers, as in `capture`; by default they stay float.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`.
    sequential : bool
        Whether each layer is calibrated on what the quantized ones before it make of the batches.
    packed : bool
        Whether to keep only packed codes, as in `apply`.
    progress : bool
        Whether to show progress bars on standard error.
    **options : keyword arguments
        Options of `comq_np.quantize_file`; with `sequential`, those of `comq_np.solve`, and `fit_bias` and `strict`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` has the reason why each other one stays float.

    Raises
    ------
    InputError
        As in the three; also if the model is itself a layer and to be packed, which only `apply` can return, or for
        `memory` with `sequential`.

    Examples
    --------
    >>> import comq_torch, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> list(comq_torch.quantize(model, [torch.randn(20, 4)], bits=3))
    ['0', '2']
    """
    found = TorchModel(model, forward, packed)
    if packed and any("" in layer.names for layer in found.layers):
        raise InputError(f"`model` must not be a layer itself with `packed`, got {type(model).__name__!r}.")
    return adapter.quantize(
        found,
        batches,
        bits,
        layers,
        select=select,
        memory=memory,
        sequential=sequential,
        activation_bits=activation_bits,
        activation_options=activation_options,
        progress=progress,
        **options,
    )
