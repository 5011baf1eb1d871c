"""A cache of parked threads."""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable
from typing import Any

from .waiting import Deadline

JOIN_TIMEOUT = 5.0
"""Seconds that threads have to leave after their sockets were woken."""


class Threads:
    """Runs functions in threads, and parks each thread for the next one: starting one for every connection
    would halve the connection rate.

    The thread that was parked last is used first, so that those a burst has left behind can go.  These are
    plain threads, not `threading.Thread` objects: those cost 2.6 KiB more each (measured), and `Thread.start`
    waits for the new thread, which may never come where memory is short.
    """

    PARKED = 2.0
    """Seconds that a thread waits for a function before it goes."""
    LOOK, LOOKS = 0.1, 12
    """Seconds of a look at the threads that are left at the end, and how many such looks: more than `Stream.linger`
    takes.  A process that was stopped meanwhile has slept through one of them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()  # over the three below
        self._parked: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._workers)

    def start(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function` in a thread.  Raises `RuntimeError` where none can be had."""
        with self._condition:
            if self._ended:
                raise RuntimeError("ending")
            worker = self._parked.pop() if self._parked else None
            if worker is None:
                worker = _Worker(self)
                self._workers.add(worker)
                fresh = True
            else:
                fresh = False
            worker.task = (function, args)
        if not fresh:
            worker.wake.release()
            return
        try:
            with _stack_size_lock:
                before = threading.stack_size(STACK_SIZE)
                try:
                    _thread.start_new_thread(worker.run, ())
                finally:
                    threading.stack_size(before)
        except (RuntimeError, MemoryError) as error:
            self.leave(worker)
            raise RuntimeError("cannot start a thread") from error

    def park(self, worker: _Worker) -> bool:
        """Keep a thread that has done its work; False where it is to go."""
        with self._condition:
            if not self._ended:
                self._parked.append(worker)
            return not self._ended

    def unpark(self, worker: _Worker) -> bool:
        """Let a parked thread go; False where it has just been given a function."""
        with self._condition:
            if worker not in self._parked:
                return False
            self._parked.remove(worker)
            return True

    def is_mine(self) -> bool:
        """Whether the caller runs in one of these threads."""
        me = threading.get_ident()
        with self._condition:
            return any(worker.ident == me for worker in self._workers)

    def leave(self, worker: _Worker) -> None:
        with self._condition:
            self._workers.discard(worker)
            self._condition.notify_all()

    def end(self, deadline: Deadline) -> list[str]:
        """Start nothing more, wait for all threads but the caller's own, and name those that did not leave.

        It does not wait for the deadline where `LOOKS` times in a row no thread has left: one in a look-up of a name,
        say, cannot be woken.
        """
        with self._condition:
            self._ended = True
            parked, self._parked = self._parked, []
        for worker in parked:
            worker.wake.release()
        me = threading.get_ident()

        def others() -> list[_Worker]:
            return [worker for worker in self._workers if worker.ident != me]

        looks = 0
        with self._condition:
            while others() and looks < self.LOOKS and deadline.remaining() != 0:
                looks = 0 if self._condition.wait(self.LOOK) else looks + 1
            tasks = [worker.task for worker in others()]  # a task is taken away without the lock
            return [task[0].__name__ for task in tasks if task]


STACK_SIZE = 256 * 1024


_stack_size_lock = threading.Lock()  # the size is one for the whole process


class _Worker:
    """One thread of `Threads`: what it runs, and the lock it waits for while it is parked."""

    __slots__ = ("ident", "owner", "task", "wake")

    def __init__(self, owner: Threads) -> None:
        self.owner = owner
        self.wake = threading.Lock()
        self.wake.acquire()
        self.task: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self.ident = 0

    def run(self) -> None:
        self.ident = threading.get_ident()
        try:
            while self.task is not None:
                function, args = self.task
                try:
                    function(*args)
                except Exception:
                    logging.getLogger("tcprelay").exception("unexpected error in %s", function.__name__)
                self.task = function = args = None  # type: ignore[assignment]
                if not self.owner.park(self):
                    return
                if not self.wake.acquire(timeout=Threads.PARKED) and not self.owner.unpark(self):
                    self.wake.acquire()
        finally:
            self.owner.leave(self)


def join(thread: threading.Thread, timeout: float) -> None:
    """Wait for a thread's end, unless it has not begun, or is this one."""
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(timeout)
