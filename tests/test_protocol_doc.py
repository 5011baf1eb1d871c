"""docs/protocol.md says what the code does, and is enough to write another implementation.

The two peers in this file are such implementations: they are made from the document and use nothing of tcprelay.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import re
import socket
import threading
from contextlib import ExitStack
from typing import Any

import pytest

import tcprelay
from _tcprelay import protocol
from _tcprelay.events import FAILURES
from _tcprelay.client import stock
from _tcprelay.client.greeting import LINK_TIMEOUT, RELAY_DIAL_TIMEOUT
from _tcprelay.client.links import BYE_TIMEOUT
from _tcprelay.client.refill import (
    EAGER_SPAN, EAGER_TIME, FIRST_BACKOFF, LAST_BACKOFF, REFILL_RATE, REFILL_TIME, REFUSED_BACKOFF, WITHDRAWN_AGAIN,
    WITHDRAWN_TIME,
)  # fmt: skip
from _tcprelay.client.wandering import PROOF_TIME
from _tcprelay.protocol import (
    CLIENT, CLOSED, FRAME_NAMES, MAX_CONTROL, MAX_DATA, REFUSED, SERVER, SILENCE, TRANSITIONS, LinkMachine,
    encode_frame, encode_header,
)  # fmt: skip
from _tcprelay.server.clients import EARLY_BYTES
from _tcprelay.server.greeting import HANDSHAKE_STEP, HANDSHAKE_TIMEOUT
from _tcprelay.server.limits import LEAST_HANDSHAKES, MOST_HANDSHAKES
from _tcprelay.server.links import SURPLUS_TIME
from _tcprelay.server.withdrawals import LONGEST
from _tcprelay.sockets import DIAL_TIMEOUT
from _tcprelay.streams import FLUSH_TIMEOUT, PIPE_SIZE
from _tcprelay.tcp import Probing
from tcprelay import ServerOptions

from .conftest import PATIENCE, Bench, connect, echo, read_all, read_exactly, wait_until
from .peers import ROOT

TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
TOKEN = "correct horse battery staple"


# --- What the document says -----------------------------------------------------------------------------------


def type_table() -> dict[str, tuple[int, str, str]]:
    """Value, sender and kind of body of each frame."""
    rows = re.findall(r"^\| ([A-Z]+) \| (\d+) \| (client|server|both) \| (JSON|empty|bytes) \|", TEXT, re.MULTILINE)
    return {name: (int(value), sender, body) for name, value, sender, body in rows}


def field_tables() -> dict[str, dict[str, str]]:
    """The JSON type of each field of each frame."""
    fields: dict[str, dict[str, str]] = {}
    frame = ""
    for line in TEXT.splitlines():
        if found := re.match(r"(?:- )?\*\*([A-Z]+)\*\*", line):
            frame = found[1]
        elif found := re.match(r"\s*\| `(\w+)` \| (string|number|boolean|list) \|", line):
            fields.setdefault(frame, {})[found[1]] = found[2]
    return fields


def transition_table() -> dict[tuple[str, str, str], str]:
    rows = re.findall(r"^\| ([a-z]+) \| (client|server|both) \| ([A-Z]+) \| ([a-z]+) \|$", TEXT, re.MULTILINE)
    senders = {"both": (CLIENT, SERVER), CLIENT: (CLIENT,), SERVER: (SERVER,)}
    return {(state, who, frame): after for state, sender, frame, after in rows for who in senders[sender]}


def hex_blocks() -> list[tuple[str, bytes, bytes]]:
    """The name, the body and the bytes of each frame that is shown."""
    blocks = []
    for head, digits in re.findall(r"^```hex\n(.*)\n((?:[0-9a-f ]+\n)+)```$", TEXT, re.MULTILINE):
        name, _, body = head.partition(" ")
        blocks.append((name, body.encode(), bytes.fromhex(digits)))
    return blocks


def inputs() -> dict[str, str]:
    """The worked example's inputs and proofs."""
    return dict(re.findall(r"^\| ([\w ]+) \| `([^`]+)` \|$", TEXT, re.MULTILINE))


