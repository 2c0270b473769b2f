"""What can be quantized in a model: its weights W (m, n), the rows (samples, m) of its inputs, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

import comq_np
from comq_np import InputError, QuantizedArray, adapter
from comq_torch.modules import conv1d_class, pads, parameters
from comq_torch.packed import can_pack, pack

#: Samples that are converted to float32 at a time.
SAMPLES = 2048
Swap = Callable[[Mapping[nn.Module, nn.Module], list[str]], None]


class TorchLayer(adapter.WeightLayer):
    """One weight parameter, with the supported modules that use it and the names they have in the model."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.names: list[str] = []
        self.modules: list[nn.Module] = []
        #: Bias parameter of these modules and of no others.
        self.bias: nn.Parameter | None = None
        #: Puts packed modules in the place of others, if they are to be packed.
        self.swap: Swap | None = None

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The same for a Conv1D as for what it is, a linear layer."""
        return "conv2d" if isinstance(self.modules[0], nn.Conv2d) else "linear"

    @property
    def axes(self) -> int:  # type: ignore[override]
        """One of vectors, three of images."""
        return 3 if isinstance(self.modules[0], nn.Conv2d) else 1

    @property
    def has_bias(self) -> bool:  # type: ignore[override]
        """Whether these modules have a bias, and no others have it."""
        return self.bias is not None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape (m, n)."""
        return tuple(self.matrix.shape)

    @property
    def matrix(self) -> Tensor:
        """W (m, n); the rows of a convolution run over (input channel, height, width)."""
        weight = self.weight.detach()
        return weight if conv1d_class(self.modules[0]) else weight.flatten(1).T

    @property
    def geometry(self) -> Hashable:  # type: ignore[override]
        """What determines the rows that an input gives."""
        found = {_geometry(module) for module in self.modules}
        return found.pop() if len(found) == 1 else self.name

    def arrays(self) -> tuple[adapter.Weights, adapter.Weights | None]:
        """Copies of W (m, n) and of the bias (n,), where there is one, in float32."""
        W = torch.empty(self.matrix.shape).copy_(self.matrix)
        return W.numpy(), None if self.bias is None else single(self.bias).numpy().copy()

    def rows(self, x: Tensor, module: nn.Module) -> Iterator[npt.NDArray[Any]]:
        """Rows (..., m) that the module multiplies by W, in parts of few samples where they are to be converted."""
        x = x.detach()
        if isinstance(module, nn.Conv2d):
            yield from _patches(module, single(x if x.dim() == 4 else x[None]))
        elif x.dtype == torch.float32 and x.device.type == "cpu":
            yield x.numpy()
        else:
            yield from (single(part).numpy() for part in torch.split(x.flatten(0, -2), SAMPLES))

    def check(self, q: QuantizedArray) -> None:  # noqa: ARG002  # any codes can be packed
        """Refuse to pack what would then compute something else."""
        for module in self.modules if self.swap else ():
            if not can_pack(module):
                kind = type(module).__name__
                raise InputError(f"must have the forward of its kind to be packed, {kind!r} has its own.")

    def write(self, W: adapter.Weights, bias_shift: adapter.Weights | None, q: QuantizedArray) -> None:
        """Put W (m, n) into the parameter, in place, and packed modules in the place of its own."""
        Wq = torch.from_numpy(W)
        with torch.no_grad():
            self.weight.copy_(Wq if conv1d_class(self.modules[0]) else Wq.T.reshape(self.weight.shape))
            if self.bias is not None and bias_shift is not None:
                self.bias.add_(torch.from_numpy(bias_shift).to(self.bias.device))
        if self.swap:
            self.swap(dict(zip(self.modules, pack(self.modules, q), strict=True)), self.names)


def find(model: nn.Module) -> list[TorchLayer]:
    """Every layer of the model that can be quantized, in the model's order."""
    layers: dict[int, TorchLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = parameters(module).get("weight")
        if isinstance(weight, nn.UninitializedParameter):
            raise InputError(f"layer {name!r}: `weight` must be initialised, which the first forward pass does.")
        if weight is None or not _is_supported(module, weight):
            continue
        layer = layers.setdefault(id(weight), TorchLayer(weight))
        layer.names.append(name)
        if module not in layer.modules:
            layer.modules.append(module)
    users = Counter(id(parameter) for module in model.modules() for parameter in parameters(module).values())
    for layer in layers.values():
        bias = parameters(layer.modules[0]).get("bias")
        if bias is not None and all(parameters(module).get("bias") is bias for module in layer.modules):
            layer.bias = bias if users[id(bias)] == len(layer.modules) else None
    return list(layers.values())


def _is_supported(module: nn.Module, weight: nn.Parameter) -> bool:
    if not weight.is_floating_point() or weight.numel() == 0:
        return False
    if isinstance(module, nn.Conv2d):
        # A forward of its own may pad in a way that the attributes do not tell.
        return module.groups == 1 and type(module).forward is nn.Conv2d.forward
    return weight.ndim == 2 and (isinstance(module, nn.Linear) or conv1d_class(module) is not None)


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
