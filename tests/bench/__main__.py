"""Measure tcprelay beside a direct connection and other relays; status 1 where it falls short of a bar."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
from pathlib import Path

from .cases import CASES, Case
from .processes import Failure, Processes, absent, free_port
from .report import Results, make_bars, make_table, show, write_json
from .subjects import SUBJECTS, Subject


def main() -> int:
    options = parse_options()
    if sys.platform != "linux":
        sys.exit("the bench reads /proc, which is Linux's")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    results = Results()
    cases = [case for case in CASES if {case.name, case.name.partition("-")[0]} & set(options.cases)]
    subjects = [subject for subject in SUBJECTS if subject.name in options.subjects]
    results.remarks += [f"not measured: {case.name}: {case.missing}" for case in cases if case.missing]
    results.remarks += [f"not measured: {subject.name}: {subject.missing}" for subject in subjects if subject.missing]
    if reason := absent("nginx"):
        results.remarks.append(f"{reason}: a small HTTP service in Python takes its place")
    cases = [case for case in cases if not case.missing]
    subjects = [subject for subject in subjects if not subject.missing]

    for case in cases:
        for turn in range(options.repeat):  # all subjects, then all again: what disturbs hits each of them
            for subject in subjects:
                print(f"{case.name}, {subject.name}, {turn + 1} of {options.repeat}", file=sys.stderr, flush=True)
                measure(case, subject, options.seconds, results)

    bars = make_bars(results)
    print(make_table(results, cases, [subject.name for subject in subjects]), *results.remarks, sep="\n")
    for bar in bars:
        print(f"{bar['verdict']}: {bar['asked']}" + ("" if bar["figure"] is None else f": {show(bar['figure'])}"))
    if options.json:
        write_json(options, results, cases, bars)
    return int("tcprelay" in results.failed or any(bar["verdict"] == "FAIL" for bar in bars))


def measure(case: Case, subject: Subject, seconds: int, results: Results) -> None:
    """One measurement, with processes of its own."""
    where, processes, service = f"{case.name}, {subject.name}", Processes(), free_port()
    try:
        with processes:
            case.start_service(processes, service)
            processes.wait_sockets(service)
            relay = subject.start(processes, service, case.pool)
            for metric, value in case.measure(processes, relay, seconds).items():
                results.values.setdefault((case.name, metric, subject.name), []).append(value)
    except (Failure, OSError) as error:
        results.failed.add(subject.name)
        results.remarks.append(f"failed: {where}: {error}")
    results.remarks += [f"odd: {where}: {note}" for note in processes.notes]


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    options = parser.parse_args()
    if min(options.repeat, options.seconds) < 1:
        parser.error("--repeat and --seconds are whole numbers from 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
