"""The link protocol: frames, which may come when, and proofs; no I/O."""

from __future__ import annotations

import json
import struct
import threading
from typing import Any, NamedTuple

from .proxy_header import may_begin_header
from .system import hashlib, hmac
from .text import random_id

HEADER = 4
HEAD = struct.Struct("!I")
"""The header of a frame: its kind in the first byte, its length in the others."""
MAX_CONTROL = 4096
MAX_DATA = (1 << 24) - 1
PROTOCOL_VERSION = 1
SILENCE = 2.5
"""Heartbeat intervals without a frame after which an idle link is dead: two PINGs may be lost."""
HELLO, CHALLENGE, AUTH, WELCOME, REFUSED = 1, 2, 3, 4, 5
PING, PONG = 6, 7
START, READY, FAIL, DATA, END, ABORT, BYE = 8, 9, 10, 11, 12, 13, 14
DATA_HEAD = DATA << 24
"""The header of DATA, but for its length."""
FRAME_NAMES = {
    HELLO: "HELLO", CHALLENGE: "CHALLENGE", AUTH: "AUTH", WELCOME: "WELCOME", REFUSED: "REFUSED",
    PING: "PING", PONG: "PONG", START: "START", READY: "READY", FAIL: "FAIL",
    DATA: "DATA", END: "END", ABORT: "ABORT", BYE: "BYE",
}  # fmt: skip


CLIENT, SERVER = "client", "server"
NEW, GREETED, CHALLENGED, PROVEN = "new", "greeted", "challenged", "proven"
IDLE, OPENING, SPLICED, FAILED, CLOSED = "idle", "opening", "spliced", "failed", "closed"
TRANSITIONS = {
    # (state, sender, frame): the next state.  END and ABORT count separately: see `LinkMachine`.
    (NEW, CLIENT, HELLO): GREETED,
    (GREETED, SERVER, CHALLENGE): CHALLENGED,
    (CHALLENGED, CLIENT, AUTH): PROVEN,
    (GREETED, SERVER, WELCOME): IDLE,
    (PROVEN, SERVER, WELCOME): IDLE,
    (IDLE, SERVER, PING): IDLE,
    (IDLE, CLIENT, PONG): IDLE,
    (IDLE, SERVER, BYE): CLOSED,
    (IDLE, CLIENT, BYE): IDLE,  # and leaving: a START that crossed it is still served
    (IDLE, SERVER, START): OPENING,
    (OPENING, CLIENT, PONG): OPENING,  # crossed START
    (OPENING, CLIENT, BYE): OPENING,  # crossed START
    (OPENING, CLIENT, READY): SPLICED,
    (OPENING, CLIENT, FAIL): FAILED,
    **{(state, SERVER, frame): state for state in (OPENING, SPLICED, FAILED) for frame in (DATA, END, ABORT)},
    **{(SPLICED, CLIENT, frame): SPLICED for frame in (DATA, END, ABORT)},
}


class LinkFault(ConnectionError):
    """The peer broke the link protocol; the message says how, in words that it may be told."""


