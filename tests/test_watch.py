"""What is printed beside a failure: how the machine did, and where each thread of the relays and of the test stands."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .bench.processes import find_family
from .conftest import echo, wait_until
from .peers import ROOT, Peers
from .watch import AIDS, WATCH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what the watch reads is Linux's")


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack, tmp_path)


def test_stacks_of_relays_and_their_workers(peers: Peers) -> None:
    """Each process tells where its threads stand, and goes on as if nothing had been."""
    service = peers.service(echo)
    server, client = peers.relay(service.port, "--workers", "2")
    wait_until(lambda: all(len(find_family(relay.process.pid)) == 3 for relay in (server, client)))
    told = WATCH.stacks().split("stacks of ")
    assert [part.partition(",")[0] for part in told[1:-1]] == ["server"] * 3 + ["client"] * 3
    assert all("Current thread 0x" in part and "tcprelay" in part for part in told[1:-1]), told
    assert "test_stacks_of_relays_and_their_workers" in told[-1]
    with peers.connect(server.service_port) as sock:
        sock.sendall(b"?")
        assert sock.recv(1) == b"?"


def test_what_it_says_of_machine_and_relays(peers: Peers) -> None:
    server = peers.server()
    assert server.relay_port
    told = WATCH.look().splitlines()
    assert told[0].startswith("a sleeper was late: ")
    states = [line for line in told if line.startswith(f"server, process {server.process.pid}: state ")]
    assert len(states) == 1 and " major faults, " in states[0]


def test_a_sleeper_that_is_held_up_tells_of_it() -> None:
    command = [sys.executable, "-S", str(AIDS / "sleeper.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as sleeper:
        assert sleeper.stdin and sleeper.stdout
        sleeper.stdin.write(b"\n")
        sleeper.stdout.readline()  # it has begun
        sleeper.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.4)
        sleeper.send_signal(signal.SIGCONT)
        sleeper.stdin.write(b"\n")
        worst = sleeper.stdout.readline()
        sleeper.stdin.close()
        assert sleeper.wait(10) == 0
    assert 0.3 < float(worst.strip(b"[").partition(b",")[0]) < 10


def test_what_stands_beside_a_failed_test(tmp_path: Path) -> None:
    """A deadline that is met brings the stacks; another failure how the machine did, alone."""
    test = tmp_path / "test_fails.py"
    test.write_text("""if True:
        from tests.conftest import wait_until

        def test_deadline():
            raise TimeoutError("timed out")

        def test_state():
            wait_until(lambda: False, 0.1)

        def test_other():
            raise ValueError
    """)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    _, deadline, state, other = done.stdout.split("FAILURES")[1].partition("short test summary")[0].split("\n____")
    assert all("a sleeper was late: " in part for part in (deadline, state, other))
    assert "stacks of the test:" in deadline and "stacks of the test:" in state
    assert "stacks of the test:" not in other
