"""The PyTorch adapter: what it captures is summed anew in float64, what it writes is compared bit for bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import comq_np
import comq_torch
from comq_torch.packed import PackedConv2d, PackedEmbedding, PackedLinear

PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1), "bias": False},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": (3, 2), "padding": "valid", "stride": 2},
    *({"kernel_size": (3, 2), "padding": (2, 1), "stride": 2, "padding_mode": mode} for mode in PADDING),
    *({"kernel_size": (4, 2), "padding": "same", "padding_mode": mode} for mode in PADDING),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Recording(nn.Linear):
    """Keeps a copy of every input."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def forward(self, input):  # noqa: A002
        self.seen.append(input.detach().double().numpy().copy())
        return super().forward(input)


class Script(nn.Module):
    """Calls what each batch, a function of the model, says."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, batch):
        return batch(self)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q(x), self.k(input=x), self.v(x)
        return self.out((q @ k.mT).softmax(-1) @ v)


def captured(tmp_path, model, batches, *args, **kwargs):
    """Layers by name, and which number of Gram each has."""
    comq_torch.capture(model, batches, tmp_path / "calibration.h5", *args, **kwargs)
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        return dict(file), {row["layer"]: row["gram"] for row in file.describe()}


def solved(tmp_path, model, batches, bits=3, **options):
    """Path of the quantized file of a model."""
    captured(tmp_path, model, batches)
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", bits, **options)
    return tmp_path / "quantized.h5"


def applied(model, path):
    """Two copies of the model with the file applied, the second one packed."""
    return [comq_torch.apply(copy.deepcopy(model), path, packed=packed) for packed in (False, True)]


@contextlib.contextmanager
def refused(message):
    with pytest.raises(comq_np.InputError) as caught:
        yield
    assert str(caught.value) == message


def arrays(path):
    with comq_np.QuantizedFile(path) as file:
        return dict(file)


def explicit_rows(conv, x):
    """Every patch that a convolution multiplies, cut out one by one."""
    spans = [step * (size - 1) for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(0, 0)] * 2 if conv.padding == "valid" else [(size, size) for size in conv.padding]
    x = np.pad(x.double().numpy(), [(0, 0), (0, 0), *sides], mode=PADDING[conv.padding_mode])
    return np.array(
        [
            image[:, i : i + spans[0] + 1 : conv.dilation[0], k : k + spans[1] + 1 : conv.dilation[1]].ravel()
            for image in x
            for i in range(0, x.shape[2] - spans[0], conv.stride[0])
            for k in range(0, x.shape[3] - spans[1], conv.stride[1])
        ]
    )


def assert_gram(gram, *folds):
    """The Gram holds just these rows, fold by fold."""
    for fold, X in zip(gram.folds, folds, strict=True):
        assert fold.count == len(X)
        np.testing.assert_allclose(fold.matrix, X.T @ X, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(fold.sum, X.sum(axis=0), rtol=1e-5, atol=1e-5)


def halves(X, number=0):
    """What of a batch's input of that number goes to each fold."""
    return np.array_split(X, 2)[:: -1 if number % 2 else 1]


