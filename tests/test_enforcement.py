"""Each option that keeps somebody out does so, wherever it is set.

A configured secret that is silently not enforced is worse than none, so each is tried as it is used: from the
command line, the environment, a configuration file and the API, with a peer that does not belong and one that does.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.certificates import pin_of
from _tcprelay.command_line import parse_options
from _tcprelay.options import Options
from tcprelay import ClientOptions, LinkRefused, Published, RelayClient, RelayServer, ServerOptions, Unpublished

from .certificates import Certificates
from .conftest import Bench, replace, wait_until

Words = dict[str, str]
"""Options and their values; "" for a flag.  Of values "@NAME" stands for a certificate's file."""


@dataclass(frozen=True)
class Rule:
    """An option (with others that it needs), and what the peer must have to be let in."""

    name: str
    guard: Words
    stranger: Words
    friend: Words

    def __str__(self) -> str:
        return self.name


PAIR = {"cert": "@server.pem", "key": "@server.key"}
TLS = {"tls": "relay", **PAIR, "allow-unauthenticated": ""}
TRUST = {"tls": "relay", "ca-file": "@ca.pem"}
OWN = {"cert": "@client.pem", "key": "@client.key"}

SERVER_RULES = [
    Rule("token", {"token": "the-token"}, {}, {"token": "the-token"}),
    Rule("token, wrong", {"token": "the-token"}, {"token": "the-tokem"}, {"token": "the-token"}),
    Rule("token-file", {"token-file": "@token"}, {"token": "other"}, {"token": "from-the-file"}),
    Rule("auth, none", {"auth": "", "ca-file": "@ca.pem", **PAIR}, TRUST, {**TRUST, **OWN}),
    Rule(
        "auth, foreign", {"auth": "", "ca-file": "@ca.pem", **PAIR},
        {**TRUST, "cert": "@foreign.pem", "key": "@foreign.key"}, {**TRUST, **OWN},
    ),
    Rule(
        "auth and token", {"auth": "", "ca-file": "@ca.pem", "token": "the-token", **PAIR},
        {**TRUST, **OWN}, {**TRUST, **OWN, "token": "the-token"},
    ),
    Rule("tls", TLS, {}, TRUST),
    Rule("service", {"service": "web=0"}, {"publish": "other=localhost:1"}, {"publish": "web=localhost:1"}),
]  # fmt: skip

CLIENT_RULES = [
    Rule("token", {"token": "the-token"}, {}, {"token": "the-token"}),
    Rule("token, wrong", {"token": "the-token"}, {"token": "the-tokem"}, {"token": "the-token"}),
    Rule("token-file", {"token-file": "@token"}, {"token": "other"}, {"token": "from-the-file"}),
    Rule("ca-file", TRUST, {**TLS, "cert": "@foreign.pem", "key": "@foreign.key"}, TLS),
    Rule("ca-file, expired", TRUST, {**TLS, "cert": "@expired.pem", "key": "@expired.key"}, TLS),
    Rule("the name", TRUST, {**TLS, "cert": "@elsewhere.pem", "key": "@elsewhere.key"}, TLS),
    Rule(
        "tls-server-name", {**TRUST, "tls-server-name": "elsewhere.example"},
        TLS, {**TLS, "cert": "@elsewhere.pem", "key": "@elsewhere.key"},
    ),
    Rule("pin", {"tls": "relay", "pin": "@pin"}, {**TLS, "cert": "@rsa.pem", "key": "@rsa.key"}, TLS),
    Rule("tls", TRUST, {}, TLS),
]  # fmt: skip


