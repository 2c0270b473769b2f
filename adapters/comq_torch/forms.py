"""How a module uses its weight: as which W, and with which rows of its inputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # PyTorch's own name for it
from torch import Tensor, nn

import comq_np
from comq_torch.activations import InputGrid, InputQuantizer, quantizer_of, set_grid, with_input

#: Samples that are converted to float32 at a time.
SAMPLES = 2048


class Linear:
    """A linear layer, whose weight is W transposed."""

    kind = "linear"
    #: Axes of one item of an input.
    axes = 1

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def layout(self) -> tuple[object, ...]:
        """What says, with the shape of the weight, which W it is."""
        return (type(self),)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """W (m, n), or (b, m, n) with several groups."""
        return weight.T

    @staticmethod
    def from_matrix(W: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG004  # that of a convolution has more axes
        """Weight of that shape."""
        return W.T

    @property
    def geometry(self) -> Hashable:
        """What determines the rows that an input gives."""
        return self.to_matrix(self.module.weight).shape[0]

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Input of a call, and what else `rows` needs of it."""
        return (args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None)),)

    @property
    def channels(self) -> int | None:
        """Channels of an input, along the first axis of an item."""
        return int(self.to_matrix(self.module.weight).shape[0])

    @property
    def quantizer(self) -> InputQuantizer | None:
        """What quantizes the input of the module."""
        return quantizer_of(self.module)

    def with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], quantizer: InputQuantizer) -> Any:
        """Arguments of a call whose input, as `input_of` tells it, is quantized."""
        return with_input(args, kwargs, quantizer)

    def quantize_inputs(self, module: nn.Module, grid: InputGrid | None) -> None:
        """Make the module, or the one in its place, quantize its input; or stop it."""
        set_grid(module, grid, self.module.weight.device, axis=-self.axes)

    def arranged(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """An input, and what was chosen of it, with its items along the first axis."""
        return x, chosen

    def rows(self, x: Tensor) -> Iterator[npt.NDArray[Any]]:
        """Rows (..., m) that are multiplied by W, in parts of few samples where they are to be converted."""
        if x.dtype == torch.float32 and x.device.type == "cpu":
            yield x.numpy()
        else:
            yield from (single(part).numpy() for part in torch.split(x.flatten(0, -2), SAMPLES))


class Conv1D(Linear):
    """The Conv1D of Hugging Face transformers, a linear layer whose weight is W."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """W (m, n)."""
        return weight

    @staticmethod
    def from_matrix(W: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG004
        """The same."""
        return W


class Embedding(Conv1D):
    """A table, whose weight is W."""

    kind = "embedding"
    axes = 0

    @property
    def geometry(self) -> Hashable:
        """Size of the vocabulary, apart from linear layers of that width."""
        return self.kind, self.module.num_embeddings

    @property
    def channels(self) -> int | None:
        """None: its inputs are indices."""
        return None

    def rows(self, x: Tensor) -> Iterator[npt.NDArray[Any]]:
        """The indices."""
        yield x.cpu().numpy()


class Convolution(Linear):
    """A convolution over one to three axes; the rows of W run over (input channel of the group, kernel positions)."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.space = len(module.kernel_size)
        self.axes = 1 + self.space
        self.kind = f"conv{self.space}d"

    @property
    def layout(self) -> tuple[object, ...]:
        """Groups, too, which the weight does not show."""
        return type(self), self.module.groups

    @property
    def groups(self) -> tuple[int, ...]:
        """Shape of the axis of the channels: in two where there are groups."""
        return (-1,) if self.module.groups == 1 else (self.module.groups, -1)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """W (m, n), or (groups, m, n)."""
        return weight.reshape(*self.groups, *weight.shape[1:]).flatten(-1 - self.space).mT

    @staticmethod
    def from_matrix(W: Tensor, shape: torch.Size) -> Tensor:
        """Weight of that shape."""
        return W.mT.reshape(shape)

    @property
    def geometry(self) -> Hashable:
        """All that `patches` takes beside the images, and their channels."""
        conv = self.module
        sides = pads(conv.padding, conv.kernel_size, conv.dilation)
        return (self.kind, conv.in_channels, *self.cut().values(), *sides, conv.padding_mode)

    @property
    def channels(self) -> int | None:
        """Channels of an image."""
        return int(self.module.in_channels)

    def cut(self) -> dict[str, Any]:
        """What `patches` takes beside the images and their borders."""
        return {name: getattr(self.module, name) for name in ("kernel_size", "stride", "dilation", "groups")}

    def images(self, x: Tensor) -> Tensor:
        """Images in float32, with an axis for their number."""
        return single(x if x.dim() > self.axes else x[None])

    def rows(self, x: Tensor) -> Iterator[npt.NDArray[Any]]:
        """Patches (k, m), or (k, groups, m)."""
        conv, images = self.module, self.images(x)
        sides = pads(conv.padding, conv.kernel_size, conv.dilation)
        if conv.padding_mode != "zeros":
            images, sides = F.pad(images, sides, conv.padding_mode), [0] * len(sides)
        borders = tuple(zip(sides[::2], sides[1::2], strict=True))[::-1]
        yield from comq_np.patches(images.numpy(), padding=borders, **self.cut())


class TransposedConvolution(Convolution):
    """A transposed convolution; the kernel positions of the rows of W run from the last to the first."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.kind = f"conv_transpose{self.space}d"

    def to_matrix(self, weight: Tensor) -> Tensor:
        """W (m, n), or (groups, m, n)."""
        flipped = weight.flip(tuple(range(-self.space, 0))).reshape(*self.groups, *weight.shape[1:])
        return flipped.movedim(-1 - self.space, -1).flatten(-2 - self.space, -2)

    @staticmethod
    def from_matrix(W: Tensor, shape: torch.Size) -> Tensor:
        """Weight of that shape."""
        space = len(shape) - 2
        apart = W.reshape(*W.shape[:-2], -1, *shape[2:], W.shape[-1]).movedim(-1, -1 - space)
        return apart.reshape(shape).flip(tuple(range(-space, 0)))

    def cut(self) -> dict[str, Any]:
        """What `transposed_patches` takes beside the images and `padding`."""
        return {**super().cut(), "output_padding": self.module.output_padding}

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Input of a call, and the size of the output if that is given; no other layer shares the input then."""
        (x,) = super().input_of(args, kwargs)
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return (x,) if size is None else (x.view_as(x), tuple(size)[-self.space :])

    def rows(self, x: Tensor, size: tuple[int, ...] | None = None) -> Iterator[npt.NDArray[Any]]:
        """Rows (k, m), or (k, groups, m)."""
        images, cut = self.images(x), self.cut()
        if size is not None:
            cut["output_padding"] = tuple(map(self._more, range(self.space), images.shape[2:], size))
        yield from comq_np.transposed_patches(images.numpy(), padding=self.module.padding, **cut)

    def _more(self, axis: int, given: int, wanted: int) -> int:
        """Output padding that makes an output of the wanted size along an axis."""
        conv = self.module
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        least: int = (given - 1) * conv.stride[axis] - 2 * conv.padding[axis] + reach
        return wanted - least


#: Modules whose weights can be quantized, if their forward is that of their kind.
FORMS: dict[type[nn.Module], type[Linear]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TransposedConvolution),
}
#: Modules whose weights cannot be.
UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.RNNBase: "recurrent layers",
    nn.RNNCellBase: "recurrent layers",
    nn.Bilinear: "bilinear layers",
    nn.EmbeddingBag: "bags of embeddings",
}


