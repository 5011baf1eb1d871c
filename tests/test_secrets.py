"""No secret in anything that comes out of a relay, and nothing in its log that a peer has put there unescaped.

Each check puts a canary where a secret or a peer's words stand, and searches all that comes out: the log, error
lines, ``--help``, representations, tracebacks, and the process list.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import signal
import socket
import ssl
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tcprelay_client
import tcprelay_server
from _tcprelay.link import Link
from _tcprelay.logs import log_writer, set_up_logging
from _tcprelay.options import Options, options_of
from _tcprelay.protocol import (
    ABORT, AUTH, BYE, CHALLENGE, END, FAIL, HELLO, PING, PONG, READY, REFUSED, START, WELCOME, encode_frame,
)  # fmt: skip
from _tcprelay.waiting import Deadline
from tcprelay import ClientOptions, RelayClient, RelayServer, ServerOptions

from .certificates import EC, Certificates, openssl, tls_context
from .conftest import PATIENCE, Bench, connect, echo, read_exactly, wait_until
from .peers import HOST, Program
from .peers_v1 import FakeClient, FakeServer

CANARY = "c4nary7Secret"
ROLES: dict[str, tuple[Callable[[list[str]], int], type[Options], list[str]]] = {
    "server": (tcprelay_server.main, ServerOptions, ["--relay-port", "1080", "--service-port", "1081"]),
    "client": (tcprelay_client.main, ClientOptions, ["--port", "22", "--relay-host", "relay", "--relay-port", "1080"]),
}
SECRETS = ["token", "secret", "passphrase"]
FORGED = "2030-01-01 00:00:00,000 ERROR FORGED"


def find_secrets(text: str, *secrets: str) -> list[str]:
    """Which of the secrets stand in a text, as they are or encoded."""
    return [
        secret
        for secret in (CANARY, *secrets)
        if any(form in text for form in (secret, secret.encode().hex(), base64.b64encode(secret.encode()).decode()))
    ]


def check_log(text: str, format: str) -> None:
    """Each line is one that the relay has written itself: it begins with a time stamp, is short, and has no control
    characters; nothing in it is an error, a traceback or a secret."""
    for line in text.splitlines():
        assert line.isascii(), line
        assert line.isprintable(), line
        assert len(line) < 1000, line
        if format == "json":
            entry = json.loads(line)
            assert {"time", "level", "logger", "message"} <= set(entry), line
            level, message = entry["level"].upper(), entry["message"]
            assert message.isprintable(), line
        else:
            found = re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) (.+)", line)
            assert found, f"no log line: {line}"
            level, message = found.groups()
            assert not line.startswith("2030"), line
        assert level in ("DEBUG", "INFO", "WARNING"), line
        assert not find_secrets(message), line
    assert not find_secrets(text)


@pytest.mark.parametrize("text", [CANARY, "a" + CANARY.encode().hex(), base64.b64encode(CANARY.encode()).decode()])
def test_the_search_finds_a_secret(text: str) -> None:
    """Also encoded: what follows can fail."""
    assert find_secrets(f"before {text} behind")


@pytest.mark.parametrize(
    "line", [FORGED, "no time", "2026-01-01 00:00:00,000 INFO \x1b[31m", "2026-01-01 00:00:00,000 INFO " + 999 * "x"]
)
def test_the_check_of_the_log_finds_what_is_no_line_of_its_own(line: str) -> None:
    """Likewise."""
    check_log("2026-01-01 00:00:00,000 INFO all is well", "text")
    with pytest.raises(AssertionError):
        check_log(line, "text")


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Takes away what the commands set up for the whole process."""
    yield
    log_writer.end()
    log_writer.stream = None
    logger = logging.getLogger("tcprelay")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = True


class Log:
    """The log of the relays in this process, as the commands have it at debug level."""

    def __init__(self, format: str) -> None:
        self._format, self._text, self._seen = format, io.StringIO(), 0
        set_up_logging("debug", format)
        log_writer.stream = self._text
        log_writer.begin()

    def wait(self, words: str) -> None:
        """Wait until one of these is said, again where it was waited for before."""
        found = wait_until(lambda: re.compile(words).search(self._text.getvalue(), self._seen))
        self._seen = found.end()

    def check(self) -> None:
        log_writer.end()  # lines gather for a moment
        assert self._text.getvalue()
        check_log(self._text.getvalue(), self._format)


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest, own_logging: None) -> Log:
    return Log(request.param)


