"""A chart for the README: what matters most, for every subject, as one small SVG without fonts, scripts or images."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import Any

from .bars import ONE_STREAM, middle
from .report import Results, show
from .subjects import OURS

PANELS = {
    ("One stream", "Gbit/s, the worse direction"): (ONE_STREAM, "speed"),
    ("New connections", "per second, 8 at a time"): (("connections-8",), "rate"),
    ("Requests", "per second, over 64 connections"): (("requests-64",), "rate"),
    ("Requests", "per second, over 512 connections"): (("requests-512",), "rate"),
}
"""Title and unit, and what is shown: cases and metric."""
MARGIN, NAMES, BAR, FIGURE, GAP = 16, 104, 128, 48, 16
"""Widths: around everything, of the subjects' names, of the longest bar, of a bar's figure, and between panels."""
ROW, THICK, TOP = 19, 11, 54
"""Heights: of a row, of a bar in it, and of what is above the first row."""
WIDTH = 2 * MARGIN + NAMES + len(PANELS) * (BAR + FIGURE + GAP) - GAP
STYLE = """
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;fill:#747d87}
.h{font-size:12px;font-weight:700}.g{font-size:10px;font-weight:600;letter-spacing:.06em}
.e{text-anchor:end}.s{font-size:10px}.o{font-weight:700;fill:#2f81f7}
rect{fill:#8c959f;fill-opacity:.5}rect.o{fill:#2f81f7;fill-opacity:1}
path,line{fill:none;stroke:#8c959f}line{stroke-opacity:.4}
"""
"""Middle tones, for light and for dark pages: a picture cannot know which of them it stands on."""


def draw(results: Results) -> str:
    """Rows for the subjects, plain ones and encrypted ones apart, and a panel beside the other for each question."""
    figures = {panel: find_figures(results, *question) for panel, question in PANELS.items()}
    rows = [name for name in results.subjects if any(name in panel for panel in figures.values())]
    rows.sort(key=lambda name: bool(results.subjects[name]["encrypted"]))  # the order is kept otherwise
    parts, top = [], TOP
    for encrypted, names in groupby(rows, key=lambda name: bool(results.subjects[name]["encrypted"])):
        parts.append(text(MARGIN, top + 12, "ENCRYPTED LINK" if encrypted else "PLAIN LINK", "g"))
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{top + 17.5}" y2="{top + 17.5}"/>')
        top += 22
        for name in names:
            parts += draw_row(name, top, [*figures.values()])
            top += ROW
        top += 10
    for number, (title, unit) in enumerate(PANELS):
        parts += [text(left_of(number), 28, title, "h"), text(left_of(number), 42, unit, "s")]
    for line in make_caption(results):
        parts.append(text(MARGIN, top + 10, line, "s"))
        top += 14
    size = f'viewBox="0 0 {WIDTH} {top + 8}" width="{WIDTH}" height="{top + 8}"'
    title = "tcprelay beside other relays: one stream, new connections and requests"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title><style>{STYLE}</style>'
    return "\n".join([head, *parts, "</svg>", ""])


def find_figures(results: Results, cases: tuple[str, ...], metric: str) -> dict[str, float]:
    """A median for each subject, the least one of several cases."""
    found = {name: [middle(results, case, metric, name) for case in cases] for name in results.subjects}
    return {name: min(value for value in values if value) for name, values in found.items() if all(values)}


def draw_row(name: str, top: int, panels: list[dict[str, float]]) -> list[str]:
    """The subject's name, and a bar with its figure in each panel."""
    kind = "o" if name in OURS else ""
    middle_line = top + ROW - 8
    parts = [text(MARGIN + NAMES - 12, middle_line, name, f"e {kind}".strip())]
    for number, panel in enumerate(panels):
        left = left_of(number)
        if name not in panel:
            parts.append(text(left, middle_line, "\N{EN DASH}"))
            continue
        longest = max((value for other, value in panel.items() if other != "direct"), default=panel[name])
        length = max(1.0, BAR * min(1.0, panel[name] / longest))
        if name == "direct":  # only outlined; it is not to make all others short, so it may go on at its right end
            end = "z" if panel[name] <= longest else ""
            parts.append(f'<path d="M{left + length:g} {top + 1.5}h-{length:g}v{THICK}h{length:g}{end}"/>')
        else:
            parts.append(f'<rect x="{left}" y="{top + 1.5}" width="{length:.1f}" height="{THICK}" rx="2"{css(kind)}/>')
        parts.append(text(left + length + 5, middle_line, show(panel[name]), kind))
    return parts


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.4g}" y="{y:g}"{css(kind)}>{escape(words)}</text>'


def css(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def left_of(panel: int) -> int:
    return MARGIN + NAMES + panel * (BAR + FIGURE + GAP)


def make_caption(results: Results) -> list[str]:
    about: dict[str, Any] = results.about
    python = f"Python {about['python']}" + (f", --workers {about['workers']}" if about["workers"] is not None else "")
    times = "once" if about["repeat"] == 1 else f"{about['repeat']} times, medians"
    versions = dict.fromkeys(one["version"] for one in results.subjects.values() if one["version"])
    return [
        f"{about['time'][:10]}, all on one machine with {about['processors']} processors, {python}. "
        f"Measured {times}; longer is better. The direct connection's bar is cut off where it is open.",
        ", ".join(versions),
    ]
