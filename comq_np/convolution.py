"""What a convolution multiplies by its weights, cut out of the images in parts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.gram import CHUNK

Pair = tuple[int, int]


def patches(
    images: npt.ArrayLike,
    kernel_size: int | Pair,
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    padding: int | Pair | tuple[Pair, Pair] = 0,
) -> Iterator[npt.NDArray[Any]]:
    """Inputs of a convolution as the rows that it multiplies by its weights, in parts.

    The rows have up to kernel height times kernel width as many entries as the images, and are never all in memory. A
    `Gram` takes the parts as they are.

    Parameters
    ----------
    images : array_like of real, shape (N, C, H, W)
        Images, channels first: ``images.transpose(0, 3, 1, 2)`` of those with channels last.
    kernel_size : int >= 1, or two of them
        Height and width of the kernel.
    stride : int >= 1, or two of them
        Steps from patch to patch, down and to the right.
    dilation : int >= 1, or two of them
        Steps between the pixels of a patch, down and to the right.
    padding : int >= 0, or two of them, or ((top, bottom), (left, right))
        Zeros around each image. Other borders are made beforehand, for instance by `numpy.pad`.

    Returns
    -------
    iterator of ndarray, shape (rows, C * kernel height * kernel width)
        Rows for image after image, each from top left to bottom right, at most 2,048 at a time; their entries run over
        (channel, height, width). Weights of shape (C, kernel height, kernel width, n) are reshaped to match.

    Raises
    ------
    InputError
        If an argument is not as above, or the padded images are smaller than the kernel.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> images = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> for rows in comq_np.patches(images, 2):
    ...     rows
    array([[0., 1., 3., 4.],
           [1., 2., 4., 5.],
           [3., 4., 6., 7.],
           [4., 5., 7., 8.]])
    >>> gram = comq_np.Gram(4)
    >>> for rows in comq_np.patches(images, 2, padding=1, stride=2):
    ...     gram.update(rows, fold=0)
    >>> gram.count
    4
    """
    array = checks.real_dtype("images", np.asarray(images))
    if array.ndim != 4:
        raise checks.InputError(f"`images` must have shape (N, C, H, W), got {array.shape}.")
    kernel = _pair("kernel_size", kernel_size)
    strides, steps = _pair("stride", stride), _pair("dilation", dilation)
    borders = [_pair("padding", sides, 0) for sides in _two("padding", padding)]
    spans = tuple(step * (size - 1) + 1 for size, step in zip(kernel, steps, strict=True))
    padded = tuple(size + sum(border) for size, border in zip(array.shape[2:], borders, strict=True))
    if padded[0] < spans[0] or padded[1] < spans[1]:
        raise checks.InputError(f"`images` must be of at least {spans} pixels with their padding, got {padded}.")

    def windows(some: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View of some images, (n, C, output rows, output columns, kernel height, kernel width)."""
        around = np.pad(some, ((0, 0), (0, 0), *borders))
        views = np.lib.stride_tricks.sliding_window_view(around, spans, axis=(2, 3))
        return views[:, :, :: strides[0], :: strides[1], :: steps[0], :: steps[1]]

    height, width = ((size - span) // step + 1 for size, span, step in zip(padded, spans, strides, strict=True))
    return _parts(array, windows, height, width)


def _parts(
    images: npt.NDArray[Any], windows: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], height: int, width: int
) -> Iterator[npt.NDArray[Any]]:
    across = _size(width, CHUNK)
    down = _size(height, CHUNK // across)
    for some in _slices(len(images), _size(len(images), CHUNK // (across * down))):
        views = windows(images[some])
        for rows in _slices(height, down):
            for columns in _slices(width, across):
                block = views[:, :, rows, columns].transpose(1, 4, 5, 0, 2, 3)
                # As columns of pixels and then transposed: whole lines of an image are copied at a time.
                yield block.reshape(math.prod(block.shape[:3]), math.prod(block.shape[3:])).T


def _size(length: int, most: int) -> int:
    """Size of at most `most` of pieces as equal and as few as can be."""
    return -(-length // -(-length // most)) if length else 1


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _two(name: str, value: Any) -> Sequence[Any]:
    """For height and width, of which one thing stands for both."""
    if isinstance(value, numbers.Integral):
        return value, value
    if not isinstance(value, Sequence) or len(value) != 2:
        raise checks.InputError(f"`{name}` must be an integer or two of them, got {value!r}.")
    return value


def _pair(name: str, value: Any, low: int = 1) -> Pair:
    first, second = (checks.integer(name, number, low, 2**31 - 1) for number in _two(name, value))
    return first, second