# --- What a command says --------------------------------------------------------------------------------------

SHAPES = {
    "plain": CANARY,
    "short of a list": f"[{CANARY}",
    "a list": f"[{CANARY},b]",
    "an option": f"--{CANARY}",
    "words": f"{CANARY} and more",
    "quoted": f"'{CANARY}'",
    "assignment": f"a={CANARY}",
    "comment": f"a#{CANARY}",
    "formats": f"%({CANARY})s %s %d {{{CANARY}}}",
    "accents": f"é{CANARY}",
    "no UTF-8": f"\udcff{CANARY}",
    "lines": f"{CANARY}\nb",
    "long": 9000 * CANARY,
}
"""What a secret can look like; ConfigArgParse and argparse give a meaning to some of it."""


class Say:
    """Runs a command in this process, with a secret from a source, and tells all that it says."""

    def __init__(
        self, role: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.main, self.options, self.words = ROLES[role]
        self.path = tmp_path
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def give(self, secret: str, source: str, value: str) -> None:
        """Have the secret be given: from here on each command has it."""
        if secret == "secret":
            self.words = [*self.words, "--wire", "raw"]
        if source == "option":
            self.words = [*self.words, f"--{secret}", value]
        elif source == "option=":
            self.words = [*self.words, f"--{secret}={value}"]
        elif source == "environment":
            self._monkeypatch.setenv(f"TCPRELAY_{secret.upper()}", value)
        elif source == "configuration":
            (self.path / "a.conf").write_text(f"{secret} = {value}\n", errors="surrogateescape")
            self.words = [*self.words, "--config", str(self.path / "a.conf")]
        elif source == "file":
            (self.path / "file").write_text(f"{value}\n", errors="surrogateescape")
            self.words = [*self.words, f"--{secret}-file", str(self.path / "file")]

    def __call__(self, *words: str) -> str:
        """What it says to these further words; a traceback fails the test."""
        with contextlib.suppress(SystemExit):
            self.main([*self.words, *words])
        out, err = self._capsys.readouterr()
        return out + err


SOURCES = [
    (secret, source)
    for secret in SECRETS
    for source in ("option", "option=", "environment", "configuration", "file")
    if (secret, source) != ("secret", "file")
]


@pytest.fixture
def say(
    role: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_logging: None
) -> Say:
    return Say(role, capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("secret", "source"), SOURCES)
@pytest.mark.parametrize("role", ROLES)
def test_a_secret_of_any_shape_is_not_said(say: Say, secret: str, source: str, shape: str) -> None:
    """Whether it is accepted or not."""
    say.give(secret, source, SHAPES[shape])
    said = say("--check")
    assert said
    assert not find_secrets(said), said


@pytest.mark.parametrize(("secret", "source"), SOURCES)
@pytest.mark.parametrize("role", ROLES)
def test_a_secret_is_not_said_beside_a_mistake(say: Say, secret: str, source: str) -> None:
    """Wrong values, files that cannot be read, options that do not go together, and options that there are not."""
    say.give(secret, source, CANARY)
    mistakes = [
        [f"--{name.replace('_', '-')}", "/no/such"] for name, info in options_of(say.options) if not info.secret
    ]
    mistakes += [[f"--{secret}", ""], [f"--{secret}", " "], [f"--{secret}"]]
    mistakes += [["--tokens", CANARY], [f"--tokens={CANARY}"], [3 * CANARY], ["--help"], ["--version"]]
    mistakes += [["--token-file", str(say.path)], ["--passphrase-file", "/dev/null"], ["--wire", "raw"]]
    mistakes += [["--token", CANARY, "--token-file", "a"], ["--passphrase", CANARY, "--passphrase-file", "a"]]
    if source.startswith("option"):
        mistakes.append([CANARY])  # it may be a piece of that one, behind a blank; other short words are shown
    for words in mistakes:
        said = say(*words, "--check")
        assert not find_secrets(said), f"{words}: {said}"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "text",
    [
        f"tokens = {CANARY}",
        f"token {CANARY} = {CANARY}",
        f"token = [{CANARY}, {CANARY}]",
        f"token = {CANARY}\ntoken = {CANARY}",
        f"token =\n{CANARY}",
        f"token:\n  {CANARY}",
        f"= {CANARY}",
        f"{CANARY}",
        f"{CANARY}==",
        f"token = '{CANARY}",
        f'"{CANARY}"',
    ],
)
def test_a_secret_is_not_said_where_a_line_of_the_configuration_is_wrong(say: Say, text: str) -> None:
    """Also where the secret stands alone: the file that holds it, taken for the configuration."""
    (say.path / "a.conf").write_text(f"{text}\n")
    said = say("--config", str(say.path / "a.conf"), "--check")
    assert said
    assert not find_secrets(said), said


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("variable", ["TCPRELAY_TOKENS", "TCPRELAY_TOKEN_", "TCPRELAY_PASS_PHRASE"])
def test_a_secret_in_a_mistyped_variable_is_not_said(say: Say, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the variable alone."""
    monkeypatch.setenv(variable, CANARY)
    said = say("--check")
    assert variable in said
    assert not find_secrets(said), said


@pytest.mark.parametrize("kind", ["pfx", "key"])
@pytest.mark.parametrize("source", ["option", "environment", "configuration", "file"])
@pytest.mark.parametrize("role", ROLES)
def test_a_wrong_passphrase_is_not_said(say: Say, source: str, kind: str, locked: dict[str, str]) -> None:
    """Neither it nor the right one, nor anything of the key."""
    say.give("passphrase", source, f"{CANARY}-wrong")
    said = say("--tls", *locked[kind].split(), "--check")
    assert f"{say.main.__module__.replace('tcprelay_', 'tcprelay')[:9]}" in said
    assert "passphrase of" in said or "cannot use the certificate" in said
    assert not find_secrets(said, *key_lines(Path(locked["plain"]))), said


def key_lines(path: Path) -> list[str]:
    """The lines of a key in PEM form, each of which is a secret; the last one may be a few letters."""
    return [line for line in path.read_text().splitlines() if len(line) > 40 and "-----" not in line]


@pytest.fixture(scope="session")
def locked(certificates: Certificates) -> dict[str, str]:
    """The words that name a PFX file and a certificate with a key, both locked with the canary."""
    pfx = certificates.make_pfx("canary", "server", CANARY)
    key = certificates.path("canary.key")
    words = "pkey", "-in", "server.key", "-aes128", "-passout", f"pass:{CANARY}", "-out", key
    openssl(certificates.directory, *words)
    cert = certificates.path("server.pem")
    return {"pfx": f"--pfx {pfx}", "key": f"--cert {cert} --key {key}", "plain": certificates.path("server.key")}


# --- Real processes: the log and the process list -------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wire", "format"),
    [("option", "v1", "text"), ("environment", "v1", "json"), ("file", "v1", "text"), ("configuration", "raw", "json")],
)
def test_a_running_relay_shows_no_secret(
    bench: Bench,
    certificates: Certificates,
    locked: dict[str, str],
    tmp_path: Path,
    source: str,
    wire: str,
    format: str,
) -> None:
    """Two relays that use every kind of secret: at debug level, in use, with a stranger, reloaded, and at the end."""

    def start(role: str, *words: str, **secrets: str) -> Program:
        words = "--wire", wire, "--log-level", "debug", "--log-format", format, *words
        environment = {}
        if source == "option":
            words += tuple(word for name, value in secrets.items() for word in (f"--{name}", value))
        elif source == "environment":
            environment = {f"TCPRELAY_{name.upper()}": value for name, value in secrets.items()}
        elif source == "configuration":
            config = tmp_path / f"{role}.conf"
            config.write_text("".join(f"{name} = {value}\n" for name, value in secrets.items()))
            words += ("--config", str(config))
        else:
            for name, value in secrets.items():
                (tmp_path / name).write_text(value)
                words += (f"--{name}-file", str(tmp_path / name))
        program = Program(sys.executable, "-m", "tcprelay", role, *words, env=environment)
        bench.enter(program)
        return program

    def port_of(what: str) -> int:
        found = server.wait_for(lambda line: re.search(rf"listening for {what} on {HOST}:(\d+)", line))
        return int(found[1])

    key = {"token" if wire == "v1" else "secret": f"{CANARY}-shared"}
    server = start(
        "server", "--hostname", HOST, "--relay-port", "0", "--service-port", "0", "--tls", *locked["pfx"].split(),
        **key, passphrase=CANARY,
    )  # fmt: skip
    relay = ["--relay-host", HOST, "--relay-port", str(port_of("relay clients"))]
    service = ["--host", HOST, "--port", str(bench.service(echo).port)]
    tls = ["--tls", "--ca-file", certificates.path("ca.pem"), *locked["key"].split()]
    client = start("client", *relay, *service, *tls, **key, passphrase=CANARY)
    client.wait_for(lambda line: "is published at" in line)
    with socket.create_connection((HOST, port_of("clients of default")), PATIENCE) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    stranger = start("client", *relay, *service, *tls, **dict.fromkeys(key, f"{CANARY}-another"), passphrase=CANARY)
    server.wait_for(lambda line: "refused" in line)
    programs = [server, client, stranger]
    if source != "option":
        for program in programs:
            arguments = Path(f"/proc/{program.process.pid}/cmdline").read_text()
            assert "tcprelay" in arguments
            assert not find_secrets(arguments)
    for program in programs[:2]:
        program.signal(signal.SIGHUP)
        program.wait_for(lambda line: "is reloaded" in line)
    for program in programs:
        program.signal(signal.SIGTERM)
    for program in programs:
        assert program.wait() == 0
        check_log(program.output, format)
        assert not find_secrets(program.output, *key_lines(Path(locked["plain"])))


def test_a_shared_key_that_is_no_text_is_not_in_the_log(bench: Bench, log: Log) -> None:
    """Bytes that are not UTF-8, as the environment can hold them, are a key like any other."""
    server = bench.relay(wire="raw", secret=f"\udcff{CANARY}")
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    server.end(0)
    log.check()


# --- In a program that embeds the relay -----------------------------------------------------------------------


def show_all(*things: object) -> str:
    """What a program, a debugger's display or a crash report would show of them."""
    return "\n".join(f"{thing!r} {thing}" for thing in things)


@pytest.mark.parametrize("source", ["argument", "file"])
@pytest.mark.parametrize("role", ROLES)
def test_no_secret_in_a_representation(
    bench: Bench, locked: dict[str, str], tmp_path: Path, role: str, source: str
) -> None:
    """Of the relay, its options, its credentials, its attributes, its counters and its events."""
    secrets: dict[str, Any] = {"token": CANARY, "passphrase": CANARY}
    if source == "file":
        (tmp_path / "file").write_text(CANARY)
        secrets = {"token_file": str(tmp_path / "file"), "passphrase_file": str(tmp_path / "file")}
    secrets |= {"tls": "relay", "pfx": locked["pfx"].split()[1]}
    server = bench.server(**secrets)
    relay: Any = server
    if role == "client":
        relay = bench.client(server, 1, reject_unauthorized=False, **secrets)
    shown = show_all(
        relay, relay.options, relay.runtime.credentials, vars(relay), relay.counters, bench.server_events.events
    )
    assert "Options(" in shown
    assert not find_secrets(shown), shown


@pytest.mark.parametrize(
    "options",
    [
        {"wire": "raw"},
        {"token_file": "/no/such"},
        {"tls": "relay", "cert": "/no/such"},
        {"tls": "relay", "pfx": "PFX"},
        {"tls": "relay", "cert": "/dev/null"},
        {"heartbeat": "x"},
        {"secret": CANARY},
        {"tokens": CANARY},
        {"token": f"{CANARY}\ud800"},
        {"token": " ", "passphrase_file": CANARY[:0]},
    ],
    ids=str,
)
def test_no_secret_in_an_exception(options: dict[str, Any], locked: dict[str, str]) -> None:
    """Nor in its traceback, whatever does not fit beside it."""
    pfx = locked["pfx"].split()[1]
    given = {"token": CANARY, "passphrase": f"{CANARY}-wrong", **options}
    given = {name: pfx if value == "PFX" else value for name, value in given.items()}
    with pytest.raises((ValueError, OSError, TypeError)) as caught:
        RelayServer(0, 0, **given)
    shown = "".join(traceback.format_exception(caught.value))
    assert not find_secrets(shown), shown


# --- What peers say -------------------------------------------------------------------------------------------

EVIL = {
    "a new line": f"x\n{FORGED}\r\n{FORGED}",
    "colours": "\x1b[31m\x1b]0;title\x07\x9b2J",
    "zero": "a\0b",
    "line separators": f"\u2028{FORGED}\x85{FORGED}\x0b\x0c",
    "right to left": "\u202e\u2066abc",
    "half a character": "\ud800",
    "formats": "%s %d %(name)s {reason} {0} {service.__class__}",
    "backslashes": "\\n\\x1b\\",
    "long": "L" * 3500,
    "an address": "[::]:no\n",
    "empty": "",
}
"""What a peer can put into a string to forge a line of the log, or to have a terminal do something."""


def prepared(server: RelayServer) -> FakeClient:
    """An idle link of a relay client that knows the token."""
    link = FakeClient(server)
    assert link.hello(token=CANARY.encode()).kind == WELCOME
    return link


def started(server: RelayServer) -> tuple[FakeClient, socket.socket]:
    """A link with START on it, and the service client that it came for, which is not offered to another one."""
    wait_until(lambda: server.counters["links_idle"] == 0)  # the last one's link is gone
    link = prepared(server)
    wait_until(lambda: server.counters["links_idle"] == 1)
    sock = connect(server.service_addresses["default"])
    sock.sendall(b"x")
    assert link.next().kind == START
    assert link.read(1) == b"x"
    return link, sock


def greet(server: RelayServer, fields: dict[str, Any]) -> None:
    with FakeClient(server) as link:
        link.send(HELLO, {"version": 1, "service": "default", "client": "x", "name": "x", "nonce": "0", **fields})
        if link.next().kind == CHALLENGE:
            link.send(AUTH, {"proof": "", **{name: fields[name] for name in ("proof", "unknown") if name in fields}})
            link.next()


def greet_well(server: RelayServer, fields: dict[str, Any]) -> None:
    with FakeClient(server) as link:
        link.hello(**{"token": CANARY.encode(), **fields})


def fail(server: RelayServer, fields: dict[str, Any]) -> None:
    link, sock = started(server)
    with link, sock:
        link.send(FAIL, fields)
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)


