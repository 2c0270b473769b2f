"""What can be quantized in a model: its weights W (m, n), the rows (samples, m) of its inputs, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

import comq_np
from comq_np import InputError

#: Samples that are converted to float32 at a time.
SAMPLES = 2048


@dataclass(eq=False)
class WeightLayer:
    """One weight parameter, with the supported modules that use it and the names they have in the model."""

    weight: nn.Parameter
    names: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    #: Bias parameter of these modules and of no others.
    bias: nn.Parameter | None = None

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def kind(self) -> str:
        """Kind for people, the same for a Conv1D as for what it is, a linear layer."""
        return "conv2d" if isinstance(self.modules[0], nn.Conv2d) else "linear"

    @property
    def matrix(self) -> Tensor:
        """W (m, n); the rows of a convolution run over (input channel, height, width)."""
        weight = self.weight.detach()
        return weight if conv1d_class(self.modules[0]) else weight.flatten(1).T

    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Copies of W (m, n) and of the bias (n,), where there is one, in float32."""
        W = torch.empty(self.matrix.shape).copy_(self.matrix)
        return W.numpy(), None if self.bias is None else single(self.bias).numpy().copy()

    def write(self, W: Tensor) -> None:
        """Put W (m, n) into the parameter, in place."""
        with torch.no_grad():
            self.weight.copy_(W if conv1d_class(self.modules[0]) else W.T.reshape(self.weight.shape))

    @property
    def geometry(self) -> Hashable:
        """What determines the rows that an input gives; layers with equal ones get equal rows from equal inputs."""
        found = {_geometry(module) for module in self.modules}
        return found.pop() if len(found) == 1 else self.name


def find(model: nn.Module) -> list[WeightLayer]:
    """Every layer of the model that can be quantized, in the model's order."""
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be a torch.nn.Module, got {type(model).__name__!r}.")
    layers: dict[int, WeightLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = parameters(module).get("weight")
        if isinstance(weight, nn.UninitializedParameter):
            raise InputError(f"layer {name!r}: `weight` must be initialised, which the first forward pass does.")
        if weight is None or not _is_supported(module, weight):
            continue
        layer = layers.setdefault(id(weight), WeightLayer(weight))
        layer.names.append(name)
        if module not in layer.modules:
            layer.modules.append(module)
    users = Counter(id(parameter) for module in model.modules() for parameter in parameters(module).values())
    for layer in layers.values():
        bias = parameters(layer.modules[0]).get("bias")
        if bias is not None and all(parameters(module).get("bias") is bias for module in layer.modules):
            layer.bias = bias if users[id(bias)] == len(layer.modules) else None
    return list(layers.values())


def choose(found: list[WeightLayer], patterns: Iterable[str] | None) -> list[WeightLayer]:
    """Those of the layers found that any of the patterns matches, all for None."""
    if not found:
        raise InputError("`model` must have an nn.Linear, Conv1D or ungrouped nn.Conv2d, has none.")
    if patterns is None:
        return found
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[WeightLayer] = set()
    for pattern in patterns:
        matches = {layer for layer in found for name in layer.names if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            raise InputError(f"`layers` must name layers that can be quantized, got {pattern!r}, which matches none.")
        chosen.update(matches)
    if not chosen:
        raise InputError("`layers` must hold at least one name or pattern, got none.")
    return [layer for layer in found if layer in chosen]


def check_finite(layer: WeightLayer) -> None:
    """Refuse a weight with NaN or infinite entries."""
    bad = int((~torch.isfinite(layer.weight)).sum())
    if bad:
        size = layer.weight.numel()
        raise InputError(f"layer {layer.name!r}: `weight` must be finite, got {bad} NaN or infinite of {size} entries.")


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the module itself holds, by name."""
    return dict(module.named_parameters(recurse=False))


def conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    """The Conv1D of Hugging Face transformers, if the module is one: a linear layer with its weight as (m, n)."""
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


def _is_supported(module: nn.Module, weight: nn.Parameter) -> bool:
    if not weight.is_floating_point() or weight.numel() == 0:
        return False
    if isinstance(module, nn.Conv2d):
        # A forward of its own may pad in a way that the attributes do not tell.
        return module.groups == 1 and type(module).forward is nn.Conv2d.forward
    return weight.ndim == 2 and (isinstance(module, nn.Linear) or conv1d_class(module) is not None)


def pads(padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Padding of a convolution as F.pad takes it: left, right, top, bottom."""
    if isinstance(padding, tuple):
        sides = [(size, size) for size in padding]
    else:
        totals = [step * (size - 1) * (padding == "same") for size, step in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    return [*sides[1], *sides[0]]


def rows(module: nn.Module, x: Tensor) -> Iterator[npt.NDArray[Any]]:
    """Rows (..., m) that the module multiplies by W, in parts of few samples where they are to be converted."""
    if isinstance(module, nn.Conv2d):
        yield from _patches(module, single(x if x.dim() == 4 else x[None]))
    elif x.dtype == torch.float32 and x.device.type == "cpu":
        yield x.numpy()
    else:
        yield from (single(part).numpy() for part in torch.split(x.flatten(0, -2), SAMPLES))


def single(x: Tensor) -> Tensor:
    """The tensor in float32, in the CPU's memory."""
    return x.detach().to("cpu", torch.float32)


def _patches(conv: nn.Conv2d, images: Tensor) -> Iterator[npt.NDArray[Any]]:
    left, right, top, bottom = sides = pads(conv.padding, conv.kernel_size, conv.dilation)
    if conv.padding_mode != "zeros":
        images = F.pad(images, sides, conv.padding_mode)
        left = right = top = bottom = 0
    return comq_np.patches(
        images.numpy(),
        conv.kernel_size,
        stride=conv.stride,
        dilation=conv.dilation,
        padding=((top, bottom), (left, right)),
    )


def _geometry(module: nn.Module) -> Hashable:
    if isinstance(module, nn.Conv2d):
        padding = tuple(pads(module.padding, module.kernel_size, module.dilation))
        kernel = (module.in_channels, module.kernel_size, module.stride, module.dilation)
        return (*kernel, padding, module.padding_mode)
    return parameters(module)["weight"].shape[0 if conv1d_class(module) else 1]
