"""The status of a relay as a table for a terminal.

What comes from peers, names above all, reaches the terminal without anything that it would obey; and a status may be of
another version of the relay: what is missing there counts as absent, and what is unknown here is left out.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .places import COMMANDS

LEAST_WIDTH = 60
"""Columns of a terminal, below which lines are longer than it."""
LONGEST_TEXT = 1000
"""Characters of a text that are shown."""
MOST_REFUSALS = 3
"""The last connections to the relay port that are shown with the reason why they did not become links."""
REFUSALS = ("LinkRefused", "LinkNotMade")
"""The events that tell of them."""
FIGURES = (("idle", 6), ("busy", 6), ("open", 7), ("so far", 8), ("in", 10), ("out", 10))
"""The columns of figures, and how wide each is, with what divides it from the one before."""
HEADINGS = (("links", 12), ("connections", 15), ("bytes", 20))
"""What stands above them."""
GLUE = "\xa0"
"""Stands for a blank where no line ends; in texts from elsewhere `harmless` has escaped it."""
STYLES = {"bold": "1", "dim": "2", "red": "1;31", "green": "1;32", "yellow": "33"}
"""Parameters of SGR (ECMA-48, 8.3.117), for the few kinds of text that there are."""


def render(status: Mapping[str, Any], colour: bool, width: int, connections: bool = False) -> str:
    """The table, with a line end behind each line.

    Parameters: what ``/status.json`` holds; whether the terminal has colours; how many columns it has, of which 60 are
    used at least; and whether the open connections are listed, too.
    """
    page = _Page(colour, max(width, LEAST_WIDTH))
    _say_relay(page, status)
    services = _rows(status, "services")
    names = [_text(one, "name") for one in services]
    clients = _rows(status, "clients")
    for service in (_text(one, "service") for one in clients):
        if service not in names:  # it is of another version, or has just gone
            names.append(service)
            services.append({"name": service})
    shown = _rows(status, "connections") if connections else []
    labels = [_service_label(one) for one in services] + [f"  {_client_label(one)}" for one in clients]
    labels += [_connection_label(one) for one in shown]
    page.measure(labels)
    if services:
        page.head()
    else:
        page.say("It has no services now.")
    now = _number(status, "time")
    for one, name in zip(services, names, strict=True):
        _say_service(page, one, [client for client in clients if _text(client, "service") == name], now)
    _say_refused(page, status, now)
    if connections:
        _say_connections(page, shown, _count(status, "open"), now)
    return "".join(f"{line}\n" for line in page.lines)


# --- The parts ------------------------------------------------------------------------------------------------


def _say_relay(page: _Page, status: Mapping[str, Any]) -> None:
    role, now = _text(status, "role"), _number(status, "time")
    command = COMMANDS.get(role, "tcprelay")
    place = "relay port" if role == "server" else "to"
    words = [
        f"{command} {_text(status, 'version')}".rstrip(),
        f"process {_count(status, 'pid')}",
        f"{place} {_text(status, 'address')}" if _text(status, "address") else "",
        f"up {_age(now, status, 'started')}",
    ]
    page.say(f"relay {role}: {', '.join(filter(None, words))}", style="bold")
    problems = _texts(status, "problems")
    if not problems:
        page.say("HEALTHY", style="green")
    for problem in problems:
        page.say(f"NOT HEALTHY: {problem}", style="red")
    if status.get("is_ending") is True:
        page.say("ENDING: it takes no new connections, and waits for the open ones", style="yellow")
    if missing := [number for number in _list(status, "missing") if isinstance(number, int)]:
        numbers = ", ".join(map(str, missing))
        text = f"{len(missing)} of {_count(status, 'workers')} workers did not answer (number {numbers})"
        page.say(f"{text}: that part is left out below", style="yellow")
    _say_relays(page, status)


def _say_relays(page: _Page, status: Mapping[str, Any]) -> None:
    """On a relay client the relay servers, where there are several: which of them it has links to."""
    rows = _rows(status, "relays")
    for row in rows if len(rows) > 1 else ():
        links = f"{_many(_count(row, 'links_idle'), 'link')} idle, {_count(row, 'links_busy')} busy"
        problem = _text(row, "problem")
        text = f"{_text(row, 'address')}: {links}" + (f"; PROBLEM: {problem}" if problem else "")
        page.say(text, 2, 4, "red" if problem else "")


def _say_service(
    page: _Page, service: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], now: float
) -> None:  # fmt: skip
    page.end_part()
    figures = [_count(service, name) for name in ("links_idle", "links_busy", "open", "opened")]
    page.row(_service_label(service), [*map(say_count, figures), *_sizes(service)], style="bold")
    rates = _number(service, "rate_in"), _number(service, "rate_out")
    if any(rates):
        page.row("  now", ["", "", "", "", *(f"{say_size(rate)}/s" for rate in rates)])
    if problem := _text(service, "problem"):
        page.say(f"PROBLEM: {problem}", 2, 2, "red")
    if waiting := _count(service, "waiting"):
        page.say(f"WAITING: {_many(waiting, 'service client')} for a link", 2, 2, "yellow")
    if _text(service, "target") and (address := _text(service, "address")):
        page.say(f"published at {address}", 2, 2)
    if opening := _count(service, "links_opening"):
        page.say(f"{_many(opening, 'link')} being opened", 2, 2, "dim")
    for client in clients:
        figures = [_count(client, name) for name in ("links_idle", "links_busy", "opened")]
        idle, busy, opened = map(say_count, figures)
        page.row(f"  {_client_label(client)}", [idle, busy, "", opened, *_sizes(client)])
        proof = _text(client, "proof")
        known = f"known by {proof}" if proof else "nothing vouches for its name"
        since = _age(now, client, "since")
        page.say(f"at {_text(client, 'address')}, connected for {since}, {known}", 4, 2, "dim")
        if problem := _text(client, "problem"):
            page.say(f"PROBLEM: {problem}", 4, 2, "red")
    _say_failures(page, service, now)


def _say_failures(page: _Page, service: Mapping[str, Any], now: float) -> None:
    last = service.get("last_failure")
    last = last if isinstance(last, dict) else {}
    hour, reason = _count(service, "failures_hour"), _text(last, "reason")
    if hour or reason:
        said = f"{hour} failed in the last hour" if hour else "none failed in the last hour"
        if reason:
            said += f"; the last one {_age(now, last, 'time')} ago: {reason}"
        page.say(said, 2, 2, "yellow" if hour else "dim")
    failed = _counts(service, "failed")
    words = [f"{sum(failed.values())} never opened ({_say_counts(failed)})"] if failed else []
    if broken := _count(service, "broken"):
        words.append(f"{broken} broken off")
    if words:
        page.say(f"since the start: {', '.join(words)}", 2, 2, "dim")


def _say_refused(page: _Page, status: Mapping[str, Any], now: float) -> None:
    """The links that were refused: why a relay client is not connected."""
    refused = _counts(status, "refused")
    events = [one for one in _rows(status, "events") if _text(one, "kind") in REFUSALS][:MOST_REFUSALS]
    if not (refused or events):
        return
    page.end_part()
    count = _many(sum(refused.values()), "connection")
    page.say(f"relay port: {count} did not become links since the start ({_say_counts(refused)})", 0, 2, "bold")
    for event in events:
        times = _count(event, "count")
        often = f", {times} times by then" if times > 1 else ""
        page.say(f"{_age(now, event, 'time')} ago{often}: {_text(event, 'text')}", 2, 2, "yellow")


def _say_connections(page: _Page, rows: Sequence[Mapping[str, Any]], count: int, now: float) -> None:
    page.end_part()
    if len(rows) < count:
        page.say(f"{len(rows)} of {count} open connections, the newest and those that have carried most", style="bold")
    else:
        order = ", the newest first" if len(rows) > 1 else ""
        page.say(f"{_many(len(rows), 'open connection')}{order}", style="bold")
    if not rows:
        return
    page.row("", ["", "", "", "", "in", "out"], "dim")
    for one in rows:
        page.row(_connection_label(one), ["", "", "", "", *_sizes(one)])
        state = _text(one, "state")
        words = [f"service {_text(one, 'service')}", f"via {_text(one, 'via')}"]
        words += [f"for {_age(now, one, 'since')}", "" if state == "open" else state]
        page.say(", ".join(filter(None, words)), 4, 2, "dim")


def _age(now: float, row: Mapping[str, Any], name: str) -> str:
    """How long ago that was; it is not broken at the end of a line."""
    return say_age(now - _number(row, name)).replace(" ", GLUE)


def _service_label(service: Mapping[str, Any]) -> str:
    place = _text(service, "target") or _text(service, "address")
    return f"{_text(service, 'name')}  {place}".rstrip()


def _client_label(client: Mapping[str, Any]) -> str:
    return _text(client, "name") or "(no name)"


def _connection_label(connection: Mapping[str, Any]) -> str:
    return f"  {_text(connection, 'id')}  {_text(connection, 'peer')}".rstrip()


def _sizes(row: Mapping[str, Any]) -> list[str]:
    return [say_size(_number(row, "bytes_in")), say_size(_number(row, "bytes_out"))]


def _say_counts(counts: Mapping[str, int]) -> str:
    """The most frequent first."""
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: (-counts[name], name)))


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# --- Lines ----------------------------------------------------------------------------------------------------


class _Page:
    """Lines that are no wider than the terminal."""

    def __init__(self, colour: bool, width: int) -> None:
        self.lines: list[str] = []
        self._colour = colour
        self._width = width
        self._label = 0
        """How wide the column before the figures is."""
        self._headed = False
        """The heads of the columns stand last."""

    def measure(self, labels: Sequence[str]) -> None:
        """Make that column as wide as the widest of these that leaves room for the figures."""
        room = self._width - sum(width for _, width in FIGURES)
        self._label = max((width for label in labels if (width := cells(label)) <= room), default=0)

    def head(self) -> None:
        self.end_part()
        for words in (HEADINGS, FIGURES):
            self._add(" " * self._label + "".join(word.rjust(width) for word, width in words), "dim")
        self._headed = True

    def end_part(self) -> None:
        """A blank line, unless the heads of the columns stand there."""
        if self.lines and not self._headed:
            self.lines.append("")
        self._headed = False

    def row(self, label: str, figures: Sequence[str], style: str = "") -> None:
        """A label that has no room beside the figures stands above them."""
        right = "".join(figure.rjust(width) for figure, (_, width) in zip(figures, FIGURES, strict=True))
        if cells(label) > self._label:
            indent = len(label) - len(label.lstrip())
            self.say(label.strip(), indent, 2, style)
            label = ""
        self._add(label + " " * (self._label - cells(label)) + right, style)

    def say(self, text: str, indent: int = 0, hang: int = 2, style: str = "") -> None:
        """A text, wrapped; what follows its first line stands `hang` further to the right."""
        for number, line in enumerate(wrap(text, self._width - indent, hang)):
            self._add(" " * (indent + (hang if number else 0)) + line, style)

    def _add(self, line: str, style: str) -> None:
        line = line.replace(GLUE, " ").rstrip()
        self.lines.append(f"\x1b[{STYLES[style]}m{line}\x1b[0m" if style and self._colour and line else line)


def wrap(text: str, width: int, hang: int = 0) -> list[str]:
    """Lines of so many columns at most, all but the first `hang` columns shorter; words that are longer are cut in
    pieces."""
    lines, line, used = list[str](), "", 0
    for word in text.split(" "):
        size = cells(word)
        if line and used + 1 + size > width - (hang if lines else 0):
            lines.append(line)
            line, used = "", 0
        if line:
            line, used = f"{line} {word}", used + 1 + size
            continue
        while size > (room := width - (hang if lines else 0)):
            piece = _cut(word, room)
            lines.append(piece)
            word = word[len(piece) :]
            size = cells(word)
        line, used = word, size
    return [*lines, line] if line or not lines else lines


def _cut(text: str, room: int) -> str:
    """As much of a text as has room; one character at least."""
    used = 0
    for number, char in enumerate(text):
        used += cells(char)
        if used > room and number:
            return text[:number]
    return text


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese characters and their like take two, accents that stand above
    another character none (Unicode, UAX 11)."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def _cells_of(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def harmless(text: str) -> str:
    """A text without what a terminal would obey, or what turns the order of its characters: these are escaped; one that
    is very long is cut, with an ellipsis."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[: LONGEST_TEXT - 1]}…"
    return "".join(_spell(text))


