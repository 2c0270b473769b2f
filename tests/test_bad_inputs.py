"""Bad inputs to arrays, files and the command line, and what each gets: what is wrong, what it must be, what it is."""

from __future__ import annotations

import re

import numpy as np
import pytest

import comq_np
from comq_np.cli import main

RNG = np.random.default_rng(0)
W, X = RNG.normal(size=(6, 4)), RNG.normal(size=(20, 6))
G, ROW = X.T @ X, np.arange(6)
RAGGED = [[1.0, 2.0], [3.0]]
INPUT, FILE = comq_np.InputError, comq_np.FileError


def gram(**folds):
    made = comq_np.Gram(6)
    made.update(X)
    return made


def but(array, where, value):
    array = array.copy()
    array[where] = value
    return array


def solve(weights=W, matrix=G, *args, **options):
    return lambda: comq_np.solve(weights, matrix, *args, **options)


def layer(**fields):
    """Add a layer with these fields to a file."""

    def call(folder):
        with comq_np.CalibrationWriter(folder / "new.h5") as file:
            file.add(comq_np.Layer(**{"name": "fc", "weight": W, "gram": gram(), **fields}))

    return call


def quantize(source="c.h5", target="q.h5", **options):
    def call(folder):
        paths = (folder / path if isinstance(path, str) and "\0" not in path else path for path in (source, target))
        comq_np.quantize_file(*paths, **options)

    return call


FOLDS = ((np.eye(6), np.zeros(6), 3), (np.eye(6), np.zeros(6), 3))
INDEFINITE = 2 * np.ones((6, 6)) - np.eye(6)

