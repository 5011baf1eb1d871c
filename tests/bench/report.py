"""What was found: the table, the bars, and all of it as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import HELD, Case


class Results:
    """All figures of a run, by case, metric and subject."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[float]] = {}
        self.missing: list[str] = []
        """What was not measured because this machine lacks something."""
        self.failures: list[str] = []
        self.notes: list[str] = []

    def add(self, case: str, subject: str, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            self.values.setdefault((case, metric, subject), []).append(value)

    def median(self, case: str, metric: str, subject: str) -> float | None:
        values = self.values.get((case, metric, subject))
        return statistics.median(values) if values else None


def show(value: float) -> str:
    """Three significant digits, and no exponents."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}" if value >= 0.001 else "0"


def make_table(results: Results, cases: list[Case], subjects: list[str]) -> str:
    """A row for each metric, a column for each subject: medians, and the least and the greatest."""
    rows = [["case", "", *subjects]]
    for case in cases:
        for metric in case.metrics:
            found = [results.values.get((case.name, metric.key, subject), []) for subject in subjects]
            if any(map(any, found)) if metric.only_if_any else any(found):
                cells = [_show_cell(values) for values in found]
                rows.append([case.name, f"{metric.key} [{metric.unit}]", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _show_cell(values: list[float]) -> str:
    if not values:
        return "-"
    text = show(statistics.median(values))
    return text if min(values) == max(values) else f"{text} ({show(min(values))}\N{EN DASH}{show(max(values))})"


@dataclass(frozen=True)
class Bar:
    """What is asked of tcprelay, and what it came to; ``None`` where that was not measured."""

    asked: str
    figure: str | None
    passed: bool | None

    def __str__(self) -> str:
        verdict = "not measured" if self.passed is None else "PASS" if self.passed else "FAIL"
        return f"{verdict}: {self.asked}{f': {self.figure}' if self.figure else ''}"


def make_bars(results: Results) -> list[Bar]:
    """The bars of the issue."""
    ratios = []
    for case in ("stream-in", "stream-out"):
        own, other = (results.median(case, "speed", name) for name in ("tcprelay", "node-tcp-relay"))
        if own and other:
            ratios.append(own / other)
    stream = min(ratios) if len(ratios) == 2 else None
    memory = max(results.values.get(("held", f"server memory, {HELD}", "tcprelay"), []), default=None)
    served = min(results.values.get(("burst-100", "served", "tcprelay"), []), default=None)
    return [
        Bar("one plain stream is at least twice as fast as node-tcp-relay's, each way",
            stream and f"{stream:.2f} times as fast", stream and stream >= 2),
        Bar(f"{HELD:,} held connections take at most 60 MiB in the server process",
            memory and f"{memory:.1f} MiB", memory and memory <= 60),
        Bar("100 service clients at once are all served by a client with --num-conn 1",
            None if served is None else f"{served:.0f} served", None if served is None else served == 100),
    ]  # fmt: skip


def write_json(path: Path, results: Results, cases: list[Case], bars: list[Bar], options: dict[str, Any]) -> None:
    """All figures, one by one, with what they were measured on."""
    units = {(case.name, metric.key): metric.unit for case in cases for metric in case.metrics}
    figures = [
        {"case": case, "metric": metric, "unit": units[case, metric], "subject": subject,
         "median": statistics.median(values), "min": min(values), "max": max(values), "values": values}
        for (case, metric, subject), values in results.values.items()
    ]  # fmt: skip
    document = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "python": platform.python_version(), "system": platform.platform(), "processors": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "options": options, "figures": figures, "bars": [asdict(bar) for bar in bars],
        "missing": results.missing, "failures": results.failures, "notes": results.notes,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=2) + "\n")
