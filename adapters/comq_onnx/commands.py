"""Capture, apply, and both with the solve between them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx

from comq_np import InputError, Reports, adapter
from comq_onnx.model import GraphModel, Source

Path = str | os.PathLike[str]
FORMATS = ("qdq", "matmulnbits")


def capture(
    model: Source,
    batches: Iterable[Any],
    path: Path,
    layers: Iterable[str] | None = None,
    *,
    select: adapter.Select | None = None,
    memory: int | str | None = None,
    activation_bits: adapter.ActivationBits = None,
    activation_options: adapter.ActivationOptions = None,
    providers: Sequence[str] | None = None,
    restart: bool = False,
    progress: bool = False,
) -> None:
    """Run a model under onnxruntime and write weights and input Grams of its layers to a calibration file.

    Layers are MatMul and Gemm nodes with a constant matrix, Conv and ConvTranspose with a constant kernel, with any
    groups, and Gather of rows of a constant table, if the weight is an initializer or a Constant, or for a matrix the
    transpose of one. Nodes with the same weight are one layer. A layer has the name of its module where PyTorch's
    exporter has left it in that of the weight or the bias; if not, that of its node. Other nodes with weights, and
    those in sub-graphs, stay float and are listed in the file as skipped.

    Inputs are never kept, only their Grams. Those of the layers whose Grams are gathered become outputs of the model
    meanwhile, and are all in memory for one batch.

    Parameters
    ----------
    model : str, path-like, bytes or onnx.ModelProto
        Model; by its path, if its weights are in files of their own.
    batches : iterable
        Inputs: a mapping from names to arrays, a tuple or list in the order of the model's inputs, or an array for the
        only one. Halves of a batch go to the folds of a Gram, and a mapping of iterables of inputs has named groups of
        them, which count alike, as in `comq_torch.capture`.
    path : str or path-like
        Calibration file to write.
    layers : iterable of str, optional
        Names of layers, or patterns such as ``"encoder.*.fc?"``; by default all layers.
    select : callable, optional
        Called as ``select(x, batch)`` on each input of a layer; returns the samples of it that count.
    memory : int or str, optional
        Bytes for the Grams of one pass over the batches and the work on them, a number or a text such as "4GiB"; what
        running the model takes is beyond it. By default there is one pass, and nothing to go on from.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of all layers but tables; or of those whose names match a pattern, of which the last that
        matches counts. One pass over the batches more finds their grids, and the weights are solved to make up for a
        part of what the inputs lose. By default they stay float.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`, such as ``{"symmetric": True}``. Beside them, ``{"axis": "channel"}``
        gives each channel of an input a scale of its own, which the weights absorb (`comq_np.ChannelGrid`), but where
        something else uses these.
    providers : sequence of str, optional
        Execution providers of onnxruntime, by default the CPU's.
    restart : bool
        Whether to drop what an interrupted capture has finished.
    progress : bool
        Whether to show progress on standard error.

    Raises
    ------
    InputError
        If the model has no such layers or cannot be read, a batch does not have its inputs, or as
        `comq_torch.capture` says.
    FileError
        If the file cannot be written, another process writes it, or layers of another capture are kept.

    Examples
    --------
    >>> import comq_np, comq_onnx, numpy as np, onnx, os, tempfile
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 10, opset_import: ["" : 21]> net (float[N, 2] x) => (float[N, 3] y)
    ...     <float[2, 3] fc_weight = {1, -2, 3, -4, 5, -6}> { y = MatMul(x, fc_weight) }''')
    >>> path = os.path.join(tempfile.mkdtemp(), "calibration.h5")
    >>> comq_onnx.capture(model, [np.ones((5, 2), np.float32)], path)
    >>> with comq_np.CalibrationFile(path) as file:
    ...     {name: layer.weight.shape for name, layer in file.items()}
    {'fc': (2, 3)}
    """
    graph = GraphModel(model, providers)
    adapter.capture(
        graph,
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


def apply(
    model: Source,
    path: Path,
    output: Path | None = None,
    *,
    names: Mapping[str, str] | None = None,
    format: str = "qdq",  # noqa: A002
) -> onnx.ModelProto:
    """Make a model with the codes of a quantized file in place of the float weights.

    Codes, scales and zero points are those of the file: where a zero point does not lie within the type of the codes,
    both lie higher by the same number, or are of a wider type. The model is converted to opset 21, or 25 for codes of 2
    bits, if it is of an earlier one. With a bias shift, the constant that is added gets it.

    Inputs of a layer that are quantized go through QuantizeLinear and DequantizeLinear, in bytes, whatever their bits;
    where these are fewer than 8, a Clip is before them.

    Under onnxruntime, all is computed in float32 from the weights that the codes stand for: outputs equal those of
    the model with these weights up to the rounding of float32, about 1e-6 of the largest one for each layer.

    Parameters
    ----------
    model : str, path-like, bytes or onnx.ModelProto
        Model that the weights are from, which stays as it is.
    path : str or path-like
        Quantized file, as `comq_np.quantize_file` writes it, from a capture of this or any other adapter.
    output : str or path-like, optional
        File to write the new model to; with 1.5 GiB of weights or more, these are in another one, ``NAME.data``.
    names : mapping from str to str, optional
        Names in the model of layers that have others in the file.
    format : "qdq" or "matmulnbits"
        How weights are made of codes. With "qdq" by DequantizeLinear, whose codes are of 2, 4, 8, 16 or 32 bits, with
        a scale for each output channel or group of rows; rows of a table are gathered before that. With "matmulnbits",
        MatMul and Gemm with codes of up to 4 bits are onnxruntime's MatMulNBits instead, in blocks of 16 to 128 rows
        that divide the groups: it keeps 4 bits in memory and is much faster on few rows.

    Returns
    -------
    onnx.ModelProto
        The new model.

    Raises
    ------
    InputError
        If a layer of the file is not in the model or of another shape, has a bias shift but no constant bias, or real
        zero points; or if the model cannot be read, or converted to the opset.
    FileError
        If the file cannot be read.

    Examples
    --------
    >>> import comq_np, comq_onnx, onnx, os, tempfile
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 10, opset_import: ["" : 21]> net (float[N, 2] x) => (float[N, 3] y)
    ...     <float[2, 3] fc_weight = {1, -2, 3, -4, 5, -6}> { y = MatMul(x, fc_weight) }''')
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.h5")
    >>> with comq_np.QuantizedWriter(path) as file:
    ...     file.add("fc", comq_np.solve([[1.0, -2, 3], [-4, 5, -6]], [[2.0, 1.0], [1.0, 2.0]]))
    >>> [node.op_type for node in comq_onnx.apply(model, path).graph.node]
    ['DequantizeLinear', 'Squeeze', 'MatMul']
    >>> [node.op_type for node in comq_onnx.apply(model, path, format="matmulnbits").graph.node]
    ['MatMulNBits']
    """
    _check_format(format)
    graph = GraphModel(model)
    adapter.apply(graph, path, names=names)
    return graph.quantized(output, format == "matmulnbits")


def quantize(
    model: Source,
    batches: Iterable[Any],
    bits: int | Mapping[str, int] = 4,
    *,
    output: Path,
    layers: Iterable[str] | None = None,
    select: adapter.Select | None = None,
    memory: int | str | None = None,
    sequential: bool = False,
    activation_bits: adapter.ActivationBits = None,
    activation_options: adapter.ActivationOptions = None,
    providers: Sequence[str] | None = None,
    format: str = "qdq",  # noqa: A002
    progress: bool = False,
    **options: Any,
) -> Reports:
    """Quantize a model into a new file: `capture`, `comq_np.quantize_file` and `apply` through temporary files.

    With `sequential`, layer after layer: each is calibrated on the inputs that it gets from the quantized ones before
    it, to give the outputs of the float model. Each batch goes once through the graph, which is cut at the inputs of
    the layers, and once through one that stays float; what is on the way between two layers is in memory for all.

    Parameters
    ----------
    model : str, path-like, bytes or onnx.ModelProto
        Model with its trained weights, which stays as it is.
    batches : iterable
        Inputs, as in `capture`, like `layers`, `select`, `memory` and `providers`.
    bits : int from 1 to 16, or mapping
        Bits of one code, as in `comq_np.quantize_file`.
    output : str or path-like
        File to write the new model to.
    layers : iterable of str, optional
        Names of layers, or patterns.
    select : callable, optional
        Picks the samples that count.
    memory : int or str, optional
        Bytes for the Grams of one pass over the batches and the work on them.
    sequential : bool
        Whether each layer is calibrated on what the quantized ones before it make of the batches.
    activation_bits : int from 2 to 8, or mapping from str to such an int, optional
        Bits of the inputs of layers, as in `capture`; by default they stay float.
    activation_options : mapping, optional
        Options of `comq_np.activation_grid`.
    providers : sequence of str, optional
        Execution providers of onnxruntime, by default the CPU's.
    format : "qdq" or "matmulnbits"
        How weights are made of codes, as in `apply`.
    progress : bool
        Whether to show progress bars on standard error.
    **options : keyword arguments
        Options of `comq_np.quantize_file`; with `sequential`, those of `comq_np.solve`, and `fit_bias` and `strict`.

    Returns
    -------
    comq_np.Reports
        The report of each layer that is solved, by name; `kept` and `skipped` say why others stay float.

    Raises
    ------
    InputError
        As in the three; of wrong options before the model runs. Also for `memory` with `sequential`.

    Examples
    --------
    >>> import comq_onnx, numpy as np, onnx, os, tempfile
    >>> model = onnx.parser.parse_model('''
    ...     <ir_version: 10, opset_import: ["" : 21]> net (float[N, 2] x) => (float[N, 3] y)
    ...     <float[2, 3] fc_weight = {1, -2, 3, -4, 5, -6}> { y = MatMul(x, fc_weight) }''')
    >>> path = os.path.join(tempfile.mkdtemp(), "quantized.onnx")
    >>> list(comq_onnx.quantize(model, [np.ones((5, 2), np.float32)], bits=3, output=path))
    ['fc']
    """
    _check_format(format)
    graph = GraphModel(model, providers)
    reports = adapter.quantize(
        graph,
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
    graph.quantized(output, format == "matmulnbits")
    return reports


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise InputError(f"`format` must be one of {FORMATS}, got {name!r}.")
