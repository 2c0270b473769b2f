"""What an error of each layer does to a model's output: by hand, and as `allocate_bits` takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import comq_np
import comq_torch


class Two(nn.Module):
    """Two branches, of which one counts a hundred times as much."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x):
        return {"said": "nothing", "sum": (0.01 * self.small(x) + self.large(x), x)}


@pytest.fixture
def found(tmp_path):
    torch.manual_seed(0)
    model, batches = Two().double(), [torch.randn(40, 12).double() + 1 for _ in range(3)]
    calibration, quantized = tmp_path / "c.h5", tmp_path / "q.h5"
    comq_torch.capture(model, batches, calibration)
    comq_np.quantize_file(calibration, quantized, 2)
    return model, batches, calibration, quantized


def test_by_hand(found):
    model, batches, _, path = found
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = comq_torch.sensitivities(model, batches, path)
    X = torch.cat(batches).numpy()
    parts = {
        name: (factor, getattr(model, name).weight.detach().numpy().T, getattr(model, name).bias.detach().numpy())
        for name, factor in (("small", 0.01), ("large", 1.0))
    }
    Y = sum(factor * (X @ W + bias) for factor, W, bias in parts.values())
    with comq_np.QuantizedFile(path) as file:
        for name, (factor, W, _) in parts.items():
            change = factor * (X @ (file[name].dequantize() - W) + file[name].bias_shift)
            by_hand = np.square(change).sum() / np.square(Y).sum() / file.report(name).relative_error
            assert measured[name] == pytest.approx(by_hand, rel=1e-6)
    assert list(measured) == ["small", "large"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_counts_gets_the_bits(found):
    model, batches, calibration, path = found
    measured = comq_torch.sensitivities(model, batches, path)
    plan = comq_np.allocate_bits(calibration, 10, sensitivities=measured, recipe="fast")
    assert plan["large"] > plan["small"]
    other = comq_torch.sensitivities(model, batches, path, forward=lambda model, x: model.small(x))
    assert other["large"] == 0 < other["small"]


def test_refused(found, tmp_path):
    model, batches, _, path = found
    for batches_given, forward, message in (
        ([], None, "`batches` must hold at least one batch, got none."),
        (batches, lambda _, x: x.to(int), "`model` must return a tensor of floats, or what holds one"),
        (
            batches,
            lambda _, x: 0 * x,
            "`model` must have outputs that are finite and not all 0, got a sum of squares 0.",
        ),
    ):
        with pytest.raises(comq_np.InputError) as error:
            comq_torch.sensitivities(model, batches_given, path, forward=forward)
        assert str(error.value).startswith(message)
    with pytest.raises(comq_np.InputError, match=r"layer 'small': must be a layer of the model\."):
        comq_torch.sensitivities(model.large, batches, path)
    with comq_np.QuantizedWriter(tmp_path / "exact.h5") as file:
        file.add("large", comq_np.solve(np.ones((12, 5)), np.eye(12)))
    with pytest.raises(comq_np.InputError, match=r"layer 'large': must have a relative error in the file, has 0: take"):
        comq_torch.sensitivities(model, batches, tmp_path / "exact.h5")
