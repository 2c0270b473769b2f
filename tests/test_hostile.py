"""Files of strangers: what is not as in a file of ours is refused, naming the file, the place in it and the reason."""

from __future__ import annotations

import pathlib
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest
from edits import editing

import comq_np

DATA = pathlib.Path(__file__).parent / "data"
CODES = "/layers/0/codes"


@pytest.fixture
def quantized(problem, tmp_path):
    """Quantized file with one layer, "fc": 4 bits, 20 rows, 5 columns."""
    W, _, G = problem(20, 5)
    path = tmp_path / "q.h5"
    with comq_np.QuantizedWriter(path) as file:
        file.add("fc", comq_np.solve(W, G, 4))
    return path


def read(path):
    with comq_np.QuantizedFile(path) as file:
        return file.describe(), dict(file)


def refused(path):
    with pytest.raises(comq_np.FileError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


def link(name, made):
    def change(file):
        parent, _, leaf = name.rpartition("/")
        del file[name]
        file[parent or "/"][leaf] = made

    return change


def dataset(**options):
    def change(file):
        old = file[CODES][()]
        del file[CODES]
        shape = options.pop("shape", old.shape)
        if "data" not in options and "external" not in options and options.pop("filled", True):
            options["data"] = old
        file.create_dataset(CODES, **{"shape": shape, "dtype": np.uint8, **options})

    return change


def virtual(file):
    del file[CODES]
    layout = h5py.VirtualLayout((5, 10), np.uint8)
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (5, 10))
    file.create_virtual_dataset(CODES, layout)


def named_type(file):
    del file[CODES]
    file[CODES] = np.dtype("f4")


def attribute(name, value):
    def change(file):
        file["layers/0"].attrs[name] = value

    return change


def same_group_twice(file):
    file["layers/1"] = file["layers/0"]


def infinite(file):
    text = file["layers/0/report"][()]
    link("/layers/0/report", text.replace(b'"objective": ', b'"objective": 1e999, "x": '))(file)