def abort(server: RelayServer, fields: dict[str, Any]) -> None:
    link, sock = started(server)
    with link, sock:
        link.stream.send(link.pack_control(READY, fields) + encode_frame(ABORT, fields))
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)


def say_idle(kind: int) -> Callable[[RelayServer, dict[str, Any]], None]:
    def act(server: RelayServer, fields: dict[str, Any]) -> None:
        with prepared(server) as link, contextlib.suppress(OSError, EOFError):
            link.stream.send(encode_frame(kind, fields))
            link.next()

    return act


def refuse(server: RelayServer, fields: dict[str, Any]) -> None:
    link, sock = started(server)
    with link, sock:
        link.stream.send(encode_frame(REFUSED, fields))
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)


TO_SERVER: dict[str, tuple[Callable[[RelayServer, dict[str, Any]], None], str]] = {
    "HELLO service": (greet_well, "service"),
    "HELLO client": (greet_well, "client"),
    "HELLO name": (greet_well, "name"),
    "HELLO nonce": (greet, "nonce"),
    "HELLO server_nonce": (greet, "server_nonce"),
    "HELLO version": (greet, "version"),
    "HELLO idle": (greet, "idle"),
    "HELLO, an unknown field": (greet, "unknown"),
    "AUTH proof": (greet, "proof"),
    "AUTH certificate": (greet, "certificate"),
    "FAIL reason": (fail, "reason"),
    "ABORT reason": (abort, "reason"),
    "READY, an unknown field": (abort, "unknown"),
    "PONG, an unknown field": (say_idle(PONG), "unknown"),
    "BYE, an unknown field": (say_idle(BYE), "unknown"),
    "END, an unknown field": (say_idle(END), "unknown"),
    "REFUSED reason on an idle link": (say_idle(REFUSED), "reason"),
    "REFUSED reason": (refuse, "reason"),
    "REFUSED code": (refuse, "code"),
}


