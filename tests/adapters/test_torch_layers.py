"""Every kind of layer that the PyTorch adapter takes: Gram and W against loops in float64, and the way back."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import comq_np
import comq_torch

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
KERNEL, SPACE = {1: (3,), 2: (2, 3), 3: (2, 1, 2)}, {1: (8,), 2: (5, 6), 3: (4, 3, 5)}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
GROUPS = (1, 2, 4)  # of four channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def captured(tmp_path, model, batches, *args, **kwargs):
    """Layers by name, which number of Gram each has, and those that are skipped."""
    comq_torch.capture(model, batches, tmp_path / "calibration.h5", *args, **kwargs)
    with comq_np.CalibrationFile(tmp_path / "calibration.h5") as file:
        return dict(file), {row["layer"]: row["gram"] for row in file.describe()}, file.skipped


def convolution_rows(conv, x):
    """Rows (images, pixels, groups, m) in float64, pixel by pixel of the output."""
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    spans = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    if isinstance(conv.padding, str):
        sides = [(span // 2, span - span // 2) if conv.padding == "same" else (0, 0) for span in spans]
    else:
        sides = [(size, size) for size in conv.padding]
    x = np.pad(x.double().numpy(), [(0, 0), (0, 0), *sides], mode=MODES[conv.padding_mode])
    starts = [range(0, size - span, step) for size, span, step in zip(x.shape[2:], spans, stride, strict=True)]
    rows = [
        x[
            (
                slice(None),
                slice(None),
                *(slice(i, i + span + 1, step) for i, span, step in zip(at, spans, dilation, strict=True)),
            )
        ]
        for at in itertools.product(*starts)
    ]
    return np.stack([row.reshape(len(x), conv.groups, -1) for row in rows], axis=1)


def transposed_rows(conv, x):
    """The same of a transposed convolution, from what each pixel adds to the output."""
    kernel, x = conv.kernel_size, x.double().numpy()
    axes = zip(x.shape[2:], kernel, conv.stride, conv.dilation, conv.padding, conv.output_padding, strict=True)
    out = [(n - 1) * stride - 2 * pad + step * (k - 1) + more + 1 for n, k, stride, step, pad, more in axes]
    rows = np.zeros((len(x), *out, x.shape[1], *kernel))
    for pixel in np.ndindex(*x.shape[2:]):
        for position in np.ndindex(*kernel):
            axes = zip(pixel, position, conv.stride, conv.dilation, conv.padding, strict=True)
            at = [i * stride + k * step - pad for i, k, stride, step, pad in axes]
            if all(0 <= i < size for i, size in zip(at, out, strict=True)):
                flipped = tuple(size - 1 - k for size, k in zip(kernel, position, strict=True))
                rows[(slice(None), *at, slice(None), *flipped)] = x[(slice(None), slice(None), *pixel)]
    return rows.reshape(len(x), np.prod(out), conv.groups, -1)


def check_convolutions(tmp_path, convolutions, x, rows_of):
    """The file has the Grams of these rows, half of the images in each fold, and the W that makes the outputs."""
    model = nn.ModuleList(convolutions)
    layers, grams, _ = captured(tmp_path, model, [x], forward=each)
    assert len(set(grams.values())) == len(model)
    for conv, layer in zip(model, layers.values(), strict=True):
        rows, groups = rows_of(conv, x), conv.groups
        assert layer.kind == type(conv).__name__.lower().replace("convt", "conv_t")
        assert layer.gram.problems == (None if groups == 1 else groups)
        assert layer.weight.shape == (*rows.shape[2 if groups > 1 else 3 :], 8 // groups)
        for fold, X in zip(layer.gram.folds, np.array_split(rows, 2), strict=True):
            X = X.reshape(-1, *X.shape[2:])
            assert fold.count == len(X)
            shape = fold.matrix.shape
            expected = np.einsum("kgm,kgl->gml", X, X).reshape(shape)
            np.testing.assert_allclose(fold.matrix, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(fold.sum, X.sum(axis=0).reshape(shape[:-1]), rtol=1e-5, atol=1e-5)
        found = np.einsum("npgm,gmk->ngkp", rows, layer.weight.reshape(groups, rows.shape[3], -1))
        if layer.bias is not None:
            found += layer.bias.reshape(groups, -1, 1)
        np.testing.assert_allclose(found.reshape(conv(x).shape), conv(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "padding", "mode"),
    [
        *itertools.product([1, 2], [0, 1], ["zeros"]),
        *itertools.product([1], ["same", "valid"], ["zeros"]),
        *itertools.product([2], [1], ["reflect", "replicate", "circular"]),
        (1, "same", "reflect"),
    ],
)
@pytest.mark.parametrize("axes", CONV)
def test_convolution(tmp_path, axes, stride, padding, mode):
    options = {"stride": stride, "padding": padding, "padding_mode": mode, "bias": stride == 1}
    x = torch.randn(3, 4, *SPACE[axes])
    convolutions = [
        CONV[axes](4, 8, KERNEL[axes], **options, dilation=dilation, groups=groups)
        for dilation, groups in itertools.product([1, 2], GROUPS)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        check_convolutions(tmp_path, convolutions, x, convolution_rows)


@pytest.mark.parametrize(("stride", "output_padding"), [(1, 0), (2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("axes", TRANSPOSED)
def test_transposed_convolution(tmp_path, axes, padding, stride, output_padding):
    options = {"stride": stride, "padding": padding, "output_padding": output_padding, "bias": stride == 1}
    x = torch.randn(3, 4, *(2 + size // 3 for size in SPACE[axes]))
    convolutions = [
        TRANSPOSED[axes](4, 8, KERNEL[axes], **options, dilation=dilation, groups=groups)
        for dilation, groups in itertools.product([1, 2], GROUPS)
    ]
    check_convolutions(tmp_path, convolutions, x, transposed_rows)


def test_transposed_convolutions_of_a_given_output_size(tmp_path):
    model = nn.ModuleList([nn.ConvTranspose2d(2, 3, 3, stride=2) for _ in range(2)])
    x = torch.randn(2, 2, 4, 3)
    sizes = [(9, 7), (10, 8)]
    layers, grams, _ = captured(
        tmp_path,
        model,
        [x],
        forward=lambda m, x: [layer(x, output_size=size) for layer, size in zip(m, sizes, strict=True)],
    )
    assert grams == {"0": 0, "1": 1}
    for name, size in zip("01", sizes, strict=True):
        assert layers[name].gram.count == 2 * np.prod(size)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_one_signal_without_a_batch(tmp_path, kind):
    x = torch.randn(4, 9)
    layers, _, _ = captured(tmp_path, nn.Sequential(kind(4, 2, 3, groups=2)), [x, 2 * x])
    first, second = layers["0"].gram.folds
    np.testing.assert_allclose(4 * first.matrix, second.matrix, rtol=1e-5)


def test_convolutions_share_a_gram_with_the_same_groups_only(tmp_path):
    model = nn.ModuleList([nn.Conv1d(4, 4, 3, groups=groups) for groups in (2, 2, 1, 4)])
    assert list(captured(tmp_path, model, [torch.randn(2, 4, 8)], forward=each)[1].values()) == [0, 0, 1, 2]


def each(model, x):
    return [layer(x) for layer in model]


# Embeddings


def test_embeddings_are_counted(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position, self.out = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.token(x) + self.position(torch.arange(x.shape[1])[None]))

    model, x = Model(), torch.tensor([[0, 1, 1], [5, 1, 0], [6, 6, 6]])
    layers, _, skipped = captured(tmp_path, model, [x, x[:1]])
    token = layers["token"]
    assert (token.kind, skipped) == ("embedding", {})
    np.testing.assert_array_equal(token.weight, model.token.weight.detach())
    np.testing.assert_array_equal(token.gram.counts, [3, 5, 0, 0, 0, 1, 3])
    np.testing.assert_array_equal(layers["position"].gram.counts, [2, 2, 2, 0, 0])
    assert token.gram.count == 12


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_tables_that_are_looked_up_together_share_their_counts(tmp_path, memory):
    model = nn.ModuleList([nn.Embedding(7, 4), nn.Embedding(7, 2), nn.Linear(7, 2), nn.Embedding(8, 2)])
    batches = [torch.tensor([0, 6, 6]), torch.tensor([[1, 2], [2, 2]])]
    layers, grams, _ = captured(
        tmp_path, model, batches, ["0", "1", "3"], forward=lambda m, x: [m[k](x) for k in (0, 1, 3)], memory=memory
    )
    assert grams == {"0": 0, "1": 0, "3": 1}
    np.testing.assert_array_equal(layers["1"].gram.counts, [1, 1, 3, 0, 0, 0, 2])


def test_a_table_tied_to_a_linear_layer_is_that_layer(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 6))
    model[0].weight = model[2].weight
    layers, _, skipped = captured(tmp_path, model, [torch.tensor([[1, 2]])])
    assert (list(layers), skipped) == (["2"], {})


# Attention


def attended(attention, query, key, value):
    """What the output projection gets, in float64, (texts, tokens, width); inputs text after text."""

    def rows(x, which, k):
        own = attention._parameters
        weight = own["in_proj_weight"]
        W = own[f"{which}_proj_weight"] if weight is None else weight.chunk(3)[k]
        b = 0 if own["in_proj_bias"] is None else own["in_proj_bias"].chunk(3)[k].detach().double().numpy()
        y = x.double().numpy() @ W.detach().double().numpy().T + b
        return y.reshape(*y.shape[:2], attention.num_heads, -1).transpose(0, 2, 1, 3)

    q, k, v = (rows(x, which, k) for k, (x, which) in enumerate(zip((query, key, value), "qkv", strict=True)))
    scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
    found = scores / scores.sum(axis=-1, keepdims=True) @ v
    return found.transpose(0, 2, 1, 3).reshape(*query.shape[:2], -1)


def check_rows(layer, texts, number=0):
    """The Gram has these texts, half of them in each fold, or a text alone in the fold of its batch."""
    texts = np.asarray(texts, np.float64)
    halves = [texts, texts[:0]] if len(texts) == 1 else np.array_split(texts, 2)
    for fold, X in zip(layer.gram.folds, halves, strict=True):
        X = X.reshape(-1, X.shape[-1])
        assert fold.count == len(X)
        np.testing.assert_allclose(fold.matrix, X.T @ X, rtol=1e-4, atol=1e-5)


IN_PROJ = ["in_proj.query", "in_proj.key", "in_proj.value"]


@pytest.mark.parametrize("texts", [1, 3, None])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}, {"add_bias_kv": False}])
@pytest.mark.parametrize("cross", [False, True])
def test_attention(tmp_path, options, batch_first, texts, cross):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    cross = cross or "kdim" in options
    count = texts or 1
    query = torch.randn(count, 5, 8)
    key = torch.randn(count, 4, attention.kdim) if cross else query
    value = torch.randn(count, 4, attention.vdim) if cross else query
    given = {"query": query, "key": key, "value": value}
    as_module = {id(x): x[0] if texts is None else x if batch_first else x.transpose(0, 1) for x in given.values()}
    layers, grams, skipped = captured(tmp_path, attention, [{name: as_module[id(x)] for name, x in given.items()}])
    assert (list(layers), skipped) == ([*IN_PROJ, "out_proj"], {})
    assert list(grams.values()) == ([0, 1, 2, 3] if cross else [0, 0, 0, 1])
    for name, x in given.items():
        check_rows(layers[f"in_proj.{name}"], x)
    expected = attended(attention, query, key, value)
    check_rows(layers["out_proj"], expected)
    rows = query.double().numpy() @ layers["in_proj.query"].weight.astype(float)
    own = attention.in_proj_weight[:8] if attention.in_proj_weight is not None else attention.q_proj_weight
    np.testing.assert_allclose(rows, query.double().numpy() @ own.detach().double().numpy().T, rtol=1e-6)
    if attention.in_proj_bias is not None:
        np.testing.assert_array_equal(layers["in_proj.value"].bias, attention.in_proj_bias[16:].detach())


class Net(nn.Module):
    """A transformer that PyTorch would compute by its fused layers, with masks."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask):
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_transformer_layers_hide_nothing(tmp_path):
    model, x = Net().eval(), torch.randn(4, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2] * 2)
    outputs = []
    before = model(x, mask)
    layers, _, _ = captured(tmp_path, model, [(x, mask)], forward=lambda m, batch: outputs.append(m(*batch)))
    assert [name.removeprefix("encoder.layers.") for name in layers] == [
        *(
            f"{k}.{name}"
            for k in (0, 1)
            for name in [*(f"self_attn.{n}" for n in [*IN_PROJ, "out_proj"]), "linear1", "linear2"]
        ),
        "head",
    ]
    assert all(layer.gram.count == 20 for layer in layers.values())
    torch.testing.assert_close(outputs[0][~mask], before[~mask])
    torch.testing.assert_close(model(x, mask), before, equal_nan=True)


