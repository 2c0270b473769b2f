"""The Keras adapter: whole models, and the way back into them; `test_keras_layers.py` has the kinds of layers.

The back end is the one that `KERAS_BACKEND` names; `test_keras_jax.py` runs these tests on another one.
"""

from __future__ import annotations

import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from requirements import require
from sequences import assert_matched

require("keras")
keras = pytest.importorskip("keras")

from keras import layers  # noqa: E402
from keras_models import BACKEND, Each, assert_gram, captured, random, values  # noqa: E402

import comq_keras  # noqa: E402
import comq_np  # noqa: E402
import comq_torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


# Capturing


class Encoder(keras.Model):
    """Subclassed, with layers in a list and a dict, one of them called twice."""

    def __init__(self):
        super().__init__(name="encoder")
        self.blocks = [layers.Dense(6, name="fc"), layers.Dense(6, name="fc")]
        self.heads = {"one": layers.Dense(2, name="one")}
        self.attention = layers.MultiHeadAttention(2, 3, name="attention")
        self.norm = layers.LayerNormalization()

    def call(self, x):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.heads["one"](self.attention(x, self.norm(x)))


def functional():
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 6, name="embedding")(tokens)
    x = layers.GroupQueryAttention(3, 4, 2, name="attention")(x, x)
    x = keras.Sequential([layers.Dense(6, activation="relu", name="fc"), layers.Dropout(0.5)], name="mlp")(x)
    x = layers.TimeDistributed(layers.Dense(3, name="fc"), name="each")(x)
    return keras.Model(tokens, layers.Dense(2, name="output")(layers.Flatten()(x)))


ATTENTION = ("query", "key", "value", "attention_output")


def test_functional_model(tmp_path):
    tokens = np.arange(12).reshape(3, 4) % 9
    found = captured(tmp_path, functional(), [tokens])
    assert list(found) == ["embedding", *(f"attention/{name}" for name in ATTENTION), "mlp/fc", "each/fc", "output"]
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        grams = [row["gram"] for row in file.describe()]
    assert grams == [0, 1, 1, 1, 2, 3, 4, 5]
    counts = {name: layer.gram.count for name, layer in found.items()}
    assert counts == {name: 3 if name == "output" else 12 for name in found}


def test_subclassed_model(tmp_path):
    model, x = Encoder(), random(4, 5, 6)
    model(x)
    found = captured(tmp_path, model, [x, x])
    assert list(found) == ["fc", "fc_1", "one", *(f"attention/{name}" for name in ATTENTION)]
    assert found["fc"].gram.count == 2 * found["fc_1"].gram.count == 80
    hidden = values(model.blocks[1](model.blocks[0](x)))
    assert_gram(found["fc"].gram, np.concatenate([x, hidden, x, hidden]).reshape(-1, 6))


def test_one_layer_under_several_names_is_one(tmp_path):
    shared = layers.Dense(6, name="fc")
    inner = keras.Sequential([keras.Input((6,)), shared], name="inner")
    model = keras.Sequential([inner, layers.ReLU(), shared])
    found = captured(tmp_path, model, [random(4, 6)])
    assert list(found) == ["inner/fc"]
    assert found["inner/fc"].gram.count == 8
    assert list(captured(tmp_path, model, [random(4, 6)], ["fc"])) == ["inner/fc"]


def test_layers_that_share_a_weight_are_one(tmp_path):
    one, x = layers.Dense(6, name="one"), random(4, 6)

    class Tied(layers.Dense):
        def build(self, _):
            self._kernel, self.bias = one.kernel, None
            self.built = True

    model = keras.Sequential([keras.Input((6,)), one, Tied(6, name="two")])
    found = captured(tmp_path, model, [x])
    assert list(found) == ["one"]
    assert found["one"].bias is None
    assert_gram(found["one"].gram, np.concatenate([x, values(one(x))]))


class OwnCall(layers.Dense):
    def call(self, inputs):
        return super().call(2 * inputs)


class OwnConvolution(layers.Conv1D):
    def call(self, inputs):
        return super().call(inputs[:, ::2])


class OwnOperation(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, 2 * kernel)


class OwnWeight(layers.Layer):
    def build(self, _):
        self.table = self.add_weight(shape=(2, 2))


