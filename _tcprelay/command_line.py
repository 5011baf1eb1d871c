"""Options from the command line, the environment and the configuration file."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

from . import __version__
from .logs import log_writer
from .options import ClientOptions, Options, OptionsT, ServerOptions, options_of
from .text import say_error, shown, trim
from .values import OPTION_GROUPS, Option, parse_flag, parse_tls

EMPTY = " "
"""Stands for an empty value, of which ConfigArgParse makes none at all where an option can stand alone."""


def parse_options(
    prog: str, description: str, cls: type[OptionsT], argv: Sequence[str] | None
) -> tuple[OptionsT, bool, list[str]]:
    """Options from the command line, the environment and the configuration file; whether to check alone; and warnings
    for the log.

    Ends the process for ``--help`` and ``--version``, with status 2 for a wrong option (one line that names the
    option, the value, where it came from and what is accepted), and 1 for a file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    environment, warnings = read_environment(cls)
    parser = _make_parser(prog, description, cls, argv, warnings)
    given, unknown = parser.parse_known_args(argv, env_vars=environment)
    if unknown:
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")] or ["a word without an option"]
        fail(prog, 2, f"unknown option: {shown(' '.join(names))}")
    origins = _find_origins(parser)
    values: dict[str, Any] = {}

    def wrong(name: str, value: str, expected: object) -> NoReturn:
        origin = origins.get(name, "command line")
        fail(prog, 2, f"--{name.replace('_', '-')}{value} (from {origin}): expected {expected}")

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
            wrong(name, "" if info.secret else f" {shown(','.join(words))!r}", error)
        values[name] = tuple(parsed) if info.many else parsed[0]
    try:
        return cls(**values), given.check, warnings
    except ValueError as error:
        fail(prog, 2, "; ".join([str(error), *warnings]))  # what is missing may stand where it was not taken from


def read_environment(cls: type[Options]) -> tuple[dict[str, str], list[str]]:
    """The environment as far as it is meant for options, and warnings about the rest of it."""
    known = known_variables()
    infos = {f"TCPRELAY_{name.upper()}": info for name, info in options_of(cls)}
    foreign = service_variables(os.environ)
    environment, warnings = {}, []
    for name in sorted(name for name in os.environ if name.startswith("TCPRELAY_") and name not in foreign):
        info, value = infos.get(name), trim(os.environ[name])
        if name not in known:
            warnings.append(f"there is no option for the environment variable {shown(name)}")
        if info and info.secret and len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]:
            warnings.append(
                f"the quotes around the value of {name} count as a part of it (docker --env-file keeps them)"
            )
        if value or name == "TCPRELAY_CONFIG":  # which may name all that secures: empty, it is refused, too
            environment[name] = value
        elif info and info.secures:
            environment[name] = EMPTY
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

    What nobody sets by hand tells that they are there: ``TCPRELAY_PORT=tcp://10.0.0.1:1080``, or the same address in
    ``TCPRELAY_PORT_1080_TCP``.  A variable of the pod's own replaces a made one of that name.  It can be told from it
    unless both have the same value: ``TCPRELAY_PORT=22`` is no address, and in ``TCPRELAY_SERVICE_PORT`` Kubernetes
    puts the port that is in the address of ``TCPRELAY_PORT``, the Service's first.
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


def fail(prog: str, status: int, message: str) -> NoReturn:
    """End the process with one line.  Raises `SystemExit`."""
    log_writer.put(f"{prog}: {message}\n")
    log_writer.end()
    raise SystemExit(status)


