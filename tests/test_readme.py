"""The README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

from _tcprelay.options import options_of
from _tcprelay.values import OPTION_GROUPS
from tcprelay import ClientOptions, ServerOptions

README = Path(__file__).parent.parent / "README.md"


def options_table() -> str:
    """The table of all options, as the README has it."""
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
    """The table is the one that the code gives (on a failure: copy it from the assertion)."""
    text = README.read_text()
    found = re.search(r"<!-- options: .*? -->\n(.*?)\n?<!-- end of options -->", text, re.DOTALL)
    assert found
    assert found[1] == options_table()


def test_the_two_commands() -> None:
    """The README begins with them."""
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < text.index("## Install")