KIND, OWN = "is no supported kind of layer", "of its own"
SKIPPED = [
    (OwnCall(2), f"OwnCall has a call {OWN}"),
    (OwnConvolution(2, 1), f"OwnConvolution has a call {OWN}"),
    (OwnOperation(2, 1), f"OwnOperation has a convolution_op {OWN}"),
    (layers.ReversibleEmbedding(3, 2), f"ReversibleEmbedding has a call {OWN}"),
    (OwnWeight(), f"OwnWeight {KIND}"),
    (layers.SeparableConv1D(2, 2), f"SeparableConv1D {KIND}"),
    (layers.SeparableConv2D(2, 2), f"SeparableConv2D {KIND}"),
    (layers.LSTM(2), f"LSTMCell {KIND}"),
    (layers.EinsumDense("abb,bc->abc", (2, 2)), "its equation 'abb,bc->abc' has a label twice in one place"),
    (layers.Dense(2, lora_rank=1), "has a LoRA adapter, which changes its weights at every call"),
    (layers.Dense(2), "is quantized already, to int8"),
    (layers.Dense(2), "is not built, since no input has reached it"),
    (layers.BatchNormalization(), None),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, as it quantizes
@pytest.mark.parametrize(("layer", "reason"), SKIPPED)
def test_what_stays_float_says_why(tmp_path, layer, reason):
    if reason is None or "not built" not in reason:
        space = getattr(layer, "rank", 1)
        layer.build((2, 2) if isinstance(layer, layers.Dense) else (2, *[2] * space, 2))
    if reason is not None and "int8" in reason:
        layer.quantize("int8")
    model = Each([layer, layers.Dense(2, name="plain")])
    model.made[1].build((2, 2))
    model.built = True
    found = captured(tmp_path, model, [random(2, 2)], forward=lambda model, x: model.made[1](x))
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        (skipped,) = file.skipped.values() or (None,)
    assert skipped == reason
    assert "plain" in found


def chain(dtype="float32"):
    """Layers of every kind, one after the other, with biases where they may have one."""
    options = {"bias_initializer": "normal", "dtype": dtype}
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, name="embedding", dtype=dtype),
            layers.Conv1D(8, 3, padding="causal", groups=2, name="conv", **options),
            layers.DepthwiseConv1D(3, depth_multiplier=2, padding="same", name="depthwise", **options),
            layers.Conv1DTranspose(6, 2, strides=2, activation="tanh", name="transposed", **options),
            layers.EinsumDense("abc,cde->abed", (12, 2, 3), bias_axes="ed", name="einsum", **options),
            layers.EinsumDense("abed,edc->abec", (12, 2, 5), bias_axes="ec", name="groups", **options),
            layers.Flatten(dtype=dtype),
            layers.Dense(3, name="dense", **options),
        ],
        name="chain",
    )


def tokens(count=20):
    return np.random.default_rng(0).integers(9, size=(count, 6))


def state(model):
    return [np.array(values(weight)) for weight in model.weights]


def solved(tmp_path, model, batches, bits=3, **options):
    """Quantized arrays of a model by name; their file is quantized.h5."""
    captured(tmp_path, model, batches)
    options = {"recipe": "rtn", **options}
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", bits, **options)
    with comq_np.QuantizedFile(tmp_path / "quantized.h5") as file:
        return dict(file)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_stays_as_it_was(tmp_path, failing):
    model = chain()
    batches, before = [tokens(), tokens() + 99 * failing], state(model)
    if failing:
        with pytest.raises(comq_np.InputError, match=r"^layer 'embedding', batch 1: [^\n]*$"):
            captured(tmp_path, model, batches)
    else:
        captured(tmp_path, model, batches)
    for new, old in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(new, old)
    assert not any("call" in vars(layer) for layer in model.layers)
    assert [path.name for path in tmp_path.iterdir()] == ([] if failing else ["calibration.h5"])


def test_the_model_runs_as_in_use_and_without_gradients(tmp_path):
    seen = []

    class Spy(layers.Layer):
        def call(self, x, training=None):
            seen.append((training, getattr(x, "requires_grad", False)))
            return x

    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), Spy(), layers.Dense(2)])
    seen.clear()
    captured(tmp_path, model, [random(4, 3)])
    assert seen == [(False, False)]


def test_several_passes_make_the_same_file(tmp_path, capsys):
    model = keras.Sequential([keras.Input((400,)), layers.Dense(400), layers.Dense(2)])
    batches = [keras.ops.convert_to_tensor(random(count, 400)) for count in (5, 7)]
    captured(tmp_path, model, batches)
    comq_keras.capture(model, batches, tmp_path / "passes.h5", memory="12.3MB", progress=True)
    assert "2 passes" in capsys.readouterr().err
    assert (tmp_path / "passes.h5").read_bytes() == (tmp_path / "calibration.h5").read_bytes()