def same_everywhere(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# Capturing


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("samples", [2048, 5])
def test_convolution(tmp_path, monkeypatch, options, samples):
    monkeypatch.setattr("comq_np.convolution.CHUNK", samples)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        conv, x = nn.Conv2d(3, 4, **options), torch.randn(5, 3, 8, 7)
        layers, _ = captured(tmp_path, nn.Sequential(conv), [x[:2], x[2:4], x[4]])
        output = conv(x).detach().permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    layer = layers["0"]
    assert layer.kind == "conv2d"
    rows = explicit_rows(conv, x)
    images = rows.reshape(5, -1, rows.shape[1])
    assert_gram(layer.gram, *(images[which].reshape(-1, rows.shape[1]) for which in ([0, 3, 4], [1, 2])))
    bias = 0 if layer.bias is None else layer.bias
    np.testing.assert_allclose(rows @ layer.weight + bias, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_that_torch_unfolds(memory_format):
    x = torch.randn(3, 4, 50, 40).to(memory_format=memory_format)
    options = {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1), "padding": (2, 1)}
    rows = np.concatenate(list(comq_np.patches(x.numpy(), **options)))
    np.testing.assert_array_equal(rows, nn.functional.unfold(x, **options).mT.reshape(-1, 24))


def test_an_image_too_small_for_the_kernel_is_refused_with_the_name_of_the_layer(tmp_path):
    message = "layer '0', batch 0: `images` must be of at least (5, 5) pixels with their padding, got (4, 6)."
    with refused(message):
        captured(tmp_path, nn.Sequential(nn.Conv2d(1, 1, 5)), [torch.ones(1, 1, 4, 6)])


@pytest.mark.parametrize("module", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6), Recording(6, 4)])
def test_linear(tmp_path, module):
    x = torch.randn(5, 3, 6)
    layers, _ = captured(tmp_path, nn.Sequential(module), [x[:2], x[2:], x[0], x[:1], x[0, 0]])
    rows = x.double().numpy()
    first, second = [rows[0], rows[4], rows[0, :2]], [rows[1], rows[2], rows[3], rows[0, 2:], rows[0]]
    assert_gram(layers["0"].gram, np.concatenate([*first, rows[:1, 0]]), np.concatenate(second))
    bias = 0 if layers["0"].bias is None else layers["0"].bias
    np.testing.assert_allclose(rows @ layers["0"].weight + bias, module(x).detach(), rtol=1e-5, atol=1e-6)
    assert layers["0"].kind == "linear"


def test_layers_of_one_input_share_its_gram_anywhere_in_a_model(tmp_path):
    model = nn.ModuleDict({"blocks": nn.Sequential(Attention(6), nn.ReLU(), Attention(6))})
    x = torch.randn(4, 5, 6)
    layers, grams = captured(tmp_path, model, [x, x + 1], forward=lambda model, batch: model["blocks"](batch))
    assert list(layers) == [f"blocks.{block}.{name}" for block in (0, 2) for name in ("q", "k", "v", "out")]
    assert list(grams.values()) == [0, 0, 0, 1, 2, 2, 2, 3]
    first, second = torch.cat([x[:2], x[2:] + 1]), torch.cat([x[2:], x[:2] + 1])
    assert_gram(layers["blocks.0.k"].gram, *(half.double().numpy().reshape(-1, 6) for half in (first, second)))


def test_convolutions_share_only_with_the_same_geometry(tmp_path):
    model = Script(a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(2, 5, 3, padding="same"), c=nn.Conv2d(2, 3, 3))
    x = torch.randn(2, 2, 6, 6)
    assert captured(tmp_path, model, [lambda m: (m.a(x), m.b(x), m.c(x))] * 2)[1] == {"a": 0, "b": 0, "c": 1}


def in_place(m, x):
    m.a(x)
    m.b(x.add_(1))


@pytest.mark.parametrize(
    ("calls", "grams"),
    [
        ([lambda m, x: (m.a(x), m.b(x), m.c(x))] * 3, [0, 0, 0]),
        ([lambda m, x: (m.a(x), m.b(x)), lambda m, x: (m.a(x), m.b(x), m.c(x))], [0, 0, 1]),
        ([lambda m, x: (m.a(x), m.b(x), m.c(x)), lambda m, x: (m.c(x), m.a(x)), lambda m, x: m.b(x)], [0, 1, 0]),
        ([lambda m, x: (m.a(x), m.b(x), m.c(x)), lambda m, x: (m.a(x), m.b(x), m.c(x + 1))], [0, 0, 1]),
        ([lambda m, x: (m.a(x), m.a(x), m.b(x), m.b(x), m.c(x))], [0, 0, 1]),
        ([lambda m, x: (m.a(x), m.b(x), m.a(-x), m.b(x), m.c(x))], [0, 1, 2]),
        ([in_place, lambda m, x: (m.c(x), m.a(x))], [0, 1, 2]),
        ([lambda m, x: m.b(x[:0]), lambda m, x: (m.a(x), m.b(x), m.c(x))], None),
    ],
)
def test_dynamic_control_flow(tmp_path, calls, grams):
    model = Script(a=Recording(4, 2), b=Recording(4, 3), c=Recording(4, 1))
    check_streams(tmp_path, model, [lambda m, call=call: call(m, torch.randn(6, 4)) for call in calls], grams)


