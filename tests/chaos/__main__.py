"""Run the chaos cases one after another and print each figure beside its bar; status 1 where one falls short."""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from ..watch import WATCH
from . import (  # noqa: F401 - they register
    flaps, fleet, hostile, limits, load, mayhem, network, pairing, paths, rate, rights, storm, streams,
)  # fmt: skip
from .suite import CASES, Case, Figure, read_figures, running, write_figures

GRACE = 30.0
"""Seconds that a case which went over its limit has to take its processes away."""


def main() -> int:
    options = parse_options()
    if sys.platform != "linux":
        sys.exit("the chaos suite reads /proc and makes network namespaces, which are Linux's")
    if os.geteuid() != 0:
        sys.exit("the chaos suite makes network namespaces and drops privileges: run it as root")
    if options.inside:
        return run_inside(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    place = f"over {1000 * options.round_trip:g} ms" if options.round_trip else "on loopback"
    print(f"seed {options.seed}, scale {options.scale:g}, workers {options.workers}, {place}", flush=True)
    results = {case: run_case(case, options) for case in sorted(CASES, key=lambda one: (one.bar, one.name))
               if (not options.cases or {case.name, str(case.bar)} & set(options.cases))
               and (case.over_wire or not options.round_trip)}  # fmt: skip
    print()
    print_table(results)
    missed = sum(not figure.met for figures in results.values() for figure in figures)
    print(f"{sum(map(len, results.values()))} figures, {missed} below their bar")
    return int(missed > 0)


def run_case(case: Case, options: argparse.Namespace) -> list[Figure]:
    """Run one case in a process of its own, whose whole group is ended at the limit."""
    print(f"[{case.bar}] {case.name}", flush=True)
    began, limit = time.monotonic(), max(120.0, case.limit * max(1.0, options.scale))
    limit *= 2 if options.round_trip else 1
    with tempfile.TemporaryDirectory(prefix="tcprelay-chaos-") as directory:
        result = Path(directory, "figures.json")
        command = [sys.executable, "-m", "tests.chaos", "--inside", directory, "--seed", str(options.seed),
                   "--scale", str(options.scale), "--workers", str(options.workers),
                   "--round-trip", str(options.round_trip), case.name]  # fmt: skip
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            if process.poll() is None:
                process.terminate()  # it unwinds, and takes away what it has started and made
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        figures = read_figures(result)
    if status < 0:
        figures.append(Figure("over its time", f"{limit:,.0f} s", f"at most {limit:,.0f} s", False))
    elif status:
        figures.append(Figure("ended with an error", f"status {status}", "0", False))
    print(f"    {time.monotonic() - began:.0f} s", flush=True)
    for figure in figures:
        print(f"    {say(figure)}", flush=True)
    return figures


def run_inside(options: argparse.Namespace) -> int:
    """The process of one case."""
    signal.signal(signal.SIGTERM, lambda *_: give_up())
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for name in [name for name in os.environ if name.startswith("TCPRELAY_")]:
        del os.environ[name]
    os.environ["TCPRELAY_CONFIG"] = os.devnull
    os.environ["TEST_WORKERS"] = str(options.workers)  # for every relay that the case starts
    [case] = [case for case in CASES if case.name == options.cases[0]]
    directory, status, figures = Path(options.inside), 0, []
    try:
        with running(directory, options.seed, options.scale, options.workers, options.round_trip) as run:
            figures = run.figures
            try:
                case.run(run)
            except (Exception, pytest.fail.Exception) as error:
                WATCH.tell(f"{type(error).__name__}: {error}")
                raise
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        write_figures(figures, directory / "figures.json")
    return status


def give_up() -> NoReturn:
    """The case has gone over its time."""
    WATCH.renew()
    WATCH.tell("over its time")
    sys.exit(1)


def say(figure: Figure) -> str:
    verdict = "ok  " if figure.met else "MISS"
    return f"{verdict} {figure.what}: {figure.figure}" + (f" (bar: {figure.bar})" if figure.bar else "")


def print_table(results: dict[Case, list[Figure]]) -> None:
    rows = [("bar", "case", "what", "figure", "asked for", "")]
    for case, figures in results.items():
        rows += [(str(case.bar), case.name, f.what, f.figure, f.bar, "ok" if f.met else "MISS") for f in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def parse_options() -> argparse.Namespace:
    names = ", ".join(f"{case.bar} {case.name}" for case in sorted(CASES, key=lambda one: one.bar))
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {names}, by number or name; otherwise all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32),
                        help="what all chances are drawn from; printed, so that a run can be made again")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, metavar="X",
                        help="do X times as much of everything (1); the bars are for 1")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="--workers of the relays (0)")
    parser.add_argument(
        "--round-trip",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="have the relays on two hosts with a delaying wire between them, 0.02 to 0.12 say; "
        "of the cases those that can: " + ", ".join(case.name for case in CASES if case.over_wire),
    )
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {case.name for case in CASES} | {str(case.bar) for case in CASES}
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"no case is {', '.join(unknown)}")
    able = [case for case in CASES if case.over_wire]
    known = {case.name for case in able} | {str(case.bar) for case in able}
    if options.round_trip and (unable := [name for name in options.cases if name not in known]):
        parser.error(f"on loopback only: {', '.join(unable)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
