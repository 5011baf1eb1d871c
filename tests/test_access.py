"""Who may connect: lists of networks for service clients and for relay clients, and the file of those that may not."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.command_line import parse_options
from _tcprelay.server.access import Access, load_access
from _tcprelay.threads import Threads
from _tcprelay.tls import ACCESS_DENIED
from _tcprelay.values import ServiceNetwork, parse_network, parse_service_network
from tcprelay import (
    ConnectionFailed, ConnectionOpened, LinkRefused, RelayClient, RelayServer, ServerOptions, Unpublished,
)  # fmt: skip

from .certificates import Certificates
from .conftest import Bench, connect, connect_from, read_all, read_exactly, wait_until
from .peers import HOST, Peers, RelayProcess

DENIED = "its address may not connect (--deny)"
IN_FILE = "its address may not connect (--deny-file)"
NOT_ALLOWED = "its address is not among those that may connect (--allow)"
LINK_DENIED = "links from its address are not accepted (--deny-links)"
LINK_NOT_ALLOWED = "its address is not among those that links are accepted from (--allow-links)"


def access_of(**options: Any) -> Access:
    """The lists of a server with the services default, web and ssh."""
    return load_access(ServerOptions(relay_port=1, service_port=2, service=("web=3", "ssh=4"), **options))  # type: ignore[arg-type]


def peer(host: str) -> tuple[Any, ...]:
    """A socket address as the system gives it."""
    return (host, 50312, 0, 0) if ":" in host else (host, 50312)


# --- Networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("192.0.2.7/24", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("2001:DB8::1/32", "2001:db8::/32"),
        ("::/0", "::/0"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:c000:207/120", "192.0.2.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
    ],
)
def test_a_network(text: str, network: str) -> None:
    """With the length of its prefix or without; in IPv4's mapped form it is IPv4's."""
    assert str(parse_network(text)) == network


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "a network, as in 192.0.2.0/24, or an address") for text in (
            "", "/", "/8", "x", "192.0.2", "192.0.2.256", "192.0.2.0/33", "192.0.2.0/", "192.0.2.0/-1", "::/129",
            "192.0.2.0/255.255.255.0", "192.0.2.0/0.0.0.255", "192.0.2.0 /24", "192.0.2.0/24/8", "10", "[::1]",
            "192.0.2.1:22", "relay.example.net", "192.0.2.01", "192.0.2.0/٨",
        )),
        ("fe80::1%eth0", "a network or an address without a zone (%eth0)"),
        ("::ffff:192.0.2.0/24", "a prefix length from 96 to 128 behind an IPv4 address in IPv6 form"),
    ],
)  # fmt: skip
def test_what_is_no_network(text: str, expected: str) -> None:
    """A mask is refused, since it can be meant either way round, and so is what would hold something else."""
    with pytest.raises(ValueError) as caught:
        parse_network(text)
    assert str(caught.value) == expected


def test_the_network_of_a_service() -> None:
    """Its text is what it is read from."""
    assert str(parse_service_network("web=192.0.2.7/24")) == "web=192.0.2.0/24"
    assert parse_service_network("192.0.2.7") == ServiceNetwork("", ipaddress.IPv4Network("192.0.2.7"))
    for text in ("=192.0.2.7", "we b=192.0.2.7", "web=", "web=x"):
        with pytest.raises(ValueError):
            parse_service_network(text)


@pytest.mark.parametrize(("version", "bits"), [(4, 32), (6, 128)])
def test_each_length_of_prefix(version: int, bits: int) -> None:
    """The first and the last address of a network are in it, and those before and behind are not."""
    chance, kind = random.Random(version), ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    for length in range(bits + 1):
        network = ipaddress.ip_network((kind(chance.getrandbits(bits)), length), strict=False)
        access = access_of(deny_links=[str(network)])
        first, last = int(network.network_address), int(network.broadcast_address)
        inside = {first, last, first + chance.randrange(last - first + 1)}
        outside = {number for number in (first - 1, last + 1) if 0 <= number < 1 << bits}
        found = {number: access.refuses("", peer(str(kind(number)))) for number in inside | outside}
        assert found == dict.fromkeys(outside, "") | dict.fromkeys(inside, LINK_DENIED), network


def test_many_networks_are_looked_up_as_the_library_does() -> None:
    """Random networks of both kinds, and addresses at their edges."""
    chance = random.Random(16)
    networks: list[Any] = [
        ipaddress.ip_network((kind(base + chance.randrange(1 << 12)), bits - chance.randrange(12)), strict=False)
        for kind, bits, base in ((ipaddress.IPv4Address, 32, 10 << 24), (ipaddress.IPv6Address, 128, 0x20010DB8 << 96))
        for _ in range(300)
    ]
    access = access_of(deny=[f"web={network}" for network in networks])
    outcomes = Counter[bool]()
    for network in networks:
        for address in (network.network_address - 1, network.broadcast_address + 1, network[chance.randrange(2) - 1]):
            held = any(address in other for other in networks if other.version == address.version)
            assert bool(access.refuses("web", peer(str(address)))) == held, address
            outcomes[held] += 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    ("denied", "host", "refused"),
    [
        ("192.0.2.0/24", "::ffff:192.0.2.7", True),
        ("192.0.2.0/24", "::ffff:192.0.3.7", False),
        ("::ffff:192.0.2.0/120", "192.0.2.7", True),
        ("::ffff:192.0.2.0/120", "::ffff:192.0.2.7", True),
        ("::/0", "192.0.2.7", False),
        ("::/0", "::ffff:192.0.2.7", False),
        ("0.0.0.0/0", "::ffff:192.0.2.7", True),
        ("0.0.0.0/0", "::c000:207", False),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("fe80::/64", "fe80::1%eth0", True),
        ("fe80::1", "fe80::1%7", True),
        ("fe80::1", "fe80::2%7", False),
    ],
)
def test_what_an_address_counts_as(denied: str, host: str, refused: bool) -> None:
    """IPv4 in IPv6's form as IPv4, and nothing else as the other kind; a zone does not matter."""
    assert access_of(deny_links=[denied]).refuses("", peer(host)) == (LINK_DENIED if refused else "")


