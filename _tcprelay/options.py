"""The options of both roles: one table for the command line, the environment and the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .addresses import Endpoint, parse_endpoint, parse_host, parse_place, parse_port, split_place
from .text import say_error, shown, trim
from .values import (
    LONGEST_SECRET, Option, Publication, ServicePort, one_of, option, parse_count, parse_flag, parse_heartbeat,
    parse_keepalive, parse_path, parse_pin, parse_positive, parse_publication, parse_relay, parse_seconds, parse_secret,
    parse_service, parse_tls, parse_workers,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of both roles."""

    command: ClassVar[str]
    """The command that has them."""
    short_form: ClassVar[str]
    """What `short` understands."""

    idle_timeout: float = option(
        0.0, parse_seconds, "seconds without a byte either way that end a connection; 0 is never",
        group="Connections", metavar="SECONDS")  # fmt: skip
    half_close_timeout: float = option(
        3600.0, parse_seconds,
        "seconds without a byte that end a connection of which one direction has ended; 0 is never",
        group="Connections", metavar="SECONDS")  # fmt: skip
    dead_path: float = option(
        900.0, parse_seconds,
        "seconds for which nothing that was sent is acknowledged, and keepalive goes unanswered, that end a "
        "connection; 0 is never", group="Connections", metavar="SECONDS")  # fmt: skip
    keepalive: float = option(
        20.0, parse_keepalive, "seconds of silence after which TCP asks whether the other side is there, and up to "
        "half as many more: less than what a NAT on the way remembers", group="Links", metavar="SECONDS")  # fmt: skip
    wire: str = option(
        "v1", one_of("v1", "raw"),
        "what is spoken on the links: v1, or raw to work with node-tcp-relay; the same on both sides",
        group="Links", metavar="v1|raw")  # fmt: skip
    token: str = option(
        "", parse_secret, "secret that server and client prove to each other; better given by file or environment",
        group="Trust", metavar="SECRET", secret=True)  # fmt: skip
    secret: str = option(
        "", parse_secret, "node-tcp-relay 0.0.13's shared key; --wire raw only, crosses the wire readable",
        group="Trust", metavar="KEY", secret=True)  # fmt: skip
    token_file: str = option(
        "", parse_path, "file whose first line is the token", group="Trust", metavar="FILE")  # fmt: skip
    tls: str = option(
        "", parse_tls, "true (or yes, on): TLS on the links; both: on the service ports (server), or to the service "
        "(client), as well; service: there alone", group="TLS", metavar="true|both|service|false")  # fmt: skip
    cert: str = option(
        "", parse_path, "this side's certificate and its chain, PEM", group="TLS", metavar="FILE")  # fmt: skip
    key: str = option(
        "", parse_path, "its private key, PEM; without it, the one in --cert", group="TLS", metavar="FILE")  # fmt: skip
    pfx: str = option(
        "", parse_path, "certificate, chain and key in one PFX (PKCS #12) file, instead of --cert and --key",
        group="TLS", metavar="FILE", spelling="pfx")  # fmt: skip
    passphrase: str = option(
        "", parse_secret, "passphrase of --pfx or --key; better given by file or environment",
        group="TLS", metavar="SECRET", spelling="passphrase", secret=True)  # fmt: skip
    passphrase_file: str = option(
        "", parse_path, "file whose first line is the passphrase", group="TLS", metavar="FILE")  # fmt: skip
    ca_file: str = option(
        "", parse_path, "CA certificates, PEM, that the other side's certificate is verified against",
        group="TLS", metavar="FILE", spelling="caFile")  # fmt: skip
    tls_min: str = option(
        "1.2", one_of("1.2", "1.3"), "oldest version of TLS that is spoken",
        group="TLS", metavar="1.2|1.3")  # fmt: skip
    drain_timeout: float = option(
        10.0, parse_seconds, "seconds that open connections have to finish at SIGTERM or SIGINT",
        group="Running", metavar="SECONDS")  # fmt: skip
    workers: int | None = option(
        None, parse_workers, "processes to spread over; 0 is this one alone, as always in programs that embed it",
        group="Running", metavar="N", shown_default="half as many as processors, at most 4; 0 for 1")  # fmt: skip
    log_level: str = option(
        "info", one_of("debug", "info", "warning", "error"), "least weight of what is logged to standard error",
        group="Running", metavar="debug|info|warning|error")  # fmt: skip
    log_format: str = option(
        "text", one_of("text", "json"), "a line of text or a JSON object for each log record",
        group="Running", metavar="text|json")  # fmt: skip

    def __post_init__(self) -> None:
        self._check_values()
        for wrong, why in self._complaints():
            if wrong:
                raise ValueError(why)

    def _complaints(self) -> Iterator[tuple[object, str]]:
        """What may not be, each with what is to be said of it; each is looked at only where the ones before are not."""
        yield self.token and self.token_file, "give --token or --token-file, not both"
        yield self.passphrase and self.passphrase_file, "give --passphrase or --passphrase-file, not both"
        yield self.cert and self.pfx, "give --cert or --pfx, not both"
        yield self.key and not self.cert, "--key is of no use without --cert"
        yield (
            self.wire == "raw" and (self.token or self.token_file),
            ("--wire raw cannot check a token: leave it out, or use --wire v1 on both sides"),
        )
        yield self.secret and self.wire != "raw", "--secret is for --wire raw; otherwise use --token"

    @classmethod
    def short(cls, words: Sequence[str]) -> list[str]:
        """Which options the words of a command line are that stand there without one, up to the first that is none."""
        return []

    def as_arguments(self) -> dict[str, Any]:
        """All of them for the constructor of a role, where ``None`` stands for what is not given."""
        return {name: None if value == "" else value for name, value in vars(self).items()}

    def _useless(self, names: str, needed: str, is_there: bool) -> Iterator[tuple[object, str]]:
        """Complaints of options that secure nothing as things stand, and must not look as if they did."""
        for name in names.split():
            yield getattr(self, name) and not is_there, f"--{name.replace('_', '-')} is of no use without {needed}"

    def _wrong_services(self, services: list[str]) -> Iterator[tuple[object, str]]:
        """Complaints of the names of all services."""
        twice = repeated(services)
        yield twice, f"two services are named {twice}"
        yield self.wire == "raw" and len(services) > 1, "--wire raw carries one service: links have no name there"

    def _check_values(self) -> None:
        """Have values that come from a program judged like those of the command line; ``None`` is the default."""
        for item in dataclasses.fields(self):
            info, value = item.metadata["option"], getattr(self, item.name)
            if value is None:
                value = item.default
            elif not info.many and value != item.default:
                try:
                    value = info.parse(trim(str(value)))
                except ValueError as error:
                    said = "" if info.secret else f" {shown(value)!r}"
                    raise ValueError(f"{item.name}{said}: expected {error}") from None
            object.__setattr__(self, item.name, value)

    def read_token(self) -> bytes:
        """The token, from wherever it is; empty where there is none.  Raises `OSError` and `ValueError`."""
        if self.token_file:
            return read_secret("--token-file", self.token_file)
        return self.token.encode("utf-8", "surrogateescape")

    def read_passphrase(self) -> str:
        """The passphrase, likewise."""
        if self.passphrase_file:
            return read_secret("--passphrase-file", self.passphrase_file).decode("utf-8", "surrogateescape")
        return self.passphrase


