"""Real processes for a measurement: started, watched until they are ready, ended and reaped together."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT = 15.0
END_TIMEOUT = 15.0
"""Longer than the drain time-out of tcprelay, so that what is killed here really hangs."""
SLOW_END = 3.0

_ESTABLISHED, _LISTEN = "01", "0A"
_TICKS = os.sysconf("SC_CLK_TCK")
_used_ports: set[int] = set()


class Failure(Exception):
    """A measurement cannot be made; the message says why in one line."""


def find_program(name: str) -> str:
    """The path of a program, "" where there is none; daemons are often outside a user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])) or ""


def free_port() -> int:
    """A loopback port that is free, below the usual ephemeral range: no outgoing connection takes it meanwhile."""
    for port in random.sample(range(20000, 32000), 1000):
        if port not in _used_ports:
            with socket.socket() as sock:
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _used_ports.add(port)
            return port
    raise Failure("no free port")


def count_sockets(port: int, state: str) -> int:
    """How many IPv4 sockets of this machine with that local port are in that state."""
    suffix = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for _, local, _, st, *_ in map(str.split, lines) if st == state and local.endswith(suffix))


@dataclass(frozen=True)
class Usage:
    """What a process and its descendants have used and hold."""

    processor_seconds: float = 0.0
    resident: int = 0
    threads: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.processor_seconds + other.processor_seconds,
            self.resident + other.resident,
            self.threads + other.threads,
        )


def usage(pid: int) -> Usage:
    """Of a process, its threads, and its children, those that were reaped included."""
    stats = _read_stats()
    total = Usage()
    for one in _tree(pid, stats):
        fields = stats[one]
        total += Usage(
            sum(map(int, fields[11:15])) / _TICKS, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), int(fields[17])
        )
    return total


def _read_stats() -> dict[int, list[str]]:
    """/proc/PID/stat of all processes: the fields from the third on, behind the name in brackets."""
    stats = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stats[int(name)] = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                pass  # it has just ended
    return stats


def _tree(pid: int, stats: dict[int, list[str]]) -> list[int]:
    """`pid` and its descendants, those that are there."""
    found = [pid] if pid in stats else []
    for parent in found:  # grows while it is walked
        found += [child for child, fields in stats.items() if int(fields[1]) == parent]
    return found


class Processes:
    """The processes of one measurement, and a temporary directory for their files; a context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="tcprelay-bench-")
        self.directory = Path(self._directory.name)
        self.notes: list[str] = []
        """What was odd about their ends."""
        self._running: list[tuple[str, Path, subprocess.Popen[bytes]]] = []
        # No option of tcprelay from the environment or the configuration of whoever runs this.
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("TCPRELAY_")}
        self._env["TCPRELAY_CONFIG"] = os.devnull

    def __enter__(self) -> Processes:
        return self

    def start(self, name: str, argv: Sequence[str]) -> int:
        """Start a process in the background; returns its number."""
        log = self.directory / f"{len(self._running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=self._env
            )
        self._running.append((name, log, process))
        return process.pid

    def run(self, argv: Sequence[str], timeout: float) -> str:
        """Run a program to its end and return its output.  Raises `Failure`."""
        name = os.path.basename(argv[0])
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                env=self._env,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failure(f"{name}: not done within {timeout:g} s") from None
        if done.returncode:
            raise Failure(f"{name}: {_last_line(done.stdout + done.stderr) or f'status {done.returncode}'}")
        return done.stdout

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for state that no descriptor announces.  Raises `Failure` at the deadline or if a process dies."""
        deadline = time.monotonic() + READY_TIMEOUT
        while not condition():
            for name, log, process in self._running:
                if process.poll() is not None:
                    raise Failure(f"{name} ended: {_last_line(log.read_text(errors='replace'))}")
            if time.monotonic() > deadline:
                raise Failure(f"not within {READY_TIMEOUT:g} s: {what}")
            time.sleep(0.01)

    def wait_listening(self, port: int) -> None:
        self.wait_until(f"a listener on port {port}", lambda: count_sockets(port, _LISTEN) > 0)

    def wait_connected(self, port: int, count: int) -> None:
        """Wait until so many connections to a port are up."""
        self.wait_until(f"{count} connections to port {port}", lambda: count_sockets(port, _ESTABLISHED) >= count)

    def wait_logged(self, pid: int, text: str) -> None:
        log = next(log for _, log, process in self._running if process.pid == pid)
        self.wait_until(f"{text!r} in the log", lambda: text in log.read_text(errors="replace"))

    def __exit__(self, *_: object) -> None:
        while self._running:
            self._end(*self._running.pop())
        self._directory.cleanup()

    def _end(self, name: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        stats = _read_stats()
        family = {pid: stats[pid][19] for pid in _tree(process.pid, stats)}  # with the time at which each started
        began = time.monotonic()
        process.terminate()
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (seconds := time.monotonic() - began) > SLOW_END:
            self.notes.append(f"{name} took {seconds:.1f} s to end after SIGTERM")
        for line in log.read_text(errors="replace").splitlines():
            if "Traceback" in line or "unexpected error" in line or "still running" in line:
                self.notes.append(f"{name} logged: {line[:160]}")
                break
        # Descendants end with it or soon after; whoever does not is not left behind either.
        while left := [pid for pid, fields in _read_stats().items() if family.get(pid) == fields[19]]:
            if time.monotonic() - began > END_TIMEOUT:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                self.notes.append(f"{name} left {len(left)} processes behind")
                return
            time.sleep(0.01)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
