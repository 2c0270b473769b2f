"""What an adapter has to say of its framework: the model as a whole, and each of its layers."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np.checks import InputError
from comq_np.counts import TokenCounts
from comq_np.gram import Gram
from comq_np.result import PlaneArray, QuantizedArray

#: Called as forward(model, batch) in place of the plain call.
Forward = Callable[[Any, Any], object]
#: Called as select(x, batch) on an input; returns the samples of it that count.
Select = Callable[[Any, Any], Any]
#: Called as observe(layer, x, ...) with each input of each layer.
Observe = Callable[..., None]
#: The kind whose Grams are `TokenCounts`.
EMBEDDING = "embedding"
Weights = npt.NDArray[np.float32]


class WeightLayer(abc.ABC):
    """One weight of the model, W (m, n), or (b, m, n) of b small problems, with all that multiply their inputs by it.

    Attributes
    ----------
    names : list of str
        Names of the layers that have this weight, of which the first stands for it.
    kind : str
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d" and so on, or "embedding".
    shape : tuple of int
        Shape of W. The rows of a convolution run over (input channel of the group, kernel positions), those of an
        embedding over the vocabulary.
    geometry : hashable
        What determines the rows that an input gives: layers with equal ones get equal rows from the same object.
    has_bias : bool
        Whether `write` can take a bias shift.
    axes : int
        Axes of one item of an input: 1 of a vector, 3 of an image. Leading axes are items.
    quantizes_inputs : bool
        Whether `write` makes the layer quantize its inputs as `q.activation` says.
    channels : int, optional
        Channels of an input, each of which as many rows of W multiply, one after the other, of all problems. None where
        the weight cannot absorb a scale for each: something else uses it, or `write` cannot make the layer do so.
    """

    names: list[str]
    kind: str
    shape: tuple[int, ...]
    geometry: Hashable
    has_bias: bool
    axes: int = 1
    quantizes_inputs: bool = False
    channels: int | None = None

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    def gram(self) -> Gram | TokenCounts:
        """Empty Gram for the rows."""
        return TokenCounts(self.shape[0]) if self.kind == EMBEDDING else Gram(self.shape[-2], *self.shape[:-2])

    @abc.abstractmethod
    def arrays(self) -> tuple[Weights, Weights | None]:
        """Copies of W and of the bias (n,) or (b, n), where there is one."""

    @abc.abstractmethod
    def rows(self, x: Any, *extra: Any) -> Iterator[npt.NDArray[Any]]:
        """Rows that an input is for a Gram, in parts: (..., m) or (..., b, m), for an embedding integers.

        `extra` is what the model gave to `observe` beside the input, such as which of several layers got it.
        """

    @abc.abstractmethod
    def write(self, W: Weights, bias_shift: Weights | None, q: QuantizedArray | PlaneArray) -> None:
        """Put W, which is `q` dequantized, in place of the weight, and add the shift to the bias.

        Where it `quantizes_inputs`, they are on the grid `q.activation` from then on, or float where that is None.
        """

    def check_readable(self) -> None:  # noqa: B027  # most layers are
        """Refuse, by an `InputError`, a layer whose weights are of other inputs than it gets in the model."""

    def check_writable(self) -> None:  # noqa: B027  # most layers are
        """Refuse, by an `InputError`, any codes; `quantize` asks before the model runs."""

    def check(self, q: QuantizedArray | PlaneArray) -> None:  # noqa: B027  # most layers take any
        """Refuse, by an `InputError`, what `write` cannot take, beyond the wrong shape and a bias that is missing."""

    def halves(self, x: Any, chosen: Any, *extra: Any) -> Sequence[Any]:  # noqa: ARG002  # for those that override it
        """What was chosen of the input `x` in two parts, no image or vector torn apart; of a lone text all in one."""
        items = chosen if chosen.ndim > self.axes else chosen[None]
        if x.ndim > self.axes and len(x) == 1:
            return (items,)
        half = len(items) - len(items) // 2
        return items[:half], items[half:]


class Model(abc.ABC):
    """A model of the framework, as `capture`, `apply` and `quantize` take it.

    Attributes
    ----------
    layers : list of WeightLayer
        What can be quantized, in the model's order.
    skipped : mapping from str to str
        Why each other layer with weights stays float, by name.
    forward : callable, optional
        What runs in place of the plain call.
    needs : str
        What a model must have, for the message where it has no layer: "a Dense or Conv layer".
    shared_by_geometry : bool
        Whether layers of equal geometry always get the very same inputs. Then `run` need observe only those wanted.
    """

    layers: list[WeightLayer]
    skipped: Mapping[str, str]
    forward: Forward | None = None
    needs: str
    shared_by_geometry: bool = False

    @abc.abstractmethod
    def digest(self) -> str:
        """Digest of all weights, by which an interrupted capture knows the model."""

    @abc.abstractmethod
    def run(self, batch: Any, observe: Observe, wanted: Collection[str]) -> None:
        """Run the model on one batch and call ``observe(layer, x, *extra)`` with each input of each layer, before it.

        Layers whose names are not `wanted` need not be observed if the model is `shared_by_geometry`. What is extra
        goes on to `rows` and `halves`.
        """

    def version(self, x: Any) -> int:  # noqa: ARG002  # for those that override it
        """Number that changes when an input is changed in place, -1 if that cannot be told.

        It is asked of each input first, and may refuse what is no input by an `InputError`.
        """
        return 0

    def run_in_steps(self, batch: Any, observe: Observe, wanted: Collection[str]) -> None:
        """Run the model as `run` does, for `quantize` with ``sequential=True``.

        Layers, from the one that is observed on, may have other weights after `observe` than they had before.
        """
        self.run(batch, observe, wanted)

    def copy(self) -> Model:
        """Return the same model with the weights that it has now, for `quantize` with ``sequential=True``."""
        raise InputError("`sequential` must be False with models of this framework, got True.")

    def output(self, batch: Any) -> npt.NDArray[Any]:  # noqa: ARG002
        """Return what the model makes of a batch, for `sensitivities`."""
        raise InputError("`model` must be one whose outputs the adapter can tell, got one of another framework.")

    def leaf(self, value: Any) -> Iterable[Any]:  # noqa: ARG002
        """Bytes of one thing in a batch, a tensor of the framework, that tell it from others.

        What NumPy and Python have of their own is known.
        """
        return ()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a pass over the batches, in which the model is as it is in use."""
        return contextlib.nullcontext()
