"""Bits of each layer: who gets which, in a call and on the command line, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import comq_np
from comq_np.cli import main

NAMES = ["stem", "blocks.0.depthwise", "blocks.0.expand", "blocks.10.depthwise", "head[0]", "Head"]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (3, [3, 3, 3, 3, 3, 3]),
        (np.int64(16), [16] * 6),
        ({"*": 4}, [4] * 6),
        ({"*": 4, "*.depthwise": 8}, [4, 8, 4, 8, 4, 4]),
        ({"*.depthwise": 8, "*": 4}, [4] * 6),
        ({"*": 4, "blocks.?.*": 2, "blocks.0.expand": np.uint8(7)}, [4, 2, 7, 4, 4, 4]),
        ({"*": 4, "head[0]": 8}, [4, 4, 4, 4, 8, 4]),  # a name, though as a pattern it would match another
        ({"*": 4, "[hH]ead*": 8}, [4, 4, 4, 4, 8, 8]),
        ({"*": 4, "head*": 8}, [4, 4, 4, 4, 8, 4]),
        (dict(zip(NAMES, range(1, 7), strict=True)), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_last_pattern_that_matches_counts(bits, expected):
    found = comq_np.layer_bits(bits, NAMES)
    assert list(found.items()) == list(zip(NAMES, expected, strict=True))
    assert all(type(width) is int for width in found.values())


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (17, "`bits` must be an integer from 1 to 16, got 17."),
        (None, "`bits` must be an integer from 1 to 16, got None."),
        ({"*": 0}, "`bits['*']` must be an integer from 1 to 16, got 0."),
        ({"*": 4, "stem": 4.0}, "`bits['stem']` must be an integer from 1 to 16, got 4.0."),
        ({"*": 4, "stem": {"a": 1}}, "`bits['stem']` must be an integer from 1 to 16, got {'a': 1}."),
        ({}, "`bits` must map names or patterns of layers to integers, got {}."),
        ({4: 4}, "`bits` must map names or patterns of layers to integers, got {4: 4}."),
        ({"blocks.*": 4, "[hH]*": 3}, "layer 'stem': `bits` must hold its name or a pattern that it matches."),
        ({"*": 4, "haed*": 8}, "`bits` must hold names of layers or patterns that match some, got 'haed*'."),
        ({"*": 4, "STEM": 8}, "`bits` must hold names of layers or patterns that match some, got 'STEM'."),
    ],
)
def test_refused(bits, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.layer_bits(bits, NAMES)
    assert str(error.value) == message


def test_a_pattern_may_match_a_layer_that_is_skipped():
    assert comq_np.layer_bits({"*": 4, "rnn*": 8}, ["fc"], skipped=["rnn.0"]) == {"fc": 4}
    assert comq_np.layer_bits({"fc": 4}, ["fc"], skipped=["rnn.0"]) == {"fc": 4}


def test_without_layers_no_pattern_is_idle():
    assert comq_np.layer_bits({"head": 8}, []) == {}


@pytest.fixture
def files(problem, tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for name, m, n in (("body.fc1", 12, 5), ("body.fc2", 30, 8), ("head", 7, 3)):
            gram = comq_np.Gram(m)
            gram.update(problem(m, n).X)
            file.add(comq_np.Layer(name, problem(m, n).W, gram))
        file.skip("rnn", "no adapter takes recurrent layers apart.")
    return tmp_path / "c.h5", tmp_path / "q.h5"


def bits_in(path):
    with comq_np.QuantizedFile(path) as file:
        return {name: (q.bits, q.levels) for name, q in file.items()}


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 3, "threads": 3}])
def test_every_layer_is_solved_at_its_bits(files, options):
    bits = {"*": 3, "*.fc2": 5, "head": 8}
    comq_np.quantize_file(*files, bits, **options)
    assert bits_in(files[1]) == {"body.fc1": (3, 8), "body.fc2": (5, 32), "head": (8, 256)}
    with comq_np.CalibrationFile(files[0]) as source, comq_np.QuantizedFile(files[1]) as target:
        for name, width in (("body.fc1", 3), ("body.fc2", 5), ("head", 8)):
            expected = comq_np.solve(source[name].weight, source[name].gram, width)
            np.testing.assert_array_equal(target[name].codes, expected.codes)
    assert all(layer.matches for layer in comq_np.verify_file(*files))


def test_a_file_without_a_layer_is_solved_with_any_patterns(tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5"):
        pass
    assert not comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", {"head": 4})


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        ({"*": 17}, {}, "`bits['*']` must be an integer from 1 to 16, got 17."),
        ({"body.*": 4}, {}, "layer 'head': `bits` must hold its name or a pattern that it matches."),
        ({"*": 4, "tail": 4}, {}, "`bits` must hold names of layers or patterns that match some, got 'tail'."),
        ({"*": 4}, {"levels": 3}, "`bits` must be a number with `levels`, which all layers have, got a mapping."),
        ([4], {}, "`bits` must be an integer from 1 to 16, got [4]."),
    ],
)
def test_refused_before_anything_is_solved(files, bits, options, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.quantize_file(*files, bits, **options)
    assert str(error.value) == message
    assert [entry.name for entry in files[0].parent.iterdir()] == ["c.h5"]


def test_a_run_goes_on_however_the_same_bits_are_said(files, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comq_np.QuantizedWriter, "_assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(*files, {"*": 4, "head": 8})
    with pytest.raises(comq_np.FileError, match=r'bits was \{"body.fc1": 4'):
        comq_np.quantize_file(*files, {"head": 8, "*": 4})
    reports = comq_np.quantize_file(*files, {"head": 8, "rnn": 1, "body.fc?": 4})
    assert [report.seconds for report in reports.values()] == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [4, 4, 4]),
        (["--bits", "3"], [3, 3, 3]),
        (["--bits", "3", "--bits", "head=8"], [3, 3, 8]),
        (["--bits", "head=8", "--bits", "3"], [3, 3, 3]),
        (["--bits", "3", "--bits", "h*=8", "--bits", "*=5", "--bits", "*.fc1=2"], [2, 5, 5]),
        (["--bits", "@PLAN"], [2, 6, 6]),
        (["--bits", "@PLAN", "--bits", "head=1"], [2, 6, 1]),
    ],
)
def test_the_command(files, tmp_path, arguments, expected):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"*": 6, "body.fc1": 2}))
    given = [argument.replace("PLAN", str(plan)) for argument in arguments]
    assert main(["solve", *map(str, files), "--recipe", "rtn", *given]) == 0
    assert [bits for bits, _ in bits_in(files[1]).values()] == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("four", "argument --bits: must be a number, PATTERN=NUMBER or @FILE, got 'four'"),
        ("head=", "argument --bits: must be a number, PATTERN=NUMBER or @FILE, got 'head='"),
        ("@none.json", "argument --bits: none.json: No such file or directory"),
        ("@list.json", "argument --bits: list.json: must hold a JSON object of patterns and bits, got [4]"),
        ("@broken.json", "argument --bits: broken.json: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_refused_on_the_command_line(files, tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[4]")
    (tmp_path / "broken.json").write_text("bits")
    with pytest.raises(SystemExit) as stop:
        main(["solve", *map(str, files), "--bits", argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("17", "`bits` must be an integer from 1 to 16, got 17."),
        ("head=17", "`bits['head']` must be an integer from 1 to 16, got 17."),
        ("head=4", "layer 'body.fc1': `bits` must hold its name or a pattern that it matches."),
        ("@odd.json", "`bits` must be an integer from 1 to 16, got '4'."),
        ("@empty.json", "`bits` must map names or patterns of layers to integers, got {}."),
    ],
)
def test_refused_by_the_run(files, tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.json").write_text('{"*": "4"}')
    (tmp_path / "empty.json").write_text("{}")
    assert main(["solve", *map(str, files), "--bits", argument]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"comq solve: error: {message}"
