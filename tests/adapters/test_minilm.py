"""A real sentence encoder, from capture to embeddings, by the benchmark itself on fewer texts."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "minilm.py"


def test_minilm_survives_four_bits(tmp_path):
    options = ["--bits", "4", "--recipe", "rtn", "balanced", "--texts", "96", "--json", str(tmp_path / "figures.json")]
    subprocess.run([sys.executable, str(BENCHMARK), *options], check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert {(row["case"], row["bits"]) for row in rows} == {("minilm", 4)}
    figures = {(row["recipe"], row["metric"]): row["value"] for row in rows}
    assert figures["balanced", "cosine"] >= 0.97 > figures["rtn", "cosine"]
    assert figures["balanced", "lee"] > figures["balanced", "float_lee"] - 0.03
    assert figures["balanced", "bytes"] < 0.15 * figures["balanced", "float_bytes"]
