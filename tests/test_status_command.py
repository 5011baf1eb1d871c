"""``tcprelays status`` and its like: the table, where sockets are and who may look, and the command itself."""

from __future__ import annotations

import dataclasses
import errno
import http.server
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import tcprelay
import tcprelay_client
import tcprelay_server
from _tcprelay.status import looking, places
from _tcprelay.status.places import bind_socket, find_sockets, own_directory, remove_socket
from _tcprelay.status.report import Status, as_dict
from _tcprelay.status.table import render, say_age, say_count, say_size
from _tcprelay.waiting import Deadline

from .conftest import PATIENCE, connect, echo, replace, wait_until
from .peers import HOST, ROOT, Peers, Program, no_peer
from .samples import client_status, server_status

GOLDEN = """\
relay server: tcprelays 0.1.0, process 4711, relay port [::]:10080, up 4 d
NOT HEALTHY: worker 1 does not answer
1 of 2 workers did not answer (number 1): that part is left out below

                                  links    connections               bytes
                             idle  busy   open  so far        in       out
ssh  [::]:2222                 13     3      3    1041   10.4 MB    5.4 GB
  now                                                   1.2 kB/s  1.8 MB/s
  home                          8     2           1000   10.0 MB    5.4 GB
    at 198.51.100.23, connected for 3 d, known by the token
  office                        5     1             41    433 kB    709 kB
    at [2001:db8::17], connected for 1 min 1 s, known by certificate
      office.example
    PROBLEM: the service cannot be reached: connection refused
  2 failed in the last hour; the last one 2 min 10 s ago: no link was idle in
    time (--pair-timeout)
  since the start: 5 never opened (4 unreachable, 1 no-link), 2 broken off

web  203.0.113.7:8080           8     0      0      20    4.0 kB    1.2 MB
  <script>alert(1)</script>     8     0             20    4.0 kB    1.2 MB
    at 192.0.2.200, connected for 5 s, nothing vouches for its name

backup@20001  [::]:20001        0     0      0       0       0 B       0 B
  PROBLEM: no relay client is connected
  WAITING: 2 service clients for a link
  17 failed in the last hour; the last one 3 s ago: no link was idle in time
    (--pair-timeout); no relay client is connected
  since the start: 17 never opened (17 no-link)

relay port: 4 connections did not become links since the start (3 token, 1
  timeout)
  40 s ago, 3 times by then: link from 192.0.2.66:41000 refused: its token is
    not this server's
"""
GOLDEN_CONNECTIONS = """
3 open connections, the newest first
                                                              in       out
  7ae78df1  192.0.2.1:50311                                100 B    2.0 MB
    service ssh, via home at 198.51.100.23, for 1 min 40 s, in ended
  7ae78df2  192.0.2.2:50312                                200 B    1.0 MB
    service ssh, via office at [2001:db8::17], for 3 min 20 s
  7ae78df3  192.0.2.3:50313                                300 B       0 B
    service ssh, via home at 198.51.100.23, for 5 min
"""
GOLDEN_CLIENT = """\
relay client: tcprelayc 0.1.0, process 815, to relay.example.net:10080, up 1 h
NOT HEALTHY: service web has no link: the relay server refuses it: nas may not
  publish web
  relay.example.net:10080: 7 links idle, 1 busy
  192.0.2.80:10080: 0 links idle, 0 busy; PROBLEM: connection refused; is the
      relay server running?

                              links    connections               bytes
                         idle  busy   open  so far        in       out
default  localhost:22       7     1      1      12    5.0 kB   70.0 kB
  now                                                 10 B/s   250 B/s
  published at relay.example.net:2222
  1 link being opened

web  unix:/run/web.sock     0     0      0       0       0 B       0 B
  PROBLEM: the relay server refuses it: nas may not publish web
"""
COMMAND = (
    "import sys; from _tcprelay.status import looking, places; places.RUN = sys.argv[1];"
    "sys.exit(looking.main(sys.argv[2], looking.ROLES[sys.argv[2]], sys.argv[3:]))"
)
"""The command in a process of its own, which looks for nothing in /run."""
NASTY = [
    "\x1b[31m", "\n", "\t", "\u202e", "\u6f22\u5b57", "\uff57", "\xe9", "e\u0301", "\U0001f44d", "\udc80",
    "[2001:db8::1]", " ", "x" * 90, "\x9b",
]  # fmt: skip
"""What names could have in them: what terminals obey, wide and combining characters, and halves of some."""


