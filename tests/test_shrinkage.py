"""Shrinkage of the Gram matrix: what a given one does, and that the chosen one pays on inputs that were not seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import comq_np

#: A short recipe that factors, so that shrinkage is chosen for it.
QUICK = comq_np.recipe("balanced").replace(leaps=0, exact=0)
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)


def layer(samples, decay=0.5, m=48, n=32, seed=0):
    """Weights, a Gram of few samples from a single batch, and the covariance of the inputs, whose mean is 0.

    The inputs have standard deviations ``k**-decay`` along some axes; without decay along too few, nearly singular.
    """
    rng = np.random.default_rng([samples, m, seed])
    axes = np.linalg.qr(rng.normal(size=(m, m)))[0] if decay else rng.normal(size=(m, m))
    mixing = np.arange(1, m + 1)[:, None] ** -decay * axes * rng.lognormal(sigma=0.7, size=m)
    W = rng.normal(size=(m, n)).astype(np.float32)
    gram = comq_np.Gram(m)
    gram.update(rng.normal(size=(samples, m)) @ mixing)
    return W, gram, mixing.T @ mixing


def unseen_error(W, gram, covariance, bits, **options):
    """Expected squared error on inputs that were not seen, and the shrinkage."""
    q = comq_np.solve(W, gram, bits, recipe=QUICK, **options)
    shift = 0 if q.bias_shift is None else q.bias_shift
    error = W - q.dequantize()
    return np.vdot(error, covariance @ error) + np.sum(np.square(shift)), q.report.shrinkage


def compared(*problem, **options):
    """Unseen error with the chosen shrinkage, as a share of that with the best of some fixed ones, and with none."""
    fixed = [unseen_error(*problem, **options, shrinkage=shrinkage)[0] for shrinkage in SHRINKAGES]
    chosen, _ = unseen_error(*problem, **options)
    return chosen / min(fixed), chosen / fixed[0]


def mean(ratios):
    return np.exp(np.mean(np.log(ratios)))


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
    one_fold.update(np.random.default_rng(0).normal(size=(100, 48)), fold=1)
    assert comq_np.solve(W, one_fold, 3, recipe=QUICK).report.shrinkage == 0


@pytest.mark.parametrize(
    ("samples", "limit"), [(24, 1.06), (48, 1.04), (72, 1.03), (96, 1.03), (200, 1.03), (1000, 1.03)]
)
def test_the_chosen_shrinkage_is_about_the_best_on_inputs_not_seen(samples, limit):
    cases = itertools.product((0.5, 1.0), (0, 1, 2), (2, 4), (False, True))
    ratios, gains = zip(
        *(compared(*layer(samples, decay, seed=seed), bits=bits, fit_bias=fit) for decay, seed, bits, fit in cases),
        strict=True,
    )
    assert mean(ratios) <= limit
    # The error is that of a few columns, whose codes jump: between neighbouring shrinkages, too, it differs by as much,
    # and the best is the luckiest of seven.
    assert max(ratios) <= 1.25
    assert mean(gains) <= {24: 0.65, 48: 0.65, 72: 0.85, 96: 0.95}.get(samples, 1.005)


@pytest.mark.parametrize(
    ("samples", "limit", "gain"),
    [(36, 1.1, 0.85), (60, 1.25, 1.1), (96, 1.15, 1.1), (200, 1.06, 1.0), (1000, 1.05, 1.0)],
)
def test_inputs_that_are_nearly_singular(samples, limit, gain):
    """With more samples than rows, what is nearly dependent shows; half of them, being fewer than rows, cannot tell."""
    cases = itertools.product(range(6), (2, 4))
    ratios, gains = zip(*(compared(*layer(samples, 0.0, seed=seed), bits=bits) for seed, bits in cases), strict=True)
    assert mean(ratios) <= limit
    assert mean(gains) <= gain


def test_a_single_batch_of_texts_is_cross_validated():
    """No text may lie in both folds, where its tokens are alike: each fold would know what the other has by chance."""
    ratios = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        mixing = np.arange(1, 49)[:, None] ** -0.5 * np.linalg.qr(rng.normal(size=(48, 48)))[0]
        texts = (rng.normal(size=(8, 1, 48)) + 0.1 * rng.normal(size=(8, 60, 48))) @ mixing
        gram, torn, W = comq_np.Gram(48), comq_np.Gram(48), rng.normal(size=(48, 32))
        gram.update(texts)
        torn.update(texts[:, ::2], fold=0)
        torn.update(texts[:, 1::2], fold=1)
        whole, half = (comq_np.solve(W, one, 2, recipe=QUICK) for one in (gram, torn))
        errors = [np.vdot(W - q.dequantize(), mixing.T @ mixing @ (W - q.dequantize())) for q in (whole, half)]
        assert whole.report.shrinkage > half.report.shrinkage
        ratios.append(errors[0] / errors[1])
    assert mean(ratios) < 0.9


def grouped(*layers):
    """Weights and Gram of several layers as the problems of one."""
    W, grams = np.stack([W for W, _, _ in layers]), [gram for _, gram, _ in layers]
    folds = zip(*(gram.folds for gram in grams), strict=True)
    return W, comq_np.Gram.from_folds(
        tuple((np.stack([f.matrix for f in fold]), np.stack([f.sum for f in fold]), fold[0].count) for fold in folds)
    )


def test_problems_of_one_layer_choose_together():
    """What counts is the error of all of them: the larger inputs decide."""
    scarce, ample = layer(60, n=4, seed=0), layer(60, 0.0, n=4, seed=1)
    shares = [comq_np.solve(*grouped(one, one), 2, recipe=QUICK).report.shrinkage for one in (scarce, ample)]
    assert abs(shares[0] - shares[1]) > 0.1 * max(shares)
    large = comq_np.Gram.from_folds(tuple((1e8 * fold.matrix, 1e4 * fold.sum, fold.count) for fold in ample[1].folds))
    for order in (1, -1):
        both = [scarce, (ample[0], large, None)][::order]
        assert comq_np.solve(*grouped(*both), 2, recipe=QUICK).report.shrinkage == pytest.approx(shares[1], rel=1e-3)


def test_a_chosen_shrinkage_of_many_problems_pays():
    ratios = []
    for seed in range(4):
        layers = [layer(60, n=3, seed=10 * seed + k) for k in range(6)]
        W, gram = grouped(*layers)
        errors = []
        for share in ("auto", 0.0):
            E = W - comq_np.solve(W, gram, 2, recipe=QUICK, shrinkage=share).dequantize()
            errors.append(sum(np.vdot(e, covariance @ e) for e, (_, _, covariance) in zip(E, layers, strict=True)))
        ratios.append(errors[0] / errors[1])
    assert mean(ratios) < 0.9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_many_samples_for_codes_that_are_proven_are_hardly_shrunk(bits):
    """The kernels of a depthwise convolution: the minima that sweeps end in do not decide what the samples tell."""
    rng = np.random.default_rng(0)
    gram, pixels = comq_np.Gram(9, problems=200), rng.normal(size=(3000, 200, 15)).astype(np.float32)
    smooth = sum(weight * pixels[:, :, k : k + 9] for k, weight in enumerate((1, 3, 5, 5, 3, 1, 0.5)))
    gram.update(np.maximum(smooth + 1, 0))
    W = rng.normal(size=(200, 9, 1))
    chosen, unshrunk = (comq_np.solve(W, gram, bits, shrinkage=share).report for share in ("auto", 0.0))
    assert chosen.shrinkage < 0.02
    assert chosen.objective < 1.05 * unshrunk.objective


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads):
    W, gram, _ = layer(60)
    one, more = (comq_np.solve(W, gram, 3, recipe=QUICK, threads=count) for count in (1, threads))
    assert one.report.shrinkage == more.report.shrinkage > 0
    np.testing.assert_array_equal(one.codes, more.codes)
    np.testing.assert_array_equal(one.scale, more.scale)


@pytest.mark.parametrize("value", [-0.1, 1.5, "best", None, True])
def test_refused_shrinkage(value):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(np.eye(3), np.eye(3), shrinkage=value)
    assert str(error.value) == f'`shrinkage` must be "auto" or a number from 0 to 1, got {value!r}.'
