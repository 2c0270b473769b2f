"""Calibration in several passes: in the memory there is, the same file to the bit, and going on after a stop."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import re
import sys
import tracemalloc

import forks
import numpy as np
import pytest
import torch
from torch import nn

import capture_memory
import comq_np
import comq_torch

WIDTH = 8


class Block(nn.Module):
    """Layers that share an input, and others."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x + self.out(self.q(x) * self.k(x) + self.v(x))).relu())


class Experts(nn.Module):
    """Sends each batch to one expert, or none."""

    def __init__(self, count=5):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList([Expert() for _ in range(count)])

    def forward(self, x, which):
        y = self.first(x)
        return y if which is None else self.experts[which](y)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Fickle(nn.Module):
    """Layers that get the same input in the first batches, and then no more."""

    def __init__(self, count=6):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 2) for _ in range(count)])

    def forward(self, x, parted):
        for number, layer in enumerate(self.layers):
            layer(x * number if number in parted else x)


class StopError(Exception):
    """What ends a capture early."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks(count=3):
    return nn.Sequential(*[Block() for _ in range(count)])


def inputs(count=4):
    return [torch.randn(3, 5, WIDTH) for _ in range(count)]


def least(model):
    """Bytes that the largest Gram of a model needs alone, and those that are needed for all without any sharing."""
    shapes = {
        name: tuple(reversed(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    each = [comq_np.plan_calibration({name: shape}).passes[0] for name, shape in shapes.items()]
    return max(one.memory + one.gram_bytes for one in each), sum(one.gram_bytes for one in each)


def captured(path, model, batches, **options):
    comq_torch.capture(model, batches, path, **options)
    return path.read_bytes()


class Counted:
    """A forward that counts its calls, and stops at one."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.stop_at:
            raise StopError
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def printed_plan(err):
    """Passes and bytes at most that a printed plan speaks of."""
    return len(re.findall(r"^  pass \d+: ", err, flags=re.M)), [
        float(x) for x in re.findall(r"at most (\d+\.\d) MB", err)
    ]


# The same file.


@pytest.mark.parametrize("share", [0, 0.1, 0.4, 1])
@pytest.mark.parametrize("kind", [list, torch.utils.data.DataLoader])
def test_several_passes_make_the_file_of_one(tmp_path, share, kind):
    model, x = blocks(), inputs()
    one, all_of_them = least(model)
    batches = x if kind is list else kind(torch.cat(x), batch_size=3)
    forward = Counted()
    made = captured(tmp_path / "b.h5", model, batches, memory=int(one + share * all_of_them), forward=forward)
    assert made == captured(tmp_path / "a.h5", model, batches)
    passes, rest = divmod(forward.calls - 1, len(x))
    assert rest == 0
    assert (passes == 1) == (share == 1)


@pytest.mark.parametrize("seed", range(6))
def test_any_flow_makes_the_same_file_in_any_memory(tmp_path, seed):
    rng = np.random.default_rng(seed)
    model = Fickle()
    batches = [(torch.randn(4, WIDTH), [int(k) for k in np.flatnonzero(rng.random(6) < 0.2 * n)]) for n in range(4)]
    expected = captured(tmp_path / "a.h5", model, batches)
    one, all_of_them = least(model)
    for share in (0, 0.3, 0.7):
        memory, forward = int(one + share * all_of_them), Counted()
        assert captured(tmp_path / "b.h5", model, batches, memory=memory, forward=forward) == expected
        assert share or forward.calls > 1 + len(batches)  # the first batch told that one pass would do


@pytest.mark.parametrize("share", [0, 0.2, 1])
def test_experts_that_only_later_batches_reach(tmp_path, share):
    model, batches = Experts(), [(torch.randn(6, WIDTH), which) for which in (None, 2, 0, 2, 4)]
    left_out = [f"experts.{number}.{name}" for number in (1, 3) for name in ("gate", "up", "down")]
    message = f"No batch reached these layers, which are left out: {', '.join(map(repr, left_out))}."
    one, all_of_them = least(model)
    forward = Counted()
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        expected = captured(tmp_path / "a.h5", model, batches)
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        made = captured(tmp_path / "b.h5", model, batches, memory=int(one + share * all_of_them), forward=forward)
    assert made == expected
    assert (forward.calls == 1 + len(batches)) == (share == 1)


