"""Real processes for a measurement: started, watched until they are ready, ended and reaped together."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from .places import Place
from .programs import find_program
from .sockets import LISTEN

READY_TIMEOUT = END_TIMEOUT = 15.0  # longer than tcprelay's drain time-out: what is killed after it really hangs
SLOW_END = 3.0
_ports = iter(random.sample(range(20000, 32000), 12000))  # below the usual range of outgoing connections


class Failure(Exception):
    """A measurement cannot be made; the message says why in one line."""


def free_port() -> int:
    """A free loopback port that was not given out before."""
    for port in _ports:
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise Failure("no free port")


def usage(*pids: int) -> tuple[float, int, int]:
    """Processor seconds, resident bytes and threads of processes and their descendants; 0 is no process."""
    families = [find_family(pid) for pid in pids]
    stats = [stat for family in families for stat in family.values()]
    reaped = sum(int(value) for stat in stats for value in stat[13:15]) / os.sysconf("SC_CLK_TCK")
    seconds = reaped + sum(processor_clock(pid) for family in families for pid in family)
    pages, threads = (sum(int(stat[index]) for stat in stats) for index in (21, 17))
    return seconds, pages * os.sysconf("SC_PAGE_SIZE"), threads


def times(pid: int) -> tuple[float, float]:
    """User and system seconds of a process and its descendants, as exact as a second or so of load makes the kernel's
    division of its clock; 0 is no process."""
    stats = find_family(pid).values()
    user, system = (sum(int(stat[index]) for stat in stats) for index in (11, 12))
    return user / os.sysconf("SC_CLK_TCK"), system / os.sysconf("SC_CLK_TCK")


def processor_clock(pid: int) -> float:
    """Processor seconds of a process alone: its clock is finer than the ticks in /proc."""
    with suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it
    return 0.0


def find_family(pid: int) -> dict[int, list[str]]:
    """A process and its descendants, with what `read_stat` says of each."""
    stats = {int(name): read_stat(name) for name in os.listdir("/proc") if name.isdigit()}
    found = [pid] if stats.get(pid) else []
    for parent in found:  # grows while it is walked
        found += [child for child, stat in stats.items() if stat and int(stat[1]) == parent]
    return {one: stats[one] for one in found}


def read_stat(pid: object) -> list[str]:
    """/proc/PID/stat: the fields from the third on, behind the name in brackets; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class Processes(ExitStack):
    """The processes of one measurement, and a temporary directory for their files; a context manager."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.directory = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="tcprelay-bench-")))
        self.notes: list[str] = []  # what was odd about their ends
        self._running: list[tuple[str, Path, subprocess.Popen[bytes]]] = []

    def start(self, name: str, *argv: object, far: bool = False) -> int:
        """Start a process in the background, at the near or the far end; returns its number."""
        # No option of tcprelay comes from the environment or the configuration of whoever runs this; nor does a proxy.
        env = {variable: value for variable, value in os.environ.items()
               if not variable.startswith("TCPRELAY_") and not variable.lower().endswith("_proxy")}  # fmt: skip
        command = [*self.place.entrance, *argv] if far else argv
        log = self.directory / f"{len(self._running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**env, "TCPRELAY_CONFIG": os.devnull}, cwd=Path(__file__).parents[2],
            )  # fmt: skip
        self.callback(self._end, name, log, process)
        self._running.append((name, log, process))
        return process.pid

    def run(self, timeout: float, name: str, *argv: object) -> str:
        """Run a program to its end, at the near end, and return its output.  Raises `Failure`."""
        command = [find_program(name), *map(str, argv)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{name}: not done within {timeout:g} s") from None
        if done.returncode:
            raise Failure(f"{name}: status {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}")
        return done.stdout

    def wait_sockets(self, port: int, state: int = LISTEN, count: int = 1, far: bool = False) -> None:
        """Wait for so many listeners or connections.  Raises `Failure` at the deadline or if a process ends."""
        deadline = time.monotonic() + READY_TIMEOUT
        sockets = self.place.far_sockets if far else self.place.near_sockets
        while sockets.count(port, state) < count:
            for name, log, process in self._running:
                if process.poll() is not None:
                    raise Failure(f"{name} ended: {log.read_text(errors='replace').strip()[-200:]}")
            if time.monotonic() > deadline:
                raise Failure(f"not within {READY_TIMEOUT:g} s: {count} sockets on port {port}")
            time.sleep(0.001)  # no descriptor announces it

    def _end(self, name: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        began, family, left = time.monotonic(), find_family(process.pid), [process.pid]
        process.terminate()
        while left and time.monotonic() - began < END_TIMEOUT:
            time.sleep(0.01)
            process.poll()  # reaps it
            now = {pid: read_stat(pid) for pid in family}  # another one with its number started at another time
            left = [pid for pid, stat in now.items() if stat and stat[19] == family[pid][19] and stat[0] != "Z"]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()
        if (seconds := time.monotonic() - began) > SLOW_END:
            self.notes.append(f"{name} took {seconds:.1f} s to end after SIGTERM{', by SIGKILL' if left else ''}")
        if count := log.read_text(errors="replace").count("Traceback"):
            self.notes.append(f"{name} logged {count} tracebacks")
