"""What PyTorch's modules have, told from outside."""

from __future__ import annotations

from torch import nn


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the module itself holds, by name."""
    return dict(module.named_parameters(recurse=False))


def conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    """The Conv1D of Hugging Face transformers, if the module is one: a linear layer with its weight as (m, n)."""
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.startswith("transformers."):
            return base
    return None


def pads(padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Padding of a convolution as F.pad takes it: left, right, top, bottom."""
    if isinstance(padding, tuple):
        sides = [(size, size) for size in padding]
    else:
        totals = [step * (size - 1) * (padding == "same") for size, step in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    return [*sides[1], *sides[0]]