def form_of(module: nn.Module) -> Linear | str | None:
    """How a module uses its weight; why it cannot be quantized, where it cannot; None where it has none."""
    for unsupported, what in UNSUPPORTED.items():
        if isinstance(module, unsupported):
            return f"{what} are not supported."
    weight, name = parameters(module).get("weight"), type(module).__name__
    kind = kind_of(module)
    if kind is None:
        is_norm = hasattr(module, "normalized_shape")
        return f"its type {name!r} is not known." if weight is not None and weight.ndim > 1 and not is_norm else None
    if weight is None:
        return "its weight is no parameter but computed."
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight must hold float numbers, has dtype {weight.dtype} and shape {tuple(weight.shape)}."
    form = FORMS.get(kind, Conv1D)
    # Linear layers get what they multiply in any case; others may change it first in a way that cannot be seen.
    if form not in (Linear, Conv1D) and type(module).forward is not kind.forward:
        return f"its type {name!r} has a forward of its own."
    if getattr(module, "max_norm", None) is not None:
        return "its weight changes as it runs, because of `max_norm`."
    return form(module)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The module's kind, of those that can be quantized."""
    for kind in FORMS:
        if isinstance(module, kind):
            return kind
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the module itself holds, by name."""
    return dict(module.named_parameters(recurse=False))


def pads(padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Padding of a convolution as F.pad takes it, from the last axis to the first: left, right, top, bottom."""
    if isinstance(padding, tuple):
        sides = [(size, size) for size in padding]
    else:
        totals = [step * (size - 1) * (padding == "same") for size, step in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    return [size for pair in reversed(sides) for size in pair]


def single(x: Tensor) -> Tensor:
    """The tensor in float32, in the CPU's memory."""
    return x.detach().to("cpu", torch.float32)
