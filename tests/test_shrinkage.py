"""Shrinkage of the Gram matrix: what a given one does, and that the chosen one pays on inputs that were not seen."""

from __future__ import annotations

import itertools

import naive
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
    assert str(error.value) == f'`shrinkage` must be "auto", "nonlinear" or a number from 0 to 1, got {value!r}.'


# Nonlinear shrinkage.


def two_folds(samples, m=48, centre=0.0, problems=None, seed=0):
    """Gram of two folds of different sizes, and the inputs in each."""
    rng, gram = np.random.default_rng([samples, m, seed]), comq_np.Gram(m, problems)
    shape = (m,) if problems is None else (problems, m)
    scales = rng.lognormal(size=m)
    folds = [centre + rng.normal(size=(count, *shape)) * scales for count in (samples, samples + 30)]
    for fold, X in enumerate(folds):
        gram.update(X, fold=fold)
    return gram, folds


@pytest.mark.parametrize("recipe", ["rtn", "paper", "balanced"])
@pytest.mark.parametrize("samples", [20, 200])
@pytest.mark.parametrize("fit_bias", [False, True])
def test_nonlinear_shrinkage_equals_the_oracle(recipe, samples, fit_bias):
    gram, folds = two_folds(samples, centre=0.5)
    recipe = comq_np.recipe(recipe).replace(order="cyclic")  # the shared one is that of the given matrix
    W = np.random.default_rng(1).normal(size=(48, 32)).astype(np.float32)
    given = [X - X.mean(axis=0) * fit_bias for X in folds]
    A, B = (X.T @ X for X in given)
    shrunk = naive.nonlinearly_shrunk(A, B, *map(len, folds))
    q = comq_np.solve(W, gram, 3, recipe=recipe, fit_bias=fit_bias, shrinkage="nonlinear")
    expected = comq_np.solve(W, shrunk, 3, recipe=recipe)
    assert (q.codes == expected.codes).mean() > (0.99 if samples > 48 else 0.9)  # else null vectors may be any
    G, error = gram.centred if fit_bias else gram.matrix, W - q.dequantize()
    assert q.report.objective == pytest.approx(np.vdot(error, G @ error), rel=1e-6)
    assert q.report.relative_error == pytest.approx(np.vdot(error, G @ error) / np.vdot(W, G @ W), rel=1e-6)
    before, after = (np.linalg.eigvalsh(matrix) for matrix in (A + B, shrunk))
    lost = 1 - (after.std() / after.mean()) / (before.std() / before.mean())
    assert q.report.shrinkage == pytest.approx(lost, rel=1e-6 if samples > 48 else 0.02)


def scenes(count, seed, m=48, n=32):
    """As `layer`, for inputs in scenes of 20, like views of an image, each of which varies most in a way of its own."""
    rng = np.random.default_rng([count, m, seed])
    W, gram = rng.normal(size=(m, n)).astype(np.float32), comq_np.Gram(m)
    for scene in range(count):
        way = rng.normal(size=m) / np.sqrt(m)  # variance 1 / m in each direction, of which the scenes differ
        gram.update(rng.normal(size=(20, m)) + 5 * rng.normal(size=(20, 1)) * way, fold=scene % 2)
    return W, gram, np.eye(m) * (1 + 25 / m)


