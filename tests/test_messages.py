"""Every message of the commands stands on docs/troubleshooting.md, which says what it means and what to do.

A message is any text in the code that holds words and a blank, wherever it stands: raised, returned, logged, or kept
in a table.  Docstrings, --help and names of options are none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from _tcprelay.client_options import ClientOptions
from _tcprelay.options import options_of
from _tcprelay.server_options import ServerOptions

from .peers import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 8
"""Characters of the longest piece of a message that never varies, below which it is not looked for."""
VARIABLE = re.compile(r"\0|%(?:\(\w+\))?(?:\.\d+)?[a-z]|\{[^{}]*\}")
"""What stands for a value: in f-strings (see `text_of`), for logging, and for `str.format`."""
WORD = re.compile(r"(?<![\w-])[a-z]{2,}(?![\w-])")
HELP = {"USAGE", "EPILOG", "FAILURES"}
"""The constants that --help or a table of the documents shows."""
UNSEEN = {
    "a Unix socket": "the address of a peer without one; all peers of a relay come over TCP",
    "a raw link has no end but its own": "caught where it is raised, as the end of a link is",
    "given up": "raised only in a connection that was broken off before, and the first reason counts",
    "no address": "stands for the error of the last address, and a host has one at least",
    "a message of more than": "between a parent and its workers, which send no message that is so long",
    "the relay server's proofs do not cover its certificate": "caught where links are opened: another one is dialled",
    "] token =": "the section that --add-client prints",
    "services =": "likewise",
    "more names were counted than there are rows for": "8,192 names, in a clients file that was changed all the time",
    "the message is too short": "caught where a ClientHello is read, which then asks for nothing",
    "no application protocol": "what OpenSSL says of an alert; it is said otherwise",
    "tcprelay link 1": "a part of what a proof is made of",
    "argument (--[a-z]+): ignored explicit": "what argparse says, and is said otherwise",
    "(while attempting": "what Python puts into an error, and is left out",
    "application/openmetrics-text; version=1.0.0; charset=utf-8": "a content type",
    "text/plain; version=0.0.4; charset=utf-8": "likewise",
    "(default:": "it is --help",
    "default-src 'none'": "a part of what browsers are told, and so are the next six",
    "default-src 'none'; frame-ancestors 'none'": "likewise",
    "connect-src 'self'": "likewise",
    "img-src data:": "likewise",
    "base-uri 'none'": "likewise",
    "form-action 'none'": "likewise",
    "frame-ancestors 'none'": "likewise",
    "require-trusted-types-for 'script'": "likewise",
    "trusted-types 'none'": "likewise",
    "User-Agent: tcprelay Connection: close": "a part of what a service is asked",
    "text/html; charset=utf-8": "a type of what is answered over HTTP",
    "text/plain; charset=utf-8": "likewise",
    "tcprelay server|client|status [options]: the commands tcprelays and tcprelayc, and what those that run are doing; "
    "each has --help": "it is --help",
}
"""The longest pieces of the texts that no user of the commands sees as a message, each with the reason."""


class Message(NamedTuple):
    """A text in the code: the longest piece of it that never varies, and its line."""

    piece: str
    line: int


def text_of(node: ast.AST) -> str | None:
    """A string, or an f-string with NUL for each of its values; ``None`` for everything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_help(node: ast.AST) -> bool:
    """A field of an options class, what --help says of an option, or a constant that it shows."""
    match node:
        case ast.Call(func=ast.Name(id="option")) | ast.keyword(arg="help"):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in HELP
    return False