def test_a_compiled_transformer_hides_nothing(tmp_path):
    model, x = Net().eval(), torch.randn(4, 5, 8)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    layers, _, _ = captured(tmp_path, torch.compile(model, backend="eager"), [(x, mask)])
    assert len(layers) == 2 * 6 + 1
    assert all(layer.gram.count == 20 for layer in layers.values())


def test_what_attends_to_one_memory_shares_its_gram(tmp_path):
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)
    _, grams, _ = captured(tmp_path, model, [(torch.randn(2, 3, 8), torch.randn(2, 4, 8))])
    assert len({grams[f"layers.{k}.multihead_attn.in_proj.{name}"] for k in (0, 1) for name in ("key", "value")}) == 1
    assert grams["layers.0.multihead_attn.in_proj.query"] != grams["layers.0.multihead_attn.in_proj.key"]


def test_select_gets_texts_as_the_module_has_them(tmp_path):
    x, keep = torch.randn(4, 3, 8), torch.tensor([True, False, True, True])
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layers, _, _ = captured(tmp_path, attention, [(x, x, x)], select=lambda x, _: x[keep])
    check_rows(layers["in_proj.key"], x[keep])
    check_rows(layers["out_proj"], attended(attention, x, x, x)[keep.numpy()])


# What is not quantized


