"""Plans for calibration: every layer once, those that share a Gram together, and never more memory than there is."""

from __future__ import annotations

import re

import numpy as np
import pytest

import comq_np

BLOCK = {"q": (64, 64), "k": (64, 64), "v": (64, 64), "out": (64, 64), "fc1": (64, 256), "fc2": (256, 64)}
SHAPES = {f"{number}.{name}": shape for number in range(12) for name, shape in BLOCK.items()}
SHARED = [[f"{number}.{name}" for name in "vkq"] for number in range(12)]


def least(shapes=SHAPES, shared=SHARED):
    """What the plan needs for the largest Gram alone."""
    with pytest.raises(comq_np.InputError) as caught:
        comq_np.plan_calibration(shapes, 1, shared=shared)
    return float(re.search(r"must be at least (\d+\.\d) MB", str(caught.value))[1])


@pytest.mark.parametrize("over", [0, 0.5, 1, 3, 6, 100])
def test_every_layer_is_in_one_pass_with_those_that_share_its_gram(over):
    memory = int((least() + over) * 1e6)
    plan = comq_np.plan_calibration(SHAPES, memory, shared=SHARED)
    places = {name: number for number, part in enumerate(plan.passes) for name in part.layers}
    assert sorted(name for part in plan.passes for name in part.layers) == sorted(SHAPES)
    assert all(list(part.layers) == [name for name in SHAPES if name in part.layers] for part in plan.passes)
    assert all(len({places[name] for name in names}) == 1 for names in SHARED)
    for part in plan.passes:
        alone = {tuple(names) for names in SHARED if set(names) <= set(part.layers)}
        lone = [name for name in part.layers if not any(name in names for names in alone)]
        grams = [comq_np.Gram(SHAPES[name][0]) for name in [*(names[0] for names in alone), *lone]]
        assert part.grams == len(grams)
        assert part.gram_bytes == sum(gram.nbytes for gram in grams)
        assert part.gram_bytes < part.memory <= memory
        assert part.spare == memory - part.memory


def test_more_memory_takes_fewer_passes_and_enough_takes_one():
    start = int(least() * 1e6)
    counts = [
        len(comq_np.plan_calibration(SHAPES, start + step, shared=SHARED).passes)
        for step in range(0, 16 * 10**6, 10**5)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3
    assert counts[-1] == 1
    (whole,) = comq_np.plan_calibration(SHAPES, shared=SHARED).passes
    assert whole.spare is None
    assert len(comq_np.plan_calibration(SHAPES, whole.memory, shared=SHARED).passes) == 1
    assert len(comq_np.plan_calibration(SHAPES, whole.memory - 1, shared=SHARED).passes) == 2


def test_what_is_written_of_a_wide_layer_counts():
    narrow, wide = (comq_np.plan_calibration({"head": (8, n)}).passes[0].memory for n in (1, 10**6))
    assert wide >= 4 * 8 * 10**6 > narrow


def test_a_gram_says_what_it_takes():
    gram = comq_np.Gram(5)
    assert gram.nbytes == sum(fold.matrix.nbytes + fold.sum.nbytes for fold in gram.folds)


@pytest.mark.parametrize("problems", [1, 40])
def test_groups_take_a_gram_each(problems):
    gram = comq_np.Gram(50, problems=problems)
    (only,) = comq_np.plan_calibration({"groups": (problems, 50, 3)}).passes
    assert only.grams == 1
    assert only.gram_bytes == gram.nbytes == problems * comq_np.Gram(50).nbytes
    assert only.memory > only.gram_bytes


def test_texts_as_memory():
    plans = [comq_np.plan_calibration(SHAPES, memory, shared=SHARED) for memory in ("8 MB", 8_000_000, np.int64(8e6))]
    assert plans[0] == plans[1] == plans[2]


def test_the_text_of_a_plan_says_what_a_person_must_know():
    shapes = {"a": (300, 2), "b": (300, 2), "c": (200, 2)}
    text = str(comq_np.plan_calibration(shapes, "11 MB", shared=[["a", "b"]]))
    assert text.splitlines() == [
        "3 layers with 2 Grams of 2.1 MB in 1 pass over the batches:",
        "  pass 1: 3 layers, 2 Grams of 2.1 MB, at most 10.3 MB",
    ]


@pytest.mark.parametrize(
    ("shapes", "memory", "shared", "message"),
    [
        ({"a": (0, 2)}, None, [], "layer 'a': `m` must be an integer from 1 to 2147483647, got 0."),
        ({"a": (2, 2.5)}, None, [], "layer 'a': `n` must be an integer from 1 to 2147483647, got 2.5."),
        ({"a": (0, 3, 2)}, None, [], "layer 'a': `b` must be an integer from 1 to 2147483647, got 0."),
        ({"a": (2,)}, None, [], "layer 'a': `shapes` must have (m, n) or (b, m, n), got (2,)."),
        ({"a": 2}, None, [], "layer 'a': `shapes` must have (m, n) or (b, m, n), got 2."),
        ({"a": (2, 2)}, None, [["b"]], "`shared` must name layers in `shapes` once, got 'b', which it lacks."),
        ({"a": (2, 2)}, None, [["a"], ["a"]], "`shared` must name layers in `shapes` once, got 'a', twice."),
        ({"a": (2, 2)}, None, [["a", "a"]], "`shared` must name layers in `shapes` once, got 'a', twice."),
        (
            {"a": (2, 2), "b": (3, 2)},
            None,
            [["a", "b"]],
            "`shared` must name layers with as many rows, got 'a' with 2 and 'b' with 3.",
        ),
        (
            {"a": (4, 2, 1), "b": (2, 1)},
            None,
            [["a", "b"]],
            "`shared` must name layers with as many rows, got 'a' with 4 x 2 and 'b' with 2.",
        ),
        ({"a": (300, 2)}, "8 MB", [], "`memory` must be at least 8.2 MB for layer 'a' with 300 rows, got '8 MB'."),
        (
            {"a": (2, 2)},
            0,
            [],
            '`memory` must be a positive number of bytes, an integer or a text such as "4GiB" or "500 MB", got 0.',
        ),
    ],
)
def test_what_is_refused(shapes, memory, shared, message):
    with pytest.raises(comq_np.InputError) as caught:
        comq_np.plan_calibration(shapes, memory, shared=shared)
    assert str(caught.value) == message


def test_no_layers_take_no_pass():
    assert comq_np.plan_calibration({}).passes == ()


def test_tables_take_the_bytes_of_their_counts():
    (part,) = comq_np.plan_calibration({"table": (30_000, 64), "again": (30_000, 8)}, counted=["table", "again"]).passes
    assert part.gram_bytes == 2 * comq_np.TokenCounts(30_000).nbytes
    assert part.memory == part.gram_bytes + 4 * 30_000 * 64
