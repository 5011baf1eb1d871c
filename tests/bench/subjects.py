"""What is measured: ways from a service client to a service."""

from __future__ import annotations

import compileall
import os
import pwd
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tcprelay

from .processes import Processes, free_port
from .programs import absent, find_program, say, version_of
from .sockets import ESTABLISHED, LISTEN


@dataclass(frozen=True)
class Pool:
    """What a case wants of a relay's pool of links."""

    size: int | None = None  # how many idle ones to keep; None is the relay's own default
    stock: int = 1  # how many a relay is to have that uses no link twice, and replaces one only on data
    most: int | None = None  # how many connections it must bear at once, where it has a limit of its own for them


@dataclass(frozen=True)
class Order:
    """What a measurement asks for."""

    service: int  # the port of the service, at the far end
    pool: Pool = Pool()
    workers: int | None = None  # tcprelay's --workers; None leaves the option out


@dataclass(frozen=True)
class Relay:
    """A relay that is up: where service clients connect, at the near end, and its processes (0: none)."""

    host: str
    port: int
    server: int = 0
    client: int = 0
    server_start: float = 0.0  # seconds until it listened
    client_start: float = 0.0  # seconds until its links were established, or its service was published


@dataclass(frozen=True)
class Subject:
    """One way from a service client to a service."""

    name: str
    start: Callable[[Processes, Order], Relay]
    """Exposes a service; returns when that is so, or raises `Failure`."""
    version: Callable[[], str] = str  # with the program's name
    encrypted: bool = False  # what passes between relay client and relay server
    pooled: bool = False  # `Pool.size` can be chosen
    missing: str = ""  # what it needs and this machine does not have, in one line


Command = list[object]
Wait = tuple[int, int, int]
"""Sockets at the near end that show that a process is up: port, state, and how many."""


def launch(processes: Processes, name: str, command: Command, *waits: Wait, far: bool = False) -> tuple[int, float]:
    """Start a process and wait until it is up; returns its number, and how many seconds that took."""
    began = time.monotonic()
    pid = processes.start(name, *command, far=far)
    for wait in waits:
        processes.wait_sockets(*wait)
    return pid, time.monotonic() - began


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([*lines, ""]))
    return path


def start_direct(processes: Processes, order: Order) -> Relay:
    return Relay(processes.place.far, order.service)


def start_pairs(processes: Processes, order: Order) -> Relay:
    """Two bare relays, chained as a relay server and a relay client are; the near one dials the far one."""
    port, between, place = free_port(), free_port(), processes.place
    program: Command = [sys.executable, "-m", "tests.bench.pairs"]
    far = [*program, place.far, between, place.far, order.service]
    two = processes.start("far pairs", *far, far=True)
    processes.wait_sockets(between, far=True)
    one = launch(processes, "near pairs", [*program, place.near, port, place.far, between], (port, LISTEN, 1))
    return Relay(place.near, port, one[0], two)


# --- tcprelay and node-tcp-relay ------------------------------------------------------------------------------


def start_tcprelay(processes: Processes, order: Order, tls: bool, count: int | None = None, asked: str = "") -> Relay:
    """With its own defaults, its log included, which goes to a file; and both are asked for what is at the path
    `asked`, once a second."""
    compileall.compile_dir(Path(__file__).parents[2], 0, quiet=2)  # as installed: compiling at start takes memory
    server: Command = [sys.executable, "-m", "tcprelay_server"]
    client: Command = [sys.executable, "-m", "tcprelay_client"]
    state = processes.directory / "state"
    if tls:  # with the certificate and the token that it makes for itself
        server += ["--tls", "--state-dir", state]
        client += ["--tls", "--reject-unauthorized", "false", "--token-file", state / "token"]
    elif processes.place.entrance:  # links from another host are accepted with a token
        token: Command = ["--token-file", write(processes.directory / "token", "a token for the bench")]
        server, client = server + token, client + token
    if order.pool.most:
        server += ["--max-connections", order.pool.most]
        client += ["--max-conn", order.pool.most]
    count = order.workers if count is None else count
    workers: Command = [] if count is None else ["--workers", count]
    if asked:
        ports = [free_port(), free_port()]
        server, client = [*server, "--status", ports[0]], [*client, "--status", ports[1]]
        processes.start("watcher", sys.executable, "-m", "tests.bench.watcher", asked, *ports)
    return start_pair(processes, order, server + workers, client + workers, order.pool.size or 8)