TYPES = type_table()
FIELDS = field_tables()


def test_the_types() -> None:
    """All frames are there, with their values and senders."""
    assert {name: value for name, (value, _, _) in TYPES.items()} == {name: n for n, name in FRAME_NAMES.items()}
    for name, (value, sender, _) in TYPES.items():
        senders = {who for _, who, kind in TRANSITIONS if kind == value} or {CLIENT, SERVER}
        assert senders == ({CLIENT, SERVER} if sender == "both" else {sender}), name


def test_frames_with_fields_are_those_with_json() -> None:
    """Each frame that carries JSON has a table of its fields, and no other has."""
    assert set(FIELDS) == {name for name, (_, _, body) in TYPES.items() if body == "JSON"}


def test_the_states() -> None:
    """The table is the machine's, and REFUSED ends every state."""
    table = transition_table()
    assert {key: after for key, after in table.items() if key[0] == "any"} == {
        ("any", CLIENT, "REFUSED"): "closed", ("any", SERVER, "REFUSED"): "closed",
    }  # fmt: skip
    wanted = {(state, who, FRAME_NAMES[kind]): after for (state, who, kind), after in TRANSITIONS.items()}
    assert {key: after for key, after in table.items() if key[0] != "any"} == wanted
    for state in {state for state, _, _ in TRANSITIONS}:
        machine = LinkMachine(CLIENT)
        machine.state = state
        machine.receive(REFUSED)
        assert machine.state == CLOSED


@pytest.mark.parametrize(("name", "body", "data"), hex_blocks())
def test_the_bytes_of_a_frame(name: str, body: bytes, data: bytes) -> None:
    """What is shown as bytes is what the code makes of the name and the body."""
    kind = next(kind for kind, known in FRAME_NAMES.items() if known == name)
    if name == "DATA":
        payload = json.loads(body).encode()
        assert data == encode_header(kind, len(payload)) + payload
    else:
        assert data == encode_frame(kind, json.loads(body) if body else None)


def test_most_frames_are_shown_as_bytes() -> None:
    """The examples have not fallen out of the pattern that finds them."""
    assert {name for name, _, _ in hex_blocks()} == set(TYPES) - {"REFUSED"}


def test_the_worked_example_of_the_proofs() -> None:
    """The message and both proofs follow from the inputs, by the document's recipe and by the code."""
    given = inputs()
    nonces = given["nonce of HELLO"], given["nonce of CHALLENGE"]
    found = re.search(r"^```message\n((?:[0-9a-f ]+\n)+)```$", TEXT, re.MULTILINE)
    assert found
    assert bytes.fromhex(found[1]) == proof_message("client", *nonces, given["service"], given["client id"])
    assert "these 128 bytes" in TEXT
    for role in ("client", "server"):
        parts = (role, *nonces, given["service"], given["client id"])
        assert given[f"{role} proof"] == prove(given["token"], *parts)
        assert given[f"{role} proof"] == protocol.prove(given["token"].encode(), *parts)
        assert given[f"bound {role} proof"] == prove(given["token"], *parts, given["certificate"])
        assert given[f"bound {role} proof"] == protocol.prove(given["token"].encode(), *parts, given["certificate"])


