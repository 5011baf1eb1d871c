"""deploy/alerts.yaml and deploy/dashboard.json: what they ask for is there, and the alerts fire when they should."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from _tcprelay.events import FAILURES
from _tcprelay.status.metrics import METRICS, REFUSALS

from .openmetrics import ENDINGS
from .peers import ROOT, find
from .test_documents import table_between

ALERTS = ROOT / "deploy/alerts.yaml"
BOARD = json.loads((ROOT / "deploy/dashboard.json").read_text(encoding="utf-8"))
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds to all samples."""


class Rule(NamedTuple):
    name: str
    expr: str
    wait: str
    """How long it has to be true, as in "5m"; "" for no time."""
    severity: str
    summary: str
    description: str


def read_rules() -> list[Rule]:
    """The rules of the file, which is written in one way throughout; `promtool` reads it as the YAML that it is."""
    rules = []
    for part in ALERTS.read_text(encoding="utf-8").split("      - alert: ")[1:]:
        found = re.fullmatch(
            r"(?P<name>\w+)\n"
            r"        expr: \|\n(?P<expr>(?: {10}.*\n)+)"
            r"(?:        for: (?P<wait>\w+)\n)?"
            r"        labels:\n          severity: (?P<severity>critical|warning)\n"
            r'        annotations:\n          summary: "(?P<summary>[^"]+)"\n'
            r"          description: >-\n(?P<description>(?: {12}.*\n)+)\n?",
            part,
        )
        assert found, part
        rules.append(Rule(**{key: " ".join((value or "").split()) for key, value in found.groupdict().items()}))
    return rules


RULES = {rule.name: rule for rule in read_rules()}


def panels() -> list[dict[str, Any]]:
    """The panels of the board that show something."""
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def board_expressions() -> list[str]:
    """What the board asks for, with a value for each of its variables."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [re.sub(r"\$(job|instance|service)\b", ".*", one.replace("$__rate_interval", "5m")) for one in found]


def expressions() -> list[str]:
    """Of both files."""
    return [*(rule.expr for rule in RULES.values()), *board_expressions()]


SAMPLES = {
    metric.name + ending if metric.type == "histogram" else metric.sample_name: {
        *metric.labels, *SCRAPED, *(["le"] if ending == "_bucket" else [])
    }
    for metric in METRICS
    for ending in (ENDINGS["histogram"][:3] if metric.type == "histogram" else ("",))
} | {"up": SCRAPED}  # fmt: skip
"""The name of each sample that can be asked for, with its labels."""
VALUES = {"state": {"idle", "busy", "opening"}, "direction": {"in", "out"}, "code": {*FAILURES, *REFUSALS}}
"""The values that labels can have, where those are known."""
SELECTOR = re.compile(r"\b([a-z]+(?:_[a-z]+)+|up)\b(?![(\s]*\()(?:\{([^}]*)\})?")


def selectors(expression: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The samples that an expression asks for, each with its conditions."""
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", expression)
    for name, conditions in SELECTOR.findall(bare):
        yield name, re.findall(r'(\w+)=~?"([^"]*)"', conditions)


def test_the_selectors_are_found() -> None:
    """None of the tests below can be empty."""
    found = selectors('sum by (a_b) (rate(x_y{k="v",l=~"w|z"}[5m])) > up and histogram_quantile(0.5, a_bucket)')
    assert list(found) == [("x_y", [("k", "v"), ("l", "w|z")]), ("up", []), ("a_bucket", [])]
    assert len(RULES) == 9 and len(board_expressions()) > 20


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_is_there(expression: str) -> None:
    """Each metric, each label and each value of one; and what is summed by some labels has them."""
    asked = list(selectors(expression))
    assert asked
    for name, conditions in asked:
        assert name in SAMPLES, name
        for label, value in conditions:
            assert label in SAMPLES[name], f"{name} has no label {label}"
            if label in VALUES:
                assert set(value.split("|")) <= VALUES[label]
    for labels in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression):
        for label in labels.split(", "):
            assert any(label in SAMPLES[name] for name, _ in asked), label
    assert "NaN" not in expression


def test_names_in_words_are_there() -> None:
    """Metrics that the annotations and the documents speak of, and those in the queries of the board's variables."""
    texts = [ALERTS.read_text(), (ROOT / "docs/metrics.md").read_text(), json.dumps(BOARD["templating"])]
    named = {name for text in texts for name in re.findall(r"\b(?:tcprelay|process)_[a-z_]+\b", text)}
    assert len(named) > 20
    assert named - set(SAMPLES) <= {metric.name for metric in METRICS if metric.type == "histogram"}