# --- The lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "host", "reason"),
    [
        ("default", "10.0.0.1", ""),
        ("default", "10.1.0.1", DENIED),
        ("default", "192.0.2.1", NOT_ALLOWED),
        ("default", "2001:db8::1", NOT_ALLOWED),
        ("web", "192.0.2.1", ""),
        ("web", "10.0.0.1", ""),
        ("web", "192.0.2.66", DENIED),
        ("web", "192.0.2.77", IN_FILE),
        ("web", "203.0.113.1", NOT_ALLOWED),
        ("ssh", "192.0.2.1", NOT_ALLOWED),
        ("ssh", "10.0.0.9", DENIED),
        ("ssh", "10.0.0.77", IN_FILE),
        ("web", "10.0.0.9", ""),
        ("", "10.1.0.1", ""),
        ("", "192.0.2.77", LINK_NOT_ALLOWED),
        ("", "10.2.0.1", LINK_DENIED),
    ],
)
def test_which_list_counts(tmp_path: Path, service: str, host: str, reason: str) -> None:
    """What is denied goes first; the lists of all services and of one count together, and links have their own."""
    (tmp_path / "denied").write_text("192.0.2.77\n10.0.0.77\n")
    access = access_of(
        allow=["10.0.0.0/8", "web=192.0.2.0/24"], deny=["10.1.0.0/16", "ssh=10.0.0.9", "web=192.0.2.66"],
        deny_file=str(tmp_path / "denied"), allow_links="10.0.0.0/8", deny_links=["10.2.0.0/16"],
    )  # fmt: skip
    assert access.refuses(service, peer(host)) == reason


def test_a_list_of_one_service_leaves_the_others_open() -> None:
    access = access_of(allow=["web=10.0.0.0/8"], deny=["ssh=192.0.2.1"])
    found = [access.refuses(service, peer("192.0.2.1")) for service in ("web", "ssh", "default", "")]
    assert found == [NOT_ALLOWED, DENIED, "", ""]


def test_without_lists_nothing_is_looked_up() -> None:
    """Not even the address, which is none here."""
    for access in (Access(), access_of()):
        assert not access.lists
        assert access.refuses("default", None) == access.refuses("", None) == ""