def says_nothing(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node whose texts are no messages: documentation, help, and what belongs to an f-string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield from (part for part in node.values if isinstance(part, ast.Constant))
    elif is_help(node):
        yield from ast.walk(node)


def normal(text: str) -> str:
    """A text with one blank wherever there are some, or line ends."""
    return " ".join(text.split())


def messages_in(source: str) -> Iterator[Message]:
    """The messages in the text of a module."""
    nodes = list(ast.walk(ast.parse(source)))
    silent = {part for node in nodes for part in says_nothing(node)}
    names = {name for cls in (ServerOptions, ClientOptions) for name, _ in options_of(cls)}
    for node in nodes:
        if node in silent or (text := text_of(node)) is None or set(text.split()) <= names:
            continue
        constant = normal(VARIABLE.sub("\0", text))
        piece = max(map(normal, constant.split("\0")), key=len)
        if " " in constant and WORD.search(constant) and len(piece) >= LEAST:
            yield Message(piece, getattr(node, "lineno", 0))


def all_messages() -> dict[str, str]:
    """Each message of the product once, and where it stands."""
    found: dict[str, str] = {}
    for path in sorted([*ROOT.glob("tcprelay*.py"), *(ROOT / "_tcprelay").rglob("*.py")]):
        for piece, line in messages_in(path.read_text(encoding="utf-8")):
            found.setdefault(piece, f"{path.relative_to(ROOT)}, line {line}")
    return found


def quoted_in(page: str) -> list[str]:
    """What stands in code font on a page."""
    return [normal(span) for _, span in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", page, re.DOTALL)]


def missing_from(page: str, messages: dict[str, str]) -> list[str]:
    """The messages that do not stand on a page in code font, and where they are in the code."""
    spans = quoted_in(page)
    return [f"{where}: {piece}" for piece, where in messages.items() if not any(piece in span for span in spans)]


def test_every_message_is_explained() -> None:
    """What somebody reads in the log is found on the page; what is named below belongs there, or among `UNSEEN`."""
    messages = {piece: where for piece, where in all_messages().items() if piece not in UNSEEN}
    assert len(messages) > 250
    assert missing_from(PAGE.read_text(encoding="utf-8"), messages) == []


def test_what_is_not_explained_is_there() -> None:
    """An exception whose message has gone goes, too."""
    assert set(UNSEEN) <= set(all_messages())


def test_the_page_is_wrapped_and_closed() -> None:
    """No line is longer than those of the code, and each code span and fence has its end."""
    text = PAGE.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert all(paragraph.count("`") % 2 == 0 for paragraph in text.split("\n\n"))


@pytest.mark.parametrize(
    ("source", "piece"),
    [
        ('raise ValueError(f"the teapot {x} is out of order: {why}")', "is out of order:"),
        ('log.warning("%s is lost at sea: %.1f miles off", ship, far)', "is lost at sea:"),
        ('says = "the service {service} sings before {peer}"', "sings before"),
        ('HINTS = {5: "; fetch\\n   another one"}', "; fetch another one"),
        ("reason = f\"x {f'in another way, {b}' if a else ''} y\"", "in another way,"),
        ('return ("the first half "\n  "and the second")', "the first half and the second"),
    ],
)
def test_the_collector_finds_a_message(source: str, piece: str) -> None:
    """The longest piece of it that does not vary, wherever it stands; and a page has it in code font, or lacks it."""
    assert [message.piece for message in messages_in(source)] == [piece]
    assert missing_from(f"`it sings` and {piece}", {piece: "here"}) == [f"here: {piece}"]
    assert missing_from(f"- `… {piece}\n  …` and `x`", {piece: "here"}) == []
    assert missing_from(f"`… {piece.replace(' ', chr(10) + '  ')}`", {piece: "here"}) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What a module says of itself."""\nx = 1\n"""And of a variable."""',
        'port: int = option(None, parse, "port for relay clients", metavar="A PORT of it")',
        'parser.add_argument("--check", help="say what is valid and exit")',
        'USAGE = """the command and its words"""',
        'self._useless("cert pfx ca_file", "--tls")',
        'x = re.compile("^-----BEGIN [A-Z]+"), "utf-8", "RSA PRIVATE KEY", "is it"',
    ],
)
def test_the_collector_leaves_out_what_is_no_message(source: str) -> None:
    """Documentation, help, names of options, and what has no words or hardly any."""
    assert list(messages_in(source)) == []