@pytest.mark.parametrize("where", TO_SERVER)
def test_what_a_relay_client_says_is_escaped(bench: Bench, log: Log, where: str) -> None:
    """In the server's log, of whatever type it is; the token is not in it."""
    server = bench.server(token=CANARY)
    act, name = TO_SERVER[where]
    for text in EVIL.values():
        act(server, {name: text})
    for value in ([FORGED], 5, None):
        act(server, {name: value})
    act(server, {FORGED: FORGED})
    server.end(0)
    log.check()


NOISE = [
    f"GET /{CANARY} HTTP/1.1\r\nAuthorization: {CANARY}\r\n{FORGED}\r\n\r\n".encode(),
    f"SSH-2.0-{CANARY}\r\n{FORGED}\r\n".encode(),
    f"\n{FORGED}\n{CANARY}\n".encode(),
    b"\x16\x03\x01" + CANARY.encode(),
    b"\x01\x00\x00\x20" + CANARY.encode() * 3,
    b"\x00\xff" * 100,
    CANARY.encode(),
]
"""What other programs send; a password may be in it."""


@pytest.mark.parametrize("options", [{}, {"wire": "raw", "secret": CANARY}, {"tls": "relay"}], ids=["v1", "raw", "tls"])
def test_what_other_programs_say_is_not_in_the_log(
    bench: Bench, log: Log, certificates: Certificates, options: dict[str, Any]
) -> None:
    """HTTP, SSH and garbage at the relay port."""
    if "tls" in options:
        options = {**options, "cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(**({"token": CANARY} if "wire" not in options else {}), **options)
    for noise in NOISE:
        with connect(server.relay_address) as sock, contextlib.suppress(OSError):
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1000)
    server.end(0)
    log.check()


