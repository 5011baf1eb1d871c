"""What was found: the table, the bars, and all of it as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from argparse import Namespace
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .cases import HELD, Case


@dataclass
class Results:
    """All figures of a run, and what hindered it."""

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)  # by case, metric and subject
    failed: set[str] = field(default_factory=set)  # subjects
    remarks: list[str] = field(default_factory=list)

    def of(self, case: str, metric: str, subject: str = "tcprelay") -> list[float]:
        return self.values.get((case, metric, subject), [])


def make_bars(results: Results) -> list[dict[str, Any]]:
    """The bars of the issue: what is asked, the figure for it, and the verdict."""

    def bar(asked: str, figure: float | None, least: float, most: float = math.inf) -> dict[str, Any]:
        verdict = "not measured" if figure is None else "PASS" if least <= figure <= most else "FAIL"
        return {"asked": asked, "figure": figure, "verdict": verdict}

    names = "tcprelay", "node-tcp-relay"
    pairs = [[results.of(case, "speed", name) for name in names] for case in ("stream-in", "stream-out")]
    ratio = min(median(own) / median(other) for own, other in pairs) if all(map(all, pairs)) else None
    memory = max(results.of("held", f"server memory at {HELD}"), default=None)
    served = min(results.of("burst-100", "served"), default=None)
    return [
        bar("one plain stream against node-tcp-relay's, the worse direction (2 times at least)", ratio, 2),
        bar(f"MiB of the server process with {HELD:,} held connections (60 at most)", memory, 0, 60),
        bar("served of a burst of 100 on --num-conn 1 (all)", served, 100),
    ]


def show(value: float) -> str:
    """Three significant digits, and no exponents."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}" if value >= 0.001 else "0"


def make_table(results: Results, cases: list[Case], subjects: list[str]) -> str:
    """A row for each metric, a column for each subject: medians, with the least and the greatest."""

    def cell(values: list[float]) -> str:
        if not values or min(values) == max(values):
            return show(values[0]) if values else "-"
        return f"{show(median(values))} ({show(min(values))}\N{EN DASH}{show(max(values))})"

    rows = [["case", "", *subjects]] + [
        [case.name, f"{metric} [{unit}]", *(cell(results.of(case.name, metric, name)) for name in subjects)]
        for case in cases
        for metric, unit in case.metrics.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_json(options: Namespace, results: Results, cases: list[Case], bars: list[dict[str, Any]]) -> None:
    """All figures, one by one, with what they were measured on."""
    units = {(case.name, metric): unit for case in cases for metric, unit in case.metrics.items()}
    figures = [
        {"case": case, "metric": metric, "unit": units[case, metric], "subject": subject, "values": values,
         "median": median(values), "min": min(values), "max": max(values)}
        for (case, metric, subject), values in results.values.items()
    ]  # fmt: skip
    document = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "repeat": options.repeat,
        "seconds": options.seconds, "python": platform.python_version(), "system": platform.platform(),
        "processors": os.cpu_count(), "figures": figures, "bars": bars, "remarks": results.remarks,
    }  # fmt: skip
    options.json.write_text(json.dumps(document, indent=2) + "\n")