class LinkMachine:
    """What may be sent and received on one link, at either end; no I/O.

    A frame that the state does not allow raises `LinkFault`.  A connection is over, and the link idle again,
    when both sides have ended their direction (`END` or `ABORT`; `FAIL` is the client's end as well).  In
    between, one thread sends and another receives, so the transitions happen under a lock; DATA needs none.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.peer = SERVER if role == CLIENT else CLIENT
        self.state = NEW
        self.leaving = False
        """The client has said BYE: no further connection after this one."""
        self._ended: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def send(self, kind: int) -> None:
        """Note that a frame of this kind goes out.  Raises `LinkFault` where it may not."""
        self._step(self.role, kind)

    def receive(self, kind: int) -> None:
        """Note that a frame of this kind came in.  Raises `LinkFault` where it may not."""
        self._step(self.peer, kind)

    def check(self, kind: int, length: int) -> None:
        """Whether a frame with this header may come in now, before its body is read.  Raises `LinkFault`."""
        if kind not in FRAME_NAMES:
            raise LinkFault(f"unknown frame type {kind}")
        if kind != DATA and length > MAX_CONTROL:
            raise LinkFault(f"{FRAME_NAMES[kind]} of {length} bytes is longer than {MAX_CONTROL}")
        self._next_state(self.peer, kind)

    def has_ended(self, who: str) -> bool:
        """Whether that side has ended its direction of the present connection."""
        return who in self._ended or self.state in (IDLE, CLOSED)

    def _next_state(self, sender: str, kind: int) -> str:
        if kind == REFUSED:
            return CLOSED
        state = TRANSITIONS.get((self.state, sender, kind))
        if state is None or sender in self._ended or (kind == BYE and self.leaving):
            raise LinkFault(f"{FRAME_NAMES[kind]} from the {sender} where the link is {self.state}")
        return state

    def _step(self, sender: str, kind: int) -> None:
        if kind == DATA:
            self._next_state(sender, kind)
            return
        with self._lock:
            self.state = self._next_state(sender, kind)
            if kind == BYE and sender == CLIENT:
                self.leaving = True
            if kind in (END, ABORT):
                self._ended += (sender,)
            if kind == FAIL:
                self._ended += (CLIENT,)
            if len(self._ended) == 2:
                self.state = IDLE  # first: `has_ended` looks without the lock
                self._ended = ()


_NO_FIELDS: dict[str, Any] = {}


class Frame(NamedTuple):
    """A control frame (`fields` is its JSON object), or the head of a DATA frame of `length` bytes."""

    kind: int
    length: int = 0
    fields: dict[str, Any] = _NO_FIELDS

    def text(self, name: str, default: str = "") -> str:
        """A string field.  Raises `LinkFault` where it is something else."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise LinkFault(f"{FRAME_NAMES[self.kind]}: {name} is not a string")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A list of strings, the first `most` of them.  Raises `LinkFault` where it is something else."""
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise LinkFault(f"{FRAME_NAMES[self.kind]}: {name} is not a list of strings")
        return value[:most]

    def number(self, name: str, default: float, most: float) -> float:
        """A number field, at least 0 and at most `most`.  Raises `LinkFault` where it is something else."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise LinkFault(f"{FRAME_NAMES[self.kind]}: {name} is not a number from 0")
        return min(value, most)


_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def encode_frame(kind: int, fields: dict[str, Any] | None = None) -> bytes:
    """The bytes of a control frame.  Raises `ValueError` where the body is longer than `MAX_CONTROL`."""
    body = _encode_json(fields).encode() if fields else b""
    if len(body) > MAX_CONTROL:
        raise ValueError(f"{FRAME_NAMES[kind]} of {len(body)} bytes is longer than {MAX_CONTROL}")
    return encode_header(kind, len(body)) + body


def encode_header(kind: int, length: int) -> bytes:
    """The four bytes before a frame's body."""
    return HEAD.pack(kind << 24 | length)


def decode_fields(kind: int, body: bytes) -> dict[str, Any]:
    """The JSON object of a control frame.  Raises `LinkFault`."""
    if not body:
        return {}
    # The decoder is recursive, and a thread's stack is small: no frame has a reason to nest.
    if body.count(b"{") + body.count(b"[") > 32:
        raise LinkFault(f"{FRAME_NAMES[kind]}: too many brackets")
    try:
        fields = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LinkFault(f"{FRAME_NAMES[kind]}: the body is not JSON") from error
    if not isinstance(fields, dict):
        raise LinkFault(f"{FRAME_NAMES[kind]}: the body is not a JSON object")
    return fields


def new_nonce() -> str:
    return random_id(16)


def prove(
    token: bytes, role: str, client_nonce: str, server_nonce: str, service: str, client: str, certificate: str = ""
) -> str:
    """What `role` shows to prove that it knows the token: HMAC-SHA256 (RFC 2104), in hexadecimal.

    With the digest of the server's `certificate` it is good for that TLS connection alone: who stands in the middle and
    passes it on has another one (a channel binding, as tls-server-end-point of RFC 5929).  Each part is preceded by its
    length, so that no two lists of parts give the same message.
    """
    message = b""
    parts = "tcprelay link 1", role, client_nonce, server_nonce, service, client
    for part in (*parts, certificate) if certificate else parts:
        encoded = part.encode("utf-8", "surrogatepass")
        message += struct.pack("!I", len(encoded)) + encoded
    return hmac.new(token, message, hashlib.sha256).hexdigest()


def is_proof(given: str, expected: str) -> bool:
    """Compare in constant time; as bytes, since `hmac.compare_digest` refuses text outside ASCII."""
    return is_same(given.encode("utf-8", "surrogatepass"), expected.encode())


def is_same(given: bytes, expected: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given, expected)


PROXY = "the PROXY protocol"


def guess_protocol(start: bytes) -> str:
    """What a peer that does not speak the link protocol seems to speak, from its first bytes."""
    if start[:1] in (b"\x15", b"\x16") and (len(start) < 2 or start[1] == 3):  # an alert, or a handshake's beginning
        return "TLS"
    if start[:4] in (b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"PRI ", b"HTTP"):
        return "HTTP"
    if start[:4] == b"SSH-":
        return "SSH"
    if len(start) >= 4 and may_begin_header(start):
        return PROXY
    return "something else"
