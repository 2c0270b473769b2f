"""The `comq` command."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

from comq_np import pipeline, store
from comq_np.checks import FileError, InputError
from comq_np.recipes import RECIPES
from comq_np.table import table
from comq_np.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 for an error or what does not match, or 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (InputError, FileError) as error:
        print(f"comq {options.command}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comq",
        description="Quantize weights to low-bit integer codes and scales that change a layer's output as little as "
        "possible.",
    )
    parser.add_argument("--version", action="version", version=f"comq_np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="quantize two small networks and print what it costs them")
    demo.add_argument("--output", type=pathlib.Path, default=pathlib.Path("comq-demo"), help="folder for the files")
    demo.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to this file, too")
    demo.set_defaults(run=_demo)

    solve = commands.add_parser("solve", help="solve every layer of a calibration file")
    solve.add_argument("calibration", help="calibration file to read")
    solve.add_argument("quantized", help="quantized file to write")
    solve.add_argument("--bits", type=int, default=4, help="bits of one code, 1 to 8 (default: 4)")
    solve.add_argument("--levels", type=int, help="number of codes in place of --bits; 3 is ternary")
    solve.add_argument("--recipe", default="balanced", choices=sorted(RECIPES), help="(default: balanced)")
    solve.add_argument(
        "--group-size", type=_group_size, help='rows that share a scale, or "tensor" (default: all rows)'
    )
    solve.add_argument("--symmetric", action="store_true", help="signed grid with the zero point in its middle")
    solve.add_argument("--fit-bias", action="store_true", help="let each layer's bias take up the mean of its error")
    solve.add_argument("--threads", type=int, help="threads to use (default: one for each core)")
    solve.set_defaults(run=_solve)

    info = commands.add_parser("info", help="list the layers of a file")
    info.add_argument("file", help="calibration, quantized or Gram file")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="recompute the objectives of a quantized file from its codes")
    verify.add_argument("calibration", help="calibration file that it was solved from")
    verify.add_argument("quantized", help="quantized file")
    verify.set_defaults(run=_verify)
    return parser


def _group_size(text: str) -> int | str:
    if text == "tensor":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number of rows or "tensor", got {text!r}') from None


def _demo(options: argparse.Namespace) -> int:
    from comq_np.demo import runner

    runner.run(output=options.output, json_path=options.json)
    return 0


def _solve(options: argparse.Namespace) -> int:
    reports = pipeline.quantize_file(
        options.calibration,
        options.quantized,
        options.bits,
        recipe=options.recipe,
        group_size=options.group_size,
        symmetric=options.symmetric,
        levels=options.levels,
        fit_bias=options.fit_bias,
        threads=options.threads,
        progress=True,
    )
    with store.QuantizedFile(options.quantized) as file:
        rows = file.describe()
    for row in rows:
        report = reports[row["layer"]]
        row |= {"sweeps": report.sweeps, "seconds": report.seconds, "notes": len(report.notes)}
    _print(rows)
    for name, report in reports.items():
        for note in report.notes:
            print(f"{name}: {note}")
    weights = sum(row["rows"] * row["columns"] for row in rows)
    size, before = os.path.getsize(options.quantized), 4 * weights
    print(f"{options.quantized}: {len(rows)} layers, {weights:,} weights, {before:,} bytes as float32, {size:,} now")
    return 0


def _info(options: argparse.Namespace) -> int:
    name = store.file_format(options.file)
    print(f"{options.file}: {name}, version {store.VERSION}")
    if name == store.GRAM:
        gram = store.load_gram(options.file)
        _print([{"width": len(gram), "samples": gram.count, "folds": tuple(fold.count for fold in gram.folds)}])
        return 0
    with (store.CalibrationFile if name == store.CALIBRATION else store.QuantizedFile)(options.file) as file:
        _print(file.describe())
    return 0


def _verify(options: argparse.Namespace) -> int:
    layers = pipeline.verify_file(options.calibration, options.quantized)
    _print(
        [
            {
                "layer": layer.name,
                "reported": layer.reported,
                "recomputed": layer.recomputed,
                "verdict": "same" if layer.matches else "DIFFERENT",
            }
            for layer in layers
        ]
    )
    different = sum(not layer.matches for layer in layers)
    print(f"{options.quantized}: {len(layers) - different} of {len(layers)} layers match their report")
    return int(different > 0)


def _print(rows: list[dict[str, object]]) -> None:
    print(table(rows) if rows else "no layers")
