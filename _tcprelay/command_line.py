"""Options from the command line, the environment and the configuration file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn

from .addresses import split_place
from .arguments import arrange, say_meant
from .logs import fail
from .client_options import ClientOptions
from .options import Options, OptionsT, WrongOptions, options_of
from .server_options import ServerOptions
from .state import say_open
from .text import shown, trim
from .values import Option


@dataclass(frozen=True)
class Given(Generic[OptionsT]):
    """What a command was given."""

    options: OptionsT
    check: bool
    """Whether to check them alone."""
    newcomer: str
    """The relay client that is to be added to a clients file, and nothing else done; "" for none."""
    remarks: list[str]
    """For the log: what is odd in them."""
    origins: dict[str, str]
    """Where each comes from, that was given, by field name."""
    files: list[str]
    """The configuration files that were read."""

    def summary(self) -> str:
        """In one line the files and variables that were read; "" for none."""
        variables = [origin.split()[-1] for origin in self.origins.values() if origin.startswith(VARIABLE)]
        return ", ".join([*self.files, *dict.fromkeys(variables)])

    def report(self) -> str:
        """What --check says."""
        lines = [
            f"{self.options.command}: the configuration is valid",
            f"read: {self.summary() or 'no file, no variable'}",
        ]
        for name, info in options_of(type(self.options)):
            value = getattr(self.options, name)
            origin = self.origins.get(name) or self.origins.get(PARTNERS.get(name, ""))
            if origin is None or value is None:
                continue
            lines.append(f"  {name.replace('_', '-')} = {shown(say(value, info))}    {origin}")
        return "\n".join([*lines, "everything else has its default"])


VARIABLE = "environment variable"
COMMAND_LINE = "command line"
PARTNERS = {"port": "host", "relay_port": "relay_host"}
"""The port can stand in the same word as the host."""


def _rank(origin: str) -> int:
    """Which place counts before which, where the port stands in one and the host with its port in another."""
    return 0 if origin == COMMAND_LINE else 1 if origin.startswith(VARIABLE) else 2


def say(value: Any, info: Option) -> str:
    """A value as it stands in a configuration file; of a secret no more than may be seen."""
    if info.many:
        return ", ".join(map(str, value))
    if info.secret:
        return info.public(value)
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if info.is_flag and value == "relay":  # of --tls
        return "true"
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_options(prog: str, usage: str, cls: type[OptionsT], argv: Sequence[str] | None) -> Given[OptionsT]:
    """Options from the command line, the environment and the configuration file.

    Ends the process for ``--help`` and ``--version``, and where `read_options` finds something wrong.
    """
    try:
        return read_options(prog, usage, cls, argv)
    except WrongOptions as error:
        fail(prog, error.status, str(error))


def read_options(prog: str, usage: str, cls: type[OptionsT], argv: Sequence[str] | None) -> Given[OptionsT]:
    """The same; raises `WrongOptions` with status 2 for a wrong option (one line that names the option, the value,
    where it came from and what is accepted), and 1 for a file that cannot be read."""
    try:
        from .parser import find_origins, make_parser  # not before: see there
    except ModuleNotFoundError:
        raise WrongOptions(
            1, "ConfigArgParse is not installed: pip install ConfigArgParse, or use the single file of make dist"
        ) from None
    try:
        words = arrange(cls, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        raise WrongOptions(2, str(error)) from error
    environment, remarks = read_environment(cls)
    parser = make_parser(prog, usage, cls, words, remarks)
    given = parser.parse_args(words, env_vars=environment)
    origins = find_origins(parser)
    values: dict[str, Any] = {}

    def wrong(name: str, value: str, expected: object) -> NoReturn:
        raise WrongOptions(2, f"--{name.replace('_', '-')}{value} (from {origins[name]}): expected {expected}")

    if given.config == "":
        wrong("config", " ''", "the path of a file")
    for name, info in options_of(cls):
        text = getattr(given, name)
        if text is None:
            continue
        words = [trim(text)] if not info.many else [trim(word) for item in text for word in item.split(",")]
        words = [word for word in words if word] or [""]
        try:
            parsed = [info.parse(word) for word in words]
        except ValueError as error:
            several = "; several are divided by commas" if info.many else ""
            wrong(name, "" if info.secret else f" {shown(','.join(words))!r}", f"{error}{several}")
        values[name] = tuple(parsed) if info.many else parsed[0]
    for port, host in PARTNERS.items():
        if port in values and host in values and split_place(values[host])[1] is not None:
            ranks = [_rank(origins[name]) for name in (host, port)]
            if ranks[0] < ranks[1]:
                del values[port]
            elif ranks[1] < ranks[0]:
                values[host] = split_place(values[host])[0]
    try:
        options = cls(**values)
    except ValueError as error:
        raise WrongOptions(
            2, "; ".join([str(error), *remarks])
        ) from error  # what is missing may stand where it was not taken from
    for name, info in options_of(cls):
        file = origins[name].rpartition(", line ")[0]
        if name in values and file and info.hides(values[name]) and (may := say_open(file)):
            remarks.append(f"{file} holds the {'password of --via' if name == 'via' else name}, and {may}")
        elif name == "via" and name in values and origins[name] == COMMAND_LINE and info.hides(values[name]):
            remarks.append(
                "the password of --via stands on the command line, where ps shows it to all users of this host; it can "
                "stand in TCPRELAY_VIA or in a configuration file"
            )
    newcomer = getattr(given, "add_client", None)
    if newcomer == "":
        raise WrongOptions(2, "--add-client '': expected the name of a relay client")
    return Given(
        options, given.check, newcomer or "", remarks, {name: origins[name] for name in values}, parser.sources.files
    )


def read_environment(cls: type[Options]) -> tuple[dict[str, str], list[str]]:
    """The environment as far as it is meant for options, and warnings about the rest of it."""
    known = known_variables()
    infos = {f"TCPRELAY_{name.upper()}": info for name, info in options_of(cls)}
    foreign = service_variables(os.environ)
    environment, warnings = {}, []
    for name in sorted(name for name in os.environ if name.startswith("TCPRELAY_") and name not in foreign):
        info, value = infos.get(name), trim(os.environ[name])
        if name not in known:
            meant = say_meant(name, known, "tcprelay_")
            warnings.append(f"there is no option for the environment variable {shown(name)}{meant}")
        if info and info.secret and len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]:
            warnings.append(
                f"the quotes around the value of {name} count as a part of it (docker --env-file keeps them)"
            )
        if value or name == "TCPRELAY_CONFIG":  # which may name all that secures: empty, it is refused, too
            environment[name] = value
        elif info and info.secures:
            environment[name] = " "  # stands for an empty value: ConfigArgParse would not see that it is given
    if ignored := sorted(foreign & (known | set(infos))):
        warnings.append(
            f"{', '.join(ignored)}: ignored, as made by Kubernetes (or docker --link) for a Service; "
            "enableServiceLinks: false in the pod's spec keeps them away"
        )
    return environment, warnings


def known_variables() -> set[str]:
    """The variables that are options of either role."""
    names = {name for cls in (ServerOptions, ClientOptions) for name, _ in options_of(cls)}
    return {"TCPRELAY_CONFIG"} | {f"TCPRELAY_{name.upper()}" for name in names}


def service_variables(environ: Mapping[str, str]) -> set[str]:
    """The variables that Kubernetes, or ``docker --link``, has made for a Service named tcprelay, or tcprelay-relay and
    the like: some have the names of options.

    A value that is never set by hand shows that they are there: ``TCPRELAY_PORT=tcp://10.0.0.1:1080``, or the same
    address in ``TCPRELAY_PORT_1080_TCP``.  A variable of the pod's own replaces a made one of that name.  It can be
    told from it unless both have the same value: ``TCPRELAY_PORT=22`` is no address, and in ``TCPRELAY_SERVICE_PORT``
    Kubernetes puts the port that is in the address of ``TCPRELAY_PORT``, the Service's first.
    """
    address = re.compile(r"(?:tcp|udp|sctp)://.+:(\d+)")
    ports: dict[str, set[str]] = {}
    """The ports of each Service, by what its variables begin with."""
    for name, value in environ.items():
        begun = re.fullmatch(r"(TCPRELAY(?:_\w+?)?)_PORT(?:_\d+_(?:TCP|UDP|SCTP))?", name)
        if begun and (found := address.fullmatch(value)):
            ports.setdefault(begun[1], set()).add(found[1])
    made = set()
    for service, all_ports in ports.items():
        first = address.fullmatch(environ.get(f"{service}_PORT", ""))
        forms = [
            ("PORT", address.pattern),
            ("SERVICE_PORT", first[1] if first else "|".join(all_ports)),
            ("NAME", "/.*"),  # docker's, as in /web/tcprelay
            (r"PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?|SERVICE_(HOST|PORT_\w+)|ENV_\w+", "(?s:.*)"),
        ]
        made |= {
            name
            for name, value in environ.items()
            for ending, content in forms
            if re.fullmatch(f"{service}_({ending})", name) and re.fullmatch(content, value)
        }
    return made
