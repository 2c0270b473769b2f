"""What is refused, and the exact words: the argument, what it must be, and what it is."""

from __future__ import annotations

import numpy as np
import pytest

import comq_np
from comq_np import checks

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 4)).astype(np.float32)
X = RNG.normal(size=(20, 6))
G = X.T @ X


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


def refused(message, call, *args, **kwargs):
    with pytest.raises(comq_np.InputError) as error:
        call(*args, **kwargs)
    assert str(error.value) == message


def test_input_error_is_a_value_error():
    assert issubclass(comq_np.InputError, ValueError)
    assert issubclass(comq_np.FileError, ValueError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (changed(W, (2, 1), np.nan), "`W` must be finite, got 1 NaN or infinite of 24 entries, the first at (2, 1)."),
        (
            changed(W, ([0, 5], [3, 0]), [np.inf, -np.inf]),
            "`W` must be finite, got 2 NaN or infinite of 24 entries, the first at (0, 3).",
        ),
        (np.full(6, np.nan), "`W` must be finite, got 6 NaN or infinite of 6 entries, the first at (0,)."),
        (W[None], "`G` must have shape (1, 6, 6) to match `W` with 6 rows in 1 matrix, got (6, 6)."),
        (np.float32(3), "`W` must be 1-D, 2-D or 3-D, got 0-D of shape ()."),
        (W[:0], "`W` must not be empty, got shape (0, 4)."),
        (W[:, :0], "`W` must not be empty, got shape (6, 0)."),
        (W.astype(complex), "`W` must hold real numbers, got dtype complex128."),
        (W > 0, "`W` must hold real numbers, got dtype bool."),
        (np.full((6, 4), "a"), "`W` must hold real numbers, got dtype <U1."),
        (None, "`W` must hold real numbers, got dtype object."),
        (changed(W.astype(np.float64), (0, 0), -1e200), "`W` must lie within ±1e+30, got an entry of size 1e+200."),
    ],
)
def test_weights(value, message):
    refused(message, comq_np.solve, value, G)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (G[:5, :5], "`G` must have shape (6, 6) to match `W` with 6 rows, got (5, 5)."),
        (np.eye(512), "`G` must have shape (6, 6) to match `W` with 6 rows, got (512, 512)."),
        (X, "`G` must have shape (6, 6) to match `W` with 6 rows, got (20, 6)."),
        (np.diag(G), "`G` must be 2-D, got 1-D of shape (6,)."),
        (G[None], "`G` must be 2-D, got 3-D of shape (1, 6, 6)."),
        (changed(G, (1, 4), np.nan), "`G` must be finite, got 1 NaN or infinite of 36 entries, the first at (1, 4)."),
        (G.astype(complex), "`G` must hold real numbers, got dtype complex128."),
        (
            changed(np.eye(6), (3, 3), -0.5),
            "`G` must have no negative diagonal entry, got G[3, 3] = -0.5.",
        ),
        (changed(np.eye(6), (1, 4), 0.5), "`G` must be symmetric, got G[1, 4] = 0.5 and G[4, 1] = 0."),
        (
            changed(np.eye(6), ([2, 2, 0], [2, 0, 2]), [0, 0.25, 0.25]),
            (
                "`G` must be a Gram matrix: row 2 has a zero on the diagonal, so all of it must be zero, "
                "got an entry of size 0.25."
            ),
        ),
    ],
)
def test_gram_matrix(value, message):
    refused(message, comq_np.solve, W, value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "at", [(0, 1), (5, 2), (255, 256), (511, 3), (300, 400), (510, 509), (256, 515), (513, 512), (514, 515)]
)
def test_one_entry_that_is_not_its_mirror_image_is_found(at, dtype, order):
    (i, k), one = sorted(at), np.ones((516, 1))
    made = np.array(changed(np.eye(516), at, 0.5), dtype, order=order)
    message = f"`G` must be symmetric, got G[{i}, {k}] = {made[i, k]:g} and G[{k}, {i}] = {made[k, i]:g}."
    refused(message, comq_np.solve, one, made, recipe="rtn")
    made[at] = np.nan
    message = f"`G` must be finite, got 1 NaN or infinite of {made.size} entries, the first at {at}."
    refused(message, comq_np.solve, one, made, recipe="rtn")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_of_either_sign_are_mirror_images(dtype):
    G, W = np.eye(300, dtype=dtype), np.linspace(-1, 2, 300)[:, None]
    plain, found = (comq_np.solve(W, made, recipe="rtn") for made in (G, changed(G, (7, 280), -0.0)))
    assert np.array_equal(found.codes, plain.codes)
    assert found.report.objective == plain.report.objective


