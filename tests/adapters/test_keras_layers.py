"""Layers that the Keras adapter takes: kernels that hand on their inputs tell what it should have captured.

`test_keras_jax.py` runs these tests on another back end, too.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from requirements import require

require("keras")
keras = pytest.importorskip("keras")

from keras import layers  # noqa: E402
from keras_models import BACKEND, Each, assert_gram, captured, random, values  # noqa: E402

FEW = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
CONVOLUTIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
#: Stride and dilation for each number of axes; Keras takes only one of them at a time.
STEPS = {
    1: [(1, 1), (2, 1), (3, 1), (1, 2)],
    2: [(1, 1), ((2, 3), 1), (1, (2, 1))],
    3: [(1, (1, 1, 2)), ((1, 2, 1), 1)],
}
KERNELS = {1: [(3,), (4,)], 2: [(3, 2)], 3: [(2, 1, 3)]}
LAYOUTS = ("channels_last", "channels_first")


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


def assert_each_hands_on(tmp_path, cases, x, groups=1):
    """Capture layers whose kernels hand their rows on: their outputs are what the Grams must be of, the weights one."""
    for layer, kernel in cases:
        layer.build(x.shape)
        layer.kernel.assign(kernel)
    model = Each([layer for layer, _ in cases])
    model.built = True
    layers = captured(tmp_path, model, [x[:2], x[2:]])
    for layer, _ in cases:
        found, outputs = layers[layer.name], np.concatenate(model.outputs_of[layer.name])
        if getattr(layer, "data_format", None) == "channels_first":
            outputs = np.moveaxis(outputs, 1, -1)
        eye = np.eye(found.weight.shape[-1])
        np.testing.assert_array_equal(found.weight, np.stack([eye] * groups) if groups > 1 else eye)
        assert_gram(found.gram, outputs.reshape(-1, *found.weight.shape[:-1]))
    return layers.values()


def images(rank, channels, data_format):
    x = random(4, *FEW[rank], channels)
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def cases(rank, paddings):
    """Every combination of size, stride, dilation and padding, with a name."""
    every = 1 if BACKEND == "torch" else 2  # others compile each for half a second
    steps, sizes = STEPS[rank][every - 1 :: every], KERNELS[rank][::-every]
    for k, ((stride, dilation), padding, size) in enumerate(itertools.product(steps, paddings, sizes)):
        if padding != "causal" or rank == 1:
            options = {"kernel_size": size, "strides": stride, "dilation_rate": dilation, "padding": padding}
            yield {**options, "use_bias": False, "name": f"case{k}"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", CONVOLUTIONS)
@pytest.mark.parametrize("data_format", LAYOUTS)
def test_convolution(tmp_path, data_format, rank, groups):
    made = []
    for options in cases(rank, ["valid", "same", "causal"]):
        size, m = options["kernel_size"], 2 * math.prod(options["kernel_size"])
        layer = CONVOLUTIONS[rank](groups * m, groups=groups, data_format=data_format, **options)
        kernel = np.moveaxis(np.eye(m, dtype=np.float32).reshape(2, *size, m), 0, -2)
        made.append((layer, np.concatenate([kernel] * groups, axis=-1)))
    found = assert_each_hands_on(tmp_path, made, images(rank, 2 * groups, data_format), groups)
    assert {layer.kind for layer in found} == {f"conv{rank}d"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rank", DEPTHWISE)
@pytest.mark.parametrize("data_format", LAYOUTS)
def test_depthwise_convolution(tmp_path, data_format, rank, channels):
    made = []
    for options in cases(rank, ["valid", "same"]):
        size, m = options["kernel_size"], math.prod(options["kernel_size"])
        layer = DEPTHWISE[rank](depth_multiplier=m, data_format=data_format, **options)
        made.append((layer, np.stack([np.eye(m, dtype=np.float32).reshape(*size, m)] * channels, axis=-2)))
    found = assert_each_hands_on(tmp_path, made, images(rank, channels, data_format), channels)
    assert {layer.kind for layer in found} == {f"conv{rank}d"}


@pytest.mark.parametrize("rank", TRANSPOSED)
@pytest.mark.parametrize("data_format", LAYOUTS)
def test_transposed_convolution(tmp_path, data_format, rank):
    made = []
    for options in cases(rank, ["valid", "same"]):
        size, m = options["kernel_size"], 2 * math.prod(options["kernel_size"])
        kernel = np.flip(np.eye(m, dtype=np.float32).reshape(2, *size, m), range(1, rank + 1))
        for more in (None, *range(np.min(options["strides"]))):
            named = {**options, "name": f"{options['name']}_{more}"}
            layer = TRANSPOSED[rank](m, data_format=data_format, output_padding=more, **named)
            made.append((layer, np.moveaxis(kernel, 0, -1)))
    found = assert_each_hands_on(tmp_path, made, images(rank, 2, data_format))
    assert {layer.kind for layer in found} == {f"conv_transpose{rank}d"}


EQUATIONS = [
    # equation, input, output and axes of the bias; axes of the kernel that are problems, rows and columns
    ("abc,cde->abde", (4, 5, 6), (None, 2, 3), "de", ("", "c", "de")),
    ("abde,dec->abc", (4, 5, 2, 3), (None, 6), "c", ("", "de", "c")),
    ("...x,xy->...y", (4, 5, 6), 6, "y", ("", "x", "y")),
    ("ab,bc->ac", (4, 6), (6,), "c", ("", "b", "c")),
    ("ab...,bc->ac...", (4, 6, 5), (6,), "c", ("", "b", "c")),
    ("abc,cde->abed", (4, 5, 6), (None, 2, 3), "ed", ("", "c", "de")),
    ("abc,bd->adc", (4, 6, 5), (6, 5), None, ("", "b", "d")),
    ("abc,dcb->ad", (4, 2, 3), (6,), "d", ("", "cb", "d")),
    ("abc,cd->ad", (4, 5, 6), (6,), "d", ("", "c", "d")),
    ("abc,bcd->abd", (4, 5, 6), (5, 6), "bd", ("b", "c", "d")),
    ("abc,bdc->adb", (4, 5, 6), (6, 5), "db", ("b", "c", "d")),
]


@pytest.mark.parametrize(("equation", "shape", "output", "bias_axes", "axes"), EQUATIONS)
def test_einsum_dense(tmp_path, equation, shape, output, bias_axes, axes):
    layer, x = layers.EinsumDense(equation, output, bias_axes=bias_axes, bias_initializer="normal"), random(*shape)
    layer.build(shape)
    kernel, product = equation.partition(",")[2].split("->")
    problems, rows, columns = axes
    sizes = dict(zip(kernel, layer.kernel.shape, strict=True))
    eye = np.eye(6, dtype=np.float32).reshape([sizes[label] for label in rows + columns])
    eyes = np.stack([eye] * math.prod(sizes[label] for label in problems))
    layer.kernel.assign(np.einsum(f"{problems or 'Y'}{rows}{columns}->{kernel}", eyes))

    exact = values(layer(x))
    bias = np.zeros_like(exact) if bias_axes is None else np.broadcast_to(values(layer.bias), exact.shape)
    samples = "".join(label for label in product.replace("...", "") if label not in kernel)
    order = f"{'...' if '...' in product else ''}{samples}{problems}{columns}"
    shape = (-1, 5, 6) if problems else (-1, 6)
    bias, exact = (np.einsum(f"{product}->{order}", each).reshape(shape) for each in (bias, exact))
    found = captured(tmp_path, layer, [x])[""]
    assert found.kind == "linear"
    assert_gram(found.gram, exact - bias)
    np.testing.assert_array_equal(found.weight, np.stack([np.eye(6)] * 5) if problems else np.eye(6))
    if bias_axes is None:
        assert found.bias is None
    else:
        np.testing.assert_array_equal(found.bias, bias[0])


def test_a_bias_that_differs_within_a_column_is_none(tmp_path):
    layer = layers.EinsumDense("abc,cd->abd", (5, 7), bias_axes="bd")
    layer(random(4, 5, 3))
    assert captured(tmp_path, layer, [random(4, 5, 3)])[""].bias is None


def test_selected_samples_need_not_have_all_axes(tmp_path):
    x, mask = random(4, 5, 6), np.arange(20).reshape(4, 5) % 3 > 0
    attention = layers.MultiHeadAttention(2, 3)
    attention(x, x)
    found = captured(
        tmp_path, attention, [x], forward=lambda model, x: model(x, x), select=lambda x, _: x[keras.ops.array(mask)]
    )
    assert {name: layer.gram.count for name, layer in found.items()} == dict.fromkeys(found, mask.sum())
    assert_gram(found["value"].gram, x[mask])


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_embedding(tmp_path, dtype):
    model = keras.Sequential([keras.Input((3,), dtype=dtype), layers.Embedding(5, 2, mask_zero=True, name="tokens")])
    tokens = np.array([[1, 2, 2], [0, 0, 4], [4, 4, 4]])
    found = captured(tmp_path, model, [tokens.astype(dtype)])["tokens"]
    assert found.kind == "embedding"
    np.testing.assert_array_equal(found.gram.counts, [2, 1, 2, 0, 4])
    np.testing.assert_array_equal(found.weight, values(model.layers[0].embeddings))