class Sources:
    """Takes options from one source, as the commands or the constructors do."""

    def __init__(self, certificates: Certificates, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._certificates, self._path, self._monkeypatch = certificates, path, monkeypatch
        (path / "token").write_text("from-the-file\n")

    def value(self, text: str) -> str:
        if text == "@token":
            return str(self._path / "token")
        if text == "@pin":
            return pin_of(ssl.PEM_cert_to_DER_cert(Path(self._certificates.path("server.pem")).read_text()))
        return self._certificates.path(text[1:]) if text.startswith("@") else text

    def parse(self, source: str, cls: type[Options], base: Words, words: Words) -> dict[str, Any]:
        """The options `words` from a source, `base` from the command line."""
        words = {name: self.value(text) for name, text in words.items()}
        line = [word for name, text in base.items() for word in (f"--{name}", text)]
        if source == "command line":
            line += [word for name, text in words.items() for word in ([f"--{name}", text] if text else [f"--{name}"])]
        elif source == "environment":
            for name, text in words.items():
                self._monkeypatch.setenv(f"TCPRELAY_{name.upper().replace('-', '_')}", text or "true")
        else:
            file = self._path / "tcprelay.conf"
            file.write_text("".join(f"{name} = {text or 'true'}\n" for name, text in words.items()))
            line += ["--config", str(file)]
        options = parse_options("test", "", cls, line).options.as_arguments()
        for name in words:
            self._monkeypatch.delenv(f"TCPRELAY_{name.upper().replace('-', '_')}", raising=False)
        return options

    def for_api(self, words: Words) -> dict[str, Any]:
        values = {name.replace("-", "_"): self.value(text) or True for name, text in words.items()}
        return {name: (text,) if name in ("publish", "service") else text for name, text in values.items()}


@pytest.fixture
def sources(certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    return Sources(certificates, tmp_path, monkeypatch)


SOURCES = pytest.mark.parametrize("source", ["command line", "environment", "file", "API"])


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "FIRST_BACKOFF", 0.02)
    replace(monkeypatch, "REFUSED_BACKOFF", 0.1)


def make_server(bench: Bench, sources: Sources, source: str, words: Words) -> RelayServer:
    if source == "API":
        return bench.server(**sources.for_api(words))
    base = {"relay-port": "0", "service-port": "0", "drain-timeout": "0"}
    options = sources.parse(source, ServerOptions, base, words)
    server: RelayServer = bench.enter(RelayServer(**options, on_event=bench.server_events))
    return server


def make_client(bench: Bench, sources: Sources, source: str, port: int, words: Words) -> RelayClient:
    service = {} if "publish" in words else {"port": "1"}
    base = {"relay-host": "localhost", "relay-port": str(port), "drain-timeout": "0", "num-conn": "1", **service}
    if source == "API":
        options: dict[str, Any] = {"host": "localhost", "port": None if "publish" in words else 1,
                                   "relay_host": "localhost", "relay_port": port, "num_conn": 1,
                                   "drain_timeout": 0.0, **sources.for_api(words)}  # fmt: skip
    else:
        options = sources.parse(source, ClientOptions, base, words)
    client: RelayClient = bench.enter(RelayClient(**options, on_event=bench.client_events))
    return client


def judge(bench: Bench, client: RelayClient, server: RelayServer, let_in: bool) -> None:
    """Whether the client that has just started gets a link, or none and says so."""
    if let_in:
        bench.client_events.wait(Published)
        wait_until(lambda: server.counters["links_idle"])
    else:
        bench.client_events.wait(Unpublished)
        assert not bench.client_events.of(Published)
        assert server.counters["links_idle"] == 0
    client.end(0)
    bench.client_events.events.clear()


@SOURCES
@pytest.mark.parametrize("rule", SERVER_RULES, ids=str)
@pytest.mark.usefixtures("quick_backoff")
def test_the_server_lets_in_who_belongs(bench: Bench, sources: Sources, rule: Rule, source: str) -> None:
    """A relay client without what the option asks for gets no link; with it, it does."""
    server = make_server(bench, sources, source, rule.guard)
    for words, let_in in ((rule.stranger, False), (rule.friend, True)):
        judge(bench, make_client(bench, sources, "API", server.relay_address[1], words), server, let_in)


@SOURCES
@pytest.mark.parametrize("rule", CLIENT_RULES, ids=str)
@pytest.mark.usefixtures("quick_backoff")
def test_the_client_connects_to_whom_it_may(bench: Bench, sources: Sources, rule: Rule, source: str) -> None:
    """A relay server without what the option asks for gets no link; with it, it does."""
    for words, let_in in ((rule.stranger, False), (rule.friend, True)):
        server = make_server(bench, sources, "API", words)
        judge(bench, make_client(bench, sources, source, server.relay_address[1], rule.guard), server, let_in)


@SOURCES
def test_the_key_of_the_raw_wire(bench: Bench, sources: Sources, source: str) -> None:
    """--secret, from each source: without it, or with another one, no link is pooled."""
    server = make_server(bench, sources, source, {"wire": "raw", "secret": "the-key"})
    port = server.relay_address[1]
    for words in ({"wire": "raw", "secret": "not-key"}, {"wire": "raw"}):
        client = make_client(bench, sources, "API", port, words)
        if words.get("secret"):
            bench.server_events.wait(LinkRefused)
        assert server.counters["links_idle"] == 0
        client.end(0)
    make_client(bench, sources, "API", port, {"wire": "raw", "secret": "the-key"})
    wait_until(lambda: server.counters["links_idle"] == 1)
