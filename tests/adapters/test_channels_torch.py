"""A scale for each channel of the inputs of PyTorch's layers, absorbed by their weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import comq_np
import comq_torch

CHANNEL = {"axis": "channel"}
RANGES = torch.tensor([0.05, 1.0, 4.0, 20.0])


class Net(nn.Module):
    """A layer of each kind, on channels of very different ranges that count alike."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.transposed, self.fc = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.Linear(4, 8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)
        with torch.no_grad():
            self.conv.weight /= RANGES[:, None, None]

    def forward(self, x):
        x = self.transposed(F.relu(self.grouped(F.gelu(self.conv(x)))))
        x = F.gelu(self.fc(x.flatten(2).transpose(1, 2)))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


LAYERS = ["conv", "grouped", "transposed", "fc", *(f"attention.in_proj.{x}" for x in ("query", "key", "value"))]
LAYERS += ["attention.out_proj", "head"]


def images(count):
    return torch.randn(count, 4, 4, 5) * RANGES[:, None, None]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval(), [images(8) for _ in range(4)], images(40)


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    options = {"activation_bits": 8, "activation_options": CHANNEL}
    comq_torch.capture(net[0], net[1], folder / "calibration.h5", **options)
    comq_np.quantize_file(folder / "calibration.h5", folder / "quantized.h5", 8, recipe="fast")
    return folder / "calibration.h5", folder / "quantized.h5"


def solutions(path):
    with comq_np.QuantizedFile(path) as file:
        return dict(file)


def error(model, changed, x):
    with torch.no_grad():
        expected = model(x)
        return float((changed(x) - expected).square().sum() / expected.square().sum())


def test_layers_have_channels_and_files_verify(files):
    found = solutions(files[1])
    assert [(name, q.activation.channels) for name, q in found.items()] == list(
        zip(LAYERS, (4, 6, 6, 4, 8, 8, 8, 8, 8), strict=True)
    )
    assert all(one.matches for one in comq_np.verify_file(*files))


def test_the_grid_of_an_image_is_that_of_its_channels(net, files):
    histogram = comq_np.ChannelHistogram(4)
    for batch in net[1]:
        histogram.update(batch.permute(0, 2, 3, 1).reshape(-1, 4).numpy())
    grid = solutions(files[1])["conv"].activation
    np.testing.assert_allclose(grid.scale, comq_np.channel_grid(histogram, 8).scale, rtol=0.03)


