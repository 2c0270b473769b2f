"""Patches of images: which rows there are, in which order, and how many at a time."""

from __future__ import annotations

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
    (height, width), (down, right), (vertical, horizontal) = (
        np.broadcast_to(x, 2).tolist() for x in (kernel_size, stride, dilation)
    )
    (top, bottom), (left, right_border) = (
        np.broadcast_to(x, 2).tolist() for x in ((padding, padding) if isinstance(padding, int) else padding)
    )
    _, channels, image_height, image_width = images.shape
    rows = []
    for image in images:
        for y in range(-top, image_height + bottom - vertical * (height - 1), down):
            for x in range(-left, image_width + right_border - horizontal * (width - 1), right):
                row = []
                for channel in range(channels):
                    for i in range(y, y + vertical * height, vertical):
                        for k in range(x, x + horizontal * width, horizontal):
                            inside = 0 <= i < image_height and 0 <= k < image_width
                            row.append(image[channel, i, k] if inside else 0)
                rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("samples", [2048, 100, 20, 5, 1])
def test_patches_are_cut_out_in_order_and_in_parts(monkeypatch, options, samples):
    monkeypatch.setattr("comq_np.convolution.CHUNK", samples)
    images = np.random.default_rng(0).normal(size=(5, 3, 7, 9)).astype(np.float32)
    parts = list(comq_np.patches(images, **options))
    assert max(len(part) for part in parts) <= samples
    np.testing.assert_array_equal(np.concatenate(parts), explicit(images, **options))


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
        ({"images": np.zeros((3, 5, 5))}, "`images` must have shape (N, C, H, W), got (3, 5, 5)."),
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
