"""The way to a relay server: straight, or through a proxy that connects on (``--via``).

What is said to a proxy is in `Tunnel`; here are its socket, and the time that all of it may take.
"""

from __future__ import annotations

import os
import select
import socket

from ..addresses import Endpoint
from ..sockets import Dialer
from ..streams import Stream
from ..tcp import Probing
from ..text import say_error
from ..tunnel import Proxy, ProxyFault, Tunnel, open_tunnel, parse_proxy
from ..waiting import Deadline, Stop, Stopping, wait_for

PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
PIECE = 4096
"""Bytes of an answer that are looked at at once."""


class WayOut:
    """Connects to one relay server again and again, through a proxy where there is one.

    Parameters: the relay server; the proxy, or ``None``; and how the next socket is connected, as for `Dialer`: within
    so many seconds, which are for all of it, with this probing, and tried once more after `again` seconds.
    """

    def __init__(self, relay: Endpoint, proxy: Proxy | None, timeout: float, probing: Probing, again: float) -> None:
        self._relay = relay
        self._proxy = proxy
        self._timeout = timeout
        self.dialer = Dialer(proxy.endpoint if proxy else relay, timeout, probing, again)

    def dial(self, stop: Stop) -> tuple[socket.socket, int]:
        """A connection that leads to the relay server, and how many bytes a proxy has sent on it before those of the
        relay server.  Raises `OSError`, `ProxyFault` where it is the proxy's matter, and `Stopping`."""
        if self._proxy is None:
            return self.dialer.dial(stop), 0
        deadline, tunnel = Deadline(self._timeout), open_tunnel(self._proxy, self._relay)
        try:
            sock = self.dialer.dial(stop)
        except Stopping:
            raise
        except OSError as error:
            hint = "; is it running?" if isinstance(error, ConnectionRefusedError) else ""
            raise ProxyFault(f"cannot reach the proxy {self._proxy}: {say_error(error)}{hint}") from None
        try:
            self._pass(sock, tunnel, deadline, stop)
        except BaseException:
            sock.close()
            raise
        return sock, tunnel.count

    def _pass(self, sock: socket.socket, tunnel: Tunnel, deadline: Deadline, stop: Stop) -> None:
        """Have the proxy connect on.  Raises `ProxyFault` and `Stopping`."""
        try:
            stream = Stream(sock, "proxy")
            stream.send(tunnel.begin())
            while not tunnel.is_open:
                wait_for(sock.fileno(), select.POLLIN, deadline, stop)
                try:
                    piece = sock.recv(PIECE, PEEK)
                except BlockingIOError:
                    continue
                if not piece:
                    raise EOFError("it has closed the connection")
                taken, out = tunnel.feed(piece)
                sock.recv(taken)
                stream.send(out)
        except (ProxyFault, Stopping):
            raise
        except (OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                why = f"nothing within {self._timeout:g} s; it hangs, or does not reach {self._relay} itself"
            else:
                why = say_error(error)
            part = "only a part of an answer" if tunnel.is_amid else "no answer"
            raise ProxyFault(f"{part} from the proxy {self._proxy}: {why}") from None


def say_proxy_of_environment(host: str) -> str:
    """For the log, where a host cannot be reached: that the environment has a proxy for programs that heed it; "" where
    it has none, or not for this host.  Nothing secret is in it."""
    name = next((name for name in VARIABLES if os.environ.get(name)), "")
    spared = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").lower().replace(",", " ").split()
    if not name or any(one == "*" or f".{host.lower()}".endswith(f".{one.lstrip('.')}") for one in spared):
        return ""
    try:
        which = f" ({parse_proxy(os.environ[name])})"
    except ValueError:
        which = ""
    return f"the environment has a proxy in {name}{which}, and it is not used unasked: --via names one for the links"


VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""Where other programs find the proxy for connections that it does not look into; the first one counts."""
