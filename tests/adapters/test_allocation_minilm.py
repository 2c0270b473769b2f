"""Bits allocated to a real sentence encoder, by the benchmark itself on fewer texts and layers."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "allocation.py"


def test_some_layers_need_more_bits_than_others(tmp_path):
    layers = ["encoder.layer.5.attention.*", "pooler.dense"]
    options = [
        "--bits",
        "3",
        "--texts",
        "64",
        "--judged",
        "8",
        "--curves",
        "fast",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    subprocess.run(
        [sys.executable, str(BENCHMARK), *options, "--layers", *layers], check=True, capture_output=True, timeout=300
    )
    figures = {
        (row["recipe"], row["bits"], row["metric"]): row["value"]
        for row in json.loads((tmp_path / "figures.json").read_text())
    }
    for how in ("errors", "sensitivities"):
        assert figures[how, 3, "bytes"] <= figures["uniform", 3, "bytes"]
    assert figures["sensitivities", 3, "embedding_error"] < 0.9 * figures["uniform", 3, "embedding_error"]
