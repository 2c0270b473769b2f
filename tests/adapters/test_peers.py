"""GPTQ in plain PyTorch is GPTQ, and leaves alone what it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import comq_np
import peers
import problems
import quality
import speed


@pytest.mark.parametrize("bits", [4, 3])
def test_torch_gptq_is_the_nearest_plane_of_the_damped_gram(monkeypatch, bits):
    monkeypatch.setattr(peers, "BLOCK", 20)  # the last one is shorter
    W, G = problems.weights(48, 12).astype(np.float64), problems.matrix(48).astype(np.float64)
    G[7] = G[:, 7] = 0.0
    W[:, 3] = 0.0
    before = W.copy(), G.copy()
    q = comq_np.solve(W, G, bits, **quality.PUBLISHED["gptq"])
    alive = np.arange(48) != 7  # of which GPTQ makes what it likes
    np.testing.assert_allclose(peers.torch_gptq(W, G, bits)[alive], q.dequantize()[alive], atol=1e-6)
    np.testing.assert_array_equal(W, before[0])
    np.testing.assert_array_equal(G, before[1])


def test_torch_has_as_many_threads_as_the_solve():
    before, seen = torch.get_num_threads(), []
    how = speed.How(threads=(1, 2), repeat=1)
    speed.alternate(speed.layers_of((8, 4)), {"look": lambda _: seen.append(torch.get_num_threads())}, how)
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_peers_of_a_timing_find_what_they_find_alone():
    layers = speed.layers_of((32, 8))
    found = speed.task_of("torch_gptq", layers, 4)(1)
    np.testing.assert_array_equal(found, peers.torch_gptq(*layers, 4))
    assert found.dtype == np.float32