def test_memory_reaches_capture_through_quantize():
    model, forward = blocks(), Counted()
    other = copy.deepcopy(model)
    comq_torch.quantize(model, inputs(), 3, recipe="rtn", memory=least(model)[0], forward=forward)
    torch.manual_seed(0)
    blocks()
    comq_torch.quantize(other, inputs(), 3, recipe="rtn")
    assert forward.calls > 1 + 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_other_types_are_converted_in_parts(tmp_path, monkeypatch, dtype):
    model, x = nn.Linear(6, 4).to(dtype), torch.randn(3, 7, 6).to(dtype)
    whole = captured(tmp_path / "a.h5", model, [x])
    monkeypatch.setattr("comq_torch.forms.SAMPLES", 4)
    captured(tmp_path / "b.h5", model, [x])
    for name in ("a.h5", "b.h5"):
        with comq_np.CalibrationFile(tmp_path / name) as file:
            X = x.double().reshape(-1, 6).numpy()
            np.testing.assert_allclose(file[""].gram.matrix, X.T @ X, rtol=1e-5, atol=1e-5)
            assert file[""].gram.count == 21
    assert whole == (tmp_path / "a.h5").read_bytes()


# Memory.


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("share", [0.15, 0.4, 2])
def test_the_peak_stays_below_the_plan(tmp_path, monkeypatch, capsys, offset, share):
    monkeypatch.setattr("comq_np.gram.OWN_PAGES", 2**40)  # so that tracemalloc sees them
    width = 192
    model = nn.Sequential(*[Block(width) for _ in range(4)])
    x = [torch.randn(4096, width) / 100 + offset]
    one, all_of_them = least(model)
    memory = int(one + share * all_of_them)
    capture = {"batches": x, "path": tmp_path / "c.h5", "memory": memory, "progress": True}
    comq_torch.capture(nn.Linear(2, 2), [torch.ones(1, 2)], tmp_path / "warm.h5")
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    comq_torch.capture(model, **capture)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    passes, planned = printed_plan(capsys.readouterr().err)
    assert (passes == 1) == (share == 2)
    assert max(planned) <= memory / 1e6 + 0.1
    assert 0.4 < peak / 1e6 / max(planned) <= 1


def test_unfolded_convolutions_are_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("comq_np.gram.OWN_PAGES", 2**40)
    model, x = nn.Conv2d(8, 4, 5), torch.randn(8, 8, 64, 64)
    tracemalloc.start()
    comq_torch.capture(model, [x], tmp_path / "c.h5", memory="64 MB", progress=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    unfolded = 4 * 8 * 60 * 60 * 200
    assert peak < 1e6 * max(printed_plan(capsys.readouterr().err)[1]) < 0.5 * unfolded


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_sentence_encoder_is_captured_in_half_of_the_memory_of_its_grams(tmp_path):
    path, memory = tmp_path / "c.h5", 135 * 10**6
    peak = capture_memory.measured(capture_memory.Capture(path, 4, memory))
    whole, plan = capture_memory.planned(path, None), capture_memory.planned(path, memory)
    assert memory == pytest.approx(whole.passes[0].gram_bytes / 2, rel=0.01)
    assert len(plan.passes) > 1
    planned = max(part.memory for part in plan.passes)
    assert 0.5 * planned < peak < 1.2 * planned


# What is told.


def test_the_plan_comes_first_and_then_the_passes(tmp_path, capsys):
    model = blocks()
    comq_torch.capture(model, inputs(), tmp_path / "c.h5", memory=least(model)[0], progress=True)
    out, err = capsys.readouterr()
    passes, _ = printed_plan(err)
    assert out == ""
    assert passes > 1
    assert "18 layers with 12 Grams of" in err
    assert (
        err.index("  pass 1:") < err.index(f"capture, pass 1 of {passes}") < err.index(f"capture, pass 2 of {passes}")
    )
    assert f"| {passes * 4}/{passes * 4} [" in err
    assert "'0.down' (60 for 24)" not in err


def test_layers_with_fewer_samples_than_rows_are_named(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))
    comq_torch.capture(model, [torch.randn(5, 3)], tmp_path / "c.h5", progress=True)
    assert (
        "Fewer samples than rows, so that only shrinkage makes up for the rest: '1' (5 for 9)\n"
        in capsys.readouterr().err
    )


