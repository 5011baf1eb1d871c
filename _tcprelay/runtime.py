"""What the parts of a role stand on: its options, credentials, log, threads and places."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from .events import Event
from .messages import encode_message, send_message
from .options import OptionsT
from .rights import Rights
from .system import from_descriptor_limit
from .tcp import Probing
from .telling import Events
from .threads import Threads
from .waiting import Stop
from .watch import Places, Pulse, Splices

if TYPE_CHECKING:  # by its own name: dataclasses would look into a module, which imports it
    from ssl import SSLContext

    from .certificates import Offers
    from .hello import Faces


@dataclass(frozen=True)
class Credentials:
    """What a role read from its files: replaced as a whole when they are read again."""

    token: bytes = field(default=b"", repr=False)
    links: SSLContext | None = None
    """For TLS on the links; ``None`` for plain ones."""
    ports: Mapping[str, Faces] | None = None
    """On a relay server: for TLS on the service ports, by services, "" for those that are not named; ``None`` for plain
    ones."""
    services: Offers | None = None
    """On a relay client: for TLS to services; ``None`` for plain connections."""
    unverified: SSLContext | None = None
    """On a relay client: for TLS with a server whose certificate is not verified itself, since the token's proof covers
    it (see `protocol.prove`), or it is pinned; ``None`` where there is no such server."""
    token_vouches: bool = False
    """On a relay client: the former holds, for all servers that are not pinned."""
    rights: Rights | None = None
    """On a relay server: who may do what; ``None`` where all who may come may do all."""
    status_token: bytes = field(default=b"", repr=False)
    """What is asked for where the status is."""
    certificate: str = ""
    """The digest of the certificate that a relay server shows on its links, as a pin."""
    service_certificates: tuple[str, ...] = ()
    """Those of the certificates that it shows on its service ports."""

    def faces_of(self, service: str) -> Faces | None:
        """What the port of a service shows; ``None`` where it speaks no TLS."""
        return self.ports.get(service, self.ports[""]) if self.ports else None


class Runtime(Generic[OptionsT]):
    """What the parts of a role stand on, each of which is made with it.

    Parameters: the logger's name, the options, how many places there are (0 is what the limit on descriptors allows),
    and ``on_event``.
    """

    stop: Stop
    """Requested when the end begins: nothing new is begun, and handshakes are cut short."""
    cut: Stop
    """Requested at the drain deadline: whatever still waits for something is cut short."""

    def __init__(
        self, logger: str, options: OptionsT, most: int = 0, on_event: Callable[[Event], object] | None = None
    ) -> None:
        self.options = options
        self.log = logging.getLogger(logger)
        self.emit = Events(self.log, on_event)
        self.credentials = Credentials()
        self.threads = Threads()
        self.probing = Probing(options.keepalive, options.dead_path)
        self.places = Places(most or from_descriptor_limit())
        self.pulse = Pulse()
        self.is_ending = False
        """The end has begun, in this process or in the workers of this one."""
        self.splices = Splices(options.idle_timeout, options.half_close_timeout, options.dead_path, self.probing)
        self._channel: socket.socket | None = None
        """In a worker process, to its parent; see `_tcprelay.processes`."""

    def begin(self) -> None:
        """Make what threads wait on; in a worker that is not before the fork.  Raises `OSError`, and leaves nothing."""
        self.stop = Stop()
        try:
            self.cut = Stop()
        except BaseException:
            self.stop.close()
            raise

    def close(self) -> None:
        """Give that back, when there are no threads any more."""
        self.stop.close()
        self.cut.close()

    def own_thread(self, life: Callable[[], None], name: str, until: Stop) -> threading.Thread:
        """A thread that lives as long as the role, and whose life has to say so: see `Pulse`.  No unexpected error
        ends it: its life begins anew."""

        def live() -> None:
            self.pulse.beat(name)
            while not until.requested:
                try:
                    life()
                except Exception:
                    self.log.exception("unexpected error in the %s", name)
                    until.wait(1.0)
            self.pulse.stop(name)

        return threading.Thread(target=live, name=f"{self.log.name} {name}", daemon=True)

    # In a worker process

    @property
    def is_worker(self) -> bool:
        return self._channel is not None

    def become_worker(self, channel: socket.socket) -> None:
        """Have a parent at the other end of the channel: it hears of the events that are about the role as a whole."""
        self._channel = channel
        self.emit.begin_anew()
        self.emit.pass_on = lambda event: self.tell_parent({"event": type(event).__name__, "fields": asdict(event)})

    def tell_parent(self, message: dict[str, Any]) -> None:
        """Send the parent a message; any thread.  Where it is gone, so is this process soon."""
        with contextlib.suppress(OSError):
            self.send_to_parent(encode_message(message))

    def send_to_parent(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """The same with descriptors, of an encoded message.  Raises `OSError`."""
        assert self._channel is not None
        send_message(self._channel, message, descriptors)


SHORTEST_TOKEN = 16
"""Characters below which a token is warned of, and is no proof of whom one speaks with: who has a handshake can try as
many as he likes."""
