"""Who may do what: the clients file of a relay server.

It is INI as `configparser` reads it, a section for each relay client, by the name that it gives (``--name``):

    [nas]
    token = 6a204bd8…             or token-file = FILE; with --auth the certificate may do
    services = ssh, web           of the server's; * is all
    ports = 20000-20009, 22022    that it may ask for; * is all of --client-ports
    from = 192.0.2.0/24           where it may connect from; everywhere without
    max-links = 32
    max-connections = 100
    limit-rate = 10M              bytes a second, of each connection and each way
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .addresses import Network, is_among
from .arguments import say_meant
from .options import read_secret
from .text import say_error, shown, trim
from .values import (
    PortRange,
    parse_name,
    parse_network,
    parse_path,
    parse_ports,
    parse_positive,
    parse_rate,
    parse_secret,
)

ALL = "*"
"""Stands for all that there are."""


@dataclass(frozen=True)
class Identity:
    """A relay client that a server knows by name, and what it may do."""

    name: str
    token: bytes = field(default=b"", repr=False)
    """Empty where its certificate is enough."""
    token_file: str = ""
    """Where it came from, if that is a file of its own."""
    services: tuple[str, ...] = ()
    """Of the server's, which it may publish."""
    ports: tuple[PortRange, ...] = ()
    """Which it may ask for."""
    networks: tuple[Network, ...] = ()
    """Where it may connect from; empty is everywhere."""
    max_links: int = 0
    max_connections: int = 0
    """At once, over all relay clients of this name; 0 is no limit of its own, here and below."""
    limit_rate: int = 0
    """Bytes a second that each of its connections may carry each way."""

    def why_not(self, host: str, service: str, port: int | None = None) -> str:
        """Why a link from this host may not be for this service, on a port of its own if that is given (0 is any); ""
        where it may."""
        may = "the server's clients file gives it "
        if self.networks and not is_among((host.strip("[]"), 0), self.networks):
            return f"{self.name} may not connect from {host}: {may}{', '.join(map(str, self.networks))}"
        if port is not None:
            if any(port in ports or port == 0 for ports in self.ports):
                return ""
            asked = f"port {port}" if port else "a port"
            return f"{self.name} may not ask for {asked}: {may}{', '.join(map(str, self.ports)) or 'none'}"
        if service in self.services:
            return ""
        return f"{self.name} may not publish {shown(service, 64)}: {may}{', '.join(self.services) or 'no service'}"


Rights = Mapping[str, Identity]
"""The identities of a clients file by name."""


def load_rights(
    path: str, services: Sequence[str], client_ports: tuple[PortRange, ...], by_certificate: bool
) -> Rights:
    """Read a clients file, for a server with these services; where relay clients show certificates, tokens may be left
    out.  Raises `OSError`, and `ValueError` with the number of the line that is wrong."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise OSError(error.errno, f"--clients {path}: {say_error(error)}") from error
    except UnicodeDecodeError:
        raise ValueError(f"--clients {path}: it is not UTF-8") from None
    rights = parse_rights(text, path, services, client_ports, by_certificate)
    if not rights:  # most likely it was cut off as it was written
        raise ValueError(f"--clients {path}: there is no section in it, so nobody could come")
    return rights


def parse_rights(
    text: str,
    path: str,
    services: Sequence[str],
    client_ports: tuple[PortRange, ...] = (),
    by_certificate: bool = False,
) -> Rights:
    """The same with the file's text; `path` is what errors name."""
    identities: dict[str, Identity] = {}
    tokens: dict[bytes, str] = {}
    sections = split(text, path)
    for name, settings in sections.items():

        def wrong(key: str, why: object, name: str = name) -> ValueError:
            return ValueError(f"{path}, line {line_of(text, name, key)}: {why}")

        if not name.isprintable() or len(name) > 64:
            raise wrong("", "a relay client's name has at most 64 characters, all of them printable")
        values: dict[str, Any] = {}
        for key, written in settings.items():
            if key not in KEYS:
                raise wrong(key, f"there is no setting {shown(key, 40)}{say_meant(key, KEYS)}")
            try:
                values[key] = KEYS[key](trim(written))
            except ValueError as error:
                raise wrong(key, f"{key}: expected {error}") from None
        if "token" in values and "token-file" in values:
            raise wrong("token", "give token or token-file, not both")
        token = values.get("token", "").encode("utf-8", "surrogateescape")
        if "token-file" in values:
            try:
                token = read_secret("token-file", values["token-file"])
            except (OSError, ValueError) as error:
                raise wrong("token-file", say_error(error)) from error
        if not token and not by_certificate:
            raise wrong("", f"{name} has no token: give it token or token-file")
        if token and token in tokens:
            raise wrong("", f"{name} has the token of {tokens[token]}: then each could pose as the other")
        tokens[token] = name
        named = values.get("services", ())
        if unknown := [one for one in named if one not in (*services, ALL)]:
            raise wrong("services", f"there is no service {unknown[0]} here; there is {', '.join(services) or 'none'}")
        ports = values.get("ports", ())
        if ports == ALL and not client_ports:
            raise wrong("ports", "* stands for the ports of --client-ports, and there are none")
        if not named and not ports:
            raise wrong("", f"{name} may publish nothing: give it services or ports")
        identities[name] = Identity(
            name, token, values.get("token-file", ""), tuple(services) if ALL in named else named,
            client_ports if ports == ALL else ports, values.get("from", ()), values.get("max-links", 0),
            values.get("max-connections", 0), values.get("limit-rate", 0),
        )  # fmt: skip
    return identities