def refusal(path, model, batches, **options):
    with pytest.raises(comq_np.InputError) as caught:
        comq_torch.capture(model, batches, path, **options)
    return str(caught.value)


def test_batches_of_one_pass_are_refused_before_it_where_more_are_needed(tmp_path):
    model, forward = blocks(), Counted()
    batches = (x for x in inputs())
    said = refusal(tmp_path / "c.h5", model, batches, memory=least(model)[0], forward=forward)
    found = re.fullmatch(
        r"`batches` must be a list or a loader, to be gone through (\d+) times with `memory` \d+, got 'generator', "
        r"which one pass uses up. For one, (\d+) bytes are enough; or capture some of the `layers` at a time and merge "
        r"the files by `comq_np.merge_files`.",
        said,
    )
    assert int(found[1]) > 1
    assert forward.calls == 1  # to find out what shares a Gram
    assert list(tmp_path.iterdir()) == []
    x = inputs()
    made = captured(tmp_path / "c.h5", model, iter(x), memory=int(found[2]))
    assert made == captured(tmp_path / "c.h5", model, x)
    names = [[f"{k}.*" for k in part] for part in ((0, 1), (2,))]
    files = [tmp_path / "0.h5", tmp_path / "1.h5"]
    for path, layers in zip(files, names, strict=True):
        comq_torch.capture(model, iter(x), path, layers)
    comq_np.merge_files(files, tmp_path / "merged.h5")
    assert (tmp_path / "merged.h5").read_bytes() == made


