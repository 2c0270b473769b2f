"""Does cross-validation find the shrinkage that is best on texts not seen? The layers of MiniLM, few and many texts.

    python benchmarks/shrinkage.py --json shrinkage.json

Needs the extra `test`. Every seventh layer of the encoder, so that each kind is among them, is solved by "balanced"
with the bias taking up the mean error, once with the shrinkage that cross-validation chooses and with each of seven
fixed ones, and judged as in `quality.py`. Case is the number of texts calibrated on. `chosen/best` is the held-out
error with the chosen shrinkage over that with the best fixed one of the layer, which nobody knows beforehand, as a
geometric mean over the layers; `worst` is that of the worst layer; `nonlinear/best` and `nonlinear_worst` are the same
of nonlinear shrinkage; `none/best` and `common/best` are the means with no shrinkage and with the one fixed shrinkage
that is best for all layers together. `choosing/solving` is the time that the choice takes over that of the rest, summed
over the layers, and `nonlinear/solving` that of nonlinear shrinkage; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time

import numpy as np
from tqdm import tqdm

import comq_np
import comq_torch
import quality
from comq_np.table import Figures

SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
#: What shrinks by what the folds tell.
WAYS = ("auto", "nonlinear")
TEXTS = (10, 64, 512)
EVERY = 7


def error_and_seconds(layer: comq_np.Layer, heldout: comq_np.Gram, bits: int, shrinkage: object) -> tuple[float, float]:
    """Held-out relative error of a solve, and the seconds that it took."""
    started = time.perf_counter()
    q = comq_np.solve(layer.weight, layer.gram, bits, fit_bias=True, shrinkage=shrinkage)
    seconds = time.perf_counter() - started
    W, Wq, shift = (array.astype(np.float64) for array in (layer.weight, q.dequantize(), q.bias_shift))
    return quality.relative_error(W, Wq, shift, heldout), seconds


def figures_of(layers: list[tuple[comq_np.Layer, comq_np.Gram]], bits: int, progress: tqdm) -> dict[str, float]:
    """Figures of one number of bits."""
    found = np.empty((len(layers), len(WAYS) + len(SHRINKAGES), 2))
    for k, (layer, heldout) in enumerate(layers):
        for i, shrinkage in enumerate((*WAYS, *SHRINKAGES)):
            found[k, i] = error_and_seconds(layer, heldout, bits, shrinkage)
            progress.update()
    errors, seconds = np.log(found[:, :, 0]), found[:, :, 1]
    fixed = slice(len(WAYS), None)
    ratios = np.exp(errors - errors[:, fixed].min(axis=1, keepdims=True))
    (chosen, nonlinear, *_), worst = np.exp(np.log(ratios).mean(axis=0)), ratios.max(axis=0)
    means = np.exp(np.log(ratios[:, fixed]).mean(axis=0))
    times = seconds[:, : len(WAYS)].sum(axis=0) / np.median(seconds[:, fixed], axis=1).sum() - 1
    return {
        "chosen/best": float(chosen),
        "worst": float(worst[0]),
        "nonlinear/best": float(nonlinear),
        "nonlinear_worst": float(worst[1]),
        "none/best": float(means[0]),
        "common/best": float(means.min()),
        "choosing/solving": float(times[0]),
        "nonlinear/solving": float(times[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--texts", type=int, nargs="+", default=TEXTS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    comq_np.solve(np.eye(4), np.eye(4))  # compiles
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        paths = {texts: pathlib.Path(folder, f"{texts}.h5") for texts in (0, *options.texts)}
        for texts, path in paths.items():
            case = quality.minilm_case(max(texts, 1))
            batches = case.calibration if texts else case.heldout
            case = dataclasses.replace(case, layers=case.layers[::EVERY])
            comq_torch.capture(case.model, batches, path, case.layers, select=case.select, progress=True)
        runs = len(options.texts) * len(options.bits) * len(case.layers) * (len(WAYS) + len(SHRINKAGES))
        with comq_np.CalibrationFile(paths[0]) as heldout, tqdm(total=runs, unit="solve") as progress:
            for texts in options.texts:
                with comq_np.CalibrationFile(paths[texts]) as calibration:
                    layers = [(layer, heldout[name].gram) for name, layer in calibration.items()]
                for bits in options.bits:
                    figures.add(f"minilm_{texts}", bits, "balanced", **figures_of(layers, bits, progress))
    figures.show(options.json)


if __name__ == "__main__":
    main()