def test_the_name_that_a_tls_client_asks_for_is_not_in_the_log(
    bench: Bench, log: Log, certificates: Certificates
) -> None:
    """SNI, on the relay port and the service port, as a ClientHello can have it and as it must not."""
    paths = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="both", token=CANARY, **paths)
    context = tls_context()
    outgoing, innocent, evil = ssl.MemoryBIO(), b"x" * 60, f"\n{FORGED}\x1b[31m".encode().ljust(60, b"!")
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=innocent.decode()).do_handshake()
    hello = outgoing.read()
    assert innocent in hello
    for address in (server.relay_address, server.service_addresses["default"]):
        for data in (hello, hello.replace(innocent, evil)):
            with connect(address) as sock, contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
    server.end(0)
    log.check()


CERTIFICATES = {
    "subject": (f"/CN=a\n{FORGED}\x1b[31m", ""),
    "organisation": (f"/O=a\n{FORGED}\x1b[31m/CN=a", ""),
    "SAN": ("/O=x", f"DNS:a\\n{FORGED.partition(',')[0]}\x1b[31m"),
    "SAN address": ("/O=x", f"email:a\\n{FORGED.partition(',')[0]}\x9b"),
}


@pytest.fixture(scope="session", params=CERTIFICATES)
def evil(request: pytest.FixtureRequest, certificates: Certificates) -> tuple[str, str]:
    """The paths of a self-signed certificate with such names, and of its key."""
    subject, san = CERTIFICATES[request.param]
    name = f"evil-{request.param.replace(' ', '-')}"
    words = "req", "-x509", *EC, "-utf8", "-days", "30", "-subj", subject
    extension = ("-addext", f"subjectAltName={san}") if san else ()
    openssl(certificates.directory, *words, *extension, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return certificates.path(f"{name}.pem"), certificates.path(f"{name}.key")


def test_names_in_a_client_s_certificate_are_escaped(
    bench: Bench, log: Log, certificates: Certificates, evil: tuple[str, str]
) -> None:
    """Also where the certificate is accepted, and its name becomes a part of the client's."""
    paths = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="relay", auth=True, ca_file=evil[0], **paths)
    client = bench.client(server, 1, tls="relay", ca_file=certificates.path("ca.pem"), cert=evil[0], key=evil[1])
    with contextlib.suppress(ConnectionError), connect(server.service_addresses["default"]) as sock:
        sock.sendall(b"x")
        sock.recv(1)
    client.end(0)
    server.end(0)
    log.check()