ARRAYS = {
    "W of NaN": (
        solve(but(W, (2, 1), np.nan)),
        r"`W` must be finite, got 1 NaN or infinite of 24 .* first at \(2, 1\)",
    ),
    "W infinite": (solve(but(W, (0, 3), np.inf)), r"`W` must be finite, got 1 NaN or infinite of 24"),
    "W beyond float64": (
        solve(np.full((6, 4), np.longdouble("1e4000"))),
        r"`W` must be finite, got 24 NaN or infinite",
    ),
    "W too large": (solve(W * 1e200), r"`W` must lie within ±1e\+30, got an entry of size \S+e\+200"),
    "W complex": (solve(W * 1j), r"`W` must hold real numbers, got dtype complex128"),
    "W of truth values": (solve(W > 0), r"`W` must hold real numbers, got dtype bool"),
    "W of text": (solve("weights"), r"`W` must hold real numbers, got dtype <U7"),
    "W of times": (solve(np.zeros((6, 4), "M8[s]")), r"`W` must hold real numbers, got dtype datetime64\[s\]"),
    "W of objects": (solve(None), r"`W` must hold real numbers, got dtype object"),
    "W masked": (solve(np.ma.array(W, mask=W > 1)), rf"`W` must have no masked entries, got {(W > 1).sum()} of 24"),
    "W ragged": (solve(RAGGED), r"`W` must be an array of real numbers: "),
    "W empty": (solve(W[:0]), r"`W` must not be empty, got shape \(0, 4\)"),
    "W of four dimensions": (solve(W[None, None]), r"`W` must be 1-D, 2-D or 3-D, got 4-D of shape \(1, 1, 6, 4\)"),
    "G of NaN": (solve(W, but(G, (1, 1), np.nan)), r"`G` must be finite, got 1 NaN or infinite of 36 .* at \(1, 1\)"),
    "G of another size": (solve(W, G[:5, :5]), r"`G` must have shape \(6, 6\) to match `W` with 6 rows, got \(5, 5\)"),
    "G of one row": (solve(W[:1], G), r"`G` must have shape \(1, 1\) to match `W` with 1 row, got \(6, 6\)"),
    "G of another width": (solve(W, comq_np.Gram(5)), r"`G` must have shape \(6, 6\) to match `W` .*, got \(5, 5\)"),
    "inputs as G": (solve(W, X), r"`G` must have shape \(6, 6\) to match `W` with 6 rows, got \(20, 6\)"),
    "G asymmetric": (solve(W, but(G, (1, 4), 99)), r"`G` must be symmetric, got G\[1, 4\] = 99 and G\[4, 1\] = "),
    "G negative": (
        solve(W, but(np.eye(6), (3, 3), -0.5)),
        r"`G` must have no negative diagonal entry, got G\[3, 3\] = -0.5",
    ),
    "G indefinite": (solve(W, INDEFINITE), r"`G` must be positive semidefinite, as a Gram matrix is, got one"),
    "G without inputs": (solve(W, comq_np.Gram(6)), r"`G` must have seen inputs, got a Gram with count 0"),
    "fit_bias without a mean": (solve(fit_bias=True), r"`G` must be a comq_np.Gram, .* with `fit_bias`, got 'ndarray'"),
    "bits 0": (solve(W, G, 0), r"`bits` must be an integer from 1 to 16, got 0"),
    "bits 17": (solve(W, G, 17), r"`bits` must be an integer from 1 to 16, got 17"),
    "bits True": (solve(W, G, True), r"`bits` must be an integer from 1 to 16, got True"),
    "bits as text": (solve(W, G, "4"), r"`bits` must be an integer from 1 to 16, got '4'"),
    "one level": (solve(levels=1), r"`levels` must be an integer from 2 to 65536, got 1"),
    "group_size 0": (solve(group_size=0), r'`group_size` must be None, "tensor" or an integer of at least 1, got 0'),
    "shrinkage below 0": (
        solve(shrinkage=-1),
        r'`shrinkage` must be "auto", "nonlinear" or a number from 0 to 1, got -1',
    ),
    "shrinkages": (solve(shrinkage=ROW), r'`shrinkage` must be "auto", "nonlinear" or a number from 0 to 1, got array'),
    "scale 0": (solve(scale=0), r"`scale` must be positive and a normal float32 number, got 0"),
    "zero_point of NaN": (solve(scale=1, zero_point=np.nan), r"`zero_point` must be finite, got 1 NaN or infinite"),
    "no thread": (solve(threads=0), r"`threads` must be an integer from 1 to 1024, got 0"),
    "backend": (solve(backend="tpu"), r"`backend` must be one of 'auto', 'cpu', 'cuda', got 'tpu'"),
    "recipe": (solve(recipe="gptq"), r"`recipe` must be one of 'paper', .*, got 'gptq'"),
    "recipe without a name": (lambda: comq_np.recipe("paper").replace(name=3), r"`name` must be a string, got 3"),
    "callback": (solve(callback=3), r"`callback` must be callable, got 3"),
    "overwrite a list": (
        solve(W, G.tolist(), overwrite=True),
        r"`G` must be an array of float32 or float64 .*, got 'list'",
    ),
    "cross of another size": (
        solve(cross=np.eye(3)),
        r"`cross` must have shape \(6, 6\) to match `G`, .* got \(3, 3\)",
    ),
    "Gram of no width": (lambda: comq_np.Gram(0), r"`m` must be an integer from 1 to 536870912, got 0"),
    "X of another width": (lambda: gram().update(X[:, :5]), r"`X` must have shape \(\.\.\., 6\), got \(20, 5\)"),
    "X of NaN": (lambda: gram().update(X * np.nan), r"`X` must be finite, got 120 NaN or infinite of 120 entries"),
    "X ragged": (lambda: gram().update(RAGGED), r"`X` must be an array of real numbers: "),
    "X masked": (lambda: gram().update(np.ma.array(X, mask=X > 1)), r"`X` must have no masked entries, got \d+ of 120"),
    "X too large": (lambda: gram().update(X * 1e20), r"`X` must lie within ±1e\+17, got an entry of size"),
    "third fold": (lambda: gram().fold_matrix(2), r"`fold` must be an integer from 0 to 1, got 2"),
    "centred as text": (lambda: gram().fold_matrix(0, "no"), r"`centred` must be True or False, got 'no'"),
    "merged with a matrix": (lambda: gram().merge(G), r"`other` must be a Gram of width 6, got 'ndarray'"),
    "folds": (lambda: comq_np.Gram.from_folds(FOLDS[:1]), r"`folds` must be two of \(matrix, sum, count\)"),
    "codes ragged": (lambda: comq_np.pack_codes(RAGGED, 4), r"`codes` must be an array of real numbers: "),
    "codes too large": (
        lambda: comq_np.pack_codes([[16]], 4),
        r"`codes` must lie from 0 to 15 for 4 bits, got 16 to 16",
    ),
    "packed as text": (
        lambda: comq_np.unpack_codes("x", 4, 1),
        r"`packed` must be uint8 of shape \(\[b,\] n, 1\) .*, got <U1",
    ),
    "images": (
        lambda: list(comq_np.patches(X, 3)),
        r"`images` must have shape \(N, C, ...\) and 1 to 3 axes of space, got \(20, 6\)",
    ),
    "certify codes": (
        lambda: comq_np.certify(W, G, W),
        r"`q` must be a QuantizedArray of shape \(6, 4\), .* got 'ndarray'",
    ),
}