@pytest.mark.parametrize("seed", range(12))
def test_random_control_flow(tmp_path, seed):
    rng = np.random.default_rng(seed)
    model = Script(**{name: Recording(3, 2) for name in "abcde"})

    def batch(m):
        tensors = [torch.randn(4, 3) for _ in range(2)]
        for _ in range(rng.integers(2, 12)):
            x = tensors[rng.integers(2)]
            for name in rng.permutation(list("abcde"))[: rng.integers(1, 6)]:
                getattr(m, name)(x)
            if rng.random() < 0.3:
                x.mul_(-1.5)

    check_streams(tmp_path, model, [lambda m: [getattr(m, name)(torch.ones(1, 3)) for name in "abcde"], *[batch] * 4])


def check_streams(tmp_path, model, batches, grams=None):
    """Capture, and compare with what the recording layers saw, batch by batch."""
    seen = {name: [[], []] for name, _ in model.named_children()}

    def forward(model, batch):
        batch(model)
        for name, layer in model.named_children():
            for x in layer.seen:
                for fold, half in zip(seen[name], halves(x, forward.number), strict=True):
                    fold.append(half)
            layer.seen = []
        forward.number += 1

    forward.number = 0
    layers, numbers = captured(tmp_path, model, batches, forward=forward)
    for name, layer in layers.items():
        assert_gram(layer.gram, *(np.concatenate([np.zeros((0, len(layer.gram))), *fold]) for fold in seen[name]))
    assert grams is None or list(numbers.values()) == grams


@torch.inference_mode()
def test_inference_tensors_are_never_taken_for_the_same(tmp_path):
    model, x = nn.Sequential(Attention(4), nn.ReLU(), Attention(4)), torch.ones(2, 4)
    layers, grams = captured(tmp_path, model, [x])
    assert list(grams.values()) == [0, 0, 0, 1, 2, 2, 2, 3]  # in the file, since they are equal
    assert_gram(layers["0.v"].gram, *halves(np.ones((2, 4))))
    in_turn = Script(a=nn.Linear(4, 2), b=nn.Linear(4, 3))
    layers, _ = captured(tmp_path, in_turn, [inference_in_place])
    for name, value in (("a", 1.0), ("b", 2.0)):
        assert_gram(layers[name].gram, *halves(np.full((2, 4), value)))


@torch.inference_mode()
def inference_in_place(m):
    x = torch.ones(2, 4)
    m.a(x)
    m.b(x.mul_(2))


def test_tied_weights_are_one_layer(tmp_path):
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight, c.weight = a.weight, a.weight
    c.bias = a.bias
    x = torch.randn(3, 4)
    layers, _ = captured(tmp_path, Script(a=a, b=b), [lambda m: (m.a(x), m.b(-2 * x))])
    assert list(layers) == ["a"]
    assert layers["a"].bias is None
    assert_gram(layers["a"].gram, *(np.concatenate([half, -2 * half]) for half in halves(x.double().numpy())))
    layers, _ = captured(tmp_path, Script(a=a, c=c), [lambda m: m.c(x)], ["c"])
    np.testing.assert_array_equal(layers["a"].bias, a.bias.detach())
    lone = Script(a=a, norm=nn.LayerNorm(4))
    lone.norm.bias = a.bias
    assert captured(tmp_path, lone, [lambda m: m.a(x)])[0]["a"].bias is None


