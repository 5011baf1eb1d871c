"""The relay client: keeps idle links to the relay server, and connects them to services when they are started.

    tcprelayc --host localhost --port 22 --relay-host relay.example.net --relay-port 10080

What it is made of: a `Stock` that counts its links and knows how many are missing, a `Greeting` that opens one, and
`Links` that answer on them.  Threads, beside the second one of each connection that lasts:

    keeper     opens links where some are missing, sweeps over the connections: see `Links`
    links      one each, from dialling to its end
    look-ups   one for each name at most, while a name server is asked; blocks in getaddrinfo, which nothing ends
               early, so it is not joined: see `Name`

With --workers, each worker process is a `RelayClient` that keeps its share of the links: see `ClientWorkers`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from _tcprelay.addresses import Endpoint
from _tcprelay.client.branches import Branch, Branches
from _tcprelay.client.checks import Checks
from _tcprelay.client.greeting import Greeting, load_credentials
from _tcprelay.client.links import Links
from _tcprelay.client.loops import OwnConnections
from _tcprelay.client.stock import MOST_HANDSHAKES, Service, Stock
from _tcprelay.client.workers import ClientWorkers
from _tcprelay.command import run_command
from _tcprelay.events import Event, Published, Unpublished
from _tcprelay.client_options import ClientOptions
from _tcprelay.options import make_options
from _tcprelay.role import Relay, warn_about_secrets
from _tcprelay.runtime import Credentials, Runtime
from _tcprelay.status.report import ServiceStatus, Status
from _tcprelay.system import from_descriptor_limit
from _tcprelay.text import random_id
from _tcprelay.values import Publication
from _tcprelay.waiting import Deadline

__all__ = ["ClientOptions", "Publication", "RelayClient", "create_relay_client", "main"]

REFUSED_STATUS = 3
"""What the command ends with where the relay server refuses it, and --exit-on-refusal is given."""
USAGE = """tcprelayc RELAY_HOST:PORT SERVICE... [options]