def told(status: Status) -> dict[str, Any]:
    """What /status.json has of it."""
    found: dict[str, Any] = json.loads(json.dumps(as_dict(status)))
    return found


def columns(line: str) -> int:
    """How many a terminal needs for a line."""
    plain = [char for char in re.sub(r"\x1b\[[\d;]*m", "", line) if unicodedata.category(char) not in ("Mn", "Me")]
    return len(plain) + sum(unicodedata.east_asian_width(char) in "WF" for char in plain)


# --- The table ------------------------------------------------------------------------------------------------


def test_the_table_of_a_relay_server() -> None:
    assert render(told(server_status()), False, 80) == GOLDEN
    assert render(told(server_status()), False, 80, connections=True) == GOLDEN + GOLDEN_CONNECTIONS


def test_the_table_of_a_relay_client() -> None:
    assert render(told(client_status()), False, 80) == GOLDEN_CLIENT


def test_the_table_in_the_document() -> None:
    """It is the sample's, with another name (on a failure: copy it from the assertion)."""
    status = server_status()
    clients = (*status.clients[:2], dataclasses.replace(status.clients[2], name="lab"))
    text = (ROOT / "docs" / "status.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- table: .*? -->\n```text\n(.*?)```\n<!-- end of table -->", text, re.DOTALL)
    assert found
    assert found[1] == render(told(dataclasses.replace(status, clients=clients)), False, 80)


def test_a_relay_that_is_well_says_so() -> None:
    """In words, and in those alone; one that ends says that, too."""
    status = dataclasses.replace(server_status(), problems=(), missing=())
    assert render(told(status), False, 80).splitlines()[1:3] == ["HEALTHY", ""]
    status = dataclasses.replace(status, is_ending=True)
    assert render(told(status), False, 80).splitlines()[2].startswith("ENDING: it takes no new connections")


def test_colours_change_nothing_but_colours() -> None:
    coloured = render(told(server_status()), True, 80, connections=True)
    assert "\x1b[1;31mNOT HEALTHY: worker 1 does not answer\x1b[0m\n" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == GOLDEN + GOLDEN_CONNECTIONS


def test_a_status_of_another_version() -> None:
    """What is missing or something else counts as absent, and what is unknown does nothing."""
    assert render({}, False, 80).splitlines() == [
        "relay : tcprelay, process 0, up 0 s", "HEALTHY", "It has no services now."
    ]  # fmt: skip
    status = told(server_status())
    assert render({**status, "colour": {"of": ["the", "box"]}}, False, 80) == GOLDEN
    services = [{"name": "ssh", "open": "many", "failed": 5, "last_failure": None, "rate_in": float("nan")}, 7]
    text = render({**status, "services": services, "events": "none", "refused": [], "missing": 1}, False, 80)
    assert re.search(r"^ssh +0 +0 +0 +0 +0 B +0 B$", text, re.MULTILINE)
    assert "failed" not in text
    assert "  home " in text
    assert re.search(r"^web +0", text, re.MULTILINE), "the service of a relay client, of which nothing else is known"


@pytest.mark.parametrize("sample", [server_status, client_status])
def test_lines_are_as_wide_as_the_terminal_at_most(sample: Callable[[], Status]) -> None:
    for width in range(80, 201):
        for line in render(told(sample()), bool(width % 2), width, connections=True).splitlines():
            assert columns(line) <= width, line


def nasty(chance: random.Random, value: Any) -> Any:
    """A status with other texts in it, and larger figures."""
    if isinstance(value, dict):
        return {key: nasty(chance, item) for key, item in value.items() if chance.random() < 0.98}
    if isinstance(value, list):
        return [nasty(chance, item) for item in value]
    if isinstance(value, str):
        return "".join(chance.choices(NASTY, k=chance.randrange(6))) if chance.random() < 0.5 else value
    return value * 10 ** chance.randrange(25) if isinstance(value, (int, float)) else value


def test_names_from_elsewhere_do_no_harm() -> None:
    """However long and wide, and whatever a terminal would obey in them."""
    chance = random.Random(17)
    for sample in (server_status, client_status):
        for _ in range(60):
            status, width = nasty(chance, told(sample())), chance.randrange(80, 200)
            text = render(status, False, width, connections=True)
            for line in text.split("\n"):
                assert columns(line) <= width, line
                assert line.isprintable(), ascii(line)
            assert text.encode()