@pytest.mark.parametrize("reason", ["not trusted", "another name", "another pin"])
def test_names_in_a_server_s_certificate_are_escaped(
    bench: Bench, log: Log, certificates: Certificates, evil: tuple[str, str], reason: str
) -> None:
    """Where it is not accepted."""
    options = {
        "not trusted": {"ca_file": certificates.path("ca.pem")},
        "another name": {"ca_file": evil[0]},
        "another pin": {"pin": f"sha256:{64 * '0'}"},
    }
    server = bench.server(tls="relay", cert=evil[0], key=evil[1], token=CANARY)
    with client_of(server.relay_address[1], token=CANARY, tls="relay", **options[reason]):
        log.wait("trying again")
    server.end(0)
    log.check()


def test_names_in_a_service_s_certificate_are_escaped(
    bench: Bench, log: Log, certificates: Certificates, evil: tuple[str, str]
) -> None:
    """The service client is refused, and the reason passes through both logs."""
    context = tls_context(True, *evil)

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True):
            pass

    server = bench.server(token=CANARY)
    client = bench.client(
        server, bench.service(serve).port, token=CANARY, tls="service", service_ca_file=certificates.path("ca.pem")
    )
    with pytest.raises(ConnectionError), connect(server.service_addresses["default"]) as sock:
        sock.sendall(b"x")
        sock.recv(1)
    client.end(0)
    server.end(0)
    log.check()


