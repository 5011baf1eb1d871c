"""What reads the command line and the configuration files: ConfigArgParse, as the table of options needs it.

Imported by the commands alone: a program that embeds the relay needs the standard library only.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import configargparse

from . import __version__
from .arguments import OWN, say_meant, spellings
from .options import Options, WrongOptions, options_of
from .text import say_error, shown, trim
from .values import OPTION_GROUPS, Option

EMPTY = " "
"""Stands for an empty value, of which ConfigArgParse makes none at all where an option can stand alone."""
EPILOG = (
    "Every option can also stand in the environment (--relay-port as TCPRELAY_RELAY_PORT) and in a configuration file "
    "(relay-port = 10080): the one named by --config, or {}. The command line goes before the environment, and that "
    "before the file."
)


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """ConfigArgParse's, which raises `WrongOptions` that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        caught = sys.exc_info()[1]
        if isinstance(caught, WrongOptions):  # of `Sources.open`: ConfigArgParse makes a sentence of its own of that
            raise caught
        raise WrongOptions(2, message.replace("\n", " ").removeprefix("argument "))


class HelpFormatter(argparse.HelpFormatter):
    """Of an option's spellings it shows the first one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [n for n in action.option_strings if n.islower() or len(n) == 2]
        return ", ".join(names) + (f" {action.metavar}" if action.metavar else "")


class Sources:
    """The configuration files of one command, as they are read."""

    def __init__(self) -> None:
        self.known: dict[str, Option] = {}
        """The options, by their names in a file."""
        self.files: list[str] = []
        """What has been read."""
        self.lines: dict[tuple[str, str], int] = {}
        """The number of the line of each setting, by file and name."""

    def open(self, path: str, mode: str = "r") -> SettingsFile:
        """As ConfigArgParse calls it.  Raises `WrongOptions`."""
        try:
            with open(path, mode, encoding="utf-8-sig") as file:
                text = file.read()
        except OSError as error:
            raise WrongOptions(1, f"cannot read {path}: {say_error(error)}") from error
        except UnicodeDecodeError as error:
            raise WrongOptions(1, f"cannot read {path}: it is not UTF-8") from error
        self.files.append(path)
        return SettingsFile(text, path, self)


class SettingsFile(io.StringIO):
    """A configuration file, read; with what its parser has to know."""

    def __init__(self, text: str, name: str, sources: Sources) -> None:
        super().__init__(text)
        self.name = name  # as ConfigArgParse asks for it
        self.sources = sources


class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """Reads a configuration file.

    The parser of ConfigArgParse cuts a value off where a comment might begin, and takes one in brackets for a list:
    secrets, too.
    """

    def parse(self, stream: SettingsFile) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for number, line in enumerate(map(trim, stream), 1):
            if not line or line[0] in "#;[" or line.startswith("---"):
                continue
            try:
                key, value = read_setting(line, stream.sources.known)
                if key in items and not stream.sources.known[key].many:
                    raise ValueError(f"{key} stands there twice")
            except ValueError as error:
                raise WrongOptions(2, f"{stream.name}, line {number}: {error}") from None
            items[key] = items.get(key, []) + value if isinstance(value, list) else value or EMPTY
            stream.sources.lines[stream.name, key] = number
        return items


def make_parser(prog: str, usage: str, cls: type[Options], argv: list[str], warnings: list[str]) -> Parser:
    """The parser for the options of a command; `usage` is what --help begins with."""
    sources = Sources()
    places = default_places("server.conf" if cls.command == "tcprelays" else "client.conf")
    chosen = "TCPRELAY_CONFIG" in os.environ or any(word.partition("=")[0] == "--config" for word in argv)
    parser = Parser(
        prog=prog, usage=usage, allow_abbrev=False, add_help=False, formatter_class=HelpFormatter,
        default_config_files=[] if chosen else list(find_files(places, warnings)),
        config_file_parser_class=ConfigFile, config_file_open_func=sources.open,
        add_config_file_help=False, add_env_var_help=False, epilog=EPILOG.format(" and ".join(places)),
    )  # fmt: skip
    parser.sources = sources
    groups = {name: parser.add_argument_group(name) for name in OPTION_GROUPS}
    for name, info in options_of(cls):
        sources.known |= dict.fromkeys(add_option(groups[info.group], name, info), info)
    running = groups["Running"]
    running.add_argument("--config", metavar="FILE", is_config_file_arg=True, env_var="TCPRELAY_CONFIG",
                         help="configuration file, instead of the ones in the default places")  # fmt: skip
    running.add_argument("--check", action="store_true", help="say what the configuration comes to, and exit")
    if "--add-client" in OWN[cls.command]:
        running.add_argument("--add-client", metavar="NAME", help="make a section for a relay client in the file that "
                             "--clients names, say it and what to run on the other side, and exit")  # fmt: skip
    running.add_argument("-v", "--verbose", action="store_true", help="the same as --log-level debug")
    version = f"{prog} {__version__}"
    running.add_argument("-V", "--version", action="version", version=version, help="say the version and exit")
    running.add_argument("-h", "--help", action="help", help="say this and exit")
    return parser


def add_option(group: Any, name: str, info: Option) -> list[str]:
    """Add an option to a group of the parser; returns its names in a file."""
    names = spellings(name, info)
    extra: dict[str, Any] = {"action": "append"} if info.many else {}
    if info.is_flag:
        extra = {"nargs": "?", "const": "true"}
    default = f" (default: {info.default})" if info.default else ""
    group.add_argument(
        *(f"--{word}" for word in names), dest=name, default=None, env_var=f"TCPRELAY_{name.upper()}",
        metavar=info.metavar or None, help=(info.help + default).replace("%", "%%"), **extra,
    )  # fmt: skip
    return names


def default_places(file: str) -> list[str]:
    """Where a configuration file is looked for.  Without HOME and a passwd entry "~" stays as it is, and would be a
    directory here."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [path for path in (f"/etc/tcprelay/{file}", os.path.join(home, "tcprelay", file)) if os.path.isabs(path)]


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
        raise ValueError(f"unknown option {shown(written)}{say_meant(key, known)}" if named else "unknown option")
    if value[:1] in ("'", '"'):
        if len(value) < 2 or value[-1] != value[0]:
            raise ValueError(f"the value of {key} begins with a quote and does not end with the same one")
        value = value[1:-1]
    elif re.search(r"\s[#;]", rest):
        raise ValueError("a comment needs a line of its own, and a value with # or ; behind a blank needs quotes")
    elif not value and not equals:
        if not known[key].is_flag:
            raise ValueError(f"{key} needs a value")
        value = "true"
    if not known[key].many:
        return key, value
    if value[:1] + value[-1:] == "[]":
        return key, [trim(word).strip("'\"") for word in value[1:-1].split(",")]
    return key, [value]


def find_origins(parser: Parser) -> dict[str, str]:
    """Where each value came from, by field name."""
    origins: dict[str, str] = defaultdict(lambda: "command line")
    for source, settings in parser.get_source_to_settings_dict().items():
        kind, _, path = source.partition("|")
        for key, (action, _) in settings.items():
            if kind == "environment_variables":
                origins[action.dest] = f"environment variable {key}"
            elif kind == "config_file":
                origins[action.dest] = f"{path}, line {parser.sources.lines[path, key]}"
    return origins
