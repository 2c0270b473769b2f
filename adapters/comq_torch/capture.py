"""From a model and its inputs to a calibration file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from comq_np import adapter
from comq_torch.model import TorchModel


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    path: adapter.Path,
    layers: Iterable[str] | None = None,
    *,
    forward: adapter.Forward | None = None,
    select: adapter.Select | None = None,
    memory: int | str | None = None,
    activation_bits: adapter.ActivationBits = None,
    activation_options: adapter.ActivationOptions = None,
    restart: bool = False,
    progress: bool = False,
) -> None:
    """Run a model and write weights and input Grams of its layers to a calibration file.

    Layers are `nn.Linear`, the `Conv1D` of Hugging Face transformers, `nn.Conv1d` to `nn.Conv3d` and their transposes
    with any groups, `nn.Embedding`, and the four weights of `nn.MultiheadAttention`, `in_proj.query`, `in_proj.key`,
    `in_proj.value` and `out_proj`, anywhere in the model. Modules that share one weight parameter are one layer, named
    by the first, with the inputs of all of them; a table that is the weight of a linear layer, too, is that layer.
    Other modules with weights, those whose weight is computed (a parametrization), and subclasses with a forward of
    their own, but for `nn.Linear`, are named in the file with the reason.

    The model runs in eval mode without gradients and is left as it was.

    Inputs are never kept, only their Grams. Where these take more than `memory`, they are gathered in several passes
    over the batches; the file is the same to the bit. What a pass has gathered is on the disk before the next one
    starts: after an interruption, the same call goes on there.

    Parameters
    ----------
    model : torch.nn.Module
        Model with its trained weights, of any float type.
    batches : iterable
        Inputs, on the model's device: a tensor is called ``model(x)``, a tuple or list ``model(*batch)``, a mapping
        ``model(**batch)``, anything else ``model(batch)``. Of what a layer gets in a batch, the first half goes to one
        fold of its Gram and the second to the other; a batch of one text or image goes to the two in turn. For several
        passes they must be the same each time, as those of a list are, and of a loader that does not shuffle. A mapping
        such as ``{"image": batches, "text": batches}`` has named groups of them, which count alike, however many or
        large their inputs are; the report of each layer has the error of each group (`comq_np.NamedGrams`).
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder.*.fc?"``; by default all layers.
    forward : callable, optional
        Called as ``forward(model, batch)`` in place of the plain call.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer, (..., m) or (N, C, ...), or the indices of a table;
        returns the samples of it that count, such as ``x[batch["attention_mask"].bool()]``.
    memory : int or str, optional
        Bytes for the Grams of one pass and the work on them, a number or a text such as "4GiB"; what running the model
        takes, and a float32 copy of one input, is beyond it. The model runs once more on the first batch, to find out
        which layers share a Gram. By default there is one pass, and nothing to go on from.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of all layers but tables; or of those whose names match a pattern, of which the last that
        matches counts. One pass over the batches more finds their grids, and the weights are solved to make up for a
        part of what the inputs lose. By default they stay float.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`, such as ``{"symmetric": True}``. Beside them, ``{"axis": "channel"}``
        gives each channel of an input a scale of its own, which the weights absorb (`comq_np.ChannelGrid`), but where
        something else uses these.
    restart : bool
        Whether to drop what an interrupted capture has finished. Where the layers, the model, the first batch, or the
        names of `forward` and `select` are other ones, there is no going on from that; all else must be the same.
    progress : bool
        Whether to show the plan of the passes, a progress bar, and which layers got fewer samples than they have rows,
        on standard error.

    Raises
    ------
    InputError
        If there is nothing to capture, a pattern matches no layer, or a weight or input is not finite; the message
        names the layer and the number of the batch, counted from 0. Also if `memory` does not hold the largest Gram, or
        the batches cannot be gone through often enough (which is told before the first pass) or change.
    FileError
        If the file cannot be written, another process writes it, or layers of another capture are kept.

    Warns
    -----
    UserWarning
        If some layers got no input; they are left out.

    Examples
    --------
    >>> import comq_np, comq_torch, os, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> comq_torch.capture(model, [torch.ones(5, 4)], path)
    >>> with comq_np.CalibrationFile(path) as file:
    ...     {name: layer.weight.shape for name, layer in file.items()}
    {'0': (4, 3), '2': (3, 2)}
    """
    found = TorchModel(model, forward)
    adapter.capture(
        found,
        batches,
        path,
        layers,
        select=select,
        memory=memory,
        activation_bits=activation_bits,
        activation_options=activation_options,
        restart=restart,
        progress=progress,
    )
