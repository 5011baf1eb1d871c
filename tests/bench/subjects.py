"""What is measured: ways from a service client to a service."""

from __future__ import annotations

import os
import pwd
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from .processes import ROOT, Processes, find_program, free_port


@dataclass(frozen=True)
class Pool:
    """What a case wants of a relay's pool of links."""

    size: int | None = None
    """How many idle ones to keep; ``None`` is the relay's own default."""
    stock: int = 1
    """How many a relay must have in stock that uses no link twice, and replaces one only on data."""


@dataclass(frozen=True)
class Relay:
    """A relay that is up: where service clients connect, and its processes (0: none)."""

    port: int
    server: int = 0
    client: int = 0


class Subject(ABC):
    """One way from a service client to a service."""

    name: str
    is_relay = True

    def missing(self) -> str:
        """What it needs and this machine does not have, in one line; "" where it can be measured."""
        return ""

    @abstractmethod
    def start(self, processes: Processes, service: int, pool: Pool) -> Relay:
        """Expose the service port, and return when that is so.  Raises `Failure`."""


class Direct(Subject):
    name = "direct"
    is_relay = False

    def start(self, processes: Processes, service: int, pool: Pool) -> Relay:
        return Relay(service)


class TcpRelay(Subject):
    """tcprelay with its own defaults, its log included, which goes to a file."""

    name = "tcprelay"
    default_pool = 8

    def start(self, processes: Processes, service: int, pool: Pool) -> Relay:
        port, relay_port = free_port(), free_port()
        command = [sys.executable, "-m", "tcprelay"]
        server = processes.start(
            "tcprelay server",
            [*command, "server", "--hostname=127.0.0.1", f"--relay-port={relay_port}", f"--service-port={port}"],
        )
        processes.wait_listening(relay_port)
        size = self.default_pool if pool.size is None else pool.size
        client = processes.start(
            "tcprelay client",
            [*command, "client", "--host=127.0.0.1", f"--port={service}", "--relay-host=127.0.0.1",
             f"--relay-port={relay_port}", f"--num-conn={size}"],
        )  # fmt: skip
        processes.wait_connected(relay_port, size)
        processes.wait_logged(server, "is connected")
        return Relay(port, server, client)


class NodeTcpRelay(Subject):
    """node-tcp-relay at both ends; it opens a link for each connection."""

    name = "node-tcp-relay"
    version = "0.0.13"

    def __init__(self) -> None:
        peers = Path(os.environ.get("TCPRELAY_NODE_PEERS") or ROOT / ".node-peers")
        self._package = peers / self.version / "node_modules" / "node-tcp-relay"

    def missing(self) -> str:
        if not find_program("node"):
            return "node is not installed"
        if not (self._package / "relay-server-cli.js").is_file():
            shown = os.path.relpath(self._package.parents[1])
            return f"npm install --prefix {shown} node-tcp-relay@{self.version} (or set TCPRELAY_NODE_PEERS)"
        return ""

    def start(self, processes: Processes, service: int, pool: Pool) -> Relay:
        port, relay_port = free_port(), free_port()
        node = find_program("node")
        server = processes.start(
            "node-tcp-relay server",
            [node, str(self._package / "relay-server-cli.js"), "--hostname", "127.0.0.1",
             "--relayPort", str(relay_port), "--servicePort", str(port)],
        )  # fmt: skip
        processes.wait_listening(relay_port)
        processes.wait_listening(port)
        size = pool.stock if pool.size is None else pool.size
        client = processes.start(
            "node-tcp-relay client",
            [node, str(self._package / "relay-client-cli.js"), "--host", "127.0.0.1", "--port", str(service),
             "--relayHost", "127.0.0.1", "--relayPort", str(relay_port), "--numConn", str(size)],
        )  # fmt: skip
        processes.wait_connected(relay_port, size)
        return Relay(port, server, client)


class SshRemote(Subject):
    """``ssh -R`` to an sshd of its own, with keys and configuration of its own; always encrypted."""

    name = "ssh -R"

    def missing(self) -> str:
        absent = [name for name in ("sshd", "ssh", "ssh-keygen") if not find_program(name)]
        return f"{' and '.join(absent)} not installed" if absent else ""

    def start(self, processes: Processes, service: int, pool: Pool) -> Relay:
        port, ssh_port, files = free_port(), free_port(), processes.directory
        for key in ("host", "user"):
            processes.run([find_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(files / key)], 10)
        config = files / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{ssh_port}\nHostKey {files / 'host'}\nAuthorizedKeysFile {files / 'user.pub'}\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        sshd = [find_program("sshd"), "-D", "-e", "-f", str(config)]
        if os.getuid() == 0 and not os.path.isdir("/run/sshd"):
            # As root it insists on this directory, which its service unit makes: give it one that it alone sees.
            script = 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$@"'
            sshd = ["unshare", "--mount", "sh", "-c", script, "sh", *sshd]
        server = processes.start("sshd", sshd)
        processes.wait_listening(ssh_port)
        known = files / "known_hosts"
        known.write_text(f"[127.0.0.1]:{ssh_port} {(files / 'host.pub').read_text()}")
        user = pwd.getpwuid(os.getuid()).pw_name
        client = processes.start(
            "ssh",
            [find_program("ssh"), "-F", "none", "-N", "-i", str(files / "user"), "-p", str(ssh_port),
             "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes",
             "-o", f"UserKnownHostsFile={known}",
             "-R", f"127.0.0.1:{port}:127.0.0.1:{service}", f"{user}@127.0.0.1"],
        )  # fmt: skip
        processes.wait_listening(port)
        return Relay(port, server, client)


SUBJECTS: tuple[type[Subject], ...] = (Direct, TcpRelay, NodeTcpRelay, SshRemote)
