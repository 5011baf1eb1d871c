"""``tcprelays status`` and its like: what the relays that run here are doing, at a terminal and for scripts.

It needs no configuration, asks each relay over its Unix socket, and imports little, so that it is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .. import __version__
from ..system import ignore_oserror
from ..text import say_error, shown
from .places import COMMANDS, TIMEOUT, find_sockets, own_directory, owner_of, process_of
from .table import harmless, render, wrap

DOORS = {"tcprelays": "tcprelay_server", "tcprelayc": "tcprelay_client", "tcprelay": "tcprelay"}
"""The module of each command."""
ROLES = {"tcprelays": ("server",), "tcprelayc": ("client",), "tcprelay": ("server", "client")}
"""What each looks for."""
EVERY = 2.0
"""Seconds between two looks of --watch: rates are those of as many."""
SHORTEST, LONGEST = 0.1, 60.0
"""Seconds: what --watch takes.  A relay port is more, so that it is not taken for them."""
LARGEST = 1 << 26
"""Bytes of an answer that are read: root asks the relays of all users.  One of 1,024 services has 3 MB."""
OPTIONS = ("--watch", "--json", "--check", "--connections", "--help", "--version")

USAGE = """{prog} status [RELAY_PORT|PID] [options]

Says what each {command} that runs here is doing: its services, who is connected,
open connections, what went through, and what was refused and why. For example:

  {prog} status
      all that run as this user; as root those of all users
  {prog} status 10080 --watch
      the one with this relay port, or this process number, every two seconds
  {prog} status --check
      one line and the exit status, for health checks"""
EPILOG = """The exit status is 0 where all is well, 1 where no relay runs, where one does
not answer or (with --check) is not healthy, and 2 where an option is wrong."""


def begin(prog: str) -> int:
    """What the installed commands and the single files begin with: a status is asked for without importing a whole
    relay, which takes several times as long.  Returns the exit status."""
    if sys.argv[1:2] == ["status"]:
        return main(prog, ROLES[prog], sys.argv[2:])
    return int(importlib.import_module(DOORS[prog]).main())


def tcprelays() -> int:
    return begin("tcprelays")


def tcprelayc() -> int:
    return begin("tcprelayc")


def tcprelay() -> int:
    return begin("tcprelay")


def main(prog: str, roles: Sequence[str], argv: Sequence[str]) -> int:
    """The command; `argv` is what stands behind the word status.  Returns its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a name shows the rest
    try:
        status = _run(prog, roles, _parse(prog, roles, argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except Failure as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # whoever read it, as head does, has had enough
        _forget_output()
        return 0
    except OSError as error:
        _forget_output()
        print(f"{prog}: the status cannot be written: {say_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _forget_output() -> None:
    """Else Python writes once more at its end, and says that it cannot."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Failure(Exception):
    """The command ends with this line."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


# --- The command line -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    number: int | None
    """The relay port or process number of the one that is meant."""
    watch: float | None
    """Seconds between two looks."""
    json: bool
    check: bool
    connections: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (--[a-z]+): ignored explicit", message)
        raise Failure(f"{found[1]} takes no value" if found else message.removeprefix("argument "), 2)


def _parse(prog: str, roles: Sequence[str], argv: Sequence[str]) -> Wanted:
    """Ends the process for ``--help`` and ``--version``; raises `Failure` with status 2."""
    parser = _Parser(
        prog=prog, usage=USAGE.format(prog=prog, command=" and ".join(COMMANDS[role] for role in roles)),
        epilog=EPILOG, allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("relay", nargs="?", metavar="RELAY_PORT|PID", help="the relay port or the process number of the one that is "
        "meant, where several run; of a relay client the port of its relay server")  # fmt: skip
    add("--watch", nargs="?", const=str(EVERY), metavar="SECONDS", help="look again and again, every 2 seconds or as "
        "many as are given, from 0.1 to 60; Ctrl-C ends it")  # fmt: skip
    add("--json", action="store_true", help="all that is known, as an array of JSON objects")
    add("--check", action="store_true", help="one line; the exit status is 1 where a relay is not healthy or none runs")
    add("--connections", action="store_true", help="list the open connections, too, by their ids in the log")
    add("-V", "--version", action="version", version=f"{prog} {__version__}", help="say the version and exit")
    add("-h", "--help", action="help", help="say this and exit")
    given, strays = parser.parse_known_args(argv)
    for stray in strays:
        raise Failure(_say_stray(prog, stray), 2)
    word = given.relay
    if word is not None and not (word.isascii() and word.isdigit() and len(word) < 10):
        raise Failure(f"{shown(word)}: expected a relay port or a process number", 2)
    modes = [name for name in ("check", "json", "watch") if getattr(given, name) not in (None, False)]
    if len(modes) > 1:
        raise Failure(f"--{modes[0]} and --{modes[1]} do not go together: leave one out", 2)
    watch = None if given.watch is None else _parse_seconds(given.watch)
    return Wanted(None if word is None else int(word), watch, given.json, given.check, given.connections)


def _say_stray(prog: str, stray: str) -> str:
    name = stray.partition("=")[0]
    if not name.startswith("-"):
        return f"{shown(stray)}: expected nothing behind the relay port or the process number"
    from difflib import get_close_matches  # not before something is wrong

    if near := get_close_matches(name, OPTIONS, 1):
        return f"unknown option: {shown(name)}; did you mean {near[0]}?"
    host = "; for a relay server that is called status write --relay-host status" if prog == "tcprelayc" else ""
    return f"unknown option: {shown(name)}{host}"


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds <= LONGEST:
        expected = "expected a number of seconds from 0.1 to 60; a relay port or a process number stands before it"
        raise Failure(f"--watch {shown(text)!r}: {expected}", 2)
    return seconds


# --- Looking --------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What was found at one look."""

    statuses: list[dict[str, Any]] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    """The numbers of processes that do not answer."""
    barred: list[str] = field(default_factory=list)
    """What this user may not look into."""

    def select(self, number: int) -> Seen:
        """Those that have this relay port or process number."""
        statuses = [one for one in self.statuses if number in (one.get("pid"), port_of(one), *ports_of_relays(one))]
        return Seen(statuses, [pid for pid in self.silent if pid == number], self.barred)


def port_of(status: Mapping[str, Any]) -> int | None:
    """The relay port: a relay server's own, or that of a relay client's relay server."""
    port = str(status.get("address", "")).rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() else None


def ports_of_relays(status: Mapping[str, Any]) -> list[int]:
    """The ports of a relay client's relay servers, where it has several."""
    rows = status.get("relays")
    found = [port_of(row) for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return [port for port in found if port is not None]


def look(roles: Sequence[str]) -> Seen:
    """Ask all relays of these roles that this user may look at."""
    seen = Seen()
    for role in roles:
        found = find_sockets(role)
        seen.barred += found.barred
        seen.silent += map(process_of, found.busy)
        for path, sock in found.connected.items():
            with sock:
                if (status := _ask(sock)) is None:
                    seen.silent.append(process_of(path))
                else:
                    seen.statuses.append(status)
    seen.barred = list(dict.fromkeys(seen.barred))
    return seen


def _ask(sock: socket.socket) -> dict[str, Any] | None:
    """What the relay at the other end says, or ``None`` where it does not answer, or with something else."""
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection("localhost")
    connection.sock = sock
    watch = threading.Timer(TIMEOUT, ignore_oserror, (sock.shutdown, socket.SHUT_RDWR))  # one that says a bit at a time
    watch.start()
    try:
        connection.request("GET", "/status.json", headers={"Connection": "close"})
        with connection.getresponse() as response:
            found = json.loads(response.read(LARGEST)) if response.status == 200 else None
    except (OSError, HTTPException, ValueError, RecursionError):
        return None
    finally:
        watch.cancel()
        watch.join()
    return found if isinstance(found, dict) else None


def _say_none(prog: str, roles: Sequence[str], wanted: Wanted, seen: Seen) -> str:
    """Why there is nothing to show: after `Seen.select` nothing is left of what was `seen`."""
    if seen.barred:
        path = seen.barred[0]
        owner = owner_of(path)
        who = "root" if owner == "root" else f"root or {owner}"
        return f"this user may not look at {harmless(path)}: {who} may, as in sudo {prog} status"
    commands = " or ".join(COMMANDS[role] for role in roles)
    if seen.statuses or seen.silent:
        there = [f"{port_of(one)} (process {shown(one.get('pid'))})" for one in seen.statuses]
        there += [f"process {pid}" for pid in seen.silent]
        number = wanted.number
        return f"no {commands} here has the relay port or the process number {number}; there is {', '.join(there)}"
    if not own_directory():
        return ("this user has no runtime directory, where a relay could be found: set XDG_RUNTIME_DIR to one, for the "
                "relay, too")  # fmt: skip
    others = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "; root sees those of all users"
    return f"no {commands} runs here as this user{others}"


# --- Showing --------------------------------------------------------------------------------------------------


def _run(prog: str, roles: Sequence[str], wanted: Wanted) -> int:
    """Raises `Failure`, and `OSError` where standard output does not take it."""
    if wanted.watch is not None:
        return _watch(prog, roles, wanted, wanted.watch)
    everything = look(roles)
    seen = everything if wanted.number is None else everything.select(wanted.number)
    if not (seen.statuses or seen.silent):
        raise Failure(_say_none(prog, roles, wanted, everything))
    if wanted.check:
        return _check(seen)
    if wanted.json:
        print(json.dumps(seen.statuses, indent=2))
    else:
        print("\n".join(_tables(seen, wanted)), end="", flush=True)
    for pid in seen.silent:
        print(f"{prog}: {_say_silent(pid)}", file=sys.stderr)
    return 1 if seen.silent else 0


def _say_silent(pid: int) -> str:
    return f"process {pid} does not answer"


def _check(seen: Seen) -> int:
    """One line for all of them; with what is wrong where something is."""
    wrong = list(map(_say_silent, seen.silent))
    well = []
    for one in seen.statuses:
        found = one.get("problems")
        problems = [harmless(text) for text in found if isinstance(text, str)] if isinstance(found, list) else []
        said = f"{COMMANDS.get(str(one.get('role')), 'tcprelay')} (process {shown(one.get('pid'))})"
        if problems:
            wrong.append(f"{said} is not healthy: {'; '.join(problems)}")
        else:
            well.append(f"{said} is healthy")
    print("; ".join(wrong or well))
    return 1 if wrong else 0


def _tables(seen: Seen, wanted: Wanted) -> Iterator[str]:
    width = _size().columns
    for status in seen.statuses:
        yield render(status, _has_colours(), width, wanted.connections)


def _size() -> os.terminal_size:
    """Of the terminal, or 80 columns where there is none."""
    import shutil  # which imports much, and is not needed for --check

    return shutil.get_terminal_size()


def _is_terminal() -> bool:
    """Whether standard output is one that can do more than a typewriter."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _has_colours() -> bool:
    """NO_COLOR is what many programs heed (no-color.org)."""
    return _is_terminal() and not os.environ.get("NO_COLOR")


ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""To the terminal's other screen, without a cursor, and back (xterm's private modes, which all terminals have)."""
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
"""ECMA-48: what was there is written over, and only what is left of it is cleared, so that nothing flickers."""


def _watch(prog: str, roles: Sequence[str], wanted: Wanted, seconds: float) -> int:
    """Show it again and again, until Ctrl-C or SIGTERM.  Raises as `_run` does."""
    screen, divider = _is_terminal(), ""
    try:
        everything = look(roles)
        if not (everything.statuses or everything.silent) and (everything.barred or not own_directory()):
            screen = False
            raise Failure(_say_none(prog, roles, wanted, everything))  # waiting would not change that
        if screen:
            _end_by_signals()
            print(ENTER, end="")
        while True:
            text = _say_seen(prog, roles, wanted, everything)
            if screen:
                heading = f"{prog} status at {time.strftime('%H:%M:%S')}; Ctrl-C ends it"
                print(_fit(f"{heading}\n\n{text}"), end="", flush=True)
            else:
                print(divider + text, end="", flush=True)
                divider = "\n"
            time.sleep(seconds)
            everything = look(roles)
    except KeyboardInterrupt:
        return 0
    finally:
        if screen:
            print(LEAVE, end="", flush=True)


def _end_by_signals() -> None:
    """Have those that would end the process at once leave the other screen first."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        with contextlib.suppress(ValueError):  # in a thread, which gets none
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)


def _say_seen(prog: str, roles: Sequence[str], wanted: Wanted, everything: Seen) -> str:
    seen = everything if wanted.number is None else everything.select(wanted.number)
    parts = [*_tables(seen, wanted), *(f"{_say_silent(pid)}\n" for pid in seen.silent)]
    if parts:
        return "\n".join(parts)
    none = f"{_say_none(prog, roles, wanted, everything)}; waiting for one"
    return "".join(f"{line}\n" for line in wrap(none, _size().columns))


def _fit(text: str) -> str:
    """A page of the screen: what has no room is left out, and counted."""
    lines, height = text.splitlines(), _size().lines
    if len(lines) > height - 1 > 1:
        left_out = len(lines) - (height - 2)
        lines[height - 2 :] = [f"… {left_out} more lines: make the window taller, or leave out --watch"]
    return HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_REST