def test_predict_runs_eagerly_on_pytorch_only(tmp_path):
    def forward(model, batch):
        return model.predict_on_batch(batch)

    model, x = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="fc")]), random(4, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # Keras's own
        if BACKEND == "torch":
            assert_gram(captured(tmp_path, model, [x], forward=forward)["fc"].gram, x)
        else:
            with pytest.raises(comq_np.InputError, match=r"^layer 'fc', batch 0: must be called eagerly, with values"):
                captured(tmp_path, model, [x], forward=forward)


def unbuilt():
    return keras.Sequential([layers.Dense(2)])


def dense():
    return keras.Sequential([keras.Input((2,)), layers.Dense(2, name="fc")])


def poisoned():
    model = dense()
    model.layers[0].kernel.assign([[0, np.nan], [0, 0]])
    return model


def weightless():
    return keras.Sequential([keras.Input((2,)), layers.ReLU()])


NEEDS = "a Dense, an EinsumDense, a convolution or an Embedding"


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (lambda: 3, [[1, 2]], "`model` must be a keras.Model, got 'int'."),
        (unbuilt, [[1, 2]], "`model` must be built, which its first call on a batch does."),
        (
            weightless,
            [[1, 2]],
            f"`model` must have {NEEDS}, has none.",
        ),
        (poisoned, [[1, 2]], "layer 'fc': `weight` must be finite, got 1 NaN or infinite of 4 entries."),
        (dense, [[1, np.inf]], r"layer 'fc', batch 0: `X` must be finite, got 1 NaN or infinite of 2 entries"),
    ],
)
def test_what_capture_refuses(tmp_path, model, batch, message):
    with pytest.raises(comq_np.InputError) as caught:
        comq_keras.capture(model(), [np.array(batch, dtype=np.float32)], tmp_path / "calibration.h5")
    assert str(caught.value).startswith(message)


# Applying


def small(dtype):
    """A layer of its type, since JAX takes seconds to compile others for these."""
    return keras.Sequential([keras.Input((6,)), layers.Dense(3, name="dense", dtype=dtype)])


@pytest.mark.parametrize(
    ("make", "bits", "dtype"),
    [(chain, 3, "float32"), (small, 4, "float16"), (small, 9, "bfloat16"), (small, 2, "mixed_float16")],
)
def test_weights_are_the_dequantized_ones_and_biases_are_shifted(tmp_path, make, bits, dtype):
    model = make(dtype)
    before = captured(tmp_path, model, [tokens()])
    arrays = solved(tmp_path, model, [tokens()], bits, fit_bias=True)
    assert comq_keras.apply(model, tmp_path / "quantized.h5") is model
    stored = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(dtype, np.float32)
    after = captured(tmp_path, model, [tokens()])
    assert list(after) == list(arrays) == [layer.name for layer in model.layers if layer.weights]
    for name, q in arrays.items():
        np.testing.assert_array_equal(after[name].weight, q.dequantize().astype(stored).astype(np.float32))
        if before[name].bias is not None:
            shifted = before[name].bias + q.bias_shift
            np.testing.assert_allclose(after[name].bias, shifted.astype(stored).astype(np.float32), atol=1e-7)


def test_quantize_lowers_the_error_of_the_output():
    model, errors = chain(), {}
    weights, exact = state(model), values(model(tokens(200)))
    for recipe, fit_bias in (("rtn", False), ("fast", True)):
        model.set_weights(weights)
        batches = np.split(tokens(200), 4)
        reports = comq_keras.quantize(model, batches, 3, layers=["conv*", "dense"], recipe=recipe, fit_bias=fit_bias)
        assert list(reports) == ["conv", "dense"]
        errors[recipe] = np.linalg.norm(values(model(tokens(200))) - exact)
    assert errors["fast"] < 0.8 * errors["rtn"]


def test_what_apply_refuses_changes_nothing(tmp_path):
    model = chain()
    solved(tmp_path, model, [tokens()])
    other = keras.Sequential([*chain().layers[:-1], layers.Dense(4, name="dense")])
    other.build((None, 6))
    before = state(other)
    with pytest.raises(comq_np.InputError, match=r"^layer 'dense': must have codes of shape \(120, 4\)"):
        comq_keras.apply(other, tmp_path / "quantized.h5")
    for new, old in zip(state(other), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_names_of_another_model(tmp_path):
    arrays = solved(tmp_path, dense(), [random(9, 2)])
    other = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="other")])
    comq_keras.apply(other, tmp_path / "quantized.h5", names={"fc": "other"})
    np.testing.assert_array_equal(values(other.layers[0].kernel), arrays["fc"].dequantize())