ELSEWHERE = "has a link in its place that leads elsewhere."
MOST = f"{CODES}: must have at most 16,777,216 bytes, 32 times those of the file or 16,777,216, has "
NO_NUMBERS = f"{CODES}: must hold uint8, holds no plain numbers."
NAME = "/layers/0: must have an attribute 'name' of type str, has "
REFUSED = {
    "soft link": (link(CODES, h5py.SoftLink("/layers/0/scale")), f"/layers/0: must hold 'codes' itself, {ELSEWHERE}"),
    "link to itself": (link(CODES, h5py.SoftLink(CODES)), f"/layers/0: must hold 'codes' itself, {ELSEWHERE}"),
    "link to another file": (
        link(CODES, h5py.ExternalLink("/etc/hostname", "/x")),
        f"/layers/0: must hold 'codes' itself, {ELSEWHERE}",
    ),
    "layer in another file": (
        link("/layers/0", h5py.ExternalLink("/etc/hostname", "/")),
        f"/layers: must hold '0' itself, {ELSEWHERE}",
    ),
    "all layers elsewhere": (link("/layers", h5py.SoftLink("/other")), f"/: must hold 'layers' itself, {ELSEWHERE}"),
    "circle of groups": (lambda file: file["layers/0"].__setitem__("1", file["layers"]), None),
    "layer within itself": (lambda file: link(CODES, file["layers"])(file), "/layers/0: must have a dataset 'codes'."),
    "one group as two layers": (same_group_twice, "/: must hold each of its layers under one number only."),
    "storage in another file": (
        dataset(external=[("/etc/hostname", 0, 50)]),
        f"{CODES}: must be in this file, is a view of others.",
    ),
    "view": (virtual, f"{CODES}: must be in this file, is a view of others."),
    "type": (named_type, "/layers/0: must have a dataset 'codes'."),
    "immense, not there": (
        dataset(shape=(2**40, 10), chunks=(2**10, 10), filled=False),
        MOST + "10,995,116,277,760.",
    ),
    "not there": (dataset(filled=False), f"{CODES}: must have all of its 50 bytes in the file, has 0."),
    "chunks not there": (dataset(filled=False, chunks=(5, 10)), f"{CODES}: cannot be read: there is no chunk of at "),
    "immense chunks": (
        dataset(filled=False, chunks=(2**20, 2**10), maxshape=(None, None)),
        MOST + "1,073,741,824.",
    ),
    "tiny chunks": (dataset(chunks=(1, 1)), f"{CODES}: must have chunks of at least 1024 bytes, has some of 1."),
    "filter of a plugin": (
        dataset(chunks=(5, 10), compression="lzf"),
        f"{CODES}: must have no filter but gzip, shuffle, fletcher32, has numbers [32000].",
    ),
    "filter that loses": (
        dataset(chunks=(5, 10), scaleoffset=4),
        f"{CODES}: must have no filter but gzip, shuffle, fletcher32, has numbers [6].",
    ),
    "compound": (dataset(dtype=[("a", "u1")], filled=False), NO_NUMBERS),
    "opaque": (dataset(dtype="V1", filled=False), NO_NUMBERS),
    "truth values": (dataset(dtype=bool), NO_NUMBERS),
    "enumeration": (dataset(dtype=h5py.enum_dtype({"a": 1}, "u1")), NO_NUMBERS),
    "lists": (dataset(dtype=h5py.vlen_dtype("u1"), filled=False), NO_NUMBERS),
    "references": (dataset(dtype=h5py.ref_dtype, filled=False), NO_NUMBERS),
    "regions": (dataset(dtype=h5py.regionref_dtype, filled=False), NO_NUMBERS),
    "complex": (dataset(dtype=complex, filled=False), NO_NUMBERS),
    "arrays": (dataset(dtype=("u1", (2,)), filled=False), NO_NUMBERS),
    "nothing": (link(CODES, h5py.Empty("u1")), f"{CODES}: must have shape ([any,] any, 10), has None."),
    "long name": (attribute("name", b"x" * 20_000), "/layers/0: its attribute 'name' cannot be read: it has more"),
    "name of another type": (attribute("name", np.void(b"x")), NAME + "something else."),
    "name as an array": (attribute("name", [b"x"] * 3), NAME + "an array of shape (3,)."),
    "no name at all": (attribute("name", h5py.Empty("S1")), NAME + "nothing."),
    "immense number": (
        attribute("rows", np.uint64(2**64 - 1)),
        f"{CODES}: must have shape ([any,] any, 9223372036854775808",
    ),
    "an axis too many": (
        dataset(data=np.zeros((2, 3, 5, 10), np.uint8), shape=(2, 3, 5, 10)),
        f"{CODES}: must have shape ([any,] any, 10), has (2, 3, 5, 10).",
    ),
    "no problems": (
        dataset(shape=(0, 5, 10), filled=False),
        f"{CODES}: must have shape ([any,] any, 10), has (0, 5, 10).",
    ),
    "more problems than scales": (
        dataset(data=np.zeros((2, 5, 10), np.uint8), shape=(2, 5, 10)),
        "/layers/0/scale: must have shape (2, 1, 5), has (1, 5).",
    ),
    "immense number of problems": (
        dataset(shape=(2**40, 5, 10), chunks=(2**10, 5, 10), filled=False),
        MOST + "54,975,581,388,800.",
    ),
    "fraction": (attribute("bits", 4.0), "/layers/0: must have an attribute 'bits' of type int, has something else."),
    "infinite error": (infinite, "/layers/0/report: `report` must hold text and finite numbers, got "),
    "escapes in a message": (attribute("group_size", "\x1b[31m\n"), "/layers/0: must have an attribute 'group_size'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(quantized, case):
    change, message = REFUSED[case]
    with editing(quantized) as file:
        change(file)
    if message is None:
        assert list(read(quantized)[1]) == ["fc"]
    else:
        assert refused(quantized).startswith(message)


def test_numbers_of_other_types_that_lose_nothing(quantized):
    before = read(quantized)[1]["fc"]
    with editing(quantized) as file:
        layer = file["layers/0"]
        for name, dtype in (("scale", ">f4"), ("zero_point", ">i2")):
            values = layer[name][()]
            del layer[name]
            layer[name] = values.astype(dtype)
    after = read(quantized)[1]["fc"]
    assert after.scale.dtype == before.scale.dtype == np.float32
    np.testing.assert_array_equal(after.dequantize(), before.dequantize())


REPACKED = [
    {"compression": "gzip"},
    {"compression": "gzip", "shuffle": True, "fletcher32": True},
    {"fletcher32": True},
    {"shuffle": True},
    {},
]


@pytest.mark.parametrize("options", REPACKED, ids=str)
@pytest.mark.parametrize("chunks", [(64, 48), (100, 7), (1000, 1000)])
def test_files_that_were_compressed_are_read(problem, tmp_path, options, chunks):
    """Also where chunks reach over the edges of the array, and with the digests that it had."""
    gram = comq_np.Gram(90)
    gram.update(problem(90, 2).X)
    path = tmp_path / "g.h5"
    comq_np.save_gram(path, gram)
    with editing(path, keep_digests=True) as file:
        values = file["fold0/matrix"][()]
        del file["fold0/matrix"]
        limits = {"maxshape": (None, None)} if chunks > values.shape else {}
        file.create_dataset("fold0/matrix", data=values, chunks=chunks, **limits, **options)
    np.testing.assert_array_equal(comq_np.load_gram(path).folds[0].matrix, gram.folds[0].matrix)


def test_a_file_may_hold_32_times_its_size(tmp_path):
    """Gzip makes next to nothing of zeros: so few bytes may stand for an array of 16 MiB, but for no larger one."""
    path = tmp_path / "g.h5"
    for rows, fits in ((1448, True), (1449, False)):
        comq_np.save_gram(path, comq_np.Gram(rows))
        with editing(path) as file:
            for fold in ("fold0", "fold1"):
                del file[fold]["matrix"]
                file[fold].create_dataset(
                    "matrix", (rows, rows), "f8", np.zeros((rows, rows)), compression="gzip", chunks=(rows, rows)
                )
        repacked = tmp_path / "repacked.h5"
        with h5py.File(path) as source, h5py.File(repacked, "w") as target:
            for name in source:
                source.copy(name, target)
            target.attrs.update(source.attrs)
        assert repacked.stat().st_size < 2**19
        if fits:
            assert len(comq_np.load_gram(repacked)) == rows
        else:
            with pytest.raises(comq_np.FileError, match=r"/fold0/matrix: must have at most 16,777,216 bytes, 32 times"):
                comq_np.load_gram(repacked)


def test_a_bomb_takes_no_memory(quantized):
    """A chunk that unpacks to far more than its array is unpacked no further than that."""
    with editing(quantized) as file:
        del file[CODES]
        made = file.create_dataset(CODES, (5, 10), "u1", chunks=(5, 10), compression="gzip")
        made.id.write_direct_chunk((0, 0), zlib.compress(bytes(2**21), 9)[:1000])  # about 1 MB
    tracemalloc.start()
    said, (_, peak) = refused(quantized), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said.startswith(f"{CODES}: cannot be read: a chunk must have 50 bytes, has 55")
    assert peak < 500_000


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "C:\\x", "a\nb\x1b[31m", "..", "\u202e", "x" * 16_000, "."])
def test_names_are_only_names(problem, tmp_path, name):
    """A layer's name is an attribute: no file, folder or place in a file is ever named by it."""
    gram = comq_np.Gram(6)
    gram.update(problem(6, 4).X)
    files = tmp_path / "c.h5", tmp_path / "q.h5"
    with comq_np.CalibrationWriter(files[0]) as file:
        file.add(comq_np.Layer(name, problem(6, 4).W, gram))
    comq_np.quantize_file(*files)
    assert [layer.name for layer in comq_np.verify_file(*files)] == [name]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c.h5", "q.h5"]
    with h5py.File(files[1]) as file:
        assert list(file["layers"]) == ["0"]


