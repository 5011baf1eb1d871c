"""What was found: the table, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

COLUMNS = 4
"""So many metrics stand beside each other."""


@dataclass
class Results:
    """All figures of a run, and what hindered it."""

    about: dict[str, Any]  # when and where it was made, and how
    subjects: dict[str, dict[str, Any]]  # version of each, and whether it is encrypted
    units: dict[str, dict[str, str]]  # by case and metric
    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)  # by case, metric and subject
    failed: set[str] = field(default_factory=set)  # subjects
    remarks: list[str] = field(default_factory=list)

    def of(self, case: str, metric: str, subject: str) -> list[float]:
        return self.values.get((case, metric, subject), [])


def show(value: float) -> str:
    """Three significant digits, and no exponents."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}" if value >= 0.001 else "0"


def make_table(results: Results) -> str:
    """A block for each case, with a row for each subject: medians, with the least and the greatest."""
    return "\n\n".join(block for case in results.units for block in make_blocks(results, case))


def make_blocks(results: Results, case: str) -> Iterator[str]:
    units = [*results.units[case].items()]
    for first in range(0, len(units), COLUMNS):
        part = units[first : first + COLUMNS]
        rows = [[case, *(f"{metric} [{unit}]" for metric, unit in part)]]
        for subject in results.subjects:
            found = [results.of(case, metric, subject) for metric, _ in part]
            if any(found):
                rows.append([subject, *map(make_cell, found)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_cell(values: list[float]) -> str:
    if not values or min(values) == max(values):
        return show(values[0]) if values else "-"
    return f"{show(median(values))} ({show(min(values))}\N{EN DASH}{show(max(values))})"


def write_json(path: Path, results: Results, bars: list[dict[str, Any]]) -> None:
    """All figures, one by one, with what they were measured on."""
    figures = [
        {"case": case, "metric": metric, "unit": results.units[case][metric], "subject": subject, "values": values,
         "median": median(values), "min": min(values), "max": max(values)}
        for (case, metric, subject), values in results.values.items()
    ]  # fmt: skip
    document = {
        **results.about, "subjects": results.subjects, "units": results.units, "figures": figures, "bars": bars,
        "failed": sorted(results.failed), "remarks": results.remarks,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=2) + "\n")


def read_json(path: Path) -> Results:
    """What `write_json` has written; the bars are judged anew."""
    about = json.loads(path.read_text())
    about.pop("bars")
    figures, failed = about.pop("figures"), set(about.pop("failed"))
    subjects, units, remarks = (about.pop(key) for key in ("subjects", "units", "remarks"))
    values = {(one["case"], one["metric"], one["subject"]): one["values"] for one in figures}
    return Results(about, subjects, units, values, failed, remarks)
