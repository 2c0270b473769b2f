"""How well do networks survive when the inputs of their layers are quantized, too? On the test images of Fashion-MNIST.

    python benchmarks/activations.py --json activations.json

The CNN and the vision transformer of ``comq demo`` in PyTorch, as in `fashion_mnist.py`, which says where the images
come from. Every input of a layer with weights is on a static grid, with one scale for all of it: ``W4A8`` are weights
of 4 bits with inputs of 8. The grid has the least square error on 512 training images (``solved``) or reaches from the
least to the largest of these values (``minmax``); with ``channel`` each channel has the best grid of its own, and the
weights absorb the scales. In any case the weights are solved for the outputs of the float network on the quantized
inputs. ``solved, sequential`` does so layer after layer, each on what the ones before make of the images.

`accuracy` is the share of the test images that are classified right, `points` how many hundredths of it are lost
against the float network, `agreement` the share of which both say the same, and `logit_error` the square error of the
logits, divided by their squares. These are means over `--sets` sets of calibration images: those of the demonstration,
and as many at a time drawn from the training images. With several, `against_minmax` is how many points fewer a row
loses than ``minmax``, in the mean over the sets, and `deviation` the standard deviation of that mean.
"""

from __future__ import annotations

import argparse
import copy
import pathlib

import numpy as np
import torch
from torch import nn

import comq_torch
from comq_np.table import Figures
from fashion_mnist import BATCH, calibration_batches, load_model
from train_demo_networks import DATASET, NETWORKS, load, to_tensor

RANGES = {
    "minmax": {"activation_options": {"recipe": "minmax"}},
    "solved": {},
    "channel": {"activation_options": {"axis": "channel"}},
    "solved, sequential": {"sequential": True},
}


@torch.no_grad()
def logits_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Logits (count, 10) that the network gives images (count, 28, 28)."""
    parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return torch.cat([model(to_tensor(part)) for part in parts]).double().numpy()


def calibration_sets(folder: pathlib.Path, count: int) -> list[list[torch.Tensor]]:
    """Batches of so many sets of images to calibrate on."""
    first, images = calibration_batches(), load(folder, "train")[0] if count > 1 else None
    sets, drawn, size = [first], np.random.default_rng(0), sum(map(len, first))
    for _ in range(count - 1):
        some = images[drawn.choice(len(images), size, replace=False)]
        sets.append([to_tensor(part) for part in np.array_split(some, len(first))])
    return sets


def judged(found: np.ndarray, exact: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures of logits (count, 10), beside those of the float network."""
    accuracy, right = ((logits.argmax(1) == labels).mean() for logits in (found, exact))
    return {
        "accuracy": float(accuracy),
        "points": float(100 * (right - accuracy)),
        "agreement": float((found.argmax(1) == exact.argmax(1)).mean()),
        "logit_error": float(np.square(found - exact).sum() / np.square(exact).sum()),
    }


def compared(points: list[float], minmax: list[float]) -> dict[str, float]:
    """By how many points fewer are lost than with min-max ranges, on the same sets."""
    better = np.subtract(minmax, points)
    return {"against_minmax": float(better.mean()), "deviation": float(better.std(ddof=1) / len(better) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "4/4"], metavar="W/A", help="of weights and inputs")
    parser.add_argument("--ranges", nargs="+", default=list(RANGES), choices=RANGES)
    parser.add_argument("--recipe", default="balanced", help="of the weights")
    parser.add_argument("--case", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--sets", type=int, default=1, help="of calibration images (default: 1)")
    parser.add_argument("--dataset", type=pathlib.Path, default=DATASET, help="folder of the idx.gz files")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    images, labels = load(options.dataset, "t10k")
    sets, figures = calibration_sets(options.dataset, options.sets), Figures()
    for name in options.case:
        model = load_model(name)
        exact = logits_of(model, images)
        figures.add(name, 32, "float", **judged(exact, exact, labels))
        for width in options.bits:
            bits, activation_bits = map(int, width.split("/"))
            points: dict[str, list[float]] = {}
            for ranges in options.ranges:
                chosen = {"recipe": options.recipe, "activation_bits": activation_bits, **RANGES[ranges]}
                rows = []
                for batches in sets:
                    changed = copy.deepcopy(model)
                    comq_torch.quantize(changed, batches, bits, **chosen)
                    rows.append(judged(logits_of(changed, images), exact, labels))
                points[ranges] = [row["points"] for row in rows]
                means = {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}
                if len(sets) > 1 and "minmax" in points:
                    means |= compared(points[ranges], points["minmax"])
                figures.add(f"{name} W{bits}A{activation_bits}", bits, ranges, **means)
    figures.show(options.json)


if __name__ == "__main__":
    main()
