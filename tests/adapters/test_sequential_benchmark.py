"""What sequential calibration gains in a sentence encoder, by the benchmark itself on fewer texts and blocks."""

from __future__ import annotations

import json
import sys

import sequential


def test_the_sequence_lowers_the_error(tmp_path, monkeypatch):
    options = ["--bits", "3", "--layers", "1", "--texts", "32", "--judged", "16"]
    monkeypatch.setattr(sys, "argv", ["sequential.py", *options, "--json", str(tmp_path / "figures.json")])
    sequential.main()
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {(row["case"], row["bits"]) for row in rows} == {("minilm", 3)}
    figures = {(row["recipe"], row["metric"]): row["value"] for row in rows}
    before, after = figures["balanced", "error"], figures["balanced, sequential", "error"]
    assert abs(figures["balanced, sequential", "gain"] - (1 - after / before)) < 1e-6
    assert 0 < after < 0.97 * before
