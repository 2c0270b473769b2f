"""Mutated files, read one after another in a process of its own: `python fuzz.py FOLDER FIRST COUNT`.

Each number makes one file, the same one every time. The process ends with a line of counts as JSON, or dies: then
``FOLDER/number`` has the number of the file that it died of, and ``FOLDER/mutant.h5`` is that file.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import gc
import json
import os
import pathlib
import random
import resource
import signal
import sys

import h5py
import numpy as np

import comq_np

FORMATS = ("calibration", "quantized", "gram")
#: As our writers write; as h5py writes by default, and our first version did; through h5repack with gzip.
LAYOUTS = ("ours", "old", "packed")
SECONDS, MEMORY = 20, 2**31
ODD = (b"\0", b"\x01", b"\x7f", b"\x80", b"\xff")


def report():
    return comq_np.SolveReport("rtn", "cpu", 2.0, 2.0, (), 1.5, 0.25, 0, (), True, 0.0, ("A note.",))


def write(form, path):
    rng = np.random.default_rng(0)
    gram = comq_np.Gram(3)
    gram.update(rng.normal(size=(5, 3)))
    if form == "gram":
        comq_np.save_gram(path, gram)
    elif form == "calibration":
        with comq_np.CalibrationWriter(path) as file:
            file.add(comq_np.Layer("a", rng.normal(size=(3, 2)), gram, np.ones(2, np.float32)))
            groups = comq_np.Gram(1, problems=2)
            groups.update(rng.normal(size=(4, 2, 1)))
            named = comq_np.NamedGrams.from_grams({"image": groups, "text": groups})
            file.add(comq_np.Layer("groups", rng.normal(size=(2, 1, 2)), named))
    else:
        codes, scale = np.array([[1, 7], [0, 3], [2, 5]], np.uint8), np.array([[0.5, 0.25]], np.float32)
        q = comq_np.QuantizedArray(codes, scale, np.array([[3, 4]], np.int32), 3, 8, None, scale[0], report())
        with comq_np.QuantizedWriter(path) as file:
            file.add("a", q)
            groups = {"codes": codes[None], "scale": scale[None], "zero_point": q.zero_point[None], "bias_shift": None}
            file.add("groups", dataclasses.replace(q, **groups))
            plane_scale = np.array([[[0.5, 0.25]], [[1.5, 0.5]], [[2.0, 1.0]]], np.float32)
            file.add("planes", comq_np.PlaneArray(codes, plane_scale, scale, 3, None, None, report()))


def copy(source, target, packed):
    """Copy a group as others would write it: by h5py's defaults, or all of it in chunks with every filter we read."""
    for name, value in source.attrs.items():
        if name != "sha256" or packed:
            target.attrs[name] = value.decode() if isinstance(value, bytes) and not packed else value
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            copy(item, target.create_group(name), packed)
        elif packed and item.shape:
            target.create_dataset(
                name, data=item[()], chunks=item.shape, compression="gzip", shuffle=True, fletcher32=True
            )
        else:
            target[name] = item[()] if packed or item.shape else item.asstr()[()]


def contents(form, path):
    """All that the reader tells of a file, so that two of them compare."""
    if form == "gram":
        return folds(comq_np.load_gram(path))
    with (comq_np.CalibrationFile if form == "calibration" else comq_np.QuantizedFile)(path) as file:
        rows, layers = file.describe(), dict(file)
    if form == "calibration":
        return rows, [
            (name, layer.kind, plain(layer.weight), plain(layer.bias), folds(layer.gram))
            for name, layer in layers.items()
        ]
    arrays = ("codes", "scale", "zero_point", "plane_scale", "offset", "bias_shift")
    return rows, [
        (name, q.bits, q.group_size, q.report, [plain(getattr(q, field, None)) for field in arrays])
        for name, q in layers.items()
    ]


def plain(array):
    return None if array is None else (array.dtype.str, array.shape, array.tobytes())


def folds(gram):
    if isinstance(gram, comq_np.NamedGrams):
        return [(name, folds(part)) for name, part in gram.grams.items()]
    return [(plain(fold.matrix), plain(fold.sum), fold.count) for fold in gram.folds]


def mutate_bytes(rng, image, other):
    """Image of a file with bits flipped, bytes or runs replaced, cut, inserted, removed or taken from another image."""
    data, kind = bytearray(image), rng.randrange(7)
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 16, 64, 256))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 16))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[rng.randrange(len(data))] = rng.choice(rng.choice(ODD))
    elif kind == 2:
        data[at : at + length] = rng.choice((rng.choice(ODD) * length, rng.randbytes(length)))
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data[at:at] = rng.randbytes(length)
    elif kind == 5:
        del data[at : at + length]
    else:
        start = rng.randrange(len(other))
        data[at : at + length] = other[start : start + length]
    return bytes(data)


