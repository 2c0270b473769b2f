"""Tables of text for people, and the figures of a run as JSON for programs."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Text table with a column for each key of the first row; numbers to the right, floats to four digits."""
    header = list(rows[0])
    cells = [header, *([_text(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(header))]
    numeric = [all(isinstance(row[key], int | float) for row in rows) for key in header]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Figures:
    """Figures by case, bits and recipe, in the order they come."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, case: str, bits: int, recipe: str, **figures: float) -> None:
        """Add the figures of one run, by metric."""
        self._rows.append({"case": case, "bits": bits, "recipe": recipe, **figures})

    def show(self, path: pathlib.Path | None) -> None:
        """Print a table for each run of rows with the same metrics, and write the JSON where a path is given."""
        print("\n\n".join(table(list(rows)) for _, rows in itertools.groupby(self._rows, key=tuple)))
        if path is not None:
            keys = ("case", "bits", "recipe")
            figures = [
                {**{key: row[key] for key in keys}, "metric": metric, "value": value}
                for row in self._rows
                for metric, value in row.items()
                if metric not in keys
            ]
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
