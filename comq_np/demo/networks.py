"""The two networks of the demonstration, a CNN and a vision transformer for Fashion-MNIST, in plain NumPy.

``benchmarks/train_demo_networks.py`` trained them and wrote the arrays that are read here.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import erf

Array = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
Arrays = Mapping[str, Array]
Replaced = Mapping[str, tuple[Array, Array | None]]
Tap = Callable[[str, Array], object]
#: Computes the layer of that name on inputs (..., m), giving (..., n).
Apply = Callable[[str, Array], Array]

MEAN, STD = np.float32(0.2860), np.float32(0.3530)  # of all training pixels
#: Images that run through a network at once; the patches of a convolution then stay below 60 MB.
BATCH = 250
HEADS = 4


class Dataset(NamedTuple):
    """Images (count, 28, 28) to judge on with their labels (count,), and images to calibrate on."""

    test_images: Images
    test_labels: npt.NDArray[np.uint8]
    calibration_images: Images


@dataclass(frozen=True, eq=False)
class Network:
    """A network whose convolutions and linear layers all compute ``X @ W + bias`` and can be watched and replaced.

    Parameters
    ----------
    name : str
        "cnn" or "vit".
    arrays : mapping of ndarray of float32
        Parameters by name, as PyTorch shapes them.
    forward : callable
        Called as ``forward(arrays, x, apply)`` with normalised images (count, 28, 28); returns the logits.
    """

    name: str
    arrays: Arrays
    forward: Callable[[Arrays, Array, Apply], Array]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be quantized, in the order of their use, which is that of `arrays`."""
        matrices = (name for name, array in self.arrays.items() if name.endswith(".weight") and array.ndim > 1)
        return tuple(name.removesuffix(".weight") for name in matrices)

    def weight(self, layer: str) -> Array:
        """W (m, n) with a column for each output channel; a convolution's rows run over (channel, height, width)."""
        weight = self.arrays[f"{layer}.weight"]
        return weight.reshape(len(weight), -1).T

    def bias(self, layer: str) -> Array:
        """Bias (n,)."""
        return self.arrays[f"{layer}.bias"]

    def kind(self, layer: str) -> str:
        """What the layer is, "conv2d" or "linear"."""
        return "conv2d" if self.arrays[f"{layer}.weight"].ndim == 4 else "linear"

    def logits(self, images: Images, replaced: Replaced | None = None, tap: Tap | None = None) -> Array:
        """Logits (count, 10) of images (count, 28, 28).

        Parameters
        ----------
        images : ndarray of uint8, shape (count, 28, 28)
            Images.
        replaced : mapping, optional
            Layer name to ``(W, bias_shift)``: weights (m, n) in place of the layer's own, and what to add to its bias,
            (n,) or None.
        tap : callable, optional
            Called as ``tap(layer, X)`` with the inputs X (count, ..., m) of every layer, `BATCH` images at a time.
        """

        def apply(layer: str, x: Array) -> Array:
            if tap is not None:
                tap(layer, x)
            X = x.reshape(-1, x.shape[-1])
            W, shift = (replaced or {}).get(layer, (self.weight(layer), None))
            bias = self.bias(layer) if shift is None else self.bias(layer) + shift
            return (X @ W + bias).reshape(*x.shape[:-1], -1)

        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return np.concatenate([self.forward(self.arrays, normalised(batch), apply) for batch in batches])


def normalised(images: Images) -> Array:
    """Pixels as both networks were trained on."""
    return (images.astype(np.float32) / np.float32(255) - MEAN) / STD


def cnn(_: Arrays, x: Array, apply: Apply) -> Array:
    """Three 3x3 convolutions, two poolings, a global average and a classifier."""
    x = x[..., None]
    for depth in range(3):
        x = np.maximum(apply(f"conv{depth}", patches3x3(x)), 0)
        if depth < 2:
            count, height, width, channels = x.shape
            x = x.reshape(count, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return apply("head", x.mean(axis=(1, 2)))


def patches3x3(x: Array) -> Array:
    """Neighbourhood of every pixel of x (count, height, width, channels), zeros outside: (..., channels * 9)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.reshape(*x.shape[:3], -1)


def vit(arrays: Arrays, x: Array, apply: Apply) -> Array:
    """4x4 patches (49 tokens), pre-norm transformer blocks, mean over tokens and a classifier."""
    x = x.reshape(-1, 7, 4, 7, 4).swapaxes(2, 3).reshape(-1, 49, 16)
    x = apply("embed", x) + arrays["position"]
    for depth in range(4):
        block = f"blocks.{depth}"
        x = x + apply(f"{block}.proj", attention(apply(f"{block}.qkv", layer_norm(arrays, f"{block}.norm1", x))))
        x = x + apply(f"{block}.fc2", gelu(apply(f"{block}.fc1", layer_norm(arrays, f"{block}.norm2", x))))
    return apply("head", layer_norm(arrays, "norm", x).mean(axis=1))


def attention(qkv: Array) -> Array:
    """Softmax attention of all heads on queries, keys and values side by side, (count, tokens, 3 * width)."""
    count, tokens, width = qkv.shape
    q, k, v = qkv.reshape(count, tokens, 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(2, 3) / np.float32(np.sqrt(q.shape[-1]))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed: Array = (shares @ v).swapaxes(1, 2)
    return mixed.reshape(count, tokens, width // 3)


def layer_norm(arrays: Arrays, name: str, x: Array) -> Array:
    """Layer normalisation over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-5))
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """Exact Gaussian error linear unit."""
    below: Array = (1 + erf(x * np.float32(np.sqrt(0.5)))) * np.float32(0.5)
    return x * below


def load_networks() -> tuple[Network, ...]:
    """Both networks, with the arrays that the package carries."""
    return tuple(Network(name, _load(name), forward) for name, forward in (("cnn", cnn), ("vit", vit)))


def load_images() -> Dataset:
    """6,000 test images with labels, and 512 training images to calibrate on."""
    return Dataset(**_load("fashion_mnist"))


def _load(name: str) -> dict[str, npt.NDArray[Any]]:
    path = importlib.resources.files("comq_np.demo") / "data" / f"{name}.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)
