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
logits, divided by their squares.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "4/4"], metavar="W/A", help="of weights and inputs")
    parser.add_argument("--ranges", nargs="+", default=list(RANGES), choices=RANGES)
    parser.add_argument("--recipe", default="balanced", help="of the weights")
    parser.add_argument("--case", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--dataset", type=pathlib.Path, default=DATASET, help="folder of the idx.gz files")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    images, labels = load(options.dataset, "t10k")
    batches, figures = calibration_batches(), Figures()
    for name in options.case:
        model = load_model(name)
        exact = logits_of(model, images)
        right = float((exact.argmax(1) == labels).mean())
        figures.add(name, 32, "float", accuracy=right, points=0.0, agreement=1.0, logit_error=0.0)
        for width in options.bits:
            bits, activation_bits = map(int, width.split("/"))
            for ranges in options.ranges:
                changed = copy.deepcopy(model)
                chosen = {"recipe": options.recipe, "activation_bits": activation_bits, **RANGES[ranges]}
                comq_torch.quantize(changed, batches, bits, **chosen)
                found = logits_of(changed, images)
                accuracy = float((found.argmax(1) == labels).mean())
                figures.add(
                    f"{name} W{bits}A{activation_bits}",
                    bits,
                    ranges,
                    accuracy=accuracy,
                    points=100 * (right - accuracy),
                    agreement=float((found.argmax(1) == exact.argmax(1)).mean()),
                    logit_error=float(np.square(found - exact).sum() / np.square(exact).sum()),
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
