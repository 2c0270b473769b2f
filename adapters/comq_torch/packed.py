"""Modules that keep their weights as packed codes and decode them at every use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from comq_np import InputError, QuantizedArray, pack_codes
from comq_torch import forms


class Packed(nn.Module):
    """Weights as codes ([b,] n, bytes), as `comq_np.pack_codes` has them, and scale and zero point ([b,] groups, n).

    It is of the kind of the module that it replaces, and has its attributes but for the weight, which is computed.
    """

    form: ClassVar[type[forms.Linear]]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    _like: Tensor

    def __init__(self, module: nn.Module, shape: torch.Size, q: QuantizedArray, *tensors: Tensor) -> None:
        nn.Module.__init__(self)
        inherited = vars(nn.Module())
        vars(self).update({name: value for name, value in vars(module).items() if name not in inherited})
        self.rows, self.bits, self.shape = q.codes.shape[-2], q.bits, shape
        self.group_size = q.group_size if isinstance(q.group_size, int) else self.rows
        for name, tensor in zip(("codes", "scale", "zero_point"), tensors, strict=True):
            self.register_buffer(name, tensor)
        own = forms.parameters(module)
        self.register_buffer("bias", own["bias"].detach() if "bias" in own else None)
        # Follows the module from one float type to another, so that the decoded weights do.
        self.register_buffer("_like", own["weight"].new_empty(0), persistent=False)
        self.train(module.training)

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """W ([b,] m, n) float32, equal to the bit to `QuantizedArray.dequantize`, or some rows of it."""
        rows = torch.arange(self.rows, device=self.codes.device) if rows is None else rows
        scale, zero_point = (
            values.mT if values.shape[-2] == 1 else values.mT[..., rows // self.group_size]
            for values in (self.scale, self.zero_point)
        )
        Wq: Tensor = scale * (unpack(self.codes, self.bits, rows) - zero_point).to(torch.float32)
        return Wq.mT

    def _decoded(self) -> Tensor:
        """Weights in shape and type of the module."""
        return self.form.from_matrix(self.dequantize(), self.shape).to(self._like.dtype)

    weight: Any = property(_decoded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.scale, self.zero_point
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self.scale.dtype, self.zero_point.dtype) != (before[0].dtype, before[1].dtype):
            # half() and its like are for the weights, not for what encodes them
            self.scale, self.zero_point = (values.to(self.scale.device) for values in before)
        return self


class PackedLinear(Packed, nn.Linear):
    """Packed `nn.Linear` or `Conv1D`."""

    form = forms.Linear

    def __init__(self, module: nn.Module, shape: torch.Size, q: QuantizedArray, *tensors: Tensor) -> None:
        super().__init__(module, shape, q, *tensors)
        self.out_features, self.in_features = self.codes.shape[0], self.rows


class PackedEmbedding(Packed, nn.Embedding):
    """Packed `nn.Embedding`, of which only the rows that are looked up are decoded."""

    form = forms.Embedding

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Embedding has it
        """Look the rows up."""
        found = self.dequantize(input.flatten()).to(self._like.dtype)
        return found.reshape(*input.shape, -1)


class PackedConv1d(Packed, nn.Conv1d):
    """Packed `nn.Conv1d`."""

    form = forms.Convolution


class PackedConv2d(Packed, nn.Conv2d):
    """Packed `nn.Conv2d`."""

    form = forms.Convolution


class PackedConv3d(Packed, nn.Conv3d):
    """Packed `nn.Conv3d`."""

    form = forms.Convolution


class PackedConvTranspose1d(Packed, nn.ConvTranspose1d):
    """Packed `nn.ConvTranspose1d`."""

    form = forms.TransposedConvolution


class PackedConvTranspose2d(Packed, nn.ConvTranspose2d):
    """Packed `nn.ConvTranspose2d`."""

    form = forms.TransposedConvolution


class PackedConvTranspose3d(Packed, nn.ConvTranspose3d):
    """Packed `nn.ConvTranspose3d`."""

    form = forms.TransposedConvolution


#: Packed classes by the kind that they replace.
CLASSES: dict[type[nn.Module], type[Packed]] = {one.__mro__[2]: one for one in Packed.__subclasses__()}


def check_packable(form: forms.Linear) -> None:
    """Refuse what has no packed module that computes the same."""
    module = form.module
    kind = forms.kind_of(module)
    if kind is None:
        raise InputError(f"must be a module of its own to be packed, is a part of {type(module).__name__!r}.")
    if getattr(module.forward, "__func__", None) is not kind.forward:
        raise InputError(f"must have the forward of its kind to be packed, {type(module).__name__!r} has its own.")


def pack(modules: list[Any], weight: Tensor, q: QuantizedArray) -> list[nn.Module]:
    """A packed module in place of each of these, which have the same weight."""
    arrays = pack_codes(q.codes, q.bits), q.scale, q.zero_point
    tensors = tuple(torch.from_numpy(np.array(array)).to(weight.device) for array in arrays)
    classes = [CLASSES.get(forms.kind_of(module) or nn.Module, PackedLinear) for module in modules]
    shape = weight.shape
    return [made(module, shape, q, *tensors) for made, module in zip(classes, modules, strict=True)]


def unpack(codes: Tensor, bits: int, rows: Tensor) -> Tensor:
    """Codes (..., n, rows) int32 of some rows from packed ones (..., n, bytes).

    Each lies within one to three successive bytes; the last one stands for those that there are no more of.
    """
    first, shift = rows * bits // 8, (rows * bits % 8).to(torch.int32)
    found = codes[..., first].to(torch.int32)
    for k in range(1, (bits + 14) // 8):
        found = found + (codes[..., (first + k).clamp(max=codes.shape[-1] - 1)].to(torch.int32) << 8 * k)
    return torch.bitwise_and(found >> shift, 2**bits - 1)
