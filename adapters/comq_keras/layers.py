"""What can be quantized in a Keras model: the kernel of a layer as W, the rows of its inputs, and the way back."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

import comq_np
from comq_np import PlaneArray, QuantizedArray, adapter

Array = npt.NDArray[Any]
Cut = Callable[[Array], Iterator[Array]]
_whole: Cut = lambda x: iter([x])  # noqa: E731  # the input as it is

#: What a subclass may have of its own that changes how it multiplies.
METHODS = ("call", "convolution_op")


@dataclass(frozen=True)
class View:
    """A kernel as W: the shape it is given, and which axes of that are problems, rows and columns."""

    shape: tuple[int, ...]
    problems: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    #: Axes that W has from back to front.
    flipped: tuple[int, ...] = ()
    #: Problems and columns in the order in which the bias runs over them; none, if it is one of other things.
    bias: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Axes in the order of W."""
        return (*self.problems, *self.rows, *self.columns)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of W; one problem has no axis of its own."""
        b, m, n = (math.prod(self.lengths(axes)) for axes in (self.problems, self.rows, self.columns))
        return (m, n) if b == 1 else (b, m, n)

    def lengths(self, axes: tuple[int, ...]) -> list[int]:
        """Lengths of these axes."""
        return [self.shape[axis] for axis in axes]

    def matrix(self, kernel: Array) -> Array:
        """W of a kernel."""
        return np.flip(kernel.reshape(self.shape), self.flipped).transpose(self.order).reshape(self.matrix_shape)

    def kernel(self, W: Array) -> Array:
        """Kernel of a W, in the shape of the view."""
        parts = W.reshape(self.lengths(self.order))
        return np.flip(parts.transpose(np.argsort(self.order)), self.flipped)

    def columns_of(self, bias: Array) -> Array:
        """Bias (n,) or (b, n) of a bias as the layer has it."""
        turned = [self.bias.index(axis) for axis in self.problems + self.columns]
        shape = self.matrix_shape
        return bias.reshape(self.lengths(self.bias)).transpose(turned).reshape(*shape[:-2], shape[-1])

    def bias_of(self, columns: Array) -> Array:
        """Bias as the layer has it, but for axes of length one, of one as `columns_of` gives it."""
        order = self.problems + self.columns
        return columns.reshape(self.lengths(order)).transpose([order.index(axis) for axis in self.bias])


@dataclass(frozen=True)
class Plan:
    """How a layer multiplies its input by its kernel."""

    kind: str
    view: View
    #: Rows of an input, in parts.
    cut: Cut
    geometry: Hashable
    #: Axes of one item of an input.
    axes: int


class Unsupported(Exception):  # noqa: N818  # what is no error of the user's
    """Why a layer stays float."""


class KernelLayer(adapter.WeightLayer):
    """The kernel of a Keras layer."""

    def __init__(self, name: str, layer: Any) -> None:
        plan = plan_of(layer)
        self.names, self.layers = [name], [layer]
        self.kind, self.geometry, self.axes = plan.kind, plan.geometry, plan.axes
        self.variable = layer.embeddings if plan.kind == "embedding" else layer.kernel
        self._view, self._cut = plan.view, plan.cut
        self.shape = self._view.matrix_shape
        self._bias = getattr(layer, "bias", None) if plan.view.bias else None
        self.has_bias = self._bias is not None

    def join(self, other: KernelLayer) -> None:
        """Take in a layer with the same kernel: the same one under another name, or one that shares it."""
        if other.geometry != self.geometry:
            raise Unsupported(f"has the weight of layer {self.name!r}, which takes its inputs in another way")
        self.names.extend(other.names)
        self.layers.extend(layer for layer in other.layers if layer not in self.layers)
        if other._bias is not self._bias:
            self._bias, self.has_bias = None, False

    @property
    def variables(self) -> list[keras.Variable]:
        """The kernel, and the bias where there is one."""
        return [self.variable] if self._bias is None else [self.variable, self._bias]

    def arrays(self) -> tuple[adapter.Weights, adapter.Weights | None]:
        """Copies of W and of the bias, where there is one for every column."""
        W = np.array(self._view.matrix(single(self.variable.value)), order="C")
        return W, None if self._bias is None else self._view.columns_of(single(self._bias.value))

    def rows(self, x: Any, *extra: Any) -> Iterator[Array]:  # noqa: ARG002
        """Rows of an input, in parts."""
        return self._cut(array(x).astype(np.int64, copy=False) if self.kind == "embedding" else single(x))

    def write(self, W: adapter.Weights, bias_shift: adapter.Weights | None, q: QuantizedArray | PlaneArray) -> None:  # noqa: ARG002
        """Assign W to the kernel, and add the shift to the bias."""
        self.variable.assign(self._view.kernel(W).reshape(self.variable.shape))
        if bias_shift is not None and self._bias is not None:
            shift = self._view.bias_of(bias_shift).reshape(self._bias.shape)
            self._bias.assign(single(self._bias.value) + shift)


def array(x: Any) -> Array:
    """Tensor of the back end as an array, which must be there: the model runs eagerly."""
    with warnings.catch_warnings():
        # NumPy 2.4 says so of what Keras does with PyTorch's tensors.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        try:
            found: Array = keras.ops.convert_to_numpy(x)
        except Exception as error:
            message = f"must be called eagerly, with values, got {type(x).__name__!r}; or leave it out by `layers`."
            raise comq_np.InputError(message) from error
    return found


def single(x: Any) -> npt.NDArray[np.float32]:
    """Tensor of the back end in float32."""
    return array(x).astype(np.float32, copy=False)


def kind_of(layer: Any) -> type | None:
    """The kind of layer that it is, among those that can be quantized."""
    return next((base for base in type(layer).__mro__ if base in PLANS), None)


def plan_of(layer: Any) -> Plan:
    """How a layer multiplies, if it can be quantized; raises `Unsupported` with the reason otherwise."""
    kind = kind_of(layer)
    if kind is None:
        raise Unsupported(f"{type(layer).__name__} is no supported kind of layer")
    own = [name for name in METHODS if getattr_static(layer, name, None) is not getattr_static(kind, name, None)]
    if own:
        raise Unsupported(f"{type(layer).__name__} has a {own[0]} of its own")
    if not layer.built:
        raise Unsupported("is not built, since no input has reached it")
    if layer.quantization_mode is not None:
        raise Unsupported(f"is quantized already, to {layer.quantization_mode}")
    if getattr(layer, "lora_enabled", False):
        raise Unsupported("has a LoRA adapter, which changes its weights at every call")
    return PLANS[kind](layer)


def _dense(layer: Any) -> Plan:
    shape = tuple(layer.kernel.shape)
    return Plan("linear", View(shape, (), (0,), (1,), bias=(1,)), _whole, ("dense", shape[0]), 1)


def _embedding(layer: Any) -> Plan:
    shape = tuple(layer.embeddings.shape)
    return Plan("embedding", View(shape, (), (0,), (1,)), _whole, ("embedding", shape[0]), 0)


def _einsum_dense(layer: Any) -> Plan:
    """Labels of the equation in both input and kernel are rows, or problems where the output has them, too."""
    inputs, kernel, output = layer.equation.replace("->", ",").replace(" ", "").split(",")
    labels = inputs.replace("...", "")
    for spec in (labels, kernel, output.replace("...", "")):
        if len({*spec}) < len(spec):
            raise Unsupported(f"its equation {layer.equation!r} has a label twice in one place")
    problems, rows, columns = (
        tuple(axis for axis, label in enumerate(kernel) if (label in labels, label in output) == where)
        for where in ((True, True), (True, False), (False, True))
    )
    free = [label for label in labels if label in output and label not in kernel]
    if "..." not in inputs:  # the axes of the samples that come first may be fewer, of those that were selected
        first = next((k for k, label in enumerate(inputs) if label not in free), len(inputs))
        free, inputs = free[first:], "..." + inputs[first:]
    ordered = "".join(kernel[axis] for axis in (*problems, *rows))
    equation = f"{inputs}->...{''.join(free)}{ordered}"
    view = View(tuple(layer.kernel.shape), problems, rows, columns, bias=_bias_axes(layer, kernel, problems + columns))

    def cut(x: Array) -> Iterator[Array]:
        found = np.einsum(equation, x)
        yield found.reshape(math.prod(found.shape[: -len(ordered)]), *view.matrix_shape[:-1])

    geometry = ("einsum", _canonical(equation), tuple(view.shape[axis] for axis in (*problems, *rows)), len(problems))
    return Plan("linear", view, cut, geometry, len(inputs.replace("...", "")))


def _canonical(equation: str) -> str:
    """The equation with the letters that come first in the alphabet."""
    letters = dict.fromkeys(label for label in equation if label.isalpha())
    return equation.translate({ord(label): chr(ord("a") + k) for k, label in enumerate(letters)})


def _bias_axes(layer: Any, kernel: str, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the kernel that the bias runs over, if it has one entry for every column."""
    output = layer.equation.split("->")[1]
    found = tuple(kernel.find(label) for label in output if label in (layer.bias_axes or ""))
    return found if sorted(found) == sorted(axes) else ()


