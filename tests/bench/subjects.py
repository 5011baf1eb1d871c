"""What is measured: ways from a service client to a service."""

from __future__ import annotations

import compileall
import os
import pwd
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .processes import ESTABLISHED, Processes, absent, find_program, free_port


@dataclass(frozen=True)
class Pool:
    """What a case wants of a relay's pool of links."""

    size: int | None = None  # how many idle ones to keep; None is the relay's own default
    stock: int = 1  # how many a relay is to have that uses no link twice, and replaces one only on data


@dataclass(frozen=True)
class Relay:
    """A relay that is up: where service clients connect, and its processes (0: none)."""

    port: int
    server: int = 0
    client: int = 0


@dataclass(frozen=True)
class Subject:
    """One way from a service client to a service."""

    name: str
    start: Callable[[Processes, int, Pool], Relay]
    """Exposes a service port; returns when that is so, or raises `Failure`."""
    missing: str = ""  # what it needs and this machine does not have, in one line


def start_tcprelay(processes: Processes, service: int, pool: Pool) -> Relay:
    """With its own defaults, its log included, which goes to a file."""
    compileall.compile_dir(Path(__file__).parents[2], 0, quiet=2)  # as installed: compiling at start takes memory
    command = [sys.executable, "-m", "tcprelay"]
    return start_pair(processes, service, [*command, "server"], [*command, "client"], pool.size or 8)


def start_node(processes: Processes, service: int, pool: Pool) -> Relay:
    """At both ends; it opens a link for each connection."""
    server, client = ([find_program("node"), NODE_PACKAGE / f"relay-{role}-cli.js"] for role in ("server", "client"))
    return start_pair(processes, service, server, client, pool.size or pool.stock)


def start_pair(processes: Processes, service: int, server: list[object], client: list[object], links: int) -> Relay:
    """A server and a client that both understand node-tcp-relay's options."""
    port, relay_port, host = free_port(), free_port(), "127.0.0.1"
    server += ["--hostname", host, "--relayPort", relay_port, "--servicePort", port]
    client += ["--host", host, "--port", service, "--relayHost", host, "--relayPort", relay_port, "--numConn", links]
    server_pid = processes.start("relay server", *server)
    processes.wait_sockets(relay_port)
    processes.wait_sockets(port)
    client_pid = processes.start("relay client", *client)
    processes.wait_sockets(relay_port, ESTABLISHED, links)
    return Relay(port, server_pid, client_pid)


def start_ssh(processes: Processes, service: int, pool: Pool) -> Relay:
    """To an sshd of its own, with keys and configuration of its own; always encrypted."""
    port, ssh_port, here = free_port(), free_port(), processes.directory
    for key in ("host", "user"):
        processes.run(10, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / key)
    (here / "known").write_text(f"[127.0.0.1]:{ssh_port} {(here / 'host.pub').read_text()}")
    (here / "config").write_text(
        f"ListenAddress 127.0.0.1:{ssh_port}\nHostKey {here / 'host'}\nAuthorizedKeysFile {here / 'user.pub'}\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    sshd = [find_program("sshd"), "-D", "-e", "-f", here / "config"]
    if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
        # As root it insists on this directory, which its service unit makes: give it one that it alone sees.
        script = 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$@"'
        sshd = ["unshare", "--mount", "sh", "-c", script, "sh", *sshd]
    server = processes.start("sshd", *sshd)
    processes.wait_sockets(ssh_port)
    client = processes.start(
        "ssh", find_program("ssh"), "-F", "none", "-N", "-i", here / "user", "-o", "IdentitiesOnly=yes",
        "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", f"UserKnownHostsFile={here / 'known'}",
        "-R", f"127.0.0.1:{port}:127.0.0.1:{service}", "-p", ssh_port, "-l", pwd.getpwuid(os.getuid()).pw_name,
        "127.0.0.1",
    )  # fmt: skip
    processes.wait_sockets(port)
    return Relay(port, server, client)


NODE_PEERS = Path(os.environ.get("TEST_NODE_PEERS") or Path(__file__).parents[2] / ".node-peers") / "0.0.13"
NODE_PACKAGE = NODE_PEERS / "node_modules" / "node-tcp-relay"
NODE_INSTALL = f"npm install --prefix {os.path.relpath(NODE_PEERS)} node-tcp-relay@0.0.13 (or set TEST_NODE_PEERS)"

SUBJECTS = (
    Subject("direct", lambda processes, service, pool: Relay(service)),
    Subject("tcprelay", start_tcprelay),
    Subject("node-tcp-relay", start_node, absent("node") or ("" if NODE_PACKAGE.is_dir() else NODE_INSTALL)),
    Subject("ssh-R", start_ssh, absent("sshd", "ssh", "ssh-keygen")),
)
