"""A real pitch tracker in Keras, by the benchmark itself on fewer tones and in three of its layers."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from requirements import require

require("keras")

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "crepe.py"


def test_crepe_survives_four_bits(tmp_path):
    options = ["--bits", "4", "--recipe", "fast", "--tones", "20", "--judged", "300"]
    options += ["--layers", "conv1", "conv5", "classifier"]
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {row["metric"]: row["value"] for row in rows}
    assert {(row["case"], row["bits"], row["recipe"]) for row in rows} == {("crepe", 4, "fast")}
    assert figures["float_accuracy"] > 0.97
    assert figures["accuracy"] > figures["float_accuracy"] - 0.01
    assert figures["agreement"] > 0.98
    assert figures["bytes"] < 0.15 * figures["float_bytes"]
