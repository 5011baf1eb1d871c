"""A reader of OpenMetrics text that accepts nothing else: written from the specification, version 1.0, alone.

What the specification only recommends, all metrics of a family having the same labels say, is demanded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
METADATA = re.compile(rf"# (TYPE|UNIT|HELP) ({NAME}) (.*)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"')
LABELS = rf"\{{(?:{LABEL.pattern}(?:,{LABEL.pattern})*)?\}}"
NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
SAMPLE = re.compile(rf"({NAME})({LABELS})? ({NUMBER})")
HELP = re.compile(r'(?:[^"\\]|\\[\\n"])*')
ENDINGS = {
    "counter": ("_total", "_created"),
    "histogram": ("_count", "_sum", "_bucket", "_created"),
    "gauge": ("",),
    "info": ("_info",),
}
"""The types that the relays have, and what the names of samples may end in."""

Labels = tuple[tuple[str, str], ...]
"""In the order of their names."""


class Fault(Exception):
    """It is no OpenMetrics."""


@dataclass
class Family:
    """A metric family, with its samples in their order."""

    name: str
    type: str
    unit: str = ""
    help: str = ""
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)


def parse(text: str) -> dict[str, Family]:
    """The metric families of an exposition by name.  Raises `Fault`."""
    demand(text.endswith("# EOF\n") and text.count("# EOF") == 1, "the end is not # EOF, once")
    demand("\r" not in text and "\ufeff" not in text, "a carriage return or a byte order mark")
    families: dict[str, Family] = {}
    family: Family | None = None
    for line in text.split("\n")[:-2]:
        if found := METADATA.fullmatch(line):
            kind, name, value = found.groups()
            if kind == "TYPE":
                demand(name not in families, f"{name} is announced twice")
                demand(value in ENDINGS, f"{name} has the type {value}")
                family = families[name] = Family(name, value)
            else:
                demand(family is not None and family.name == name, f"{kind} of {name} is not behind its TYPE")
                assert family
                demand(not family.samples, f"{kind} of {name} is behind its samples")
                describe(family, kind, value)
        else:
            demand(family is not None, f"a sample without a type: {line}")
            assert family
            family.samples.append(read_sample(family, line))
    for family in families.values():
        check(family)
    names = [family.name + ending for family in families.values() for ending in {*ENDINGS[family.type], ""}]
    demand(len(names) == len(set(names)), "names of two families clash")
    return families


def describe(family: Family, kind: str, value: str) -> None:
    if kind == "UNIT":
        demand(not family.unit and not family.help, f"UNIT of {family.name} is in the wrong place")
        demand(bool(value) and family.name.endswith(f"_{value}"), f"{family.name} does not end in its unit {value}")
        demand(family.type != "info", f"{family.name} is an info and has a unit")
        family.unit = value
    else:
        demand(not family.help and HELP.fullmatch(value) is not None, f"HELP of {family.name} is wrong")
        family.help = value


def read_sample(family: Family, line: str) -> tuple[str, Labels, float]:
    found = SAMPLE.fullmatch(line)
    demand(found is not None, f"no sample: {line}")
    assert found
    name, labels = found[1], [(one[1], unescape(one[2])) for one in LABEL.finditer(found[2] or "")]
    demand(name in [family.name + ending for ending in ENDINGS[family.type]], f"{name} is none of {family.name}")
    keys = [key for key, _ in labels]
    demand(len(keys) == len(set(keys)) and not any(key.startswith("_") for key in keys), f"labels of {line}")
    return name, tuple(sorted(labels)), float(line.rpartition(" ")[2])


def unescape(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), value)


def check(family: Family) -> None:
    """The rules for the samples of a family, by its type."""
    keys = [(name, labels) for name, labels, _ in family.samples]
    demand(len(keys) == len(set(keys)), f"{family.name} has a sample twice")
    groups: list[tuple[Labels, list[tuple[str, str, float]]]] = []
    for name, labels, value in family.samples:
        demand(family.type == "gauge" or value >= 0, f"{family.name} is negative")
        bound = dict(labels).get("le", "") if family.type == "histogram" else ""
        rest = tuple(label for label in labels if not (bound and label[0] == "le"))
        if not groups or groups[-1][0] != rest:
            groups.append((rest, []))
        groups[-1][1].append((name.removeprefix(family.name), bound, value))
    demand(len({rest for rest, _ in groups}) == len(groups), f"metrics of {family.name} are interleaved")
    demand(len({tuple(key for key, _ in rest) for rest, _ in groups}) < 2, f"labels of {family.name} differ")
    for _, samples in groups:
        if family.type == "histogram":
            check_histogram(family.name, samples)
        demand(family.type != "counter" or samples[0][0] == "_total", f"{family.name} has no total")
        demand(family.type != "info" or samples[0][2] == 1, f"{family.name} is not 1")


def check_histogram(name: str, samples: list[tuple[str, str, float]]) -> None:
    """Buckets first, in their order, which add up; then the count and the sum."""
    buckets = [(bound, value) for ending, bound, value in samples if ending == "_bucket"]
    demand([ending for ending, _, _ in samples[len(buckets) :]] == ["_count", "_sum"], f"{name}: no count and sum")
    demand(bool(buckets) and buckets[-1][0] == "+Inf", f"{name}: the last bucket is not +Inf")
    bounds, values = [float(bound) for bound, _ in buckets], [value for _, value in buckets]
    demand(bounds == sorted(set(bounds)), f"{name}: the bounds do not rise")
    demand(values == sorted(values), f"{name}: the buckets are not cumulative")
    demand(all(value == int(value) for value in values), f"{name}: a bucket is no whole number")
    demand(values[-1] == samples[len(buckets)][2], f"{name}: the count is not the last bucket")
    for bound, _ in buckets:
        demand(bound == "+Inf" or bound == canonical(float(bound)), f"{name}: {bound} is not canonical")


def canonical(number: float) -> str:
    """As Go's %g has it, with a decimal point: the specification's "Canonical Numbers"."""
    mantissa, _, exponent = f"{number:e}".partition("e")
    if number and not -4 <= int(exponent) < 6:
        return f"{float(mantissa):g}e{exponent}"
    text = f"{number:.17g}" if float(f"{number:.6g}") != number else f"{number:.6g}"
    return text if "." in text else f"{text}.0"


def demand(is_met: bool, otherwise: str) -> None:
    if not is_met:
        raise Fault(otherwise)


def samples_of(families: dict[str, Family]) -> Iterator[tuple[str, Labels, float]]:
    for family in families.values():
        yield from family.samples