class OwnForward(nn.Conv2d):
    def forward(self, input):  # noqa: A002
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class Scaled(nn.Embedding):
    def forward(self, input):  # noqa: A002
        return 2 * super().forward(input)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def integers():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


SKIPPED = [
    (nn.LSTM(2, 2), {"x": "recurrent layers are not supported."}),
    (nn.GRUCell(2, 2), {"x": "recurrent layers are not supported."}),
    (nn.Bilinear(2, 2, 2), {"x": "bilinear layers are not supported."}),
    (nn.EmbeddingBag(2, 2), {"x": "bags of embeddings are not supported."}),
    (nn.Embedding(2, 2, max_norm=1.0), {"x": "its weight changes as it runs, because of `max_norm`."}),
    (OwnForward(2, 2, 2), {"x": "its type 'OwnForward' has a forward of its own."}),
    (parametrizations.weight_norm(nn.Linear(2, 2)), {"x": "its weight is no parameter but computed."}),
    (Custom(), {"x": "its type 'Custom' is not known."}),
    (integers(), {"x": "its weight must hold float numbers, has dtype torch.int8 and shape (2, 2)."}),
    *((module, {}) for module in (nn.LayerNorm((2, 2)), nn.BatchNorm1d(2), nn.PReLU(), nn.GroupNorm(1, 2), nn.ReLU())),
]