# Digests.


def flipped(path, place, byte):
    """Change one byte of a dataset, behind HDF5's back."""
    with h5py.File(path) as file:
        start = file[place].id.get_offset() + byte
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["codes", "scale", "zero_point", "report"])
def test_one_bit_of_a_quantized_layer(quantized, name):
    flipped(quantized, f"layers/0/{name}", 3)
    message = f"/layers/0/{name}: is damaged: it has another SHA-256 than when it was written."
    assert refused(quantized) == message


@pytest.mark.parametrize("place", ["layers/0/weight", "layers/0/bias", "grams/0/fold0/matrix", "grams/0/fold1/sum"])
def test_one_bit_of_a_calibration_layer(problem, tmp_path, place):
    gram = comq_np.Gram(6)
    gram.update(problem(6, 4).X)
    path = tmp_path / "c.h5"
    with comq_np.CalibrationWriter(path) as file:
        file.add(comq_np.Layer("fc", problem(6, 4).W, gram, np.ones(4)))
    flipped(path, place, 0)
    with comq_np.CalibrationFile(path) as file:
        assert file.describe()[0]["layer"] == "fc"
        with pytest.raises(comq_np.FileError, match=f"/{place}: is damaged"):
            file["fc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file: file["layers/0"].pop("bias_shift"),
            "/layers/0: must have a member 'bias_shift', as its `sha256` says.",
        ),
        (
            lambda file: file["layers/0"].attrs.pop("bits"),
            "/layers/0: must have an attribute 'bits' of type int, has None.",
        ),
        (attribute("levels", 8), "/layers/0: its attribute 'levels' is damaged: it has another SHA-256"),
        (attribute("sha256", "{"), "/layers/0: must have JSON in its attribute 'sha256', has '{'."),
        (attribute("sha256", 7), "/layers/0: must have JSON in its attribute 'sha256', has 7."),
        (attribute("note", "of a user"), None),
        (lambda file: file["layers/0"].__setitem__("extra", np.ones(3)), None),
        (lambda file: file.pop("layers"), "/: must hold 1 layers, holds 0."),
        (lambda file: file.move("layers/0", "layers/1"), "/layers: must have a group '0'."),
    ],
)
def test_digests_tell_what_was_taken_or_changed(problem, tmp_path, change, message):
    gram, path = comq_np.Gram(6), tmp_path / "q.h5"
    gram.update(problem(6, 4).X)
    with comq_np.QuantizedWriter(path) as file:
        file.add("fc", comq_np.solve(problem(6, 4).W, gram, fit_bias=True))
    with editing(path, keep_digests=True) as file:
        change(file)
    if message is None:
        assert read(path)[1]["fc"].bias_shift is not None
    else:
        assert refused(path).startswith(message)


