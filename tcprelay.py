"""tcprelay: exposes any TCP service behind a NAT.

    service client ──▶ service port ┐                              ┌ dials ──▶ service
    (anywhere)                      │ relay server ◀══ link ══ relay client   (behind the NAT)
                        relay port ─┘ (public host)                └ keeps idle links in a pool

A relay client keeps a pool of idle links to a relay server. When a service client connects to a service
port, the server pairs it with an idle link, the client dials the service, and the two are spliced until
both directions have ended; then the link goes back to the pool.

A program that embeds a relay needs the standard library alone:

    with tcprelay.RelayServer(10080, 10081, token="…") as server: ...
    with tcprelay.RelayClient("localhost", 22, "relay.example.net", 10080, token="…") as client: ...

The public names:

    RelayServer, create_relay_server     the relay server; the latter begins at once, as node-tcp-relay's does
    RelayClient, create_relay_client     the relay client, likewise
    Relay                                what both are: start, end, reload, status, counters, options
    Status                               what `Relay.status` gives; and its parts:
    ServiceStatus, ClientStatus          a service; a relay client that is connected
    ConnectionStatus, EventStatus        an open connection; something that has happened
    FailureStatus, HistogramStatus       the last failure of a service; how long something has taken
    PartyStatus, ProcessStatus           what was carried for whom; what the processes take
    ServerOptions, ServicePort           what `RelayServer.options` is: all options, as the commands have them
    ClientOptions, Publication, Endpoint what `RelayClient.options` is

    Event                                what ``on_event`` is called with: the base of the ones that follow
    Listening, AcceptPaused              a relay server's: its ports
    ClientUp, ClientDown                 its relay clients
    LinkRefused, LinkNotMade             a connection that did not become a link there
    ServiceUnserved                      a service client waits, and no relay client is connected
    Published, Unpublished               a relay client's: whether its service can be reached through the relay
    ServiceUnreachable                   the service behind it could not be reached when it was tried
    ServiceDown, ServiceBack             its check fails, so it is withdrawn from the relay; it succeeds again
    LinkUp, LinkDown                     of both: a link
    ConnectionOpened, ConnectionClosed   a connection; the latter is its closing record
    ConnectionFailed                     one that was never opened
    Draining                             the end has begun

The command ``tcprelay server …`` or ``tcprelay client …``, also as ``python3 -m tcprelay``, is another way to say
tcprelays and tcprelayc; ``tcprelay status`` says what those that run are doing.  What all this stands on is in
`_tcprelay`, which may change at any time.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (RHEL 9's python3, of a source tree, which nothing else has checked)
    raise ImportError(f"tcprelay needs Python 3.10 or later, and this is {sys.version_info[0]}.{sys.version_info[1]}")

from collections.abc import Sequence

import tcprelay_client
import tcprelay_server
from _tcprelay import __version__
from _tcprelay.addresses import Endpoint
from _tcprelay.events import (
    AcceptPaused, ClientDown, ClientUp, ConnectionClosed, ConnectionFailed, ConnectionOpened, Draining, Event, LinkDown,
    LinkNotMade, LinkRefused, LinkUp, Listening, Published, ServiceBack, ServiceDown, ServiceUnreachable,
    ServiceUnserved, Unpublished,
)  # fmt: skip
from _tcprelay.logs import fail
from _tcprelay.client_options import ClientOptions
from _tcprelay.server_options import ServerOptions
from _tcprelay.role import Relay
from _tcprelay.status.report import (
    ClientStatus, ConnectionStatus, EventStatus, FailureStatus, HistogramStatus, PartyStatus, ProcessStatus,
    ServiceStatus, Status,
)  # fmt: skip
from _tcprelay.text import shown
from _tcprelay.values import Publication, ServicePort
from tcprelay_client import RelayClient, create_relay_client
from tcprelay_server import RelayServer, create_relay_server

__all__ = [
    "AcceptPaused", "ClientDown", "ClientOptions", "ClientStatus", "ClientUp", "ConnectionClosed", "ConnectionFailed",
    "ConnectionOpened", "ConnectionStatus", "Draining", "Endpoint", "Event", "EventStatus", "FailureStatus",
    "HistogramStatus", "LinkDown", "LinkNotMade", "LinkRefused", "LinkUp", "Listening", "PartyStatus", "ProcessStatus",
    "Publication", "Published", "Relay", "RelayClient", "RelayServer", "ServerOptions", "ServiceBack", "ServiceDown",
    "ServicePort", "ServiceStatus", "ServiceUnreachable", "ServiceUnserved", "Status", "Unpublished", "__version__",
    "create_relay_client", "create_relay_server",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelay server …``, ``… client …`` or ``… status …``.  Returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["server"]:
        return tcprelay_server.main(words[1:])
    if words[:1] == ["client"]:
        return tcprelay_client.main(words[1:])
    if words[:1] == ["status"]:
        from _tcprelay.status.looking import main as look  # which no relay needs

        return look("tcprelay", ["server", "client"], words[1:])
    if words[:1] in (["-h"], ["--help"]):
        print("tcprelay server|client|status [options]: the commands tcprelays and tcprelayc, and what those that run "
              "are doing; each has --help")  # fmt: skip
        return 0
    if words[:1] in (["-V"], ["--version"]):
        print(f"tcprelay {__version__}")
        return 0
    unknown = f"unknown word {shown(words[0])}: " if words else ""
    return fail("tcprelay", 2, f"{unknown}say server, client or status, as in tcprelay server --help")


if __name__ == "__main__":
    sys.exit(main())
