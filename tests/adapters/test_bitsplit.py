"""The benchmark of bit planes, on a small network in the place of a large one: its figures, and what they must show."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
from requirements import require

require("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def small_case(quality, texts):
    """Network with two layers, whose inputs are correlated, and batches of as many inputs as there are texts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
    mixed = torch.randn(48, 48)
    batches = [torch.randn(texts, 48) @ mixed for _ in range(16)]
    return quality.Case("minilm", model, ["0", "2"], batches[:8], batches[8:])


def test_planes_have_the_lower_held_out_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bitsplit = pytest.importorskip("bitsplit")
    monkeypatch.setattr(bitsplit.quality, "minilm_case", lambda texts: small_case(bitsplit.quality, texts))
    options = ["--case", "minilm", "--recipe", "balanced", "--bits", "2", "3", "--texts", "128"]
    monkeypatch.setattr(sys, "argv", ["bitsplit.py", *options, "--json", str(tmp_path / "figures.json")])
    bitsplit.main()
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {(row["bits"], row["recipe"], row["metric"]): row["value"] for row in rows}
    for bits in (2, 3):
        names = [f"balanced{way}" for way in ("", "/real", "/planes", "/groups", "/split", "/both")]
        plain, real, planes, groups, split, both = (figures[bits, name, "heldout_error"] for name in names)
        assert planes < min(plain, real)
        assert figures[bits, "balanced/both", "calibration_error"] <= figures[bits, "balanced", "calibration_error"]
        assert max(groups, split, both) < 10 * planes
        stored = [figures[bits, f"balanced{way}", "bits_per_weight"] for way in ("", "/real", "/planes", "/groups")]
        assert bits < stored[0] < stored[1] < stored[2] <= stored[3]