@pytest.mark.peer("promtool")
def test_promtool_understands_all(tmp_path: Path) -> None:
    """The alerts as they stand, and each expression of the board as a rule of its own."""
    rules = [{"record": f"board:{number}", "expr": one} for number, one in enumerate(board_expressions())]
    board = tmp_path / "board.json"
    board.write_text(json.dumps({"groups": [{"name": "board", "rules": [{**r, "record": "board:x", "labels": {
        "number": r["record"]}} for r in rules]}]}))  # fmt: skip
    for path, count in ((ALERTS, len(RULES)), (board, len(rules))):
        done = subprocess.run(
            [find("promtool"), "check", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 and f"SUCCESS: {count} rules found" in done.stdout, done.stdout + done.stderr


# --- When they fire -------------------------------------------------------------------------------------------

AT = 'job="tcprelay",instance="a:1"'
SSH = f'{AT},service="ssh"'
Series = dict[str, str]
"""Samples a minute from the start on, as ``promtool`` has them: "0+2x10" is 0, then ten more, each by 2 higher."""


class Case(NamedTuple):
    alert: str
    series: Series
    minutes: int
    """When it is looked at."""
    labels: dict[str, str] | None
    """Those of the alert that fires then, but for `SCRAPED`; None where none does."""


def failures(code: str, values: str, opened: str) -> Series:
    return {
        f'tcprelay_connections_failed_total{{{SSH},code="{code}"}}': values,
        f'tcprelay_connections_failed_total{{{SSH},code="lost"}}': "0+50x60",
        f'tcprelay_connections_opened_total{{{SSH},client="nas"}}': opened,
        f"tcprelay_connections_opened_total{{{SSH}}}": "0x60",
    }


def descriptors(used: str, build: str = AT) -> Series:
    return {
        f"process_open_fds{{{AT}}}": used, f"process_max_fds{{{AT}}}": "1000x60",
        f'tcprelay_build_info{{{build},version="1",role="server"}}': "1x60",
    }  # fmt: skip


CASES = [
    Case("TcprelayDown", {f"up{{{AT}}}": "1 1 1 0x10"}, 6, {}),
    Case("TcprelayDown", {f"up{{{AT}}}": "1 1 1 0x10"}, 4, None),
    Case("TcprelayDown", {'up{job="node",instance="a:1"}': "0x10"}, 9, None),
    Case("TcprelayUnhealthy", {f"tcprelay_healthy{{{AT}}}": "1 0x10", f"tcprelay_ending{{{AT}}}": "0x10"}, 4, {}),
    Case("TcprelayUnhealthy", {f"tcprelay_healthy{{{AT}}}": "0x10", f"tcprelay_ending{{{AT}}}": "1x10"}, 9, None),
    Case("TcprelayUnhealthy", {f"tcprelay_healthy{{{AT}}}": "0 1 0 1x9", f"tcprelay_ending{{{AT}}}": "0x10"}, 5, None),
    Case("TcprelayWorkerMissing", {f"tcprelay_workers_missing{{{AT}}}": "0 1x10"}, 4, {}),
    Case("TcprelayWorkerMissing", {f"tcprelay_workers_missing{{{AT}}}": "0 1 0x10"}, 4, None),
    Case("TcprelayServiceUnreachable", {f"tcprelay_service_reachable{{{SSH}}}": "1 0x60"}, 4, {"service": "ssh"}),
    Case("TcprelayServiceUnreachable", {f"tcprelay_service_reachable{{{SSH}}}": "1 0x60"}, 2, None),
    Case("TcprelayServiceUnreachable", {f"tcprelay_service_reachable{{{SSH}}}": "1 0 0 1x60"}, 5, None),
    Case("TcprelayRelayLost", {f'tcprelay_relay_reachable{{{AT},relay="b:1"}}': "1 0x60"}, 7, {"relay": "b:1"}),
    Case("TcprelayRelayLost", {f'tcprelay_relay_reachable{{{AT},relay="b:1"}}': "1 0x60"}, 5, None),
    Case("TcprelayClientGone", {f"tcprelay_clients{{{SSH}}}": "2x20 1x40"}, 27, {"service": "ssh"}),
    Case("TcprelayClientGone", {f"tcprelay_clients{{{SSH}}}": "2x20 1x40"}, 24, None),
    Case("TcprelayClientGone", {f"tcprelay_clients{{{SSH}}}": "2x20 1x90"}, 90, None),
    Case("TcprelayClientGone", {f"tcprelay_clients{{{SSH}}}": "1x20 2 1x40"}, 40, None),
    Case("TcprelayClientGone", {f"tcprelay_clients{{{SSH}}}": "1x20 0x40"}, 40, None),
    Case("TcprelayConnectionsFail", failures("no-link", "0x10 0+2x50", "0+10x60"), 25, {"service": "ssh"}),
    Case("TcprelayConnectionsFail", failures("unreachable", "0x10 0+2x50", "0x60"), 25, {"service": "ssh"}),
    Case("TcprelayConnectionsFail", failures("no-link", "0x10 0+2x50", "0+30x60"), 25, None),
    Case("TcprelayConnectionsFail", failures("no-link", "0x10 3x50", "0+1x60"), 17, None),
    Case("TcprelayConnectionsFail", failures("address", "0+50x60", "0+1x60"), 25, None),
    Case("TcprelayWrongToken", {f'tcprelay_links_refused_total{{{AT},code="token"}}': "0+2x60"}, 20, {}),
    Case("TcprelayWrongToken", {f'tcprelay_links_refused_total{{{AT},code="token"}}': "0+1x60"}, 20, None),
    Case("TcprelayWrongToken", {f'tcprelay_links_refused_total{{{AT},code="lost"}}': "0+9x60"}, 20, None),
    Case("TcprelayDescriptorsNearlyUsedUp", descriptors("500 900x60"), 8, {}),
    Case("TcprelayDescriptorsNearlyUsedUp", descriptors("500 700x60"), 8, None),
    Case("TcprelayDescriptorsNearlyUsedUp", descriptors("900x60", 'job="node",instance="a:1"'), 8, None),
]


def test_each_alert_is_tried() -> None:
    """Both ways."""
    for name in RULES:
        assert {case.labels is None for case in CASES if case.alert == name} == {True, False}, name


@pytest.mark.peer("promtool")
@pytest.mark.parametrize("case", CASES, ids=[f"{case.alert}-{number}" for number, case in enumerate(CASES)])
def test_an_alert_fires_when_it_should(case: Case, tmp_path: Path) -> None:
    """With its labels filled into what it says."""
    rule, fired = RULES[case.alert], []
    if case.labels is not None:
        labels = {"job": "tcprelay", "instance": "a:1", "severity": rule.severity, **case.labels}

        def fill(text: str) -> str:
            return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)

        said = {"summary": fill(rule.summary), "description": fill(rule.description)}
        fired = [{"exp_labels": labels, "exp_annotations": said}]
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    asked = [{"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": fired}]
    tests = {"interval": "1m", "input_series": series, "alert_rule_test": asked}
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [tests]}))
    done = subprocess.run(
        [find("promtool"), "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_alerts() -> None:
    """It is the one that the file gives (on a failure: copy it from the assertion)."""
    rows = ["| alert | severity | true for |", "| --- | --- | --- |"]
    rows += [f"| `{rule.name}` | {rule.severity} | {rule.wait or 'no time'} |" for rule in RULES.values()]
    assert table_between(ROOT / "docs/metrics.md", "alerts") == "\n".join(rows)


# --- The board ------------------------------------------------------------------------------------------------


def test_the_board_can_be_imported() -> None:
    """Its source of data is asked for at the import and used throughout; all plugins are named; ids are its own."""
    assert [entry["name"] for entry in BOARD["__inputs"] if entry["pluginId"] == "prometheus"] == ["DS_PROMETHEUS"]
    assert BOARD["id"] is None and BOARD["uid"] == "tcprelay" and BOARD["schemaVersion"] >= 39
    sources = [panel["datasource"] for panel in panels()]
    sources += [target["datasource"] for panel in panels() for target in panel["targets"]]
    sources += [variable["datasource"] for variable in BOARD["templating"]["list"]]
    assert all(source == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for source in sources)
    required = {entry["id"] for entry in BOARD["__requires"] if entry["type"] == "panel"}
    assert required == {panel["type"] for panel in panels()}
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_the_rows_of_the_board() -> None:
    """Panels lie below the rows that they belong to, within 24 columns, and none upon another."""
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Health", "Connections", "Bytes each way", "Pairing time", "Failures", "Links", "Processes"]
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert [panel["gridPos"]["y"] for panel in BOARD["panels"]] == sorted(p["gridPos"]["y"] for p in BOARD["panels"])


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: str(panel["title"]))
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    """In a sentence; its lines are named by labels that they have, and its variables are the board's."""
    assert re.fullmatch(r"[A-Z].*\.", panel["description"])
    known = {variable["name"] for variable in BOARD["templating"]["list"]} | {"__rate_interval"}
    for target in panel["targets"]:
        [summed] = re.findall(r"\bsum by \(([^)]*)\)", target["expr"]) or [""]
        asked = [SAMPLES[name] for name, _ in selectors(target["expr"])]
        labels = set(summed.split(", ")) if summed else asked[0]
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels - {"le"}
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= known
