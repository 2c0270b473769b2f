"""Layers made up for timing, with inputs that are correlated and of unequal size, as activations are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import comq_np

Float32 = npt.NDArray[np.float32]

#: Chunks of m samples of m inputs each.
CHUNKS = 2
#: How fast the directions that the inputs share get smaller, and what each input adds of its own. With these, the
#: eigenvalues are spread as in the layers of all-MiniLM-L6-v2, and the first sweep of "balanced" at 4 bits changes 1 %
#: of the codes, as it does there.
DECAY, OWN = 0.4, 0.4
#: Spread (of the logarithm) of the inputs' sizes; and one in so many is larger than that by so much.
SPREAD, EVERY, LARGER = 0.35, 100, 5


def weights(m: int, n: int, seed: int = 0) -> Float32:
    """Weights (m, n), large ones more frequent than in a normal distribution."""
    rng = np.random.default_rng([m, n, seed])
    return (0.05 * rng.standard_t(5, size=(m, n))).astype(np.float32)


def inputs(m: int, seed: int = 0) -> Iterator[Float32]:
    """Chunks of inputs, (m, m) each."""
    rng = np.random.default_rng([m, seed])
    mixing = rng.standard_normal((m, m), dtype=np.float32)
    mixing *= np.arange(1, m + 1, dtype=np.float32)[:, None] ** -DECAY
    mixing /= np.sqrt(np.square(mixing).sum(axis=0))
    size = rng.lognormal(sigma=SPREAD, size=m).astype(np.float32)
    size[rng.choice(m, size=-(-m // EVERY), replace=False)] *= LARGER
    for _ in range(CHUNKS):
        X = rng.standard_normal((m, m), dtype=np.float32) @ mixing
        X += OWN * rng.standard_normal((m, m), dtype=np.float32)
        yield X * size


def matrix(m: int, seed: int = 0) -> Float32:
    """``X.T @ X`` (m, m) of the inputs."""
    G = np.zeros((m, m), dtype=np.float32)
    for X in inputs(m, seed):
        G += X.T @ X
    return G


def gram(m: int, seed: int = 0) -> comq_np.Gram:
    """Gram of the inputs, with samples in both folds."""
    found = comq_np.Gram(m)
    for X in inputs(m, seed):
        found.update(X)
    return found
