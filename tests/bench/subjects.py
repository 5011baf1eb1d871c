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
    return start_pair(processes, service, command_of("server"), command_of("client"), pool.size or 8)


def command_of(role: str) -> list[object]:
    return [sys.executable, "-m", f"tcprelay_{role}"]


def start_tcprelay_tls(processes: Processes, service: int, pool: Pool) -> Relay:
    """With the certificate and the token that it makes for itself."""
    compileall.compile_dir(Path(__file__).parents[2], 0, quiet=2)
    state = processes.directory / "state"
    server = [*command_of("server"), "--tls", "--state-dir", state]
    client = [*command_of("client"), "--tls", "--reject-unauthorized", "false", "--token-file", state / "token"]
    return start_pair(processes, service, server, client, pool.size or 8)


def start_node(processes: Processes, service: int, pool: Pool) -> Relay:
    """At both ends; it opens a link for each connection."""
    server, client = node_commands("0.0.13")
    return start_pair(processes, service, server, client, pool.size or pool.stock)


def start_node_tls(processes: Processes, service: int, pool: Pool) -> Relay:
    """The release that speaks TLS (1.2), with a certificate that today's Node.js reads."""
    here = processes.directory
    processes.run(
        30, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-subj", "/CN=bench", "-keyout", here / "key.pem", "-out", here / "cert.pem",
    )  # fmt: skip
    processes.run(
        30, "openssl", "pkcs12", "-export", "-inkey", here / "key.pem", "-in", here / "cert.pem",
        "-passout", "pass:bench", "-out", here / "both.pfx",
    )  # fmt: skip
    tls = ["--tls", "--pfx", here / "both.pfx", "--passphrase", "bench"]
    server, client = node_commands("0.0.18")
    client += ["--rejectUnauthorized", "false"]
    return start_pair(processes, service, server + tls, client + tls, pool.size or pool.stock)


def node_commands(release: str) -> tuple[list[object], list[object]]:
    package = NODE_PEERS / release / "node_modules" / "node-tcp-relay"
    server, client = ([find_program("node"), package / f"relay-{role}-cli.js"] for role in ("server", "client"))
    return server, client


def without_node(release: str) -> str:
    """What is missing for a release of node-tcp-relay, in one line."""
    if (NODE_PEERS / release).is_dir():
        return absent("node", "openssl")
    place = os.path.relpath(NODE_PEERS / release)
    return f"npm install --prefix {place} node-tcp-relay@{release} (or set TEST_NODE_PEERS)"


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


NODE_PEERS = Path(os.environ.get("TEST_NODE_PEERS") or Path(__file__).parents[2] / ".node-peers")

SUBJECTS = (
    Subject("direct", lambda processes, service, pool: Relay(service)),
    Subject("tcprelay", start_tcprelay),
    Subject("tcprelay-tls", start_tcprelay_tls, absent("openssl")),
    Subject("node-tcp-relay", start_node, without_node("0.0.13")),
    Subject("node-tls", start_node_tls, without_node("0.0.18")),
    Subject("ssh-R", start_ssh, absent("sshd", "ssh", "ssh-keygen")),
)
