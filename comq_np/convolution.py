"""What a convolution multiplies by its weights, cut out of the images in parts."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_np import checks
from comq_np.gram import CHUNK

#: A number for all axes of space, or one for each.
Sizes = int | Sequence[int]
#: The same, or two numbers for each axis, before and behind.
Borders = Sizes | Sequence[Sequence[int]]
COUNTS = {1: "one", 2: "two", 3: "three"}


def patches(
    images: npt.ArrayLike,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    padding: Borders = 0,
    groups: int = 1,
) -> Iterator[npt.NDArray[Any]]:
    """Inputs of a convolution as the rows that it multiplies by its weights, in parts.

    The rows have up to as many times more entries than the images as the kernel has positions, and are never all in
    memory. A `Gram` takes the parts as they are.

    Parameters
    ----------
    images : array_like of real, shape (N, C, ...)
        Images, or signals or volumes with one or three axes of space, channels first: ``images.transpose(0, 3, 1, 2)``
        of images with channels last.
    kernel_size : int >= 1, or one for each axis of space
        Positions of the kernel.
    stride : int >= 1, or one for each axis
        Steps from patch to patch.
    dilation : int >= 1, or one for each axis
        Steps between the pixels of a patch.
    padding : int >= 0, or one for each axis, or two for each: ((top, bottom), (left, right))
        Zeros around each image. Other borders are made beforehand, for instance by `numpy.pad`.
    groups : int >= 1
        Parts of the channels that have weights of their own; as many as there are channels in a depthwise convolution.

    Returns
    -------
    iterator of ndarray, shape (rows, m), or (rows, groups, m) with several groups
        Rows for image after image, each from its first pixel to its last, at most 2,048 at a time; their m entries run
        over the channels of a group and the positions of the kernel. Weights of shape (C, height, width, n) are
        reshaped to match.

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
    array = _images(images)
    axes = array.ndim - 2
    kernel, strides = _each("kernel_size", kernel_size, axes), _each("stride", stride, axes)
    steps, groups = _each("dilation", dilation, axes), _groups(array, groups)
    cut = _Cut(kernel, strides, steps, (1,) * axes, _pairs("padding", padding, axes), groups)
    return cut.parts(array)


def transposed_patches(
    images: npt.ArrayLike,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    padding: Borders = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
) -> Iterator[npt.NDArray[Any]]:
    """Inputs of a transposed convolution as the rows that it multiplies by its weights, in parts.

    A transposed convolution is the convolution, with the kernel turned round, of images with zeros between the pixels.

    Parameters
    ----------
    images : array_like of real, shape (N, C, ...)
        Images, as in `patches`.
    kernel_size : int >= 1, or one for each axis of space
        Positions of the kernel.
    stride : int >= 1, or one for each axis
        Steps of the output from pixel to pixel of the images.
    dilation : int >= 1, or one for each axis
        Steps of the output between the positions of the kernel.
    padding : int >= 0, or one for each axis, or two for each
        Pixels that are cut off the output at each side.
    output_padding : int >= 0, or one for each axis
        Pixels that the output has more, behind.
    groups : int >= 1
        Parts of the channels that have weights of their own.

    Returns
    -------
    iterator of ndarray, shape (rows, m), or (rows, groups, m) with several groups
        A row for each pixel of the output, image after image, at most 2,048 at a time; their m entries run over the
        channels of a group and the positions of the kernel, from its last to its first. Weights of shape
        (C, height, width, n) match as ``np.flip(weights, (1, 2)).reshape(-1, n)``.

    Raises
    ------
    InputError
        If an argument is not as above, or nothing is left of the output.

    Examples
    --------
    >>> import comq_np, numpy as np
    >>> W = np.array([1.0, 10.0, 100.0])
    >>> for rows in comq_np.transposed_patches([[[1.0, 2.0]]], 3, stride=2):
    ...     rows @ W[::-1]
    array([  1.,  10., 102.,  20., 200.])
    """
    array = _images(images)
    axes = array.ndim - 2
    kernel, strides = _each("kernel_size", kernel_size, axes), _each("stride", stride, axes)
    steps, groups = _each("dilation", dilation, axes), _groups(array, groups)
    crops = _pairs("padding", padding, axes)
    more = _each("output_padding", output_padding, axes, 0)
    reach = [step * (size - 1) for size, step in zip(kernel, steps, strict=True)]
    borders = tuple(
        (span - before, span - behind + extra) for span, (before, behind), extra in zip(reach, crops, more, strict=True)
    )
    return _Cut(kernel, (1,) * axes, steps, strides, borders, groups).parts(array)


