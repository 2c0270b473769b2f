"""The four linear layers of nn.MultiheadAttention, which computes them itself, without calling a module for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from comq_torch.forms import Linear, parameters

INPUTS = ("query", "key", "value")
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
        # With the unit matrix as its weight, the output is what this layer gets.
        unit = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        x, attention = func(**{**given, "out_proj_weight": unit, "out_proj_bias": None})
        texts_first = output.attention.batch_first and x.dim() == 3
        self._observe(layer, x.transpose(0, 1) if texts_first else x, output)
        return F.linear(x, weight, bias), attention