@pytest.mark.parametrize("bits", [0, 17, -1, 32, 4.0, "4", None, True])
def test_bits(bits):
    refused(f"`bits` must be an integer from 1 to 16, got {bits!r}.", comq_np.solve, W, G, bits)


@pytest.mark.parametrize("levels", [1, 0, 65537, -3, 3.0, "3", True])
def test_levels(levels):
    refused(f"`levels` must be an integer from 2 to 65536, got {levels!r}.", comq_np.solve, W, G, levels=levels)


@pytest.mark.parametrize("size", [0, -1, 1.5, "column", "Tensor", True, (128,)])
def test_group_size(size):
    message = f'`group_size` must be None, "tensor" or an integer of at least 1, got {size!r}.'
    refused(message, comq_np.solve, W, G, group_size=size)


@pytest.mark.parametrize("recipe", ["gptq", "", None, 3, "Paper"])
def test_recipe(recipe):
    message = f"`recipe` must be one of 'paper', 'rtn', 'fast', 'balanced', 'best', got {recipe!r}."
    refused(message, comq_np.solve, W, G, recipe=recipe)
    refused(message, comq_np.recipe, recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "random"}, "`order` must be one of 'greedy', 'shared', 'cyclic', 'pivoted', got 'random'."),
        ({"order": None}, "`order` must be one of 'greedy', 'shared', 'cyclic', 'pivoted', got None."),
        ({"sweeps": -1}, "`sweeps` must be an integer from 0 to 10000, got -1."),
        ({"sweeps": 2.5}, "`sweeps` must be an integer from 0 to 10000, got 2.5."),
        ({"refit": 1}, "`refit` must be True, False or 'ends', got 1."),
        ({"grids": ("float",)}, "`grids` must be one of 'paper', 'minmax', 'shrunk', got 'float'."),
        ({"grids": "paper"}, "`grids` must be a tuple of at least one of ('paper', 'minmax', 'shrunk'), got 'paper'."),
        ({"grids": ()}, "`grids` must be a tuple of at least one of ('paper', 'minmax', 'shrunk'), got ()."),
        ({"start": "gptq"}, "`start` must be one of 'float', 'rounding', 'gram', 'babai', 'bitsplit', got 'gptq'."),
        ({"leaps": -1}, "`leaps` must be an integer from 0 to 1000, got -1."),
        ({"moves": 0}, "`moves` must be a number from 1e-06 to 1000, got 0."),
        ({"trial": -1}, "`trial` must be a number from 0 to 1000, got -1."),
        ({"exact": 65}, "`exact` must be an integer from 0 to 64, got 65."),
        ({"start": "babai", "order": "shared", "damping": 2}, "`damping` must be a number from 0 to 1, got 2."),
        ({"search": 1}, "`search` needs `start` 'babai', got 'float'."),
        ({"promise": 1.5}, "`promise` must be a number from 0 to 1, got 1.5."),
        (
            {"step": 1},
            (
                "`field` must be one of 'name', 'grids', 'order', 'start', 'damping', 'other_orders', 'paths', "
                "'search', 'promise', 'neighbours', 'sweeps', 'refit', 'trial', 'leaps', 'moves', 'leap_rows', "
                "'exact', 'rounds', got 'step'."
            ),
        ),
    ],
)
def test_recipe_fields(change, message):
    refused(message, comq_np.recipe("paper").replace, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": 0}, "`paths` must be an integer from 1 to 64, got 0."),
        ({"paths": 65}, "`paths` must be an integer from 1 to 64, got 65."),
        (
            {"other_orders": "cyclic"},
            "`other_orders` must be a tuple of ('shared', 'cyclic', 'pivoted'), got 'cyclic'.",
        ),
        ({"other_orders": ("greedy",)}, "`other_orders` must be one of 'shared', 'cyclic', 'pivoted', got 'greedy'."),
        (
            {"order": "greedy"},
            "`order` must be one of ('shared', 'cyclic', 'pivoted') with `start` 'babai', got 'greedy'.",
        ),
        ({"start": "gram", "search": 0, "paths": 4}, "`paths` needs `start` 'babai', got 'gram'."),
        (
            {"start": "gram", "search": 0, "other_orders": ("cyclic",)},
            "`other_orders` needs `start` 'babai', got 'gram'.",
        ),
        ({"start": "rounding"}, "`search` needs `start` 'babai', got 'rounding'."),
    ],
)
def test_recipe_fields_of_a_pass(change, message):
    refused(message, comq_np.recipe("balanced").replace, **change)