@dataclass(frozen=True)
class _Cut:
    """How images are spread, bordered and cut into patches, each field with an entry for each axis of space."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...]
    spread: tuple[int, ...]  # steps from pixel to pixel, with zeros between them
    borders: tuple[tuple[int, int], ...]  # pixels of zeros, or fewer pixels where negative
    groups: int

    def parts(self, images: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        """Rows of all images, after what is wrong with their size."""
        spans = [step * (size - 1) + 1 for size, step in zip(self.kernel, self.steps, strict=True)]
        sizes = [
            gap * (size - 1) + 1 + sum(border)
            for size, gap, border in zip(images.shape[2:], self.spread, self.borders, strict=True)
        ]
        if any(size < span for size, span in zip(sizes, spans, strict=True)):
            raise checks.InputError(
                f"`images` must be of at least {tuple(spans)} pixels with their padding, got {tuple(sizes)}."
            )
        lengths = [(size - span) // step + 1 for size, span, step in zip(sizes, spans, self.strides, strict=True)]
        return self._parts(images, spans, lengths)

    def _parts(self, images: npt.NDArray[Any], spans: list[int], lengths: list[int]) -> Iterator[npt.NDArray[Any]]:
        room = CHUNK
        pieces: list[int] = []
        for length in [*reversed(lengths), len(images)]:
            pieces.insert(0, _size(length, room))
            room //= pieces[0]
        some, *inside = (_slices(length, size) for length, size in zip([len(images), *lengths], pieces, strict=True))
        axes = len(spans)
        for part in some:
            windows = self._windows(images[part], spans)
            for where in itertools.product(*inside):
                block = windows[(slice(None), slice(None), *where)].transpose(
                    1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes)
                )
                # As columns of pixels and then transposed: whole lines of an image are copied at a time.
                rows = block.reshape(math.prod(block.shape[: 1 + axes]), math.prod(block.shape[1 + axes :]))
                if self.groups == 1:
                    yield rows.T
                else:
                    yield rows.reshape(self.groups, -1, rows.shape[1]).transpose(2, 0, 1)

    def _windows(self, images: npt.NDArray[Any], spans: list[int]) -> npt.NDArray[Any]:
        """View of some images, (n, C, pixels of the output, positions of the kernel)."""
        axes = tuple(range(2, 2 + len(spans)))
        views = np.lib.stride_tricks.sliding_window_view(self._around(images), spans, axis=axes)
        every = [slice(None, None, step) for step in (*self.strides, *self.steps)]
        found: npt.NDArray[Any] = views[(slice(None), slice(None), *every)]
        return found

    def _around(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images spread and with their borders."""
        added = [(max(before, 0), max(behind, 0)) for before, behind in self.borders]
        if any(gap > 1 for gap in self.spread):
            sizes = (gap * (size - 1) + 1 for size, gap in zip(images.shape[2:], self.spread, strict=True))
            apart = np.zeros((*images.shape[:2], *sizes), images.dtype)
            apart[(slice(None), slice(None), *(slice(None, None, gap) for gap in self.spread))] = images
            images = apart
        around = np.pad(images, ((0, 0), (0, 0), *added))
        kept = (
            slice(max(-before, 0), size - max(-behind, 0))
            for size, (before, behind) in zip(around.shape[2:], self.borders, strict=True)
        )
        left: npt.NDArray[Any] = around[(slice(None), slice(None), *kept)]
        return left


def _size(length: int, most: int) -> int:
    """Size of at most `most` of pieces as equal and as few as can be."""
    return -(-length // -(-length // most)) if length else 1


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _images(images: npt.ArrayLike) -> npt.NDArray[Any]:
    array = checks.real_dtype("images", np.asarray(images))
    if not 3 <= array.ndim <= 5:
        raise checks.InputError(f"`images` must have shape (N, C, ...) and 1 to 3 axes of space, got {array.shape}.")
    return array


def _groups(array: npt.NDArray[Any], value: int) -> int:
    groups = checks.integer("groups", value, 1, 2**31 - 1)
    if array.shape[1] % groups:
        raise checks.InputError(f"`groups` must divide the {array.shape[1]} channels, got {groups}.")
    return groups


def _each(name: str, value: Any, axes: int, low: int = 1) -> tuple[int, ...]:
    """Integer for each axis, of which one may stand for all."""
    return tuple(checks.integer(name, number, low, 2**31 - 1) for number in _spread_out(name, value, axes))


def _pairs(name: str, value: Any, axes: int) -> tuple[tuple[int, int], ...]:
    """Two integers >= 0 for each axis, of which one may stand for both."""
    found = (_each(name, sides, 2, 0) for sides in _spread_out(name, value, axes))
    return tuple((before, behind) for before, behind in found)


def _spread_out(name: str, value: Any, axes: int) -> Sequence[Any]:
    """Things for so many axes, of which an integer stands for all."""
    if isinstance(value, numbers.Integral):
        return (value,) * axes
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != axes:
        raise checks.InputError(f"`{name}` must be an integer or {COUNTS[axes]} of them, got {value!r}.")
    return value