def _convolution(layer: Any) -> Plan:
    *kernel, inputs, outputs = layer.kernel.shape
    return _sliding(layer, (*kernel, inputs, layer.groups, outputs // layer.groups))


def _depthwise(layer: Any) -> Plan:
    *kernel, channels, multiplier = layer.kernel.shape
    return _sliding(layer, (*kernel, 1, channels, multiplier))


def _sliding(layer: Any, shape: tuple[int, ...]) -> Plan:
    """Plan of a convolution from its kernel's positions, inputs of a group, groups and outputs of a group."""
    rank, groups = layer.rank, shape[-2]
    problems, columns = (rank + 1,), (rank + 2,)
    view = View(shape, problems, (rank, *range(rank)), columns, bias=problems + columns)
    size, strides, steps = (tuple(each) for each in (layer.kernel_size, layer.strides, layer.dilation_rate))

    def cut(x: Array) -> Iterator[Array]:
        images = _channels_first(layer, x)
        pads = tuple(map(functools.partial(_pads, layer.padding), images.shape[2:], size, strides, steps))
        return comq_np.patches(images, size, stride=strides, dilation=steps, padding=pads, groups=groups)

    geometry = (layer.data_format, shape[rank] * groups, groups, size, strides, steps, layer.padding)
    return Plan(f"conv{rank}d", view, cut, geometry, rank + 1)


def _pads(padding: str, length: int, size: int, stride: int, step: int) -> tuple[int, int]:
    """Zeros before and after an axis of an image."""
    span = step * (size - 1)
    if padding != "same":
        return (span, 0) if padding == "causal" else (0, 0)
    total = max(0, (-(-length // stride) - 1) * stride + span + 1 - length)
    return total // 2, total - total // 2


def _transposed(layer: Any) -> Plan:
    rank, shape = layer.rank, tuple(layer.kernel.shape)
    view = View(shape, (), (rank + 1, *range(rank)), (rank,), tuple(range(rank)), (rank,))
    size, strides, steps = (tuple(each) for each in (layer.kernel_size, layer.strides, layer.dilation_rate))
    extra = layer.output_padding or (None,) * rank
    crops = tuple(map(functools.partial(_crop, layer.padding), size, strides, steps, extra))
    cropped, added = tuple((left, max(right, 0)) for left, right in crops), tuple(max(-right, 0) for _, right in crops)

    def cut(x: Array) -> Iterator[Array]:
        images = _channels_first(layer, x)
        return comq_np.transposed_patches(
            images, size, stride=strides, dilation=steps, padding=cropped, output_padding=added
        )

    geometry = (layer.data_format, "transposed", shape[-1], size, strides, steps, crops)
    return Plan(f"conv_transpose{rank}d", view, cut, geometry, rank + 1)


def _crop(padding: str, size: int, stride: int, step: int, extra: int | None) -> tuple[int, int]:
    """What Keras cuts off before and after an axis of the whole transposed convolution; adds, where it is negative."""
    span = step * (size - 1) + 1
    if padding == "valid":
        return 0, span - max(span, stride) if extra is None else -extra
    # What is put around the input, stride by stride apart, before the kernel slides over it.
    total = stride + span - 2 if extra is None else span + span % 2 - 2 + extra
    before = min(-(-total // 2), span - 1)
    return span - 1 - before, span - 1 - (total - before)


def _channels_first(layer: Any, x: Array) -> Array:
    return x if layer.data_format == "channels_first" else np.moveaxis(x, -1, 1)


PLANS: dict[type, Callable[[Any], Plan]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Embedding: _embedding,
    **dict.fromkeys((keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D), _convolution),
    **dict.fromkeys((keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D), _depthwise),
    **dict.fromkeys(
        (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose), _transposed
    ),
}
