"""What `comq demo` runs: quantize both networks with every recipe and judge them on images they have not seen."""

from __future__ import annotations

import pathlib
import time

import numpy as np
import numpy.typing as npt

from comq_np.checks import FileError
from comq_np.demo.networks import Dataset, Images, Network, Replaced, load_images, load_networks
from comq_np.gram import Gram
from comq_np.pipeline import quantize_file
from comq_np.solver import solve
from comq_np.store import CalibrationWriter, Layer, QuantizedFile
from comq_np.table import Figures

BITS = (4, 3, 2)
#: Recipes, and whether they let the biases take up the mean error, which the published ones do not.
RECIPES = {"rtn": False, "paper": False, "balanced": True}

LEGEND = """
accuracy and float_accuracy: share of {count:,} test images that the quantized and the float network get right;
agreement: share on which both say the same; relative_error: ||X Wq - X W||^2 / ||X W||^2 on the calibration images,
geometric mean over the layers; seconds: time to solve all layers, from file to file."""

NEXT = """\
Next:
  comq info {folder}/vit.4bit.balanced.h5
  comq verify {folder}/vit.calibration.h5 {folder}/vit.4bit.balanced.h5
  For a PyTorch model of your own, see README.md."""


def run(output: pathlib.Path, json_path: pathlib.Path | None = None) -> None:
    """Quantize both networks to 4, 3 and 2 bits with every recipe; print a table of what that costs.

    Parameters
    ----------
    output : Path
        Folder for the files, made if it is missing: ``NETWORK.calibration.h5`` and ``NETWORK.BITSbit.RECIPE.h5``.
    json_path : Path, optional
        File for the figures as JSON, too: a list of ``{"case": "cnn", "bits": 4, "recipe": "balanced",
        "metric": "accuracy", "value": 0.9}``. The metrics are those of `LEGEND`.

    Raises
    ------
    FileError
        If a file cannot be written.
    """
    _make_writable(output, json_path)
    dataset, figures = load_images(), Figures()
    _say("compiling the solver")
    _warm_up()
    for network in load_networks():
        calibration = output / f"{network.name}.calibration.h5"
        _say(f"{network.name}: running {len(dataset.calibration_images)} images for the Gram matrices of its layers")
        capture(network, dataset.calibration_images, calibration)
        _compare(network, calibration, dataset, figures)
    print()
    figures.show(json_path)
    print(LEGEND.format(count=len(dataset.test_images)), end="\n\n")
    print(f"Written to {output}: for each network its calibration file and {len(BITS) * len(RECIPES)} quantized files.")
    if json_path is not None:
        print(f"Written to {json_path}: the figures of the table.")
    print(NEXT.format(folder=output))


def capture(network: Network, images: Images, path: pathlib.Path) -> None:
    """Write the calibration file of a network: the weights, biases and Grams of all its layers."""
    grams = {layer: Gram(len(network.weight(layer))) for layer in network.layers}
    network.logits(images, tap=lambda layer, X: grams[layer].update(X))
    with CalibrationWriter(path) as file:
        for layer, gram in grams.items():
            file.add(Layer(layer, network.weight(layer), gram, network.bias(layer), network.kind(layer)))


def replacements(path: pathlib.Path) -> Replaced:
    """Weights and bias shifts that a quantized file holds, as `Network.logits` takes them."""
    with QuantizedFile(path) as file:
        return {layer: (q.dequantize(), q.bias_shift) for layer, q in file.items()}


def _compare(network: Network, calibration: pathlib.Path, dataset: Dataset, figures: Figures) -> None:
    """Add the figures of every number of bits and every recipe for one network."""
    exact = _guesses(network, dataset.test_images)
    for bits in BITS:
        _say(f"{network.name}: solving {len(network.layers)} layers at {bits} bits with {', '.join(RECIPES)}")
        for recipe, fit_bias in RECIPES.items():
            quantized = calibration.with_name(f"{network.name}.{bits}bit.{recipe}.h5")
            started = time.perf_counter()
            reports = quantize_file(calibration, quantized, bits, recipe=recipe, fit_bias=fit_bias)
            seconds = time.perf_counter() - started
            found = _guesses(network, dataset.test_images, replacements(quantized))
            errors = [report.relative_error for report in reports.values()]
            figures.add(
                network.name,
                bits,
                recipe,
                accuracy=float((found == dataset.test_labels).mean()),
                float_accuracy=float((exact == dataset.test_labels).mean()),
                agreement=float((found == exact).mean()),
                relative_error=float(np.exp(np.mean(np.log(errors)))),
                seconds=seconds,
            )


def _guesses(network: Network, images: Images, replaced: Replaced | None = None) -> npt.NDArray[np.intp]:
    """Class that the network holds most likely, for each image."""
    guesses: npt.NDArray[np.intp] = network.logits(images, replaced).argmax(axis=1)
    return guesses


def _warm_up() -> None:
    """Solve something tiny with every recipe, so that no time of compiling ends up in the table."""
    gram = Gram(4)
    gram.update(np.eye(4)[None].repeat(2, axis=0))
    for recipe, fit_bias in RECIPES.items():
        solve(np.eye(4), gram, recipe=recipe, fit_bias=fit_bias)


def _make_writable(output: pathlib.Path, json_path: pathlib.Path | None) -> None:
    """Raise what would stop the writing of files now, not when the figures are there; the JSON stays as it is."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if json_path is not None:
            there = json_path.exists()
            json_path.open("ab").close()
            if not there:
                json_path.unlink()
    except OSError as error:
        raise FileError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _say(text: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(text, flush=True)
