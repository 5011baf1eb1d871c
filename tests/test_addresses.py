"""Where a relay server listens, whom a certificate names, and what a silent name server holds up: nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from _tcprelay.addresses import address_group, is_loopback, name_in_certificate, show_address
from _tcprelay.sockets import _listen_on, listen
from _tcprelay.tcp import Probing
from tcprelay import Listening, RelayClient, RelayServer, Unpublished

from .certificates import Certificates
from .conftest import PATIENCE, Bench, replace, wait_until
from .peers import Peers, RelayProcess, find, no_peer, run


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


def reach(host: str, port: int) -> None:
    socket.create_connection((host, port), PATIENCE).close()


# --- Listening ------------------------------------------------------------------------------------------------


@needs_ipv6
def test_all_of_ipv6_takes_ipv4_too(bench: Bench) -> None:
    """``::`` as node-tcp-relay has it, and with the peer known as what it is."""
    server = bench.server(hostname="::")
    for host in ("127.0.0.1", "::1"):
        reach(host, server.service_addresses["default"][1])
    assert server.relay_address[0] == "::"


@needs_ipv6
def test_localhost_is_both_loopback_addresses(bench: Bench) -> None:
    """With the same port, also where a free one is taken; the API says the first, the events say each."""
    server = bench.server(hostname="localhost", service=["other=localhost:0"])
    for name, (host, port) in {"": server.relay_address, **server.service_addresses}.items():
        told = [event.address for event in bench.server_events.of(Listening) if event.service == name]
        assert told == [f"[::1]:{port}", f"127.0.0.1:{port}"]
        assert host == "::1"
        for host in ("127.0.0.1", "::1"):
            reach(host, port)


@needs_ipv6
def test_links_come_in_at_each_address(bench: Bench) -> None:
    """Every listener of a service is one."""
    server = bench.server(hostname="localhost")
    service = bench.service()
    for host in ("127.0.0.1", "::1"):
        bench.enter(RelayClient("localhost", service.port, host, server.relay_address[1], 1))
    wait_until(lambda: server.counters["links_idle"] == 2)
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, server.service_addresses["default"][1]), PATIENCE) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


@needs_ipv6
def test_a_free_port_must_be_free_at_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is taken where one of them has it; where a port was asked for, nothing is left listening."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="already in use"):
            listen("localhost", port)
        socket.create_server(("::1", port), family=socket.AF_INET6).close()

    real, refused = _listen_on, [0]

    def listen_on(family: int, address: Any, probing: Probing) -> socket.socket:
        if family == socket.AF_INET and not refused[0]:
            refused[0] = address[1]
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(family, address, probing)

    replace(monkeypatch, "_listen_on", listen_on)
    listeners = listen("localhost", 0)
    ports = {listener.getsockname()[1] for listener in listeners}
    for listener in listeners:
        listener.close()
    assert refused[0]
    assert len(listeners) == 2
    assert len(ports) == 1


def test_an_address_that_the_host_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the name has another; if not, that is said."""
    foreign = socket.AF_INET, ("192.0.2.1", 0)
    found = [foreign, (socket.AF_INET, ("127.0.0.1", 0))]
    replace(monkeypatch, "resolve", lambda host, port: found)
    [listener] = listen("relay.example", 0)
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    found = [foreign]
    with pytest.raises(OSError, match=r"cannot listen on relay.example:0: cannot assign requested address"):
        RelayServer(0, 0, hostname="relay.example").start()


def test_protected_mode_looks_at_all_addresses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name may be loopback first, and more than that: without a token that is worth a warning."""
    replace(monkeypatch, "is_loopback", lambda address: address[0] == "127.0.0.1")
    replace(
        monkeypatch, "resolve", lambda host, port: [(socket.AF_INET, (f"127.0.0.{number}", port)) for number in (1, 2)]
    )
    bench.server(hostname="relay.example")
    [record] = [record for record in caplog.records if "no token is set" in record.getMessage()]
    assert record.levelname == "WARNING"


def test_addresses_with_a_zone() -> None:
    """They are compared without it."""
    assert is_loopback(("::1%lo", 1, 0, 1))
    assert not is_loopback(("fe80::5%eth0", 1, 0, 2))
    assert address_group(("fe80::5%eth0", 1, 0, 2)) == "fe80::/64"
    assert show_address(("fe80::5%eth0", 1, 0, 2)) == "[fe80::5%eth0]:1"
    assert show_address(("fe80::5", 1, 0, 999_999)) == "[fe80::5%999999]:1", "that interface is gone"
    assert show_address(("fe80::5", 1, 0, 1)) == f"[fe80::5%{socket.if_indextoname(1)}]:1"


# --- Certificates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name"),
    [("relay.example.net.", "relay.example.net"), ("fe80::5%eth0", "fe80::5"), ("192.0.2.1", "192.0.2.1")],
)
def test_what_a_certificate_names(host: str, name: str) -> None:
    assert name_in_certificate(host) == name


def test_a_trailing_dot_is_not_in_the_certificate(bench: Bench, certificates: Certificates) -> None:
    """A host's full name is verified, like the same without the dot; so is a service's."""
    files = {"cert": certificates.path("server.pem"), "key": certificates.path("server.key")}
    server = bench.server(tls="relay", **files)
    client = RelayClient(
        "127.0.0.1", 1, "localhost.", server.relay_address[1], 1, tls="relay", ca_file=certificates.path("ca.pem"),
        on_event=bench.client_events,
    )  # fmt: skip
    bench.enter(client)
    wait_until(lambda: server.counters["links_idle"] or bench.client_events.of(Unpublished))
    assert not bench.client_events.of(Unpublished)


# --- In a namespace of its own --------------------------------------------------------------------------------

PREPARE = """
import os, socket, subprocess, sys
directory, *command = sys.argv[1:]
for words in (
    "link set lo up", "link add v0 type veth peer name v1", "link set v0 up", "link set v1 up",
    "addr add fe80::5/64 dev v0 nodad",
):
    subprocess.run(["ip", *words.split()], check=True)
