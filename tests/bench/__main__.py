"""``python -m tests.bench``: measure, print a table and the bars; status 1 where tcprelay falls short of one."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .cases import CASES, Case
from .processes import Failure, Processes, find_program
from .report import Results, make_bars, make_table, write_json
from .subjects import SUBJECTS, Subject


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    if not os.path.isdir("/proc/self/fd"):
        print("the bench reads /proc, which is Linux's", file=sys.stderr)
        return 2
    # So that whatever ends this also ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    results = Results()
    cases = [case for case in CASES if _is_chosen(case.name, options.cases)]
    subjects = [kind() for kind in SUBJECTS if _is_chosen(kind.name, options.subjects)]
    for thing in (*cases, *subjects):
        if reason := thing.missing():
            results.missing.append(f"{thing.name}: {reason}")
    cases = [case for case in cases if not case.missing()]
    subjects = [subject for subject in subjects if not subject.missing()]
    if not find_program("nginx"):
        results.missing.append("nginx: not installed; a small HTTP service in Python takes its place")
    for line in results.missing:
        print(f"missing: {line}", file=sys.stderr)

    broken = False
    for case in cases:
        for turn in range(options.repeat):  # one subject after the other, and again: a disturbance hits all alike
            for subject in subjects:
                if subject.is_relay or not case.relays_only:
                    print(f"{case.name}, {subject.name}, {turn + 1} of {options.repeat}", file=sys.stderr, flush=True)
                    good = measure(case, subject, options.seconds, results)
                    broken = broken or (not good and subject.name == "tcprelay")

    print(make_table(results, cases, [subject.name for subject in subjects]))
    bars = make_bars(results)
    for kind, lines in (("missing", results.missing), ("failed", results.failures), ("note", results.notes)):
        for line in lines:
            print(f"{kind}: {line}")
    print(*bars, sep="\n")
    if options.json:
        chosen = {"repeat": options.repeat, "seconds": options.seconds}
        write_json(options.json, results, cases, bars, chosen)
    return int(broken or any(bar.passed is False for bar in bars))


def measure(case: Case, subject: Subject, seconds: int, results: Results) -> bool:
    """One measurement, with processes of its own; False where it failed."""
    processes = Processes()
    where = f"{case.name}, {subject.name}"
    try:
        with processes:
            service = case.start_service(processes)
            relay = subject.start(processes, service, case.pool)
            results.add(case.name, subject.name, case.measure(processes, relay, seconds))
    except (Failure, OSError) as error:
        results.failures.append(f"{where}: {error}")
        print(f"  failed: {error}", file=sys.stderr)
        return False
    finally:
        results.notes += [f"{where}: {note}" for note in processes.notes]
    return True


def _is_chosen(name: str, wanted: list[str]) -> bool:
    return not wanted or any(name == word or name.startswith(f"{word}-") for word in wanted)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    case_names = [case.name for case in CASES]
    subject_names = [kind.name for kind in SUBJECTS]

    def names_among(known: list[str]) -> object:
        def parse(text: str) -> list[str]:
            words = [word.strip() for word in text.split(",") if word.strip()]
            for word in words:
                if not any(_is_chosen(name, [word]) for name in known):
                    raise argparse.ArgumentTypeError(f"{word}: accepted is: {', '.join(known)}")
            return words

        return parse

    def positive(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 0 < int(text) <= 3600):
            raise argparse.ArgumentTypeError("a whole number from 1 to 3600")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="times that each is measured (3)")
    parser.add_argument("--seconds", type=positive, default=3, metavar="S", help="length of one load (3)")
    parser.add_argument(
        "--cases", type=names_among(case_names), default=[], metavar="CASE,...",
        help=f"some of {', '.join(case_names)}; the part before the dash stands for all of its kind",
    )  # fmt: skip
    parser.add_argument(
        "--subjects", type=names_among(subject_names), default=[], metavar="SUBJECT,...",
        help=f"some of {', '.join(subject_names)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
