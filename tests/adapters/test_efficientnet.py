"""A vision network with all of its 50 layers quantized, by the benchmark itself on few images."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from PIL import Image
from requirements import require

require("images")

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "efficientnet.py"


def test_eight_bits_change_next_to_nothing(tmp_path):
    Image.new("RGBA", (300, 200), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    options = ["--bits", "8", "--recipe", "sequential", "--views", "10", "--images", str(tmp_path)]
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {(row["recipe"], row["metric"]): row["value"] for row in rows}
    assert {row["case"] for row in rows} == {"all"}
    assert figures["sequential", "agreement"] == 1
    assert 0 < figures["sequential", "logit_error"] < 0.1