@pytest.mark.parametrize(("module", "reasons"), SKIPPED, ids=lambda x: type(x).__name__)
def test_what_is_skipped_is_in_the_file_with_the_reason(tmp_path, module, reasons):
    model = nn.ModuleDict({"x": module, "fc": nn.Linear(2, 2)})
    layers, _, skipped = captured(tmp_path, model, [torch.ones(2, 2)], forward=fc)
    assert (list(layers), skipped) == (["fc"], reasons)
    if reasons:
        assert captured(tmp_path, model, [torch.ones(2, 2)], "fc", forward=fc)[2] == {}


def test_what_has_the_weight_of_a_layer_does_not_stay_float(tmp_path):
    model = nn.ModuleDict({"table": Scaled(2, 2), "again": Scaled(2, 2), "fc": nn.Linear(2, 2)})
    model["table"].weight = model["fc"].weight
    model["twice"] = model["again"]
    assert captured(tmp_path, model, [torch.ones(2, 2)], forward=fc)[2] == {
        "again": "its type 'Scaled' has a forward of its own."
    }


def test_attention_with_a_forward_of_its_own_keeps_its_inputs_float(tmp_path):
    attention, x = OwnAttention(8, 2, batch_first=True), torch.randn(3, 4, 8)
    layers, _, skipped = captured(tmp_path, attention, [x])
    assert skipped == {"in_proj": "its type 'OwnAttention' has a forward of its own."}
    check_rows(layers["out_proj"], attended(attention, x, x, x))


