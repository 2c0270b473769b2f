"""`solve` as a plain numeric tool: the problems of benchmarks/beyond_deep_learning.py, small."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import numpy as np
import pytest
import scipy.signal

import comq_np
from comq_np.table import Figures

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "beyond_deep_learning.py"


@pytest.fixture(scope="module")
def beyond():
    """Module of the benchmark."""
    spec = importlib.util.spec_from_file_location("beyond_deep_learning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readme():
    """What the examples of README's section leave in their variables."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Outside deep learning")[1].split("\n## ")[0]
    filters, integers = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    first: dict[str, object] = {}
    exec(filters, first)
    second = {"np": np, "comq_np": comq_np}
    exec(integers, second)
    return first, second


def by_recipe(results):
    return {result.recipe: result for result in results}


@pytest.mark.parametrize("noise", [10, 20])
@pytest.mark.parametrize(("size", "bits"), [(2, 4), (4, 2), (8, 1)])
def test_certificates_of_tiny_integer_least_squares_are_brute_force(beyond, size, bits, noise):
    problem = beyond.integers(size, noise, 0, bits)
    W, G = np.linalg.solve(problem.A, problem.y), problem.A.T @ problem.A
    q = comq_np.solve(W, G, bits, scale=1.0, zero_point=0)
    proof = comq_np.certify(W, G, q)
    assert proof.optimal.all()
    np.testing.assert_array_equal(proof.codes, beyond.brute_force(problem, 2**bits))


def test_brute_force_finds_what_was_sent_without_noise(beyond):
    problem = beyond.integers(4, 300, 0)
    np.testing.assert_array_equal(beyond.brute_force(problem, 4), problem.x)


def test_integer_least_squares_stays_in_the_box_and_never_ends_above_rounding(beyond):
    problem = beyond.integers(16, 10, 0)
    results = by_recipe(beyond.integer_results(problem))
    for name, result in results.items():
        assert set(np.unique(result.Wq)) <= {0, 1, 2, 3}, name
        assert (result.objective <= results["rtn"].objective * (1 + 1e-6)).all(), name
        assert (result.objective >= results["exact"].objective * (1 - 1e-6)).all(), name
    assert results["best"].objective.sum() < results["babai"].objective.sum() < results["rtn"].objective.sum()


def test_rounding_of_integer_least_squares_is_rounding_of_the_real_solution(beyond):
    problem = beyond.integers(8, 15, 0)
    real = np.linalg.solve(problem.A, problem.y)
    rounded = by_recipe(beyond.integer_results(problem))["rtn"]
    np.testing.assert_array_equal(rounded.Wq, np.clip(np.rint(real), 0, 3))


@pytest.mark.parametrize("taps", [8, 15])
def test_taps_of_a_filter_give_the_response_that_scipy_computes(beyond, taps):
    one = beyond.design("remez" if taps % 2 == 0 else "firls", taps, 0.3)
    h = np.concatenate([one.W[:, 0], one.W[: taps // 2, 0][::-1]])
    frequencies = np.linspace(0, np.pi, 16 * taps + 1)
    response = np.abs(scipy.signal.freqz(h, worN=frequencies)[1])
    inside = (frequencies <= 0.3 * np.pi) | (frequencies >= 0.4 * np.pi)
    weights = np.where(one.stopped, 10.0, 1.0)
    np.testing.assert_allclose(np.abs(one.X @ one.W)[:, 0] / weights, response[inside], atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "taps"), [("remez", 8), ("firls", 15)])
def test_filters_on_a_power_of_two_keep_it_and_end_below_rounding(beyond, kind, taps, bits):
    one = beyond.design(kind, taps, 0.3)
    scale = beyond.power_of_two(one.W, bits)
    assert np.frexp(scale)[0] == 0.5
    results = by_recipe(beyond.filter_results(one, bits, gain=False))
    for name, result in results.items():
        codes = result.Wq / scale
        np.testing.assert_array_equal(codes, np.rint(codes), err_msg=name)
        assert np.abs(codes).max() <= 2 ** (bits - 1), name
    assert results["exact"].proven.all()
    for name in ("babai", "balanced", "best"):
        assert results["exact"].objective[0] <= results[name].objective[0] <= results["rtn"].objective[0], name
    assert results["exact"].objective[0] < results["rtn"].objective[0]


def test_a_free_gain_makes_the_filter_better(beyond):
    one = beyond.design("remez", 15, 0.3)
    fixed, free = (by_recipe(beyond.filter_results(one, 4, gain))["best"] for gain in (False, True))
    assert free.objective[0] < fixed.objective[0]


@pytest.mark.parametrize("name", ["lut_33", "poly_8"])
def test_sensors_share_a_scale_and_read_better_than_rounded_ones(beyond, name):
    bank = beyond.sensors(*beyond.BASES[name])
    assert np.abs(bank.errors(bank.W)).max() < 1  # K
    q = comq_np.solve(bank.W, bank.gram, 6, group_size="tensor", recipe="best")
    rounded = comq_np.solve(bank.W, bank.gram, 6, group_size="tensor", recipe="rtn")
    assert len(np.unique(q.scale)) == 1
    errors, rounding = (np.square(bank.errors(found.dequantize())).mean() for found in (q, rounded))
    assert errors < rounding


def test_tables_have_the_metrics_of_each_part(beyond, capsys, monkeypatch):
    monkeypatch.setattr(beyond, "PASS_BANDS", (0.3,))
    figures = Figures()
    beyond.add_filters(figures, "remez", 8, 4, gain=False)
    beyond.add_integers(figures, 4, 15)
    beyond.add_sensors(figures, "poly_8", 6)
    figures.show(None)
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.split()[3] for table in tables] == ["mean_square_error", "mean_square_error", "rms_error"]
    assert [len(table.splitlines()) for table in tables] == [7, 7, 7]
    for table in tables:
        *_, last = table.splitlines()
        assert last.split()[2] == "exact"
        assert last.split()[-2:] == ["1", "1"]


def test_examples_of_readme_do_what_they_say(readme):
    filters, integers = readme
    W, X, q = filters["h"][:16], filters["X"], filters["q"]
    response = np.abs(scipy.signal.freqz(filters["h"], worN=np.pi * filters["frequencies"])[1])
    np.testing.assert_allclose(np.abs(X @ W), response, atol=1e-12)
    np.testing.assert_array_equal(256 * q.dequantize(), np.rint(256 * q.dequantize()))
    assert np.square(X @ (q.dequantize() - W)).sum() < np.square(X @ (np.rint(256 * W) / 256 - W)).sum()
    assert q.report.optimal
    proof, sent = integers["proof"], integers["sent"]
    assert proof.optimal.all()
    assert integers["q"].report.optimal
    assert (proof.codes == sent).all(axis=0).mean() >= (integers["q"].codes == sent).all(axis=0).mean() > 0.5
