"""The options of both roles: one table for the command line, the environment and the file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .addresses import Endpoint, is_own_host
from .text import say_error, shown, trim
from .values import (
    LONGEST_SECRET, Option, Publication, ServicePort, ServiceProtocol, one_of, option, parse_keepalive, parse_path,
    parse_seconds, parse_secret, parse_status, parse_tls, parse_workers,
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
        "connection; 0 is never", group="Connections", metavar="SECONDS", fixed=True)  # fmt: skip
    keepalive: float = option(
        20.0, parse_keepalive, "seconds of silence after which TCP asks whether the other side is there, and up to "
        "half as many more: less than what a NAT on the way remembers", group="Links", metavar="SECONDS",
        fixed=True)  # fmt: skip
    wire: str = option(
        "v1", one_of("v1", "raw"),
        "what is spoken on the links: v1, or raw to work with node-tcp-relay; the same on both sides",
        group="Links", metavar="v1|raw", fixed=True)  # fmt: skip
    token: str = option(
        "", parse_secret, "secret that server and client prove to each other; better given by file or environment",
        group="Trust", metavar="SECRET", secret=True)  # fmt: skip
    secret: str = option(
        "", parse_secret, "node-tcp-relay 0.0.13's shared key; --wire raw only, crosses the wire readable",
        group="Trust", metavar="KEY", secret=True, fixed=True)  # fmt: skip
    token_file: str = option(
        "", parse_path, "file whose first line is the token", group="Trust", metavar="FILE")  # fmt: skip
    tls: str = option(
        "", parse_tls, "true (or yes, on): TLS on the links; both: on the service ports (server), or to the service "
        "(client), as well; service: there alone", group="TLS", metavar="true|both|service|false",
        fixed=True)  # fmt: skip
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
        group="Running", metavar="N", shown_default="half as many as processors, at most 4; 0 for 1",
        fixed=True)  # fmt: skip
    log_level: str = option(
        "info", one_of("debug", "info", "warning", "error"), "least weight of what is logged to standard error",
        group="Running", metavar="debug|info|warning|error")  # fmt: skip
    log_format: str = option(
        "text", one_of("text", "json"), "a line of text or a JSON object for each log record",
        group="Running", metavar="text|json", fixed=True)  # fmt: skip
    status: Endpoint | None = option(  # noqa: RUF009  (Endpoint is frozen)
        None, parse_status, "address and port of the status page, the metrics and /healthz, over HTTP; a port alone is "
        "for this host", group="Status", metavar="[ADDRESS:]PORT", fixed=True)  # fmt: skip
    status_token: str = option(
        "", parse_secret, "secret that is asked for there: needed where the address is not of this host alone; better "
        "given by file or environment", group="Status", metavar="SECRET", secret=True,
        secures=True)  # fmt: skip
    status_token_file: str = option(
        "", parse_path, "file whose first line is that secret", group="Status", metavar="FILE",
        secures=True)  # fmt: skip

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
        has_token = bool(self.status_token or self.status_token_file)
        yield self.status_token and self.status_token_file, "give --status-token or --status-token-file, not both"
        yield from self._useless("status_token status_token_file", "--status", self.status is not None)
        beyond = self.status is not None and not is_own_host(self.status.host) and not has_token
        yield beyond, f"--status {self.status} can be reached from other hosts: give --status-token-file, too"

    @classmethod
    def short(cls, words: Sequence[str]) -> list[str]:
        """Which options the words of a command line are that stand there without one, up to the first that is none."""
        return []

    def differences(self: OptionsT, other: OptionsT) -> list[str]:
        """The names of the options that are not the same in both, in the order of the table."""
        return [name for name, _ in options_of(type(self)) if getattr(self, name) != getattr(other, name)]

    def with_fixed_of(self: OptionsT, other: OptionsT) -> OptionsT:
        """These options, and those that cannot change while a role runs as they are in the `other` ones.  Raises
        `ValueError` where they do not fit together."""
        return dataclasses.replace(
            self, **{name: getattr(other, name) for name, info in options_of(type(self)) if info.fixed}
        )

    def as_arguments(self) -> dict[str, Any]:
        """All of them for the constructor of a role, where ``None`` stands for what is not given."""
        return {name: None if value == "" else value for name, value in vars(self).items()}

    def _useless(self, names: str, needed: str, is_there: bool) -> Iterator[tuple[object, str]]:
        """Complaints of options that secure nothing as things stand, and must not look as if they did."""
        for name in names.split():
            yield getattr(self, name) and not is_there, f"--{name.replace('_', '-')} is of no use without {needed}"

    def _wrong_protocols(self, given: tuple[ServiceProtocol, ...], services: list[str]) -> Iterator[tuple[object, str]]:
        """Complaints of ``--service-alpn``: of names of services that there are not, and of an order in which a comma
        was taken to go on with the service before it."""
        owners = [one.service for one in given]
        unknown = next((owner for owner in owners if owner and owner not in services), "")
        yield unknown, f"--service-alpn: no service is named {unknown}"
        late = next((two for one, two in itertools.pairwise(given) if one.service and not two.service), None)
        yield (
            late,
            f"--service-alpn {late} behind one of a service: write the service before each, as in web=h2,web=http/1.1, "
            "and those of all others first",
        )
        twice = repeated(list(given))
        yield twice, f"--service-alpn {twice} stands there twice"

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
            elif info.many:
                items = [value] if isinstance(value, str) else value
                value = tuple(_parse_one(item.name, info, one) for one in items)
            elif value != item.default:
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

    def read_status_token(self) -> bytes:
        """That of the status page, likewise; it is as long as whoever can reach the page should have to guess."""
        token = self.status_token.encode("utf-8", "surrogateescape")
        if self.status_token_file:
            token = read_secret("--status-token-file", self.status_token_file)
        if 0 < len(token) < SHORTEST_STATUS_TOKEN:
            few = f"the status token has {len(token)} characters: it can be guessed"
            raise ValueError(f"{few}; take {SHORTEST_STATUS_TOKEN} or more random ones")
        return token

    def read_passphrase(self) -> str:
        """The passphrase, likewise."""
        if self.passphrase_file:
            return read_secret("--passphrase-file", self.passphrase_file).decode("utf-8", "surrogateescape")
        return self.passphrase


SHORTEST_STATUS_TOKEN = 16
"""Characters below which the token of the status page is refused."""


class WrongOptions(ValueError):
    """Options that cannot be used; a command ends with this `status`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


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
            items = [value] if value and isinstance(value, str) else value or ()
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