def test_the_examples_are_one_connection() -> None:
    """The frames that are shown use the inputs of the worked example."""
    given = inputs()
    blocks = [(name, json.loads(body)) for name, body, _ in hex_blocks() if body]
    bodies = dict(reversed(blocks))  # the first of each
    assert bodies["HELLO"]["nonce"] == given["nonce of HELLO"]
    assert bodies["HELLO"]["client"] == given["client id"]
    assert bodies["CHALLENGE"]["nonce"] == given["nonce of CHALLENGE"]
    assert bodies["AUTH"]["proof"] == given["client proof"]
    assert bodies["WELCOME"]["proof"] == given["server proof"]
    for name, body in blocks:
        if name != "DATA":
            ahead = {"server_nonce", "proof"} if body is bodies["HELLO"] else set()
            assert set(FIELDS[name]) - set(body) <= {
                "down",
                "doubtful",
                "certificate",
                "service_port",
                "had_port",
                "alpn",
                *ahead,
            }  # plain, and for services that the server has
            assert set(body) <= set(FIELDS[name])
    later = dict(blocks)
    parts = later["HELLO"]["nonce"], bodies["PING"]["nonces"][0], "web", given["client id"]
    assert later["HELLO"]["server_nonce"] == parts[1]
    assert later["HELLO"]["proof"] == prove(given["token"], "client", *parts)
    assert later["WELCOME"]["proof"] == prove(given["token"], "server", *parts)


def test_the_numbers() -> None:
    """Each limit that the document tells is the code's."""
    largest_splice = PIPE_SIZE
    for sentence in (
        f"a body of at most {MAX_CONTROL:,} bytes",
        f"up to {MAX_DATA:,} bytes",
        f"are at most {largest_splice:,} bytes",
        f"at {EARLY_BYTES:,} of them",
        f"the server ends it after {HANDSHAKE_TIMEOUT:g} s",
        f"takes longer than {HANDSHAKE_STEP:g} s",
        f"gives up after {LINK_TIMEOUT:g} s from the TCP connection",
        f"for which it takes {RELAY_DIAL_TIMEOUT:g} s at most",
        f"`--keepalive`, {Probing.keepalive:g} s",
        f"`--dead-path`, {Probing.dead_path:g} s",
        f"nothing has been heard for {SILENCE:g} intervals",
        f"not been used for {SURPLUS_TIME:g} s",
        f"{LEAST_HANDSHAKES} to {MOST_HANDSHAKES:,}, a quarter of `--max-connections`",
        f"{stock.MOST_HANDSHAKES} at most",
        f"a time-out of its own (*tcprelay:* {BYE_TIMEOUT:g} s)",
        f"(*tcprelay:* {DIAL_TIMEOUT:g} s)",
        f"does not end within {FLUSH_TIMEOUT:g} s",
        f"a random moment within {FIRST_BACKOFF:g} s",
        f"up to {LAST_BACKOFF:g} s; up to {REFUSED_BACKOFF:g} s where it was refused",
        f"at {REFILL_RATE:g} a second, or within {REFILL_TIME:g} s",
        f"within {EAGER_SPAN:g} s, for {EAGER_TIME:g} s",
        f"within {PROOF_TIME:g} s of WELCOME",
        f"says {WITHDRAWN_TIME:g}, and says it again after {WITHDRAWN_AGAIN:g} s",
        f"at most {LONGEST:g} s",
        f"`--pair-timeout`, {ServerOptions.pair_timeout:g} s",
        f"0.05 to 3600 s, {ServerOptions.heartbeat:g} by default",
    ):
        assert sentence in " ".join(TEXT.split()), sentence