def _make_parser(prog: str, description: str, cls: type[Options], argv: list[str], warnings: list[str]) -> Any:
    import argparse

    import configargparse  # here alone: what embeds the relay needs the standard library only

    class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            fail(prog, 2, message.replace("\n", " ").removeprefix("argument "))

    class HelpFormatter(argparse.HelpFormatter):
        def _format_action_invocation(self, action: argparse.Action) -> str:
            names = [n for n in action.option_strings if n.islower() or len(n) == 2]
            return ", ".join(names) + (f" {action.metavar}" if action.metavar else "")

    class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
        """The one of ConfigArgParse cuts a value off where a comment might begin, and takes one in brackets for a
        list: secrets, too."""

        def parse(self, stream: IO[str]) -> dict[str, Any]:
            items: dict[str, Any] = {}
            for number, line in enumerate(map(trim, stream), 1):
                if not line or line[0] in "#;[" or line.startswith("---"):
                    continue
                try:
                    key, value = read_setting(line, known)
                    if key in items and not known[key].many:
                        raise ValueError(f"{key} stands there twice")
                except ValueError as error:
                    fail(prog, 2, f"{stream.name}, line {number}: {error}")
                items[key] = items.get(key, []) + value if isinstance(value, list) else value or EMPTY
                lines[stream.name, key] = number
            return items

    def open_file(path: str, mode: str = "r") -> IO[str]:
        try:
            with open(path, mode, encoding="utf-8-sig") as file:
                stream = io.StringIO(file.read())
        except OSError as error:
            fail(prog, 1, f"cannot read {path}: {say_error(error)}")
        except UnicodeDecodeError:
            fail(prog, 1, f"cannot read {path}: it is not UTF-8")
        stream.name = path
        return stream

    role = prog.removeprefix("tcprelay")
    file = {"s": "server.conf", "c": "client.conf"}.get(role, "tcprelay.conf")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    # Without HOME and a passwd entry "~" stays as it is, and would be a directory here.
    places = [path for path in (f"/etc/tcprelay/{file}", os.path.join(home, "tcprelay", file)) if os.path.isabs(path)]
    chosen = "TCPRELAY_CONFIG" in os.environ or any(w.partition("=")[0] == "--config" for w in argv)
    parser = Parser(
        prog=prog, usage=f"{prog} [options]", description=description, allow_abbrev=False, add_help=False,
        default_config_files=[] if chosen else list(find_files(places, warnings)), config_file_parser_class=ConfigFile,
        config_file_open_func=open_file, add_config_file_help=False, add_env_var_help=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30),
        epilog="Every option can also stand in the environment (--relay-port as TCPRELAY_RELAY_PORT) and in a "
        f"configuration file (relay-port = 10080): the one named by --config, or {' and '.join(places)}. "
        "The command line goes before the environment, and that before the file.",
    )  # fmt: skip
    groups = {name: parser.add_argument_group(name) for name in OPTION_GROUPS}
    known: dict[str, Option] = {}
    lines = parser.lines = {}
    for name, info in options_of(cls):
        dashed = name.replace("_", "-")
        names = [f"--{dashed}"] + ([f"--{info.spelling}"] if info.spelling and info.spelling != dashed else [])
        known |= {n[2:]: info for n in names}
        extra: dict[str, Any] = {"action": "append"} if info.many else {}
        if info.parse in (parse_flag, parse_tls):
            extra = {"nargs": "?", "const": "true"}
        default = f" (default: {info.default})" if info.default else ""
        groups[info.group].add_argument(
            *names, dest=name, default=None, env_var=f"TCPRELAY_{name.upper()}",
            metavar=info.metavar or None, help=(info.help + default).replace("%", "%%"), **extra,
        )  # fmt: skip
    running = groups["Running"]
    running.add_argument("--config", metavar="FILE", is_config_file_arg=True, env_var="TCPRELAY_CONFIG",
                         help="configuration file, instead of the ones in the default places")  # fmt: skip
    running.add_argument("--check", action="store_true", help="check the configuration and exit")
    running.add_argument(
        "--version", action="version", version=f"{prog} {__version__}", help="say the version and exit"
    )
    running.add_argument("-h", "--help", action="help", help="say this and exit")
    return parser


def read_setting(line: str, known: Mapping[str, Option]) -> tuple[str, str | list[str]]:
    """The key of a line ``key = value`` of a configuration file, and its value; a list where it may be repeated.

    The value goes to the end of the line: where a comment might be meant the line is refused, and a secret is never cut
    short.  Quotes around the value are taken off, and what stands in them is taken as it is.  Raises `ValueError` that
    shows nothing of the value.
    """
    found = re.fullmatch(r"(?:--)?([^\s:=]+)(\s*[:=])?(.*)", line)
    if not found:
        raise ValueError("not a line of the form key = value")
    written, equals, rest = found.groups()
    key, value = written.strip("-").replace("_", "-"), trim(rest)
    if key not in known:
        # Anything but "name = value" may be a secret: a token file taken for the configuration.
        named = "=" in line and key.replace("-", "").isalpha()
        raise ValueError(f"unknown option {shown(written)}" if named else "unknown option")
    if value[:1] in ("'", '"'):
        if len(value) < 2 or value[-1] != value[0]:
            raise ValueError(f"the value of {key} begins with a quote and does not end with the same one")
        value = value[1:-1]
    elif re.search(r"\s[#;]", rest):
        raise ValueError("a comment needs a line of its own, and a value with # or ; behind a blank needs quotes")
    elif not value and not equals:
        if known[key].parse not in (parse_flag, parse_tls):
            raise ValueError(f"{key} needs a value")
        value = "true"
    if not known[key].many:
        return key, value
    if value[:1] + value[-1:] == "[]":
        return key, [trim(word).strip("'\"") for word in value[1:-1].split(",")]
    return key, [value]


def find_files(places: list[str], warnings: list[str]) -> Iterator[str]:
    """The configuration files in default places, as patterns for `glob`.

    One that this user may not read, or look for, is another's: that is a warning.  Whatever else is wrong with one, it
    is meant for us, and reading it tells.
    """
    for path in places:
        try:
            os.lstat(path)  # a link to nowhere is there
            try:
                open(path, "rb").close()
            except PermissionError:
                raise
            except OSError:
                pass
            yield glob.escape(path)
        except PermissionError as error:
            warnings.append(f"the configuration file {path} is left out: {say_error(error)}")
        except OSError:
            pass


def _find_origins(parser: Any) -> dict[str, str]:
    """Where each value that is not from the command line came from, by field name."""
    origins = {}
    for source, settings in parser.get_source_to_settings_dict().items():
        kind, _, path = source.partition("|")
        for key, (action, _) in settings.items():
            if kind == "environment_variables":
                origins[action.dest] = f"environment variable {key}"
            elif kind == "config_file":
                origins[action.dest] = f"{path}, line {parser.lines[path, key]}"
    return origins