resolver = "nameserver 127.0.0.1\\noptions timeout:30\\n"
for name, content in ("resolv.conf", resolver), ("nsswitch.conf", "hosts: files dns\\n"):
    path = os.path.join(directory, name)
    with open(path, "w") as file:
        file.write(content)
    if os.path.exists("/etc/" + name):
        subprocess.run(["mount", "--bind", path, "/etc/" + name], check=True)
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 53))
os.set_inheritable(silent.fileno(), True)
os.execvp(command[0], command)
"""
"""Makes loopback, a link-local address, and a name server that never says a word; then it becomes the command."""


def own_network(path: Path) -> Sequence[str]:
    """What to put before a command so that it has a network and a name server of its own; they end with it."""
    if os.geteuid() != 0:
        no_peer("only root may make namespaces")
    find("ip"), find("mount")
    return [find("unshare"), "--mount", "--net", sys.executable, "-c", PREPARE, str(path)]


def wait_until_asked(relay: RelayProcess) -> None:
    """Wait until a relay is in getaddrinfo: it has a socket of its own for the name server."""
    sockets = Path(f"/proc/{relay.process.pid}/net/udp")
    wait_until(lambda: sum(":0035 " in line for line in sockets.read_text().splitlines()) >= 2)


CLIENT = "--relay-host", "relay.example.net", "--relay-port", "1", "--port", "22"
SERVER = "--relay-port", "0", "--service-port", "0", "--hostname", "relay.example.net"


@pytest.mark.peer("unshare", "ip", "mount")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.usefixtures("workers")
def test_a_silent_name_server_does_not_hold_up_an_end(
    peers: Peers, tmp_path: Path, role: Literal["client", "server"], number: signal.Signals
) -> None:
    """The real look-up, which lasts for a minute here, is waited for by no signal."""
    relay = peers.relay_process(role, *(CLIENT if role == "client" else SERVER), wrapper=own_network(tmp_path))
    wait_until_asked(relay)
    began = time.monotonic()
    relay.signal(number)
    assert relay.wait() == 0
    assert time.monotonic() - began < 2


@pytest.mark.peer("unshare", "ip", "mount")
def test_a_silent_name_server_is_named_in_time(tmp_path: Path) -> None:
    """Once, by several processes, although none of them has got an answer to its first look-up."""
    client = RelayProcess("client", *CLIENT, "--workers", "2", wrapper=own_network(tmp_path))
    with client:
        told = client.wait_event("Unpublished", timeout=2 * PATIENCE)
    assert told["reason"] == "cannot look up relay.example.net: the name server does not answer"
    assert len(client.events("Unpublished")) == 1


SERVE_AT_A_ZONE = """
import socket, tcprelay
guard = {"token": "a-token-of-the-test"}
with socket.create_server(("127.0.0.1", 0)) as service:
    with tcprelay.RelayServer(0, 0, hostname="fe80::5%v0", service=["other=[fe80::5%v0]:0"], **guard) as server:
        relay = server.relay_address
        with tcprelay.RelayClient("127.0.0.1", service.getsockname()[1], *relay, 1, try_service=False, **guard):
            with socket.create_connection(server.service_addresses["default"], 10) as sock:
                sock.sendall(b"x")
                end, _ = service.accept()
                with end:
                    print(relay[0], *server.service_addresses, end.recv(1))
"""


@pytest.mark.peer("unshare", "ip", "mount")
def test_an_address_with_a_zone_is_listened_at(tmp_path: Path) -> None:
    """And links are made to it."""
    done = run(*own_network(tmp_path), sys.executable, "-c", SERVE_AT_A_ZONE)
    assert (done.stdout, done.returncode) == (b"fe80::5%v0 default other b'x'\n", 0), done.stderr.decode()
