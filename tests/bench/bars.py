"""The bars: what is asked of tcprelay, beside the same run's figures of the others."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from .cases import HELD
from .report import Results, show
from .subjects import FLOORS, OURS

ONE_STREAM = "stream-in", "stream-out"
RATES = {"new connections/s, 8 at a time": "connections-8", "requests/s over 64 connections": "requests-64",
         "requests/s over 512 connections": "requests-512"}  # fmt: skip
LATENCIES = (
    ("first byte over 40 ms with no idle link", "far-first-byte", "cold", 1.05),
    ("a burst of 200 over 40 ms, to the last", "far-burst-200-pool-8", "to the last", 1.0),
    ("p99 of requests beside a bulk stream, with 1 % of loss", "lossy-beside", "p99", 1.0),
)
"""What is to take no longer than so many times what it takes through the best peer."""
LONG_STREAMS = {
    "40 ms": ("far-in", "far-out"), "40 ms with cubic": ("cubic-in", "cubic-out"),
    "40 ms and 100 Mbit/s": ("narrow-in", "narrow-out"),
    "40 ms and 100 Mbit/s with cubic": ("narrow-cubic-in", "narrow-cubic-out"),
}  # fmt: skip


def make_bars(results: Results) -> list[dict[str, Any]]:
    """What is asked, the figure for it, and the verdict; where others are the measure, the best of them."""
    bars = []
    ratio, _ = beside(results, ONE_STREAM, "speed", "tcprelay", ["direct"])
    bars.append(make_bar("one plain stream against the direct connection, the worse direction", ratio, least=0.6))
    questions: dict[str, tuple[tuple[str, ...], str]] = {"one stream, the worse direction": (ONE_STREAM, "speed")}
    questions |= {what: ((case,), "rate") for what, case in RATES.items()}
    for what, (cases, metric) in questions.items():
        for own, encrypted in OURS.items():
            peers = peers_of(results, encrypted)
            ratio, best = beside(results, cases, metric, own, peers)
            asked = f"{what}, {'encrypted' if encrypted else 'plain'}, against the best peer"
            bars.append(make_bar(asked, ratio, least=1, peer=best))
    for what, least in (("64", 0.9), ("512", 0.85)):
        ratio, _ = beside(results, (f"requests-{what}",), "rate", "tcprelay", ["pairs"])
        bars.append(
            make_bar(f"requests/s over {what} connections, plain, against bare thread pairs", ratio, least=least)
        )
    ratio, _ = beside(results, ("connections-8",), "rate", "tcprelay-tls", ["tcprelay"])
    bars.append(make_bar("TLS links against plain ones, new connections 8 at a time", ratio, least=0.85))
    for own, encrypted in OURS.items():
        kind = "encrypted" if encrypted else "plain"
        peers = peers_of(results, encrypted)
        for what, case, metric, longest in LATENCIES:
            ratio, best = beside(results, (case,), metric, own, peers, shortest=True)
            bars.append(make_bar(f"{what}, {kind}, against the best peer", ratio, most=longest, peer=best))
    for what, cases in LONG_STREAMS.items():
        ratio, _ = beside(results, cases, "speed", "tcprelay", ["direct"])
        bars.append(make_bar(f"a plain stream over {what} against direct, the worse direction", ratio, least=0.97))
    most, fewest = f"{HELD[-1]:,}", min(results.of("held", "held", "tcprelay"), default=None)
    bars.append(make_bar("connections held", fewest, least=HELD[-1]))
    for role in ("server", "client"):
        each = middle(results, "held", f"{role} memory each", "tcprelay")
        bars.append(make_bar(f"KiB of the {role}'s memory for each of {most} held connections", each, most=40))
    few, many = (middle(results, "held", f"cost at {count:,}", "tcprelay") for count in (HELD[0], HELD[-1]))
    growth = many / few if few and many else None
    bars.append(make_bar(f"cost of a connection at {most} held against that at 100", growth, most=1.25))
    for links in (1, 8):
        served = min(results.of(f"burst-200-pool-{links}", "served", "tcprelay"), default=None)
        bars.append(make_bar(f"served of a burst of 200 on a pool of {links}", served, least=200))
    return bars


def peers_of(results: Results, encrypted: bool) -> list[str]:
    """Other relays whose links are plain, or encrypted."""
    return [name for name, about in results.subjects.items()
            if about["encrypted"] == encrypted and name not in {*OURS, *FLOORS}]  # fmt: skip


def beside(
    results: Results, cases: tuple[str, ...], metric: str, own: str, others: list[str], shortest: bool = False
) -> tuple[float | None, str]:
    """Our share of the best other's figure, in the worst of some cases, and who that is.  The best is the greatest,
    unless it is to be the `shortest`."""
    shares = []
    for case in cases:
        mine = middle(results, case, metric, own)
        rivals = [(value, name) for name in others if (value := middle(results, case, metric, name))]
        if mine is None or not rivals:
            return None, ""
        best, name = min(rivals) if shortest else max(rivals)
        shares.append((mine / best, name))
    return max(shares) if shortest else min(shares)


def middle(results: Results, case: str, metric: str, subject: str) -> float | None:
    values = results.of(case, metric, subject)
    return median(values) if values else None


def make_bar(
    asked: str, figure: float | None, least: float = -math.inf, most: float = math.inf, peer: str = ""
) -> dict[str, Any]:
    verdict = "not measured" if figure is None else "PASS" if least <= figure <= most else "FAIL"
    limit = f"at least {least:,g}" if least > -math.inf else f"at most {most:,g}"
    return {"asked": f"{asked} ({limit})", "figure": figure, "peer": peer, "verdict": verdict}


def describe(bar: dict[str, Any]) -> str:
    """A bar in one line."""
    figure = "" if bar["figure"] is None else f": {show(bar['figure'])}"
    return f"{bar['verdict']}: {bar['asked']}{figure}" + (f" of {bar['peer']}'s" if bar["peer"] else "")
