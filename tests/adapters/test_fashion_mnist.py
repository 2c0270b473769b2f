"""The demonstration's networks in PyTorch, by the benchmark itself on few test images."""

from __future__ import annotations

import gzip
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np

from comq_np.demo.networks import load_images

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "fashion_mnist.py"


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_four_bits_are_nearly_as_good_as_float(tmp_path):
    images = load_images()
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images.test_images[:1000])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", images.test_labels[:1000])
    options = ["--bits", "4", "--recipe", "fast", "--dataset", str(tmp_path)]
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {(row["case"], row["recipe"], row["metric"]): row["value"] for row in rows}
    for network in ("cnn", "vit"):
        assert figures[network, "float", "accuracy"] > 0.88
        assert figures[network, "fast", "points"] < 2
        assert figures[network, "fast", "agreement"] > 0.95
    assert np.isclose(figures["cnn", "float", "accuracy"], 0.9106, atol=0.03)


def test_quantized_inputs_are_no_worse_on_solved_grids(tmp_path):
    images = load_images()
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images.test_images[:400])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", images.test_labels[:400])
    options = ["--bits", "4/4", "--ranges", "minmax", "solved", "--recipe", "fast", "--case", "vit"]
    command = [sys.executable, str(BENCHMARK.with_name("activations.py")), *options, "--dataset", str(tmp_path)]
    command += ["--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {(row["case"], row["recipe"], row["metric"]): row["value"] for row in rows}
    kinds = ("minmax", "minmax, weights of solved", "solved")
    minmax, same_weights, solved = (figures["vit W4A4", ranges, "logit_error"] for ranges in kinds)
    assert 0 < solved < 0.9 * minmax < 0.9 * same_weights < 1  # which were not solved for these ranges
    assert figures["vit W4A4", "solved", "accuracy"] > 0.8
    assert figures["vit", "float", "accuracy"] > 0.88
