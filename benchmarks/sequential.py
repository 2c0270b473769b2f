"""What does it gain to quantize layer after layer? A sentence encoder, each layer for itself and in sequence.

    python benchmarks/sequential.py --json sequential.json

Needs the extra `test`. Quantizes all linear layers of all-MiniLM-L6-v2, calibrated on 256 halves of newspaper articles
(or on `--texts`), with each recipe twice: every layer on the inputs that it has in the float model, as
`comq_torch.quantize` does by itself, and, with ``sequential=True``, on those that it gets from the quantized layers
before it, to give the outputs of the float model. Texts and embeddings are those of `minilm.py`: `cosine` is the mean
cosine of an embedding with the float model's on other articles and Lee's documents, `error` is 1 - `cosine`, and `gain`
the share of the error that the sequence takes off; `cosine_reviews` and `gain_reviews` are the same on film reviews.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import time

import numpy as np
import torch
import transformers

import comq_torch
import minilm
from comq_np.table import Figures

TEXTS = 256


def quantized(
    model: torch.nn.Module, batches: list[transformers.BatchEncoding], bits: int, recipe: str, sequential: bool
) -> torch.nn.Module:
    """Copy of the model with quantized linear layers."""
    changed = copy.deepcopy(model)
    comq_torch.quantize(
        changed,
        batches,
        bits,
        layers=minilm.linear_layers(model),
        select=minilm.tokens_that_count,
        sequential=sequential,
        recipe=recipe,
        fit_bias=True,
        progress=True,
    )
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipe", nargs="+", default=["balanced"])
    parser.add_argument("--texts", type=int, default=TEXTS, help="texts to calibrate on (default: 256)")
    parser.add_argument("--judged", type=int, help="texts of each kind to judge on (default: all)")
    parser.add_argument("--layers", type=int, help="blocks of the encoder (default: all)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, tokenizer = minilm.load_model()
    model.encoder.layer = model.encoder.layer[: options.layers]
    texts, figures = minilm.load_texts(), Figures()
    calibration = minilm.tokenize(tokenizer, texts.calibration[: options.texts])
    kinds = [*texts.lee, *texts.articles][: options.judged], texts.reviews[: options.judged]
    judged = [minilm.tokenize(tokenizer, kind) for kind in kinds]
    exact = [minilm.embed(model, batches) for batches in judged]
    for bits in options.bits:
        for recipe in options.recipe:
            errors = []
            for sequential in (False, True):
                started = time.perf_counter()
                changed = quantized(model, calibration, bits, recipe, sequential)
                seconds = time.perf_counter() - started
                found = [minilm.embed(changed, batches) for batches in judged]
                cosine, reviews = (float((a * b).sum(1).mean()) for a, b in zip(found, exact, strict=True))
                errors.append(1 - np.array([cosine, reviews]))
                gain, gain_reviews = map(float, 1 - errors[-1] / errors[0])
                figures.add(
                    "minilm",
                    bits,
                    f"{recipe}, sequential" if sequential else recipe,
                    cosine=cosine,
                    error=1 - cosine,
                    gain=gain,
                    cosine_reviews=reviews,
                    gain_reviews=gain_reviews,
                    seconds=seconds,
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
