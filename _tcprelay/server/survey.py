"""What a relay server knows of its services and relay clients, for its status.

With workers the parent has the ports, and each worker the links that it was given; put together they are the whole.  A
link is idle while it is in the pool, whether it is given out now or not, and busy otherwise: also in the last step of
its handshake, and while the keeper looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..addresses import show_address
from ..carried import Carried
from ..status.report import ClientStatus, PartyStatus, ServiceStatus, Status, merge
from ..watch import in_batches
from .pool import Pool
from .pooled import Member, PooledLink


def survey_ports(addresses: Mapping[str, tuple[str, int]], waiting: Mapping[str, int]) -> Status:
    """What is known where ports are listened on: the services, in the order of their ports' beginning, and how many
    service clients wait for each before anybody serves them."""
    services = [
        ServiceStatus(name=name, address=show_address(address), is_published=True, waiting=waiting.get(name, 0))
        for name, address in dict(addresses).items()  # relay clients come and go meanwhile, and some with their ports
        if name
    ]
    address = show_address(addresses[""]) if "" in addresses else ""
    return Status(role="server", address=address, services=tuple(services))


def survey_pool(pool: Pool, known: Status) -> tuple[Status, dict[str, str]]:
    """The same with the links of this process, and which relay client carries each connection, by its id."""
    members, idle, waiting = pool.survey()
    vias: dict[str, str] = {}
    clients = tuple(show_client(*one, idle, vias) for one in members)
    rows = [
        ServiceStatus(name=name, waiting=count, problem=f"withdrawn by its relay client: {why}" if why else "")
        for name, count in waiting.items()
        for why in [pool.say_withdrawn(name)]
    ]
    rows += [
        ServiceStatus(name=client.service, links_idle=client.links_idle, links_busy=client.links_busy)
        for client in clients
        if client.links_idle or client.links_busy
    ]
    # What counts for a relay client begins at nothing when it has connected, and not with its first connection.
    names = dict.fromkeys((links[0].service, links[0].known_as) for *_, links in members if links)
    parties = tuple(PartyStatus(service=service, name=name) for service, name in names if name)
    return merge(known, Status(services=tuple(rows), clients=clients, parties=parties)), vias


def show_client(
    service: str, client: str, member: Member, links: list[PooledLink], idle: set[PooledLink], vias: dict[str, str]
) -> ClientStatus:
    """A relay client, with its links for one service; notes in `vias` which connections it carries.

    It may have none in this process any more, and some in others: those alone would not show that the others have
    ended.
    """
    known = ClientStatus(
        service=service, id=client, since=member.since, linked=member.linked, unlinked=member.unlinked
    )  # fmt: skip
    if not links:
        return known
    carried, first, count = Carried(), links[0], 0
    carried.add_all(member.carried)
    for batch in in_batches(links):
        for pooled in batch:
            carried.add_all(pooled.carried)
            count += pooled in idle
            if splice := pooled.splice:
                carried.add(splice)
                vias[splice.id] = f"{pooled.name} at {pooled.host}"
    return replace(
        known, name=first.name, address=first.host, proof=first.proof, problem=member.recent_problem,
        links_idle=count, links_busy=len(links) - count, opened=carried.opened, broken=carried.broken,
        bytes_in=carried.to_link, bytes_out=carried.from_link,
    )  # fmt: skip
