"""`solve` against the oracle on layers of trained networks, with the Grams of their real inputs."""

from __future__ import annotations

import naive
import numpy as np
import pytest

import comq_np
from comq_np.demo.networks import load_images, load_networks

LAYERS = ("cnn/conv0", "cnn/conv1", "cnn/head", "vit/embed", "vit/blocks.0.qkv", "vit/blocks.2.fc2", "vit/head")


@pytest.fixture(scope="module")
def real():
    """Weights and Gram matrix of every layer, by network and name."""
    images, found = load_images().calibration_images[:200], {}
    for network in load_networks():
        grams = {layer: comq_np.Gram(len(network.weight(layer))) for layer in network.layers}
        network.logits(images, tap=lambda layer, X, grams=grams: grams[layer].update(X))
        for layer, gram in grams.items():
            found[f"{network.name}/{layer}"] = network.weight(layer), gram.matrix
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [4, 2])
def test_paper_equals_the_oracle(real, name, bits):
    W, G = real[name]
    naive.assert_same(comq_np.solve(W, G, bits, recipe="paper"), naive.solve(W, G, 2**bits), strict=0.6)


@pytest.mark.parametrize("name", ["cnn/conv0", "vit/embed", "vit/blocks.0.proj"])
@pytest.mark.parametrize("order", ["shared", "cyclic"])
def test_other_orders_equal_the_oracle(real, name, order):
    W, G = real[name]
    q = comq_np.solve(W, G, 3, recipe=comq_np.recipe("paper").replace(order=order))
    naive.assert_same(q, naive.solve(W, G, 8, order=order), strict=0.6)


@pytest.mark.parametrize("name", ["cnn/conv0", "vit/embed", "vit/blocks.1.fc1"])
def test_groups_equal_the_oracle(real, name):
    W, G = real[name]
    q = comq_np.solve(W, G, 3, recipe="paper", group_size=24)
    naive.assert_same(q, naive.solve(W, G, 8, size=24), strict=0.6, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_default_beats_the_paper_and_the_paper_beats_rounding(real, bits):
    """In the geometric mean over all layers, as the README's figures are."""
    mean = {}
    for recipe in ("rtn", "paper", "balanced"):
        errors = [comq_np.solve(W, G, bits, recipe=recipe).report.relative_error for W, G in real.values()]
        mean[recipe] = np.exp(np.mean(np.log(errors)))
    assert mean["balanced"] < 0.95 * mean["paper"] < 0.95 * 0.5 * mean["rtn"]
