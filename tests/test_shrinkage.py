"""Shrinkage of the Gram matrix: what a given one does, and that the chosen one pays on inputs that were not seen."""

from __future__ import annotations

import numpy as np
import pytest

import comq_np

#: A short recipe that factors, so that shrinkage is chosen for it.
QUICK = comq_np.recipe("best").replace(neighbours=0, leaps=0)


def layer(samples, m=48, n=32, seed=0):
    """Weights, a Gram of few samples in two folds, and many other samples of the same kind."""
    rng = np.random.default_rng([samples, m, seed])
    mixing = rng.normal(size=(m, m)) * rng.lognormal(sigma=0.7, size=m)
    W = rng.normal(size=(m, n)).astype(np.float32)
    gram = comq_np.Gram(m)
    for part in np.array_split(rng.normal(size=(samples, m)) @ mixing, 8):
        gram.update(part)
    return W, gram, rng.normal(size=(5000, m)) @ mixing


def unseen_error(W, gram, X, bits, **options):
    q = comq_np.solve(W, gram, bits, recipe=QUICK, **options)
    shift = 0 if q.bias_shift is None else q.bias_shift
    return np.linalg.norm(X @ q.dequantize() + shift - X @ W) ** 2, q.report.shrinkage


@pytest.mark.parametrize("shrinkage", [0.0, 0.05, 1.0])
def test_a_given_shrinkage_is_that_of_the_matrix(shrinkage):
    W, gram, _ = layer(200)
    G = gram.matrix
    q = comq_np.solve(W, G, 3, recipe=QUICK, shrinkage=shrinkage)
    shrunk = (1 - shrinkage) * G + shrinkage * np.diag(G).mean() * np.eye(len(G))
    expected = comq_np.solve(W, shrunk, 3, recipe=QUICK)
    assert q.report.shrinkage == shrinkage
    assert (q.codes == expected.codes).mean() > 0.9
    error = W - q.dequantize()
    assert q.report.objective == pytest.approx(np.vdot(error, G @ error), rel=1e-5)


def test_nothing_is_shrunk_unless_asked():
    W, gram, _ = layer(200)
    assert comq_np.solve(W, gram.matrix, 3, recipe=QUICK).report.shrinkage == 0
    assert comq_np.solve(W, gram, 3, recipe="paper").report.shrinkage == 0
    one_fold = comq_np.Gram(48)
    one_fold.update(np.random.default_rng(0).normal(size=(100, 48)))
    assert comq_np.solve(W, one_fold, 3, recipe=QUICK).report.shrinkage == 0


@pytest.mark.parametrize("samples", [60, 150, 4000])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("fit_bias", [False, True])
def test_the_chosen_shrinkage_is_about_the_best_on_inputs_not_seen(samples, bits, fit_bias):
    chosen, fixed, none = [], {}, []
    for seed in range(4):
        case = layer(samples, seed=seed)
        chosen.append(unseen_error(*case, bits, fit_bias=fit_bias)[0])
        for shrinkage in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6):
            error, _ = unseen_error(*case, bits, fit_bias=fit_bias, shrinkage=shrinkage)
            fixed.setdefault(shrinkage, []).append(error)
        none.append(fixed[0.0][-1])
    best = min(np.exp(np.mean(np.log(errors))) for errors in fixed.values())
    found, without = (np.exp(np.mean(np.log(errors))) for errors in (chosen, none))
    assert found <= 1.02 * without
    if samples == 60:  # half of them are fewer than rows: what suits that is more than what suits all
        assert found < 0.9 * without
    else:
        assert found <= 1.05 * best


@pytest.mark.parametrize("value", [-0.1, 1.5, "best", None, True])
def test_refused_shrinkage(value):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(np.eye(3), np.eye(3), shrinkage=value)
    assert str(error.value) == f'`shrinkage` must be "auto" or a number from 0 to 1, got {value!r}.'