def test_a_long_name_is_shown_whole() -> None:
    """It takes a line of its own, so that it can be told from others; the figures stand below."""
    status = told(server_status())
    status["clients"][0]["name"] = "a-name-that-goes-on-and-on-" * 2 + "漢字"
    lines = render(status, False, 80).splitlines()
    [place] = [number for number, line in enumerate(lines) if "a-name-that-goes-on-and-on-" * 2 + "漢字" in line]
    assert re.fullmatch(r" +8 +2 +1000 +10.0 MB +5.4 GB", lines[place + 1])
    wide = render(status, False, 120).splitlines()
    assert re.search(r"漢字 +8 +2 +1000 +10.0 MB +5.4 GB$", "\n".join(wide), re.MULTILINE)


def test_figures_in_words() -> None:
    assert [*map(say_size, (0, 999, 999.6, 1000, 99_949, 99_960, 999_499, 999_500, 1_250_000, 5e9, 3e30))] == [
        "0 B", "999 B", "1.0 kB", "1.0 kB", "99.9 kB", "100 kB", "999 kB", "1.0 MB", "1.2 MB", "5.0 GB", "9999 EB",
    ]  # fmt: skip
    assert [*map(say_count, (0, 99_999, 100_000, 12_345_678, 1e30))] == ["0", "99999", "100 k", "12.3 M", "9999 E"]
    assert [*map(say_age, (-5, 0, 59.9, 60, 3600, 3660, 90_061, 86_400 * 800))] == [
        "0 s", "0 s", "59 s", "1 min", "1 h", "1 h 1 min", "1 d 1 h", "800 d",
    ]  # fmt: skip


