"""The judge itself: its errors against outputs of a network, and its GPTQ against the oracle."""

from __future__ import annotations

import copy
import math

import naive
import numpy as np
import pytest
import torch

import comq_np
import quality

WIDTH, HIDDEN = 12, 16


@pytest.fixture
def case():
    """Two linear layers, the second without a bias, inputs off centre, and a task that keeps the network it judges."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 8, bias=False)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    batches = [torch.randn(60, WIDTH, generator=generator) @ mix + 1 for _ in range(8)]
    judged = []

    def task(changed):
        judged.append(copy.deepcopy(changed))
        return {"number": float(len(judged))}

    return quality.Case("small", model, ["0", "2"], batches[:6], batches[6:], task=task), judged


@torch.no_grad()
def measured(model, changed, batches):
    """Relative error of each layer on the inputs that the unchanged network gives it."""
    x, errors = torch.cat(batches), []
    for layer, other in zip(model, changed, strict=True):
        if isinstance(layer, torch.nn.Linear):
            plain = torch.nn.functional.linear(x, layer.weight)
            errors.append(float((other(x) - layer(x)).square().sum() / plain.square().sum()))
        x = layer(x)
    return errors


def test_errors_are_those_of_the_outputs(case):
    case, judged = case
    rows = quality.compare(case, [3], ["rtn", "gptq", "balanced"], threads=1)
    assert [row["recipe"] for row in rows] == ["rtn", "gptq", "balanced"]
    for row in rows:
        changed = judged[int(row["number"]) - 1]
        for metric, batches in (("calibration_error", case.calibration), ("heldout_error", case.heldout)):
            expected = math.sqrt(math.prod(measured(case.model, changed, batches)))
            assert row[metric] == pytest.approx(expected, rel=1e-4)
    biases = [torch.equal(changed[0].bias, case.model[0].bias) for changed in judged]
    assert biases == [True, True, False]


def test_gptq_is_the_nearest_plane_of_the_damped_gram():
    M, rng = 48, np.random.default_rng(0)
    X, W = rng.normal(size=(200, M)) @ rng.normal(size=(M, M)), rng.normal(size=(M, 12)).astype(np.float32)
    gram = comq_np.Gram(M)
    gram.update(X)
    q = comq_np.solve(W, gram, bits=3, **quality.PUBLISHED["gptq"])
    assert q.report.notes == ()  # no column keeps plain rounding, which is not GPTQ
    damped = gram.matrix + 0.01 * gram.matrix.diagonal().mean() * np.eye(M)
    d, z, _ = naive.grids_of("minmax", W, damped, 8, None, False)
    naive.assert_same(q, naive.nearest_plane(W, damped, d, z, 8, np.argsort(-damped.diagonal()).tolist()))


def test_means_are_geometric():
    assert quality.geometric_means([[1.0, 0.5], [100.0, 0.5]]) == pytest.approx([10.0, 0.5])


def test_ratios_are_to_the_same_case_and_width():
    errors = {(4, "rtn"): 8.0, (4, "gptq"): 2.0, (3, "rtn"): 9.0, (3, "gptq"): 3.0}
    rows = [
        {"case": "small", "bits": bits, "recipe": recipe, "heldout_error": error}
        for (bits, recipe), error in errors.items()
    ]
    assert [row["heldout_error/gptq"] for row in quality.ratios(rows)] == [4.0, 1.0, 3.0, 1.0]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(quality.peers.PACKAGES, "keras_gptq", ("no_such_package",))
    quality.check_packages(["minilm"], ["rtn"])
    with pytest.raises(SystemExit, match="no_such_package missing"):
        quality.check_packages(["minilm"], ["rtn", "keras_gptq"])