# A relay server that says evil things


def client_of(relay_port: int, **options: Any) -> RelayClient:
    """A relay client with one link, for a service that cannot be reached."""
    return RelayClient(HOST, 1, HOST, relay_port, 1, drain_timeout=0, **options)


def challenge(relay: FakeServer, link: Link, fields: dict[str, Any]) -> None:
    link.receive(Deadline(PATIENCE))
    link.send(CHALLENGE, fields)
    link.receive(Deadline(PATIENCE))


def welcome(relay: FakeServer, link: Link, fields: dict[str, Any]) -> None:
    relay.welcome(link, **fields)


def welcome_and(kind: int) -> Callable[[FakeServer, Link, dict[str, Any]], None]:
    def act(relay: FakeServer, link: Link, fields: dict[str, Any]) -> None:
        relay.welcome(link)
        link.stream.send(encode_frame(kind, fields))
        link.receive(Deadline(PATIENCE))

    return act


def start_and_abort(relay: FakeServer, link: Link, fields: dict[str, Any]) -> None:
    relay.welcome(link)
    start = link.pack_control(START, {"id": "1", "client": "x", "port": "x", **fields})
    link.stream.send(start + encode_frame(ABORT, fields))
    link.receive(Deadline(PATIENCE))


def refuse_at_once(relay: FakeServer, link: Link, fields: dict[str, Any]) -> None:
    link.receive(Deadline(PATIENCE))
    link.send(REFUSED, {"code": "token", "reason": "x", **fields})


TO_CLIENT: dict[str, tuple[Callable[[FakeServer, Link, dict[str, Any]], None], str]] = {
    "CHALLENGE nonce": (challenge, "nonce"),
    "CHALLENGE certificate": (challenge, "certificate"),
    "WELCOME proof": (welcome, "proof"),
    "WELCOME address": (welcome, "address"),
    "WELCOME nonces": (welcome, "nonces"),
    "PING nonces": (welcome_and(PING), "nonces"),
    "WELCOME heartbeat": (welcome, "heartbeat"),
    "WELCOME, an unknown field": (welcome, "unknown"),
    "REFUSED code": (refuse_at_once, "code"),
    "REFUSED reason": (refuse_at_once, "reason"),
    "REFUSED reason on an idle link": (welcome_and(REFUSED), "reason"),
    "PING, an unknown field": (welcome_and(PING), "unknown"),
    "BYE, an unknown field": (welcome_and(BYE), "unknown"),
    "START id": (start_and_abort, "id"),
    "START client": (start_and_abort, "client"),
    "START port": (start_and_abort, "port"),
    "START, an unknown field": (start_and_abort, "unknown"),
    "ABORT reason": (start_and_abort, "reason"),
}


@pytest.mark.parametrize("where", TO_CLIENT)
def test_what_a_relay_server_says_is_escaped(log: Log, where: str) -> None:
    """In the client's log, of whatever type it is; the client's token is not in it."""
    act, name = TO_CLIENT[where]
    token = CANARY if act is challenge else ""
    for value in [*EVIL.values(), [FORGED], 5, None]:
        with FakeServer() as relay, client_of(relay.port, token=token or None):
            link = relay.accept()
            with contextlib.suppress(OSError, EOFError):
                act(relay, link, {name: value})
            link.close()
            log.wait("trying again|is down|unexpected error")
    log.check()


@pytest.mark.parametrize("noise", NOISE, ids=[str(number) for number in range(len(NOISE))])
def test_what_another_server_says_is_not_in_the_log(log: Log, noise: bytes) -> None:
    """HTTP, SSH and garbage where a relay server should be, for a client with and without TLS."""
    with_tls = {"tls": "relay", "reject_unauthorized": False}
    for options in ({}, with_tls):
        with FakeServer() as relay, client_of(relay.port, token=CANARY, **options):
            link = relay.accept()
            link.stream.send(noise)
            link.sock.shutdown(socket.SHUT_WR)
            log.wait("trying again")
    log.check()