FILES = {
    "layer of NaN": (
        layer(weight=W * np.nan),
        INPUT,
        r"layer 'fc': `weight` must be finite, got 24 NaN or infinite of 24",
    ),
    "layer of another width": (layer(weight=W[:5]), INPUT, r"layer 'fc': `gram` must be of width 5, .*, is of 6"),
    "layer without a Gram": (
        layer(gram=G),
        INPUT,
        r"layer 'fc': `gram` must be a comq_np.Gram or TokenCounts, got 'ndarray'",
    ),
    "bias of another length": (layer(bias=[1.0]), INPUT, r"layer 'fc': `bias` must have shape \(4,\), got \(1,\)"),
    "name with NUL": (layer(name="a\0"), INPUT, r"`name` must be text that UTF-8 can hold, without NUL, got 'a\\x00'"),
    "name that is too long": (layer(name="x" * 16_385), INPUT, r"`name` must have at most 16384 bytes .*, got 16385"),
    "name as bytes": (layer(name=b"fc"), INPUT, r"`name` must be a string, got b'fc'"),
    "Gram as an array": (
        lambda folder: comq_np.save_gram(folder / "g.h5", G),
        INPUT,
        r"`gram` must be a comq_np.Gram or TokenCounts, got",
    ),
    "path as a number": (quantize(3), INPUT, r"`calibration` must be text or a path-like object, without NUL, got 3"),
    "path with NUL": (quantize("a\0b"), INPUT, r"`calibration` must be text .*, without NUL, got 'a\\x00b'"),
    "no path": (
        quantize("c.h5", None),
        INPUT,
        r"`quantized` must be text or a path-like object, without NUL, got None",
    ),
    "path as bytes": (lambda _: comq_np.load_gram(b"g.h5"), INPUT, r"`path` must be text .*, got b'g.h5'"),
    "one path for both": (quantize("c.h5", "c.h5"), INPUT, r"`quantized` must be another file than `calibration`, got"),
    "progress as text": (quantize(progress="yes"), INPUT, r"`progress` must be True or False, got 'yes'"),
    "order of nothing": (
        lambda f: comq_np.CalibrationWriter(f / "n.h5", order=3),
        INPUT,
        r"`order` must be an iterable of",
    ),
    "restart as text": (
        lambda folder: comq_np.CalibrationWriter(folder / "n.h5", restart="no"),
        INPUT,
        r"`restart` must be True or False, got 'no'",
    ),
    "merge a number": (
        lambda folder: comq_np.merge_files(3, folder / "m.h5"),
        INPUT,
        r"`paths` must be at least two .* 3\.",
    ),
    "no file": (quantize("none.h5"), FILE, r"none\.h5: there is no such file"),
    "folder": (quantize("."), FILE, r": cannot be read: it is a folder"),
    "device": (lambda _: comq_np.load_gram("/dev/null"), FILE, r"/dev/null: cannot be read: it is a device or a pipe"),
    "no HDF5": (lambda folder: comq_np.load_gram(folder / "text.h5"), FILE, r"text\.h5: cannot be read as HDF5: "),
    "another format": (
        lambda folder: comq_np.QuantizedFile(folder / "c.h5"),
        FILE,
        r"c\.h5: must be a comq_np\.quantized file, its `format` is 'comq_np\.calibration'",
    ),
    "no folder to write to": (quantize("c.h5", "none/q.h5"), FILE, r"q\.h5: cannot be written: "),
    "name of a file that is too long": (quantize("c.h5", "x" * 300), FILE, r"x: cannot be written: "),
}

COMMANDS = {
    "bits": (["solve", "c.h5", "q.h5", "--bits", "17"], r"`bits` must be an integer from 1 to 16, got 17"),
    "bits as text": (["solve", "c.h5", "q.h5", "--bits", "four"], r"argument --bits: must be a number, .*, got 'four'"),
    "group size": (
        ["solve", "c.h5", "q.h5", "--group-size", "row"],
        r"must be a number of rows or \"tensor\", got 'row'",
    ),
    "shrinkage": (
        ["solve", "c.h5", "q.h5", "--shrinkage", "nan"],
        r"must be \"auto\", \"nonlinear\" or a number from 0 to 1, got nan",
    ),
    "threads": (["solve", "c.h5", "q.h5", "--threads", "0"], r"`threads` must be an integer from 1 to 1024, got 0"),
    "recipe": (["solve", "c.h5", "q.h5", "--recipe", "gptq"], r"argument --recipe: invalid choice: 'gptq'"),
    "one file for both": (
        ["solve", "c.h5", "c.h5"],
        r"`quantized` must be another file than `calibration`, got 'c\.h5' twice",
    ),
    "no file": (["info", "none.h5"], r"none\.h5: there is no such file"),
    "no HDF5": (["info", "text.h5"], r"text\.h5: cannot be read as HDF5: "),
    "files the wrong way round": (
        ["verify", "q.h5", "c.h5"],
        r"q\.h5: must be a comq_np\.calibration file, its `format` is ",
    ),
    "unknown command": (["quantise"], r"invalid choice: 'quantise'"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with a calibration file, a quantized file and a text."""
    layer()(tmp_path)
    (tmp_path / "new.h5").rename(tmp_path / "c.h5")
    with comq_np.QuantizedWriter(tmp_path / "q.h5"):
        pass
    (tmp_path / "text.h5").write_text("no HDF5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(case):
    call, message = ARRAYS[case]
    with pytest.raises(INPUT, match=message):
        call()


@pytest.mark.parametrize("case", FILES)
def test_files(case, folder):
    call, kind, message = FILES[case]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(kind, match=message) as error:
        call(folder)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case, folder, capsys):
    arguments, message = COMMANDS[case]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    printed, errors = capsys.readouterr()
    assert (status, printed) == (2, "")
    assert re.search(message, errors.splitlines()[-1])


def test_there_are_enough():
    assert len(ARRAYS) + len(FILES) + len(COMMANDS) >= 90
