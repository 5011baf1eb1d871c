"""How a process uses the machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from _tcprelay.system import has_interpreter_lock

from .conftest import Bench, wait_until
from .peers import Peers, workers_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_BATCH"),
    pytest.mark.skipif(not has_interpreter_lock(), reason="without the interpreter lock threads run as they like"),
]

CHOOSE = """
import os
from _tcprelay.system import choose_processor
ask = os.sched_getscheduler
{before}
choose_processor(0)
print(ask(0), len(os.sched_getaffinity(0)))
"""


def threads_of(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def how_it_runs(before: str = "") -> list[int]:
    """The policy and the number of processors of a process of a command, that did something `before`."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE.format(before=before)], capture_output=True, text=True, timeout=30, check=True
    )
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_threads_of_a_command_run_one_after_another(peers: Peers, workers: str) -> None:
    """All of them on one processor, and none takes it from another; the parent of workers runs as any process does."""
    server = peers.relay_process("server", "--relay-port", "0", "--service-port", "0", "--workers", workers)
    assert server.relay_port
    pid = server.process.pid
    processes = workers_of(server) if workers != "0" else [pid]
    for process in processes:
        wait_until(lambda process=process: len(threads_of(process)) > 2)  # type: ignore[misc]
        for thread in threads_of(process):
            assert os.sched_getscheduler(thread) == os.SCHED_BATCH
            assert len(os.sched_getaffinity(thread)) == 1
    if workers != "0":
        assert os.sched_getscheduler(pid) == os.SCHED_OTHER


def test_a_program_that_embeds_a_relay_runs_as_before(bench: Bench) -> None:
    policy, processors = os.sched_getscheduler(0), os.sched_getaffinity(0)
    bench.relay()
    assert (os.sched_getscheduler(0), os.sched_getaffinity(0)) == (policy, processors)


def test_what_somebody_has_chosen_stays() -> None:
    assert how_it_runs() == [os.SCHED_BATCH, 1]
    assert how_it_runs("os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))") == [os.SCHED_IDLE, 1]


@pytest.mark.parametrize(
    ("names", "number"),
    [
        (["setscheduler", "setaffinity"], errno.EPERM),  # a unit's SystemCallFilter
        (["setscheduler", "getscheduler"], errno.ENOSYS),  # musl
    ],
)
def test_where_it_is_refused_all_goes_on(names: list[str], number: int) -> None:
    """Whichever of the calls it is."""
    lines = [f"def refuse(*_): raise OSError({number}, 'no')"]
    lines += [f"os.sched_{name} = refuse" for name in names]
    policy, _ = how_it_runs("\n".join(lines))
    assert policy == os.SCHED_OTHER


def test_a_system_without_the_policy() -> None:
    assert how_it_runs("policy = os.SCHED_BATCH; del os.SCHED_BATCH") == [os.SCHED_OTHER, 1]
