"""Modules that keep their weights as packed codes and decode them at every use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

from comq_np import QuantizedArray, pack_codes
from comq_torch.modules import conv1d_class, pads, parameters


def can_pack(module: nn.Module) -> bool:
    """Whether a packed module computes what this one does: its forward is that of its kind."""
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else conv1d_class(module) or nn.Linear
    return getattr(module.forward, "__func__", None) is kind.forward


def pack(modules: list[nn.Module], q: QuantizedArray) -> list[nn.Module]:
    """A packed module in place of each of these, which have the same weight."""
    device = parameters(modules[0])["weight"].device
    arrays = pack_codes(q.codes, q.bits), q.scale, q.zero_point
    tensors = tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)
    return [
        PackedConv2d(module, q, *tensors) if isinstance(module, nn.Conv2d) else PackedLinear(module, q, *tensors)
        for module in modules
    ]


class _Packed(nn.Module):
    """Weights as codes (n, bytes), as `comq_np.pack_codes` has them, and scale and zero point (groups, n)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    _like: Tensor

    def __init__(self, module: Any, q: QuantizedArray, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.rows, self.bits = len(q.codes), q.bits
        self.shape: tuple[int, ...] = (len(codes), self.rows)
        self.group_size = q.group_size if isinstance(q.group_size, int) else self.rows
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if module.bias is None else module.bias.detach())
        # Follows the module from one float type to another, so that the decoded weights do.
        self.register_buffer("_like", module.weight.new_empty(0), persistent=False)
        self.train(module.training)

    def dequantize(self) -> Tensor:
        """W (m, n) float32, equal to the bit to `QuantizedArray.dequantize`."""
        scale, zero_point = (
            values.T if len(values) == 1 else values.T.repeat_interleave(self.group_size, dim=1)[:, : self.rows]
            for values in (self.scale, self.zero_point)
        )
        Wq: Tensor = scale * (unpack(self.codes, self.bits, self.rows) - zero_point).to(torch.float32)
        return Wq.T

    @property
    def weight(self) -> Tensor:
        """Decoded weights in shape and type of the module."""
        return self.dequantize().T.reshape(self.shape).to(self._like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.scale, self.zero_point
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self.scale.dtype, self.zero_point.dtype) != (before[0].dtype, before[1].dtype):
            # half() and its like are for the weights, not for what encodes them
            self.scale, self.zero_point = (values.to(self.scale.device) for values in before)
        return self


class PackedLinear(_Packed):
    """Packed `nn.Linear` or `Conv1D`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear has it
        """Compute ``input @ W + bias``."""
        return F.linear(input, self.weight, self.bias)


class PackedConv2d(_Packed):
    """Packed `nn.Conv2d`."""

    def __init__(self, module: nn.Conv2d, q: QuantizedArray, *tensors: Tensor) -> None:
        super().__init__(module, q, *tensors)
        self.shape = tuple(module.weight.shape)
        self.kernel_size, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.padding, self.padding_mode = module.padding, module.padding_mode

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Conv2d has it
        """Convolve."""
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, pads(padding, self.kernel_size, self.dilation), self.padding_mode)  # noqa: A001
            padding = (0, 0)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation)


def unpack(codes: Tensor, bits: int, rows: int) -> Tensor:
    """Codes (n, rows) int32 from packed ones (n, bytes): each lies within one to three successive bytes."""
    start = torch.arange(rows, device=codes.device) * bits
    span = (bits + 14) // 8  # bytes that a code reaches into, from the last bit of the first one on
    single = F.pad(codes.to(torch.int32), (0, span - 1))
    joined = single[:, : codes.shape[1]]
    for k in range(1, span):
        joined = joined + (single[:, k : k + codes.shape[1]] << 8 * k)
    found = joined[:, start // 8] >> (start % 8).to(torch.int32)
    return torch.bitwise_and(found, 2**bits - 1)
