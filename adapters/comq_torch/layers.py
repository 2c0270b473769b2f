"""What can be quantized in a model: its weights W, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from comq_np import InputError, PlaneArray, QuantizedArray, adapter
from comq_torch.attention import Output, Part, projections
from comq_torch.forms import Embedding, Linear, form_of, parameters, single
from comq_torch.packed import check_packable, pack

Swap = Callable[[Mapping[nn.Module, nn.Module], list[str]], None]


class TorchLayer(adapter.WeightLayer):
    """One weight, with all forms in which modules use it and the names they have in the model."""

    quantizes_inputs = True

    def __init__(self, part: Part, swap: Swap | None) -> None:
        self.names: list[str] = []
        self.forms: list[Linear] = []
        self.kind, self.axes = part.form.kind, part.form.axes
        self.weight = part.weight.detach()[part.weight_rows]
        self.shape = tuple(part.form.to_matrix(self.weight).shape)
        #: Bias of these modules and of no others.
        self.bias: Tensor | None = None
        #: Puts packed modules in the place of others, if they are to be packed.
        self._swap = swap
        #: Whether other modules have the weight, too, such as a table.
        self.is_shared = False

    @property
    def channels(self) -> int | None:  # type: ignore[override]
        """Channels of an input, where nothing else uses the weight."""
        return None if self.is_shared else self.forms[0].channels

    @property
    def has_bias(self) -> bool:  # type: ignore[override]
        """Whether there is such a bias."""
        return self.bias is not None

    @property
    def geometry(self) -> Hashable:  # type: ignore[override]
        """What determines the rows that an input gives."""
        found = {form.geometry for form in self.forms}
        return found.pop() if len(found) == 1 else self.name

    def arrays(self) -> tuple[adapter.Weights, adapter.Weights | None]:
        """Copies of W and of the bias, where there is one, in float32."""
        W = torch.empty(self.shape).copy_(self.forms[0].to_matrix(self.weight))
        bias = None if self.bias is None else single(self.bias).clone().reshape(*self.shape[:-2], -1)
        return W.numpy(), None if bias is None else bias.numpy()

    def rows(self, x: Tensor, form: Linear, *more: Any) -> Iterator[npt.NDArray[Any]]:
        """Rows of the input of such a form."""
        return form.rows(x.detach(), *more)

    def halves(self, x: Tensor, chosen: Tensor, form: Linear, *_: Any) -> tuple[Tensor, ...]:
        """What was chosen of the input of such a form in two halves."""
        return tuple(super().halves(*form.arranged(x, chosen)))

    def check_readable(self) -> None:
        """Refuse a weight that has absorbed the scales of its inputs."""
        for form in self.forms:
            quantizer = form.quantizer
            if quantizer is not None and quantizer.has_channels:
                raise InputError(
                    "must have weights of its float inputs, has some that absorbed a scale for each channel: take the "
                    "float model."
                )

    def check_writable(self) -> None:
        """Refuse to pack what cannot be."""
        for form in self.forms if self._swap else ():
            check_packable(form)

    def check(self, q: QuantizedArray | PlaneArray) -> None:
        """Refuse to pack what no packed module decodes."""
        if self._swap and isinstance(q, PlaneArray):
            raise InputError('must have uniform codes to be packed, has those of `codebook="planes"`.')

    def write(self, W: adapter.Weights, bias_shift: adapter.Weights | None, q: QuantizedArray | PlaneArray) -> None:
        """Put W into the parameter, in place, packed modules in the place of its own, and grids before them."""
        with torch.no_grad():
            self.weight.copy_(self.forms[0].from_matrix(torch.from_numpy(W), self.weight.shape))
            if self.bias is not None and bias_shift is not None:
                self.bias.add_(torch.from_numpy(bias_shift).reshape(-1).to(self.bias.device))
        modules = [form.module for form in self.forms]
        for form in self.forms:
            form.quantize_inputs(form.module, q.activation)
        if self._swap and isinstance(q, QuantizedArray):
            packed = pack(modules, self.weight, q)
            for form, module in zip(self.forms, packed, strict=True):
                form.quantize_inputs(module, q.activation)
            self._swap(dict(zip(modules, packed, strict=True)), self.names)  # calls under way go on in the old ones


def find(model: nn.Module, swap: Swap | None = None) -> tuple[list[TorchLayer], dict[str, str]]:
    """Every layer of the model that can be quantized, in the model's order, and why each other one cannot be."""
    parts, skipped = _parts(model)
    tables = {id(part.weight) for part in parts if isinstance(part.form, Embedding)}
    tied = tables & {id(part.weight) for part in parts if not isinstance(part.form, Embedding)}
    layers: dict[tuple[object, ...], TorchLayer] = {}
    biases: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        if isinstance(part.form, Embedding) and id(part.weight) in tied:
            continue  # what it looks up is the weight of a layer that is quantized
        key = (id(part.weight), part.weight_rows.start, *part.form.layout)
        layer = layers.setdefault(key, TorchLayer(part, swap))
        layer.names.append(part.name)
        if not any(form.module is part.form.module for form in layer.forms):
            layer.forms.append(part.form)
            biases.setdefault(key, []).append(part)
    users = Counter(id(parameter) for module in model.modules() for parameter in parameters(module).values())
    for key, layer in layers.items():
        layer.is_shared = users[id(biases[key][0].weight)] > len(layer.forms)
        bias = biases[key][0].bias
        if bias is not None and all(part.bias is bias for part in biases[key]) and users[id(bias)] == len(layer.forms):
            layer.bias = bias.detach()[biases[key][0].bias_rows]
    return list(layers.values()), skipped


def _parts(model: nn.Module) -> tuple[list[Part], dict[str, str]]:
    """All uses of weights, and of modules whose weights cannot be quantized, why."""
    outputs = {id(module.out_proj): module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    parts: list[Part] = []
    others: dict[nn.Module, tuple[str, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = parameters(module)
        if isinstance(own.get("weight"), nn.UninitializedParameter):
            raise InputError(f"layer {name!r}: `weight` must be initialised, which the first forward pass does.")
        if isinstance(module, nn.MultiheadAttention):
            found = projections(module)
            if isinstance(found, str):
                others.setdefault(module, (_join(name, "in_proj"), found))
            else:
                parts += [part._replace(name=_join(name, part.name)) for part in found]
            continue
        form = form_of(module)
        if isinstance(form, str):
            others.setdefault(module, (name, form))
        elif form is not None:
            form = Output(module, outputs[id(module)]) if id(module) in outputs else form
            parts.append(Part(name, form, own["weight"], slice(None), own.get("bias"), slice(None)))
    weights = {id(part.weight) for part in parts}  # those of other modules that have them, too, do not stay float
    return parts, {
        name: why for module, (name, why) in others.items() if id(parameters(module).get("weight")) not in weights
    }


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
