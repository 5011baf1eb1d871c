"""Connections that come through a proxy: who is believed when they begin with a PROXY protocol header, and reading it.

It is read in the thread that serves the connection, before TLS and before anything is spent on it.  Silent ones are
bounded as handshakes are, in whose number they count under the proxy's address.

    origin    what its header says of a connection, waited for
    glance    what a header says that has come already: for the record of a connection that is refused unread
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ..addresses import Network, is_among
from ..proxy_header import HeaderFault, HeaderParser
from ..runtime import Runtime
from ..server_options import ServerOptions
from ..streams import Stream
from ..text import say_error
from ..waiting import Deadline, Stopping, wait_for
from .clients import Refusal, ServiceClient
from .greeting import HANDSHAKE_STEP
from .limits import TOO_MANY_HANDSHAKES, Handshakes

PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)


class Unsaid(Refusal):
    """A proxy has connected, and closed without a byte: a health check.  Nobody is to be told."""


class Proxies:
    """Finds out where connections really come from.

    Parameters: the runtime; the handshakes under way, which a connection counts among until its header is there; and
    why an address may not connect to a service, or to the relay port under "".
    """

    def __init__(
        self, runtime: Runtime[ServerOptions], handshakes: Handshakes, refuses: Callable[[str, Any], str]
    ) -> None:
        self._runtime = runtime
        self._handshakes = handshakes
        self._refuses = refuses

    @property
    def _networks(self) -> Sequence[Network]:
        return self._runtime.options.accept_proxy_protocol

    def origin(self, service: str, sock: socket.socket, address: Any) -> tuple[Any, int]:
        """Where a connection from this address to a service, or to the relay port under "", really comes from, and how
        many bytes of it said so.

        That is the address itself, after 0 bytes, unless it is a proxy's that is believed; then the header is waited
        for, up to `HANDSHAKE_STEP`.  Raises `Refusal`.
        """
        if not is_among(address, self._networks):
            return address, 0
        ticket, parser = Stream(sock, "proxy", address), HeaderParser()
        kind: type[Refusal] = Refusal
        self._handshakes.enter(ticket)
        try:
            self._read(sock, parser)
        except TimeoutError:
            reason = f"nothing, or a part of one, within {HANDSHAKE_STEP:g} s"
        except Stopping:
            raise Refusal("the relay server is ending", "draining") from None
        except HeaderFault as error:
            reason = str(error)
        except (OSError, EOFError) as error:
            reason, kind = say_error(error), Refusal if parser.count else Unsaid
        finally:
            kept = self._handshakes.leave(ticket)
        if not kept:
            raise Refusal(TOO_MANY_HANDSHAKES, "lost")
        if parser.is_whole:
            # From here on this is the address.
            return parser.source or address, parser.count
        raise kind(f"no PROXY protocol header came; {reason} (--accept-proxy-protocol names its address)", "protocol")

    def introduce(self, client: ServiceClient) -> None:
        """The same for a service client, which knows it afterwards.  Raises `Refusal`."""
        if not self._networks or client.introduced:  # as another worker has done
            return
        if is_among(client.address, self._networks):
            client.introduce(*self.origin(client.service, client.stream.sock, client.address))
            if reason := self._refuses(client.service, client.origin):
                self.judge(reason, client.address, client.origin)
        else:
            client.be_wary()

    def judge(self, reason: str, address: Any, origin: Any) -> None:
        """Raises `Refusal` with the reason; a proxy that has come for nobody it names, as to see whether somebody
        listens, is not worth a word."""
        raise Unsaid(reason, "address") if origin == address else Refusal(reason, "address")

    def glance_at(self, client: ServiceClient) -> None:
        """For the record of a service client that is refused before that."""
        if not client.introduced:
            client.introduce(glance(client.stream.sock, client.address, self._networks), 0)

    def _read(self, sock: socket.socket, parser: HeaderParser) -> None:
        """Read a header, and not a byte more: what there is is looked at first, and what belongs to the header taken.
        Raises `OSError`, `EOFError`, `TimeoutError`, `Stopping`."""
        deadline = Deadline(HANDSHAKE_STEP)
        while not parser.is_whole:
            wait_for(sock.fileno(), select.POLLIN, deadline, self._runtime.stop)
            try:
                piece = sock.recv(parser.room, PEEK)
            except BlockingIOError:
                continue
            if not piece:
                raise EOFError("the connection was closed")
            sock.recv(parser.feed(piece))


def glance(sock: socket.socket, address: Any, networks: Sequence[Network]) -> Any:
    """Where a connection comes from, as far as its header is here already; nothing of it is taken."""
    if not is_among(address, networks):
        return address
    parser = HeaderParser()
    try:
        parser.feed(sock.recv(parser.room, PEEK))
    except (OSError, HeaderFault):
        return address
    return parser.source or address
