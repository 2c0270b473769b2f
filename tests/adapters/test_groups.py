"""Named groups of batches through a model of two modalities: what balancing does for the small one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import comq_np
import comq_torch


class TwoModalities(nn.Module):
    """Images and texts come in by layers of their own, and share what follows."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.shared = nn.Linear(10, 24), nn.Embedding(50, 24), nn.Linear(24, 12)

    def forward(self, x):
        return self.shared(self.image(x) if x.is_floating_point() else self.text(x))


def batches_of(seed, images=10, texts=2):
    """Images are five times as many, and the layer after them sees them thirty times as large."""
    torch.manual_seed(seed)
    factors = torch.linspace(0.1, 2, 10) * 30
    return {
        "image": [torch.randn(32, 10) * factors for _ in range(images)],
        "text": [torch.randint(50, (4, 8)) for _ in range(texts)],
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TwoModalities()


def errors_of(changed, model, batches):
    """Relative error of the outputs of each modality, from their mean, where only the shared layer is quantized."""
    with torch.no_grad():
        found = {}
        for name, some in batches.items():
            exact, got = (torch.cat([one(x).reshape(-1, 12) for x in some]).double() for one in (model, changed))
            found[name] = float((got - exact).square().sum() / (exact - exact.mean(0)).square().sum())
    return found


def test_balancing_keeps_the_small_modality(model):
    batches, held_out = batches_of(1), batches_of(2, 20, 20)
    errors = {}
    for how, given in (("together", [*batches["image"], *batches["text"]]), ("balanced", batches)):
        changed = copy.deepcopy(model)
        reports = comq_torch.quantize(changed, given, 3, layers=["shared"])
        errors[how] = errors_of(changed, model, held_out)
        if how == "balanced":
            calibrated = errors_of(changed, model, batches)
            assert reports["shared"].modalities == pytest.approx(calibrated, rel=2e-3)
        else:
            assert reports["shared"].modalities is None
    assert errors["balanced"]["text"] < 0.6 * errors["together"]["text"]
    assert errors["balanced"]["image"] < errors["together"]["image"] + 0.4 * errors["together"]["text"]


def test_each_layer_has_the_groups_that_reach_it(model, tmp_path):
    batches = batches_of(1)
    comq_torch.capture(model, batches, tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert file["image"].gram.counts == {"image": 320}
        assert file["shared"].gram.counts == {"image": 320, "text": 64}
        assert isinstance(file["text"].gram, comq_np.TokenCounts)
        X = model.text.weight.detach().numpy()[torch.cat(batches["text"]).numpy().ravel()]
        np.testing.assert_allclose(file["shared"].gram.grams["text"].matrix, X.T @ X, rtol=1e-4, atol=1e-4)
    reports = comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 4)
    assert [report.modalities and set(report.modalities) for report in reports.values()] == [
        {"image"}, None, {"image", "text"},
    ]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_in_several_passes_the_file_is_the_same(tmp_path, shared):
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)]
    model = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True) if shared else nn.Sequential(*layers)
    batches = {name: [torch.randn(5, 3, 24) * scale for _ in range(3)] for name, scale in (("a", 1), ("b", 9))}
    comq_torch.capture(model, batches, tmp_path / "one.h5")
    with comq_np.CalibrationFile(tmp_path / "one.h5") as file:
        shapes = {row["layer"]: (row["rows"], row["columns"]) for row in file.describe()}
    plan = comq_np.plan_calibration(shapes, groups=2)
    assert plan.passes[0].gram_bytes == 2 * comq_np.plan_calibration(shapes).passes[0].gram_bytes
    memory = max(comq_np.plan_calibration({name: shape}, groups=2).passes[0].memory for name, shape in shapes.items())
    comq_torch.capture(model, batches, tmp_path / "more.h5", memory=int(1.6 * memory))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "more.h5").read_bytes()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({}, "`names` must be different names of groups, at least one, got []."),
        ({"image": []}, "`batches['image']` must hold at least one batch, got none."),
        ({"image": torch.ones(3, 10)}, "`batches['image']` must be an iterable of batches, got 'Tensor'."),
        ({"image": {"x": 1}}, "`batches['image']` must be an iterable of batches, got 'dict'."),
    ],
)
def test_refused(model, tmp_path, batches, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_torch.capture(model, batches, tmp_path / "c.h5")
    assert str(error.value) == message


def test_one_layer_after_another_is_for_batches_without_names(model):
    with pytest.raises(comq_np.InputError, match="`batches` must be an iterable of batches with `sequential`, which"):
        comq_torch.quantize(copy.deepcopy(model), batches_of(1), 4, sequential=True)
