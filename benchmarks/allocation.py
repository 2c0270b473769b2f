"""Does it help to give some layers more bits than others? A sentence encoder, judged on texts it was not calibrated on.

    python benchmarks/allocation.py --json allocation.json

Model, texts and metrics are those of `minilm.py`. For each number of bits, "uniform" gives it to all linear layers.
"errors" and "sensitivities" allocate bits from 2 to 8 by `comq_np.allocate_bits` so that the file has no more bytes
than that, rounded down to a hundredth of a bit per weight: the first by the relative errors of the layers alone, the
second by what an error of each layer does to the embeddings of the first 64 calibration texts
(`comq_torch.sensitivities`, on layers of 2 bits). A row with a fraction of a bit, such as 2.5, stands between the two
uniform ones in bytes. `embedding_error` is 1 - `cosine`, `stored_bits` what codes, scales and zero points take,
`seconds` the time that an allocation takes before the layers are solved once more.
"""

from __future__ import annotations

import argparse
import copy
import math
import pathlib
import tempfile
import time

import torch
import transformers

import comq_np
import comq_torch
import minilm
from comq_np.table import Figures

#: Calibration texts on which the sensitivities are measured, and the bits of the layers then.
PROBES, PROBED_BITS = 64, 2
RECIPE = "balanced"
#: The linear layers.
LAYERS = ["encoder.layer.*", "pooler.dense"]


def embedding(model: torch.nn.Module, batch: transformers.BatchEncoding) -> torch.Tensor:
    """What of the output counts."""
    return torch.from_numpy(minilm.embed(model, [batch]))


def stored(path: pathlib.Path) -> tuple[int, int]:
    """Bytes of the arrays of a quantized file, and weights."""
    with comq_np.QuantizedFile(path) as file:
        rows = file.describe()
    return sum(row["bytes"] for row in rows), sum(row["rows"] * row["columns"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2.5])
    parser.add_argument("--curves", default=RECIPE, help=f"recipe that tells the errors (default: {RECIPE})")
    parser.add_argument("--texts", type=int, default=minilm.CALIBRATION_TEXTS, help="texts to calibrate on")
    parser.add_argument("--judged", type=int, help="texts of each kind to judge on at most (default: all)")
    parser.add_argument("--layers", default=LAYERS, nargs="+", metavar="PATTERN", help="layers to quantize")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    model, tokenizer = minilm.load_model()
    texts, figures = minilm.load_texts(), Figures()
    calibrated = minilm.tokenize(tokenizer, texts.calibration[: options.texts])
    lee, articles, reviews = (some[: options.judged] for some in (texts.lee, texts.articles, texts.reviews))
    batches = minilm.tokenize(tokenizer, lee + articles + reviews)
    exact = minilm.embed(model, batches)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        calibration = folder / "calibration.h5"
        comq_torch.capture(
            model, calibrated, calibration, options.layers, select=minilm.tokens_that_count, progress=True
        )
        uniform = {
            bits: folder / f"uniform-{bits}.h5"
            for one in (*options.bits, PROBED_BITS)
            for bits in (math.floor(one), math.ceil(one))
        }
        for bits, path in uniform.items():
            comq_np.quantize_file(calibration, path, bits, recipe=RECIPE)
        started = time.perf_counter()
        found = comq_torch.sensitivities(
            model, calibrated[: PROBES // minilm.BATCH], uniform[PROBED_BITS], forward=embedding, progress=True
        )
        probing = time.perf_counter() - started

        def judge(bits: float, how: str, path: pathlib.Path, **more: float) -> None:
            changed = comq_torch.apply(copy.deepcopy(model), path)
            cosines = (minilm.embed(changed, batches) * exact).sum(1)
            kinds = {"": cosines[: -len(reviews)], "_reviews": cosines[-len(reviews) :]}
            for kind, some in kinds.items():
                more |= {f"cosine{kind}": float(some.mean()), f"embedding_error{kind}": 1 - float(some.mean())}
            size, weights = stored(path)
            figures.add("minilm", bits, how, **more, bytes=path.stat().st_size, stored_bits=8 * size / weights)

        started = time.perf_counter()
        plan = comq_np.allocate_bits(calibration, 16, recipe=options.curves, progress=True)
        seconds = {"errors": time.perf_counter() - started}
        seconds["sensitivities"] = seconds["errors"] + probing
        plans = {"errors": plan, "sensitivities": comq_np.Allocation(16, plan.curves, plan.weights, found)}
        for bits in options.bits:
            low, high = (stored(uniform[edge]) for edge in (math.floor(bits), math.ceil(bits)))
            part = bits - math.floor(bits)
            budget = math.floor(800 * ((1 - part) * low[0] + part * high[0]) / low[1]) / 100
            if not part:
                judge(bits, "uniform", uniform[int(bits)])
            for how, plan in plans.items():
                path = folder / f"{how}-{bits:g}.h5"
                comq_np.quantize_file(calibration, path, plan.within(budget), recipe=RECIPE)
                judge(bits, how, path, seconds=seconds[how])
    figures.show(options.json)


if __name__ == "__main__":
    main()