def fc(model, x):
    return model["fc"](x)


# The way back


def all_kinds():
    """A layer of each kind, what it is called with, and the shape of its codes."""
    kinds = {
        "linear": (nn.Linear(6, 4), (torch.randn(30, 6),), (6, 4)),
        "embedding": (nn.Embedding(9, 4), (torch.randint(9, (30, 3)),), (9, 4)),
        "gru": (nn.GRU(3, 2), (torch.randn(4, 3, 3),), None),
    }
    for axes, groups in itertools.product((1, 2, 3), GROUPS):
        x = torch.randn(6, 4, *(7, 5, 4)[:axes])
        m = 4 // groups * np.prod(KERNEL[axes])
        shape = (m, 8 // groups) if groups == 1 else (groups, m, 8 // groups)
        options = {"padding": 1, "stride": 2, "groups": groups}
        mode = ("reflect", "zeros", "circular")[axes - 1]
        kinds[f"conv{axes}d_{groups}"] = CONV[axes](4, 8, KERNEL[axes], **options, padding_mode=mode), (x,), shape
        transposed = TRANSPOSED[axes](4, 8, KERNEL[axes], **options, output_padding=1)
        kinds[f"transposed{axes}d_{groups}"] = transposed, (x,), shape
    return kinds


def run_all(model, batches):
    return {name: layer(*batches[name]) for name, layer in model.items()}


@pytest.mark.parametrize("options", [{"group_size": 3}, {"group_size": "tensor", "fit_bias": False}])
def test_every_kind_becomes_what_its_codes_stand_for_packed_or_not(tmp_path, options):
    kinds = all_kinds()
    model = nn.ModuleDict({name: layer for name, (layer, _, _) in kinds.items()}).eval()
    batches = {name: given for name, (_, given, _) in kinds.items()}
    captured(tmp_path, model, [batches], forward=run_all)
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", 3, recipe="rtn", **options)
    plain, packed = (
        comq_torch.apply(copy.deepcopy(model), tmp_path / "quantized.h5", packed=packed) for packed in (False, True)
    )
    with comq_np.QuantizedFile(tmp_path / "quantized.h5") as file:
        assert {name: file[name].codes.shape for name in file} == {
            name: shape for name, (_, _, shape) in kinds.items() if shape
        }
        assert list(file.skipped) == ["gru"]
        assert all(np.array_equal(packed[name].dequantize(), file[name].dequantize()) for name in file)
    comq_torch.capture(plain, [batches], tmp_path / "again.h5", forward=run_all)
    with (
        comq_np.CalibrationFile(tmp_path / "again.h5") as again,
        comq_np.QuantizedFile(tmp_path / "quantized.h5") as file,
    ):
        for name, q in file.items():
            np.testing.assert_array_equal(again[name].weight, q.dequantize())
    found, expected, before = (run_all(one, batches) for one in (packed, plain, model))
    for name in batches:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(before[name][0], expected[name][0]) == (name == "gru")
    repr(packed)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5, "bias": False}])