def test_tied_convolutions_may_differ_in_geometry(tmp_path):
    a, b, c, x = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, stride=2), nn.Conv2d(2, 2, 3), torch.randn(2, 2, 5, 5)
    b.weight = a.weight
    layers, grams = captured(tmp_path, Script(a=a, b=b, c=c), [lambda m: (m.b(x), m.c(x)), lambda m: (m.a(x), m.c(x))])
    assert grams == {"a": 0, "c": 1}
    first, second = (
        np.concatenate([explicit_rows(b, x[k : k + 1]), explicit_rows(a, x[1 - k : 2 - k])]) for k in (0, 1)
    )
    assert_gram(layers["a"].gram, first, second)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_batches_and_select(tmp_path, wrap):
    batch = wrap(torch.ones(2, 3))
    layers, _ = captured(tmp_path, nn.Linear(3, 2), iter([batch]), select=lambda x, b: x[1:] * len(b))
    assert list(layers) == [""]
    assert_gram(layers[""].gram, *halves(np.full((1, 3), len(batch))))


def test_select_gets_the_images_of_a_convolution(tmp_path):
    x = torch.randn(4, 2, 5, 5)
    conv, keep = nn.Conv2d(2, 2, 3), torch.tensor([True, False, False, True])
    layers, _ = captured(tmp_path, Script(conv=conv), [lambda m: m.conv(x)], select=lambda x, _: x[keep])
    assert_gram(layers["conv"].gram, *halves(explicit_rows(conv, x[keep])))


def test_a_lone_text_stays_whole_when_its_tokens_are_selected(tmp_path):
    texts = [torch.randn(1, 6, 3) for _ in range(3)]
    layers, _ = captured(tmp_path, nn.Linear(3, 2), texts, select=lambda x, _: x[x[:, :, 0] > 0])
    rows = [text[text[:, :, 0] > 0].double().numpy() for text in texts]
    assert_gram(layers[""].gram, np.concatenate(rows[::2]), rows[1])


def test_layer_patterns(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 3))
    assert list(captured(tmp_path, model, [torch.ones(1, 3)], ["2", "1.*"])[0]) == ["1.0", "1.1", "2"]
    assert list(captured(tmp_path, model, [torch.ones(1, 3)], ["*.[!0]"])[0]) == ["1.1"]


def test_layers_that_no_batch_reaches_are_left_out_with_a_warning(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)})
    with pytest.warns(UserWarning, match=r"these layers, which are left out: 'b'\.$"):
        layers, _ = captured(tmp_path, model, [torch.randn(2, 3)], forward=lambda m, x: (m["a"](x), m["c"](x)))
    assert list(layers) == ["a", "c"]


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_stays_as_it_was(tmp_path, failing):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    model[2].eval()
    before, modes = copy.deepcopy(model), []
    model.register_forward_hook(lambda module, *_: modes.append((module[1].training, torch.is_grad_enabled())))
    batches = [torch.randn(4, 3), torch.randn(4, 5 if failing else 3)]
    with pytest.raises(comq_np.InputError, match=r"^layer '0', batch 1: ") if failing else contextlib.nullcontext():
        comq_torch.capture(model, batches, tmp_path / "calibration.h5")
    assert modes[0] == (False, False)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert same_everywhere(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [path.name for path in tmp_path.iterdir()] == ([] if failing else ["calibration.h5"])


def poisoned():
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 1] = torch.nan
    return layer


class PaddingConv2d(nn.Conv2d):
    def forward(self, input):  # noqa: A002
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


ONE, INFINITE = torch.ones(1, 2), torch.tensor([[1, torch.inf]])
KINDS = "a linear, convolution, embedding or attention layer"
BAD = "must be finite, got 1 NaN or infinite of"


