"""A layer solved in parts of its columns, which only the shrinkage has in common."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from comq_np.result import Solved, SolveReport

#: Least columns of a part that is a task of its own, also as a multiple of the rows: with fewer, what every part does
#: anew, factoring the matrix and choosing the shrinkage, would be no small share of it.
WIDE, WIDE_ROWS = 8192, 4


def columns_of(rows: int, columns: int, group_size: int | Literal["tensor"] | None) -> list[slice]:
    """Columns of each part of a layer, about equally many; all of them where they share a scale.

    They depend on nothing else, and so does no bit.
    """
    count = 1 if group_size == "tensor" else max(1, columns // max(WIDE, WIDE_ROWS * rows))
    ends = [columns * k // count for k in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def joined(parts: Sequence[Solved], norms: Sequence[float]) -> Solved:
    """All columns of a layer, from those of its parts, which were solved with the same options.

    `norms` are the objectives that each would have without any weights, in any unit.
    """
    first, *others = parts
    if not others:
        return first
    arrays = [field.name for field in dataclasses.fields(first) if isinstance(getattr(first, field.name), np.ndarray)]
    joint: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in arrays}
    report = dataclasses.replace(_report([part.report for part in parts], norms), notes=_notes(parts))
    return dataclasses.replace(first, **joint, report=report)


def _report(reports: Sequence[SolveReport], norms: Sequence[float]) -> SolveReport:
    """Report of all parts; one that made fewer sweeps rests while the others go on."""
    sweeps = max(report.sweeps for report in reports)
    objectives = [_rested(report, sweeps) for report in reports]
    changed = [report.codes_changed + (0,) * (sweeps - report.sweeps) for report in reports]
    gaps = [report.gap for report in reports if report.gap is not None]
    errors = [report.relative_error * norm if norm else 0.0 for report, norm in zip(reports, norms, strict=True)]
    norm, worst = math.fsum(norms), max(report.relative_error for report in reports)
    return dataclasses.replace(
        reports[0],
        objective_rounding=math.fsum(report.objective_rounding for report in reports),
        objective_start=math.fsum(report.objective_start for report in reports),
        objectives=tuple(map(math.fsum, zip(*objectives, strict=True))),
        objective=math.fsum(report.objective for report in reports),
        relative_error=math.fsum(errors) / norm if norm and math.isfinite(worst) else worst,
        sweeps=sweeps,
        codes_changed=tuple(map(sum, zip(*changed, strict=True))),
        converged=all(report.converged for report in reports),
        seconds=math.fsum(report.seconds or 0.0 for report in reports),
        optimal=all(report.optimal for report in reports),
        modalities=_modalities(reports),
        gap=max(gaps) if len(gaps) == len(reports) else None,
    )


def _modalities(reports: Sequence[SolveReport]) -> dict[str, float] | None:
    """Errors of the groups of batches, of which each part has its own share."""
    shares = [report.modalities or {} for report in reports]
    return {name: math.fsum(share[name] for share in shares) for name in shares[0]} or None


def _rested(report: SolveReport, sweeps: int) -> tuple[float, ...]:
    """Objectives after so many sweeps."""
    last = report.objectives[-1] if report.objectives else report.objective_start
    return report.objectives + (last,) * (sweeps - report.sweeps)


def _notes(parts: Sequence[Solved]) -> tuple[str, ...]:
    """Notes that all parts have, then those of each, with its columns."""
    first = parts[0].report.notes
    shared = [note for note in first if all(note in part.report.notes for part in parts)]
    notes, stop = [*shared], 0
    for part in parts:
        start, stop = stop, stop + part.codes.shape[-1]
        own = (note for note in part.report.notes if note not in shared)
        notes += [f"Columns {start} to {stop - 1}: {note}" for note in own]
    return tuple(notes)