def test_wrong_options_are_refused_before_the_model_runs():
    with pytest.raises(comq_np.InputError, match=r"^`bits` must be an integer from 1 to 16, got 17\.$"):
        comq_keras.quantize(dense(), [random(2, 2)], 17, forward=lambda *_: pytest.fail("the model ran"))


# Interchange with PyTorch

NAMES = {"embedding": "0", "conv": "2", "depthwise": "3", "transposed": "4", "groups": "6", "dense": "9"}


class Swap(torch.nn.Module):
    """Channels last, or first again."""

    def forward(self, x):
        return x.mT


def both():
    """The same network in Keras and in PyTorch."""
    options = {"bias_initializer": "normal"}
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, name="embedding"),
            layers.Conv1D(8, 3, padding="same", groups=2, name="conv", **options),
            layers.DepthwiseConv1D(3, depth_multiplier=2, strides=2, name="depthwise", **options),
            layers.Conv1DTranspose(4, 3, strides=2, output_padding=1, name="transposed", **options),
            layers.Activation("relu"),
            layers.Conv1D(6, 1, groups=2, name="groups", **options),
            layers.Flatten(),
            layers.EinsumDense("ab,bcd->acd", (2, 3), bias_axes="cd", name="dense", **options),
            layers.Flatten(),
        ]
    )
    twin = torch.nn.Sequential(
        torch.nn.Embedding(9, 4),
        Swap(),
        torch.nn.Conv1d(4, 8, 3, padding="same", groups=2),
        torch.nn.Conv1d(8, 16, 3, stride=2, groups=8),
        torch.nn.ConvTranspose1d(16, 4, 3, stride=2, output_padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv1d(4, 6, 1, groups=2),
        Swap(),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 6),
    ).requires_grad_(False)
    turns = {"embedding": (0, 1), "transposed": (2, 1, 0), "dense": None}
    for name, number in NAMES.items():
        layer, module = model.get_layer(name), twin[int(number)]
        weight = values(layer.embeddings if name == "embedding" else layer.kernel)
        axes = turns.get(name, (2, 1, 0))
        if name == "depthwise":  # (size, channels, multiplier) is (size, 1, channels times multiplier)
            weight = weight.reshape(3, 1, 16)
        weight = weight.reshape(36, 6).T if axes is None else weight.transpose(axes)
        module.weight.copy_(torch.from_numpy(weight.copy()))
        if name != "embedding":
            module.bias.copy_(torch.from_numpy(values(layer.bias).flatten()))
    return model, twin


@pytest.mark.parametrize("fit_bias", [False, True])
def test_what_one_adapter_captures_the_other_applies(tmp_path, fit_bias):
    model, twin = both()
    indices = torch.from_numpy(tokens(40))
    np.testing.assert_allclose(values(model(indices.numpy())), twin(indices), atol=1e-5)
    ours = captured(tmp_path, model, [indices.numpy()])
    comq_torch.capture(twin, [indices], tmp_path / "twin.h5")
    with comq_np.CalibrationFile(tmp_path / "twin.h5") as file:
        for name, layer in ours.items():
            theirs = file[NAMES[name]]
            np.testing.assert_array_equal(layer.weight, theirs.weight)
            assert (layer.kind, layer.gram.count) == (theirs.kind, theirs.gram.count)
            if name != "embedding":
                np.testing.assert_array_equal(layer.bias, theirs.bias)
                np.testing.assert_allclose(layer.gram.matrix, theirs.gram.matrix, atol=1e-3)
    for source in ("calibration", "twin"):
        paths = (tmp_path / f"{prefix}{source}.h5" for prefix in ("", "quantized-"))
        comq_np.quantize_file(*paths, 3, recipe="rtn", fit_bias=fit_bias)
    back = {number: name for name, number in NAMES.items()}
    comq_keras.apply(model, tmp_path / "quantized-twin.h5", names=back)
    comq_torch.apply(twin, tmp_path / "quantized-twin.h5")
    np.testing.assert_allclose(values(model(indices.numpy())), twin(indices), atol=1e-5)
    model, twin = both()
    comq_keras.apply(model, tmp_path / "quantized-calibration.h5")
    comq_torch.apply(twin, tmp_path / "quantized-calibration.h5", names=NAMES)
    np.testing.assert_allclose(values(model(indices.numpy())), twin(indices), atol=1e-5)


