"""Bits of each layer within a size: against all allocations one by one, and by the files that come of them."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import comq_np
from comq_np.cli import main

SHAPES = {"body": (24, 10), "blocks[0].fc": (40, 7), "blocks0.fc": (9, 12), "head": (6, 3)}


@st.composite
def curves(draw, layers=4, widths=4):
    """Curves of a few layers; their errors need not fall with the bits."""
    sizes, errors = st.integers(1, 12), st.sampled_from([0.0, 1e-6, 1e-3, 0.01, 0.011, 0.1, 0.5, 1.0, 7.0, math.inf])
    points = st.dictionaries(st.integers(2, 8), st.tuples(sizes, errors), min_size=1, max_size=widths)
    return {f"layer{k}": draw(points) for k in range(draw(st.integers(1, layers)))}


def allocated(curves, total, sensitivities=None):
    """Allocation of so many bytes to layers of 64 weights each."""
    return comq_np.Allocation(total / len(curves) / 8, curves, dict.fromkeys(curves, 64), sensitivities)


def every_choice(curves, sensitivities=None):
    """Bytes and cost of all allocations, one by one."""
    for choice in itertools.product(*(points.values() for points in curves.values())):
        weighted = zip(curves, choice, strict=True)
        costs = [(sensitivities or {}).get(name, 1.0) * min(error, 1.0) for name, (_, error) in weighted]
        yield sum(size for size, _ in choice), math.fsum(costs)


@given(curves(), st.integers(0, 48), st.one_of(st.none(), st.lists(st.floats(0, 1e6), min_size=4, max_size=4)))
def test_no_allocation_within_the_budget_is_better(curves, total, given):
    sensitivities = None if given is None else dict(zip(curves, given, strict=False))
    least = min(size for size, _ in every_choice(curves))
    if least > total:
        with pytest.raises(
            comq_np.InputError, match=f"at least {math.ceil(8e4 * least / len(curves) / 64) / 1e4:g}, as"
        ):
            allocated(curves, total, sensitivities)
        return
    plan = allocated(curves, total, sensitivities)
    assert plan.bytes == sum(curves[name][plan[name]][0] for name in curves) <= total
    best = min(cost for size, cost in every_choice(curves, sensitivities) if size <= total)
    assert plan.error == pytest.approx(best, rel=1e-9, abs=1e-300)


@settings(max_examples=50)
@given(curves(layers=12), st.integers(12, 140), st.integers(0, 30))
def test_more_room_never_costs(curves, total, more):
    least = sum(min(size for size, _ in points.values()) for points in curves.values())
    small, large = (allocated(curves, max(least, room)) for room in (total, total + more))
    assert large.error <= small.error * (1 + 1e-9)


def test_many_layers_of_many_sizes():
    rng = np.random.default_rng(0)
    curves = {
        str(k): {bits: (int(rows * bits), float(4.0**-bits * rng.uniform(0.5, 2))) for bits in range(2, 9)}
        for k, rows in enumerate(rng.integers(1_000, 1_000_000, size=150))
    }
    weights = {name: points[8][0] for name, points in curves.items()}
    plan = comq_np.Allocation(3.7, curves, weights)
    assert plan.stored_bits <= 3.7
    # What Lagrange's multiplier says is possible at all is a bound, which so many layers come close to.
    bound = max(
        sum(min(error + price * size for size, error in points.values()) for points in curves.values())
        - price * math.floor(3.7 * sum(weights.values()) / 8)
        for price in np.geomspace(1e-12, 1e-6, 2000)
    )
    assert bound <= plan.error <= bound * 1.001


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("allocation") / "c.h5", np.random.default_rng(3)
    with comq_np.CalibrationWriter(path) as file:
        for name, (m, n) in SHAPES.items():
            gram = comq_np.Gram(m)
            gram.update(rng.normal(size=(300, m)) @ rng.normal(size=(m, m)) + rng.normal(size=m))
            bias = rng.normal(size=n).astype(np.float32) if name == "body" else None
            file.add(comq_np.Layer(name, rng.normal(size=(m, n)).astype(np.float32), gram, bias))
        file.skip("rnn", "no adapter takes recurrent layers apart.")
    return path


def arrays_in(path):
    with comq_np.QuantizedFile(path) as file:
        return {row["layer"]: (row["bits"], row["bytes"], row["relative_error"]) for row in file.describe()}


@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 8, "zero_point": "real"}, {"scale_dtype": "float16"}, {"codebook": "planes", "group_size": 16}],
)
def test_the_file_is_what_the_plan_says(calibration, tmp_path, options):
    plan = comq_np.allocate_bits(calibration, 12, bits=[2, 5], **options)
    uniform = {}
    for bits in (2, 5):
        comq_np.quantize_file(calibration, tmp_path / "u.h5", bits, **options)
        uniform[bits] = arrays_in(tmp_path / "u.h5")
    for name in SHAPES:
        assert plan.curves[name] == {bits: found[name][1:] for bits, found in uniform.items()}
    least = plan.within(8 * sum(size for _, size, _ in uniform[2].values()) / sum(m * n for m, n in SHAPES.values()))
    assert set(least.values()) == {2}
    for budget in (5.5, 6.5, 8.0, 12.0):
        try:
            some = plan.within(budget)
        except comq_np.InputError:
            assert budget < least.stored_bits
            continue
        comq_np.quantize_file(calibration, tmp_path / "q.h5", some, **options)
        found = arrays_in(tmp_path / "q.h5")
        assert {name: bits for name, (bits, *_) in found.items()} == {
            name.replace("[[]", "["): bits for name, bits in some.items()
        }
        assert sum(size for _, size, _ in found.values()) == some.bytes <= budget * sum(some.weights.values()) / 8
        assert some.error == pytest.approx(sum(error for *_, error in found.values()))


def test_what_is_sensitive_gets_more_bits(calibration):
    options = {"recipe": "fast", "shrinkage": 0.01, "bits": [2, 3, 4, 6]}
    plain = comq_np.allocate_bits(calibration, 7.5, **options)
    counted = comq_np.allocate_bits(calibration, 7.5, **options, sensitivities={"*": 0.0, "*fc": 1.0})
    chosen = ("blocks[[]0].fc", "blocks0.fc")
    assert sum(counted[name] for name in chosen) > sum(plain[name] for name in chosen)
    assert counted["body"] == counted["head"] == 2
    assert counted.error < sum(plain.describe(name)["relative_error"] for name in ("blocks[0].fc", "blocks0.fc"))


def test_fixed_layers_count_in_the_budget(calibration):
    plan = comq_np.allocate_bits(calibration, 7.5, recipe="fast", fixed={"*": 4, "b*": 5, "head": 16, "body": 3})
    assert dict(plan) == {"body": 3, "blocks[[]0].fc": 5, "blocks0.fc": 5, "head": 16}
    with pytest.raises(comq_np.InputError, match="`budget_bits` must be at least"):
        plan.within(6)


def test_json_brings_it_back(calibration):
    plan = comq_np.allocate_bits(calibration, 8, bits=[3, 5], recipe="fast", sensitivities={"*": 2.0, "head": 1.5})
    again = comq_np.Allocation.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert again == plan
    assert again.to_dict() == plan.to_dict()
    assert again.within(7).to_dict() == plan.within(7).to_dict()
    endless = comq_np.Allocation(8, {"fc": {2: (1, math.inf)}}, {"fc": 8})
    assert comq_np.Allocation.from_dict(json.loads(json.dumps(endless.to_dict()))).curves == {"fc": {2: (1, math.inf)}}
    for broken in (None, {}, {**plan.to_dict(), "curves": {"fc": 3}}, {**plan.to_dict(), "weights": {}}):
        with pytest.raises(comq_np.InputError, match=r"`values` must be what `Allocation.to_dict` returns"):
            comq_np.Allocation.from_dict(broken)


def test_a_layer_that_cannot_be_solved_counts_nowhere(tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for name in ("seen", "unseen"):
            gram = comq_np.Gram(8)
            if name == "seen":
                gram.update(np.random.default_rng(0).normal(size=(50, 8)))
            file.add(comq_np.Layer(name, np.ones((8, 5)) * np.arange(1, 9)[:, None], gram))
    with pytest.warns(UserWarning, match="stay float, beyond the budget: 'unseen'"):
        plan = comq_np.allocate_bits(tmp_path / "c.h5", 9, bits=[2, 4])
    assert dict(plan) == {"seen": 4, "unseen": 4}
    assert (plan.weights, [*plan.kept]) == ({"seen": 40}, ["unseen"])
    with pytest.warns(UserWarning, match="Could not be solved"):
        reports = comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", plan)
    assert reports.kept == plan.kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bits": 2}, "`budget_bits` must be above 2, the fewest bits of a layer, as scales and zero points"),
        ({"budget_bits": 3}, "`budget_bits` must be at least 4.6069, as scales and zero points count, too, got 3."),
        ({"budget_bits": "3"}, "`budget_bits` must be a number from 0 to 64, got '3'."),
        ({"bits": []}, "`bits` must hold at least one number, got none."),
        ({"bits": 4}, "`bits` must be an iterable of integers, got 4."),
        ({"bits": [4, 17]}, "`bits` must be an integer from 1 to 16, got 17."),
        ({"fixed": 8}, "`fixed` must map names or patterns of layers to numbers, got 8."),
        ({"fixed": {"haed": 8}}, "`fixed` must hold names of layers or patterns that match some, got 'haed'."),
        ({"fixed": {"head": 0}}, "`fixed['head']` must be an integer from 1 to 16, got 0."),
        ({"sensitivities": {"head": 1.0}}, "layer 'body': `sensitivities` must hold its name or a pattern"),
        ({"sensitivities": {"*": -1}}, "`sensitivities['body']` must be a number from 0 to 1e+100, got -1."),
        ({"recipe": "worst"}, "`recipe` must be"),
        ({"threads": 0}, "`threads` must be"),
    ],
)
def test_refused(calibration, options, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.allocate_bits(calibration, **{"budget_bits": 8, "bits": [2], "recipe": "fast", **options})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("curves", "weights", "sensitivities", "message"),
    [
        ({"fc": {}}, {"fc": 8}, None, "`curves` must hold (bytes, relative error) by bits, none negative, got {}."),
        ({"fc": {2: (-1, 0.5)}}, {"fc": 8}, None, "`curves` must hold (bytes, relative error) by bits, none negative"),
        ({"fc": {2: (1, math.nan)}}, {"fc": 8}, None, "`curves` must hold (bytes, relative error) by bits, none"),
        ({"fc": {2: (1, 0.5)}}, {}, None, "`weights` must be an integer from 1 to"),
        ({"fc": {2: (1, 0.5)}}, {"fc": 8}, {}, "`sensitivities` must be a number from 0 to 1e+100, got None."),
    ],
)
def test_curves_that_are_none_are_refused(curves, weights, sensitivities, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.Allocation(8, curves, weights, sensitivities)
    assert str(error.value).startswith(f"layer 'fc': {message}")


def test_the_command(calibration, tmp_path, capsys):
    plan, quantized = tmp_path / "plan.json", tmp_path / "q.h5"
    (tmp_path / "s.json").write_text(json.dumps({"*": 1.0, "body": 3.0}))
    options = ["--budget", "10", "--bits", "2", "3", "5", "--fixed", "head=7", "--group-size", "8", "--recipe", "fast"]
    given = ["allocate", str(calibration), *options, "--sensitivities", str(tmp_path / "s.json"), "-o", str(plan)]
    assert main(given) == 0
    assert f"{plan}: 4 layers, " in capsys.readouterr().out
    expected = comq_np.allocate_bits(
        calibration, 10, bits=[2, 3, 5], fixed={"head": 7}, group_size=8, recipe="fast",
        sensitivities={"*": 1.0, "body": 3.0},
    )  # fmt: skip
    assert json.loads(plan.read_text()) == json.loads(json.dumps(expected.to_dict()))
    solve = ["solve", str(calibration), str(quantized), "--bits", f"@{plan}", "--group-size", "8", "--recipe", "fast"]
    assert main(solve) == 0
    assert sum(size for _, size, _ in arrays_in(quantized).values()) == expected.bytes
    (tmp_path / "s.json").write_text("{")
    capsys.readouterr()
    assert main(given) == 2
    assert "s.json: must hold JSON" in capsys.readouterr().err