@pytest.mark.parametrize(
    ("model", "batches", "layers", "message"),
    [
        (3, [], None, "`model` must be a torch.nn.Module, got 'int'."),
        (nn.ReLU(), [], None, f"`model` must have {KINDS}, has none."),
        (PaddingConv2d(2, 2, 2), [], None, f"`model` must have {KINDS}, has none."),
        (nn.LazyLinear(2), [], None, "layer '': `weight` must be initialised, which the first forward pass does."),
        (poisoned(), [], None, f"layer '': `weight` {BAD} 4 entries."),
        (nn.Linear(2, 2), [], None, "`batches` must hold at least one batch, got none."),
        (nn.Linear(2, 2), {"input": 1}, None, "`batches['input']` must be an iterable of batches, got 'int'."),
        (nn.Linear(2, 2), 7, None, "`batches` must be an iterable of batches, got 'int'."),
        (nn.Linear(2, 2), [ONE[:0]], None, "`batches` must reach a layer, none of them got an input: ''."),
        (nn.Linear(2, 2), [ONE, INFINITE], None, f"layer '', batch 1: `X` {BAD} 2 entries, the first at (0, 1)."),
        (nn.Linear(2, 2), [[None]], None, "layer '', batch 0: must be called with a tensor, got 'NoneType'."),
        (nn.Linear(2, 2), [], ["f*"], "`layers` must name layers that can be quantized, got 'f*', which matches none."),
        (
            nn.ModuleDict({"lstm": nn.LSTM(2, 2), "fc": nn.Linear(2, 2)}),
            [],
            ["fc", "l*"],
            (
                "`layers` must name layers that can be quantized, got 'l*', which matches none. "
                "'lstm': recurrent layers are not supported."
            ),
        ),
        (nn.Linear(2, 2), [], [], "`layers` must hold at least one name or pattern, got none."),
    ],
)
def test_what_capture_refuses(tmp_path, model, batches, layers, message):
    with refused(message):
        comq_torch.capture(model, batches, tmp_path / "calibration.h5", layers)


# Applying


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding="same", padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(6, 8, (3, 2), stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.GELU(),
        Conv1D(3, 10),
    )


def images(count=20):
    return torch.randn(count, 2, 5, 5)


OPTIONS = [{"group_size": 7}, {"group_size": "tensor"}, {"fit_bias": True}]


@pytest.mark.parametrize(("bits", "options"), [*zip(range(1, 17), itertools.cycle(OPTIONS), strict=False)])
def test_weights_are_the_dequantized_ones_to_the_bit_packed_or_not(tmp_path, bits, options):
    model, x = network().eval(), images()
    path = solved(tmp_path, model, [x], bits, recipe="rtn", **options)
    plain, packed = applied(model, path)
    for name, q in arrays(path).items():
        layer, Wq = plain.get_submodule(name), q.dequantize()
        W = layer.weight.detach()
        np.testing.assert_array_equal(W if isinstance(layer, Conv1D) else W.flatten(1).T, Wq)
        np.testing.assert_array_equal(packed.get_submodule(name).dequantize(), Wq)
        np.testing.assert_array_equal(packed.get_submodule(name).codes, comq_np.pack_codes(q.codes, bits))
        if q.bias_shift is not None:
            assert torch.equal(layer.bias, model.get_submodule(name).bias + torch.from_numpy(q.bias_shift))
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-6, atol=1e-6)
    assert [type(packed[i]) for i in (0, 2, 4, 6)] == [PackedConv2d, PackedConv2d, PackedLinear, PackedLinear]
    assert [tuple(packed[4].weight.shape), tuple(packed[0].weight.shape)] == [(10, 32), (6, 2, 3, 3)]
    assert list(packed.parameters()) == []


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("zero_point", ["integer", "real"])
def test_packed_modules_can_be_saved_and_change_type(tmp_path, zero_point, scale_dtype):
    model, x = network().eval(), images()
    options = {"zero_point": zero_point, "scale_dtype": scale_dtype}
    path, other = (solved(tmp_path, model, [x], 3, recipe=name, **options) for name in ("balanced", "rtn"))
    plain, packed = applied(model, path)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    again = comq_torch.apply(model, other, packed=True)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(x), packed(x))
    torch.testing.assert_close(packed.half()(x.half()), plain.half()(x.half()))
    assert packed[4].scale.dtype == getattr(torch, scale_dtype)
    assert torch.equal(packed[4].weight, plain[4].weight)
    assert torch.equal(packed.float()[4].weight, again[4].weight)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(tmp_path, dtype, packed):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), Conv1D(3, 4)).to(dtype)
    path = solved(tmp_path, model, [torch.randn(30, 6, dtype=dtype)], fit_bias=True)
    bias = model[0].bias.detach().clone()
    model = comq_torch.apply(model, path, packed=packed)
    q = arrays(path)["0"]
    assert torch.equal(model[0].weight, torch.from_numpy(q.dequantize().T).to(dtype))
    torch.testing.assert_close(model[0].bias.detach(), (bias.double() + torch.from_numpy(q.bias_shift)).to(dtype))
    assert model(torch.ones(1, 6, dtype=dtype)).dtype == dtype