@pytest.mark.parametrize("packed", [False, True])
def test_modules_compute_with_the_steps_and_zero_stays_zero(net, files, packed, tmp_path):
    """The convolution by hand, of integers in float64, with zeros around them; a linear layer likewise."""
    path, found = tmp_path / "some.h5", solutions(files[1])
    with comq_np.QuantizedWriter(path) as file:
        for name in ("conv", "grouped", "fc"):
            file.add(name, found[name])
    model = comq_torch.apply(copy.deepcopy(net[0]), path, packed=packed)
    for name, x in (("conv", images(3)), ("grouped", torch.randn(3, 6, 4, 5)), ("fc", torch.randn(7, 4))):
        q, module = found[name], getattr(model, name)
        steps = torch.from_numpy(q.activation.steps(x.numpy(), axis=1)).double()
        W = torch.from_numpy(q.dequantize()).double()
        bias = getattr(net[0], name).bias.double() + torch.from_numpy(q.bias_shift).double().reshape(-1)
        if name == "fc":
            expected = steps @ W + bias
        else:
            kernel = W.mT.reshape(getattr(net[0], name).weight.shape)
            expected = F.conv2d(steps, kernel, bias, padding=1, groups=3 if name == "grouped" else 1)
        with torch.no_grad():
            assert torch.allclose(module(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("sequential", [False, True])
def test_the_error_is_far_less_than_with_one_scale(net, sequential):
    model, batches, others = net
    errors = []
    for options in (None, CHANNEL):
        changed = copy.deepcopy(model)
        chosen = {"activation_bits": 4, "activation_options": options, "sequential": sequential}
        reports = comq_torch.quantize(changed, batches, 8, layers=["conv", "fc"], **chosen)
        assert list(reports) == ["conv", "fc"]
        errors.append(error(model, changed, others))
    assert errors[1] < 0.3 * errors[0]


def test_in_sequence_all_layers_are_close(net):
    model, batches, others = net
    changed = copy.deepcopy(model)
    options = {"sequential": True, "activation_bits": 8, "activation_options": CHANNEL}
    assert set(comq_torch.quantize(changed, batches, 8, recipe="fast", **options)) == {*LAYERS}
    assert error(model, changed, others) < 0.01


def test_packed_modules_get_their_grids_in_sequence():
    torch.manual_seed(0)
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    model = torch.nn.Sequential(linear(16, 24), relu(), linear(24, 24), relu(), linear(24, 5))
    batches, others = [torch.randn(64, 16) for _ in range(4)], torch.randn(50, 16)
    outputs = []
    for packed in (False, True):
        changed = copy.deepcopy(model)
        options = {"sequential": True, "activation_bits": 8, "activation_options": CHANNEL}
        comq_torch.quantize(changed, batches, 8, packed=packed, **options)
        outputs.append(changed(others).detach())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_all_layers_at_once_are_close_and_go_where_the_model_goes(net, files):
    model, _, others = net
    changed = comq_torch.apply(copy.deepcopy(model), files[1])
    assert error(model, changed, others) < 0.01
    loaded = comq_torch.apply(copy.deepcopy(model), files[1])
    for name, buffer in loaded.named_buffers():
        if name.endswith("input_quantizer.scale"):
            buffer.fill_(3.0)
    loaded.load_state_dict(changed.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(others), changed(others))
        assert torch.equal(copy.deepcopy(changed)(others), changed(others))


def test_a_model_that_absorbed_scales_is_not_captured_again(net, files, tmp_path):
    changed = comq_torch.apply(copy.deepcopy(net[0]), files[1])
    for layer in ("conv", "attention.in_proj.key", "attention.out_proj"):
        with pytest.raises(comq_np.InputError, match=f"layer '{layer}': must have weights of its float inputs"):
            comq_torch.capture(changed, net[1], tmp_path / "file.h5", layers=[layer])
    comq_torch.apply(changed, files[1])


def test_others_see_their_inputs_behind_grids_of_channels(net, files, tmp_path):
    """Layers that run under hooks compute as they do without: codes are taken once."""
    path, found = tmp_path / "some.h5", solutions(files[1])
    with comq_np.QuantizedWriter(path) as file:
        for name in LAYERS[:-1]:
            file.add(name, found[name])
    changed = comq_torch.apply(copy.deepcopy(net[0]), path)
    rows, hook = [], changed.head.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in net[1]:
            changed(batch)
    hook.remove()
    comq_torch.capture(changed, net[1], tmp_path / "head.h5", layers=["head"])
    with comq_np.CalibrationFile(tmp_path / "head.h5") as file:
        got = file["head"].gram.mean
    np.testing.assert_allclose(got, torch.cat(rows).double().mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_a_table_in_common_keeps_one_scale_for_all(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)).eval()
    model[2].weight = model[0].weight
    batches = [torch.randint(0, 12, (40,)) for _ in range(2)]
    comq_torch.capture(model, batches, tmp_path / "c.h5", activation_bits=8, activation_options=CHANNEL)
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        grids = {name: type(layer.gram.grid) for name, layer in file.items()}
    assert grids == {"1": comq_np.ChannelGrid, "2": comq_np.ActivationGrid}
    apart = copy.deepcopy(model)
    apart[2].weight = nn.Parameter(model[2].weight.detach().clone())
    comq_torch.capture(apart, batches, tmp_path / "c.h5", activation_bits=8, activation_options=CHANNEL)
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 8, recipe="fast")
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file, comq_np.QuantizedWriter(tmp_path / "some.h5") as some:
        some.add("2", file["2"])
    with pytest.raises(comq_np.InputError, match=r"layer '2': must have a weight of 8 channels .* something else uses"):
        comq_torch.apply(model, tmp_path / "some.h5")


@pytest.mark.parametrize("memory", [None, "1.5 MB"])
def test_several_passes_make_the_same_file_and_histograms_must_fit(net, files, tmp_path, memory):
    options = {"activation_bits": 8, "activation_options": CHANNEL}
    if memory is None:  # 60 channels, and the 8 of the largest histogram once more
        with pytest.raises(
            comq_np.InputError, match=f"`memory` must be at least {68 * 2**15} bytes for the histograms"
        ):
            comq_torch.capture(net[0], net[1], tmp_path / "file.h5", memory="1.5 MB", **options)
        return
    comq_torch.capture(net[0], net[1], tmp_path / "file.h5", memory="3 MB", **options)
    assert (tmp_path / "file.h5").read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axis": "row"},
            "`activation_options` must be options of .*`axis` must be one of 'tensor', 'channel', got 'row'",
        ),
        ({"axis": "channel", "recipe": "x"}, "`activation_options` must be .*'minmax'"),
    ],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_wrong_options_are_refused_before_the_model_runs(net, options, message, sequential):
    with pytest.raises(comq_np.InputError, match=message):
        comq_torch.quantize(net[0], [None], activation_bits=8, activation_options=options, sequential=sequential)


def test_where_no_layer_can_it_is_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(comq_np.InputError, match="`activation_options` must not have 'axis' 'channel' where no layer"):
        comq_torch.capture(model, [], tmp_path / "c.h5", activation_bits=8, activation_options=CHANNEL)
