"""Inputs of PyTorch's layers on their grids: what computes with them is what integers would, times the scales."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import comq_np
import comq_torch
from comq_np import adapter


class Everything(nn.Module):
    """A layer of each kind that can be quantized."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(20, 8), nn.Linear(8, 12)
        self.conv = nn.Conv2d(1, 6, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(6, 2, 3, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=12, vdim=12)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        x = self.table(tokens)
        wide = F.gelu(self.linear(x))
        x = self.encoder(x + self.attention(query=x, key=wide, value=wide, need_weights=False)[0])
        return self.transposed(F.relu(self.grouped(F.relu(self.conv(x[:, None])))))


LAYERS = ["linear", "conv", "grouped", "transposed", *(f"attention.in_proj.{x}" for x in ("query", "key", "value"))]
LAYERS += ["attention.out_proj", *(f"encoder.self_attn.in_proj.{x}" for x in ("query", "key", "value"))]
LAYERS += ["encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"]


@pytest.fixture(scope="module")
def everything():
    torch.manual_seed(0)
    model = Everything().eval()
    batches = [torch.randint(0, 20, (6, 10)) for _ in range(4)]
    return model, batches


@pytest.fixture(scope="module")
def files(everything, tmp_path_factory):
    """Calibration file of 8-bit inputs, and the quantized one."""
    folder = tmp_path_factory.mktemp("files")
    model, batches = everything
    comq_torch.capture(model, batches, folder / "calibration.h5", activation_bits=8)
    comq_np.quantize_file(folder / "calibration.h5", folder / "quantized.h5", 8, recipe="fast")
    return folder / "calibration.h5", folder / "quantized.h5"


def read(path):
    with comq_np.QuantizedFile(path) as file:
        return dict(file)


def seen(model, batch):
    """Rows that each layer gets in one batch."""
    found, wrapped = {}, comq_torch.model.TorchModel(model)

    def observe(layer, x, *extra):
        rows = [np.array(part).reshape(-1, *part.shape[1:]) for part in layer.rows(x, *extra)]
        found.setdefault(layer.name, []).append(np.concatenate(rows))

    with wrapped.evaluating():
        wrapped.run(batch, observe, ())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_grids_products_and_means_are_those_of_the_inputs(everything, files):
    model, batches = everything
    with comq_np.CalibrationFile(files[0]) as file:
        layers = dict(file)
    assert [name for name, layer in layers.items() if isinstance(layer.gram, comq_np.CrossGram)] == LAYERS
    assert {layer.gram.grid.bits for name, layer in layers.items() if name in LAYERS} == {8}
    rows = [seen(model, batch) for batch in batches]
    for name in LAYERS:
        X, gram = np.concatenate([parts[name] for parts in rows]), layers[name].gram
        X = X.reshape(-1, *gram.mean.shape)
        histogram = comq_np.Histogram()
        histogram.update(X)
        assert gram.grid == comq_np.activation_grid(histogram, 8)
        Xq = gram.grid.quantize(X).astype(float)
        expected = np.einsum("k...i,k...j->...ij", Xq, X.astype(float))
        np.testing.assert_allclose(gram.cross.sum(axis=0), expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
        np.testing.assert_allclose(gram.mean, Xq.mean(axis=0), atol=1e-5)
    same = [layers[f"encoder.self_attn.in_proj.{which}"].gram for which in ("query", "key", "value")]
    assert same[0] is same[1] is same[2]


def applied(everything, path, **options):
    return comq_torch.apply(copy.deepcopy(everything[0]), path, **options)


def test_linear_layers_compute_what_integers_would(everything, files):
    model, found = applied(everything, files[1]), read(files[1])
    x = torch.randn(50, 8)
    with torch.no_grad():
        got = model.linear(x).double().numpy()
    q = found["linear"]
    inputs = q.activation.encode(x.numpy()).astype(np.int64) - q.activation.zero_point
    sums = inputs @ (q.codes.astype(np.int64) - q.zero_point)
    scale = float(q.activation.scale) * q.scale.astype(np.float64)
    bias = everything[0].linear.bias.detach().double().numpy() + q.bias_shift
    np.testing.assert_allclose(got, sums * scale + bias, rtol=0, atol=2e-6 * np.abs(got).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_of_codes_are_exact(bits):
    """With scales that are powers of two, float32 rounds nothing: the very sums of integers."""
    rng = np.random.default_rng(0)
    m, levels = 300, 2**bits
    codes, zero = rng.integers(0, levels, (m, 5)).astype(np.uint8), rng.integers(0, levels, (1, 5)).astype(np.int32)
    grid = comq_np.ActivationGrid(0.25, 3, bits)
    report = comq_np.solve([1.0], [[1.0]]).report
    q = comq_np.QuantizedArray(codes, np.full((1, 5), 0.5, np.float32), zero, bits, levels, None, None, report, grid)
    layer, x = nn.Linear(m, 5, bias=False), torch.randn(40, m)
    comq_torch.layers.find(layer)[0][0].write(q.dequantize(), None, q)
    sums = (grid.encode(x.numpy()).astype(np.int64) - 3) @ (codes.astype(np.int64) - zero)
    with torch.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), sums * 0.125)


def test_every_kind_of_layer_gets_its_inputs_on_its_grid(everything, files):
    """The model with quantizers is the one that quantizes in its forward, written out."""
    model, q = applied(everything, files[1]), read(files[1])
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._modules.pop("input_quantizer", None)
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()

    def on(name, x):
        return torch.from_numpy(q[name].activation.quantize(x.numpy()))

    def attend(name, attention, query, key, value, width):
        rows = [on(f"{name}.in_proj.{which}", x) for which, x in (("query", query), ("key", key), ("value", value))]
        if attention.in_proj_weight is None:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        else:
            weights = attention.in_proj_weight.chunk(3)
        parts = [F.linear(x, W, b) for x, W, b in zip(rows, weights, attention.in_proj_bias.chunk(3), strict=True)]
        heads = [x.unflatten(-1, (2, width // 2)).transpose(1, 2) for x in parts]
        mixed = torch.softmax(heads[0] @ heads[1].mT / np.sqrt(width // 2), -1) @ heads[2]
        out = attention.out_proj
        return F.linear(on(f"{name}.out_proj", mixed.transpose(1, 2).flatten(-2)), out.weight, out.bias)

    tokens = torch.randint(0, 20, (3, 10))
    with torch.no_grad():
        x = plain.table(tokens)
        wide = F.gelu(plain.linear(on("linear", x)))
        x = x + attend("attention", plain.attention, x, wide, wide, 8)
        layer = plain.encoder
        x = layer.norm1(x + attend("encoder.self_attn", layer.self_attn, x, x, x, 8))
        hidden = F.relu(layer.linear1(on("encoder.linear1", x)))
        x = layer.norm2(x + layer.linear2(on("encoder.linear2", hidden)))
        x = F.relu(plain.conv(on("conv", x[:, None])))
        expected = plain.transposed(on("transposed", F.relu(plain.grouped(on("grouped", x)))))
        found = model(tokens)
    # A value at the border of two codes may fall on either side.
    assert float((found - expected).abs().median()) < 1e-6 * float(expected.abs().max())
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    with torch.no_grad():
        assert float((plain(tokens) - expected).abs().median()) > 1e-5 * float(expected.abs().max())


def outputs(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(0, 20, (3, 10)))


def test_quantizers_go_where_the_model_goes(everything, files):
    model = applied(everything, files[1])
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert not torch.equal(outputs(everything[0]), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(outputs(torch.load(file, weights_only=False)), expected)
    other = applied(everything, files[1])
    for module in other.modules():
        if isinstance(module, comq_torch.activations.InputQuantizer):
            module.scale.fill_(9.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), expected)
    assert len([name for name in model.state_dict() if name.endswith("input_quantizer.scale")]) == 8
    halves = copy.deepcopy(model).double().half().float()
    names = [name for name in model.state_dict() if "input_quantizer" in name]
    assert all(torch.equal(halves.state_dict()[name], model.state_dict()[name]) for name in names)
    assert model.half().linear(torch.randn(2, 8).half()).dtype == torch.float16


def test_packed_modules_compute_the_same(everything, files, tmp_path):
    model, path = applied(everything, files[1]), tmp_path / "some.h5"
    with comq_np.QuantizedWriter(path) as file:
        for name, q in read(files[1]).items():
            if ".in_proj" not in name:
                file.add(name, q)
    assert torch.equal(outputs(applied(everything, path, packed=True)), outputs(applied(everything, path)))
    assert not torch.equal(outputs(applied(everything, path)), outputs(model))


def test_a_second_apply_replaces_the_first(everything, files, tmp_path):
    model, bare = applied(everything, files[1]), tmp_path / "bare.h5"
    with comq_np.QuantizedWriter(bare) as file:
        for name, q in read(files[1]).items():
            file.add(name, comq_np.QuantizedArray(*(getattr(q, key) for key in ARRAYS), None, q.report))
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    before = applied(everything, bare)
    comq_torch.apply(before, files[1])
    assert [len(one._forward_pre_hooks) + len(one._forward_hooks) for one in before.modules()][: len(hooks)] == hooks
    comq_torch.apply(model, bare)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("input_quantizer" in name for name in model.state_dict())


ARRAYS = ("codes", "scale", "zero_point", "bits", "levels", "group_size")


def test_an_error_in_attention_leaves_no_mode_behind(everything, files):
    model = applied(everything, files[1])
    expected = outputs(model)
    with pytest.raises(AssertionError, match="embedding dimension"):
        model.encoder(torch.randn(2, 3, 5))
    with pytest.raises(AssertionError, match="sequence"):
        model.attention(torch.randn(2, 3, 8), torch.randn(2, 4, 12), torch.randn(2, 5, 12))
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(outputs(model), expected)


def test_a_model_with_quantizers_is_captured_as_any_other(everything, files, tmp_path):
    model = applied(everything, files[1])
    comq_torch.capture(model, everything[1], tmp_path / "again.h5")
    with comq_np.CalibrationFile(tmp_path / "again.h5") as file:
        assert set(file) >= {*LAYERS}
        assert not any(isinstance(layer.gram, comq_np.CrossGram) for layer in file.values())


@pytest.fixture
def chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    mixing = torch.randn(24, 24)
    return model, [torch.randn(48, 24) @ mixing for _ in range(12)], torch.randn(1000, 24) @ mixing


def error(model, changed, x):
    with torch.no_grad():
        return float((changed(x) - model(x)).square().mean())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_solved_grids_beat_the_range_and_weights_make_up_for_inputs(chain, bits, sequential):
    model, batches, others = chain
    errors = []
    for options in ({"activation_bits": bits}, {"activation_bits": bits, "activation_options": {"recipe": "minmax"}}):
        changed = copy.deepcopy(model)
        comq_torch.quantize(changed, batches, 4, sequential=sequential, **options)
        errors.append(error(model, changed, others))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("fit_bias", [False, True])
def test_in_sequence_each_layer_is_solved_for_what_it_gets(chain, fit_bias):
    """Grid, Gram and products by the equations, of the model that came out, whose first layers are those of then."""
    model, batches, _ = chain
    changed = copy.deepcopy(model)
    comq_torch.quantize(changed, batches, 4, sequential=True, activation_bits=4, fit_bias=fit_bias, recipe="fast")
    for number in (0, 2, 4):
        with torch.no_grad():
            own = [changed[:number](x).numpy() for x in batches]
            exact = [model[:number](x).numpy() for x in batches]
        histogram = comq_np.Histogram()
        histogram.update(np.concatenate(own))
        grid, child = comq_np.activation_grid(histogram, 4), changed[number].input_quantizer
        assert (child.scale.item(), child.zero_point.item(), child.levels.item()) == (grid.scale, grid.zero_point, 16)
        W, bias = (value.detach().double().numpy() for value in (model[number].weight.T, model[number].bias))
        gram = comq_np.CrossGram(len(W), grid=grid)
        for x, y in zip(own, exact, strict=True):
            gram.update(x, exact=y)
        expected = comq_np.solve(W, gram, 4, fit_bias=fit_bias, recipe="fast")
        Xq, wanted = grid.quantize(np.concatenate(own)).astype(float), np.concatenate(exact) @ W + bias
        of_expected = Xq @ expected.dequantize() + bias + (expected.bias_shift if fit_bias else 0)
        with torch.no_grad():
            found = np.concatenate([changed[number](torch.from_numpy(x)).double().numpy() for x in own])
        assert np.square(found - wanted).sum() == pytest.approx(np.square(of_expected - wanted).sum(), rel=0.01)
        if fit_bias:
            np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), atol=1e-4)


def test_in_sequence_all_kinds_of_layers(everything):
    model, batches = everything
    changed = copy.deepcopy(model)
    reports = comq_torch.quantize(changed, batches, 8, sequential=True, activation_bits=8, recipe="fast")
    assert set(reports) == {"table", *LAYERS}
    assert len([name for name in changed.state_dict() if name.endswith("input_quantizer.scale")]) == 8
    expected = outputs(model)
    assert (outputs(changed) - expected).square().mean() < 0.02 * expected.square().mean()


def test_in_sequence_what_waits_at_a_layer_gets_its_grid(chain):
    """Batches that waited at a layer go on with inputs on the grid that it has got meanwhile."""
    model, batches, _ = chain
    changed, inputs = copy.deepcopy(model), []

    class Spy(nn.Module):
        def forward(self, x):
            inputs.append(x.clone())
            return x

    spied = nn.Sequential(*changed[:1], Spy(), *changed[1:])
    comq_torch.quantize(spied, batches, 4, sequential=True, activation_bits=2)
    with torch.no_grad():
        expected = torch.cat([changed[0](x) for x in batches])
    half = [x for x in inputs if any(torch.equal(x, row) for row in expected.split(48))]
    assert len(half) == len(batches)


@pytest.mark.parametrize("memory", [None, 34000, "1.9 MB"])
def test_several_passes_make_the_same_file(chain, tmp_path, memory):
    model, batches, _ = chain
    comq_torch.capture(model, batches, tmp_path / "one.h5", activation_bits={"*": 8, "2": 4})
    if memory == 34000:
        with pytest.raises(comq_np.InputError, match="`memory` must be at least 1048576 bytes for the histograms"):
            comq_torch.capture(model, batches, tmp_path / "two.h5", activation_bits=8, memory=memory)
        return
    comq_torch.capture(model, batches, tmp_path / "two.h5", activation_bits={"*": 8, "2": 4}, memory=memory)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    with comq_np.CalibrationFile(tmp_path / "two.h5") as file:
        assert [row["activation_bits"] for row in file.describe()] == [8, 4, 8]


def test_only_layers_that_match_have_inputs_on_grids(chain):
    model, batches, _ = chain
    changed = copy.deepcopy(model)
    comq_torch.quantize(changed, batches, 4, activation_bits={"4": 8})
    assert [name for name, module in changed.named_modules() if hasattr(module, "input_quantizer")] == ["4"]


def test_an_interrupted_capture_goes_on_with_the_same_bits_only(tmp_path):
    path, options = tmp_path / "file.h5", {"memory": "8.3 MB"}

    class Stops(list):
        passes, stop = 0, 3  # behind the pass for histograms and that for the first Gram

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                self.passes += number == 0
                if (self.passes, number) == (self.stop, 1):
                    raise KeyboardInterrupt
                yield batch

    wide = nn.Sequential(nn.Linear(150, 160), nn.ReLU(), nn.Linear(160, 150)).eval()
    batches = Stops([torch.randn(20, 150) for _ in range(3)])
    with pytest.raises(KeyboardInterrupt):
        comq_torch.capture(wide, batches, path, activation_bits=8, **options)
    with pytest.raises(comq_np.FileError, match="`activation_bits`"):
        comq_torch.capture(wide, [*batches], path, activation_bits=4, **options)
    comq_torch.capture(wide, batches, path, activation_bits=8, **options)
    comq_torch.capture(wide, [*batches], tmp_path / "whole.h5", activation_bits=8)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 1}, "`activation_bits` must be an integer from 2 to 8, got 1"),
        ({"activation_bits": {"*": 9}}, r"`activation_bits\['\*'\]` must be an integer from 2 to 8, got 9"),
        ({"activation_bits": {"x": 8}}, "`activation_bits` must hold names of layers or patterns .* got 'x'"),
        ({"activation_bits": {}}, "`activation_bits` must map names or patterns of layers to integers, got {}"),
        ({"activation_options": {}}, "`activation_options` must be None without `activation_bits`, got {}"),
        ({"activation_bits": 8, "activation_options": 1}, "`activation_options` must be a mapping of options"),
        ({"activation_bits": 8, "activation_options": {"a": 1}}, "`activation_options` must be options of .* 'a'"),
        ({"activation_bits": 8, "activation_options": {"recipe": "x"}}, "`activation_options` must be .*'minmax'"),
    ],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_wrong_options_are_refused_before_the_model_runs(chain, options, message, sequential):
    model, _, _ = chain
    with pytest.raises(comq_np.InputError, match=message):
        comq_torch.quantize(model, [None], 4, sequential=sequential, **options)


def test_batches_are_gone_through_twice(chain, tmp_path):
    model, batches, _ = chain
    with pytest.raises(
        comq_np.InputError, match="to be gone through twice with `activation_bits`, got 'list_iterator'"
    ):
        comq_torch.capture(model, iter(batches), tmp_path / "file.h5", activation_bits=8)
    batches[3][0, 0] = torch.nan
    with pytest.raises(comq_np.InputError, match="layer '0', batch 3: `X` must be finite"):
        comq_torch.capture(model, batches, tmp_path / "file.h5", activation_bits=8)


def test_named_groups_of_batches_have_float_inputs(chain, tmp_path):
    model, batches, _ = chain
    with pytest.raises(comq_np.InputError, match="`batches` must have no named groups with `activation_bits`"):
        comq_torch.capture(model, {"a": batches[:2], "b": batches[2:]}, tmp_path / "file.h5", activation_bits=8)


def test_an_adapter_that_does_not_say_it_can_is_refused(chain, tmp_path):
    model, batches, _ = chain
    comq_torch.capture(model, batches, tmp_path / "c.h5", activation_bits=8)
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 4, recipe="fast")
    found = comq_torch.model.TorchModel(model)
    for layer in found.layers:
        layer.quantizes_inputs = False
    with pytest.raises(comq_np.InputError, match="layer '0': must have float inputs"):
        adapter.apply(found, tmp_path / "q.h5")
    for quantize in (adapter.quantize, adapter.quantize_in_sequence):
        with pytest.raises(comq_np.InputError, match="layer '0': must have float inputs"):
            quantize(found, batches, 4, activation_bits=8)
