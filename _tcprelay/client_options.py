"""The options of `RelayClient` and of ``tcprelayc``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .addresses import Endpoint, parse_endpoint, parse_host, parse_place, parse_port, split_place
from .options import Options, repeated
from .tunnel import Proxy, parse_proxy, parse_via, show_via
from .values import (
    CheckPath, Pin, ProxyProtocol, Publication, ServiceHost, ServiceProtocol, option, parse_check_path, parse_count,
    parse_flag, parse_further_relay, parse_interval, parse_path, parse_pin, parse_positive, parse_proxy_protocol,
    parse_publication, parse_relay, parse_service_host, parse_service_protocol, protocols_of,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClientOptions(Options):
    """The options of `RelayClient` and of ``tcprelayc``."""

    command = "tcprelayc"
    short_form = "the relay server and services, as in relay.example.net:10080 22 web=80"

    relay_host: str = option(
        "", parse_relay, "host of the relay server, with its port if you like",
        group="Addresses", metavar="HOST[:PORT]", spelling="relayHost", fixed=True)  # fmt: skip
    relay_port: int | None = option(
        None, parse_port, "port of the relay server for relay clients",
        group="Addresses", metavar="PORT", spelling="relayPort", fixed=True)  # fmt: skip
    relay: tuple[Endpoint, ...] = option(
        (), parse_further_relay, "a further relay server, with its port: links are kept to each, and the services are "
        "published at all of them; may be repeated",
        group="Addresses", metavar="HOST:PORT", many=True, fixed=True)  # fmt: skip
    relay_all: bool = option(
        False, parse_flag, "keep links to each address behind the names of relay servers, and look again every half "
        "minute which there are", group="Addresses", fixed=True)  # fmt: skip
    via: str = option(
        "", parse_via, "proxy through which the relay server is reached; with a password better given by file or "
        "environment", group="Addresses", metavar="http|socks5://[USER:PASSWORD@]HOST:PORT", secret=True,
        public=show_via, secures=True, fixed=True)  # fmt: skip
    host: str = option(
        "localhost", parse_place, "host of the service named default, with its port if you like, or unix:PATH",
        group="Addresses", metavar="HOST[:PORT]", spelling="host")  # fmt: skip
    port: int | None = option(
        None, parse_port, "port of the service named default",
        group="Addresses", metavar="PORT", spelling="port")  # fmt: skip
    service_port: int | None = option(
        None, parse_port, "port that the relay server is asked for, for the service named default; 0 is any free one",
        group="Addresses", metavar="PORT", shown_default="the server's own port for that service")  # fmt: skip
    publish: tuple[Publication, ...] = option(
        (), parse_publication, "a further service, by its name at the relay server; with @PORT behind it, on a port "
        "that the server is asked for, 0 being any; may be repeated",
        group="Addresses", metavar="NAME=[HOST:]PORT[@PORT]", many=True)  # fmt: skip
    try_service: bool = option(
        True, parse_flag, "connect to each service once when it is published, and warn where that fails; false for one "
        "that serves a single connection", group="Links", metavar="true|false")  # fmt: skip
    check_service: float = option(
        0.0, parse_interval, "seconds between two checks whether a service can be reached; while it cannot, the relay "
        "server gives its clients to other relay clients, or turns them away at once; 0 is never",
        group="Links", metavar="SECONDS")  # fmt: skip
    check_http: tuple[CheckPath, ...] = option(
        (), parse_check_path, "have such a check GET this path of a service, or of all without a name, and take any "
        "answer but 2xx and 3xx for a failure; may be repeated",
        group="Links", metavar="[SERVICE=]PATH", many=True)  # fmt: skip
    num_conn: int = option(
        8, parse_positive, "idle links kept for each service",
        group="Links", metavar="N", spelling="numConn", fixed=True)  # fmt: skip
    max_conn: int = option(
        0, parse_count, "links at once, idle ones and all", group="Links", metavar="N",
        shown_default="a quarter of the limit on open files")  # fmt: skip
    exit_on_refusal: bool = option(
        False, parse_flag, "end with status 3 where the relay server refuses this client for a reason that does not "
        "pass, instead of trying again", group="Running")  # fmt: skip
    name: str = option(
        "", str, "what the relay server calls this client in its log", group="Links", metavar="NAME",
        shown_default="this host's name")  # fmt: skip

    proxy_protocol: tuple[ProxyProtocol, ...] = option(
        (), parse_proxy_protocol, "begin each connection to a service, or to all without a name, with a PROXY protocol "
        "header, which tells it the service client's address; may be repeated",
        group="Connections", metavar="[SERVICE=]v1|v2", many=True)  # fmt: skip

    reject_unauthorized: bool = option(
        True, parse_flag, "refuse a relay server whose certificate cannot be verified",
        group="TLS", metavar="true|false", spelling="rejectUnauthorized")  # fmt: skip
    tls_server_name: str = option(
        "", parse_host, "name that must stand in the relay server's certificate",
        group="TLS", metavar="NAME", shown_default="--relay-host")  # fmt: skip
    pin: tuple[Pin, ...] = option(
        (), parse_pin, "accept exactly the relay server's certificate with this SHA-256 digest, self-signed or not; of "
        "several relay servers each may have its own; may be repeated",
        group="TLS", metavar="[HOST:PORT=]sha256:HEX", many=True)  # fmt: skip
    service_ca_file: str = option(
        "", parse_path, "CA certificates, PEM, for the service's certificate (--tls both)",
        group="TLS", metavar="FILE")  # fmt: skip
    service_server_name: tuple[ServiceHost, ...] = option(
        (), parse_service_host, "name that must stand in the service's certificate, and that it is asked for (SNI), of "
        "one service as in web=www.example.net; may be repeated", group="TLS", metavar="[SERVICE=]NAME", many=True,
        shown_default="its host in --host or --publish")  # fmt: skip
    service_insecure: bool = option(
        False, parse_flag, "accept any certificate of the service (--tls both)", group="TLS")  # fmt: skip
    service_alpn: tuple[ServiceProtocol, ...] = option(
        (), parse_service_protocol, "protocols that services speak over TLS (ALPN), as in h2,http/1.1; of one service, "
        "as in web=h2,web=http/1.1: a service is offered the one that its client has agreed on with the relay server, "
        "and where none was, the one here if it is alone; may be repeated",
        group="TLS", metavar="[SERVICE=]PROTOCOL", many=True,
        shown_default="whatever was agreed on there")  # fmt: skip

    def _complaints(self) -> Iterator[tuple[object, str]]:
        yield from super()._complaints()
        for name, placeholders in (("relay_host", "HOST"), ("host", "HOST PORT"), ("token_file", "FILE")):
            value = getattr(self, name)
            yield value in placeholders.split(), f"{value} stands for something: put that there instead"
        is_first = self.relay_host or not self.relay
        yield is_first and not self.relay_host, "--relay-host is required, as in tcprelayc relay.example.net:10080 22"
        yield self.relay_port == 0, "--relay-port 0 is no port of a relay server"
        needs_port = is_first and self.relay_port is None
        yield needs_port, "--relay-port is required, as in tcprelayc relay.example.net:10080 22"
        relays = self.relays
        same = repeated(relays)
        yield same, f"the relay server {same} stands there twice"
        yield 0 in [relay.port for relay in relays], "--relay HOST:0 is no port of a relay server"
        pinned = [pin.relay for pin in self.pin]
        yield len(pinned) > len(set(pinned)), "--pin stands there twice for the same relay server"
        stray = next((name for name in pinned if name and name not in map(str, relays)), "")
        yield stray, f"--pin {stray}=… names no relay server of these: {', '.join(map(str, relays))}"
        zone = next((relay for relay in relays if self.via and "%" in relay.host), None)
        yield zone, f"--via: only this host knows where {zone and zone.host} is: leave out what stands behind its %"
        yield (self.via and self.relay_all, "--relay-all looks names up here, with --via the proxy does: leave one out")
        services = self.services
        yield not services, "--port (with --host) or --publish is required, as in tcprelayc relay.example.net:10080 22"
        yield from self._wrong_services([service.name for service in services])
        asked = any(service.port is not None for service in services)
        yield self.wire == "raw" and asked, "--wire raw cannot ask for a port: leave --service-port and @PORT out"
        one_port = repeated([service.port for service in services if service.port])
        yield one_port, f"two services ask for port {one_port}: each needs one of its own"
        has_default = self.port is not None or self.host.startswith("unix:")
        yield self.service_port is not None and not has_default, "--service-port is of no use without --port"
        unreachable = [service.target for service in services if not (service.target.port or service.target.path)]
        yield unreachable, f"nothing can be reached at port 0: {', '.join(map(str, unreachable))}"
        yield (
            self.host.startswith("unix:") and self.port is not None,
            ("--port is of no use where --host is a Unix socket"),
        )
        yield (
            0 < self.max_conn < self.num_conn * len(services) * len(relays),
            ("--max-conn is less than the idle links that --num-conn asks for, over all services and relay servers"),
        )
        yield from self._useless("pin tls_server_name cert pfx ca_file", "--tls", self.tls in ("relay", "both"))
        to_services = self.tls in ("both", "service")
        of_services = "service_ca_file service_server_name service_insecure service_alpn"
        yield from self._useless(of_services, "--tls both or --tls service", to_services)
        yield from self._wrong_protocols(self.service_alpn, [service.name for service in services])
        hosts = [one.service for one in self.service_server_name]
        double = repeated(hosts)
        yield double is not None, f"--service-server-name stands there twice for {double or 'all services'}"
        strange = [name for name in hosts if name and name not in [service.name for service in services]]
        yield strange, f"--service-server-name: no service is named {', '.join(strange)}"

        checked = [one.service for one in self.check_http]
        yield self.check_http and not self.check_service, "--check-http is of no use without --check-service"
        twice = repeated(checked)
        yield twice is not None, f"--check-http stands there twice for {twice or 'all services'}"
        unknown = [name for name in checked if name and name not in [service.name for service in services]]
        yield unknown, f"--check-http: no service is named {', '.join(unknown)}"

        named = [one.service for one in self.proxy_protocol]
        twice = repeated(named)
        yield twice is not None, f"--proxy-protocol stands there twice for {twice or 'all services'}"
        unknown = [name for name in named if name and name not in [service.name for service in services]]
        yield unknown, f"--proxy-protocol: no service is named {', '.join(unknown)}"
        yield (
            self.wire == "raw" and self.proxy_protocol,
            ("--proxy-protocol is of no use with --wire raw, which does not tell where service clients come from"),
        )

    @property
    def relays(self) -> list[Endpoint]:
        """All relay servers, that of ``--relay-host`` first."""
        first = [Endpoint(self.relay_host, self.relay_port or 0)] if self.relay_host else []
        return [*first, *self.relay]

    def pin_of(self, relay: Endpoint) -> str:
        """The digest that a relay server's certificate has to have; "" where that is not told."""
        pins = {pin.relay: pin.digest for pin in self.pin}
        return pins.get(str(relay), pins.get("", ""))

    @property
    def proxy(self) -> Proxy | None:
        """The one in ``--via``."""
        return parse_proxy(self.via) if self.via else None

    def proxy_version(self, service: str) -> int:
        """The version of the PROXY protocol header that this service gets, 0 for none."""
        versions = {one.service: one.version for one in self.proxy_protocol}
        return versions.get(service, versions.get("", 0))

    def check_path(self, service: str) -> str:
        """The path by which this service is checked over HTTP, "" where a connection is enough."""
        paths = {one.service: one.path for one in self.check_http}
        return paths.get(service, paths.get("", ""))

    def protocol_for(self, service: str, agreed: str) -> str:
        """The protocol that this service is to be offered, where its client and the relay server have `agreed` on one,
        or on none; "" is nothing, and then it speaks what it does by itself.

        Of several nothing is offered where nothing was agreed on: the service would choose one, and its client would
        not know which.  Raises `ConnectionError` where the service does not speak what was agreed on.
        """
        spoken = protocols_of(self.service_alpn, service)
        if agreed and spoken and agreed not in spoken:
            raise ConnectionError(
                f"its client and the relay server have agreed on {agreed}, and --service-alpn has {', '.join(spoken)} "
                "here: let both sides have the same"
            )
        return agreed or (spoken[0] if len(spoken) == 1 else "")

    def server_name(self, service: str) -> str:
        """The name that must stand in the certificate of this service, "" where that is its host."""
        names = {one.service: one.name for one in self.service_server_name}
        return names.get(service, names.get("", ""))

    @classmethod
    def short(cls, words: Sequence[str]) -> list[str]:
        """``RELAY_HOST:PORT SERVICE…``, a service being ``PORT``, ``HOST:PORT``, ``unix:PATH`` or one of these with its
        name before it, ``NAME=…``, or the port that is asked for behind it, ``…@PORT``."""
        names: list[str] = []
        for word in words:
            is_path, is_named = word.startswith("unix:"), "=" in word
            if not (names or is_path or is_named or word.isdigit()):
                names.append("relay-host")
            elif names and not is_path and (is_named or "@" in word):
                names.append("publish")
            elif names and not {"host", "port"} & set(names):
                names.append("port" if word.isdigit() else "host")
            else:
                break
        return names

    def _check_values(self) -> None:
        super()._check_values()
        for host_name, port_name in (("host", "port"), ("relay_host", "relay_port")):
            whole = getattr(self, host_name)
            host, port = split_place(whole)
            given = getattr(self, port_name)
            if port is not None and given not in (None, port):
                words = f"--{host_name} {whole} and --{port_name} {given}".replace("_", "-")
                raise ValueError(f"{words} name two ports")
            if port is not None:
                object.__setattr__(self, host_name, host)
                object.__setattr__(self, port_name, port)

    @property
    def services(self) -> list[Publication]:
        """All services, that of ``--host`` and ``--port`` first."""
        if self.host.startswith("unix:"):
            return [Publication("default", parse_endpoint(self.host), self.service_port), *self.publish]
        if self.port is None:
            return list(self.publish)
        return [Publication("default", Endpoint(self.host, self.port), self.service_port), *self.publish]