def test_a_bias_shift_that_was_not_there(quantized):
    with editing(quantized, keep_digests=True) as file:
        file["layers/0/bias_shift"] = np.ones(5, np.float32)
    assert refused(quantized) == "/layers/0: must not have a member 'bias_shift', as its `sha256` says."


def test_what_is_written_has_no_text_in_heaps_and_no_times(quantized):
    content = quantized.read_bytes()
    assert content[8] == 2  # HDF5's checksums are there from this version of its first block on
    assert b"GCOL" not in content
    with h5py.File(quantized) as file:
        for place in ("/", "/layers", "/layers/0", CODES):
            assert h5py.h5o.get_info(file[place].id).mtime == 0
        assert "sha256" in file.attrs
        assert "sha256" in file["layers/0"].attrs


@pytest.mark.parametrize("name", ["calibration", "gram", "quantized", "quantized-wide"])
def test_what_was_written_before_there_were_digests_has_text_in_heaps(name):
    """Those files are read all the same: `files/test_versions.py` reads them."""
    form, _, wide = name.partition("-")
    assert b"GCOL" in (DATA / f"{form}-v1{'-wide' * bool(wide)}.h5").read_bytes()


def test_text_of_variable_length_behind_a_block_of_a_user(tmp_path):
    """Addresses count from where HDF5's own part of the file starts."""
    with h5py.File(DATA / "quantized-v1.h5") as old, h5py.File(tmp_path / "q.h5", "w", userblock_size=1024) as new:
        new.attrs.update(old.attrs)
        old.copy("layers", new)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file, comq_np.QuantizedFile(DATA / "quantized-v1.h5") as before:
        assert list(file) == list(before)
        assert all(file[name].report == before[name].report for name in file)