@pytest.mark.parametrize("name", ["symmetric", "fit_bias"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_switches(name, value):
    refused(f"`{name}` must be True or False, got {value!r}.", comq_np.solve, W, G, **{name: value})


def test_zero_point_without_a_scale():
    message = '`zero_point` must be "integer" or "real" without `scale`, got numbers.'
    refused(message, comq_np.solve, W, G, zero_point=3)
    message = '`zero_point` must be "integer" with `symmetric`, which fixes it, got numbers.'
    refused(message, comq_np.solve, W, G, zero_point=3, scale=1.0, symmetric=True)
    refused("`zero_point` must be one of 'integer', 'real', got 'any'.", comq_np.solve, W, G, zero_point="any")
    message = "`zero_point` must lie within ±1073741824, got 1e+10."
    refused(message, comq_np.solve, W, G, zero_point=1e10, scale=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, 1e60])
def test_scale(value):
    message = f"`scale` must be positive and a normal float32 number, got {value:g}."
    refused(message, comq_np.solve, W, G, scale=value)


def test_scales_that_do_not_fit():
    message = "`scale` must be a number or an array of shape (1, 4), one for each group and column, got shape (3,)."
    refused(message, comq_np.solve, W, G, scale=[1.0, 2.0, 3.0])
    message = '`scale` must be one number with `group_size="tensor"`, got 4 different ones.'
    refused(message, comq_np.solve, W, G, scale=[[1.0, 2.0, 3.0, 4.0]], group_size="tensor")


def test_a_bias_beyond_float32():
    gram = comq_np.Gram(2)
    gram.update(np.random.default_rng(0).normal(1e16, 1e16, size=(9, 2)))
    message = r"`G` and `W` must be smaller with `fit_bias`: the bias must fit in float32, got \S+\."
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.solve(np.array([[1.0], [0.7]]) * 1e25, gram, 1, fit_bias=True)


def test_rounding_below_zero_is_zero():
    """One sample in float32: a matrix of rank one, up to rounding, on which descent finds next to no error."""
    X = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    report = comq_np.solve(np.random.default_rng(1).normal(size=(40, 8)), X.T @ X, 4).report
    assert report.objective >= 0
    assert report.relative_error >= 0


def test_the_largest_numbers(problem):
    q, same = comq_np.solve(W, G / G.max() * 1.7e308), comq_np.solve(W, G)
    assert np.isfinite(q.report.objective)
    assert (q.codes == same.codes).mean() > 0.9


def test_numpy_numbers_are_numbers():
    options = {"group_size": np.int32(4), "symmetric": np.bool_(True), "threads": np.uint8(1), "scale": np.float32(0.5)}
    q = comq_np.solve(W, G, np.int64(3), **options)
    assert (q.bits, type(q.bits), q.group_size, type(q.group_size)) == (3, int, 4, int)
    assert comq_np.solve(W, G, levels=np.int64(3)).levels == 3


@pytest.mark.parametrize(
    ("value", "size"),
    [(1, 1), (np.int64(4096), 4096), ("512", 512), ("500 MB", 500_000_000), ("4GiB", 2**32), (" 1.5 kib ", 1536)],
)
def test_sizes(value, size):
    assert checks.bytes_of("memory", value) == size


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "", "GiB", "4 G", "-1 MB", "0.1", "1e9", "9" * 400])
def test_refused_sizes(value):
    what = '`memory` must be a positive number of bytes, an integer or a text such as "4GiB" or "500 MB", got'
    refused(f"{what} {value!r}.", checks.bytes_of, "memory", value)
