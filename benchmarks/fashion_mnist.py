"""How well do the CNN and the vision transformer of ``comq demo`` survive? On all 10,000 test images of Fashion-MNIST.

    python benchmarks/fashion_mnist.py --json fashion_mnist.json

Needs PyTorch (the extra `test`) and the Fashion-MNIST files (on Debian: ``apt-get install dataset-fashion-mnist``; else
name their folder by `--dataset`). `train_demo_networks.py` trained the networks on the 60,000 training images; here
they are PyTorch's, calibrated on 512 of these. `accuracy` is the share of the test images that are
classified right, `points` how many hundredths of it are lost against the float network, whose row has 32 bits, and
`agreement` the share of the images of which both say the same.
"""

from __future__ import annotations

import argparse
import copy
import pathlib

import numpy as np
import torch
from torch import nn

import comq_torch
from comq_np.demo.networks import load_images, load_networks
from comq_np.table import Figures
from train_demo_networks import CNN, DATASET, NETWORKS, load, to_tensor

#: Recipes that are run as published, without letting the biases take up the mean error.
PUBLISHED = ("rtn", "paper")
BATCH = 250


def load_model(name: str) -> nn.Module:
    """Network "cnn", its batch normalisations folded into the convolutions, or "vit"."""
    model = NETWORKS[name]()
    if isinstance(model, CNN):
        for depth, conv in enumerate(model.convs):
            model.norms[depth] = nn.Identity()
            model.convs[depth] = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    network = next(network for network in load_networks() if network.name == name)
    arrays = {key.replace("conv", "convs.", 1): torch.from_numpy(np.array(a)) for key, a in network.arrays.items()}
    model.load_state_dict(arrays)
    return model.eval()


@torch.no_grad()
def classes(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Class that the network gives each image (count, 28, 28)."""
    parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return torch.cat([model(to_tensor(part)).argmax(1) for part in parts]).numpy()


def calibration_batches() -> list[torch.Tensor]:
    """Training images to calibrate on."""
    return [to_tensor(part) for part in np.array_split(load_images().calibration_images, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced", "best"])
    parser.add_argument("--dataset", type=pathlib.Path, default=DATASET, help="folder of the idx.gz files")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    images, labels = load(options.dataset, "t10k")
    batches, figures = calibration_batches(), Figures()
    for name in NETWORKS:
        model = load_model(name)
        exact = classes(model, images)
        figures.add(name, 32, "float", accuracy=float((exact == labels).mean()))
        for bits in options.bits:
            for recipe in options.recipe:
                quantized = copy.deepcopy(model)
                comq_torch.quantize(quantized, batches, bits, recipe=recipe, fit_bias=recipe not in PUBLISHED)
                found = classes(quantized, images)
                figures.add(
                    name,
                    bits,
                    recipe,
                    accuracy=float((found == labels).mean()),
                    points=100 * float((exact == labels).mean() - (found == labels).mean()),
                    agreement=float((found == exact).mean()),
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