def _spell(text: str) -> Iterator[str]:
    for char in text:
        yield char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


# --- Figures --------------------------------------------------------------------------------------------------


def say_size(count: float) -> str:
    """So many bytes, as in 1.2 MB: with units of 1000, as disks and lines have them."""
    return _scale(count, "B", ("kB", "MB", "GB", "TB", "PB", "EB"))


def say_count(count: float) -> str:
    """A whole number, or where it is long about so many, as in 12.3 M."""
    return str(int(count)) if count < 100_000 else _scale(count, "", ("k", "M", "G", "T", "P", "E")).strip()


def _scale(count: float, unit: str, units: Sequence[str]) -> str:
    for larger in units:
        if count < 999.5:
            break
        count, unit = count / 1000, larger
    whole = unit in ("B", "") or count >= 99.95
    return f"{min(count, 9999):.{0 if whole else 1}f} {unit}"


def say_age(seconds: float) -> str:
    """A time in its two largest units, as in 3 d 4 h."""
    left = max(0, int(seconds))
    words: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if words and not count:
            break
        if count or unit == "s":
            words.append(f"{count} {unit}")
        if len(words) == 2:
            break
    return " ".join(words)


# --- What may be missing, or be something else ----------------------------------------------------------------


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return harmless(value) if isinstance(value, str) else ""


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return max(0.0, min(value, 1e30)) if isinstance(value, (int, float)) and not math.isnan(value) else 0.0


def _count(row: Mapping[str, Any], name: str) -> int:
    return int(_number(row, name))


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    return value if isinstance(value, list) else []


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    return [harmless(value) for value in _list(row, name) if isinstance(value, str)]


def _rows(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [value for value in _list(row, name) if isinstance(value, dict)]


def _counts(row: Mapping[str, Any], name: str) -> dict[str, int]:
    value = row.get(name)
    return {harmless(key): _count(value, key) for key in value if _count(value, key)} if isinstance(value, dict) else {}