def start_node(processes: Processes, order: Order, release: str) -> Relay:
    """node-tcp-relay; it opens a link for each connection.  0.0.18 speaks TLS (1.2), 0.0.13 does not."""
    package, node = NODE_PEERS / release / "node_modules" / "node-tcp-relay", find_program("node")
    server: Command = [node, package / "relay-server-cli.js"]
    client: Command = [node, package / "relay-client-cli.js"]
    if release == NEW:
        tls: Command = ["--tls", "--pfx", make_certificate(processes), "--passphrase", "bench"]
        server, client = server + tls, [*client, *tls, "--rejectUnauthorized", "false"]
    return start_pair(processes, order, server, client, order.pool.size or order.pool.stock)


def start_pair(processes: Processes, order: Order, server: Command, client: Command, links: int) -> Relay:
    """A server and a client that both understand node-tcp-relay's options."""
    port, relay_port, place = free_port(), free_port(), processes.place
    server += ["--hostname", place.near, "--relayPort", relay_port, "--servicePort", port]
    client += ["--host", place.far, "--port", order.service]
    client += ["--relayHost", place.near, "--relayPort", relay_port, "--numConn", links]
    one = launch(processes, "relay server", server, (relay_port, LISTEN, 1), (port, LISTEN, 1))
    two = launch(processes, "relay client", client, (relay_port, ESTABLISHED, links), far=True)
    return Relay(place.near, port, one[0], two[0], one[1], two[1])


def without_node(release: str) -> str:
    """What is missing for a release of node-tcp-relay, in one line."""
    if (NODE_PEERS / release).is_dir():
        return absent("node", "openssl")
    place = os.path.relpath(NODE_PEERS / release)
    return f"npm install --prefix {place} node-tcp-relay@{release} (or set TEST_NODE_PEERS)"


def make_certificate(processes: Processes) -> Path:
    """A self-signed certificate and its key, in a PFX file with the passphrase "bench"; cert.pem is beside it."""
    key, certificate, both = (processes.directory / name for name in ("key.pem", "cert.pem", "both.pfx"))
    processes.run(
        30, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-subj", "/CN=bench", "-addext", "subjectAltName=DNS:bench", "-keyout", key, "-out", certificate,
    )  # fmt: skip
    processes.run(
        30, "openssl", "pkcs12", "-export", "-inkey", key, "-in", certificate, "-passout", "pass:bench", "-out", both,
    )  # fmt: skip
    return both


OLD, NEW = "0.0.13", "0.0.18"
NODE_PEERS = Path(os.environ.get("TEST_NODE_PEERS") or Path(__file__).parents[2] / ".node-peers")


# --- Others, whose server listens on the service port when their client has come --------------------------------


