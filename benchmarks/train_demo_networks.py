"""Train the two networks of ``comq demo`` on Fashion-MNIST and write what the wheel carries.

Needs PyTorch and the Fashion-MNIST files (on Debian: ``apt-get install dataset-fashion-mnist``)::

    python benchmarks/train_demo_networks.py cnn vit images

Each network is trained on the 60,000 training images only, judged once on all 10,000 test images, and
written as float32 arrays with the names that ``comq_np.demo.networks`` reads. ``images`` writes the
first 6,000 test images with their labels and the first 512 training images, for calibration.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import pathlib
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

DATASET = pathlib.Path("/usr/share/datasets/fashion-mnist")
OUTPUT = pathlib.Path(__file__).parents[1] / "comq_np" / "demo" / "data"
TEST_IMAGES, CALIBRATION_IMAGES = 6000, 512
MEAN, STD = 0.2860, 0.3530  # of all training pixels
EPOCHS = {"cnn": 12, "vit": 30}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Array held by a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load(dataset: pathlib.Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 28, 28) and labels of one part, ``"train"`` or ``"t10k"``."""
    return (
        read_idx(dataset / f"{part}-images-idx3-ubyte.gz"),
        read_idx(dataset / f"{part}-labels-idx1-ubyte.gz"),
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Normalised float32 images (count, 1, 28, 28)."""
    return torch.from_numpy((images[:, None].astype(np.float32) / 255 - MEAN) / STD)


class CNN(nn.Module):
    """Three 3x3 convolutions with batch normalisation, two poolings, a global average and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.relu(norm(conv(x)))
            if depth < 2:
                x = functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Weights with the normalisations folded into the convolutions."""
        arrays = {}
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            arrays[f"conv{depth}.weight"] = conv.weight * gain[:, None, None, None]
            arrays[f"conv{depth}.bias"] = norm.bias - gain * norm.running_mean
        arrays["head.weight"], arrays["head.bias"] = self.head.weight, self.head.bias
        return {name: tensor.detach().numpy() for name, tensor in arrays.items()}


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer: 4x4 patches (49 tokens), width 64, 4 blocks of 4 heads, mean over tokens."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.position = nn.Parameter(0.02 * torch.randn(49, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.view(-1, 7, 4, 7, 4).transpose(2, 3).reshape(-1, 49, 16)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters under their module names."""
        return {name: tensor.detach().numpy() for name, tensor in self.named_parameters()}


NETWORKS: dict[str, type[CNN] | type[ViT]] = {"cnn": CNN, "vit": ViT}


def augment(x: torch.Tensor) -> torch.Tensor:
    """Each batch mirrored with chance one half and shifted by up to two pixels, one draw per image for the mirror."""
    mirror = torch.rand(len(x)) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    dy, dx = torch.randint(0, 5, (2,)).tolist()
    padded = functional.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
    return padded[:, :, dy : dy + 28, dx : dx + 28]


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images classified right."""
    model.eval()
    guesses = torch.cat([model(to_tensor(images[i : i + 500])).argmax(1) for i in range(0, len(images), 500)])
    return float((guesses.numpy() == labels).mean())


def train(name: str, dataset: pathlib.Path) -> None:
    """Train one network, print its test accuracy and write its arrays."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    images, labels = load(dataset, "train")
    inputs, targets = to_tensor(images), torch.from_numpy(labels.astype(np.int64))
    steps, rate = len(inputs) // 128, {"cnn": 4e-3, "vit": 2e-3}[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=EPOCHS[name] * steps)
    start = time.perf_counter()
    for epoch in range(EPOCHS[name]):
        model.train()
        for batch in torch.randperm(len(inputs))[: steps * 128].view(steps, 128):
            loss = functional.cross_entropy(model(augment(inputs[batch])), targets[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}: epoch {epoch + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{name}: {accuracy(model, *load(dataset, 't10k')):.4f} of 10,000 test images right", flush=True)
    np.savez_compressed(OUTPUT / f"{name}.npz", **model.arrays())


def write_images(dataset: pathlib.Path) -> None:
    """Write the test and calibration images that the demo runs on."""
    images, labels = load(dataset, "t10k")
    np.savez_compressed(
        OUTPUT / "fashion_mnist.npz",
        test_images=images[:TEST_IMAGES],
        test_labels=labels[:TEST_IMAGES],
        calibration_images=load(dataset, "train")[0][:CALIBRATION_IMAGES],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*NETWORKS, "images"])
    parser.add_argument("--dataset", type=pathlib.Path, default=DATASET, help="folder of the idx.gz files")
    args = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        write_images(args.dataset) if part == "images" else train(part, args.dataset)


if __name__ == "__main__":
    main()
