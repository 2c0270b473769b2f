"""The `comq` command."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from comq_np import allocation, cluster, pipeline, signals, store, verify
from comq_np.checks import FileError, InputError, visible
from comq_np.merge import merge_files
from comq_np.recipes import RECIPES
from comq_np.table import table
from comq_np.version import __version__

BITS = 4
DONE, DIFFERENT, ERROR, KEPT = 0, 1, 2, 3
#: What shells report for a program that SIGINT, SIGPIPE or SIGTERM ended.
INTERRUPTED, UNHEARD, TERMINATED = 130, 141, 143

STATUS = (
    f"Exit status: {DONE} done; {DIFFERENT} verify found a difference; {ERROR} wrong command line, or an error; "
    f"{KEPT} solve is done but for layers that stay float; {INTERRUPTED} interrupted; "
    f"{UNHEARD} nobody reads the output; {TERMINATED} terminated."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, as `comq --help` lists them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of layers may be any text, a terminal ASCII
    options = _parser().parse_args(arguments)
    try:
        with signals.terminable(), signals.heard(), _warning(options.command):
            status: int = options.run(options)
            sys.stdout.flush()
        return status
    except (BrokenPipeError, KeyboardInterrupt, signals.Terminated, InputError, FileError, OSError) as error:
        status, message = _ending(error)
        notes = getattr(error, "__notes__", [])
    _flush()
    for line in [message, *notes] if message else ():
        print(f"comq {options.command}: {line}", file=sys.stderr)
    return status


def _ending(error: BaseException) -> tuple[int, str | None]:
    """Exit status and message for what ended the command."""
    if isinstance(error, BrokenPipeError):
        return UNHEARD, None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, signals.Terminated):
        return TERMINATED, "terminated"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return ERROR, f"error: {place}{error.strerror or error}"
    return ERROR, f"error: {error}"


@contextlib.contextmanager
def _warning(command: str) -> Iterator[None]:
    """Print warnings in one line each, without the place in the code."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"comq {command}: warning: {visible(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _flush() -> None:
    """Flush the output; where that fails, nothing is left that the interpreter could complain about at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comq",
        description="Quantize weights to low-bit integer codes and scales that change a layer's output as little as "
        "possible.",
        epilog=STATUS,
    )
    parser.add_argument("--version", action="version", version=f"comq_np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="quantize two small networks and print what it costs them")
    demo.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("comq-demo"),
        metavar="FOLDER",
        help="folder for the files (default: %(default)s)",
    )
    demo.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to this file, too")
    demo.set_defaults(run=_demo)

    solve = commands.add_parser("solve", help="solve every layer of a calibration file")
    solve.add_argument("calibration", help="calibration file to read")
    solve.add_argument("quantized", help="quantized file to write")
    # Without a default of argparse's own, which would let `--bits 4` pass beside --levels.
    codes = solve.add_mutually_exclusive_group()
    codes.add_argument(
        "--bits",
        type=_bits,
        action="append",
        metavar="[PATTERN=]BITS",
        help="bits of one code, 1 to 16, of all layers or of those whose names match a pattern such as 'head*'; may be "
        "given several times, of which the last that matches a layer counts; @FILE is such patterns in JSON, or a plan "
        f"of allocate (default: {BITS})",
    )
    codes.add_argument("--levels", type=int, help="number of codes in place of --bits; 3 is ternary")
    _add_options(solve)
    solve.add_argument("--strict", action="store_true", help="stop at the first layer that cannot be solved")
    solve.add_argument("--restart", action="store_true", help="drop the layers that an interrupted run has finished")
    solve.set_defaults(run=_solve)

    allocate = commands.add_parser("allocate", help="choose the bits of each layer within a size")
    allocate.add_argument("calibration", help="calibration file to read")
    allocate.add_argument(
        "--budget", type=float, required=True, metavar="BITS", help="bits that may be stored for a weight, in the mean"
    )
    allocate.add_argument(
        "-o", "--out", type=pathlib.Path, required=True, metavar="FILE", help="plan to write, for solve --bits @FILE"
    )
    allocate.add_argument(
        "--bits",
        type=int,
        nargs="+",
        default=[*allocation.WIDTHS],
        help="numbers of bits to choose from (default: 2 to 8)",
    )
    allocate.add_argument(
        "--fixed",
        type=_bits,
        action="append",
        metavar="PATTERN=BITS",
        help="bits of layers that are not to be chosen; may be given several times",
    )
    allocate.add_argument(
        "--sensitivities",
        type=pathlib.Path,
        metavar="FILE",
        help="JSON object of how much a relative error of each layer counts (default: all alike)",
    )
    _add_options(allocate)
    allocate.set_defaults(run=_allocate)

    merge = commands.add_parser("merge", help="merge calibration files of one model, made from different batches")
    merge.add_argument("calibrations", nargs="+", metavar="calibration", help="calibration files to read, at least two")
    merge.add_argument("-o", "--output", dest="merged", required=True, metavar="FILE", help="calibration file to write")
    merge.set_defaults(run=_merge)

    info = commands.add_parser("info", help="list the layers of a file")
    info.add_argument("file", help="calibration, quantized or Gram file")
    info.add_argument("--json", action="store_true", help="print JSON in place of a table")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="recompute the objectives of a quantized file from its codes")
    verify.add_argument("calibration", help="calibration file that it was solved from")
    verify.add_argument("quantized", help="quantized file")
    verify.set_defaults(run=_verify)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    """Options of how layers are solved."""
    command.add_argument("--recipe", default="balanced", choices=sorted(RECIPES), help="(default: balanced)")
    command.add_argument(
        "--group-size", type=_group_size, help='rows that share a scale, or "tensor" (default: all rows)'
    )
    command.add_argument("--symmetric", action="store_true", help="signed grid with the zero point in its middle")
    command.add_argument(
        "--zero-point",
        default="integer",
        choices=("integer", "real"),
        help="whole zero points, or any (default: integer)",
    )
    command.add_argument(
        "--scale-dtype",
        default="float32",
        choices=("float32", "float16"),
        help="type that scales are rounded to in the solve, and stored in (default: float32)",
    )
    command.add_argument(
        "--codebook",
        default="uniform",
        choices=("uniform", "planes"),
        help="levels in equal steps, or sums of bits with a scale of their own each (default: uniform)",
    )
    command.add_argument(
        "--fit-bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let each layer's bias, where there is one, take up the mean of its error (default: yes)",
    )
    command.add_argument(
        "--shrinkage", type=_shrinkage, default="auto", help='"auto" (default), "nonlinear" or a share from 0 to 1'
    )
    command.add_argument(
        "--backend", choices=("auto", "cpu", "cuda"), default="auto", help="where to solve (default: auto)"
    )
    command.add_argument("--threads", type=int, help="threads to use (default: one for each core)")
    command.add_argument("--workers", type=int, help="layers to solve at once at most (default: one for each thread)")
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help='memory that layers solved at once may take, such as "4GiB" (default: what one of them needs at most)',
    )
    command.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="solve on the Dask cluster of this scheduler, such as tcp://host:8786; --threads are those of each layer "
        "then (default: one)",
    )


def _bits(text: str) -> dict[str, int]:
    """Bits by pattern, of one use of --bits."""
    if text.startswith("@"):
        return _bits_in(pathlib.Path(text[1:]))
    pattern, _, number = text.rpartition("=")
    try:
        return {pattern or "*": int(number)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, PATTERN=NUMBER or @FILE, got {text!r}") from None


def _bits_in(path: pathlib.Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{path}: must hold a JSON object of patterns and bits, got {found!r}")
    plan = found.get("bits")
    return plan if isinstance(plan, dict) else found


def _chosen_bits(given: list[dict[str, int]] | None) -> int | dict[str, int]:
    """Bits as `quantize_file` takes them: of the same pattern, the last one counts, in its place."""
    found: dict[str, int] = {}
    for some in given or [{"*": BITS}]:
        for pattern, bits in some.items():
            found.pop(pattern, None)
            found[pattern] = bits
    return found["*"] if set(found) == {"*"} else found


def _group_size(text: str) -> int | str:
    if text == "tensor":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number of rows or "tensor", got {text!r}') from None


def _shrinkage(text: str) -> float | str:
    if text in ("auto", "nonlinear"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be "auto", "nonlinear" or a number from 0 to 1, got {text!r}') from None


def _demo(options: argparse.Namespace) -> int:
    from comq_np.demo import runner

    runner.run(output=options.output, json_path=options.json)
    return DONE


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """What `_add_options` has added, but for the scheduler."""
    names = ("recipe", "group_size", "symmetric", "zero_point", "scale_dtype", "codebook", "fit_bias", "shrinkage")
    return {name: getattr(options, name) for name in (*names, "backend", "threads", "workers", "memory")}


def _allocate(options: argparse.Namespace) -> int:
    fixed = _chosen_bits(options.fixed) if options.fixed else None
    with cluster.connected(options.scheduler) as client:
        plan = allocation.allocate_bits(
            options.calibration,
            options.budget,
            bits=options.bits,
            fixed={"*": fixed} if isinstance(fixed, int) else fixed,
            sensitivities=options.sensitivities and _json(options.sensitivities),
            **_options(options),
            client=client,
            progress=True,
        )
    options.out.write_text(json.dumps(plan.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    _print([plan.describe(name) for name in plan.curves])
    _print_kept(plan.kept)
    print(f"{options.out}: {len(plan)} layers, {plan.bytes:,} bytes, {plan.stored_bits:.4g} bits a weight")
    return KEPT if plan.kept else DONE


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: must hold JSON: {error}.") from None


def _solve(options: argparse.Namespace) -> int:
    with cluster.connected(options.scheduler) as client:
        reports = pipeline.quantize_file(
            options.calibration,
            options.quantized,
            _chosen_bits(options.bits),
            levels=options.levels,
            **_options(options),
            client=client,
            strict=options.strict,
            progress=True,
            restart=options.restart,
        )
    with store.QuantizedFile(options.quantized) as file:
        rows = file.describe()
    for row in rows:
        report = reports[row["layer"]]
        seconds = "earlier" if report.seconds is None else report.seconds
        row |= {"sweeps": report.sweeps, "seconds": seconds, "notes": len(report.notes)}
    _print(rows)
    for name, report in reports.items():
        for note in report.notes:
            print(f"{visible(name)}: {note}")
    _print_kept(reports.kept | reports.skipped)
    weights = sum(row["problems"] * row["rows"] * row["columns"] for row in rows)
    size, before = os.path.getsize(options.quantized), 4 * weights
    print(f"{options.quantized}: {len(rows)} layers, {weights:,} weights, {before:,} bytes as float32, {size:,} now")
    return KEPT if reports.kept else DONE


def _merge(options: argparse.Namespace) -> int:
    merge_files(options.calibrations, options.merged, progress=True)
    with store.CalibrationFile(options.merged) as file:
        rows = file.describe()
    _print(rows)
    print(f"{options.merged}: {len(rows)} layers from {len(options.calibrations)} files")
    return DONE


def _info(options: argparse.Namespace) -> int:
    about = store.about(options.file)
    if options.json:
        print(json.dumps(about, indent=1, allow_nan=False))
        return DONE
    print(f"{options.file}: {about['format']}, version {about['version']}")
    gram = [key for key in ("problems", "width", "samples", "folds", "groups") if key in about]
    rows = about["layers"] if "layers" in about else [{key: about[key] for key in gram}]
    _print([{key: float("inf") if value is None else value for key, value in row.items()} for row in rows])
    _print_kept(about.get("kept", {}) | about.get("skipped", {}))
    return DONE


def _verify(options: argparse.Namespace) -> int:
    layers = verify.verify_file(options.calibration, options.quantized, progress=True)
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
    with store.QuantizedFile(options.quantized) as file:
        _print_kept(file.kept | file.skipped)
    different = sum(not layer.matches for layer in layers)
    print(f"{options.quantized}: {len(layers) - different} of {len(layers)} layers match their report")
    return DIFFERENT if different else DONE


def _print(rows: list[dict[str, object]]) -> None:
    columns = dict.fromkeys(key for row in map(_flat, rows) for key in row)
    shown = [{column: _flat(row).get(column, "") for column in columns} for row in rows]
    print(table(shown) if shown else "no layers")


def _flat(row: Mapping[str, object]) -> dict[str, object]:
    """What a row of a table shows: what named groups of batches have in a column for each."""
    found: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            what = {"modalities": "error of", "groups": "samples of"}[key]
            found |= {visible(f"{what} {name}"): float("inf") if one is None else one for name, one in value.items()}
        else:
            text = " ".join(value) if key == "groups" and isinstance(value, list) else value
            found[key] = visible(text) if isinstance(text, str) else text
    return found


def _print_kept(kept: Mapping[str, str]) -> None:
    """Print which layers stay float, and why."""
    for name, reason in kept.items():
        print(f"{visible(name)}: stays float: {visible(reason)}")
