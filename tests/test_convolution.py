"""Patches of images: which rows there are, in which order, and how many at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import comq_np

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (2, 3), "padding": 1},
    {"kernel_size": 3, "stride": (2, 1), "padding": ((1, 0), (0, 2))},
    {"kernel_size": 3, "padding": (2, 0)},
    {"kernel_size": (3, 2), "dilation": (1, 3), "padding": ((0, 3), (2, 1))},
    {"kernel_size": [2, 2], "stride": 3, "dilation": 2},
    {"kernel_size": (7, 9)},
]


def explicit(images, kernel_size, stride=1, dilation=1, padding=0):
    """Rows of patches, pixel by pixel."""
    axes = images.ndim - 2
    kernel, strides, steps = (np.broadcast_to(x, axes).tolist() for x in (kernel_size, stride, dilation))
    borders = [(x, x) if isinstance(x, int) else x for x in ([padding] * axes if isinstance(padding, int) else padding)]
    starts = [
        range(-before, size + behind - step * (positions - 1), stride_here)
        for (before, behind), size, step, positions, stride_here in zip(
            borders, images.shape[2:], steps, kernel, strides, strict=True
        )
    ]
    rows = []
    for image in images:
        for start in itertools.product(*starts):
            row = []
            for channel in image:
                for position in itertools.product(*map(range, kernel)):
                    at = tuple(first + step * k for first, step, k in zip(start, steps, position, strict=True))
                    inside = all(0 <= where < size for where, size in zip(at, channel.shape, strict=True))
                    row.append(channel[at] if inside else 0)
            rows.append(row)
    return np.array(rows)


def scattered(images, W, stride=1, dilation=1, padding=0, output_padding=0):
    """Output of a transposed convolution by its definition: every pixel adds the kernel to the output at its place."""
    axes = images.ndim - 2
    strides, steps, more = (np.broadcast_to(x, axes).tolist() for x in (stride, dilation, output_padding))
    crops = [(x, x) if isinstance(x, int) else x for x in ([padding] * axes if isinstance(padding, int) else padding)]
    kernel = W.shape[1:-1]
    sizes = [
        (size - 1) * s + d * (k - 1) + 1 for size, s, d, k in zip(images.shape[2:], strides, steps, kernel, strict=True)
    ]
    made = np.zeros((len(images), *(size + extra for size, extra in zip(sizes, more, strict=True)), W.shape[-1]))
    for pixel in np.ndindex(*images.shape[2:]):
        for position in np.ndindex(*kernel):
            at = tuple(p * s + k * d for p, s, k, d in zip(pixel, strides, position, steps, strict=True))
            made[(slice(None), *at)] += images[(slice(None), slice(None), *pixel)] @ W[(slice(None), *position)]
    kept = (slice(before, size - behind) for size, (before, behind) in zip(made.shape[1:-1], crops, strict=True))
    return made[(slice(None), *kept)].reshape(-1, W.shape[-1])


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("samples", [2048, 100, 20, 5, 1])
def test_patches_are_cut_out_in_order_and_in_parts(monkeypatch, options, samples):
    monkeypatch.setattr("comq_np.convolution.CHUNK", samples)
    images = np.random.default_rng(0).normal(size=(5, 3, 7, 9)).astype(np.float32)
    parts = list(comq_np.patches(images, **options))
    assert max(len(part) for part in parts) <= samples
    np.testing.assert_array_equal(np.concatenate(parts), explicit(images, **options))


@pytest.mark.parametrize("shape", [(2, 4, 11), (2, 4, 5, 4, 6)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "uneven"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("samples", [2048, 7])
def test_signals_volumes_and_groups(monkeypatch, shape, stride, dilation, padding, groups, samples):
    monkeypatch.setattr("comq_np.convolution.CHUNK", samples)
    kernel = (3, 2, 2)[: len(shape) - 2]
    padding = [(2, 1), (0, 1), (1, 0)][: len(kernel)] if padding == "uneven" else padding
    images = np.random.default_rng(0).normal(size=shape)
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    parts = list(comq_np.patches(images, kernel, groups=groups, **options))
    assert max(len(part) for part in parts) <= samples
    found, expected = np.concatenate(parts), explicit(images, kernel, **options)
    assert found.shape == (len(expected), *([groups] if groups > 1 else []), expected.shape[1] // groups)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "uneven"])
@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("samples", [2048, 7])
def test_transposed(monkeypatch, kernel, stride, dilation, padding, output_padding, samples):
    monkeypatch.setattr("comq_np.convolution.CHUNK", samples)
    padding = [(3, 1), (0, 1), (1, 0)][: len(kernel)] if padding == "uneven" else padding
    rng = np.random.default_rng(0)
    images, W = rng.normal(size=(2, 2, 4, 3, 3)[: 2 + len(kernel)]), rng.normal(size=(2, *kernel, 3))
    options = {"stride": stride, "dilation": dilation, "padding": padding, "output_padding": output_padding}
    parts = list(comq_np.transposed_patches(images, kernel, **options))
    assert max(len(part) for part in parts) <= samples
    flipped = np.flip(W, tuple(range(1, 1 + len(kernel)))).reshape(-1, 3)
    np.testing.assert_allclose(np.concatenate(parts) @ flipped, scattered(images, W, **options), atol=1e-12)


def test_groups_of_a_transposed_convolution():
    images = np.random.default_rng(0).normal(size=(2, 6, 4, 3))
    apart = np.concatenate(list(comq_np.transposed_patches(images, 3, stride=2, groups=3)))
    together = np.concatenate(list(comq_np.transposed_patches(images, 3, stride=2)))
    np.testing.assert_array_equal(apart.reshape(together.shape), together)


def test_weights_are_reshaped_to_match():
    rng = np.random.default_rng(0)
    images, W = rng.normal(size=(1, 2, 3, 4)), rng.normal(size=(2, 3, 4, 5))
    (rows,) = comq_np.patches(images, (3, 4))
    np.testing.assert_allclose(rows @ W.reshape(-1, 5), np.einsum("nchw,chwk->nk", images, W))


@pytest.mark.parametrize("shape", [(1, 1, 300, 300), (1, 1, 3, 30_000), (1, 1, 30_000, 3), (40, 1, 16, 16)])
def test_no_part_is_large_whatever_the_size_of_an_image(shape):
    images = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    parts = list(comq_np.patches(images, 1))
    assert 1024 < max(len(part) for part in parts) <= 2048
    np.testing.assert_array_equal(np.concatenate(parts), images.reshape(-1, 1))


def test_channels_last_are_a_transpose_away():
    images = np.random.default_rng(0).normal(size=(2, 5, 6, 3))
    found = np.concatenate(list(comq_np.patches(images.transpose(0, 3, 1, 2), 2, padding=1)))
    expected = explicit(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), 2, padding=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("shape", "width"), [((0, 3, 5, 5), 27), ((2, 0, 5, 5), 0)])
def test_nothing_to_cut(shape, width):
    assert sum(part.size for part in comq_np.patches(np.zeros(shape), 3)) == 0
    assert all(part.shape[1] == width for part in comq_np.patches(np.zeros(shape), 3))


def test_a_gram_of_patches():
    images = np.random.default_rng(0).normal(size=(3, 2, 60, 50)).astype(np.float32)
    gram = comq_np.Gram(18)
    for part in comq_np.patches(images, 3, stride=(1, 2), padding=1):
        gram.update(part, fold=0)
    rows = explicit(images, 3, stride=(1, 2), padding=1).astype(np.float64)
    assert gram.count == len(rows)
    np.testing.assert_allclose(gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gram.mean, rows.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"images": np.zeros((3, 5))},
            "`images` must have shape (N, C, ...) and 1 to 3 axes of space, got (3, 5).",
        ),
        ({"images": np.zeros((3, 5, 5)), "stride": (1, 2)}, "`stride` must be an integer or one of them, got (1, 2)."),
        ({"images": np.zeros((1, 6, 5, 5)), "groups": 4}, "`groups` must divide the 6 channels, got 4."),
        ({"groups": 0}, "`groups` must be an integer from 1 to 2147483647, got 0."),
        ({"images": np.zeros((1, 1, 5, 5), bool)}, "`images` must hold real numbers, got dtype bool."),
        ({"kernel_size": 0}, "`kernel_size` must be an integer from 1 to 2147483647, got 0."),
        ({"kernel_size": (3, 3, 3)}, "`kernel_size` must be an integer or two of them, got (3, 3, 3)."),
        ({"stride": 1.5}, "`stride` must be an integer or two of them, got 1.5."),
        ({"stride": (1, 0)}, "`stride` must be an integer from 1 to 2147483647, got 0."),
        ({"dilation": "same"}, "`dilation` must be an integer or two of them, got 'same'."),
        ({"padding": -1}, "`padding` must be an integer from 0 to 2147483647, got -1."),
        ({"padding": True}, "`padding` must be an integer from 0 to 2147483647, got True."),
        ({"padding": "same"}, "`padding` must be an integer or two of them, got 'same'."),
        ({"padding": (1, 1, 1, 1)}, "`padding` must be an integer or two of them, got (1, 1, 1, 1)."),
        ({"padding": ((1, 2), (3,))}, "`padding` must be an integer or two of them, got (3,)."),
        (
            {"kernel_size": (2, 4), "dilation": 2, "padding": ((0, 0), (0, 1))},
            "`images` must be of at least (3, 7) pixels with their padding, got (5, 6).",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.patches(**{"images": np.zeros((1, 1, 5, 5)), "kernel_size": 2, **options})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_padding": -1}, "`output_padding` must be an integer from 0 to 2147483647, got -1."),
        ({"padding": 4}, "`images` must be of at least (3, 3) pixels with their padding, got (1, 1)."),
    ],
)
def test_transposed_refused(options, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.transposed_patches(np.zeros((1, 1, 5, 5)), 3, **options)
    assert str(error.value) == message
