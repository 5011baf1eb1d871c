"""Waiting for a descriptor, with a deadline, and cut short by a stop."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Protocol


class Deadline:
    """A moment by which several steps together must be done; ``None`` seconds is never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, 0 when it has passed, ``None`` when there is no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """A deadline of its own for one step: so many seconds from now, and no later than this one."""
        left = self.remaining()
        return Deadline(seconds if left is None else min(seconds, left))

    def shorten(self, seconds: float) -> None:
        """Let it be no later than `seconds` from now."""
        end = time.monotonic() + seconds
        self._end = end if self._end is None else min(self._end, end)


class Wakes(Protocol):
    """What cuts a wait short: a `Stop`, or in a command its signals."""

    def fileno(self) -> int:
        """The descriptor that turns readable."""


class Stop:
    """A flag that threads can wait for in ``poll``: its descriptor turns readable once, for all, and stays so, unless
    it is taken back."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(True)  # whatever default a program has set
        self._writer.setblocking(True)
        self.requested = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def request(self) -> None:
        """Set the flag and wake all that wait for it; any thread, any number of times."""
        self.requested = True
        self._writer.send(b"\0", socket.MSG_DONTWAIT)

    def take_back(self) -> None:
        """Let threads wait again.  Who has not heard of the request by now never does; a caller sees to it that nobody
        requests at the same time."""
        self.requested = False
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096, socket.MSG_DONTWAIT):
                pass

    def wait(self, seconds: float) -> None:
        """Wait for the request, up to `seconds`."""
        try:
            wait_for(self.fileno(), select.POLLIN, Deadline(seconds))
        except TimeoutError:
            pass

    def close(self) -> None:
        """Give the descriptors back, when no thread waits any more."""
        self._reader.close()
        self._writer.close()


class Bell:
    """What wakes a thread that waits in a selector, any number of times."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def ring(self) -> None:
        """Wake it, once at least; any thread."""
        with contextlib.suppress(OSError):  # it is ringing all the while, or nobody waits any more
            self._writer.send(b"\0")

    def hush(self) -> None:
        """Note that it has been heard."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class Stopping(ConnectionError):
    """A wait was cut short because this role is ending."""


def wait_for(fd: int, events: int, deadline: Deadline, stop: Wakes | None = None) -> None:
    """Block until `fd` has one of the poll `events` (or an error, or its end).

    Raises `TimeoutError` at the deadline and `Stopping` when `stop` is requested (or a signal comes) first.
    """
    poller = select.poll()
    poller.register(fd, events)
    if stop is not None:
        poller.register(stop.fileno(), select.POLLIN)
    left = deadline.remaining()
    # A peer that always has one more byte does not get beyond the deadline either.
    if left == 0 or not (ready := poller.poll(None if left is None else left * 1000)):
        raise TimeoutError("timed out")
    if all(number != fd for number, _ in ready):
        raise Stopping("ending")
