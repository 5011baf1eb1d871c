"""What systems and Pythons differ in, how this process uses the machine, and modules that are imported when used."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import fcntl as fcntl
    import termios as termios
except ImportError:  # not a Unix: then nothing here asks for them
    fcntl = termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import hashlib as hashlib
    import hmac as hmac
    import ssl as ssl
    import subprocess as subprocess
    import tempfile as tempfile
else:

    class Lazy:
        """A module that is imported when it is used: these five take 6 MiB (measured), which a small host that
        relays without token and TLS need not spend."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)
            return value

    hashlib, hmac, ssl = Lazy("hashlib"), Lazy("hmac"), Lazy("ssl")
    subprocess, tempfile = Lazy("subprocess"), Lazy("tempfile")


LINUX = sys.platform == "linux"


def ignore_oserror(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except OSError:
        pass


def random_fraction() -> float:
    """A random number from 0 to 1.  (The module random would cost 1 MiB.)"""
    return int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF


SWITCH_INTERVAL = 1.0
"""Seconds for which a thread may keep the interpreter lock (`sys.setswitchinterval`).  Ours give it up at every system
call; but each of those that wait for it wakes so often to ask for it, and 3,000 of them get nothing else done
(measured: an echo on 3,000 connections at once took 3.0 s at Python's 5 ms, and 0.42 s at 100 ms; the end of 5,000
sometimes took minutes even so, and seconds at 1 s)."""


def has_interpreter_lock() -> bool:
    """False in free-threaded builds of Python, where one process can use all processors."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def choose_processor(number: int) -> None:
    """Have all threads of this process run on one processor, the `number`-th of those that it may use, one after
    another.

    Only one of them can run Python at a time, and waking the next one on another processor costs more than what it
    then does (measured on two processors: 1,750 new connections a second, and 4,200 this way; 13,000 and 28,000
    requests over 64 connections).  Nor does one that wakes up take the processor from the one that runs (SCHED_BATCH):
    that would have the interpreter lock, for which one after another would wait (measured over 512 connections: 7,900
    requests a second, and 15,700 this way).  For the commands; a program that embeds a relay has threads of its own.
    """
    if hasattr(os, "sched_setaffinity") and has_interpreter_lock():
        processors = sorted(os.sched_getaffinity(0))
        _home.processors = {processors[number % len(processors)]}
        _home.all = set(processors)
        ignore_oserror(os.sched_setaffinity, 0, _home.processors)
        if hasattr(os, "SCHED_BATCH"):
            ignore_oserror(_take_turns)


def _take_turns() -> None:
    """Have this thread, and those that it starts, not preempt others, unless somebody has chosen another policy.
    Raises `OSError`, always where the C library is musl, as in Alpine."""
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def roam() -> None:
    """Let this thread run on any processor: it carries bulk traffic, which does not need the interpreter."""
    if _home.processors and not getattr(_roaming, "now", False):
        _roaming.now = True
        ignore_oserror(os.sched_setaffinity, 0, _home.all)


def go_home() -> None:
    """Have this thread run with the others again."""
    if getattr(_roaming, "now", False):
        _roaming.now = False
        ignore_oserror(os.sched_setaffinity, 0, _home.processors)


class _Home:
    processors: set[int] = set()
    """The one where the threads of this process run; none where they may run on all."""
    all: set[int] = set()


_home = _Home()


_roaming = threading.local()


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open descriptors to the hard one, as servers do: a connection needs several."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):
        pass


def from_descriptor_limit() -> int:
    """How many connections the limit on open descriptors allows: each may need two sockets and a pipe."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        limit = 1024
    return 100_000 if limit < 0 or limit > 400_000 else max(16, (limit - 64) // 4)


MOST_WORKERS = 4
"""Workers by default, where there are twice as many processors: the others are for the kernel, and for services."""


def default_workers() -> int:
    """One for every two processors that this process may use, up to `MOST_WORKERS`; none where that is one, or where
    Python has no interpreter lock.

    Measured on two processors that both roles, the load and the service shared: two workers carried twice as many
    requests over 512 connections, but a third fewer new connections, and as many requests over 64.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(processors // 2, MOST_WORKERS)
    return count if count > 1 and has_interpreter_lock() else 0


def can_fork_workers() -> bool:
    """Whether this system has processes that fork and can pass descriptors to each other in whole messages."""
    return sys.platform != "darwin" and all(
        hasattr(module, name) for module, name in ((os, "fork"), (socket, "SCM_RIGHTS"), (socket, "SOCK_SEQPACKET"))
    )


def fork() -> int:
    """`os.fork`, without Python's warning of other threads (3.12 and later): there is the log's alone, and whenever the
    parent's first thread runs Python, that one waits: for a line, or in a write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