def test_quantize_a_transformer_with_a_tied_embedding():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=40, n_positions=16)).eval()
    packed, batch = copy.deepcopy(model), {"input_ids": torch.arange(32).reshape(4, 8) % 40}
    options = {"group_size": 4, "symmetric": True}
    reports = comq_torch.quantize(model, [batch, batch], 5, **options)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(reports) == ["transformer.wpe", *(f"transformer.h.0.{name}" for name in names), "lm_head"]
    comq_torch.quantize(packed, [batch, batch], 5, packed=True, **options)
    assert isinstance(packed.transformer.h[0].attn.c_attn, PackedLinear)
    assert isinstance(packed.transformer.wpe, PackedEmbedding)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(packed.transformer.wte.weight, model.lm_head.weight)
    with torch.no_grad():
        torch.testing.assert_close(packed(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


def test_quantize_lowers_the_error_of_the_output(tmp_path):
    model, x = network(), images(200)
    exact, errors = model(x), {}
    for recipe, fit_bias in (("rtn", False), ("balanced", True)):
        quantized, options = copy.deepcopy(model), {"recipe": recipe, "fit_bias": fit_bias}
        reports = comq_torch.quantize(quantized, x.split(50), 3, layers=["0", "4"], **options)
        assert list(reports) == ["0", "4"]
        assert torch.equal(quantized[2].weight, model[2].weight)
        errors[recipe] = (quantized(x) - exact).norm()
    assert errors["balanced"] < 0.8 * errors["rtn"]


def test_packed_under_every_name(tmp_path):
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    block = nn.Sequential(shared, nn.ReLU())
    model = nn.Sequential(block, block, nn.Sequential(shared, tied))
    x, path = torch.randn(9, 4), solved(tmp_path, model, [torch.randn(9, 4)])
    plain, packed = applied(model, path)
    assert packed[0][0] is packed[2][0]
    assert packed[2][1].codes is packed[2][0].codes
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-6, atol=1e-6)


def test_wrong_options_are_refused_before_the_model_runs():
    def forward(model, batch):
        pytest.fail("the model ran")

    for options, message in (
        ({"bits": 17}, "`bits` must be an integer from 1 to 16, got 17."),
        ({"bits": {"1": 4}}, "layer '0': `bits` must hold its name or a pattern that it matches."),
        ({"recipe": "gptq"}, "`recipe` must be one of 'paper', 'rtn', 'fast', 'balanced', 'best', got 'gptq'."),
    ):
        with refused(message):
            comq_torch.quantize(nn.Sequential(nn.Linear(2, 2)), [ONE], forward=forward, **options)


def test_a_model_that_is_itself_a_layer(tmp_path):
    model, x = nn.Linear(4, 2).eval(), torch.randn(9, 4)
    path = solved(tmp_path, model, [x])
    packed = comq_torch.apply(copy.deepcopy(model), path, packed=True)
    assert isinstance(packed, PackedLinear)
    assert not packed.training
    assert comq_torch.apply(model, path) is model
    assert torch.equal(packed(x), model(x))
    with refused("`model` must not be a layer itself with `packed`, got 'Linear'."):
        comq_torch.quantize(nn.Linear(2, 2), [torch.ones(1, 2)], packed=True)


def test_a_packed_output_projection_serves_attention_that_reads_its_weight(tmp_path):
    model, x = nn.MultiheadAttention(4, 2).eval(), torch.randn(5, 1, 4)
    with comq_np.QuantizedWriter(tmp_path / "quantized.h5") as file:
        file.add("out_proj", comq_np.solve(model.out_proj.weight.detach().T, np.eye(4)))
    plain, packed = applied(model, tmp_path / "quantized.h5")
    torch.testing.assert_close(packed(x, x, x)[0], plain(x, x, x)[0])


def pair(second=None, **options):
    return nn.ModuleList([nn.Linear(4, 3), second or nn.Linear(4, 3, **options)])


def tied_pair():
    model = pair()
    model[1].weight = model[0].weight
    return model


def solved_pair(tmp_path, **options):
    captured(tmp_path, pair(), [torch.ones(2, 4)], forward=lambda model, x: [layer(x) for layer in model])
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", **options)
    return tmp_path / "quantized.h5"


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (pair()[:1], "1", "must be a layer of the model, to take codes of shape (4, 3)."),
        (pair(nn.Linear(3, 4)), "1", "must have codes of shape (3, 4) to match the model, has (4, 3)."),
        (pair(bias=False), "1", "must have a bias of its own, as the file has a `bias_shift` for it."),
        (tied_pair(), "0", "must have a bias of its own, as the file has a `bias_shift` for it."),
        (pair(Recording(4, 3)), "1", "must have the forward of its kind to be packed, 'Recording' has its own."),
    ],
)
def test_what_apply_refuses_changes_nothing(tmp_path, model, name, message):
    path, before = solved_pair(tmp_path, fit_bias=True), copy.deepcopy(model)
    with refused(f"layer {name!r}: {message}"):
        comq_torch.apply(model, path, packed=True)
    assert same_everywhere(model, before)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_could_not_be_solved_stay_as_they_are(tmp_path, packed):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    captured(tmp_path, model, [torch.randn(20, 4)])
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as source:
        layers = dict(source)
    with comq_np.CalibrationWriter(tmp_path / "calibration.h5") as file:
        file.add(layers["0"])
        file.add(dataclasses.replace(layers["2"], gram=comq_np.Gram(3)))
    with pytest.warns(UserWarning, match="stay float: '2'"):
        comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5")
    made = comq_torch.apply(copy.deepcopy(model), tmp_path / "quantized.h5", packed=packed)
    assert type(made[2]) is nn.Linear
    assert same_everywhere(made[2], model[2])
    assert (type(made[0]) is nn.Linear) is not packed
    assert not torch.equal(made(torch.eye(4)), model(torch.eye(4)))


def test_quantize_returns_why_a_layer_could_not_be_solved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    model[2].weight.mul_(1e29)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="stay float: '2'"):
        reports = comq_torch.quantize(model, [torch.rand(20, 4) * 1e15])
    assert list(reports) == ["0"]
    assert "the bias must fit in float32" in reports.kept["2"]
    assert same_everywhere(model[2], before[2])
    assert not same_everywhere(model[0], before[0])


def test_a_file_with_two_names_of_one_weight_is_refused(tmp_path):
    with refused("layer '1': shares its weight with layer '0', the file holds both."):
        comq_torch.apply(tied_pair(), solved_pair(tmp_path, fit_bias=False))


def test_progress_goes_to_standard_error(capsys):
    comq_torch.quantize(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "capture" in err
    assert "solve" in err
