"""Real programs for the tests: the relays as users start them, and the peers that they are tried with."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pytest

from _tcprelay.waiting import Deadline

from .conftest import PATIENCE, PEER_PATH, Service, connect, wait_until
from .conftest import no_peer as no_peer  # for those who use what is here
from .watch import WATCH

ROOT = Path(__file__).resolve().parent.parent
NODE_PEERS = Path(os.environ.get("TEST_NODE_PEERS") or ROOT / ".node-peers")
"""Releases of node-tcp-relay, as ``npm install --prefix .node-peers/0.0.13 node-tcp-relay@0.0.13`` puts them there."""
LONG = 120.0
"""Seconds within which a large transfer must be done."""
PIECE = 1 << 20
HOST = "127.0.0.1"


# --- Files and commands ---------------------------------------------------------------------------------------


def make_file(path: Path, mebibytes: int) -> str:
    """Write a file of which no two mebibytes are alike; returns its SHA-256."""
    block = bytearray(random.Random(mebibytes).randbytes(PIECE))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(mebibytes):
            block[:8] = number.to_bytes(8, "big")
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def find(program: str) -> str:
    """The absolute path of a program; a test that uses it bears the mark `peer`."""
    path = shutil.which(program, path=PEER_PATH)
    assert path, f"{program} not found"
    return path


def run(*command: str, stdin: Path | None = None, timeout: float = LONG) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, whatever its exit status; with the path of what it reads."""
    with (stdin or Path(os.devnull)).open("rb") as source:
        return subprocess.run(command, stdin=source, capture_output=True, timeout=timeout, check=False)


def digest_output(*command: str, stdin: Path | None = None, timeout: float = LONG) -> str:
    """The SHA-256 of what a command writes, which is too much to be kept; the command must succeed."""
    digest = hashlib.sha256()
    with (stdin or Path(os.devnull)).open("rb") as source:
        process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE)
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        try:
            assert process.stdout
            with process, process.stdout:
                while piece := process.stdout.read(PIECE):
                    digest.update(piece)
        finally:
            watch.cancel()
            watch.join()
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}"
    return digest.hexdigest()


def curl(*arguments: str) -> list[str]:
    """A curl command that heeds no configuration and no proxy, and has a deadline."""
    return [find("curl"), "-q", "--noproxy", "*", "-sS", "--fail", "--max-time", str(int(LONG)), *arguments]


