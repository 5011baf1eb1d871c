"""What is answered over HTTP, and to whom; no I/O.

    GET /               the page for people
    GET /status.json    the status, as `report.as_dict` has it
    GET /metrics        the metrics, in the format that is asked for
    GET /healthz        whether the role does its work: 200 or 503; with ?service=NAME also whether that can be reached

All of it is read-only.  Over TCP a browser on this host could be led here by any page that it shows: so requests must
name this host by an address (a name could be made to mean it: DNS rebinding), or know the token; those that another
page has made are refused, and no page gets to read an answer but ours (no CORS header is ever sent).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import unquote

from ..protocol import is_same
from ..text import random_id, shown
from .metrics import content_type, render
from .page import page, security_policy
from .report import Status, as_dict

MOST_HEAD = 8192
"""Bytes of the longest request, its headers included."""
PAGES = ("/", "/status.json", "/metrics", "/healthz")
"""Read-only all of them."""
REALM = 'Basic realm="tcprelay: any user, and the status token", charset="UTF-8"'


@dataclass(frozen=True)
class Request:
    """What has been asked for."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """By their names in lower case."""
    version: str = "HTTP/1.1"
    services: tuple[str, ...] = ()
    """Those that are asked for: ?service=NAME."""


class Wrong(Exception):
    """A request that gets another answer than it has asked for."""

    def __init__(self, status: HTTPStatus, says: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(says)
        self.status = status
        self.headers = headers or {}

    def answer(self) -> bytes:
        return encode(self.status, "text/plain; charset=utf-8", f"{self}\n".encode(), self.headers)


TOO_LONG = Wrong(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"A request has {MOST_HEAD:,} bytes at most.")
FAILED = Wrong(HTTPStatus.INTERNAL_SERVER_ERROR, "No status could be made: the log says why.")


def parse(head: bytes) -> Request:
    """A request from its head, up to the empty line.  Raises `Wrong`."""
    # By hand: http.client, which could do it, brings TLS along, and 4.9 MB (measured).
    first, *lines = head.decode("latin-1").split("\r\n")
    words, headers = first.split(" "), dict[str, str]()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Wrong(HTTPStatus.BAD_REQUEST, "This port speaks HTTP/1.1.")
    for line in filter(None, lines):
        name, colon, value = line.partition(":")
        name = name.lower()
        twice = name in headers and name in ("host", "origin", "authorization")  # it could mean two things
        if not colon or not name or name != name.strip() or twice:
            raise Wrong(HTTPStatus.BAD_REQUEST, "This port speaks HTTP/1.1.")
        headers[name] = ", ".join(filter(None, [headers.get(name), value.strip()]))
    path, _, query = words[1].partition("?")
    asked = (word.partition("=") for word in query.split("&"))
    services = tuple(unquote(value) if "%" in value else value for name, _, value in asked if name == "service")
    return Request(words[0], path, headers, words[2], services)


def admit(request: Request, token: bytes, is_local: bool) -> bool:
    """Whether a request may see all; False where it has to do with whether all is well.

    `is_local` is one over the Unix socket, whose file says who may.  Raises `Wrong` for those that may see nothing.
    """
    if request.path not in PAGES:
        raise Wrong(HTTPStatus.NOT_FOUND, f"There is {', '.join(PAGES)}.")
    if request.method not in ("GET", "HEAD"):
        raise Wrong(HTTPStatus.METHOD_NOT_ALLOWED, "Nothing can be changed here.", {"Allow": "GET, HEAD"})
    if is_local:
        return True
    host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
    fetch = request.headers.get("sec-fetch-site", ""), request.headers.get("sec-fetch-mode", "")
    if (fetch[0] == "cross-site" and fetch[1] != "navigate") or (origin and origin.partition("://")[2] != host):
        raise Wrong(HTTPStatus.FORBIDDEN, "Another page may not ask.")
    if token:
        if is_same(given_token(request.headers.get("authorization", "")), token):
            return True
        if request.path == "/healthz":
            return False
        raise Wrong(
            HTTPStatus.UNAUTHORIZED, "The status token is asked for, as a password or a bearer token.",
            {"WWW-Authenticate": REALM},
        )  # fmt: skip
    # HAProxy's checks speak HTTP/1.0 without it, which no browser does.
    if not (is_address(host) or (not host and request.version == "HTTP/1.0")):
        raise Wrong(HTTPStatus.MISDIRECTED_REQUEST, "Name this host by its address, or have it ask for a status token.")
    return True


def given_token(authorization: str) -> bytes:
    """The token in a header: a bearer token (RFC 6750), or a password (RFC 7617), whatever the user's name."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            pass
    return b""


def is_address(host: str) -> bool:
    """Whether the Host of a request is an address, or localhost: none that somebody can have another name mean."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name.lower() == "localhost"
    return True


def answer(request: Request, status: Status, sees_all: bool) -> bytes:
    """The answer to a request that may have one."""
    if request.path == "/healthz":
        problems = [*status.problems, *(why for name in request.services if (why := say_unreachable(status, name)))]
        code = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
        said = problems if sees_all else []
        text = "\n".join(said or ["not well" if problems else "well"]) + "\n"
        whole = encode(code, "text/plain; charset=utf-8", text.encode())
    elif request.path == "/metrics":
        kind, is_open = content_type(request.headers.get("accept", ""))
        whole = encode(HTTPStatus.OK, kind, render(status, is_open).encode())
    elif request.path == "/status.json":
        whole = encode(HTTPStatus.OK, "application/json", json.dumps(as_dict(status)).encode())
    else:
        nonce = random_id(16)
        policy = {"Content-Security-Policy": security_policy(nonce)}
        whole = encode(HTTPStatus.OK, "text/html; charset=utf-8", page(nonce), policy)
    return whole if request.method == "GET" else whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def say_unreachable(status: Status, name: str) -> str:
    """Why service clients of a service cannot be served, "" where they can: for what stands before several relay
    servers, of which one that has just been started has no relay clients yet."""
    service = next((service for service in status.services if service.name == name), None)
    if service is None:
        return f"there is no service {shown(name, 64)}"
    return f"service {service.name}: {service.problem}" if service.problem else ""


def encode(status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> bytes:
    """A whole answer, after which the connection is closed."""
    headers = {
        "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        **(more or {}),
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
