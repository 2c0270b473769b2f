"""How well does a sentence encoder survive as an ONNX model? all-MiniLM-L6-v2, exported, quantized, and run.

    python benchmarks/minilm_onnx.py --json minilm_onnx.json

Needs the extra `test`, which has what exports and runs the model. PyTorch exports it and `comq_onnx` quantizes it: the
embeddings to 8 bits, rounded to nearest, then the linear layers to 4 bits, with one scale for each output channel
(`balanced`) or for each block of 64 rows of one (`balanced-64`). The peers are onnxruntime's own: `quantize_dynamic`,
which has 8 bits (`ort-dynamic`), and its `MatMulNBitsQuantizer` with 4 bits in blocks of 64 rows, as it comes (`ort`),
and with HQQ, GPTQ and k-quant (`ort-hqq`, ...), all of which leave embeddings float. Everything is run by onnxruntime
as it comes.

The texts are those of `minilm.py`. `cosine` is the mean cosine of an embedding with the float model's on texts that
were not calibrated on: newspaper articles and Lee's documents. `bytes` is the size of the file, `bytes_ratio` its share
of the float model's.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer as ort_nbits

import comq_onnx
import minilm
from comq_np.table import Figures

BLOCK = 64
#: Rows that share a scale.
OURS = {"balanced": None, "balanced-64": BLOCK}
PEERS = ("ort", "ort-hqq", "ort-gptq", "ort-kquant")
#: Texts that GPTQ is given, of which it keeps the inputs of all layers in memory.
GPTQ_TEXTS = 32
Batch = dict[str, np.ndarray]


class States(torch.nn.Module):
    """The encoder with one output, the states of the tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def export(path: pathlib.Path, layers: int | None) -> None:
    """Write the encoder as an ONNX model that takes any number of texts of any length; the first blocks of it."""
    model, tokenizer = minilm.load_model()
    model.encoder.layer = model.encoder.layer[:layers]
    example = tokenizer(["a text", "another one"], return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    axes = {name: {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=512)} for name in names}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = tuple(example[name] for name in names)
        program = torch.onnx.export(States(model), inputs, dynamo=True, dynamic_shapes=axes, verbose=False)
    logging.disable(logging.NOTSET)
    assert program is not None
    program.save(path)


def tokenize(texts: list[str]) -> list[Batch]:
    """Batches as the exported model takes them."""
    return [dict(batch.convert_to_tensors("np")) for batch in minilm.tokenize(minilm.load_model()[1], texts)]


def tokens_that_count(x: np.ndarray, batch: Batch) -> np.ndarray:
    """Rows of a layer's input that are no padding."""
    mask = batch["attention_mask"].astype(bool)
    return x[mask] if x.shape[:2] == mask.shape else x


def embed(path: pathlib.Path, batches: list[Batch]) -> np.ndarray:
    """Mean over the tokens, normalised, (texts, 384)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session, found = onnxruntime.InferenceSession(path, options), []
    for batch in batches:
        mask = batch["attention_mask"][:, :, None]
        states = (session.run(None, batch)[0] * mask).sum(1)
        found.append(states / np.linalg.norm(states, axis=1, keepdims=True))
    return np.concatenate(found)


class Reader(quantization.CalibrationDataReader):
    """Batches as onnxruntime's quantizer takes them."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches: Iterator[Batch] = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._batches, None)


def by_us(group_size: int | None, model: pathlib.Path, path: pathlib.Path, batches: list[Batch]) -> None:
    """Quantize embeddings to 8 bits, and what then has weights to 4."""
    comq_onnx.quantize(model, batches[:1], 8, output=path, layers=["*embeddings*"], recipe="rtn")
    grid = {"group_size": group_size, "fit_bias": True}
    comq_onnx.quantize(path, batches, 4, output=path, select=tokens_that_count, **grid)


def by_peer(peer: str, model: pathlib.Path, path: pathlib.Path, batches: list[Batch]) -> None:
    """Quantize to 4 bits by onnxruntime's own quantizer."""
    configs = {
        "ort": lambda: None,
        "ort-hqq": lambda: ort_nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK),
        "ort-gptq": lambda: ort_nbits.GPTQWeightOnlyQuantConfig(Reader(batches), block_size=BLOCK),
        "ort-kquant": lambda: ort_nbits.KQuantWeightOnlyQuantConfig(),
    }
    quantizer = ort_nbits.MatMulNBitsQuantizer(onnx.load(model), 4, BLOCK, algo_config=configs[peer]())
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=minilm.CALIBRATION_TEXTS, help="to calibrate on (default: 512)")
    parser.add_argument("--judged", type=int, help="texts to judge on (default: all)")
    parser.add_argument("--layers", type=int, help="blocks of the encoder (default: all)")
    parser.add_argument("--recipe", nargs="+", choices=[*OURS, "ort-dynamic", *PEERS])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    texts, figures = minilm.load_texts(), Figures()
    calibration = tokenize(texts.calibration[: options.texts])
    judged = tokenize([*texts.lee, *texts.articles][: options.judged])
    with tempfile.TemporaryDirectory() as folder:
        model, path = pathlib.Path(folder, "float.onnx"), pathlib.Path(folder, "quantized.onnx")
        export(model, options.layers)
        exact = embed(model, judged)
        for recipe in options.recipe or [*OURS, "ort-dynamic", *PEERS]:
            if recipe in OURS:
                by_us(OURS[recipe], model, path, calibration)
            elif recipe in PEERS:
                by_peer(recipe, model, path, calibration[: GPTQ_TEXTS // minilm.BATCH])
            else:
                quantization.quantize_dynamic(model, path)
            cosine = float((embed(path, judged) * exact).sum(1).mean())
            sizes = {"bytes": path.stat().st_size, "bytes_ratio": path.stat().st_size / model.stat().st_size}
            figures.add("minilm_onnx", 8 if recipe == "ort-dynamic" else 4, recipe, cosine=cosine, **sizes)
    figures.show(options.json)


if __name__ == "__main__":
    main()