# --- The sockets ----------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory that is XDG_RUNTIME_DIR, in one that every user can enter; and nothing is looked for in /run.  Not
    pytest's, whose paths are too long for sockets now and then."""
    base = Path(tempfile.mkdtemp(prefix="status-"))
    base.chmod(0o755)
    home = base / "home"
    home.mkdir(mode=0o700)
    (base / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr(places, "RUN", str(base / "run"))
    yield home
    shutil.rmtree(base)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def bind(stack: ExitStack, role: str, pid: int = 0) -> Path:
    """A socket as a relay has it; of another process where a number is given.  Returns its path."""
    sock = stack.enter_context(bind_socket(role))
    path = Path(sock.getsockname())
    return path.rename(path.with_name(f"{role}-{pid}.sock")) if pid else path


@contextmanager
def as_nobody() -> Iterator[None]:
    """Another user than root, for this process, while the block lasts."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        no_peer("only root can be another user")
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_where_the_sockets_are(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's directory, the user's, or root's."""
    run = Path(places.RUN)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    assert own_directory() == "/run/one"
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert own_directory() == str(runtime / "tcprelay")
    of_root = str(run / "tcprelay") if os.geteuid() == 0 else ""
    for no_directory in ("run/user/7", str(runtime / "missing"), ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", no_directory)
        assert own_directory() == of_root
    monkeypatch.setattr(places, "RUN", str(run / "missing"))
    assert own_directory() == ""
    with pytest.raises(OSError, match="set XDG_RUNTIME_DIR to one of its own"):
        bind_socket("server")


def test_the_socket_is_for_this_user_alone(runtime: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory is, too, whatever the umask; before its mode is set nobody can connect."""
    refused, chmod = [], os.chmod

    def look_before(path: str, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(path)
        refused.append(path)
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", look_before)
    before = os.umask(0)
    try:
        path = bind(stack, "server")
    finally:
        os.umask(before)
    assert path == runtime / "tcprelay" / f"server-{os.getpid()}.sock"
    assert refused == [str(path)]
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_it_goes_with_its_relay(runtime: Path) -> None:
    with bind_socket("server") as sock:
        path = sock.getsockname()
        remove_socket(sock)
        assert not os.path.exists(path)
    remove_socket(sock)  # once more, and closed: nothing happens


def test_sockets_of_processes_that_are_gone_are_taken_away(runtime: Path, stack: ExitStack) -> None:
    """Those of this role; what lives stays, and so does all else."""
    living = bind(stack, "server", 4711)
    with ExitStack() as gone:
        stale = [bind(gone, "server", 4712), bind(gone, "client", 815)]
    (living.parent / "server-x.sock").touch()
    fresh = bind(stack, "server")
    assert set(living.parent.iterdir()) == {living, stale[1], fresh, living.parent / "server-x.sock"}
    found = find_sockets("client")
    assert (found.stale, found.connected, found.barred) == ([str(stale[1])], {}, [])


def test_a_directory_that_others_can_write_to_is_refused(runtime: Path) -> None:
    (runtime / "tcprelay").mkdir(mode=0o700)
    (runtime / "tcprelay").chmod(0o777)
    with pytest.raises(
        PermissionError, match=r"others .* can put files there: .*; XDG_RUNTIME_DIR names another"
    ) as why:
        bind_socket("server")
    assert why.value.filename == str(runtime / "tcprelay")
    (runtime / "tcprelay").rmdir()
    (runtime / "tcprelay").touch()
    with pytest.raises(NotADirectoryError, match="not a directory"):
        bind_socket("server")


def test_a_path_that_is_too_long_is_refused(
    runtime: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """By the byte, and in one line."""
    room = places.LONGEST_PATH - len(f"{runtime}//server-{os.getpid()}.sock")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime / ("d" * (room + 1))))
    with pytest.raises(OSError, match=r"has \d+ bytes at most; RUNTIME_DIRECTORY names another place") as caught:
        bind_socket("server")
    assert caught.value.errno == errno.ENAMETOOLONG
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime / ("d" * room)))
    assert bind(stack, "server").exists()


def test_two_processes_of_one_number(runtime: Path, stack: ExitStack) -> None:
    """Of two containers that share the directory: the second one is told, and the first one keeps its socket."""
    path = bind(stack, "server")
    with pytest.raises(OSError, match="address already in use; XDG_RUNTIME_DIR names another place"):
        bind_socket("server")
    places.connect(str(path)).close()


def test_root_finds_those_of_all_users(runtime: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is found on two ways is found once; another user finds his own where no variable says so."""
    run = Path(places.RUN)
    (run / "private").mkdir(mode=0o700)
    for directory in ("private/tcprelays", f"user/{os.geteuid()}/tcprelay", "user/12345/tcprelay"):
        (run / directory).mkdir(parents=True, mode=0o755)
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(run / directory))
        bind(stack, "server")
    (run / "tcprelays").symlink_to("private/tcprelays")
    expected = [run / "tcprelays", run / "user" / str(os.geteuid()) / "tcprelay"]
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    bind(stack, "server")
    found = find_sockets("server")
    for sock in found.connected.values():
        sock.close()
    if os.geteuid() == 0:
        expected.append(run / "user" / "12345" / "tcprelay")
    assert {Path(path).parent for path in found.connected} == {runtime / "tcprelay", *expected}


# --- The command ----------------------------------------------------------------------------------------------


class FakeRelay:
    """A relay's socket, on which an HTTP server of the standard library tells what `answer` is."""

    def __init__(self, role: str, status: Status, pid: int = 0) -> None:
        relay = self
        self.answer = json.dumps(as_dict(status)).encode()
        self.asked: list[tuple[str, str | None]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                relay.asked.append((self.path, self.headers["Host"]))
                self.send_response(200)
                self.send_header("Content-Length", str(len(relay.answer)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(relay.answer)

            def log_message(self, *words: Any) -> None:
                pass

            def address_string(self) -> str:
                return "a Unix socket"

        class Server(http.server.HTTPServer):
            def get_request(self) -> tuple[socket.socket, Any]:
                return self.socket.accept()[0], ("", 0)

            def handle_error(self, *request: Any) -> None:
                pass  # the command has ended before it had the answer

        self._stack = ExitStack()
        sock = bind_socket(role)
        self.path = Path(sock.getsockname())
        if pid:
            self.path = self.path.rename(self.path.with_name(f"{role}-{pid}.sock"))
        self._server = Server(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = sock
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def __enter__(self) -> FakeRelay:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self.path.unlink(missing_ok=True)
        self._server.server_close()


class Command:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, prog: str = "tcprelays") -> tuple[int, str, str]:
        """Its exit status, and what it says on standard output and on standard error."""
        status = looking.main(prog, looking.ROLES[prog], words)
        return (status, *self._capsys.readouterr())


@pytest.fixture
def command(
    runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    return Command(capsys)


def healthy(status: Status) -> Status:
    return dataclasses.replace(status, problems=(), missing=())


def test_the_status_of_one(command: Command) -> None:
    """The table, to the last character; and the relay is asked once."""
    with FakeRelay("server", server_status()) as relay:
        assert command() == (0, GOLDEN, "")
        assert relay.asked == [("/status.json", "localhost")]
        assert command("--connections") == (0, GOLDEN + GOLDEN_CONNECTIONS, "")
        assert command(prog="tcprelay") == (0, GOLDEN, "")
        assert command(prog="tcprelayc")[:2] == (1, "")


def test_several(command: Command, stack: ExitStack) -> None:
    """One below the other; a word picks one by its relay port or its process number."""
    other = dataclasses.replace(server_status(), address="127.0.0.1:10081", pid=4712)
    stack.enter_context(FakeRelay("server", server_status(), 4711))
    stack.enter_context(FakeRelay("server", other, 4712))
    stack.enter_context(FakeRelay("client", client_status(), 815))
    second = render(told(other), False, 80)
    assert command() == (0, f"{GOLDEN}\n{second}", "")
    assert command(prog="tcprelay")[1] == f"{GOLDEN}\n{second}\n{GOLDEN_CLIENT}"
    assert command("4712")[1] == command("10081")[1] == second
    assert command("10080", prog="tcprelay")[1] == f"{GOLDEN}\n{GOLDEN_CLIENT}"
    assert command("815") == (
        1, "", "tcprelays: no tcprelays here has the relay port or the process number 815; there is "
        "10080 (process 4711), 10081 (process 4712)\n",
    )  # fmt: skip


def test_json(command: Command, stack: ExitStack) -> None:
    """An array of what the relays say, as it is."""
    stack.enter_context(FakeRelay("server", server_status(), 4711))
    stack.enter_context(FakeRelay("client", client_status(), 815))
    status, said, wrong = command("--json", prog="tcprelay")
    assert (status, wrong) == (0, "")
    assert json.loads(said) == [told(server_status()), told(client_status())]
    assert said.startswith('[\n  {\n    "role": "server",\n')


def test_check(command: Command, stack: ExitStack) -> None:
    """One line; the exit status is 0 where there is one at least, and all are well."""
    assert command("--check")[:2] == (1, "")
    relay = stack.enter_context(FakeRelay("server", healthy(server_status()), 4711))
    assert command("--check") == (0, "tcprelays (process 4711) is healthy\n", "")
    stack.enter_context(FakeRelay("client", client_status(), 815))
    said = (
        "tcprelayc (process 815) is not healthy: service web has no link: the relay server refuses it: nas may not "
        "publish web\n"
    )
    assert command("--check", prog="tcprelay") == (1, said, "")
    assert command("--check", "4711", prog="tcprelay")[0] == 0
    status = told(server_status())
    relay.answer = json.dumps({**status, "problems": ["one\x1b[2J", "two"]}).encode()
    assert command("--check") == (1, "tcprelays (process 4711) is not healthy: one\\x1b[2J; two\n", "")


def test_none_runs(command: Command, runtime: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those count that have left their socket."""
    others = "" if os.geteuid() == 0 else "; root sees those of all users"
    assert command() == (1, "", f"tcprelays: no tcprelays runs here as this user{others}\n")
    with ExitStack() as gone:
        stale = bind(gone, "server", 4711)
    assert command("--json") == (1, "", f"tcprelays: no tcprelays runs here as this user{others}\n")
    assert stale.exists(), "looking changes nothing"
    said = command(prog="tcprelay")[2]
    assert said == f"tcprelay: no tcprelays or tcprelayc runs here as this user{others}\n"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(places, "RUN", str(runtime / "missing"))
    for words in ((), ("--watch",)):
        status, said, wrong = command(*words)
        assert (status, said) == (1, "")
        assert wrong.startswith("tcprelays: this user has no runtime directory, where a relay could be found: set XDG_")


def test_one_that_does_not_answer(command: Command, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one bit at a time, or something else: the others are shown all the same."""
    silent = "tcprelays: process 4712 does not answer\n"
    path = bind(stack, "server", 4712)
    replace(monkeypatch, "TIMEOUT", 0.2)
    assert command() == (1, "", silent)
    replace(monkeypatch, "TIMEOUT", PATIENCE)
    path.unlink()
    relay = stack.enter_context(FakeRelay("server", server_status(), 4712))
    for answer in (b"[]", b"{", b"\xff", b"[" * 100_000, b""):
        relay.answer = answer
        assert command("4712") == (1, "", silent)
    stack.enter_context(FakeRelay("server", healthy(server_status()), 4711))
    assert command("4711")[0] == 0
    assert command("--check") == (1, "process 4712 does not answer\n", "")
    assert command("--json")[::2] == (1, silent)
    status, said, wrong = command()
    assert (status, wrong) == (1, silent)
    assert said.startswith("relay server: tcprelays 0.1.0, process 4711")


def test_one_that_answers_a_bit_at_a_time(command: Command, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is one for the whole answer: a relay of another user cannot hold up root."""
    replace(monkeypatch, "TIMEOUT", 0.3)
    listener = stack.enter_context(bind_socket("server"))
    ended = threading.Event()
    left: list[bool] = []

    def drip() -> None:
        with listener.accept()[0] as sock:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
            deadline = Deadline(PATIENCE)
            try:
                while deadline.remaining() and not ended.wait(0.02):
                    sock.sendall(b" ")
            except OSError:
                pass
            left.append(not deadline.remaining())

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert command() == (1, "", f"tcprelays: process {os.getpid()} does not answer\n")
    finally:
        ended.set()
        thread.join()
    assert left == [False], "it was waited for as long as it wanted"


def test_another_user_may_not_look(command: Command, runtime: Path, stack: ExitStack) -> None:
    """He is told whose it is, and who may; and his own relay, where there is one, is shown."""
    os.chmod(runtime, 0o755)
    path = stack.enter_context(FakeRelay("server", server_status())).path
    sudo = "root may, as in sudo tcprelays status\n"
    with as_nobody():
        assert command() == (1, "", f"tcprelays: this user may not look at {path.parent}: {sudo}")
    path.parent.chmod(0o755)
    with as_nobody():
        assert command() == (1, "", f"tcprelays: this user may not look at {path}: {sudo}")
        assert command("--watch")[0] == 1
        assert command(prog="tcprelayc")[2].startswith("tcprelayc: no tcprelayc runs here as this user; root sees")
    os.chown(path, 12345, 12345)
    with as_nobody():
        assert "root or user 12345 may" in command()[2]
    assert command() == (0, GOLDEN, "")


def test_a_unit_with_a_user_of_its_own(command: Command, runtime: Path, stack: ExitStack) -> None:
    """Its directory is a link into one that root alone can enter; that of the other role is not spoken of."""
    private = Path(places.RUN) / "private"
    (private / "tcprelays").mkdir(parents=True)
    private.chmod(0o700)
    (Path(places.RUN) / "tcprelays").symlink_to(private / "tcprelays")
    runtime.chmod(0o755)
    with as_nobody():
        said = f"tcprelays: this user may not look at {places.RUN}/tcprelays: root may, as in sudo tcprelays status\n"
        assert command() == (1, "", said)
        assert command(prog="tcprelayc")[2].startswith("tcprelayc: no tcprelayc runs here as this user")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x"], "x: expected a relay port or a process number"),
        (["-1"], "-1: expected a relay port or a process number"),
        (["1", "2"], "2: expected nothing behind the relay port or the process number"),
        (["--wach"], "unknown option: --wach; did you mean --watch?"),
        (["--json=1"], "--json takes no value"),
        (["--json", "--check"], "--check and --json do not go together: leave one out"),
        (["--watch", "4711"], "--watch '4711': expected a number of seconds from 0.1 to 60; a relay port or a process "
                              "number stands before it"),
        (["--watch=nan"], "--watch 'nan': expected a number of seconds from 0.1 to 60; a relay port or a process "
                          "number stands before it"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line_and_status_2(command: Command, words: list[str], said: str) -> None:
    assert command(*words) == (2, "", f"tcprelays: {said}\n")


def test_a_relay_server_that_is_called_status(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """With its port behind it it is one; the word alone is the command, which says how to write the other."""
    assert tcprelay_client.main(["status:10080", "22", "--check"]) == 0
    assert "  relay-host = status    command line\n  relay-port = 10080 " in capsys.readouterr().out
    assert command("22", "--relay-port", "10080", prog="tcprelayc") == (
        2, "", "tcprelayc: unknown option: --relay-port; for a relay server that is called status write --relay-host "
        "status\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("main", "prog"),
    [(tcprelay_server.main, "tcprelays"), (tcprelay_client.main, "tcprelayc"), (tcprelay.main, "tcprelay")],
)
def test_the_word_is_taken_by_each_command(
    command: Command, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], prog: str
) -> None:
    """With the roles that are its own."""
    with FakeRelay("server", healthy(server_status())), FakeRelay("client", healthy(client_status())):
        assert main(["status", "--check"]) == 0
    shown = {"tcprelays": "tcprelays (process 4711) is healthy", "tcprelayc": "tcprelayc (process 815) is healthy"}
    assert capsys.readouterr().out == (shown.get(prog) or "; ".join(shown.values())) + "\n"
    with pytest.raises(SystemExit) as ended:
        main(["status", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {prog} status [RELAY_PORT|PID] [options]\n")


def test_real_relays(command: Command, runtime: Path, peers: Peers, workers: str) -> None:
    """Who is connected, who is on it, how much went through, and why another one was refused."""
    service = peers.service(echo)
    server, client = peers.relay(service.port)
    port = str(server.relay_port)
    with connect((HOST, server.service_port)) as sock:
        sock.sendall(b"to the service and back")
        assert sock.recv(100)
        opened = server.wait_event("ConnectionOpened")["id"]
        pid = server.process.pid
        wait_until(lambda: re.search(r"^default .* 1 +1 +23 B +23 B$", command(port)[1], re.MULTILINE))
        status, said, wrong = command(port, "--connections")
        assert (status, wrong) == (0, "")
        assert said.startswith(
            f"relay server: tcprelays {tcprelay.__version__}, process {pid}, relay port {HOST}:{port},"
        )
        assert re.search(rf"^  {opened}  {HOST}:{sock.getsockname()[1]} +23 B +23 B$", said, re.MULTILINE)
        assert f"\n    at {HOST}, connected for " in said
        own = command(prog="tcprelayc")[1]
        assert re.search(rf"^default  {HOST}:{service.port} +\d+ +1 +1 +1 +23 B +23 B$", own, re.MULTILINE)
    assert command("--check", str(pid)) == (0, f"tcprelays (process {pid}) is healthy\n", "")
    assert len(list((runtime / "tcprelay").iterdir())) == 2, "workers have no sockets of their own"
    service.close()
    connect((HOST, server.service_port)).close()
    server.wait_event("ConnectionFailed")
    wait_until(lambda: "1 failed in the last hour; the last one" in command()[1])
    assert "PROBLEM: cannot reach" in command()[1].replace("\n    ", " ")
    client.close()
    wait_until(lambda: "  PROBLEM: no relay client is connected\n" in command()[1])
    assert command(prog="tcprelayc")[0] == 1
    server.close()
    assert list((runtime / "tcprelay").iterdir()) == []


def test_a_status_needs_no_relay(runtime: Path) -> None:
    """What is installed imports none of one, nor ConfigArgParse: it is there at once."""
    code = (
        "import sys; from _tcprelay.status import looking, places; places.RUN = sys.argv.pop(1)\n"
        "assert looking.tcprelays() == 1\n"
        "print(*(n for n in sys.modules if n.startswith(('_tcprelay.', 'tcprelay', 'logging', 'ssl', 'configarg'))))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, places.RUN, "status"], cwd=ROOT, capture_output=True, text=True,
        timeout=6 * PATIENCE, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) <= {f"_tcprelay.{room}" for room in ("state", "system", "text", "status")} | {
        f"_tcprelay.status.{room}" for room in ("looking", "places", "table")
    }


# --- At a terminal --------------------------------------------------------------------------------------------


ENVIRONMENT = {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "80", "LINES": "60", "PYTHONIOENCODING": "utf-8"}


def start(stack: ExitStack, *words: str, terminal: bool = True, **environment: str) -> Program:
    """The command in a process of its own."""
    line = [sys.executable, "-c", COMMAND, places.RUN, "tcprelays", *words]
    return stack.enter_context(Program(*line, env={**ENVIRONMENT, **environment}, terminal=terminal))


class Screen:
    """The command at a terminal, with all that it writes there, to the last byte."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.written = b""
        self._seen = 0
        self._fd, writer = pty.openpty()
        line = [sys.executable, "-c", COMMAND, places.RUN, "tcprelays", *words]
        env = {**os.environ, **ENVIRONMENT, **environment}
        self.process = subprocess.Popen(line, cwd=ROOT, env=env, stdin=writer, stdout=writer, stderr=writer)
        os.close(writer)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def wait_for(self, text: str) -> None:
        """Until it is written, behind what was waited for before."""
        deadline = Deadline(PATIENCE)
        while (place := self.written.find(text.encode(), self._seen)) < 0:
            assert select.select([self._fd], [], [], deadline.remaining())[0], f"no {text!r}: {self.written!r}"
            self.written += os.read(self._fd, 65536)
        self._seen = place + len(text.encode())

    def end(self, number: signal.Signals) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        deadline = Deadline(PATIENCE)
        try:
            while select.select([self._fd], [], [], deadline.remaining())[0] and (piece := os.read(self._fd, 65536)):
                self.written += piece
        except OSError:  # so Linux says that nobody has it any more
            pass
        return self.process.wait(PATIENCE)


def test_colours_on_a_terminal_alone(runtime: Path, stack: ExitStack) -> None:
    """And not where somebody does not want them, or the terminal has none."""
    stack.enter_context(FakeRelay("server", server_status()))
    for environment, terminal, coloured in (
        ({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, True, False), ({}, False, False),
    ):  # fmt: skip
        program = start(stack, terminal=terminal, **environment)
        assert program.wait() == 0
        assert [*map(str.rstrip, program.lines)] == render(told(server_status()), coloured, 80).splitlines()


def test_a_terminal_that_cannot_show_a_name(runtime: Path, stack: ExitStack) -> None:
    status = server_status()
    clients = (dataclasses.replace(status.clients[0], name="naïve"), *status.clients[1:])
    stack.enter_context(FakeRelay("server", dataclasses.replace(status, clients=clients)))
    program = start(stack, terminal=False, PYTHONIOENCODING="ascii")
    assert program.wait() == 0
    assert "  na?ve " in program.output


def test_watch_on_a_terminal(runtime: Path) -> None:
    """On its other screen, written over from its beginning; a relay that goes is told of, and the next one is shown;
    Ctrl-C ends it, with the first screen back."""
    with Screen("--watch", "0.1") as screen:
        with FakeRelay("server", server_status()):
            screen.wait_for("\x1b[?1049h\x1b[?25l\x1b[Htcprelays status at ")
            screen.wait_for("\x1b[1;31mNOT HEALTHY: worker 1 does not answer\x1b[0m\x1b[K\r\n")
            screen.wait_for("\x1b[K\r\n\x1b[J\x1b[Htcprelays status at ")
        screen.wait_for("no tcprelays runs here as this user")
        with FakeRelay("server", healthy(server_status())):
            screen.wait_for("\x1b[1;32mHEALTHY\x1b[0m")
            assert screen.end(signal.SIGINT) == 0
        assert screen.written.endswith(b"\x1b[?25h\x1b[?1049l")
        assert b"Traceback" not in screen.written


def test_watch_ends_at_sigterm_as_well(runtime: Path) -> None:
    """The terminal is as it was."""
    with Screen("--watch") as screen:
        screen.wait_for("runs here as this user")
        assert screen.end(signal.SIGTERM) == 0
        assert screen.written.endswith(b"\x1b[?25h\x1b[?1049l")


def test_watch_fits_the_screen(runtime: Path) -> None:
    """What has no room is counted: else the first lines would scroll away."""
    with FakeRelay("server", server_status()), Screen("--watch", LINES="10", NO_COLOR="1") as screen:
        left_out = len(GOLDEN.splitlines()) + 2 - 8
        screen.wait_for(f"\u2026 {left_out} more lines: make the window taller, or leave out --watch\x1b[K\r\n\x1b[J")
        assert screen.end(signal.SIGINT) == 0
        assert screen.written.partition(b"\x1b[J")[0].count(b"\n") == 9


def test_watch_without_a_terminal(runtime: Path, stack: ExitStack) -> None:
    """The table again and again, with a blank line between."""
    with FakeRelay("server", server_status()) as relay:
        program = start(stack, "4711", "--watch=0.1", terminal=False)
        wait_until(lambda: len(relay.asked) > 2)
    program.wait_for(lambda line: "runs here as this user" in line)
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert program.output.startswith(f"{GOLDEN}\n{GOLDEN}\n")
    assert "\x1b" not in program.output


def test_a_reader_that_has_had_enough(runtime: Path, stack: ExitStack) -> None:
    """As head is: the command ends without a word.  A full disk is one line."""
    stack.enter_context(FakeRelay("server", server_status()))
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-c", COMMAND, places.RUN, "tcprelays"]
    with open(writer, "wb") as closed:
        done = subprocess.run(line, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr == b"tcprelays: the status cannot be written: no space left on device\n"
