"""What in the bench can break silently: its parsers, the arithmetic of its bars, its chart and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .bench.bars import describe, make_bars
from .bench.cases import CASES, parse_iperf3, parse_wrk
from .bench.chart import draw
from .bench.processes import Failure
from .bench.report import Results, make_table, read_json, write_json
from .bench.subjects import SUBJECTS

ABOUT = {"time": "2026-01-02T03:04:05Z", "repeat": 3, "seconds": 3, "workers": None, "python": "3.11", "processors": 2}
WRK = """Running 1s test @ http://127.0.0.1:1/
  Latency Distribution
     50%  553.00us
     75%    1.10ms
     90%    2.20ms
     99%    1.03s
  14434 requests in 1.00s, 3.44MB read
  Socket errors: connect 1, read 20, write 0, timeout 3
  Non-2xx or 3xx responses: 100
Requests/sec:  14434.56
"""


@pytest.fixture
def results() -> Results:
    """Figures of every metric for every subject, the same for all."""
    subjects = {one.name: {"version": f"{one.name} 1.0 <&>", "encrypted": one.encrypted} for one in SUBJECTS}
    found = Results(ABOUT, subjects, {case.name: case.metrics for case in CASES})
    for case in CASES:
        for metric in case.metrics:
            for subject in SUBJECTS:
                found.values[case.name, metric, subject.name] = [2.0, 1.0, 30.0]
    return found


def verdicts(results: Results, asked: str) -> list[str]:
    """The lines of the bars whose question has these words in it."""
    return [line for line in map(describe, make_bars(results)) if asked in line]


def test_wrk_is_read_in_all_its_units() -> None:
    """Latencies are milliseconds, and every kind of error counts."""
    assert parse_wrk(WRK) == {"rate": 14434.56, "p50": 0.553, "p99": 1030.0, "errors": 124, "requests": 14434}


def test_wrk_without_an_answer_is_a_failure() -> None:
    """It ends with status 0 all the same."""
    with pytest.raises(Failure, match="wrk: no request was answered"):
        parse_wrk("  0 requests in 1.00s, 0.00B read\nRequests/sec:      0.00\n")


def test_iperf3_is_read_at_the_receiver() -> None:
    """What was sent may not have arrived."""
    end = {"sum_sent": {"bytes": 9, "bits_per_second": 9e9}, "sum_received": {"bytes": 8, "bits_per_second": 2.5e9}}
    assert parse_iperf3(json.dumps({"end": end})) == (2.5, 8)


def test_a_bar_names_the_best_peer_of_its_kind(results: Results) -> None:
    """Plain ones are compared with plain ones, and medians with medians."""
    results.values["connections-8", "rate", "bore"] = [4.0, 1.0, 100.0]
    results.values["connections-8", "rate", "rathole-tls"] = [1.0, 1.0, 100.0]
    results.values["connections-8", "rate", "direct"] = [900.0]
    assert verdicts(results, "new connections/s") == [
        "FAIL: new connections/s, 8 at a time, plain, against the best peer (at least 1): 0.5 of bore's",
        "PASS: new connections/s, 8 at a time, encrypted, against the best peer (at least 1): 1 of ssh-R's",
    ]


def test_one_stream_counts_in_its_worse_direction(results: Results) -> None:
    """Against the direct connection as well as against peers."""
    results.values["stream-out", "speed", "direct"] = [4.0]
    results.values["stream-out", "speed", "frp"] = [8.0]
    results.values["stream-in", "speed", "frp"] = [2.5]
    assert verdicts(results, "one plain stream") == [
        "FAIL: one plain stream against the direct connection, the worse direction (at least 0.6): 0.5"
    ]
    assert verdicts(results, "worse direction, plain") == [
        "FAIL: one stream, the worse direction, plain, against the best peer (at least 1): 0.25 of frp's"
    ]


def test_growth_of_the_cost_of_a_connection(results: Results) -> None:
    results.values["held", "cost at 5,000", "tcprelay"] = [2.5]
    assert verdicts(results, "cost") == [
        "PASS: cost of a connection at 5,000 held against that at 100 (at most 1.25): 1.25"
    ]


def test_what_has_no_figure_is_not_measured(results: Results) -> None:
    """Where peers are missing, too."""
    results.values = {key: value for key, value in results.values.items() if key[2] == "tcprelay" and key[0] != "held"}
    lines = [*map(describe, make_bars(results))]
    assert [line.partition(":")[0] for line in lines] == ["not measured"] * 26 + ["FAIL"] * 2
    assert "not measured: connections held (at least 5,000)" in lines


@pytest.mark.parametrize("missing", [(), ("direct",), ("tcprelay", "frp"), tuple(one.name for one in SUBJECTS)])
def test_chart_is_small_and_well_formed(results: Results, missing: tuple[str, ...]) -> None:
    """Also where a subject has no figures."""
    for name in missing:
        results.values = {key: value for key, value in results.values.items() if key[2] != name}
    drawn = draw(results)
    assert len(drawn) < 15000
    bars = [item for item in ElementTree.fromstring(drawn).iter() if item.tag.endswith(("}rect", "}path"))]
    assert len(bars) == 4 * (len(SUBJECTS) - len(missing))


def test_json_brings_back_what_was_measured(results: Results, tmp_path: Path) -> None:
    """Table, bars and chart are the same as those of the run."""
    results.failed.add("frp")
    results.remarks.append("failed: connections-8, frp: it ended")
    write_json(tmp_path / "run.json", results, make_bars(results))
    again = read_json(tmp_path / "run.json")
    assert again == results
    for make in (make_table, make_bars, draw):
        assert make(again) == make(results)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_latency_is_compared_with_the_shortest(results: Results) -> None:
    """And of several cases the longest counts, where less is better."""
    results.values["far-first-byte", "cold", "rathole"] = [1.0]
    results.values["far-first-byte", "cold", "chisel"] = [1.6]
    plain, encrypted = verdicts(results, "no idle link")
    assert plain.endswith("(at most 1.05): 2 of rathole's")
    assert encrypted.endswith("(at most 1.05): 1.25 of chisel's")
