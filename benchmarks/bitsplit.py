"""Bit planes beside uniform codes: held-out error, and bits a weight with all scales; and a start bit by bit.

    python benchmarks/bitsplit.py --json bitsplit.json
    python benchmarks/bitsplit.py --case minilm --layers 12 --recipe balanced --bits 2

Needs the extra `test`. Layers, calibration and held-out inputs are those of `quality.py`. Case is the network; recipe
is that of the solver, and what it is used for:

- `balanced`, `best`: uniform codes, as the adapters let users run them; one scale and whole zero point a column.
- `.../real`: the same with a real zero point, from which the planes start.
- `.../planes`: ``codebook="planes"``.
- `.../groups`: uniform codes with a scale and a whole zero point for each of several groups of rows, the fewest that
  take at least as many bytes as the scales and offsets of the planes do.
- `.../split`: uniform codes from the start "bitsplit" on the grid that the recipe has found, by its sweeps and
  searches.
- `.../both`: of each column the better of the codes of the recipe and those of `split`, by the matrix that is
  minimised: what that start is worth as one more.

`heldout_error` and `calibration_error` are geometric means over the layers of ``||X Wq - X W||**2 / ||X W||**2`` on
either inputs; the bias takes up the mean error. `bits_per_weight` is 8 times the bytes of all arrays of the layers in a
quantized file, scales, zero points and offsets among them, over the number of weights. Then each held-out error is
given over that of uniform codes by the same recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import comq_np
import comq_torch
import quality
from comq_np.table import Figures, table

Solution = comq_np.QuantizedArray | comq_np.PlaneArray
WAYS = ("uniform", "real", "planes", "groups", "split", "both")
RECIPES = ("balanced", "best")


def solutions(layer: comq_np.Layer, bits: int, recipe: str, ways: list[str], threads: int | None) -> Iterator[Solution]:
    """Solution of a layer in each way."""
    options: dict[str, Any] = {"fit_bias": layer.bias is not None, "threads": threads}
    uniform = comq_np.solve(layer.weight, layer.gram, bits, recipe=recipe, **options)
    options["shrinkage"] = uniform.report.shrinkage
    split = split_codes(layer, bits, recipe, uniform, options) if {"split", "both"} & set(ways) else uniform
    for way in ways:
        if way == "uniform":
            yield uniform
        elif way == "split":
            yield split
        elif way == "both":
            yield better(layer, uniform, split)
        elif way == "planes":
            yield comq_np.solve(layer.weight, layer.gram, bits, recipe=recipe, codebook="planes", **options)
        else:
            more: dict[str, Any] = {"zero_point": "real"} if way == "real" else {"group_size": equal_size(layer, bits)}
            yield comq_np.solve(layer.weight, layer.gram, bits, recipe=recipe, **options, **more)


def equal_size(layer: comq_np.Layer, bits: int) -> int:
    """Rows of a group, so that scales of float32 and zero points of a byte take as many bytes as those of planes."""
    groups = -(-4 * (bits + 1) // 5)
    return -(-len(layer.weight) // groups)


def split_codes(
    layer: comq_np.Layer, bits: int, recipe: str, uniform: comq_np.QuantizedArray, options: dict[str, Any]
) -> comq_np.QuantizedArray:
    """Codes from the start bit by bit, on the grid of others."""
    steps = comq_np.recipe(recipe).replace(
        name="bitsplit", start="bitsplit", other_orders=(), paths=1, search=0, neighbours=0
    )
    grid = {"scale": uniform.scale, "zero_point": uniform.zero_point}
    return comq_np.solve(layer.weight, layer.gram, bits, recipe=steps, **options, **grid)


def better(layer: comq_np.Layer, one: comq_np.QuantizedArray, other: comq_np.QuantizedArray) -> comq_np.QuantizedArray:
    """Columns with the lower objective of the matrix that both minimise; they have the grid in common."""
    G = layer.gram.matrix if one.bias_shift is None else layer.gram.centred
    share = one.report.shrinkage
    G = (1 - share) * G + share * np.diag(G).mean() * np.eye(len(G))

    def objective(q: comq_np.QuantizedArray) -> npt.NDArray[np.float64]:
        E = layer.weight.astype(np.float64) - q.dequantize()
        return np.einsum("ij,ij->j", E, G @ E)

    chosen = objective(other) < objective(one)
    shift = one.bias_shift
    if shift is not None and other.bias_shift is not None:
        shift = np.where(chosen, other.bias_shift, shift)
    return dataclasses.replace(one, codes=np.where(chosen, other.codes, one.codes), bias_shift=shift)


def stored_bytes(q: Solution) -> int:
    """Bytes of its arrays in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "quantized.h5")
        with comq_np.QuantizedWriter(path) as writer:
            writer.add("layer", q)
        with comq_np.QuantizedFile(path) as file:
            return int(file.describe()[0]["bytes"])


