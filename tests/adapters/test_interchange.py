"""Files that one adapter captures and another applies: calibrated in PyTorch, run as ONNX, and the other way round."""

from __future__ import annotations

import copy
import logging
import warnings

import numpy as np
import pytest
import torch
from requirements import require
from torch import nn

import comq_np
import comq_torch

require("onnx")

import onnxruntime  # noqa: E402

import comq_onnx  # noqa: E402


class Net(nn.Module):
    """Layers of all kinds that the two have in common."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.grouped = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.up = nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1, groups=2)
        self.first, self.plain = nn.Linear(12, 16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.table(tokens).transpose(1, 2)
        x = self.up(self.depthwise(self.grouped(x).relu())).transpose(1, 2)
        return self.head(self.plain(self.first(x).relu()).mean(1))


class Wrapped(nn.Module):
    """The network as a part, so that its layers have other names."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, tokens):
        return self.net(tokens)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The network, and the path of it as an ONNX model."""
    torch.manual_seed(0)
    net, path = Net().eval(), tmp_path_factory.mktemp("exported") / "net.onnx"
    axes = {"tokens": {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Wrapped(net), (torch.zeros(2, 6, dtype=torch.int64),), dynamo=True, dynamic_shapes=axes, verbose=False
        ).save(path)
    logging.disable(logging.NOTSET)
    return net, path


TOKENS = np.random.default_rng(0).integers(0, 40, (24, 10))


def outputs(path):
    return onnxruntime.InferenceSession(path).run(None, {"tokens": TOKENS})[0]


@pytest.mark.parametrize("captured", ["torch", "onnx"])
@pytest.mark.parametrize("bits", [{"*": 4, "*table": 8}, 2])
def test_what_one_captures_the_other_applies(tmp_path, exported, captured, bits):
    net, path = exported
    net = copy.deepcopy(net)
    if captured == "torch":
        comq_torch.capture(net, [torch.from_numpy(TOKENS)], tmp_path / "c.h5")
    else:
        comq_onnx.capture(path, [TOKENS], tmp_path / "c.h5")
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", bits, fit_bias=True)
    names = {name: f"net.{name}" for name, _ in net.named_children()}
    if captured == "torch":
        comq_onnx.apply(path, tmp_path / "q.h5", tmp_path / "new.onnx", names=names)
        comq_torch.apply(net, tmp_path / "q.h5")
    else:
        comq_onnx.apply(path, tmp_path / "q.h5", tmp_path / "new.onnx")
        comq_torch.apply(net, tmp_path / "q.h5", names={old: new for new, old in names.items()})
    with torch.no_grad():
        wanted = net(torch.from_numpy(TOKENS)).numpy()
    np.testing.assert_allclose(outputs(tmp_path / "new.onnx"), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(wanted - outputs(path)).max() > 1e-4


def test_both_capture_the_same(tmp_path, exported):
    net, path = exported
    comq_torch.capture(net, [torch.from_numpy(TOKENS)], tmp_path / "torch.h5")
    comq_onnx.capture(path, [TOKENS], tmp_path / "onnx.h5")
    with (
        comq_np.CalibrationFile(tmp_path / "torch.h5") as ours,
        comq_np.CalibrationFile(tmp_path / "onnx.h5") as theirs,
    ):
        assert [f"net.{name}" for name in ours] == list(theirs)
        for name, layer in ours.items():
            other = theirs[f"net.{name}"]
            assert layer.kind == other.kind
            np.testing.assert_array_equal(layer.weight, other.weight)
            assert (layer.bias is None) == (other.bias is None)
            if layer.kind == "embedding":
                np.testing.assert_array_equal(layer.gram.counts, other.gram.counts)
            else:
                np.testing.assert_allclose(layer.gram.matrix, other.gram.matrix, rtol=1e-4, atol=1e-3)


def test_both_quantize_alike_in_sequence(tmp_path, exported):
    net, path = exported
    batches = [*np.random.default_rng(1).integers(0, 40, (6, 16, 10))]
    exact, errors = outputs(path), {}
    for sequential in (False, True):
        options = {"bits": {"*": 3, "*table": 8}, "fit_bias": True, "sequential": sequential}
        changed = copy.deepcopy(net)
        ours = comq_torch.quantize(changed, [torch.from_numpy(batch) for batch in batches], **options)
        theirs = comq_onnx.quantize(path, batches, output=tmp_path / "new.onnx", **options)
        assert [f"net.{name}" for name in ours] == list(theirs)
        with torch.no_grad():
            found = changed(torch.from_numpy(TOKENS)).numpy()
        errors[sequential] = [np.square(one - exact).mean() for one in (found, outputs(tmp_path / "new.onnx"))]
    # How single precision rounds decides between minima that are next to each other.
    np.testing.assert_allclose(errors[True][1], errors[True][0], rtol=0.2)
    assert max(errors[True]) < 0.9 * min(errors[False])