def test_the_codes_of_refused() -> None:
    """The table has each code that the server sends, and no other; service clients hear nothing of theirs."""
    section = TEXT.partition("| code | when |")[2].partition("\n\n")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    codes = set()
    rooms = [ROOT / "tcprelay_server.py", *ROOT.glob("_tcprelay/server/*.py")]
    for node in [node for path in rooms for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
            codes |= {code.value for code in node.args[1:2] if isinstance(code, ast.Constant)}
    assert told <= codes
    assert codes - told - {"lost"} <= set(FAILURES)  # a link that is lost hears nothing


# --- Implementations made from the document -------------------------------------------------------------------


def proof_message(*parts: str) -> bytes:
    message = b""
    for part in ("tcprelay link 1", *parts):
        message += len(part.encode()).to_bytes(4, "big") + part.encode()
    return message


def prove(token: str, *parts: str) -> str:
    return hmac.new(token.encode(), proof_message(*parts), hashlib.sha256).hexdigest()


class Wire:
    """A link's end that frames and checks what comes against the document."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    def send(self, frame: str, /, **fields: Any) -> None:
        self.send_body(frame, json.dumps(fields).encode() if fields else b"")

    def send_body(self, frame: str, body: bytes) -> None:
        self.sock.sendall(bytes([TYPES[frame][0]]) + len(body).to_bytes(3, "big") + body)

    def receive(self, wanted: str) -> Any:
        """The next frame's fields, or its bytes; it must be the wanted one, with all documented fields."""
        head = read_exactly(self.sock, 4)
        body = read_exactly(self.sock, int.from_bytes(head[1:], "big"))
        [name] = [name for name, (value, _, _) in TYPES.items() if value == head[0]]
        assert name == wanted, body
        if TYPES[name][2] == "bytes":
            return body
        fields = json.loads(body) if body else {}
        types = {"string": str, "number": (int, float), "boolean": bool, "list": list}
        assert [key for key, value in fields.items() if not isinstance(value, types[FIELDS[name][key]])] == []  # type: ignore[arg-type]
        optional = {"proof", "passed", "again", "nonces", "server_nonce", "certificate", "service_port", "had_port"}
        optional |= {"alpn", "down", "doubtful"}
        assert set(FIELDS.get(name, ())) - set(fields) <= optional
        return fields


def greet(wire: Wire, token: str = "") -> dict[str, Any]:
    """The client's handshake; returns WELCOME."""
    nonce = "a" * 32
    wire.send("HELLO", version=1, service="default", client="another", name="another", idle=1, nonce=nonce)
    if token:
        parts = nonce, wire.receive("CHALLENGE")["nonce"], "default", "another"
        wire.send("AUTH", proof=prove(token, "client", *parts))
    welcome: dict[str, Any] = wire.receive("WELCOME")
    if token:
        assert welcome["proof"] == prove(token, "server", *parts)
    wire.receive("PING")
    wire.send("PONG")
    return welcome


def test_another_relay_client_proves_itself_in_hello(bench: Bench) -> None:
    """With a nonce that an earlier WELCOME has handed out, from the document alone."""
    server = bench.server(token=TOKEN)
    nonce, *_ = greet(Wire(bench.enter(connect(server.relay_address))), TOKEN)["nonces"]
    wire, parts = Wire(bench.enter(connect(server.relay_address))), ("b" * 32, nonce, "default", "another")
    hello = {"version": 1, "service": "default", "client": "another", "name": "another", "idle": 1, "nonce": "b" * 32}
    wire.send("HELLO", **hello, server_nonce=nonce, proof=prove(TOKEN, "client", *parts))
    assert wire.receive("WELCOME")["proof"] == prove(TOKEN, "server", *parts)


@pytest.mark.parametrize("token", ["", TOKEN])
def test_another_relay_client(bench: Bench, token: str) -> None:
    """A client that is written from the document alone carries two connections on one link, and leaves."""
    server = bench.server(token=token or None)
    wire = Wire(bench.enter(connect(server.relay_address)))
    greet(wire, token)
    for request, answer, end in ((b"hello", b"world", {}), (b"again", b"and again", {"passed": 5}), (b"", b"bye", {})):
        service_client = bench.connect(server)
        service_client.sendall(request)
        start = wire.receive("START")
        assert start["client"] == "{}:{}".format(*service_client.getsockname())
        got = b""
        wire.send("READY")
        while len(got) < len(request):
            got += wire.receive("DATA")
        wire.send_body("DATA", answer)
        wire.send("END", **end)
        assert (got, read_all(service_client)) == (request, answer)
        service_client.shutdown(socket.SHUT_WR)
        wire.receive("END")
        if request and not end:  # the server cannot know that all of it has been passed on
            wire.receive("PING")
            wire.send("PONG")
    wire.send("BYE")
    assert read_all(wire.sock) == b""


def test_another_relay_client_is_asked_whether_it_lives(bench: Bench) -> None:
    """PING comes at the interval that WELCOME tells, and without PONG the end."""
    server = bench.server(heartbeat=0.3)
    wire = Wire(bench.enter(connect(server.relay_address)))
    assert greet(wire)["heartbeat"] == 0.3
    for _ in range(2):
        wire.receive("PING")
        wire.send("PONG")
    wire.receive("PING")
    with pytest.raises(ConnectionResetError):
        while read_exactly(wire.sock, 4):
            pass


def test_another_relay_client_that_fails_and_breaks_off(bench: Bench) -> None:
    """FAIL and ABORT reset the service client, and leave the link whole."""
    server = bench.server()
    wire = Wire(bench.enter(connect(server.relay_address)))
    greet(wire)
    for answer in ("FAIL", "READY", "FAIL"):
        wait_until(lambda: server.counters["links_idle"] == 1)
        service_client = bench.connect(server)
        wire.receive("START")
        if answer == "FAIL":
            wire.send("FAIL", reason="not today")
            wire.receive("END")
        else:
            wire.send("READY")
            wire.send_body("DATA", b"the beginning of a")
            assert read_exactly(service_client, 18) == b"the beginning of a"
            wire.send("ABORT", reason="connection reset by peer")
            wire.receive("ABORT")
            wire.receive("PING")
            wire.send("PONG")
        with pytest.raises(ConnectionResetError):
            service_client.recv(1)


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        ({"version": 2, "service": "default"}, "version"),
        ({"version": 1, "service": "unknown"}, "service"),
        ({"version": 1, "service": 7}, "protocol"),
    ],
)
def test_what_the_server_refuses(bench: Bench, hello: dict[str, Any], code: str) -> None:
    """The codes are told as the document says, and then the link ends."""
    wire = Wire(bench.enter(connect(bench.server().relay_address)))
    wire.send("HELLO", client="another", nonce="a" * 32, **hello)
    assert wire.receive("REFUSED")["code"] == code
    assert read_all(wire.sock) == b""