WORDS = ["--relay-port", "1080", "--service", "web=8080"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deny", "wbe=192.0.2.1/24"], "--deny wbe=192.0.2.0/24: there is no service wbe"),
        (["--allow", "192.0.2.0/24,default=::/0"], "--allow default=::/0: there is no service default"),
        (["--deny", "192.0.2.300"], "--deny '192.0.2.300' (from command line): expected a network, as in 192.0.2.0/24, "
         "or an address; several are divided by commas"),
        (["--allow-links", "relay.example.net"], "--allow-links 'relay.example.net' (from command line): expected a "
         "network, as in 192.0.2.0/24, or an address; several are divided by commas"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options("tcprelays", "", ServerOptions, [*WORDS, *words])
    assert (end.value.code, capsys.readouterr().err) == (2, f"tcprelays: {said}\n")


def test_the_options_come_through(tmp_path: Path) -> None:
    """From a file with a line each, and into a relay's constructor and out of it again."""
    (tmp_path / "conf").write_text("deny = web=192.0.2.0/24\ndeny = 2001:db8::/32\nallow-links = 10.0.0.0/8\n")
    options = parse_options("tcprelays", "", ServerOptions, [*WORDS, "--config", str(tmp_path / "conf")]).options
    assert [str(item) for item in options.deny] == ["web=192.0.2.0/24", "2001:db8::/32"]
    server = RelayServer(**options.as_arguments())
    assert (server.options.deny, server.options.allow_links) == (options.deny, options.allow_links)
    with pytest.raises(ValueError, match=r"^deny 'x': expected a network"):
        RelayServer(0, 0, deny="x")
    with pytest.raises(ValueError, match=r"^--allow wbe=::/0: there is no service wbe"):
        RelayServer(0, 0, allow="wbe=::/0")


# --- The deny file --------------------------------------------------------------------------------------------


def test_what_stands_in_the_deny_file(tmp_path: Path) -> None:
    """Comments, blank lines, line ends of other systems, a byte order mark, and addresses as the log has them."""
    path = tmp_path / "denied"
    path.write_bytes(
        b"\xef\xbb\xbf# made by hand\r\n\n192.0.2.1\r\n  198.51.100.7/24 # a neighbour\n\t\n2001:db8::/48\n"
        b"fe80::1%eth0\n::ffff:203.0.113.9\n::ffff:10.0.0.0/104\n# K\xf6ln\n0.0.0.1/32"
    )
    access = access_of(deny_file=str(path))
    for host in ("192.0.2.1", "198.51.100.200", "2001:db8::9", "fe80::1%eth1", "203.0.113.9", "10.9.9.9", "0.0.0.1"):
        assert access.refuses("web", peer(host)) == access.refuses("ssh", peer(host)) == IN_FILE, host
        assert access.refuses("", peer(host)) == "", host
    for host in ("192.0.2.2", "198.51.101.1", "2001:db8:1::9", "fe80::2", "11.0.0.1", "::1"):
        assert access.refuses("web", peer(host)) == "", host


def test_an_empty_deny_file_denies_nobody(tmp_path: Path) -> None:
    (tmp_path / "denied").write_text("# nobody yet\n\n")
    assert access_of(deny_file=str(tmp_path / "denied")).lists == {}


@pytest.mark.parametrize(
    "line", ["a-secret-token", "192.0.2.1/33", "192.0.2.1 192.0.2.2", "192.0.2", "::ffff:192.0.2.1/24", "1\0", "é",
             "192.0.2.1/+8", "192.0.2.1/٨", "x" * 100_000, "relay-port = 10080"],
)  # fmt: skip
def test_a_mistake_in_the_deny_file(tmp_path: Path, line: str) -> None:
    """It is told with its place and nothing of what stands there: that may be another file, with a secret."""
    path = tmp_path / "denied"
    path.write_text(f"# one\n192.0.2.1\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        RelayServer(0, 0, deny_file=str(path))
    place, _, said = str(caught.value).partition(": expected a ")
    assert place == f"--deny-file {path}, line 3"
    assert said in ("network, as in 192.0.2.0/24, or an address",
                    "prefix length from 96 to 128 behind an IPv4 address in IPv6 form")  # fmt: skip


def test_a_deny_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Nothing begins."""
    with pytest.raises(FileNotFoundError, match=f"--deny-file {tmp_path}/denied: no such file or directory"):
        RelayServer(0, 0, deny_file=str(tmp_path / "denied"))
    with pytest.raises(IsADirectoryError, match=f"--deny-file {tmp_path}: is a directory"):
        RelayServer(0, 0, deny_file=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [(None, 1, "denied: no such file or directory"), ("x", 2, "denied, line 1: expected a network"), ("::1", 0, "")],
)
def test_the_start_of_a_command(peers: Peers, workers: str, content: str | None, status: int, said: str) -> None:
    """One line and a status of its own, with --check as without."""
    path = peers.path / "denied"
    if content:
        path.write_text(content)
    check = ["--check"] * (status == 0)
    relay = peers.program(
        sys.executable, "-m", "tcprelay", "server", "--relay-port", "0", "--service-port", "0",
        "--deny-file", str(path), *check, env={"TCPRELAY_WORKERS": workers},
    )  # fmt: skip
    assert relay.wait() == status
    assert said in relay.output and (status == 0 or len(relay.lines) == 1)


# --- Connections ----------------------------------------------------------------------------------------------


def is_reset(bench: Bench, host: str, port: int) -> bool:
    """Whether a connection from this address is reset, and not served."""
    try:
        sock = connect_from(bench, host, port)
        sock.sendall(b"x")
        return not read_exactly(sock, 1)
    except (ConnectionResetError, BrokenPipeError):
        return True


def test_service_clients_by_their_address(bench: Bench) -> None:
    """Who may not is reset, with one record each, by the lists of the service; who may is served."""
    server = bench.server(service="web=0", deny=["web=127.0.0.2"], allow=["127.0.0.0/30", "web=127.0.0.9"])
    bench.client(server, bench.service().port, publish=f"web={bench.service().port}")
    ports = {name: address[1] for name, address in server.service_addresses.items()}
    cases = [("default", "127.0.0.2", ""), ("web", "127.0.0.2", DENIED), ("web", "127.0.0.9", ""),
             ("default", "127.0.0.9", NOT_ALLOWED), ("web", "127.0.0.4", NOT_ALLOWED)]  # fmt: skip
    for service, host, reason in cases:
        assert is_reset(bench, host, ports[service]) == bool(reason)
    refused = [case for case in cases if case[2]]
    events = bench.server_events.wait(ConnectionFailed, len(refused))
    assert [(event.service, event.peer.rpartition(":")[0], event.reason) for event in events] == refused
    assert len({event.id for event in events}) == len(events)
    assert len(bench.server_events.of(ConnectionOpened)) == len(cases) - len(refused)
    assert server.counters["failed"] == len(refused)


def test_who_is_refused_takes_no_share(bench: Bench) -> None:
    """Not of --max-per-address, and none is given back that was not taken."""
    server = bench.server(deny=["127.0.0.2"], deny_links=["127.0.0.2"], max_per_address=1, max_links_per_address=1)
    for port in (server.service_addresses["default"][1], server.relay_address[1]):
        for _ in range(3):
            with contextlib.suppress(ConnectionResetError):
                read_all(connect_from(bench, "127.0.0.2", port))
    failed, refused = bench.server_events.wait(ConnectionFailed, 3), bench.server_events.wait(LinkRefused, 3)
    assert {event.reason for event in failed} == {DENIED}
    assert {(event.reason, event.code) for event in refused} == {(LINK_DENIED, "address")}
    assert not server._listeners.of_clients._counts and not server._listeners.of_links._counts


def test_a_flood_of_the_denied_costs_no_thread_and_no_descriptor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its record, and nothing is begun for it."""
    server = bench.server(deny="127.0.0.2")
    wait_until(lambda: server._listeners.bell)  # the acceptor has all that it waits on
    port, started = server.service_addresses["default"][1], []
    start = Threads.start
    with monkeypatch.context() as watch:
        watch.setattr(Threads, "start", lambda self, *job: started.append(job) or start(self, *job))  # type: ignore[func-returns-value]
        descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for _ in range(300):
            with socket.socket() as sock, contextlib.suppress(ConnectionResetError):
                sock.settimeout(10)
                sock.bind(("127.0.0.2", 0))
                sock.connect(("127.0.0.1", port))
                assert sock.recv(1), "it ends as if it had been served"
        failed = bench.server_events.wait(ConnectionFailed, 300)
        assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors
    assert started == []
    assert len(failed) == len({event.id for event in failed}) == 300


# --- Links ----------------------------------------------------------------------------------------------------


def refused_client(bench: Bench, server: RelayServer, **options: Any) -> Unpublished:
    """What a relay client from 127.0.0.1 says."""
    client = RelayClient(
        "127.0.0.1", 1, "127.0.0.1", server.relay_address[1], on_event=bench.client_events, **options
    )  # fmt: skip
    with client:
        event: Unpublished = bench.client_events.wait(Unpublished)[0]
    return event


@pytest.mark.parametrize(
    ("lists", "reason"), [({"deny_links": "127.0.0.1"}, LINK_DENIED), ({"allow_links": "127.0.0.2"}, LINK_NOT_ALLOWED)]
)
def test_a_relay_client_that_may_not(bench: Bench, lists: dict[str, str], reason: str) -> None:
    """It is told why, and takes that for lasting; the server's log has it too."""
    server = bench.server(**lists)
    event = refused_client(bench, server)
    assert (event.reason, event.lasting) == (f"refused by the relay: {reason}", True)
    [told, *_] = bench.server_events.wait(LinkRefused)
    assert (told.code, told.reason, told.peer.rpartition(":")[0]) == ("address", reason, "127.0.0.1")


def test_a_relay_client_that_may_not_over_tls(bench: Bench, certificates: Certificates) -> None:
    """It is told by an alert, before any handshake."""
    files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="relay", token="t", deny_links="127.0.0.1", **files)
    with connect(server.relay_address) as silent:
        assert read_all(silent) == ACCESS_DENIED
    event = refused_client(bench, server, tls="relay", token="t", ca_file=certificates.path("ca.pem"))
    assert event.reason.startswith("refused by the relay: it accepts no links from this address, by its --allow-links")
    assert event.lasting
    assert {event.code for event in bench.server_events.wait(LinkRefused, 2)} == {"address"}


def test_a_relay_client_that_may_not_on_the_raw_wire(bench: Bench) -> None:
    """Words would be bytes of a connection there."""
    server = bench.server(wire="raw", deny_links="127.0.0.1")
    with pytest.raises(ConnectionResetError):
        read_all(bench.enter(connect(server.relay_address)))
    assert bench.server_events.wait(LinkRefused)[0].reason == LINK_DENIED


def test_a_relay_client_that_may(bench: Bench) -> None:
    """The lists of links are not those of service clients."""
    server = bench.server(allow_links="127.0.0.1", deny="127.0.0.1")
    bench.client(server, bench.service().port)
    assert is_reset(bench, "127.0.0.1", server.service_addresses["default"][1])
    assert not is_reset(bench, "127.0.0.2", server.service_addresses["default"][1])
    assert not bench.server_events.of(LinkRefused)


# --- Reload ---------------------------------------------------------------------------------------------------


def test_the_deny_file_is_read_again(bench: Bench, tmp_path: Path) -> None:
    """For new connections; one that lives goes on, also of who may not connect any more."""
    path = tmp_path / "denied"
    path.write_text("127.0.0.2\n")
    server = bench.server(deny_file=str(path))
    bench.client(server, bench.service().port)
    port = server.service_addresses["default"][1]
    living = connect_from(bench, "127.0.0.3", port)
    living.sendall(b"x")
    assert read_exactly(living, 1) == b"x"
    path.write_text("127.0.0.3\n")
    assert is_reset(bench, "127.0.0.2", port), "not yet"
    assert server.reload()
    assert not is_reset(bench, "127.0.0.2", port)
    assert is_reset(bench, "127.0.0.3", port)
    living.sendall(b"y")
    assert read_exactly(living, 1) == b"y"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path, token: path.write_text("127.0.0.3\nnobody\n"), "denied, line 2: expected a network"),
        (lambda path, token: path.unlink(), "denied: no such file or directory"),
        (lambda path, token: (path.write_text("127.0.0.3\n"), token.unlink()), "token: no such file or directory"),
    ],
    ids=["damaged", "missing", "another file"],
)
def test_a_reload_that_fails_leaves_the_old_list(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, said: str
) -> None:
    """Whichever file it is, the log says which; and once it is right, it counts."""
    path, token = tmp_path / "denied", tmp_path / "token"
    path.write_text("127.0.0.2\n")
    token.write_text("a token that is long enough\n")
    server = bench.server(deny_file=str(path), token_file=str(token))
    bench.client(server, bench.service().port, token_file=str(token))
    port = server.service_addresses["default"][1]
    damage(path, token)
    assert not server.reload()
    [message] = [record.getMessage() for record in caplog.records if "cannot reload" in record.getMessage()]
    assert said in message and "nobody" not in message
    assert is_reset(bench, "127.0.0.2", port)
    assert not is_reset(bench, "127.0.0.3", port)
    path.write_text("127.0.0.3\n")
    token.write_text("a token that is long enough\n")
    assert server.reload()
    assert not is_reset(bench, "127.0.0.2", port)
    assert is_reset(bench, "127.0.0.3", port)


