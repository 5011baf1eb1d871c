"""The words of a command line, put so that each is taken for what it was meant to be.

A value may begin with a dash, a flag leaves the word behind it alone where that cannot be its value, words without an
option are the short form (`Options.short`), and beside what is unknown stands the nearest that is known.
ConfigArgParse then gets nothing but flags and ``--name=value``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

from .client_options import ClientOptions
from .options import Options, options_of
from .server_options import ServerOptions
from .text import shown, trim
from .values import Option

ALONE = {
    "--check": "--check", "--help": "--help", "-h": "--help", "--version": "--version", "-V": "--version",
    "--verbose": "--log-level=debug", "-v": "--log-level=debug",
}  # fmt: skip
"""The commands' own options, which have no value, and what each stands for."""

OWN = {"tcprelays": ("--config", "--add-client"), "tcprelayc": ("--config",)}
"""Those of each that have one."""

LONGEST_STRAY = 32
"""Characters of a stray word that is shown: what `secrets.token_urlsafe` makes is longer."""


def arrange(cls: type[Options], argv: Sequence[str]) -> list[str]:
    """The command line for ConfigArgParse.  Raises `ValueError` that says which word is wrong."""
    known = known_names(cls)
    words, arranged, bare = deque(argv), list[str](), list[str]()
    while words:
        word = words.popleft()
        name, equals, _ = word.partition("=")
        info = known.get(name)
        if word == "--":
            bare += words
            words.clear()
        elif not word.startswith("-") or word == "-":
            bare.append(word)
        elif word in ALONE:
            arranged.append(ALONE[word])
        elif name not in known:
            raise ValueError(f"unknown option: {shown(name)}{say_meant(name, known)}{_say_role(cls, name)}")
        elif equals or (info and info.is_flag and not _is_value(info, words)):
            arranged.append(word)
        elif not words or words[0].partition("=")[0] in known or words[0] in ALONE:
            raise ValueError(f"{word} needs a value")
        else:
            arranged.append(f"{word}={words.popleft()}")
    given = [info for word in arranged if (info := known.get(word.partition("=")[0]))]
    names = cls.short(bare)
    if len(names) < len(bare):
        stray = _show_stray(bare[len(names)], given)
        raise ValueError(f"{stray}: expected {cls.short_form}{say_meant(stray, ['status'])}")
    for word, name in zip(bare, names, strict=True):
        info = known[f"--{name}"]
        if info in given and info and not info.many:
            raise ValueError(f"{_show_stray(word, given)}: without an option it is the --{name}, which is given, too")
        arranged.append(f"--{name}={word}")
    return arranged


def _show_stray(word: str, given: Iterable[Option]) -> str:
    """A word that stands where none should, unless it may be a secret: a long one, or a piece of one with a blank."""
    if len(word) > LONGEST_STRAY or any(info.secret for info in given):
        return "a word without an option (not shown: it may be a secret)"
    return shown(word)


def known_names(cls: type[Options]) -> dict[str, Option | None]:
    """The options that may have a value, by each name on the command line; ``None`` is the commands' own."""
    names = {f"--{word}": info for name, info in options_of(cls) for word in spellings(name, info)}
    return {**names, **dict.fromkeys(OWN[cls.command])}


def spellings(name: str, info: Option) -> list[str]:
    """What an option is called on the command line and in a file: by its name, and node-tcp-relay's."""
    dashed = name.replace("_", "-")
    return [dashed] + ([info.spelling] if info.spelling not in ("", dashed) else [])


def _is_value(info: Option, words: deque[str]) -> bool:
    """Whether the next word is a flag's value.  What could be a port, a host or a service is not, unless it fits."""
    if not words or words[0].startswith("-"):
        return False
    try:
        info.parse(trim(words[0]))
    except ValueError:
        return not re.search("[0-9:=]", words[0])
    return True


def say_meant(name: str, known: Iterable[str], prefix: str = "--") -> str:
    """For a name that is unknown: the nearest of those that are known, as the end of a sentence; "" where none is
    near."""
    from difflib import get_close_matches  # not before something is wrong

    def plain(word: str) -> str:
        return word.lower().removeprefix(prefix).lstrip("-").replace("_", "-")

    names = {plain(word): word for word in known if word.islower() or word.isupper()}  # without node-tcp-relay's
    near = get_close_matches(plain(name), names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _say_role(cls: type[Options], name: str) -> str:
    """Whose option it is, where it is the other role's."""
    others = [role for role in (ServerOptions, ClientOptions) if role is not cls]
    whose = [role.command for role in others if name in known_names(role)]
    return f" ({name} is an option of {whose[0]})" if whose else ""