@pytest.mark.parametrize("token", ["", TOKEN])
def test_another_relay_server(bench: Bench, token: str) -> None:
    """A server that is written from the document alone gives the real client a connection, and says BYE."""
    service = bench.service(echo)
    listener = bench.enter(socket.create_server(("127.0.0.1", 0)))
    listener.settimeout(PATIENCE)
    port = listener.getsockname()[1]
    client = bench.enter(tcprelay.RelayClient("127.0.0.1", service.port, "127.0.0.1", port, 1, token=token or None))
    with ExitStack() as stack:
        wire = Wire(stack.enter_context(listener.accept()[0]))
        hello = wire.receive("HELLO")
        assert (hello["version"], hello["service"], hello["idle"]) == (1, "default", 1)
        welcome: dict[str, Any] = {"heartbeat": 15, "address": "192.0.2.1:8080", "waiting": 0, "unknown": {"key": 1}}
        if token:
            wire.send("CHALLENGE", nonce="b" * 32)
            parts = hello["nonce"], "b" * 32, "default", hello["client"]
            assert wire.receive("AUTH")["proof"] == prove(token, "client", *parts)
            welcome["proof"] = prove(token, "server", *parts)
        wire.send("WELCOME", **welcome)
        wire.send("PING")
        wire.receive("PONG")
        wire.send("START", id="5f1d02c7", client="192.0.2.7:50312", port="192.0.2.1:8080", waiting=0)
        wire.send_body("DATA", b"hello")
        wire.receive("READY")
        assert wire.receive("DATA") == b"hello"
        wire.send("END")
        wire.receive("END")
        wire.send("BYE")
        assert read_all(wire.sock) == b""
        ender = threading.Thread(target=client.end, args=(0.0,))
        ender.start()
        ender.join(PATIENCE)
        assert not ender.is_alive()