def test_attention_computes_with_what_the_codes_stand_for(tmp_path, options):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
    given = tuple(torch.randn(40, 3, size) for size in (8, attention.kdim, attention.vdim))
    expected = copy.deepcopy(attention)
    captured(tmp_path, attention, [given])
    comq_np.quantize_file(tmp_path / "calibration.h5", tmp_path / "quantized.h5", 3)
    comq_torch.apply(attention, tmp_path / "quantized.h5")
    with comq_np.QuantizedFile(tmp_path / "quantized.h5") as file, torch.no_grad():
        for k, name in enumerate(("query", "key", "value")):
            q = file[f"in_proj.{name}"]
            own = expected.in_proj_weight
            weight = getattr(expected, f"{name[0]}_proj_weight") if own is None else own[8 * k : 8 * k + 8]
            weight.copy_(torch.from_numpy(q.dequantize().T))
            if q.bias_shift is not None:
                expected.in_proj_bias[8 * k : 8 * k + 8] += torch.from_numpy(q.bias_shift)
        expected.out_proj.weight.copy_(torch.from_numpy(file["out_proj"].dequantize().T))
        if expected.out_proj.bias is not None:
            expected.out_proj.bias += torch.from_numpy(file["out_proj"].bias_shift)
    torch.testing.assert_close(attention(*given)[0], expected(*given)[0], rtol=0, atol=0)
    message = r"^layer 'in_proj.query': must be a module of its own to be packed, is a part of 'MultiheadAttention'\.$"
    with pytest.raises(comq_np.InputError, match=message):
        comq_torch.apply(attention, tmp_path / "quantized.h5", packed=True)
    model = nn.ModuleDict({"attention": attention})
    with pytest.raises(comq_np.InputError, match=message.replace("in_proj", "attention.in_proj")):
        comq_torch.quantize(model, [given], packed=True, forward=pytest.fail)


def test_a_packed_table_is_decoded_where_it_is_looked_up(tmp_path):
    model, x = nn.Embedding(100, 8), torch.randint(100, (50, 4))
    comq_torch_file = tmp_path / "quantized.h5"
    captured(tmp_path, model, [x])
    comq_np.quantize_file(tmp_path / "calibration.h5", comq_torch_file, 5)
    packed = comq_torch.apply(model, comq_torch_file, packed=True)
    assert torch.equal(packed(x), packed.weight[x])
    assert packed.half()(x).dtype == torch.float16


def test_names_of_another_model(tmp_path):
    model, other = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)}), nn.ModuleDict({"b": nn.Linear(4, 3)})
    captured(tmp_path, model, [torch.randn(20, 4)], ["a"], forward=lambda m, x: m["a"](x))
    path = tmp_path / "quantized.h5"
    comq_np.quantize_file(tmp_path / "calibration.h5", path)
    comq_torch.apply(model, path)
    comq_torch.apply(other, path, names={"a": "b"})
    assert torch.equal(other["b"].weight, model["a"].weight)
    for names, message in (
        ({}, "layer 'a': must be a layer of the model, to take codes of shape (4, 3)."),
        ({"a": "c"}, "layer 'a': must be layer 'c' of the model, to take codes of shape (4, 3)."),
        ({"c": "a"}, "`names` must map names of layers in the file, got 'c', which it lacks."),
    ):
        with pytest.raises(comq_np.InputError) as caught:
            comq_torch.apply(other, path, names=names)
        assert str(caught.value) == message