# --- Commands -------------------------------------------------------------------------------------------------


def answer(host: str, port: int) -> str:
    """What a service client from this address gets: an echo, or a reset."""
    with socket.socket() as sock:
        sock.settimeout(10)
        sock.bind((host, 0))
        try:
            sock.connect((HOST, port))
            sock.sendall(b"x")
            return sock.recv(1).decode()
        except (ConnectionResetError, BrokenPipeError):
            return "reset"


def reload(server: RelayProcess, says: str) -> None:
    """Ask for a reload, and wait until the log says that."""
    before = len(server.lines)
    server.signal(signal.SIGHUP)
    wait_until(lambda: any(says in line for line in server.lines[before:]))


def test_the_lists_of_a_command(peers: Peers, workers: str, bench: Bench) -> None:
    """With workers too: one record for each, SIGHUP has the file read again, and a mistake leaves the old list."""
    path = peers.path / "denied"
    path.write_text("127.0.0.2\n")
    server = peers.server("--deny-file", str(path), "--deny-links", "127.0.0.0/8", "--allow-links", "0.0.0.0/0")
    server.expected_error = "cannot reload"
    port = server.service_port
    client = peers.relay_process("client", "--relay-host", HOST, "--relay-port", str(server.relay_port), "--port", "1")
    assert LINK_DENIED in client.wait_event("Unpublished", lasting=True)["reason"]
    for _ in range(5):
        assert answer("127.0.0.2", port) == "reset"
    failed = wait_until(lambda: len(found := server.events("ConnectionFailed")) == 5 and found)
    assert {record["reason"] for record in failed} == {IN_FILE}
    assert len({record["id"] for record in failed}) == 5
    path.write_text("127.0.0.300\n")
    reload(server, "line 1: expected a network")
    assert answer("127.0.0.2", port) == "reset"
    path.write_text("127.0.0.3\n")
    reload(server, "reloaded")
    assert answer("127.0.0.3", port) == "reset"
    server.wait_event("ConnectionFailed", reason=IN_FILE)
    waiting = bench.enter(socket.socket())
    waiting.bind(("127.0.0.2", 0))
    waiting.connect((HOST, port))
    server.wait_event("ServiceUnserved", peer="{}:{}".format(*waiting.getsockname()))


def test_who_may_is_served_by_a_command(peers: Peers, workers: str) -> None:
    """Links and service clients that the lists name."""
    server = peers.server("--allow", "default=127.0.0.4/31", "--allow-links", HOST)
    client_port = peers.service(lambda sock: sock.sendall(sock.recv(1))).port
    peers.client(server.relay_port, client_port)
    found = [answer(f"127.0.0.{number}", server.service_port) for number in (4, 5, 6)]
    assert found == ["x", "x", "reset"]


def contains(text: str, line: str) -> bool:
    return text in line


def test_the_log_of_a_flood(peers: Peers, workers: str) -> None:
    """Ten lines a second of each kind, and one with the count of the others."""
    server = peers.server("--deny", "127.0.0.2", "--deny-links", "127.0.0.2")
    port, relay_port, began = server.service_port, server.relay_port, time.monotonic()
    for _ in range(200):
        assert answer("127.0.0.2", port) == "reset"
        assert answer("127.0.0.2", relay_port) != "x"
    seconds = time.monotonic() - began
    for kind in ("ConnectionFailed", "LinkRefused"):
        server.wait_for(functools.partial(contains, f"more lines like that ({kind}) are left out"))
        assert 10 <= len(server.events(kind)) <= 10 * (seconds + 2)
