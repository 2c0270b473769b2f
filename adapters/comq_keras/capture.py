"""From a model and its inputs to a calibration file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from comq_keras.model import KerasModel
from comq_np import adapter


def capture(
    model: keras.Model,
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

    Layers are `Dense`, `EinsumDense`, `Embedding`, `Conv1D`, `Conv2D` and `Conv3D`, with groups or not,
    `DepthwiseConv1D` and `DepthwiseConv2D`, and `Conv1DTranspose`, `Conv2DTranspose` and `Conv3DTranspose`, anywhere in
    a functional, sequential or subclassed model, in attention layers, too. Layers with other weight matrices stay
    float, as do those with a call of their own, a LoRA adapter, or weights that are quantized already; the file says
    why. A name is that of the layer after those of the layers that it is in, without the model's, such as
    ``"block/attention/query"``; a number follows where several have the same.

    The model runs eagerly, with ``training=False``, and is left as it was. Inputs are never kept, only their Grams,
    which NumPy adds up. Where these take more than `memory`, they are gathered in several passes over the batches; the
    file is the same to the bit. What a pass has gathered is on the disk before the next one starts: after an
    interruption, the same call goes on there.

    Parameters
    ----------
    model : keras.Model
        Model with its trained weights, of any float type and on any back end; or a layer.
    batches : iterable
        Inputs, each called ``model(batch, training=False)``. Of what a layer gets in a batch, the first half goes to
        one fold of its Gram and the second to the other; a batch of one text or image goes to the two in turn. For
        several passes they must be the same each time, as those of a list are. A mapping has named groups of batches,
        which count alike, as in `comq_torch.capture`.
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder*/query"``; by default all layers.
    forward : callable, optional
        Called as ``forward(model, batch)`` in place of the plain call. It must run eagerly, which `predict` does on
        PyTorch only.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer; returns the samples of it that count, such as
        ``x[batch["mask"]]``.
    memory : int or str, optional
        Bytes for the Grams of one pass and the work on them, a number or a text such as "4GiB"; what running the model
        takes, and a float32 copy of one input, is beyond it. The model runs once more on the first batch, to find out
        which layers share a Gram. By default there is one pass, and nothing to go on from.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of all layers but tables; or of those whose names match a pattern, of which the last that
        matches counts. One pass over the batches more finds their grids, and the weights are solved to make up for a
        part of what the inputs lose. By default they stay float. Such a file is for other adapters: `apply` refuses it.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`, such as ``{"symmetric": True}``.
    restart : bool
        Whether to drop what an interrupted capture has finished. Where the layers, the model, the first batch, or the
        names of `forward` and `select` are other ones, there is no going on from that; all else must be the same.
    progress : bool
        Whether to show the plan of the passes, a progress bar, and which layers got fewer samples than they have rows,
        on standard error.

    Raises
    ------
    InputError
        If there is nothing to capture, the model is not built, a pattern matches no layer, or a weight or input is not
        finite; the message names the layer and the number of the batch, counted from 0. Also if a layer is called
        while its back end traces it, if `memory` does not hold the largest Gram, or the batches cannot be gone through
        often enough (which is told before the first pass) or change.
    FileError
        If the file cannot be written, another process writes it, or layers of another capture are kept.

    Warns
    -----
    UserWarning
        If some layers got no input; they are left out.

    Examples
    --------
    >>> import comq_keras, comq_np, keras, numpy as np, os, tempfile
    >>> layers = [keras.layers.Dense(3, activation="relu", name="hidden"), keras.layers.Dense(2, name="output")]
    >>> model, path = keras.Sequential([keras.Input((4,)), *layers]), os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> comq_keras.capture(model, [np.ones((5, 4))], path)
    >>> with comq_np.CalibrationFile(path) as file:
    ...     {name: layer.weight.shape for name, layer in file.items()}
    {'hidden': (4, 3), 'output': (3, 2)}
    """
    found = KerasModel(model, forward)
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