def start_ssh(processes: Processes, order: Order) -> Relay:
    """To an sshd of its own, with keys and configuration of its own."""
    port, ssh_port, here, place = free_port(), free_port(), processes.directory, processes.place
    for key in ("host", "user"):
        processes.run(10, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / key)
    write(here / "known", f"[{place.near}]:{ssh_port} {(here / 'host.pub').read_text()}")
    write(
        here / "config", f"ListenAddress {place.near}:{ssh_port}", f"HostKey {here / 'host'}",
        f"AuthorizedKeysFile {here / 'user.pub'}", "PidFile none", "UsePAM no", "StrictModes no",
        "PermitRootLogin prohibit-password", "PasswordAuthentication no", "GatewayPorts clientspecified",
    )  # fmt: skip
    sshd: Command = [find_program("sshd"), "-D", "-e", "-f", here / "config"]
    if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
        # As root it insists on this directory, which its service unit makes: give it one that it alone sees.
        script = 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$@"'
        sshd = ["unshare", "--mount", "sh", "-c", script, "sh", *sshd]
    ssh: Command = [
        find_program("ssh"), "-F", "none", "-N", "-i", here / "user", "-o", "IdentitiesOnly=yes",
        "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", f"UserKnownHostsFile={here / 'known'}",
        "-R", f"{place.near}:{port}:{place.far}:{order.service}", "-p", ssh_port,
        "-l", pwd.getpwuid(os.getuid()).pw_name, place.near,
    ]  # fmt: skip
    return start_two(processes, (port, ssh_port), sshd, ssh)


def start_chisel(processes: Processes, order: Order) -> Relay:
    """It is SSH in a WebSocket."""
    port, relay_port, place, chisel = free_port(), free_port(), processes.place, find_program("chisel")
    server = [chisel, "server", "--reverse", "--host", place.near, "--port", relay_port]
    remote = f"R:{place.near}:{port}:{place.far}:{order.service}"
    client: Command = [chisel, "client", f"http://{place.near}:{relay_port}", remote]
    return start_two(processes, (port, relay_port), server, client)


def start_bore(processes: Processes, order: Order) -> Relay:
    """Without a secret.  The port for its clients cannot be chosen."""
    port, place, bore = free_port(), processes.place, find_program("bore")
    server = [bore, "server", "--bind-addr", place.near, "--min-port", port, "--max-port", port]
    client = [bore, "local", order.service, "--local-host", place.far, "--to", place.near, "--port", port]
    return start_two(processes, (port, 7835), server, client)


def start_frp(processes: Processes, order: Order, tls: bool, mux: bool) -> Relay:
    """Nothing else differs from its defaults, which are both."""
    port, relay_port, here, place = free_port(), free_port(), processes.directory, processes.place
    multiplexed = f"transport.tcpMux = {str(mux).lower()}"
    frps = write(here / "frps.toml", f'bindAddr = "{place.near}"', f"bindPort = {relay_port}", multiplexed)
    frpc = write(
        here / "frpc.toml", f'serverAddr = "{place.near}"', f"serverPort = {relay_port}", multiplexed,
        f"transport.tls.enable = {str(tls).lower()}", "[[proxies]]", 'name = "bench"', 'type = "tcp"',
        f'localIP = "{place.far}"', f"localPort = {order.service}", f"remotePort = {port}",
    )  # fmt: skip
    server, client = ([find_program(config.stem), "-c", config] for config in (frps, frpc))
    return start_two(processes, (port, relay_port), server, client)


def start_rathole(processes: Processes, order: Order, transport: str) -> Relay:
    port, relay_port, here, place = free_port(), free_port(), processes.directory, processes.place
    own: list[str] = []
    others: list[str] = []
    if transport == "noise":
        _, private, _, _, public, *_ = say("rathole", "--genkey").splitlines()
        own, others = [f'local_private_key = "{private}"'], [f'remote_public_key = "{public}"']
    elif transport == "tls":
        own = [f'pkcs12 = "{make_certificate(processes)}"', 'pkcs12_password = "bench"']
        others = [f'trusted_root = "{here / "cert.pem"}"', 'hostname = "bench"']
    server = write(
        here / "server.toml", "[server]", f'bind_addr = "{place.near}:{relay_port}"', 'default_token = "bench"',
        "[server.services.bench]", f'bind_addr = "{place.near}:{port}"', "[server.transport]",
        f'type = "{transport}"', *([f"[server.transport.{transport}]", *own] if own else []),
    )  # fmt: skip
    client = write(
        here / "client.toml", "[client]", f'remote_addr = "{place.near}:{relay_port}"', 'default_token = "bench"',
        "[client.services.bench]", f'local_addr = "{place.far}:{order.service}"', "[client.transport]",
        f'type = "{transport}"', *([f"[client.transport.{transport}]", *others] if others else []),
    )  # fmt: skip
    rathole = find_program("rathole")
    return start_two(processes, (port, relay_port), [rathole, "--server", server], [rathole, "--client", client])


