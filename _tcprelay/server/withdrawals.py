"""Services that their relay clients have withdrawn: they are there, and say in BYE that the service is down.

Where all of them have, a service client is refused at once: it would wait for a link in vain.  What one has said holds
for as long as it says, or until it has a new link.  Where one is gone without a word it may be back any moment, so
service clients wait again as if nothing had been said.

Only who has no links can be asked for none: so nothing here needs to know whether a relay client is still there.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable

LONGEST = 3600.0
"""Seconds for which a relay client is believed at most."""
LONGEST_REASON = 240
"""Characters of what it says of it."""
MOST_CLIENTS = 1024
"""Relay clients that are remembered for each service; of more the oldest are forgotten."""


def has_other(service: str, clients: Container[str], present: Iterable[tuple[str, str]]) -> bool:
    """Whether beside these relay clients one has links of a service, of all that are `present`."""
    return any(name == service and client not in clients for name, client in present)


class Withdrawals:
    """Which relay clients have withdrawn which services.  Not for several threads at once."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, tuple[float, str]]] = {}
        """By service and relay client: until when that holds, and why."""

    def note(self, service: str, client: str, seconds: float, reason: str) -> None:
        """A relay client has withdrawn a service, which holds for so many seconds."""
        said = self._said.setdefault(service, {})
        said.pop(client, None)
        said[client] = time.monotonic() + min(seconds, LONGEST), reason[:LONGEST_REASON]
        if len(said) > MOST_CLIENTS:
            del said[next(iter(said))]

    def forget(self, service: str, client: str = "") -> None:
        """It has a new link for it; or, without a relay client, nothing holds any more that was said of the service."""
        if client:
            self._said.get(service, {}).pop(client, None)
        else:
            self._said.pop(service, None)

    def leave(self, service: str, client: str) -> None:
        """It has no links any more."""
        if client not in self._said.get(service, {}):
            self.forget(service)

    def is_said(self, service: str) -> bool:
        """Whether any relay client has said so of a service."""
        return bool(self._said.get(service))

    def services(self) -> list[str]:
        """Those of which any relay client has said so."""
        return [service for service, said in self._said.items() if said]

    def why(self, service: str, present: Iterable[tuple[str, str]]) -> str:
        """Why a service is withdrawn by all its relay clients, "" where it is not.  Those that are `present` have links
        still, each for a service."""
        if not (said := self._said.get(service)):
            return ""
        now = time.monotonic()
        for client in [client for client, (until, _) in said.items() if until <= now]:
            del said[client]
        if not said or has_other(service, said, present):
            return ""
        return said[next(reversed(said))][1]
