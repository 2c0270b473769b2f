"""Layer after layer: each is calibrated on what the quantized layers before it give, for the float model's outputs."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from sequences import assert_matched
from torch import nn

import comq_np
import comq_torch


def make_chain(seed):
    """Three linear layers, batches of correlated inputs, and others to judge on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    mixing = torch.randn(24, 24)
    return model, [torch.randn(48, 24) @ mixing for _ in range(12)], torch.randn(1000, 24) @ mixing


@pytest.fixture
def chain():
    return make_chain(0)


def quantized(model, batches, bits=3, **options):
    changed = copy.deepcopy(model)
    return changed, comq_torch.quantize(changed, batches, bits, **options)


@torch.no_grad()
def error(model, changed, x):
    return float((changed(x) - model(x)).square().mean())


def rows_of(model, upto, batches):
    """Inputs of a layer of a chain, batch after batch, in float64."""
    with torch.no_grad():
        return [model[:upto](x).double().numpy() for x in batches]


@pytest.mark.parametrize("fit_bias", [False, True])
def test_each_layer_is_solved_for_the_outputs_of_the_float_model(chain, fit_bias):
    model, batches, _ = chain
    changed, reports = quantized(model, batches, sequential=True, fit_bias=fit_bias)
    assert list(reports) == ["0", "2", "4"]
    for number in (0, 2, 4):
        W, bias = (value.detach().double().numpy() for value in (model[number].weight.T, model[number].bias))
        own, exact = rows_of(changed, number, batches), rows_of(model, number, batches)
        found = np.concatenate(own) @ changed[number].weight.detach().double().numpy().T
        found += changed[number].bias.detach().double().numpy()
        assert_matched(W, bias, own, exact, found, 3, fit_bias)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_lowers_the_error_on_other_inputs(bits):
    ratios = []
    for seed in range(4):
        model, batches, others = make_chain(seed)
        apart, _ = quantized(model, batches, bits)
        in_sequence, _ = quantized(model, batches, bits, sequential=True)
        ratios.append(error(model, in_sequence, others) / error(model, apart, others))
    assert np.log(ratios).mean() < np.log(0.87)


def test_bits_of_layers_patterns_and_what_is_left_alone(chain):
    model, batches, _ = chain
    changed, reports = quantized(model, batches, {"*": 2, "4": 8}, layers=["2", "4"], sequential=True)
    assert list(reports) == ["2", "4"]
    assert torch.equal(changed[0].weight, model[0].weight)
    assert max(len(torch.unique(row)) for row in changed[2].weight) == 4 < len(torch.unique(changed[4].weight[0]))


class Attends(nn.Module):
    """Projections that share an input, a layer that is used twice, one that only some batches reach, and a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.query, self.key, self.value, self.twice = (nn.Linear(16, 16) for _ in range(4))
        self.rare, self.never, self.conv = nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv1d(16, 16, 3, groups=4)

    def forward(self, tokens):
        x = self.table(tokens)
        mixed = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), 2) @ self.value(x)
        x = torch.tanh(self.twice(torch.tanh(self.twice(mixed))))
        if tokens[0, 0] % 2:
            x = x + self.rare(x)
        return self.conv(x.transpose(1, 2))


def test_any_way_through_a_model():
    torch.manual_seed(0)
    model = Attends().eval()
    batches = [torch.randint(0, 30, (4, 12)) for _ in range(6)]
    batches[0][0, 0], batches[1][0, 0] = 3, 4
    changed, reports = quantized(model, batches, 4, sequential=True)
    assert list(reports) == ["table", "query", "key", "value", "twice", "rare", "conv"]
    assert reports.kept == {"never": "no batch reached it."}
    assert torch.equal(changed.never.weight, model.never.weight)
    assert changed.training == model.training
    assert not changed.query._forward_pre_hooks
    tokens = torch.randint(0, 30, (50, 12))
    with torch.no_grad():
        exact = model(tokens)
        assert (changed(tokens) - exact).square().mean() < 0.05 * exact.square().mean()


def test_select_and_forward(chain):
    model, batches, _ = chain
    spoiled = [{"x": torch.cat([x, 1e3 * torch.ones(16, 24)]), "count": len(x)} for x in batches]
    changed, _ = quantized(
        model,
        spoiled,
        sequential=True,
        forward=lambda module, batch: module(batch["x"]),
        select=lambda x, batch: x[: batch["count"]],
    )
    expected, _ = quantized(model, batches, sequential=True)
    for one, other in zip(changed.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_errors_end_all_threads_and_leave_no_hooks(chain):
    model, batches, _ = chain
    batches[5][3, 2] = float("nan")
    before = threading.active_count()
    with pytest.raises(comq_np.InputError, match=r"layer '0': batch 5: `X` must be finite"):
        comq_torch.quantize(model, batches, 3, sequential=True, strict=True)
    assert threading.active_count() == before
    assert not model[0]._forward_pre_hooks


def test_an_error_of_the_model_is_raised(chain):
    model, batches, _ = chain
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        comq_torch.quantize(model, [*batches, torch.ones(3, 7)], 3, sequential=True)


def test_a_layer_that_cannot_be_solved_stays_float(chain):
    model, batches, _ = chain
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    changed, reports = quantized(model, batches, sequential=True)
    assert list(reports.kept) == ["2", "4"]  # what comes after it is not finite either
    assert torch.equal(changed[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "1 GB"}, "`memory` must be None with `sequential`"),
        ({"recipe": "none"}, "`recipe` must be"),
        ({"bits": {"9": 4}}, "layer '0': `bits` must hold its name or a pattern that it matches."),
        ({"layers": "nothing"}, "`layers` must name layers that can be quantized"),
        ({"batches": []}, "`batches` must hold at least one batch, got none."),
    ],
)
def test_refused(chain, options, message):
    model, batches, _ = chain
    arguments = {"batches": batches, "bits": 3, "sequential": True, **options}
    with pytest.raises(comq_np.InputError, match=message):
        comq_torch.quantize(model, **arguments)