def read_secret(name: str, path: str) -> bytes:
    """The first line of a file, trimmed.  Raises `OSError`, and `ValueError` where it is not a line of text."""
    try:
        with open(path, "rb") as file:
            line = file.readline(LONGEST_SECRET + 1)
    except OSError as error:
        raise OSError(error.errno, f"{name} {path}: {say_error(error)}") from error
    # PowerShell writes UTF-16 with a mark, others without: then every other byte of ASCII is 0.
    halves_are_zero = b"\0" in line and not (any(line[::2]) and any(line[1::2]))
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or halves_are_zero:
        raise ValueError(f"{name} {path}: it is UTF-16; save it as UTF-8 or ASCII")
    secret = trim(line.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    if not secret:
        raise ValueError(f"{name} {path}: its first line is empty")
    if len(line) > LONGEST_SECRET:
        raise ValueError(f"{name} {path}: its first line is longer than {LONGEST_SECRET:,} bytes")
    return secret


def repeated(items: list[ItemT]) -> ItemT | None:
    """The first that stands there more than once."""
    return next((item for item in items if items.count(item) > 1), None)


ItemT = TypeVar("ItemT")
OptionsT = TypeVar("OptionsT", bound=Options)


def make_options(cls: type[OptionsT], **values: Any) -> OptionsT:
    """Options as a program gives them, by their names with underscores: text may be bytes, and of those that may be
    repeated there may be one or several, as text or as objects.  Raises `ValueError`."""
    infos = dict(options_of(cls))
    for name, value in values.items():
        if name not in infos:
            raise ValueError(f"there is no option {name}")
        if isinstance(value, bytes):
            value = values[name] = value.decode("utf-8", "surrogateescape")
        if name in ("token", "secret") and value == "":
            raise ValueError(f"{name}: expected something that is not empty")
        if infos[name].many:
            items = [value] if isinstance(value, str) else value or ()
            values[name] = tuple(_parse_one(name, infos[name], item) for item in items)
    return cls(**values)


def _parse_one(name: str, info: Option, item: Any) -> Any:
    try:
        return item if isinstance(item, (ServicePort, Publication)) else info.parse(trim(str(item)))
    except ValueError as error:
        raise ValueError(f"{name} {shown(item)!r}: expected {error}") from None


def options_of(cls: type[Options]) -> list[tuple[str, Option]]:
    """The options of an options class as pairs of field name and `Option`."""
    return [(f.name, f.metadata["option"]) for f in dataclasses.fields(cls)]


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Options):
    """The options of `RelayServer` and of ``tcprelays``."""

    command = "tcprelays"
    short_form = "the relay port and services, as in 10080 2222 web=8080"

    relay_port: int | None = option(
        None, parse_port, "port for relay clients; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="relayPort")  # fmt: skip
    service_port: int | None = option(
        None, parse_port, "port for the clients of the service named default; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="servicePort")  # fmt: skip
    service: tuple[ServicePort, ...] = option(
        (), parse_service, "a further service and its port; may be repeated",
        group="Addresses", metavar="NAME=[ADDRESS:]PORT", many=True)  # fmt: skip
    hostname: str = option(
        "", parse_host, "address to listen on; a name is all its addresses, :: is IPv4 too",
        group="Addresses", metavar="ADDRESS", secures=True,
        shown_default="all, IPv6 and IPv4")  # fmt: skip
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
    heartbeat: float = option(
        15.0, parse_heartbeat, "seconds between two PINGs on an idle link; it is dead after 2.5 silent ones",
        group="Links", metavar="SECONDS")  # fmt: skip
    max_links_per_address: int = option(
        0, parse_count, "connections to the relay port at once from one address (IPv6: one /64 network); 0 is no limit",
        group="Links", metavar="N", secures=True)  # fmt: skip
    auth: bool = option(
        False, parse_flag, "ask relay clients for a certificate, verified against --ca-file; implies --tls",
        group="Trust", spelling="auth")  # fmt: skip
    service_cert: str = option(
        "", parse_path, "certificate for the service ports, PEM, if it is not to be --cert or --pfx",
        group="TLS", metavar="FILE")  # fmt: skip
    service_key: str = option(
        "", parse_path, "its private key, PEM", group="TLS", metavar="FILE")  # fmt: skip
    service_pfx: str = option(
        "", parse_path, "both in one PFX file, with the same passphrase", group="TLS", metavar="FILE")  # fmt: skip
    state_dir: str = option(
        "", parse_path, "where the self-signed certificate and the token of a start with --tls alone are kept",
        group="TLS", metavar="DIRECTORY",
        shown_default="/var/lib/tcprelay under systemd and for root, else ~/.local/state/tcprelay")  # fmt: skip
    allow_unauthenticated: bool = option(
        False, parse_flag, "accept links from other hosts although neither token nor certificates are asked for",
        group="Trust")  # fmt: skip

    def _complaints(self) -> Iterator[tuple[object, str]]:
        yield from super()._complaints()
        yield self.relay_port is None, "--relay-port is required, as in tcprelays 10080 2222"
        yield not self.pair_timeout, "--pair-timeout must be more than 0"
        services = self.services
        yield not services, "--service-port or --service is required, as in tcprelays 10080 2222"
        yield from self._wrong_services([service.name for service in services])
        ports = [(self.hostname, self.relay_port)] + [(s.host or self.hostname, s.port) for s in services]
        taken = repeated([(host, port) for host, port in ports if port])
        yield taken, f"two ports are {taken and taken[1]}"
        yield (
            self.auth and not self.ca_file,
            ("--auth needs --ca-file: the CA certificates that relay clients' certificates come from"),
        )
        yield self.service_cert and self.service_pfx, "give --service-cert or --service-pfx, not both"
        yield from self._useless("cert pfx", "--tls", bool(self.tls or self.auth))
        on_services = self.tls in ("both", "service")
        yield from self._useless("service_cert service_key service_pfx", "--tls both or --tls service", on_services)
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

    @property
    def services(self) -> list[ServicePort]:
        """All services, ``--service-port`` first."""
        first = [] if self.service_port is None else [ServicePort("default", "", self.service_port)]
        return first + list(self.service)


@dataclass(frozen=True, kw_only=True)
class ClientOptions(Options):
    """The options of `RelayClient` and of ``tcprelayc``."""

    command = "tcprelayc"
    short_form = "the relay server and services, as in relay.example.net:10080 22 web=80"

    relay_host: str = option(
        "", parse_relay, "host of the relay server, with its port if you like",
        group="Addresses", metavar="HOST[:PORT]", spelling="relayHost")  # fmt: skip
    relay_port: int | None = option(
        None, parse_port, "port of the relay server for relay clients",
        group="Addresses", metavar="PORT", spelling="relayPort")  # fmt: skip
    host: str = option(
        "localhost", parse_place, "host of the service named default, with its port if you like, or unix:PATH",
        group="Addresses", metavar="HOST[:PORT]", spelling="host")  # fmt: skip
    port: int | None = option(
        None, parse_port, "port of the service named default",
        group="Addresses", metavar="PORT", spelling="port")  # fmt: skip
    publish: tuple[Publication, ...] = option(
        (), parse_publication, "a further service, by its name at the relay server; may be repeated",
        group="Addresses", metavar="NAME=[HOST:]PORT", many=True)  # fmt: skip
    try_service: bool = option(
        True, parse_flag, "connect to each service once when it is published, and warn where that fails; false for one "
        "that serves a single connection", group="Links", metavar="true|false")  # fmt: skip
    num_conn: int = option(
        8, parse_positive, "idle links kept for each service",
        group="Links", metavar="N", spelling="numConn")  # fmt: skip
    max_conn: int = option(
        0, parse_count, "links at once, idle ones and all", group="Links", metavar="N",
        shown_default="a quarter of the limit on open files")  # fmt: skip
    exit_on_refusal: bool = option(
        False, parse_flag, "end with status 3 where the relay server refuses this client for a reason that does not "
        "pass, instead of trying again", group="Running")  # fmt: skip
    name: str = option(
        "", str, "what the relay server calls this client in its log", group="Links", metavar="NAME",
        shown_default="this host's name")  # fmt: skip

    reject_unauthorized: bool = option(
        True, parse_flag, "refuse a relay server whose certificate cannot be verified",
        group="TLS", metavar="true|false", spelling="rejectUnauthorized")  # fmt: skip
    tls_server_name: str = option(
        "", parse_host, "name that must stand in the relay server's certificate",
        group="TLS", metavar="NAME", shown_default="--relay-host")  # fmt: skip
    pin: str = option(
        "", parse_pin, "accept exactly the relay server's certificate with this SHA-256 digest, self-signed or not",
        group="TLS", metavar="sha256:HEX")  # fmt: skip
    service_ca_file: str = option(
        "", parse_path, "CA certificates, PEM, for the service's certificate (--tls both)",
        group="TLS", metavar="FILE")  # fmt: skip
    service_insecure: bool = option(
        False, parse_flag, "accept any certificate of the service (--tls both)", group="TLS")  # fmt: skip

    def _complaints(self) -> Iterator[tuple[object, str]]:
        yield from super()._complaints()
        for name, placeholders in (("relay_host", "HOST"), ("host", "HOST PORT"), ("token_file", "FILE")):
            value = getattr(self, name)
            yield value in placeholders.split(), f"{value} stands for something: put that there instead"
        yield not self.relay_host, "--relay-host is required, as in tcprelayc relay.example.net:10080 22"
        yield self.relay_port == 0, "--relay-port 0 is no port of a relay server"
        yield self.relay_port is None, "--relay-port is required, as in tcprelayc relay.example.net:10080 22"
        services = self.services
        yield not services, "--port (with --host) or --publish is required, as in tcprelayc relay.example.net:10080 22"
        yield from self._wrong_services([service.name for service in services])
        unreachable = [service.target for service in services if not (service.target.port or service.target.path)]
        yield unreachable, f"nothing can be reached at port 0: {', '.join(map(str, unreachable))}"
        yield (
            self.host.startswith("unix:") and self.port is not None,
            ("--port is of no use where --host is a Unix socket"),
        )
        yield (
            0 < self.max_conn < self.num_conn * len(services),
            ("--max-conn is less than the idle links that --num-conn asks for, over all services"),
        )
        yield from self._useless("pin tls_server_name cert pfx ca_file", "--tls", self.tls in ("relay", "both"))
        to_services = self.tls in ("both", "service")
        yield from self._useless("service_ca_file service_insecure", "--tls both or --tls service", to_services)

    @classmethod
    def short(cls, words: Sequence[str]) -> list[str]:
        """``RELAY_HOST:PORT SERVICE…``, a service being ``PORT``, ``HOST:PORT``, ``unix:PATH`` or one of these with its
        name before it, ``NAME=…``."""
        names: list[str] = []
        for word in words:
            is_path, is_named = word.startswith("unix:"), "=" in word
            if not (names or is_path or is_named or word.isdigit()):
                names.append("relay-host")
            elif names and is_named and not is_path:
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
            return [Publication("default", parse_endpoint(self.host)), *self.publish]
        if self.port is None:
            return list(self.publish)
        return [Publication("default", Endpoint(self.host, self.port)), *self.publish]
