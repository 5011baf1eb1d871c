"""The documents say what is true."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tcprelay
from _tcprelay.events import FAILURES
from _tcprelay.options import options_of
from _tcprelay.status.metrics import METRICS
from _tcprelay.values import OPTION_GROUPS
from tcprelay import ClientOptions, Event, RelayClient, RelayServer, ServerOptions

from .peers import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_between(path: Path, name: str) -> str:
    """A table that stands between two comments."""
    found = re.search(rf"<!-- {name}: .*? -->\n(.*?)\n?<!-- end of {name} -->", path.read_text(), re.DOTALL)
    assert found, f"{path.name} has no table of {name}"
    return found[1]


def options_table() -> str:
    """The table of all options."""
    both = {"tcprelays": dict(options_of(ServerOptions)), "tcprelayc": dict(options_of(ClientOptions))}
    rows = ["| option | command | default | what it says |", "| --- | --- | --- | --- |"]
    entries = []
    for command, options in both.items():
        for name, info in options.items():
            commands = [other for other in both if name in both[other] and both[other][name].help == info.help]
            if command == commands[0]:
                entries.append((name, info, "both" if len(commands) == 2 else command))
    for name, info, command in sorted(entries, key=lambda entry: OPTION_GROUPS.index(entry[1].group)):
        value = f" {info.metavar}".replace("|", "\\|") if info.metavar else ""
        rows.append(f"| `--{name.replace('_', '-')}{value}` | {command} | {info.default} | {info.help} |")
    return "\n".join(rows)


def test_the_table_of_options() -> None:
    """It is the one that the code gives (on a failure: copy it from the assertion)."""
    assert table_between(ROOT / "docs/options.md", "options") == options_table()


def events_table() -> str:
    """The table of all events, with their fields, and the first sentence of what is said of each."""
    rows = ["| event | fields | when |", "| --- | --- | --- |"]
    for name in tcprelay.__all__:
        kind = getattr(tcprelay, name)
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event:
            fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))
            said = re.sub(r"\s+", " ", kind.__doc__ or "").split(". ")[0].rstrip(".").split(".  ")[0]
            rows.append(f"| `{name}` | {fields} | {said} |")
    return "\n".join(rows)


def test_the_table_of_events() -> None:
    """It is the one that the code gives (on a failure: copy it from the assertion)."""
    assert table_between(ROOT / "docs/api.md", "events") == events_table()


def test_what_only_a_restart_can_change() -> None:
    """The list is the one that the code gives, whichever role an option is of."""
    text = (ROOT / "docs/options.md").read_text().partition("<!-- fixed")[2].partition("##")[0]
    told = set(re.findall(r"`--([a-z-]+)`", text))
    assert told == {
        name.replace("_", "-") for cls in (ServerOptions, ClientOptions) for name, info in options_of(cls) if info.fixed
    }


def test_the_table_of_counters() -> None:
    """Both roles' counters, and nothing else."""
    rows = re.findall(r"^\| `(\w+)` \| (both|server|client) \|", table_between(ROOT / "docs/api.md", "counters"), re.M)
    for role, relay in (("server", RelayServer(0, 0)), ("client", RelayClient("h", 1, "r", 1))):
        assert [name for name, whose in rows if whose in ("both", role)] == list(relay.counters)


def metrics_table() -> str:
    """The table of all metrics, by the names of their samples."""
    rows = ["| metric | type | labels | of | what it is |", "| --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.sample_name}` | {metric.type} | {labels} | {metric.role} | {metric.help} |")
    return "\n".join(rows)


def test_the_table_of_metrics() -> None:
    """It is the one that the code gives (on a failure: copy it from the assertion)."""
    assert table_between(ROOT / "docs/metrics.md", "metrics") == metrics_table()


def test_the_table_of_failures() -> None:
    """The codes of connections that were never opened (on a failure: copy it from the assertion)."""
    rows = ["| code | what it says |", "| --- | --- |", *(f"| `{code}` | {says} |" for code, says in FAILURES.items())]
    assert table_between(ROOT / "docs/metrics.md", "failures") == "\n".join(rows)


def test_the_two_commands() -> None:
    """The README begins with them."""
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("## The shortest start")


def test_links_between_documents() -> None:
    """Each leads to a file, and to a heading where it names one."""
    for document in DOCS:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
            path, _, anchor = target.partition("#")
            place = (document.parent / path) if path else document
            assert place.exists(), f"{document.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{document.name}: {target}"


def test_every_document_is_listed() -> None:
    """In the README's table of what is where."""
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in DOCS[1:] if f"(docs/{path.name})" not in readme] == []


# Command lines


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a language, with the document each stands in; of shell all but those marked ``not-run``."""
    for document in DOCS:
        for info, text in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", document.read_text(), re.MULTILINE):
            if info == language:
                yield document.name, text


def command_lines() -> list[tuple[str, str]]:
    """Those in code blocks, and the relays' within sentences, unless a part of them stands for something."""
    lines = []
    for name, text in blocks("sh"):
        whole = text.replace("\\\n", " ").splitlines()
        lines += [(name, re.sub(r"\s+#\s.*", "", line)) for line in whole if line.strip() and line[0] != "#"]
    for document in DOCS:
        for line in re.findall(r"(?<!`)`(tcprelay[sc] [^`]*)`", document.read_text()):
            if not re.search(r"[A-Z]{3}|…|bindPort|local_addr", line):
                lines.append((document.name, line))
    return sorted(set(lines))


def test_command_lines_are_found() -> None:
    """None of the tests below can be empty."""
    assert len(command_lines()) > 15
    assert len(list(blocks("python"))) == 3


RELAYS = {"tcprelays": ["-m", "tcprelay_server"], "tcprelayc": ["-m", "tcprelay_client"], "python3": []}


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_a_command_line_is_right(document: str, line: str, tmp_path: Path) -> None:
    """Of the relays with ``--check``, of make without doing it; what makes a token is run as it stands.  What a test
    cannot run (other hosts, Docker, systemd) stands in a block that is marked as ``sh not-run``."""
    (tmp_path / "token").write_text("a token that is long enough\n")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    program, *words = shlex.split(line) if line[0] != "(" else [line]
    if program in RELAYS:
        done = subprocess.run(
            [sys.executable, *RELAYS[program], *words, "--check"], cwd=tmp_path, capture_output=True, text=True,
            timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if words[:1] == ["status"]:  # where none runs its status is 1; 2 is a wrong line
            assert done.returncode < 2, f"{document}: {line}: {done.stderr}"
        else:
            assert (done.returncode, done.stderr) == (0, ""), f"{document}: {line}: {done.stderr}"
    elif program == "make":
        subprocess.run([program, *words, "--dry-run"], cwd=ROOT, capture_output=True, check=True, timeout=60)
    else:
        assert line.startswith("(umask"), f"{document}: {line!r} is run by no test: mark its block as not-run"
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=60)
        assert len((tmp_path / "token").read_text().strip()) == 43


@pytest.mark.parametrize(("document", "text"), list(blocks("python")))
def test_a_program_in_a_document_runs(document: str, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{document}: {done.stderr}"
    address = r"'127.0.0.1', \d+"
    shown = rf"^(\({address}\) \({address}\)|default 127.0.0.1:\d+ 0 .* no relay client is connected)$"
    assert re.search(shown, done.stdout, re.MULTILINE)
