"""The four linear layers of nn.MultiheadAttention, which computes them itself, without calling a module for each."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from comq_torch.activations import (
    INPUTS,
    InputGrid,
    InputQuantizer,
    quantize_inputs,
    quantized,
    quantizer_of,
    set_grid,
    set_hook,
    with_inputs,
)
from comq_torch.forms import Linear, parameters

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class Inside(Linear):
    """A linear layer inside an attention module."""

    def __init__(self, module: nn.Module, attention: nn.MultiheadAttention) -> None:
        super().__init__(module)
        self.attention = attention

    def arranged(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Texts along the first axis, which are along the second unless `batch_first`; a text alone is whole."""
        if x.dim() == 2:
            return x[None], chosen[None]
        if self.attention.batch_first or chosen.dim() == 2:
            return x, chosen
        return x.transpose(0, 1), chosen.transpose(0, 1)


class Projection(Inside):
    """What the query, key or value is multiplied by."""

    def __init__(self, attention: nn.MultiheadAttention, which: str) -> None:
        super().__init__(attention, attention)
        self.which = which

    @property
    def geometry(self) -> Hashable:
        """Width of the input, and along which axis texts lie."""
        widths = dict(zip(INPUTS, ("embed_dim", "kdim", "vdim"), strict=True))
        return "attention", getattr(self.attention, widths[self.which]), self.attention.batch_first

    @property
    def channels(self) -> int | None:
        """Width of the input."""
        widths = dict(zip(INPUTS, ("embed_dim", "kdim", "vdim"), strict=True))
        return int(getattr(self.attention, widths[self.which]))

    @property
    def quantizer(self) -> InputQuantizer | None:
        """What quantizes the query, key or value."""
        return quantizer_of(self.attention, self.which)

    def with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], quantizer: InputQuantizer) -> Any:
        """Arguments of a call whose query, key or value is quantized."""
        return with_inputs(args, kwargs, {self.which: quantizer})

    def quantize_inputs(self, module: nn.Module, grid: InputGrid | None) -> None:
        """Make the attention module quantize its query, key or value; or stop it."""
        set_grid(module, grid, self.attention.out_proj.weight.device, self.which)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The query, key or value of a call."""
        return ((dict(zip(INPUTS, args, strict=False)) | kwargs).get(self.which),)


class Output(Inside):
    """What the values of the heads are multiplied by: a module, but none that is called."""

    @property
    def layout(self) -> tuple[object, ...]:
        """That of the linear layer that it is."""
        return (Linear,)

    @property
    def geometry(self) -> Hashable:
        """No other layer gets the same input."""
        return id(self)

    def quantize_inputs(self, module: nn.Module, grid: InputGrid | None) -> None:
        """Make the attention module quantize what this one would get if it were called; or stop it."""
        super().quantize_inputs(module, grid)
        set_hook(module, quantize_inputs, on=False)  # it is not
        set_hook(self.attention, enter, grid is not None)
        set_last_hook(self.attention, leave, grid is not None)


class Part(NamedTuple):
    """A form, with the parameters that it uses and which rows of them."""

    name: str
    form: Linear
    weight: nn.Parameter
    weight_rows: slice
    bias: nn.Parameter | None
    bias_rows: slice


def projections(attention: nn.MultiheadAttention) -> list[Part] | str:
    """Those of query, key and value, or why they cannot be quantized."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"its type {type(attention).__name__!r} has a forward of its own."
    own, width, found = parameters(attention), attention.embed_dim, []
    for number, which in enumerate(INPUTS):
        rows = slice(number * width, (number + 1) * width)
        together, apart = own.get("in_proj_weight"), own.get(f"{which[0]}_proj_weight")
        weight, its_rows = (apart, slice(None)) if together is None else (together, rows)
        if weight is None:
            return "its weight is no parameter but computed."
        form = Projection(attention, which)
        found.append(Part(f"in_proj.{which}", form, weight, its_rows, own.get("in_proj_bias"), rows))
    return found


class SeeOutputs(TorchFunctionMode):
    """While it is on, `observe` is called with the inputs of the layers of these output weights.

    PyTorch's fused transformer layers, which call nothing else, are not taken meanwhile.
    """

    def __init__(self, observe: Callable[..., None], outputs: Mapping[int, tuple[Any, Output]]) -> None:
        super().__init__()
        self._observe, self._outputs = observe, outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run any function of PyTorch, this one in two steps."""
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = SIGNATURE.bind(*args, **(kwargs or {})).arguments
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._outputs:
            return func(**given)
        layer, output = self._outputs[id(weight)]
        x, attention = func(**given | _without_output(weight))
        x = quantized(output.module, x)  # as other layers are observed behind the grid that they have
        texts_first, before = output.attention.batch_first and x.dim() == 3, output.quantizer
        self._observe(layer, x.transpose(0, 1) if texts_first else x, output)
        if output.quantizer is not before:  # got while this call waited
            x = quantized(output.module, x)
        return F.linear(x, weight, bias), attention

    def __enter__(self) -> Any:
        _here.seen = getattr(_here, "seen", 0) + 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _here.seen -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def _without_output(weight: Tensor) -> dict[str, Tensor | None]:
    """Arguments with which attention returns what its output layer gets: the unit matrix as its weight."""
    unit = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return {"out_proj_weight": unit, "out_proj_bias": None}


class QuantizeOutput(TorchFunctionMode):
    """While it is on, the output layer of an attention module gets inputs on its grid."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run any function of PyTorch, that of this module in two steps."""
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = SIGNATURE.bind(*args, **(kwargs or {})).arguments
        name = "in_proj_weight" if self._attention._qkv_same_embed_dim else "q_proj_weight"
        if given.get(name) is not getattr(self._attention, name):
            return func(**given)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        x, attention = func(**given | _without_output(weight))
        return F.linear(quantized(self._attention.out_proj, x), weight, bias), attention


#: Of this thread: how many `SeeOutputs` are on, which do the same, and the modes of the modules at work.
_here = threading.local()


def enter(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:  # noqa: ARG001
    """Turn the mode of an attention module on, as a hook before its forward."""
    if not getattr(_here, "seen", 0):
        mode = QuantizeOutput(attention)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _here.modes = [*getattr(_here, "modes", []), mode]


def leave(attention: nn.MultiheadAttention, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    """Turn it off, as a hook after it, even if that failed."""
    if getattr(_here, "modes", []) and not getattr(_here, "seen", 0):
        _here.modes.pop().__exit__(None, None, None)


def set_last_hook(module: nn.Module, hook: Callable[..., Any], on: bool) -> None:
    """Have a hook after the forward of a module, once, also where that fails; or not."""
    numbers = [key for key, known in module._forward_hooks.items() if known is hook]
    if on and not numbers:
        module.register_forward_hook(hook, always_call=True)
    for number in () if on else numbers:
        del module._forward_hooks[number]
        module._forward_hooks_always_called.pop(number, None)