#: Error with nonlinear shrinkage, and with the chosen one, as shares of that with none, by scenes and bits.
SCENES = {
    (6, 2): (0.75, 0.77),
    (6, 4): (0.725, 0.74),
    (24, 2): (0.89, 0.9),
    (24, 4): (0.877, 0.885),
    (96, 2): (0.955, 0.958),
    (96, 4): (0.957, 0.959),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("make", [scenes, layer])
@pytest.mark.parametrize("count", [6, 24, 96])
def test_nonlinear_shrinkage_pays_on_inputs_that_were_not_seen(monkeypatch, bits, make, count):
    """Where inputs are no independent samples, more than the chosen one does; where they are, it is no worse."""
    ratios, by_least, chosen, gains = [], [], [], []
    for seed in range(8):
        problem = make(10 * count, seed=seed) if make is layer else make(count, seed)
        one, other, none = (unseen_error(*problem, bits, shrinkage=way)[0] for way in ("nonlinear", "auto", 0.0))
        with monkeypatch.context() as patch:  # what errs least of these, and nothing beyond it
            patch.setattr("comq_np.shrinkage.EQUAL", 0.0)
            patch.setattr("comq_np.shrinkage.SHRINKAGES", SHRINKAGES)
            least, _ = unseen_error(*problem, bits)
        ratios.append(one / other)
        by_least.append(one / least)
        chosen.append(other / none)
        gains.append(one / none)
    assert mean(by_least) < (1.02 if make is layer else 0.995 if count > 24 else 0.97)
    assert mean(ratios) < (1.02 if make is layer else 1)
    if make is scenes:
        assert mean(gains) < SCENES[count, bits][0]
        assert mean(chosen) < SCENES[count, bits][1]


def test_nonlinear_shrinkage_of_many_problems_is_that_of_each():
    gram, folds = two_folds(60, m=12, problems=5)
    W = np.random.default_rng(1).normal(size=(5, 12, 6)).astype(np.float32)
    q = comq_np.solve(W, gram, 3, shrinkage="nonlinear")
    for p in range(5):
        alone = comq_np.Gram(12)
        for fold, X in enumerate(folds):
            alone.update(X[:, p], fold=fold)
        one = comq_np.solve(W[p], alone, 3, shrinkage="nonlinear")
        np.testing.assert_array_equal(q.codes[p], one.codes)
        np.testing.assert_array_equal(q.scale[p], one.scale)


def test_nonlinear_shrinkage_leaves_dead_inputs_dead():
    gram, rng = comq_np.Gram(20), np.random.default_rng(0)
    X = rng.normal(size=(60, 20))
    X[:, [3, 11]] = 0.0
    gram.update(X)
    W = rng.normal(size=(20, 6)).astype(np.float32)
    q = comq_np.solve(W, gram, 4, shrinkage="nonlinear")
    assert any(note.startswith("2 of 20 inputs are always zero") for note in q.report.notes)
    live = np.delete(np.arange(20), [3, 11])
    other = comq_np.Gram(18)
    other.update(X[:, live])
    lively = comq_np.solve(W[live], other, 4, shrinkage="nonlinear")
    assert q.report.objective == pytest.approx(lively.report.objective, rel=1e-5)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter_to_nonlinear_shrinkage(threads):
    W, gram, _ = layer(60)
    one, more = (comq_np.solve(W, gram, 3, shrinkage="nonlinear", threads=count) for count in (1, threads))
    assert one.report.shrinkage == more.report.shrinkage > 0
    np.testing.assert_array_equal(one.codes, more.codes)
    np.testing.assert_array_equal(one.scale, more.scale)


@pytest.mark.parametrize(("samples", "fit_bias"), [((60, 0), False), ((1, 1), True), ((20, 1), True)])
def test_nonlinear_shrinkage_needs_two_folds(samples, fit_bias):
    """One sample does not vary, once the bias has taken up the mean."""
    W, _, _ = layer(60)
    gram, rng = comq_np.Gram(48), np.random.default_rng(0)
    for fold, count in enumerate(samples):
        gram.update(rng.normal(size=(count, 48)), fold=fold)
    one, plain = (comq_np.solve(W, gram, 3, shrinkage=way, fit_bias=fit_bias) for way in ("nonlinear", 0.0))
    assert one.report.shrinkage == 0
    np.testing.assert_array_equal(one.codes, plain.codes)
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(W, gram.matrix, shrinkage="nonlinear")
    assert str(error.value) == "`G` must be a comq_np.Gram with `shrinkage=\"nonlinear\"`, got 'ndarray'."


def test_nonlinear_shrinkage_of_an_embedding_is_the_one_of_its_counts():
    counts = comq_np.TokenCounts(5)
    counts.update([0, 0, 1, 3])
    W = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    one, other = (comq_np.solve(W, counts, 3, shrinkage=way) for way in ("nonlinear", "auto"))
    assert one.report.shrinkage == other.report.shrinkage > 0
    np.testing.assert_array_equal(one.codes, other.codes)


@pytest.mark.parametrize("codebook", ["uniform", "planes"])
def test_files_are_solved_with_nonlinear_shrinkage(tmp_path, codebook):
    W, gram, _ = layer(60)
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("fc", W, gram))
    options = {"shrinkage": "nonlinear", "codebook": codebook}
    reports = comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 3, **options)
    q = comq_np.solve(W, gram, 3, **options)
    assert reports["fc"].shrinkage == q.report.shrinkage > 0
    assert all(one.matches for one in comq_np.verify_file(tmp_path / "c.h5", tmp_path / "q.h5"))
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        np.testing.assert_array_equal(file["fc"].codes, q.codes)


def test_matched_weights_are_solved_with_nonlinear_shrinkage():
    """What is solved for quantized inputs is what is solved for the plain Gram and the weights that match."""
    W, _, _ = layer(60)
    gram, rng = comq_np.CrossGram(48, grid=comq_np.ActivationGrid(0.05, 7, 4)), np.random.default_rng(0)
    gram.update(rng.normal(size=(100, 48)))
    plain, cross = gram.problem()
    q, expected = (
        comq_np.solve(W, G, 3, shrinkage="nonlinear", **rest) for G, rest in ((gram, {}), (plain, {"cross": cross}))
    )
    np.testing.assert_array_equal(q.codes, expected.codes)
    assert q.report.shrinkage > 0