def peak_memory(process: subprocess.Popen[Any]) -> int:
    """The most bytes of memory that a process has had resident so far."""
    [line] = [n for n in Path(f"/proc/{process.pid}/status").read_text().splitlines() if n.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def free_port() -> int:
    """A port for a program that cannot be told to take a free one.

    It is below the range from which the kernel takes ports by itself, so that nobody gets it in the meantime.
    """
    return next(port for port in iter(lambda: random.randrange(20000, 32000), None) if not is_listening(port))


def is_listening(port: int) -> bool:
    """Whether somebody listens on a port, found without connecting: that could take a link."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return True
    return False


# --- Programs -------------------------------------------------------------------------------------------------


class Program:
    """A real program in a process of its own; its output is collected by a thread, line by line.

    As a context manager it is ended and reaped on the way out.  With `terminal` its output is a terminal.
    """

    def __init__(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        terminal: bool = False,
    ) -> None:
        self.name = Path(command[0]).name
        self.lines: list[str] = []
        self._condition = threading.Condition()  # over `lines` and `_ended`
        self._ended = False
        reader, writer = pty.openpty() if terminal else os.pipe()
        self._output = open(reader, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by `close`
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=stdin, stdout=writer, stderr=writer
            )
        except BaseException:
            self._output.close()
            raise
        finally:
            os.close(writer)
        self._reader = threading.Thread(target=self._read, name=f"output of {self.name}")
        self._reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self.check()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, find: Callable[[str], Any], timeout: float = PATIENCE) -> Any:
        """The first true value of `find` for a line of the output."""
        deadline, seen = Deadline(timeout), 0
        while True:
            with self._condition:
                while len(self.lines) == seen and not self._ended and self._condition.wait(deadline.remaining()):
                    pass
                fresh = self.lines[seen:]
            for line in fresh:
                if result := find(line):
                    return result
            if not fresh:
                WATCH.tell(f"{self.name} did not say it within {timeout} s")
            assert fresh, f"{self.name} did not say it within {timeout} s:\n{self.output}"
            seen += len(fresh)

    def wait_until_listening(self, port: int) -> None:
        wait_until(lambda: is_listening(port) or self.process.poll() is not None)
        assert self.process.poll() is None, f"{self.name} ended:\n{self.output}"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process and of its output; returns its exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            WATCH.tell(f"{self.name} did not end within {timeout} s")
            pytest.fail(f"{self.name} did not end within {timeout} s:\n{self.output}")
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        """Have the process end, if it has not, and reap it."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(2 * PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._output.close()

    def check(self) -> None:
        """Whether it ended as it should; after `close`."""

    def _read(self) -> None:
        try:
            for line in self._output:
                with self._condition:
                    self.lines.append(line.rstrip("\r\n"))
                    self._condition.notify_all()
        except OSError:
            pass  # so a terminal says that nobody writes to it any more
        with self._condition:
            self._ended = True
            self._condition.notify_all()


class RelayProcess(Program):
    """``python3 -m tcprelay server`` or ``client``, with its log as JSON; with as many workers as TEST_WORKERS
    says, unless the options do.  Many a service here serves a certain number of connections: none is tried.

    On the way out of the context it gets SIGTERM if it still runs; its exit status must be 0, unless it was
    killed, and there must be nothing in its output but log lines, none of them an error.
    """

    def __init__(
        self,
        role: Literal["server", "client"],
        *options: str,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        # With its warnings Python would tell of sockets that were not closed.
        workers = os.environ.get("TEST_WORKERS")
        more = {"TCPRELAY_WORKERS": workers} if workers else {}
        watched = WATCH.environment()
        settings = {"TCPRELAY_LOG_FORMAT": "json", "TCPRELAY_TRY_SERVICE": "false", "PYTHONWARNINGS": "default"}
        env = {**settings, **watched, **more, **(env or {})}
        super().__init__(*wrapper, sys.executable, "-m", "tcprelay", role, *options, env=env)
        self.name = role
        WATCH.add(role, self.process.pid, watched)
        self.expected_error: str | tuple[str, ...] = ""
        """What an error in its log begins with, where a test provokes one."""
        self._killed = False

    def wait_message(self, start: str) -> None:
        """Wait for a line in the log that begins so."""
        self.wait_for(lambda line: self._parse(line)["message"].startswith(start))

    def wait_event(self, kind: str, timeout: float = PATIENCE, **fields: object) -> dict[str, Any]:
        """The first event of this kind in the log with these fields."""

        def matches(line: str) -> dict[str, Any] | None:
            entry, wanted = self._parse(line), {"event": kind, **fields}
            return entry if wanted.items() <= entry.items() else None

        return dict(self.wait_for(matches, timeout))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of this kind in the log so far."""
        return [entry for line in list(self.lines) if (entry := self._parse(line)).get("event") == kind]

    def port_of(self, service: str) -> int:
        """The port for clients of a service, or for relay clients where that is empty; waited for."""
        address: str = self.wait_event("Listening", service=service)["address"]
        return int(address.rpartition(":")[2])

    @property
    def relay_port(self) -> int:
        return self.port_of("")

    @property
    def service_port(self) -> int:
        return self.port_of("default")

    def kill(self) -> None:
        """End it by SIGKILL, as the kernel does when memory runs out."""
        self.end_by(signal.SIGKILL)

    def end_by(self, number: signal.Signals) -> None:
        """End it by a signal that it does not handle."""
        self._killed = True
        self.signal(number)
        assert self.wait() == -number

    def close(self) -> None:
        super().close()
        WATCH.remove(self.process.pid)

    def check(self) -> None:
        for line in self.lines:
            entry = self._parse(line)
            expected = self.expected_error and entry["message"].startswith(self.expected_error)
            assert entry["level"] != "error" or expected, f"{self.name} logs an error:\n{self.output}"
        if not self._killed:
            assert self.process.returncode == 0, f"{self.name} ended with {self.process.returncode}:\n{self.output}"

    def _parse(self, line: str) -> dict[str, Any]:
        if not line.startswith("{"):
            self._reader.join(1.0)  # it is probably ending with a traceback: show all of it
            pytest.fail(f"{self.name} says what is no log line:\n{self.output}")
        return dict(json.loads(line))


def workers_of(relay: RelayProcess) -> list[int]:
    """The worker processes of a relay, in the order of their birth."""
    pid = relay.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Peers:
    """Starts programs for a test, and takes them away again in reverse order."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self.path = path
        """A directory for the test's files."""

    # Relays

    def server(self, *options: str) -> RelayProcess:
        """A relay server on free ports of loopback."""
        command = "--relay-port", "0", "--service-port", "0", "--hostname", HOST
        return self.relay_process("server", *command, *options)

    def client(self, relay_port: int, port: int, *options: str) -> RelayProcess:
        """A relay client, once its service is published."""
        command = "--relay-host", HOST, "--relay-port", str(relay_port), "--host", HOST, "--port", str(port)
        client = self.relay_process("client", *command, *options)
        client.wait_event("Published")
        return client

    def relay(self, port: int, *options: str) -> tuple[RelayProcess, RelayProcess]:
        """A relay server and a relay client for a service on `port`; options common to both."""
        server = self.server(*options)
        return server, self.client(server.relay_port, port, *options)

    def relay_process(
        self,
        role: Literal["server", "client"],
        *options: str,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> RelayProcess:
        process = RelayProcess(role, *options, env=env, wrapper=wrapper)
        self._stack.enter_context(process)
        return process

    # Services and what speaks to them

    def service(self, serve: Callable[[socket.socket], object], path: str = "", address: str = HOST) -> Service:
        """A service in Python, in threads of this process; with a path it is at a Unix socket."""
        service = Service(serve, path, address)
        self._stack.callback(service.close)
        return service

    def connect(self, port: int) -> socket.socket:
        return self._stack.enter_context(connect((HOST, port)))

    def program(self, *command: str, **options: Any) -> Program:
        return self._stack.enter_context(Program(*command, **options))

    def nginx(self, files: Path, certificate: str = "", key: str = "", http2: bool = False) -> int:
        """nginx that gives the files of a directory and takes others by PUT, over TLS where it has a certificate, and
        at /protocol says what it is spoken to in; returns its port."""
        port, state = free_port(), self.path / "nginx"
        state.mkdir()
        user = "user root;" if os.geteuid() == 0 else ""  # the files are for the present user alone
        temporary = "\n".join(
            f"{kind}_temp_path {state}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        secure = f"ssl_certificate {certificate}; ssl_certificate_key {key};" if certificate else ""
        config = state / "nginx.conf"
        config.write_text(f"""
            daemon off; {user} worker_processes 1; pid {state}/pid; error_log stderr;
            events {{}}
            http {{
                access_log off; sendfile on; {temporary}
                server {{
                    listen {HOST}:{port} {"ssl" if secure else ""} {"http2" if http2 else ""}; {secure}
                    location = /protocol {{ return 200 $server_protocol; }}
                    root {files}; client_max_body_size 0; dav_methods PUT;
                }}
            }}
        """)
        nginx = Program(find("nginx"), "-p", str(state), "-c", str(config), "-e", "stderr")
        self._stack.enter_context(nginx).wait_until_listening(port)
        return port

    def stunnel(self, port: int, *settings: str) -> int:
        """stunnel before `port` on loopback; returns the port where it listens."""
        listening = free_port()
        config = self.path / f"stunnel-{listening}.conf"
        lines = "foreground = yes", "syslog = no", "pid =", "socket = l:SO_REUSEADDR=1"
        section = "[relay]", f"accept = {HOST}:{listening}", f"connect = {HOST}:{port}"
        config.write_text("\n".join([*lines, *section, *settings, ""]))
        self.program(find("stunnel"), str(config)).wait_until_listening(listening)
        return listening

    def redis(self) -> int:
        """A redis server that keeps everything in memory; returns its port."""
        port = free_port()
        words = f"--port {port} --bind {HOST} --appendonly no --daemonize no --dir {self.path}".split()
        redis = Program(find("redis-server"), *words, "--save", "")
        self._stack.enter_context(redis).wait_until_listening(port)
        return port

    def sshd(self) -> tuple[int, list[str]]:
        """sshd for the present user with keys of its own; returns its port and the options for ssh and scp."""
        port, state = free_port(), self.path / "ssh"
        state.mkdir(mode=0o700)
        for name in ("host_key", "key"):
            made = run(find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(state / name))
            assert made.returncode == 0, made.stderr
        (state / "authorized_keys").write_text((state / "key.pub").read_text())
        (state / "known_hosts").write_text("behind-the-relay " + (state / "host_key.pub").read_text())
        (state / "sshd_config").write_text(f"""
            Port {port}
            ListenAddress {HOST}
            HostKey {state}/host_key
            PidFile none
            AuthorizedKeysFile {state}/authorized_keys
            PasswordAuthentication no
            PermitRootLogin prohibit-password
            UsePAM no
            StrictModes no
            Subsystem sftp internal-sftp
        """)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # sshd wants it; a service manager would make it
        sshd = Program(find("sshd"), "-D", "-e", "-f", str(state / "sshd_config"))
        self._stack.enter_context(sshd).wait_until_listening(port)
        options = {
            "IdentityFile": state / "key", "IdentitiesOnly": "yes", "IdentityAgent": "none", "BatchMode": "yes",
            "UserKnownHostsFile": state / "known_hosts", "GlobalKnownHostsFile": os.devnull,
            "StrictHostKeyChecking": "yes", "HostKeyAlias": "behind-the-relay", "ConnectTimeout": "10",
            "LogLevel": "ERROR", "User": pwd.getpwuid(os.geteuid()).pw_name,
        }  # fmt: skip
        return port, ["-F", "none", *[f"-o{name}={value}" for name, value in options.items()]]

    def node_server(self, version: str, **options: str) -> tuple[int, int]:
        """The server of node-tcp-relay; returns its relay port and its service port."""
        ports = relay_port, service_port = free_port(), free_port()
        if version == "0.0.18" and not options.keys() & {"tls", "auth"}:
            # Its command takes a missing --tls for yes; as a library it can do without.
            pfx = str(self._node_file(version, "cert.pfx"))
            settings = {"hostname": HOST, "tls": False, "pfx": pfx, "passphrase": "abcd", **options}
            module = json.dumps(str(self._node_file(version, "index.js")))
            words = ["-e", f"require({module}).createRelayServer(...{json.dumps([*ports, settings])})"]
        else:
            options = {"relayPort": str(relay_port), "servicePort": str(service_port), "hostname": HOST, **options}
            words = [str(self._node_file(version, "relay-server-cli.js")), *node_options(options)]
        node = self._stack.enter_context(Program(find("node"), *words))
        node.wait_until_listening(relay_port)
        node.wait_until_listening(service_port)
        return ports

    def node_client(self, version: str, relay_port: int, port: int, **options: str) -> Program:
        """The client of node-tcp-relay."""
        options = {"relayHost": HOST, "relayPort": str(relay_port), "host": HOST, "port": str(port), **options}
        words = [str(self._node_file(version, "relay-client-cli.js")), *node_options(options)]
        return self._stack.enter_context(Program(find("node"), *words))

    def _node_file(self, version: str, name: str) -> Path:
        """A file of a release; skips the test, or fails it where peers are required, if it is not there."""
        path = NODE_PEERS / version / "node_modules" / "node-tcp-relay" / name
        if not path.exists():
            no_peer(f"node-tcp-relay {version} is not in {NODE_PEERS}")
        return path


def node_options(options: Mapping[str, str]) -> list[str]:
    """The words of a command line; an option without a value stands alone."""
    return [word for name, value in options.items() for word in (f"--{name}", value) if word]
