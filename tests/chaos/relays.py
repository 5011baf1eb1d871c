"""The relays of a case: which legs speak TLS, real processes, and what they use of the machine."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.processes import find_family, usage
from ..certificates import Certificates, tls_context
from ..conftest import wait_until
from ..ends import TLSEnd
from ..peers import HOST, RelayProcess
from .suite import Run

TOKEN = "a-token-for-the-chaos-suite"


@dataclass(frozen=True)
class Legs:
    """Which legs speak TLS, and in which version."""

    link: str = "plain"
    """``plain``, ``tls`` or ``mutual`` (with client certificates)."""
    port: bool = False
    """TLS between service clients and the service port."""
    service: bool = False
    """TLS between the relay client and the service."""
    unix: bool = False
    """Whether the service is at a Unix socket."""
    version: str = "1.3"
    """The highest version that the tests' own ends and the relay client speak."""

    def __str__(self) -> str:
        tls = ["tls-port"] * self.port + [f"{self.link}-link"] + ["tls-service"] * self.service
        tls += ["unix-service"] * self.unix
        return " ".join(tls) + (f" {self.version}" if self.has_tls else "")

    @property
    def has_tls(self) -> bool:
        return self.port or self.service or self.link != "plain"

    def server_options(self, certificates: Certificates) -> list[str]:
        path, links = certificates.path, self.link != "plain"
        words = ["--token", TOKEN]
        if links or self.port:
            words += ["--tls", "both" if links and self.port else "relay" if links else "service"]
            words += ["--cert", path("server.pem"), "--key", path("server.key")]
        if self.link == "mutual":
            words += ["--auth", "--ca-file", path("ca.pem")]
        return words

    def client_options(self, certificates: Certificates) -> list[str]:
        path, links = certificates.path, self.link != "plain"
        words = ["--token", TOKEN]
        if links or self.service:
            words += ["--tls", "both" if links and self.service else "relay" if links else "service"]
        if links:
            words += ["--ca-file", path("ca.pem"), "--tls-server-name", "localhost"]
        if self.service:
            words += ["--service-ca-file", path("ca.pem")]
        if self.link == "mutual":
            words += ["--cert", path("client.pem"), "--key", path("client.key")]
        return words

    def environment(self, directory: Path) -> dict[str, str]:
        """For the relay client: OpenSSL's own configuration holds it to the version."""
        if self.version != "1.2":
            return {}
        path = directory / "openssl-1.2.cnf"
        path.write_text(
            "openssl_conf = a\n[a]\nssl_conf = b\n[b]\nsystem_default = c\n[c]\nMaxProtocol = TLSv1.2\n"
        )  # fmt: skip
        return {"OPENSSL_CONF": str(path)}

    # The tests' own ends

    def context(self, certificates: Certificates, server_side: bool) -> ssl.SSLContext:
        path = certificates.path
        if server_side:
            context = tls_context(True, path("server.pem"), path("server.key"))
        else:
            context = tls_context(ca=path("ca.pem"))
        if self.version == "1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context


LEGS = [Legs(link, port, service) for link in ("plain", "tls") for port in (False, True) for service in (False, True)]
"""All combinations of plain and TLS legs, with TLS 1.3."""


class Relays:
    """A relay server and a relay client in processes of their own, and ways to their two ends."""

    def __init__(
        self,
        run: Run,
        legs: Legs,
        service: int | str,
        server: tuple[str, ...] = (),
        client: tuple[str, ...] = (),
        wrapper: tuple[str, ...] = (),
        publish: bool = True,
    ) -> None:
        """A relay to the `service`, as `serving` returns it; `server` and `client` are further options.  Returns when
        it is published, or with `publish` False when the client is started."""
        self._run, self.legs, self._service = run, legs, service
        self._wrapper = wrapper
        self._server_options, self._client_options = server, client
        self._connecting = legs.context(run.certificates, False) if legs.port else None
        self.relay_port = self.service_port = 0
        self.server = self.start_server()
        self.relay_port, self.service_port = self.server.relay_port, self.server.service_port
        self.client = self.start_client(publish)

    def start_server(self) -> RelayProcess:
        """Start the server, again on the same ports if it was started before."""
        options = ["--hostname", self._run.server.address]
        options += ["--relay-port", str(self.relay_port), "--service-port", str(self.service_port)]
        options += [*self.legs.server_options(self._run.certificates), *self._server_options]
        with self._run.server.inside():
            self.server = self._run.peers.relay_process("server", *options, wrapper=self._wrapper)
        self.server.wait_event("Listening", service="default")
        return self.server

    def start_client(self, wait: bool = True) -> RelayProcess:
        """Start the client; with `wait` until its service is published."""
        options = ["--relay-host", self._run.server.address, "--relay-port", str(self.relay_port)]
        at_port = isinstance(self._service, int)
        options += ["--host", HOST, "--port", str(self._service)] if at_port else ["--host", str(self._service)]
        options += [*self.legs.client_options(self._run.certificates), *self._client_options]
        environment = self.legs.environment(self._run.directory)
        with self._run.client.inside():
            self.client = self._run.peers.relay_process("client", *options, env=environment, wrapper=self._wrapper)
        if wait:
            self.client.wait_event("Published")
        return self.client

    def connect(self, timeout: float = 10.0) -> Any:
        """A service client's connection: a socket, or a `TLSEnd`.  Raises `OSError`."""
        with self._run.server.inside():
            sock = socket.create_connection((self._run.server.address, self.service_port), timeout)
        return sock if self._connecting is None else TLSEnd(sock, self._connecting, False)


def serving(run: Run, legs: Legs, serve: Callable[[Any], object], address: str = HOST) -> int | str:
    """A service at the client's host in threads of this process, behind TLS where the legs say so; returns its port,
    or ``unix:PATH``."""
    if legs.service:
        context = legs.context(run.certificates, True)
        return serving(run, replace(legs, service=False), lambda sock: serve(TLSEnd(sock, context, True)), address)
    path = tempfile.mkdtemp(dir=run.directory) + "/service" if legs.unix else ""
    with run.client.inside():
        service = run.peers.service(serve, path, address)
    return f"unix:{path}" if path else service.port


# What processes use, their worker processes included.


def memory(process: RelayProcess) -> float:
    """Resident MiB."""
    return usage(process.process.pid)[1] / (1 << 20)


def processor(process: RelayProcess) -> float:
    """Processor seconds so far."""
    return usage(process.process.pid)[0]


def threads(process: RelayProcess) -> int:
    return usage(process.process.pid)[2]


def descriptors(process: RelayProcess) -> int:
    return sum(descriptors_of_each(process).values())


def descriptors_of_each(process: RelayProcess) -> dict[int, int]:
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in find_family(process.process.pid)}


def wait_for_pool(relays: Relays, links: int, timeout: float = 10.0) -> None:
    """Wait until so many links are established at the relay port, as the kernel sees them."""
    wait_until(lambda: links_of(relays.relay_port) >= links, timeout)


def links_of(relay_port: int) -> int:
    """How many connections the relay port has."""
    lines = (line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines())
    return sum(state == "01" and local.endswith(f":{relay_port:04X}") for local, _, state in lines)
