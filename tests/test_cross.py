"""Sequential calibration: the weights that `cross` asks for, and that they pay on samples that were not seen."""

from __future__ import annotations

import re

import numpy as np
import pytest

import comq_np


def layer(samples, m=24, n=16, seed=0, kind="relu", alike=1):
    """Weights, inputs of the float model and of the quantized one to calibrate on, and others to judge on.

    `alike` samples in a row, as the words of a text, share half of their variance.
    """
    rng = np.random.default_rng([samples, m, n, seed])
    mixing = rng.normal(size=(m, m)) * rng.lognormal(sigma=0.7, size=m) / np.sqrt(m)
    W = rng.normal(size=(m, n)).astype(np.float32)
    before = rng.normal(size=(m, m)) / np.sqrt(m)
    rounded = comq_np.solve(before, np.eye(m), 3, recipe="fast").dequantize()
    turn = np.eye(m) + 0.3 * rng.normal(size=(m, m)) / np.sqrt(m)

    def draw(count):
        shared = np.repeat(rng.normal(size=(2, -(-count // alike), m)), alike, axis=1)[:, :count]
        own = rng.normal(size=(2, count, m))
        Z, noise = own if alike == 1 else np.sqrt(0.5) * (shared + own)
        Z = Z @ mixing
        if kind == "relu":  # the layer before was quantized
            return np.maximum(Z @ before, 0), np.maximum(Z @ rounded, 0)
        if kind == "turned":  # other weights can take up all of the error
            return Z @ turn, Z
        noise *= 0.3 * Z.std(axis=0)
        return (Z, Z + noise) if kind == "noisy" else (Z + noise, Z)  # "unrelated": nothing that weights can take up

    return W, draw(samples), draw(4000)


def error(weights, W, X, Xq):
    return np.linalg.norm(Xq @ weights - X @ W) ** 2


def in_folds(X, Xq, parts=2):
    """Gram of Xq in two folds, and the cross products of each."""
    gram, cross = comq_np.Gram(X.shape[1]), np.zeros((2, X.shape[1], X.shape[1]))
    for k, (part, given) in enumerate(zip(np.array_split(X, parts), np.array_split(Xq, parts), strict=True)):
        gram.update(given, fold=k % 2)
        cross[k % 2] += given.T @ part
    return gram, cross


def correction(G, C, W, ridge):
    return np.linalg.solve(G + ridge * np.diag(G).mean() * np.eye(len(G)), (C - G) @ W)


def likeliest(G, C):
    """Ridge by the equations: the density of the projections, maximised on a fine grid of ridges."""
    eigenvalues, vectors = np.linalg.eigh(G)
    projections = vectors.T @ (C - G) / np.sqrt(eigenvalues)[:, None]
    ridges, densities = np.logspace(-7, 3, 401), []
    for ridge in ridges:
        shape = 1 + eigenvalues / (ridge * np.diag(G).mean())
        variance = (projections**2 / shape[:, None]).mean() * shape
        densities.append(-(projections**2 / variance[:, None]).sum() - len(G) * np.log(variance).sum())
    return ridges[int(np.argmax(densities))]


@pytest.mark.parametrize("kind", ["relu", "turned"])
@pytest.mark.parametrize("samples", [60, 2000])
def test_one_matrix_means_the_likeliest_ridge(kind, samples):
    W, (X, Xq), _ = layer(samples, kind=kind)
    weights = comq_np.matched_weights(W, Xq.T @ Xq, Xq.T @ X)
    expected = W + correction(Xq.T @ Xq, Xq.T @ X, W, likeliest(Xq.T @ Xq, Xq.T @ X))
    gram, _ = in_folds(X, Xq)
    np.testing.assert_allclose(comq_np.matched_weights(W, gram, Xq.T @ X), weights, rtol=1e-3, atol=1e-3)
    assert weights.dtype == np.float32
    assert weights.shape == W.shape
    assert np.linalg.norm(Xq @ (weights - expected)) < 0.03 * np.linalg.norm(Xq @ (expected - W))


@pytest.mark.parametrize("kind", ["relu", "noisy", "unrelated"])
@pytest.mark.parametrize("samples", [36, 60, 2000])
def test_two_matrices_mean_the_ridge_that_holds_on_the_other_fold(kind, samples):
    W, (X, Xq), _ = layer(samples, kind=kind)
    gram, cross = in_folds(X, Xq)
    halves = list(zip(np.array_split(X, 2), np.array_split(Xq, 2), strict=True))
    unit = np.eye(len(W))
    ridges = [*np.logspace(-7, 3, 101), 1e20]
    gains = []
    for ridge in ridges:
        maps = [unit + correction(part.T @ part, part.T @ given, unit, ridge) for given, part in halves]
        gains.append(
            min(
                error(unit, unit, *half) - error(found, unit, *half)
                for found, half in zip(maps, halves[::-1], strict=True)
            )
        )
    ridge = ridges[int(np.argmax(gains))]
    if samples // 2 <= len(W):
        ridge = max(ridge, likeliest(Xq.T @ Xq, Xq.T @ X))
    expected = correction(gram.matrix, cross.sum(axis=0), W, ridge)
    found = comq_np.matched_weights(W, gram, cross) - W
    assert np.linalg.norm(Xq @ (found - expected)) < 1e-3 * np.linalg.norm(Xq @ W)


def test_each_column_is_on_its_own_and_any_unit_will_do():
    W, (X, Xq), _ = layer(100)
    G, cross = Xq.T @ Xq, Xq.T @ X
    weights = comq_np.matched_weights(W, G, cross)
    np.testing.assert_allclose(comq_np.matched_weights(W[:, 3], G, cross), weights[:, 3], rtol=1e-4, atol=1e-6)
    for unit in (1e-250, 1e250):
        np.testing.assert_allclose(comq_np.matched_weights(W, unit * G, unit * cross), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("samples", [12, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_inputs_leave_the_weights_as_they_are(samples, dtype):
    W, (X, _), _ = layer(samples)
    X[:, 5] = 0
    G = X.astype(dtype).T @ X.astype(dtype)
    np.testing.assert_allclose(comq_np.matched_weights(W, G, G), W, rtol=1e-5)
    q, plain = comq_np.solve(W, G, 3, cross=G), comq_np.solve(W, G, 3)
    np.testing.assert_array_equal(q.codes, plain.codes)
    np.testing.assert_array_equal(q.scale, plain.scale)
    gram, cross = in_folds(X, X)
    np.testing.assert_allclose(comq_np.matched_weights(W, gram, cross), W, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_all_zero_leave_the_weights_as_they_are():
    W = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(comq_np.matched_weights(W, np.zeros((3, 3)), np.zeros((3, 3))), W)


def test_what_other_weights_can_take_up_they_do():
    W, (X, Xq), unseen = layer(1000, kind="turned")
    weights = comq_np.matched_weights(W, Xq.T @ Xq, Xq.T @ X)
    assert error(weights, W, *unseen) < 1e-4 * error(W, W, *unseen)
    with_cross = comq_np.solve(W, Xq.T @ Xq, 6, cross=Xq.T @ X).dequantize()
    without = comq_np.solve(W, Xq.T @ Xq, 6).dequantize()
    assert error(with_cross, W, *unseen) < 0.2 * error(without, W, *unseen)


@pytest.mark.parametrize("folded", [False, True])
def test_a_quantized_layer_before_pays_on_samples_not_seen(folded):
    W, (X, Xq), unseen = layer(1000)
    G, cross = in_folds(X, Xq) if folded else (Xq.T @ Xq, Xq.T @ X)
    with_cross = comq_np.solve(W, G, 4, recipe="fast", cross=cross).dequantize()
    without = comq_np.solve(W, G, 4, recipe="fast").dequantize()
    assert error(with_cross, W, *unseen) < 0.8 * error(without, W, *unseen)


KINDS = ("relu", "noisy", "unrelated", "turned")
FEW_AND_MANY = (12, 24, 36, 120, 1000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", FEW_AND_MANY)
@pytest.mark.parametrize("n", [1, 16])
def test_the_weights_are_not_worse_on_samples_not_seen(kind, samples, n):
    errors = []
    for seed in range(16):
        W, (X, Xq), unseen = layer(samples, n=n, seed=seed, kind=kind)
        one, two = comq_np.matched_weights(W, Xq.T @ Xq, Xq.T @ X), comq_np.matched_weights(W, *in_folds(X, Xq))
        errors.append([error(weights, W, *unseen) for weights in (W, one, two)])
    without, *with_cross = np.mean(errors, axis=0)
    assert max(with_cross) < 1.015 * without


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", FEW_AND_MANY)
def test_the_quantized_weights_are_not_worse_on_samples_not_seen(kind, samples):
    errors = []
    for seed in range(8):
        W, (X, Xq), unseen = layer(samples, seed=seed, kind=kind)
        found = [
            comq_np.solve(W, Xq.T @ Xq, 4, recipe="fast"),
            comq_np.solve(W, Xq.T @ Xq, 4, recipe="fast", cross=Xq.T @ X),
            comq_np.solve(W, in_folds(X, Xq)[0], 4, recipe="fast", cross=in_folds(X, Xq)[1]),
        ]
        errors.append([error(q.dequantize(), W, *unseen) for q in found])
    without, *with_cross = np.mean(errors, axis=0)
    assert max(with_cross) < 1.015 * without


def test_folds_tell_what_samples_that_are_alike_share_by_chance():
    together, apart, plain = [], [], []
    for seed in range(8):
        W, (X, Xq), unseen = layer(48, seed=seed, kind="unrelated", alike=12)
        plain.append(error(W, W, *unseen))
        together.append(error(comq_np.matched_weights(W, Xq.T @ Xq, Xq.T @ X), W, *unseen))
        apart.append(error(comq_np.matched_weights(W, *in_folds(X, Xq, parts=4)), W, *unseen))
    assert np.mean(apart) < 1.02 * np.mean(plain) < np.mean(together)


def test_the_report_refers_to_the_matched_weights():
    W, (X, Xq), _ = layer(200)
    G, cross = Xq.T @ Xq, Xq.T @ X
    G_before, cross_before = G.copy(), cross.copy()
    q = comq_np.solve(W, G, 3, cross=cross)
    weights = comq_np.matched_weights(W, G, cross)
    left = weights.astype(np.float64) - q.dequantize()
    assert q.report.objective == pytest.approx(np.vdot(left, G @ left), rel=1e-5)
    assert q.report.relative_error == pytest.approx(q.report.objective / np.vdot(weights, G @ weights), rel=1e-4)
    assert q.report.objective <= q.report.objective_rounding
    assert any("matched_weights" in note for note in q.report.notes)
    assert not any("matched_weights" in note for note in comq_np.solve(W, G, 3).report.notes)
    np.testing.assert_array_equal(q.codes, comq_np.solve(weights, G, 3).codes)
    np.testing.assert_array_equal(G, G_before)
    np.testing.assert_array_equal(cross, cross_before)


def test_shrinkage_is_chosen_for_the_matched_weights():
    W, (X, Xq), _ = layer(60)
    gram, cross = in_folds(X, Xq)
    recipe = comq_np.recipe("best").replace(neighbours=0, leaps=0)
    q = comq_np.solve(W, gram, 3, recipe=recipe, cross=cross)
    expected = comq_np.solve(comq_np.matched_weights(W, gram, cross), gram, 3, recipe=recipe)
    assert q.report.shrinkage == expected.report.shrinkage
    np.testing.assert_array_equal(q.codes, expected.codes)


TWO = np.stack([np.eye(3), np.eye(3)])
BAD = [
    (np.eye(2), "`cross` must have shape (3, 3) to match `G`, or (2, 3, 3) for its folds, got (2, 2)."),
    (np.ones((3, 3, 3)), "`cross` must have shape (3, 3) to match `G`, or (2, 3, 3) for its folds, got (3, 3, 3)."),
    (TWO, "`cross` must have shape (3, 3) unless `G` is a comq_np.Gram with samples in both folds, got (2, 3, 3)."),
    (np.full((3, 3), np.nan), "`cross` must be finite, got 9 NaN or infinite of 9 entries, the first at (0, 0)."),
    (np.eye(3) * 1e40, "`cross` must lie within ±1e+30, which is far beyond `G`, got an entry of size 1e+40."),
    (np.ones(3), "`cross` must be 2-D or 3-D, got 1-D of shape (3,)."),
]


@pytest.mark.parametrize(("cross", "message"), BAD)
def test_refused_cross(cross, message):
    for call in (comq_np.matched_weights, lambda W, G, cross: comq_np.solve(W, G, cross=cross)):
        with pytest.raises(comq_np.InputError, match=re.escape(message)):
            call(np.eye(3), np.eye(3), cross)


def test_two_matrices_need_two_folds():
    gram = comq_np.Gram(3)
    gram.update(np.random.default_rng(0).normal(size=(20, 3)), fold=0)
    with pytest.raises(comq_np.InputError, match="with samples in both folds"):
        comq_np.solve(np.eye(3), gram, cross=TWO)


def test_a_mean_that_is_not_known_is_refused():
    gram, cross = in_folds(*layer(50)[1])
    with pytest.raises(comq_np.InputError, match="`fit_bias` must be False with `cross`"):
        comq_np.solve(np.ones((24, 2)), gram, fit_bias=True, cross=cross)


@pytest.mark.parametrize("folded", [False, True])
def test_many_problems_are_matched_one_by_one(folded):
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(200, 5, 6)), rng.normal(size=(5, 6, 2))
    Xq = X + 0.2 * rng.normal(size=X.shape) + 0.1
    gram, parts = comq_np.Gram(6, problems=5), [slice(0, 100), slice(100, 200)]
    for fold, part in enumerate(parts):
        gram.update(Xq[part], fold=fold)
    cross = np.stack([np.einsum("kbi,kbj->bij", Xq[part], X[part]) for part in parts])
    cross = cross if folded else cross.sum(axis=0)
    matched = comq_np.matched_weights(W, gram, cross)
    for p in range(5):
        alone = comq_np.Gram(6)
        for fold, part in enumerate(parts):
            alone.update(Xq[part, p], fold=fold)
        np.testing.assert_allclose(
            matched[p], comq_np.matched_weights(W[p], alone, cross[..., p, :, :]), rtol=1e-3, atol=1e-5
        )
    q = comq_np.solve(W, gram, 3, cross=cross)
    before = comq_np.solve(W, gram, 3)

    def error(q):
        return np.square(np.einsum("kbi,bin->kbn", Xq, q.dequantize()) - np.einsum("kbi,bin->kbn", X, W)).sum()

    assert error(q) < error(before)


@pytest.mark.parametrize(
    ("G", "cross", "message"),
    [
        (np.eye(2)[None].repeat(3, 0), np.eye(2)[None].repeat(2, 0), "`cross` must be of 3 problems, as `W` has"),
        (np.eye(2)[None].repeat(2, 0), np.eye(2)[None].repeat(3, 0), "`G` must be of 3 problems, as `W` has."),
        (comq_np.Gram(2), np.eye(2)[None].repeat(3, 0), "`G` must be of 3 problems, as `W` has."),
    ],
)
def test_many_problems_refused(G, cross, message):
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.matched_weights(np.ones((3, 2, 1)), G, cross)
