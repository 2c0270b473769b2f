"""Embeddings: how often each token came up, and the solve with that as a diagonal Gram matrix."""

from __future__ import annotations

import numpy as np
import pytest
from edits import editing
from hypothesis import given, settings
from hypothesis import strategies as st

import comq_np
from comq_np.cli import main

OPTIONS = [
    {},
    {"group_size": 7},
    {"group_size": "tensor"},
    {"symmetric": True},
    {"zero_point": "real"},
    {"zero_point": "real", "group_size": 10},
    {"levels": 3},
    {"scale_dtype": "float16"},
    {"scale": 0.11},
    {"scale": 0.11, "zero_point": 2.5},
]


@pytest.fixture
def embedding():
    """Weights of 40 tokens, and how often they came up: some never."""
    rng = np.random.default_rng(0)
    tokens = comq_np.TokenCounts(40)
    tokens.update(np.minimum(rng.zipf(1.5, size=500), 35) - 1)
    return rng.standard_t(4, size=(40, 9)).astype(np.float32), tokens


def objective(q, W, counts):
    return float(counts @ np.square(W.astype(np.float64) - q.dequantize()).sum(axis=1))


def test_counts():
    tokens = comq_np.TokenCounts(5)
    tokens.update(np.array([[0, 1], [4, 4], [1, 1]], np.int16))
    np.testing.assert_array_equal(tokens.counts, [1, 3, 0, 0, 2])
    assert (tokens.count, len(tokens), repr(tokens)) == (6, 5, "TokenCounts(5, count=6)")
    first, second = tokens.folds
    np.testing.assert_array_equal(first.counts, [1, 1, 0, 0, 2])
    np.testing.assert_array_equal(second.counts, [0, 2, 0, 0, 0])
    assert (first.count, second.count) == (4, 2)
    tokens.update([3], fold=0)
    tokens.update([])
    assert tokens.folds[0].count == 5
    again = comq_np.TokenCounts.from_folds(tuple(fold.counts for fold in tokens.folds))
    again.merge(tokens)
    np.testing.assert_array_equal(again.counts, 2 * tokens.counts)
    np.testing.assert_array_equal(tokens.counts, [1, 3, 0, 1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: comq_np.TokenCounts(0), "`m` must be an integer from 1 to 2147483647, got 0."),
        (lambda: comq_np.TokenCounts(3).update([3]), "`tokens` must lie from 0 to 2, got 3 to 3."),
        (lambda: comq_np.TokenCounts(3).update([0, -1]), "`tokens` must lie from 0 to 2, got -1 to 0."),
        (lambda: comq_np.TokenCounts(3).update([1.0]), "`tokens` must hold integers, got dtype float64."),
        (lambda: comq_np.TokenCounts(3).update([1], fold=2), "`fold` must be an integer from 0 to 1, got 2."),
        (
            lambda: comq_np.TokenCounts(3).merge(comq_np.TokenCounts(4)),
            "`other` must be TokenCounts of 3 tokens, got of 4.",
        ),
        (lambda: comq_np.TokenCounts(3).merge(comq_np.Gram(3)), "`other` must be TokenCounts of 3 tokens, got 'Gram'."),
        (
            lambda: comq_np.TokenCounts.from_folds(([1], [1, 2])),
            "`folds` must be two arrays of integers of one shape (m,).",
        ),
        (
            lambda: comq_np.TokenCounts.from_folds(([1.0], [1.0])),
            "`folds` must be two arrays of integers of one shape (m,).",
        ),
        (
            lambda: comq_np.TokenCounts.from_folds(([1], [-1])),
            "`folds` must hold integers from 0 to 9007199254740992.",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(comq_np.InputError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fit_bias": True},
            "`G` must be a comq_np.Gram, which knows the mean of the inputs, with `fit_bias`, got 'TokenCounts'.",
        ),
        ({"backend": "cuda"}, '`backend` must be "cpu" or "auto" with TokenCounts, and `W` an array of NumPy.'),
        ({"cross": np.eye(40)}, "`cross` must be None with TokenCounts, whose inputs no quantized layer changes."),
        ({"overwrite": True}, "`G` must be an array of float32 or float64 with `overwrite`"),
        (
            {"W": np.ones((3, 40, 2))},
            "`W` must have shape (m, n) with TokenCounts, which are of one problem, got (b, m, n).",
        ),
        ({"W": np.ones((39, 2))}, "`G` must be of 39 tokens, as `W` has rows, is TokenCounts of 40."),
        ({"G": comq_np.TokenCounts(40)}, "`G` must have seen inputs, got TokenCounts with count 0."),
    ],
)
def test_solve_refuses(embedding, options, message):
    W, tokens = embedding
    with pytest.raises(comq_np.InputError) as error:
        comq_np.solve(**{"W": W, "G": tokens, **options})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("recipe", ["rtn", "paper", "fast", "balanced", "best"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_worse_than_the_dense_matrix(embedding, recipe, options):
    W, tokens = embedding
    q = comq_np.solve(W, tokens, 3, recipe=recipe, shrinkage=0, **options)
    dense = comq_np.solve(W, np.diag(tokens.counts.astype(float)), 3, recipe=recipe, **options)
    assert q.report.objective == pytest.approx(objective(q, W, tokens.counts), rel=1e-9)
    assert q.report.objective <= q.report.objective_rounding * (1 + 1e-9)
    assert q.report.objective_rounding == pytest.approx(dense.report.objective_rounding, rel=1e-5)
    assert q.report.objective <= 1.05 * dense.report.objective  # local minima both
    if recipe == "rtn":
        np.testing.assert_array_equal(q.codes, dense.codes)


@pytest.mark.parametrize("recipe", ["fast", "balanced", "best"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_are_the_nearest_at_their_scales(embedding, recipe, options):
    W, tokens = embedding
    q = comq_np.solve(W, tokens, 3, recipe=recipe, **options)
    size = q.group_size if isinstance(q.group_size, int) else len(W)
    scale, zero_point = (values[np.arange(len(W)) // size] for values in (q.scale.astype(float), q.zero_point))
    here = np.abs(q.dequantize() - W)
    for step in (-1, 1):
        codes = q.codes.astype(int) + step
        there = np.where((codes < 0) | (codes >= q.levels), np.inf, np.abs(scale * (codes - zero_point) - W))
        assert (here <= there + 1e-6).all()


def test_the_scale_is_the_best_of_its_codes(embedding):
    W, tokens = embedding
    q = comq_np.solve(W, tokens, 3)
    weight = tokens.counts + 1.0  # every token once more
    steps = q.codes - q.zero_point.astype(float)
    best = (weight[:, None] * steps * W).sum(axis=0) / (weight[:, None] * steps**2).sum(axis=0)
    np.testing.assert_allclose(q.scale[0], best, rtol=1e-5)
    assert q.report.shrinkage == pytest.approx(40 / 540)


def test_tokens_that_never_came_up_keep_their_place(embedding):
    W, tokens = embedding
    W = W.copy()
    W[36:] *= 20  # would be clipped, if they did not count
    unseen = np.flatnonzero(tokens.counts == 0)
    errors = []
    for shrinkage in ("auto", 0):
        q = comq_np.solve(W, tokens, 4, shrinkage=shrinkage)
        errors.append(np.square(W - q.dequantize())[unseen].sum())
    assert errors[0] < 0.5 * errors[1]


def test_the_same_bits_for_any_number_of_threads():
    rng = np.random.default_rng(0)
    W, tokens = rng.normal(size=(5000, 600)).astype(np.float32), comq_np.TokenCounts(5000)
    tokens.update(rng.integers(0, 5000, 9000))
    one, two = (comq_np.solve(W, tokens, 4, recipe="fast", threads=threads) for threads in (1, 2))
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_files(embedding, tmp_path, capsys):
    W, tokens = embedding
    rng = np.random.default_rng(0)
    gram = comq_np.Gram(9)
    gram.update(rng.normal(size=(50, 9)))
    paths = [tmp_path / name for name in ("a.h5", "b.h5")]
    for path in paths:
        with comq_np.CalibrationWriter(path) as file:
            file.add(comq_np.Layer("embed", W, tokens, kind="embedding"))
            file.add(comq_np.Layer("head", W.T @ W, gram))
    with comq_np.CalibrationFile(paths[0]) as file:
        found = file["embed"]
        for one, other in zip(found.gram.folds, tokens.folds, strict=True):
            np.testing.assert_array_equal(one.counts, other.counts)
        assert [row["diagonal"] for row in file.describe()] == [True, False]
    merged, quantized = tmp_path / "merged.h5", tmp_path / "q.h5"
    comq_np.merge_files(paths, merged)
    with comq_np.CalibrationFile(merged) as file:
        np.testing.assert_array_equal(file["embed"].gram.counts, 2 * tokens.counts)
    reports = comq_np.quantize_file(paths[0], quantized, 4, workers=2)
    q = comq_np.solve(W, tokens, 4)
    with comq_np.QuantizedFile(quantized) as file:
        np.testing.assert_array_equal(file["embed"].codes, q.codes)
    assert reports["embed"].objective == q.report.objective
    assert all(layer.matches for layer in comq_np.verify_file(paths[0], quantized))
    assert main(["info", str(paths[0])]) == 0
    assert "embedding" in capsys.readouterr().out


def test_a_wide_table_is_not_divided(tmp_path):
    rng = np.random.default_rng(0)
    tokens = comq_np.TokenCounts(3)
    tokens.update(rng.integers(0, 3, 50))
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("embed", rng.normal(size=(3, 17_000)), tokens, kind="embedding"))
    reports = comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 2, recipe="fast")
    assert (list(reports), reports.kept) == (["embed"], {})


def test_a_file_of_its_own(embedding, tmp_path, capsys):
    _, tokens = embedding
    comq_np.save_gram(tmp_path / "g.h5", tokens)
    np.testing.assert_array_equal(comq_np.load_gram(tmp_path / "g.h5").counts, tokens.counts)
    assert main(["info", str(tmp_path / "g.h5")]) == 0
    assert "500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("grams/0/fold0/counts", -1, "`folds` must hold integers from 0"),
        ("grams/0/fold1/counts", 10_000, "must have a `count` of"),
    ],
)
def test_broken_counts(embedding, tmp_path, place, value, reason):
    W, tokens = embedding
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("embed", W, tokens, kind="embedding"))
    with editing(tmp_path / "c.h5") as file:
        file[place][0] = value
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file, pytest.raises(comq_np.FileError, match=reason):
        file["embed"]


def test_an_embedding_has_no_bias(embedding, tmp_path):
    W, tokens = embedding
    with (
        comq_np.CalibrationWriter(tmp_path / "c.h5") as file,
        pytest.raises(comq_np.InputError, match="layer 'embed': `bias` must be None with TokenCounts"),
    ):
        file.add(comq_np.Layer("embed", W, tokens, np.zeros(9)))


def test_not_merged_with_a_gram_of_another_kind(embedding, tmp_path):
    W, tokens = embedding
    for name, gram in (("a.h5", tokens), ("b.h5", comq_np.Gram(40))):
        with comq_np.CalibrationWriter(tmp_path / name) as file:
            file.add(comq_np.Layer("embed", W, gram, kind="embedding"))
    with pytest.raises(comq_np.FileError, match=r"b\.h5: layer 'embed' must have a Gram of the kind that it has in "):
        comq_np.merge_files([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "c.h5")


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(2, 9),
    st.sampled_from(["paper", "fast", "balanced"]),
    st.integers(0, 2**32 - 1),
)
def test_any_embedding(m, n, levels, recipe, seed):
    rng = np.random.default_rng(seed)
    W, tokens = rng.normal(size=(m, n)) * 10.0 ** rng.integers(-3, 3), comq_np.TokenCounts(m)
    tokens.update(rng.integers(0, m, 5))
    q = comq_np.solve(W, tokens, levels=levels, recipe=recipe)
    rounded = comq_np.solve(W, tokens, levels=levels, recipe="rtn")
    assert objective(q, W, tokens.counts) <= objective(rounded, W, tokens.counts) * (1 + 1e-5) + 1e-12