class Changing:
    """Batches that are other ones in the second pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: [*x[:2], x[2] + 1e-6, x[3]], "batch 2 of pass 2 is not that of the first pass"),
        (lambda x: [x[0], x[2], x[1], x[3]], "batch 1 of pass 2 is not that of the first pass"),
        (lambda x: [*x, x[0]], "batch 4 of pass 2 is not that of the first pass"),
        (lambda x: x[:3], "the first pass had 4, pass 2 has 3"),
        (lambda x: x[:0], "the first pass had 4, pass 2 has 0"),
    ],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"input": x},
        lambda x: [x.numpy(), {"text": ("a", None, 1.5)}],
        lambda x: repr(x.tolist()),
    ],
)
def test_batches_that_change_are_refused(tmp_path, change, told, wrap):
    model, x = blocks(), inputs()
    batches = Changing(*([*map(wrap, part)] for part in (x, change(x))))
    said = refusal(tmp_path / "c.h5", model, batches, memory=least(model)[0], forward=lambda m, _: m(x[0]))
    assert said == f"`batches` must be the same in every pass, as those of a list are: {told}."


def test_no_batches(tmp_path):
    assert refusal(tmp_path / "c.h5", blocks(), [], memory="1GB") == "`batches` must hold at least one batch, got none."


def test_too_little_memory_for_one_gram_is_refused_before_the_first_pass(tmp_path):
    model, forward = blocks(), Counted()
    said = refusal(tmp_path / "c.h5", model, inputs(), memory="300 kB", forward=forward)
    assert said == "`memory` must be at least 0.5 MB for layer '0.down' with 24 rows, got '300 kB'."
    assert forward.calls == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["0.q", "0.down", "2.out", "2.down"])
def test_what_is_not_finite_names_layer_and_batch_in_every_pass(tmp_path, name):
    model, x, seen = blocks(), inputs(), []

    def poison(_, args):
        return (args[0] / (0 if seen[-1] is x[2] else 1),)

    def clean(_, args, output):
        return torch.ones_like(output)

    model.get_submodule(name).register_forward_pre_hook(poison)
    model.get_submodule(name).register_forward_hook(clean)
    memory = least(model)[0]
    said = refusal(tmp_path / "c.h5", model, x, memory=memory, forward=lambda m, batch: (seen.append(batch), m(batch)))
    assert re.match(rf"layer '{re.escape(name)}', batch 2: `X` must be finite, got ", said)


# Going on.


def test_a_capture_goes_on_with_the_next_pass(tmp_path):
    model, x = blocks(), inputs()
    memory, path = least(model)[0], tmp_path / "b.h5"
    expected = captured(tmp_path / "a.h5", model, x)
    undisturbed = Counted()
    captured(path, model, x, memory=memory, forward=undisturbed)
    path.unlink()
    for _ in range(2):  # in the first batch of the second pass, twice
        with pytest.raises(StopError) as caught:
            captured(path, model, x, memory=memory, forward=Counted(stop_at=2 + len(x)))
        assert not path.exists()
        assert re.search(r"^\d+ layers finished so far, kept in ", caught.value.__notes__[0])
    forward = Counted()
    assert captured(path, model, x, memory=memory, forward=forward) == expected
    assert forward.calls == undisturbed.calls - 2 * len(x)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.h5", "b.h5"}


def other_weight(model, batches):
    model[1].q.weight.data[0, 0] += 1
    return model, batches


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weight, "the model was "),
        (lambda model, x: (model, [x[0] + 1, *x[1:]]), "the first batch was "),
        (lambda model, x: (model[:2], x), "the list of layers was "),
    ],
)
def test_another_capture_does_not_go_on(tmp_path, change, named):
    model, x = blocks(), inputs()
    path, memory = tmp_path / "c.h5", least(model)[0]
    with pytest.raises(StopError):
        captured(path, model, x, memory=memory, forward=Counted(stop_at=6))
    model, x = change(model, x)
    with pytest.raises(comq_np.FileError, match=named):
        captured(path, model, x, memory=memory, forward=Counted())
    made = captured(path, model, x, memory=memory, forward=Counted(), restart=True)
    assert made == captured(path, model, x)


def test_another_memory_goes_on(tmp_path):
    model, x = blocks(), inputs()
    with pytest.raises(StopError):
        captured(tmp_path / "c.h5", model, x, memory=least(model)[0], forward=Counted(stop_at=7))
    forward = Counted()
    made = captured(tmp_path / "c.h5", model, x, memory="1GiB", forward=forward)
    assert forward.calls == 1 + len(x)
    assert made == captured(tmp_path / "c.h5", model, x)


KILLED = """
import os, signal, torch, comq_torch
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)])
comq_torch.capture(model, [torch.randn(5, 8) for _ in range(2)], {path!r}, memory={memory})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_before_any_operation_on_files_in_any_pass(tmp_path):
    path = tmp_path / "work" / "c.h5"
    path.parent.mkdir()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    expected = captured(path, model, [torch.randn(5, 8) for _ in range(2)])
    path.unlink()
    code = KILLED.format(path=str(path), memory=least(model)[0])
    children = forks.Forks(comq_np, comq_torch)
    try:
        kept = set()
        for count in itertools.count(1, 3):
            status, _ = children.run(code=code, kill_at=count, folder=path.parent)
            if status != forks.KILLED:
                break
            assert not path.exists() or path.read_bytes() == expected
            kept.add(len(list(path.parent.glob(".c.h5.parts/layer-*.h5"))))
            assert children.run(code=code)[0] == 0
            assert path.read_bytes() == expected
            assert [entry.name for entry in path.parent.iterdir()] == ["c.h5"]
            path.unlink()
        assert status == 0
        assert kept >= {0, 1, 2, 3, 4, 5, 6}
    finally:
        children.close()
