"""A sentence encoder as an ONNX model, by the benchmark itself on one of its blocks and few texts."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from requirements import require

require("onnx")

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "minilm_onnx.py"


def test_four_bits_are_better_than_those_of_onnxruntime(tmp_path):
    options = ["--layers", "1", "--texts", "32", "--judged", "64", "--recipe", "balanced", "ort"]
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {(row["case"], row["bits"]) for row in rows} == {("minilm_onnx", 4)}
    figures = {(row["recipe"], row["metric"]): row["value"] for row in rows}
    assert figures["balanced", "cosine"] > max(0.98, figures["ort", "cosine"])
    assert figures["balanced", "bytes_ratio"] < 0.35
