"""The options of `RelayServer` and of ``tcprelays``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .addresses import Network, parse_host, parse_port
from .options import Options, repeated
from .values import (
    PortRange, RateLimit, ServiceNetwork, ServicePort, ServiceProtocol, option, parse_count, parse_flag,
    parse_heartbeat, parse_lease, parse_network, parse_path, parse_ports, parse_rate_limit, parse_seconds,
    parse_service, parse_service_network, parse_service_protocol,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Options):
    """The options of `RelayServer` and of ``tcprelays``."""

    command = "tcprelays"
    short_form = "the relay port and services, as in 10080 2222 web=8080"

    relay_port: int | None = option(
        None, parse_port, "port for relay clients; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="relayPort", fixed=True)  # fmt: skip
    service_port: int | None = option(
        None, parse_port, "port for the clients of the service named default; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="servicePort", fixed=True)  # fmt: skip
    service: tuple[ServicePort, ...] = option(
        (), parse_service, "a further service and its port; may be repeated",
        group="Addresses", metavar="NAME=[ADDRESS:]PORT", many=True, fixed=True)  # fmt: skip
    client_ports: tuple[PortRange, ...] = option(
        (), parse_ports, "ports that relay clients may ask for, with --service-port there; may be repeated",
        group="Addresses", metavar="PORT[-PORT]", many=True)  # fmt: skip
    port_lease: float = option(
        60.0, parse_lease, "seconds for which a relay client that is gone can have the port again that it was given",
        group="Addresses", metavar="SECONDS")  # fmt: skip
    hostname: str = option(
        "", parse_host, "address to listen on; a name is all its addresses, :: is IPv4 too",
        group="Addresses", metavar="ADDRESS", secures=True,
        shown_default="all, IPv6 and IPv4", fixed=True)  # fmt: skip
    public_host: str = option(
        "", parse_host, "name or address of this host as others reach it: shown to relay clients, and in the line that "
        "they paste", group="Addresses", metavar="HOST",
        shown_default="the address of the default route, where it is public")  # fmt: skip
    pair_timeout: float = option(
        20.0, parse_seconds, "seconds that a service client waits for a link and its service",
        group="Connections", metavar="SECONDS")  # fmt: skip
    max_pending: int = option(
        512, parse_count, "service clients of one service that may wait for a link at once; who comes next waits in "
        "the system's queue, or is refused where no link comes free",
        group="Connections", metavar="N")  # fmt: skip
    max_connections: int = option(
        0, parse_count, "connections at once", group="Connections", metavar="N",
        shown_default="a quarter of the limit on open files")  # fmt: skip
    max_per_address: int = option(
        0, parse_count, "connections at once from one address (IPv6: one /64 network); 0 is no limit",
        group="Connections", metavar="N", secures=True)  # fmt: skip
    limit_rate: tuple[RateLimit, ...] = option(
        (), parse_rate_limit, "bytes a second that a connection carries each way at most, as in 10M; of one service, "
        "as in web=512Ki; may be repeated",
        group="Connections", metavar="[SERVICE=]BYTES[/s]", many=True)  # fmt: skip
    heartbeat: float = option(
        15.0, parse_heartbeat, "seconds between two PINGs on an idle link; it is dead after 2.5 silent ones",
        group="Links", metavar="SECONDS")  # fmt: skip
    max_links_per_address: int = option(
        0, parse_count, "connections to the relay port at once from one address (IPv6: one /64 network); 0 is no limit",
        group="Links", metavar="N", secures=True)  # fmt: skip
    clients: str = option(
        "", parse_path, "file with a section for each relay client that may come: its token, and what it may do; in "
        "place of --token", group="Trust", metavar="FILE")  # fmt: skip
    auth: bool = option(
        False, parse_flag, "ask relay clients for a certificate, verified against --ca-file; implies --tls",
        group="Trust", spelling="auth")  # fmt: skip
    service_cert: tuple[str, ...] = option(
        (), parse_path, "certificate for the service ports, PEM, if it is not to be --cert or --pfx; may be repeated: "
        "service clients see the one with the name that they ask for, and else the first", group="TLS", metavar="FILE",
        many=True)  # fmt: skip
    service_key: tuple[str, ...] = option(
        (), parse_path, "its private key, PEM; may be repeated, in the order of the certificates: one that has its key "
        "in its own file needs none", group="TLS", metavar="FILE", many=True)  # fmt: skip
    service_pfx: tuple[str, ...] = option(
        (), parse_path, "both in one PFX file, with the same passphrase; may be repeated like --service-cert",
        group="TLS", metavar="FILE", many=True)  # fmt: skip
    service_alpn: tuple[ServiceProtocol, ...] = option(
        (), parse_service_protocol, "protocols that TLS on the service ports agrees on with service clients (ALPN), "
        "the best first, as in h2,http/1.1; of one service, as in web=h2,web=http/1.1; may be repeated",
        group="TLS", metavar="[SERVICE=]PROTOCOL", many=True)  # fmt: skip
    state_dir: str = option(
        "", parse_path, "where the self-signed certificate and the token of a start with --tls alone are kept",
        group="TLS", metavar="DIRECTORY",
        shown_default="/var/lib/tcprelay under systemd and for root, else ~/.local/state/tcprelay",
        fixed=True)  # fmt: skip
    allow_unauthenticated: bool = option(
        False, parse_flag, "accept links from other hosts although neither token nor certificates are asked for",
        group="Trust")  # fmt: skip
    allow: tuple[ServiceNetwork, ...] = option(
        (), parse_service_network, "only service clients of these networks may connect, to every service or to one; "
        "may be repeated", group="Trust", metavar="[SERVICE=]NETWORK", many=True, secures=True,
        shown_default="everybody")  # fmt: skip
    deny: tuple[ServiceNetwork, ...] = option(
        (), parse_service_network, "service clients of this network may not connect, to any service or to one; goes "
        "before --allow; may be repeated",
        group="Trust", metavar="[SERVICE=]NETWORK", many=True, secures=True)  # fmt: skip
    deny_file: str = option(
        "", parse_path, "file with a network a line, whose service clients may not connect; read again at SIGHUP",
        group="Trust", metavar="FILE", secures=True)  # fmt: skip
    allow_links: tuple[Network, ...] = option(
        (), parse_network, "only relay clients of these networks may connect; may be repeated",
        group="Trust", metavar="NETWORK", many=True, secures=True, shown_default="everybody")  # fmt: skip
    deny_links: tuple[Network, ...] = option(
        (), parse_network, "relay clients of this network may not connect; goes before --allow-links; may be repeated",
        group="Trust", metavar="NETWORK", many=True, secures=True)  # fmt: skip
    accept_proxy_protocol: tuple[Network, ...] = option(
        (), parse_network, "a proxy before the service ports and the relay port, or a network of them: what comes from "
        "there must begin with a PROXY protocol header, v1 or v2, whose source address is believed; limits per address "
        "do not count these connections; may be repeated", group="Trust", metavar="NETWORK", many=True)  # fmt: skip

    def _complaints(self) -> Iterator[tuple[object, str]]:
        yield from super()._complaints()
        yield self.relay_port is None, "--relay-port is required, as in tcprelays 10080 2222"
        yield not self.pair_timeout, "--pair-timeout must be more than 0"
        services = self.services
        on_demand = self.client_ports or self.clients
        yield not (services or on_demand), "--service-port or --service is required, as in tcprelays 10080 2222"
        yield (self.client_ports and self.wire == "raw", "--wire raw cannot ask for a port: leave --client-ports out")
        yield from self._wrong_services([service.name for service in services])
        names = {"", *(service.name for service in services)}
        for option_name, items in (("--allow", self.allow), ("--deny", self.deny)):
            unknown = next((item for item in items if item.service not in names), None)
            yield unknown, f"{option_name} {unknown}: there is no service {unknown and unknown.service}"
        ports = [(self.hostname, self.relay_port)] + [(s.host or self.hostname, s.port) for s in services]
        taken = repeated([(host, port) for host, port in ports if port])
        yield taken, f"two ports are {taken and taken[1]}"
        limited = [limit.service for limit in self.limit_rate]
        named = next((name for name in limited if name and name not in [service.name for service in services]), "")
        yield named, f"--limit-rate {named}=… names no service here: correct the name, or add --service {named}=PORT"
        twice = repeated(limited)
        whose = f"the service {twice}" if twice else "all services"
        yield twice is not None, f"--limit-rate is given twice for {whose}: leave one of them out"
        yield (
            self.auth and not self.ca_file,
            ("--auth needs --ca-file: the CA certificates that relay clients' certificates come from"),
        )
        yield (
            self.clients and (self.token or self.token_file),
            "--clients has a token for each: give no other beside it",
        )
        yield self.clients and self.wire == "raw", "--wire raw has no names of relay clients: leave --clients out"
        yield self.service_cert and self.service_pfx, "give --service-cert or --service-pfx, not both"
        yield from self._useless("cert pfx", "--tls", bool(self.tls or self.auth))
        on_services = self.tls in ("both", "service")
        of_services = "service_cert service_key service_pfx service_alpn"
        yield from self._useless(of_services, "--tls both or --tls service", on_services)
        certificates, keys = len(self.service_cert), len(self.service_key)
        yield (
            keys > certificates,
            f"--service-key names {keys} files, and --service-cert {certificates}: each key is a certificate's",
        )
        yield from self._wrong_protocols(self.service_alpn, [service.name for service in services])
        yield from self._useless("ca_file", "--auth", self.auth)

    @classmethod
    def short(cls, words: Sequence[str]) -> list[str]:
        """``RELAY_PORT SERVICE…``, a service being ``PORT`` or ``NAME=[ADDRESS:]PORT``."""
        names: list[str] = []
        for word in words:
            if not names and word.isdigit():
                names.append("relay-port")
            elif names and "=" in word:
                names.append("service")
            elif names and word.isdigit() and "service-port" not in names:
                names.append("service-port")
            else:
                break
        return names

    @property
    def is_improvised(self) -> bool:
        """TLS without a certificate: one is made, and a token too."""
        given = self.cert or self.pfx or (self.tls == "service" and (self.service_cert or self.service_pfx))
        return bool(self.tls or self.auth) and not given

    def rate_of(self, service: str) -> int:
        """Bytes a second that a connection of a service of this name may carry each way; 0 is no limit."""
        rates = {limit.service: limit.rate for limit in self.limit_rate}
        return rates.get(service, rates.get("", 0))

    @property
    def services(self) -> list[ServicePort]:
        """All services, ``--service-port`` first."""
        first = [] if self.service_port is None else [ServicePort("default", "", self.service_port)]
        return first + list(self.service)