def split(text: str, path: str) -> dict[str, dict[str, str]]:
    """The settings of each section.  Raises `ValueError` that shows nothing of a value."""
    parser = configparser.ConfigParser(
        interpolation=None, default_section="", delimiters=("=",), empty_lines_in_values=False
    )
    parser.optionxform = lambda key: key.lower().replace("_", "-")  # type: ignore[method-assign, assignment]
    try:
        parser.read_string(text, path)
    except configparser.DuplicateSectionError as error:
        raise ValueError(f"{path}, line {error.lineno}: there are two sections {shown(error.section, 64)}") from None
    except configparser.DuplicateOptionError as error:
        raise ValueError(f"{path}, line {error.lineno}: {shown(error.option, 40)} stands there twice") from None
    except configparser.MissingSectionHeaderError as error:
        why = "the ] is missing" if error.line.startswith("[") else "a section has to begin first, as in [nas]"
        raise ValueError(f"{path}, line {error.lineno}: {why}") from None
    except configparser.ParsingError as error:
        number = error.errors[0][0] if error.errors else getattr(error, "lineno", 1)
        raise ValueError(f"{path}, line {number}: expected a line of the form key = value") from None
    return {name: dict(parser.items(name)) for name in parser.sections()}


def line_of(text: str, section: str, key: str = "") -> int:
    """The number of the line where a section begins, or has this key."""
    first, inside = 1, False
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\[(.+)\]", line.strip()):
            inside = header[1] == section
            first = number if inside else first
        elif inside and key and line.partition("=")[0].strip().lower().replace("_", "-") == key:
            return number
    return first


def _names(text: str) -> tuple[str, ...]:
    names = tuple(trim(one) for one in text.replace("\n", ",").split(",") if trim(one))
    try:
        return tuple(one if one == ALL else parse_name(one) for one in names)
    except ValueError:
        raise ValueError("names of services with commas between them, or *") from None


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(parse_network(trim(one)) for one in text.replace("\n", ",").split(",") if trim(one))


def _ports(text: str) -> tuple[PortRange, ...] | str:
    return ALL if text == ALL else tuple(parse_ports(trim(one)) for one in text.replace("\n", ",").split(","))


KEYS: dict[str, Callable[[str], Any]] = {
    "token": parse_secret, "token-file": parse_path, "services": _names, "ports": _ports, "from": _networks,
    "max-links": parse_positive, "max-connections": parse_positive, "limit-rate": parse_rate,
}  # fmt: skip
"""The settings of a section, and what reads the value of each."""