def dense_chain():
    """Dense layers, and batches of correlated inputs."""
    options = {"activation": "relu", "bias_initializer": "normal"}
    made = [layers.Dense(40, name="one", **options), layers.Dense(40, name="two", **options), layers.Dense(40)]
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(12, 48, 24)) @ rng.normal(size=(24, 24))
    return keras.Sequential([keras.Input((24,)), *made]), list(inputs.astype(np.float32))


@pytest.mark.parametrize("fit_bias", [False, True])
def test_in_sequence_each_layer_is_solved_for_the_outputs_of_the_float_model(fit_bias):
    model, own = dense_chain()
    before, exact = [state(layer) for layer in model.layers], own
    reports = comq_keras.quantize(model, own, 3, sequential=True, fit_bias=fit_bias)
    assert list(reports) == ["one", "two", model.layers[-1].name]
    assert not any("call" in vars(layer) for layer in model.layers)
    for layer, (W, bias) in zip(model.layers, before, strict=True):
        Wq, shifted = (array.astype(float) for array in state(layer))
        rows = [[x.astype(float) for x in batches] for batches in (own, exact)]
        assert_matched(W, bias, *rows, np.concatenate(rows[0]) @ Wq + shifted, 3, fit_bias)
        own = [np.maximum(x @ Wq + shifted, 0) for x in own]
        exact = [np.maximum(x @ W + bias, 0) for x in exact]


def encoder():
    model = Encoder()
    model(random(1, 5, 6))
    return model


@pytest.mark.parametrize("make", [chain, functional, encoder])
def test_in_sequence_any_kind_of_model_is_nearer_to_the_float_one(make):
    """Among them one of a class that Keras could not copy."""
    ratios = []
    for seed in range(4):
        keras.utils.set_random_seed(seed)
        model, rng = make(), np.random.default_rng(seed)
        if make is encoder:
            batches = list(rng.normal(size=(9, 16, 5, 6)).astype(np.float32))
        else:
            batches = list(rng.integers(9, size=(9, 16, *model.input_shape[1:])))
        exact, weights, errors = values(model(batches[-1], training=False)), state(model), []
        for sequential in (False, True):
            model.set_weights(weights)
            reports = comq_keras.quantize(model, batches[:-1], 3, sequential=sequential, fit_bias=True)
            assert not reports.kept
            errors.append(np.square(values(model(batches[-1], training=False)) - exact).mean())
        ratios.append(errors[1] / errors[0])
    assert np.log(ratios).mean() < np.log(0.7)


def test_errors_end_a_sequence_and_leave_nothing_behind():
    model, batches = dense_chain()
    before, threads = state(model), threading.active_count()
    batches[5][3, 2] = float("nan")
    with pytest.raises(comq_np.InputError, match=r"^layer 'one': batch 5: `X` must be finite"):
        comq_keras.quantize(model, batches, 3, sequential=True, strict=True)
    with pytest.raises(comq_np.InputError, match="`memory` must be None with `sequential`"):
        comq_keras.quantize(model, batches, 3, sequential=True, memory="1GiB")
    for new, old in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(new, old)
    assert threading.active_count() == threads
    assert not any("call" in vars(layer) for layer in model.layers)


def test_inputs_are_captured_for_others_and_refused_here(tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, activation="relu", name="one"), layers.Dense(3, name="two")]
    )
    batches = [random(40, 6), random(40, 6)[::-1]]
    comq_keras.capture(model, batches, tmp_path / "calibration.h5", activation_bits={"two": 8})
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        assert [row["activation_bits"] for row in file.describe()] == ["float", 8]
        assert file["two"].gram.count == 80
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", 8, recipe="fast")
    message = "layer 'two': must have float inputs, as models of this framework have no others here"
    with pytest.raises(comq_np.InputError, match=message):
        comq_keras.apply(model, tmp_path / "quantized.h5")
    with pytest.raises(comq_np.InputError, match=message):
        comq_keras.quantize(model, batches, 4, activation_bits={"two": 8})
    with pytest.raises(comq_np.InputError, match="must not have 'axis' 'channel' where no layer has weights that can"):
        comq_keras.capture(model, batches, tmp_path / "c.h5", activation_bits=8, activation_options={"axis": "channel"})
