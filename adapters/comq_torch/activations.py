"""Inputs of layers on their grids: what computes with them is what integers would, times the scales.

A module that quantizes its input has a child `input_quantizer` (`nn.MultiheadAttention`: one for each of query, key and
value), which is in its state dict and goes where it goes, and a hook, `quantize_inputs`, that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comq_np import ActivationGrid, ChannelGrid

#: Name of the child of a module that quantizes its input, and of the three of an attention module.
CHILD = "input_quantizer"
#: Arguments of an attention module that are inputs.
INPUTS = ("query", "key", "value")
#: What may quantize the input of a module.
InputGrid = ActivationGrid | ChannelGrid
Change = Callable[[Tensor], Tensor]


class InputQuantizer(nn.Module):
    """Inputs on a grid, ``scale * (code - zero_point)`` of the nearest code, equal to `ActivationGrid.quantize`.

    With a scale for each channel, along that axis from the end, ``code - zero_point`` alone, as `ChannelGrid.steps`
    has it: the weights have absorbed the scales. It is computed in float32, whatever the type of the inputs, which the
    result has.
    """

    scale: Tensor
    zero_point: Tensor
    levels: Tensor

    def __init__(self, grid: InputGrid, device: torch.device, axis: int = -1) -> None:
        super().__init__()
        shape = (-1, *[1] * (-1 - axis)) if isinstance(grid, ChannelGrid) else ()
        for name, number, dtype in (("scale", grid.scale, torch.float32), ("zero_point", grid.zero_point, torch.int32)):
            self.register_buffer(name, torch.tensor(number, dtype=dtype, device=device).reshape(shape))
        self.register_buffer("levels", torch.tensor(2**grid.bits, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs on the grid."""
        steps = torch.round(x.to(torch.float32) / self.scale)
        steps = torch.clamp(steps, -self.zero_point, self.levels - 1 - self.zero_point)
        return (steps if self.has_channels else steps * self.scale).to(x.dtype)

    @property
    def has_channels(self) -> bool:
        """Whether each channel has a scale of its own."""
        return self.scale.dim() > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:  # half() and its like are for what computes, not for what encodes
            self.scale = scale.to(self.scale.device)
        return self


def quantize_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Quantize the input of a call, as a hook before it; without keywords where it is taken off meanwhile."""
    child = module._modules.get(CHILD)
    if child is None or kwargs is None:
        return None
    if isinstance(child, nn.ModuleDict):
        return with_inputs(args, kwargs, dict(child.items()))
    return with_input(args, kwargs, child)


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], change: Change) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with its input changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = "input" if "input" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def with_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], changes: Mapping[str, Change]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of an attention module with some of query, key and value changed."""
    args = tuple(changes[name](x) if name in changes else x for name, x in zip(INPUTS, args, strict=False)) + args[3:]
    return args, {name: changes[name](x) if name in changes else x for name, x in kwargs.items()}


def set_grid(
    module: nn.Module, grid: InputGrid | None, device: torch.device, argument: str | None = None, axis: int = -1
) -> None:
    """Make a module quantize its input, or that argument of an attention module, from now on; or stop it."""
    child = module._modules.get(CHILD)
    if argument is not None:
        children = child if isinstance(child, nn.ModuleDict) else nn.ModuleDict()
        children._modules.pop(argument, None)
        if grid is not None:
            children[argument] = InputQuantizer(grid, device)
        child = children if len(children) else None
    else:
        child = None if grid is None else InputQuantizer(grid, device, axis)
    module._modules.pop(CHILD, None)
    if child is not None:
        module.add_module(CHILD, child)
    set_hook(module, quantize_inputs, child is not None)


def quantizer_of(module: nn.Module, argument: str | None = None) -> InputQuantizer | None:
    """What quantizes the input of a module, or that argument of an attention module."""
    child = module._modules.get(CHILD)
    if isinstance(child, nn.ModuleDict):
        child = dict(child.items()).get(argument or "")
    return child if isinstance(child, InputQuantizer) else None


def set_hook(module: nn.Module, hook: Callable[..., Any], on: bool) -> None:
    """Have a hook before the forward of a module, once, or not."""
    numbers = [key for key, known in module._forward_pre_hooks.items() if known is hook]
    if on and not numbers:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    for number in () if on else numbers:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def quantized(module: nn.Module, x: Tensor) -> Tensor:
    """Input of a module that is not called, such as the output layer of attention."""
    child = module._modules.get(CHILD)
    return x if child is None else child(x)