def judge(
    case: quality.Case, paths: list[pathlib.Path], bits: int, recipe: str, ways: list[str], threads: int | None
) -> list[dict[str, Any]]:
    """Row of figures for each way."""
    errors: dict[str, list[list[float]]] = {way: [] for way in ways}
    size, weights = dict.fromkeys(ways, 0), 0
    with comq_np.CalibrationFile(paths[0]) as calibration, comq_np.CalibrationFile(paths[1]) as heldout:
        for name in tqdm(case.layers, desc=f"{case.name} {bits} {recipe}"):
            layer = calibration[name]
            W, grams = layer.weight.astype(np.float64), (layer.gram, heldout[name].gram)
            weights += W.size
            for way, q in zip(ways, solutions(layer, bits, recipe, ways, threads), strict=True):
                shift = None if q.bias_shift is None else q.bias_shift.astype(np.float64)
                Wq = q.dequantize().astype(np.float64)
                errors[way].append([quality.relative_error(W, Wq, shift, gram) for gram in grams])
                size[way] += stored_bytes(q)
    rows = []
    for way in ways:
        means = quality.geometric_means(errors[way])
        rows.append(
            {
                "case": case.name,
                "bits": bits,
                "recipe": recipe if way == "uniform" else f"{recipe}/{way}",
                **dict(zip(("calibration_error", "heldout_error"), means, strict=True)),
                "bits_per_weight": 8 * size[way] / weights,
            }
        )
    return rows


def captured(case: quality.Case, folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of both inputs in a folder; those that are there already are taken as they are."""
    paths = [folder / f"{case.name}-{side}.h5" for side in ("calibration", "heldout")]
    for path, batches in zip(paths, (case.calibration, case.heldout), strict=True):
        if not path.exists():
            comq_torch.capture(case.model, batches, path, case.layers, select=case.select, progress=True)
    return paths


def rows_of(name: str, folder: pathlib.Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of figures of a network for every width and recipe."""
    case = quality.minilm_case(options.texts) if name == "minilm" else quality.efficientnet_case()
    case = dataclasses.replace(case, layers=case.layers[: options.layers])
    paths, (ways, threads) = captured(case, folder), (options.way, options.threads)
    return [
        row
        for bits in options.bits
        for recipe in options.recipe
        for row in judge(case, paths, bits, recipe, ways, threads)
    ]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out error of every row over that of uniform codes by the same recipe, where these were solved."""
    found = {(row["case"], row["bits"], row["recipe"]): row["heldout_error"] for row in rows}
    return [
        {"case": case, "bits": bits, "recipe": name, "heldout_error/uniform": error / found[case, bits, base]}
        for (case, bits, name), error in found.items()
        if (case, bits, base := name.partition("/")[0]) in found and name != base
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(quality.CASES), default=list(quality.CASES))
    parser.add_argument("--bits", type=int, nargs="+", choices=(1, 2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--texts", type=int, default=quality.minilm.CALIBRATION_TEXTS, help="of MiniLM, 1 to 512")
    parser.add_argument("--layers", type=int, help="only the first so many of each network")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the captured Grams here, or take those that are here")
    parser.add_argument("--threads", type=int, help="of the solver, by default one for each core")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if not 1 <= options.texts <= quality.minilm.CALIBRATION_TEXTS:
        parser.error(f"--texts must be from 1 to {quality.minilm.CALIBRATION_TEXTS}, got {options.texts}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    quality.check_packages(options.case, [])
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in options.case:
            rows += rows_of(name, folder, options)
    figures = Figures()
    for row in rows:
        figures.add(**row)
    figures.show(options.json)
    if compared := ratios(rows):
        print(f"\n{table(compared)}")


if __name__ == "__main__":
    main()
