"""Measure tcprelay beside a direct connection and other relays; status 1 where it falls short of a bar."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from .bars import describe, make_bars
from .cases import CASES, Case
from .chart import draw
from .processes import Failure, Processes, free_port
from .programs import absent
from .report import Results, make_table, read_json, write_json
from .subjects import OURS, SUBJECTS, Order, Subject


def main() -> int:
    options = parse_options()
    results = read_json(options.from_json) if options.from_json else run(options)
    bars = make_bars(results)
    print(make_table(results), "", *results.remarks, "", *map(describe, bars), sep="\n")
    if options.json:
        write_json(options.json, results, bars)
    if options.svg:
        options.svg.write_text(draw(results))
    return int(bool(results.failed & set(OURS)) or any(bar["verdict"] == "FAIL" for bar in bars))


def run(options: argparse.Namespace) -> Results:
    """Measure everything that was chosen and can be measured here."""
    if sys.platform != "linux":
        sys.exit("the bench asks the kernel about processes and sockets as Linux tells")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    cases = [case for case in CASES if {case.name, case.name.partition("-")[0]} & set(options.cases)]
    subjects = [subject for subject in SUBJECTS if subject.name in options.subjects]
    remarks = [f"not measured: {case.name}: {case.missing}" for case in cases if case.missing]
    remarks += [f"not measured: {subject.name}: {subject.missing}" for subject in subjects if subject.missing]
    if reason := absent("nginx"):
        remarks.append(f"{reason}: a small HTTP service in Python takes its place")
    cases = [case for case in cases if not case.missing]
    subjects = [subject for subject in subjects if not subject.missing]
    about = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "repeat": options.repeat,
        "seconds": options.seconds, "workers": options.workers, "python": platform.python_version(),
        "system": platform.platform(), "processors": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    versions = {one.name: {"version": one.version(), "encrypted": one.encrypted} for one in subjects}
    results = Results(about, versions, {case.name: case.metrics for case in cases}, remarks=remarks)

    turns = [(case, turn, subject) for case in cases
             for turn in range(options.repeat)  # all subjects, then all again: what disturbs hits each of them
             for subject in subjects if turn < case.times(subject, options.repeat)]  # fmt: skip
    left = sum(case.lasts(options.seconds) for case, _, _ in turns)
    try:
        for case, turn, subject in turns:
            what = f"{case.name}, {subject.name}, {turn + 1} of {options.repeat}"
            print(f"{what}; about {left / 60:.0f} minutes left", file=sys.stderr, flush=True)
            measure(case, subject, options, results)
            left -= case.lasts(options.seconds)
    except KeyboardInterrupt:
        results.remarks.append(f"interrupted: {what}, and what was to follow, was not measured")
    return results


def measure(case: Case, subject: Subject, options: argparse.Namespace, results: Results) -> None:
    """One measurement, in a place of its own and with processes of its own."""
    where, notes, service = f"{case.name}, {subject.name}", list[str](), free_port()
    try:
        with case.place() as place, Processes(place) as processes:
            notes = processes.notes
            case.start_service(processes, service)
            processes.wait_sockets(service, far=True)
            relay = subject.start(processes, Order(service, case.pool, options.workers))
            for metric, value in case.measure(processes, relay, options.seconds).items():
                results.values.setdefault((case.name, metric, subject.name), []).append(value)
    except (Failure, OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
        results.failed.add(subject.name)
        results.remarks.append(f"failed: {where}: {str(error) or repr(error)}")
    results.remarks += [f"odd: {where}: {note}" for note in notes]


def parse_options() -> argparse.Namespace:
    names, subjects = [case.name for case in CASES], [subject.name for subject in SUBJECTS]
    kinds = [*dict.fromkeys(name.partition("-")[0] for name in names)]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="how often each is measured (3)")
    parser.add_argument("--seconds", type=int, default=3, metavar="S", help="length of one load (3)")
    parser.add_argument("--cases", nargs="+", choices=[*dict.fromkeys(kinds + names)], default=kinds, metavar="CASE",
                        help=f"some of {', '.join(names)}, or all of a kind: {', '.join(kinds)}")  # fmt: skip
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects, metavar="SUBJECT",
                        help=f"some of {', '.join(subjects)}")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="--workers of both tcprelay commands (their default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a chart into a file, too")
    parser.add_argument("--from-json", type=Path, metavar="FILE",
                        help="measure nothing: table, bars and chart of an earlier run")  # fmt: skip
    options = parser.parse_args()
    if min(options.repeat, options.seconds) < 1:
        parser.error("--repeat and --seconds are whole numbers from 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
