"""How well do networks survive when the inputs of their layers are quantized, too? On the test images of Fashion-MNIST.

    python benchmarks/activations.py --json activations.json

The CNN and the vision transformer of ``comq demo`` in PyTorch, as in `fashion_mnist.py`, which says where the images
come from. Every input of a layer with weights is on a static grid, with one scale for all of it: ``W4A8`` are weights
of 4 bits with inputs of 8. The grid has the least square error on 512 training images (``solved``) or reaches from the
least to the largest of these values (``minmax``); with ``channel`` each channel has the best grid of its own, and the
weights absorb the scales. In any case the weights are solved for the outputs of the float network on the quantized
inputs. ``solved, sequential`` does so layer after layer, each on what the ones before make of the images. And
``minmax, weights of solved`` has the weights of ``solved`` to the bit, but for its ranges those of ``minmax``.

`accuracy` is the share of the test images that are classified right, `points` how many hundredths of it are lost
against the float network, `agreement` the share of which both say the same, and `logit_error` the square error of the
logits, divided by their squares. These are means over `--sets` sets of calibration images: those of the demonstration,
and as many at a time drawn from the training images. With several, `fewer_than_minmax` is how many points fewer a row
loses than ``minmax``, in the mean over the sets, `fewer_than_same_weights` than ``minmax, weights of solved``, and
`deviation_minmax` and `deviation_same_weights` are the standard deviations of these means.
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
from comq_torch.activations import InputQuantizer
from fashion_mnist import BATCH, calibration_batches, load_model
from train_demo_networks import DATASET, NETWORKS, load, to_tensor

RANGES = {
    "minmax": {"activation_options": {"recipe": "minmax"}},
    "solved": {},
    "channel": {"activation_options": {"axis": "channel"}},
    "solved, sequential": {"sequential": True},
}
SAME_WEIGHTS = "minmax, weights of solved"
#: What the other rows are compared with, and how that is called.
BASELINES = {"minmax": "minmax", SAME_WEIGHTS: "same_weights"}


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


def networks(
    model: nn.Module, batches: list[torch.Tensor], bits: int, activation_bits: int, ranges: list[str], recipe: str
) -> dict[str, nn.Module]:
    """Quantized copies of the network with each kind of ranges."""
    made = {}
    for name in ranges:
        made[name] = copy.deepcopy(model)
        options = {"recipe": recipe, "activation_bits": activation_bits, **RANGES[name]}
        comq_torch.quantize(made[name], batches, bits, **options)
    if {"minmax", "solved"} <= made.keys():
        same = made[SAME_WEIGHTS] = copy.deepcopy(made["solved"])
        for module, other in zip(same.modules(), made["minmax"].modules(), strict=True):
            if isinstance(module, InputQuantizer):
                module.load_state_dict(other.state_dict())
    return made


def compared(points: dict[str, list[float]], ranges: str) -> dict[str, float]:
    """By how many points fewer are lost than with the baselines, on the same sets."""
    found = {}
    for baseline, name in BASELINES.items():
        if baseline in points:
            fewer = np.subtract(points[baseline], points[ranges])
            found[f"fewer_than_{name}"] = float(fewer.mean())
            found[f"deviation_{name}"] = float(fewer.std(ddof=1) / len(fewer) ** 0.5)
    return found


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
            rows: dict[str, list[dict[str, float]]] = {}
            for batches in sets:
                made = networks(model, batches, bits, activation_bits, options.ranges, options.recipe)
                for ranges, changed in made.items():
                    rows.setdefault(ranges, []).append(judged(logits_of(changed, images), exact, labels))
            points = {ranges: [row["points"] for row in of] for ranges, of in rows.items()}
            for ranges, of in rows.items():
                means = {metric: float(np.mean([row[metric] for row in of])) for metric in of[0]}
                further = compared(points, ranges) if len(sets) > 1 else {}
                figures.add(f"{name} W{bits}A{activation_bits}", bits, ranges, **means, **further)
    figures.show(options.json)


if __name__ == "__main__":
    main()
