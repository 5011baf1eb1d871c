"""What the machine, the relays and the test were doing when something failed, to be printed beside the failure.

the test ── asks ──▶ sleeper (a process: how late was who slept?)
         ── reads ─▶ /proc/pressure, /proc/PID/stat of the relays (has the machine read their pages again?)
         ── SIGUSR1 ▶ relays and their workers (`aids/sitecustomize.py`: where does each thread stand?)
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from .bench.processes import find_family, read_stat

AIDS = Path(__file__).parent / "aids"
ANSWER = 1.0
"""Seconds within which a process writes its stacks, or is told to be silent."""
Act = TypeVar("Act", bound=Callable[..., Any])


class Watch:
    """One for a test process, in which it is started first; without that it has nothing to tell of."""

    TIMES = 3
    """So often it tells of stacks; once one thing has failed, much else may."""

    def __init__(self) -> None:
        self._directory = ""
        self._relays: dict[int, tuple[str, Path]] = {}
        """The relay processes that were started: their names, and the files for their stacks."""
        self._sleeper: subprocess.Popen[bytes] | None = None
        self._left = self.TIMES
        self._telling = threading.Lock()  # what times out in several threads is told of one by one

    def start(self) -> None:
        if sys.platform != "linux":
            return  # most of what it reads is Linux's
        self._directory = tempfile.mkdtemp(prefix="tcprelay-watch-")
        os.chmod(self._directory, 0o711)  # some relays run as another user
        command = [sys.executable, "-S", str(AIDS / "sleeper.py")]
        self._sleeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def stop(self) -> None:
        if self._sleeper:
            self._sleeper.kill()
            with self._sleeper:
                self._sleeper.wait()
            self._sleeper = None
            shutil.rmtree(self._directory, ignore_errors=True)

    def renew(self) -> None:
        """For another test it may tell of stacks as often again."""
        self._left = self.TIMES

    # Relays

    def environment(self) -> dict[str, str]:
        """With what a relay is to be started so that its stacks can be asked for."""
        if not self._sleeper:
            return {}
        descriptor, path = tempfile.mkstemp(dir=self._directory)
        os.fchmod(descriptor, 0o666)
        os.close(descriptor)
        return {"PYTHONPATH": str(AIDS), "TEST_STACKS": path}

    def add(self, name: str, pid: int, environment: dict[str, str]) -> None:
        """Watch a relay that was started with that `environment`."""
        if environment:
            self._relays[pid] = name, Path(environment["TEST_STACKS"])

    def remove(self, pid: int) -> None:
        _, path = self._relays.pop(pid, ("", None))
        if path:
            path.unlink(missing_ok=True)

    # What it tells

    def tell(self, why: str) -> None:
        """Print all that can be seen, `why` above it, on standard error."""
        with self._telling:
            if not self._sleeper or not self._left:
                return
            self._left -= 1
            print(f"--- watch: {why}\n{self.look()}\n{self.stacks()}\n---", file=sys.stderr, flush=True)

    def look(self) -> str:
        """How the machine did, in some lines."""
        lines = [f"a sleeper was late: {self._ask_sleeper()}"]
        for path in sorted(Path("/proc/pressure").glob("*")):
            lines += [f"{path}: " + path.read_text().strip().replace("\n", "; ")]
        for pid, (name, _) in list(self._relays.items()):
            for number, stat in find_family(pid).items():
                lines += [f"{name}, process {number}: state {stat[0]}, {stat[9]} major faults, {stat[17]} threads"]
        return "\n".join(lines)

    def stacks(self) -> str:
        """The stacks of all threads of the relays and of this process."""
        parts = []
        for pid, (name, path) in list(self._relays.items()):
            for number in find_family(pid):
                parts += [f"stacks of {name}, process {number}:\n{ask_stacks(number, path)}"]
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            parts.append("stacks of the test:\n" + file.read().decode(errors="replace").strip())
        return "\n".join(parts)

    def _ask_sleeper(self) -> str:
        if not self._sleeper or self._sleeper.poll() is not None:
            return "nobody knows"
        assert self._sleeper.stdin and self._sleeper.stdout
        self._sleeper.stdin.write(b"\n")
        worst = json.loads(self._sleeper.stdout.readline())
        return ", ".join(f"{late:.2f} s {ago:.1f} s ago" for late, ago in worst) or "never by more than 0.01 s"

    def at_timeout(self, act: Act) -> Act:
        """A decorator for what works with connections: where it meets a deadline, the watch tells."""

        @wraps(act)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return act(*args, **kwargs)
            except TimeoutError as error:
                self.tell(f"{act.__name__}: {error}")
                raise

        return watched  # type: ignore[return-value]


def ask_stacks(pid: int, path: Path) -> str:
    """What a process that was started with the aids writes to its file when it is asked for its stacks."""
    if not catches(pid, signal.SIGUSR1):
        return "it cannot be asked"
    before = path.stat().st_size
    os.kill(pid, signal.SIGUSR1)
    deadline, size = time.monotonic() + ANSWER, before
    while time.monotonic() < deadline:
        time.sleep(0.05)  # that nothing more comes is not announced
        if before < size == path.stat().st_size:
            break
        size = path.stat().st_size
    return path.read_bytes()[before:].decode(errors="replace").strip() or f"no answer within {ANSWER:g} s"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, which would end it otherwise."""
    if not read_stat(pid):
        return False
    [mask] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


WATCH = Watch()