def values(rng):
    """Attributes and datasets of any kind."""
    return rng.choice(
        (
            rng.choice((0, -1, 1, 2**31, 2**63 - 1, -(2**63))),
            rng.choice(("", "a", "column", "x" * 70_000, "\x1b[31m\n../..", b"\xff\xfe")),
            rng.choice((0.5, np.nan, True, np.void(b"1"), h5py.Empty("f4"), 1j)),
            np.full(rng.choice(((), (1,), (2,), (3,), (3, 2), (2, 2), (1, 2), (3, 3), (0, 2))), rng.choice((0, 1, 7))),
            np.ones(
                rng.choice(((2,), (3,), (3, 2), (1, 2))), rng.choice(("<f4", ">f4", "<f8", "<f2", "u1", "<i4", "?"))
            ),
            np.array(["a", "b"], object),
            np.zeros(2, [("a", "i4"), ("b", "f4", 3)]),
        )
    )


def mutate_objects(rng, path):
    """Change attributes, datasets and links of a file through HDF5 itself."""
    with h5py.File(path, "r+") as file:
        places = [file]
        file.visititems(lambda _, item: places.append(item))
        for _ in range(rng.choice((1, 1, 2, 4))):
            item = rng.choice([place for place in places if place])
            group = rng.choice([place for place in places if place and isinstance(place, h5py.Group)])
            names = sorted(group) or ["0"]
            name, kind = rng.choice(names), rng.randrange(8)
            if kind == 0:
                item.attrs[rng.choice([*sorted(item.attrs), "new"])] = values(rng)
            elif kind == 1 and len(item.attrs):
                kept = [key for key in sorted(item.attrs) if key != "sha256"]
                item.attrs.pop(rng.choice(kept) if kept else "none", None)
            elif kind == 2:
                group.pop(name, None)
                group[name] = values(rng)
            elif kind == 3:
                group.pop(name, None)
                target = rng.choice(("/", "/layers", name, "/none"))
                group[name] = rng.choice((h5py.SoftLink(target), h5py.ExternalLink(str(path), target)))
            elif kind == 4:
                group.pop(name, None)
                group[name] = rng.choice((file, group))
            elif kind == 5:
                group[rng.choice(("0", "1", "codes", "weight", "x\x1b\n")) + rng.choice(("", "_"))] = group[name]
                del group[name]
            elif kind == 6:
                group.pop(name, None)
                shape = rng.choice(((2**40, 2**40), (3, 2), (2**20,), (1, 2)))
                group.create_dataset(name, shape, rng.choice(("f4", "f8", "u1")), chunks=True, compression="lzf")
            else:
                group.pop(name, None)
                layout = h5py.VirtualLayout((3, 2), "f4")
                layout[:] = h5py.VirtualSource(str(path), "/layers/0/weight", (3, 2))
                group.create_virtual_dataset(name, layout)


def mutate(rng, images, path):
    """Write a mutant; its format and layout."""
    key = rng.choice(list(images))
    path.write_bytes(images[key])
    if rng.random() < 0.2:
        with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):  # HDF5 refuses some of it
            mutate_objects(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, images[key], images[rng.choice(list(images))]))
    return key


def main(folder, first, count):
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    images, expected, path = {}, {}, folder / "file.h5"
    for form in FORMATS:
        write(form, path)
        images[form, "ours"] = path.read_bytes()
        for layout in ("old", "packed"):
            other = folder / "other.h5"
            with h5py.File(path) as source, h5py.File(other, "w") as target:
                copy(source, target, layout == "packed")
            images[form, layout] = other.read_bytes()
            assert contents(form, other) == contents(form, path)
        expected[form] = contents(form, path)
    before, counts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, collections.Counter()
    mark, mutant = os.open(folder / "number", os.O_CREAT | os.O_RDWR), folder / "mutant.h5"
    for number in range(first, first + count):
        os.pwrite(mark, b"%12d" % number, 0)
        signal.alarm(SECONDS)
        form, layout = mutate(random.Random(number), images, mutant)
        try:
            found = contents(form, mutant)
        except comq_np.FileError as error:
            message, outcome = str(error), "refused"
        else:
            message, outcome = f"{mutant}: ", "equal" if found == expected[form] else "other"
        assert message.startswith(f"{mutant}: "), message
        assert message.isprintable(), message
        assert outcome != "other" or layout == "old", f"mutant {number} of {layout} {form} reads as another file"
        counts[f"{layout} {outcome}"] += 1
    signal.alarm(0)
    os.close(mark)
    gc.collect()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"files": count, "kilobytes": grown, **counts}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