def start_two(processes: Processes, ports: tuple[int, int], server: Command, client: Command) -> Relay:
    """A server, and a client that has it listen on the service port, the first of the two."""
    port, relay_port = ports
    one = launch(processes, "peer's server", server, (relay_port, LISTEN, 1))
    two = launch(processes, "peer's client", client, (port, LISTEN, 1), far=True)
    return Relay(processes.place.near, port, one[0], two[0], one[1], two[1])


def without_rathole(feature: str) -> str:
    """What is missing for one of its transports, in one line."""
    if missing := absent("rathole", *["openssl"] * (feature == "tls")):
        return missing
    return "" if feature in say("rathole", "--version") else f"rathole was built without {feature}"


def make_subjects() -> list[Subject]:
    """All of them; one whose programs are not here says so."""
    ours, old, new = f"tcprelay {tcprelay.__version__}", f"node-tcp-relay {OLD}", f"node-tcp-relay {NEW}"
    openssl, sshd = absent("openssl"), absent("sshd", "ssh", "ssh-keygen")
    chisel, bore, frp, rathole = absent("chisel"), absent("bore"), absent("frps", "frpc"), absent("rathole")
    both, no_old, no_new = {"encrypted": True, "pooled": True}, without_node(OLD), without_node(NEW)
    found = [
        Subject("direct", start_direct),
        Subject("pairs", start_pairs),
        Subject("tcprelay", partial(start_tcprelay, tls=False), lambda: ours, pooled=True),
        Subject("tcprelay-workers-2", partial(start_tcprelay, tls=False, count=2), lambda: ours, pooled=True),
        Subject("tcprelay-page", partial(start_tcprelay, tls=False, asked="/status.json"), lambda: ours, pooled=True),
        Subject("tcprelay-scraped", partial(start_tcprelay, tls=False, asked="/metrics"), lambda: ours, pooled=True),
        Subject("tcprelay-tls", partial(start_tcprelay, tls=True), lambda: ours, missing=openssl, **both),
        Subject("node-tcp-relay", partial(start_node, release=OLD), lambda: old, pooled=True, missing=no_old),
        Subject("node-tls", partial(start_node, release=NEW), lambda: new, missing=no_new, **both),
        Subject("ssh-R", start_ssh, partial(version_of, "OpenSSH", "ssh", "-V"), encrypted=True, missing=sshd),
        Subject("chisel", start_chisel, partial(version_of, "chisel", "chisel"), encrypted=True, missing=chisel),
        Subject("bore", start_bore, partial(version_of, "bore", "bore"), missing=bore),
    ]
    for tls, mux in ((False, False), (False, True), (True, False), (True, True)):
        name, start = "frp" + "-tls" * tls + "-mux" * mux, partial(start_frp, tls=tls, mux=mux)
        found.append(Subject(name, start, partial(version_of, "frp", "frps"), encrypted=tls, missing=frp))
    for transport in ("tcp", "noise", "tls"):
        name, plain = f"rathole-{transport}".removesuffix("-tcp"), transport == "tcp"
        start, missing = partial(start_rathole, transport=transport), rathole if plain else without_rathole(transport)
        version = partial(version_of, "rathole", "rathole", "--help")  # --version says when it was built first
        found.append(Subject(name, start, version, encrypted=not plain, missing=missing))
    return found


SUBJECTS = make_subjects()
OURS = {"tcprelay": False, "tcprelay-tls": True}
"""What is asked for in the bars, and whether it is encrypted."""
FLOORS = {"direct", "pairs", "tcprelay-workers-2", "tcprelay-page", "tcprelay-scraped"}
"""What ours are compared with, and are no peers."""
