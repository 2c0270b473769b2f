"""What an error of each layer does to the output of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from comq_np import adapter
from comq_torch.model import TorchModel


def sensitivities(
    model: nn.Module,
    batches: Iterable[Any],
    path: adapter.Path,
    *,
    forward: adapter.Forward | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure how much a relative error of each layer changes the output of the model: for `comq_np.allocate_bits`.

    With ``y`` the output of the float model and ``y_k`` that with layer k alone quantized, whose own outputs have the
    relative error ``r_k``, the sensitivity is ``||y_k - y||**2 / ||y||**2 / r_k``. Only forward passes are made: one
    over the batches for each layer, on a copy of the model.

    Parameters
    ----------
    model : torch.nn.Module
        Model with its trained weights, which stays as it is.
    batches : iterable
        Inputs, as in `capture`; a few are enough. Where only few were calibrated on, take others: on those, layers
        that were fitted to them err less than on any other. All of them, and the outputs of the float model, are in
        memory.
    path : str or path-like
        Quantized file of the model with few bits, as `comq_np.quantize_file` writes it.
    forward : callable, optional
        Called as ``forward(model, batch)`` in place of the plain call; returns what of the output counts. Otherwise
        that is the first tensor of floats in it.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    dict of float
        Sensitivity of each layer of the file; 0 of one whose error the output does not show.

    Raises
    ------
    InputError
        If a layer is not in the model or has no error in the file, there is no batch, or an output is no tensor of
        floats, 0 or not finite.
    FileError
        If the file cannot be read.

    Examples
    --------
    >>> import comq_np, comq_torch, os, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5))
    >>> batches, folder = [torch.randn(50, 8)], tempfile.mkdtemp()
    >>> calibration, quantized = (os.path.join(folder, name) for name in ("calibration.h5", "2-bit.h5"))
    >>> comq_torch.capture(model, batches, calibration)
    >>> reports = comq_np.quantize_file(calibration, quantized, bits=2)
    >>> found = comq_torch.sensitivities(model, batches, quantized)
    >>> plan = comq_np.allocate_bits(calibration, 14, sensitivities=found)
    >>> list(found) == list(plan)
    True
    """
    return adapter.sensitivities(TorchModel(model, forward), batches, path, progress=progress)