The relay client, for a host behind a NAT: it makes services that it can reach
available at the relay server. A service is PORT, HOST:PORT or unix:PATH, or with
its name NAME=HOST:PORT. For example:

  tcprelayc relay.example.net:10080 22 --tls --token-file FILE
      what the relay server said at its start, with the port of the service
  tcprelayc --relay-host relay.example.net --relay-port 10080 --port 22
      the same in full; each option can stand in the environment or a file, too
  tcprelayc --config FILE --check
      what the configuration comes to
  tcprelayc status
      what one that runs is doing, with options of its own: tcprelayc status --help"""


class RelayClient(Relay[ClientOptions]):
    """A relay client.

    Parameters: where the service is (``host`` may be ``unix:PATH``), where the relay server is (each host may have its
    port behind it, ``"relay.example.net:10080"``), how many idle links to keep; ``on_event``, which is called with each
    `tcprelay.Event` in the thread where it happens and must not block; and every option of ``tcprelayc`` by its name
    with underscores (``token="…"``), times in seconds.  ``publish=`` takes strings (``"web=localhost:80"``) or
    `Publication` objects.

    Raises `ValueError` for options that do not fit, and `OSError` where the token file cannot be read.
    """

    FIRST_PROCESSOR, NEXT_PROCESSOR = -1, -1  # the last first: on one host with a relay server, that has the others

    def __init__(
        self,
        host: str = "localhost",
        port: int | None = None,
        relay_host: str = "",
        relay_port: int | None = None,
        num_conn: int = 8,
        *,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> None:
        given = {"host": host, "port": port, "relay_host": relay_host, "relay_port": relay_port, "num_conn": num_conn}
        checked = make_options(ClientOptions, **given, **options)
        super().__init__(Runtime("tcprelay.client", checked, checked.max_conn, on_event))
        self._id = random_id(8)
        self._own = OwnConnections()
        self._refuses: dict[str, bool] = {}
        """Whether each relay server refuses this client, as far as it has been told of."""
        self._checks = Checks(self.runtime)
        self.runtime.emit.listener = self._obey_refusal
        self._become_one_of(0, 1)

    def _become_one_of(self, number: int, count: int) -> None:
        """Keep the share of the links that falls to one process of so many."""
        options, runtime = self.options, self.runtime
        self._worker, self._count_of_workers = number, count
        self._most_idle = self._share(options.num_conn)
        if options.max_conn:
            runtime.places.most = self._share(options.max_conn)
        self._branches = Branches(runtime, self._make_branch, self._make_services)

    def _share(self, whole: int) -> int:
        """What falls to this process of so many that the role has."""
        count = self._count_of_workers
        return whole // count + (self._worker < whole % count)

    def _make_services(self, publications: list[Publication]) -> list[Service]:
        """Those of a relay server."""
        return [Service(one, self._most_idle, self._count_of_workers) for one in publications]

    def _make_branch(self, relay: Endpoint, called: Endpoint, branches: Branches) -> Branch:
        """The stock of links to one relay server, and what opens them."""
        services, handshakes = self._make_services(self.options.services), max(1, self._share(MOST_HANDSHAKES))
        stock = Stock(services, self._most_idle, self.runtime.places, handshakes, branches.condition)
        greeting = Greeting(self.runtime, relay, called, self._most_idle, self._id, self._worker)
        return Branch(relay, called, stock, Links(self.runtime, stock, greeting, self._id, self._own))

    def _apply(self, options: ClientOptions, credentials: Credentials) -> None:
        names = {service.name for service in options.services}
        gone = [service.name for service in self.options.services if service.name not in names]
        with self._branches.changing:
            fresh = self._branches.missing(options.services) if self._started and not self._closed else []
            super()._apply(options, credentials)
            self._branches.replace(options.services, fresh)
        self._checks.renew()
        self.runtime.places.most = self._share(options.max_conn) if options.max_conn else from_descriptor_limit()
        if not self.runtime.is_worker:
            for name in gone:
                self.runtime.log.info("service %s is published no more", name)

    @property
    def counters(self) -> dict[str, int]:
        """What has been counted since the start: ``connections``, ``failed``, ``broken``, ``bytes_in`` and
        ``bytes_out``; and how many there are now: ``open`` connections and ``links_idle``."""
        return {**self._count(), "links_idle": self._branches.count_idle()}

    ROLE = "client"

    def _survey(self) -> tuple[Status, dict[str, str]]:
        services, relays = self._branches.survey()
        if not services:  # before the start, and in the parent of workers
            services = tuple(
                ServiceStatus(name=one.name, target=str(one.target), is_published=True) for one in self.options.services
            )
        return Status(role=self.ROLE, address=self._say_relays(), services=services, relays=relays), {}

    def _say_relays(self) -> str:
        return ", ".join(map(str, self.options.relays))

    def wait_until_published(self, timeout: float | None = None) -> None:
        """Wait until all services have links to a relay server, for so many seconds at most (``None``: as long as it
        takes).  Raises `TimeoutError` that says why there are none, also where the client ends meanwhile, and
        `RuntimeError` before `start`."""
        if not self._started:
            raise RuntimeError("this relay client has not been started")
        if missing := self._branches.wait_until_published(Deadline(timeout)):
            raise TimeoutError(f"service {missing[0]} is not published at {self._say_relays()}: {missing[1]}")

    def _obey_refusal(self, event: Event) -> None:
        """For the command: end where all relay servers refuse this client, and that is asked for."""
        if isinstance(event, (Published, Unpublished)):
            self._refuses[event.relay] = isinstance(event, Unpublished) and event.lasting
        most = max(len(self.options.relays), self._branches.count())
        refused = all(self._refuses.values()) and len(self._refuses) >= most and self.options.exit_on_refusal
        if refused and self.signals is not None and not self.signals.status:
            self.runtime.log.error("ending, since no link can be had before something is changed (--exit-on-refusal)")
            self.signals.give_up(REFUSED_STATUS)

    def _load_credentials(self, options: ClientOptions) -> Credentials:
        return load_credentials(options)

    def _prepare(self) -> None:
        """Says where to, and warns of what is not secure.  No name is looked up here: at boot the name server may not
        answer yet."""
        options, log = self.options, self.runtime.log
        through = f" through the proxy {options.proxy}" if options.via else ""
        log.info("connecting to the relay at %s%s", self._say_relays(), through)
        warn_about_secrets(self.runtime)
        if options.tls in ("relay", "both") and not options.reject_unauthorized and not options.pin:
            log.warning("--reject-unauthorized false: whoever is on the way can pose as the relay server")
        if options.tls in ("both", "service") and options.service_insecure:
            log.warning("--service-insecure: whoever is on the way can pose as the service")

    def _open(self) -> None:
        """Begin to open links."""
        if not self.runtime.is_worker:
            self.prepare()
        self._own_threads.append(keeper := self._branches.begin())
        self._checks.begin(self._branches, self._worker == 0)
        keeper.start()

    def obey(self, order: dict[str, Any]) -> None:
        self._checks.obey(order)

    def _stop_intake(self) -> None:
        self._checks.end()
        self._branches.end()

    def _wake_all(self) -> None:
        self._branches.wake_all()

    def _close(self) -> None:
        super()._close()
        self._branches.close()

    def make_workers(self, count: int) -> ClientWorkers | None:
        """As many as there are idle links to keep, at most.  With --max-conn there are none by default: one process
        may need what another has left."""
        options = self.options
        if options.max_conn and options.workers is None:
            return None
        count = min(count, options.num_conn, options.max_conn or count)
        return ClientWorkers(self, count, self._become_one_of) if count > 1 else None


def create_relay_client(
    host: str, port: int, relay_host: str, relay_port: int, num_conn: int = 1, **options: Any
) -> RelayClient:
    """A `RelayClient` that has been started, as node-tcp-relay's ``createRelayClient``.  Raises `OSError`."""
    return RelayClient(host, port, relay_host, relay_port, num_conn, **options).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelayc``.  Returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["status"]:
        from _tcprelay.status.looking import main as look  # which no relay needs

        return look("tcprelayc", ["client"], words[1:])
    return run_command("tcprelayc", USAGE, ClientOptions, lambda options: RelayClient(**options.as_arguments()), argv)


if __name__ == "__main__":
    sys.exit(main())
