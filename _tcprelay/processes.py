"""Several processes for one role."""

from __future__ import annotations

import errno
import functools
import gc
import math
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .life import Orders, invite, serve
from .logs import log_writer
from .messages import decode_message, receive_message, send_message
from .role import Relay
from .signals import Signals, notify_systemd, reap, watchdog_seconds
from .status.asking import Asking
from .system import fork
from .text import say_error
from .threads import JOIN_TIMEOUT
from .waiting import Deadline


class WorkerProcess:
    """A worker as its parent sees it."""

    REST = 1.0
    """Seconds from one start to the next, where it dies at once each time."""

    def __init__(self, number: int) -> None:
        self.number = number
        """From 0; its successors have the same."""
        self.pid = 0
        """0 while there is none."""
        self.channel: socket.socket
        self.intake: socket.socket
        """Where connections are sent to it."""
        self.up = False
        self.born = self.signed = 0.0
        """When it was started, and when its keeper has last said that all its threads live."""
        self.orders: deque[bytes] = deque()
        """Signals that are still to be passed on, each a byte, and messages."""
        self.reloads = 0
        """Reloads that it has not done yet."""

    def order(self, message: bytes) -> bool:
        """Send it a signal's number or a message, unless it has died or its channel is full: False.  One that is too
        long for any channel is left out: what comes behind it must not wait for ever."""
        try:
            self.channel.send(message, socket.MSG_DONTWAIT)
            return True
        except OSError as error:
            return error.errno == errno.EMSGSIZE

    def send(self, message: bytes) -> None:
        """Send it a message that must not be lost, behind those that are to be sent."""
        self.orders.append(message)
        self.flush()

    def flush(self) -> bool:
        """Send what is to be sent; False where its channel is full."""
        while self.orders and self.order(self.orders[0]):
            self.orders.popleft()
        return not self.orders

    def hand(self, message: bytes, descriptor: int) -> bool:
        """Send it a connection, unless it has died or does not take them fast enough: False."""
        try:
            send_message(self.intake, message, [descriptor], socket.MSG_DONTWAIT)
            return True
        except OSError:
            return False


class Workers:
    """The parent of worker processes: starts them, replaces those that die, and passes on what signals ask for.

    Roles derive from it what their parent does besides.  Everything here runs in one thread, in `run`.
    """

    FIRST_PAUSE = 0.005

    def __init__(self, role: Relay[Any], count: int) -> None:
        self.role = role
        self.log = role.runtime.log
        self.emit = role.runtime.emit
        self.workers = [WorkerProcess(number) for number in range(count)]
        self.selector = selectors.DefaultSelector()
        """Its keys' data are what to call when they turn readable."""
        self._begun = False
        self._status = 0
        self._failed = 0
        """How many unexpected errors there were."""
        self._pause = self.FIRST_PAUSE
        """Seconds to wait after the next one."""
        self._kill: Deadline | None = None
        """When `run` ends: for workers that have not ended by themselves."""
        self._asking = Asking(count, role.survey, self._ask_all)
        role.desk.ask = self._asking.ask
        self._reloaded = ""
        """What is to be said when all workers have reloaded."""
        self._unreloaded = 0
        """How many of them could not."""
        self._watchdog = 0.0
        """Seconds after which who has not moved is ended, by the service manager or, of workers, here; 0 is never."""
        self._next_sign = 0.0
        self._signals: Signals

    def run(self, signals: Signals) -> int:
        """The life of the parent; returns the exit status.  Raises `OSError` where the role cannot begin."""
        self._signals, self._watchdog = signals, watchdog_seconds()
        self.role.prepare()
        signals.begin()  # without that, the process that started us may have made it impossible to wait for one
        self.selector.register(signals, selectors.EVENT_READ, lambda: self._obey(signals.wait()))
        self.open()
        if self.role.desk.is_open:
            self.role.desk.watch(self.selector)
        gc.collect()
        gc.freeze()  # what the collector does not touch stays shared memory
        while self._kill is None or any(worker.pid for worker in self.workers):
            failed = self._failed
            self._guard(self._turn)
            if self._failed == failed:
                self._pause = self.FIRST_PAUSE
            else:  # whatever it was, it may be so again
                time.sleep(self._pause)
                self._pause = min(2 * self._pause, 1.0)
        self.role.desk.close()
        self.selector.close()
        return self._status or signals.status

    def _turn(self) -> None:
        for key, _ in self.selector.select(self._look_at_time()):
            self._guard(key.data)

    def _guard(self, function: Callable[[], ResultT]) -> ResultT | None:
        """Keep an unexpected error in one matter from ending the others: nothing else looks after the workers."""
        try:
            return function()
        except Exception:
            self._failed += 1
            self.log.exception("unexpected error in the workers' parent")
            return None

    def open(self) -> None:
        """Begin, before the first worker is there."""

    def stop_intake(self) -> None:
        """Begin nothing new: the workers are about to be told to end."""

    def renewed(self) -> None:
        """The role has new options, which the workers are about to read, too."""

    def lost(self, worker: WorkerProcess) -> None:
        """A worker has died."""

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        """A message from a worker.  A descriptor that is taken is removed from the list; the others are closed."""

    def become(self, worker: WorkerProcess, intake: socket.socket) -> None:
        """In the new process: have the role be this worker, which is sent connections over `intake`."""

    def look_at_time(self) -> float:
        """Do what is due; returns the seconds until something else will be."""
        return 60.0

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """An event that is about the role as a whole has happened in a worker."""

    def _look_at_time(self) -> float:
        now, waits = time.monotonic(), [self._guard(look) for look in self._looks]
        wait = min(1.0 if wait is None else wait for wait in waits)
        if not self._send_orders():
            wait = min(wait, 0.05)
        if self._kill is not None:
            if self._kill.remaining() == 0:
                for worker in self.workers:
                    if worker.pid:
                        self.log.error("worker %d does not end, and is killed", worker.number)
                        os.kill(worker.pid, signal.SIGKILL)
                self._kill = Deadline(60.0)
            return min(wait, self._kill.remaining() or 0.0)
        for worker in self.workers:
            if not worker.pid:
                rest = worker.born + WorkerProcess.REST - now
                if rest > 0:
                    wait = min(wait, rest)
                else:
                    self._guard(functools.partial(self._fork, worker))
        return max(wait, 0.0)

    @property
    def _looks(self) -> list[Callable[[], float]]:
        return [self.look_at_time, self._look_at_status, self._look_at_watchdog]

    def _look_at_watchdog(self) -> float:
        """Tell the service manager that this process lives, and end workers that hang: others take their places, which
        costs their connections alone."""
        if not self._watchdog:
            return math.inf
        now = time.monotonic()
        if now >= self._next_sign:
            self._next_sign = now + self._watchdog / 4
            notify_systemd("WATCHDOG=1")
        for worker in self.workers:
            if worker.pid and worker.up and now - worker.signed > self._watchdog:
                self.log.error("worker %d has not moved for %g s, and is killed", worker.number, self._watchdog)
                worker.signed = now
                os.kill(worker.pid, signal.SIGKILL)
        return self._watchdog / 4

    def _look_at_status(self) -> float:
        desk = self.role.desk
        return min(self._asking.look(), desk.look() if desk.is_open else math.inf)

    def _ask_all(self, question: bytes) -> list[int]:
        """Ask all workers that there are; returns their numbers."""
        living = [worker for worker in self.workers if worker.pid]
        for worker in living:
            worker.order(question)  # one whose channel is full gives no answer
        return [worker.number for worker in living]

    def _obey(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
            return
        if number == signal.SIGHUP:
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            if said := self.role.renew():
                self._guard(self.renewed)
                self._reloaded = said
                for worker in self.workers:
                    worker.reloads += bool(worker.pid)
                self._order(signal.SIGHUP)
            self._note_reloads()
            return
        if self._kill is None:
            notify_systemd("STOPPING=1")
            self._end()
        else:
            self._kill.shorten(3 * JOIN_TIMEOUT)
        self._order(signal.SIGTERM)

    def _note_reloads(self) -> None:
        """Say that all is reloaded, when all workers have done it: what has lost its right there is gone by then."""
        if any(worker.reloads for worker in self.workers):
            return
        if self._unreloaded:
            self.log.error("%d workers could not reload, and go on as before: send SIGHUP again", self._unreloaded)
        elif self._reloaded:
            self.log.info("%s", self._reloaded)
        self._reloaded, self._unreloaded = "", 0
        if self._begun:
            notify_systemd("READY=1")

    def _end(self) -> None:
        self.role.runtime.is_ending = True
        self._kill = Deadline(self.role.options.drain_timeout + 3 * JOIN_TIMEOUT)
        self._guard(self.stop_intake)

    def _reap(self) -> None:
        reap([worker.pid for worker in self.workers])

    def _order(self, number: int) -> None:
        for worker in self.workers:
            if worker.pid:
                worker.orders.append(bytes([number]))
        self._send_orders()

    def _send_orders(self) -> bool:
        """Pass on what is to be passed on; False where one has to wait, because a worker's channel is full."""
        left = [worker for worker in self.workers if not worker.flush()]
        return not left

    def _fork(self, worker: WorkerProcess) -> None:
        worker.born, worker.up = time.monotonic(), False
        pairs: list[socket.socket] = []
        try:
            for _ in range(2):
                pairs += socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            for sock in pairs:
                sock.close()
            self.log.error("cannot start worker %d: %s", worker.number, say_error(error))
            return
        ours, theirs, our_end, intake = pairs
        signal.pthread_sigmask(signal.SIG_BLOCK, Signals.HANDLED)  # a signal is for one of the two processes
        try:
            pid = fork()
            if not pid:
                ours.close()
                our_end.close()
                self._live(worker, theirs, intake)
        except OSError as error:  # too many processes, say
            ours.close()
            our_end.close()
            self.log.error("cannot start worker %d: %s", worker.number, say_error(error))
            return
        finally:
            theirs.close()
            intake.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Signals.HANDLED)
        worker.pid, worker.channel, worker.intake = pid, ours, our_end
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._receive(worker))

    def _live(self, worker: WorkerProcess, channel: socket.socket, intake: socket.socket) -> NoReturn:
        """The life of the new process."""
        status = 1
        log_writer.forget()
        try:
            self._signals.leave_to_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Signals.HANDLED)
            os.environ.pop("NOTIFY_SOCKET", None)
            self.selector.close()
            for other in self.workers:
                if other.pid:
                    other.channel.close()
                    other.intake.close()
            self.role.desk.forget()
            self.role.choose_processor(worker.number)
            log_writer.begin()
            runtime = self.role.runtime
            runtime.become_worker(channel)
            if self._watchdog:
                runtime.pulse.have_signed(lambda: runtime.tell_parent({"alive": True}), self._watchdog / 4)
            self.become(worker, intake)
            self.role.start()
            self.role.runtime.tell_parent({"up": True})
            status = serve(self.role, Orders(self.role, channel))
        except (OSError, RuntimeError) as error:
            self.log.error("worker %d: %s", worker.number, say_error(error))
        except BaseException:
            self.log.exception("worker %d: unexpected error", worker.number)
        finally:
            log_writer.end()
            os._exit(status)

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            message, descriptors = receive_message(worker.channel, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return  # the latter once, where it died before it had read all; what it has said is still to be heard
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._bury(worker)
            return
        try:
            self._hear(worker, message, descriptors)
        finally:
            for number in descriptors:  # what is left was not taken
                os.close(number)

    def _hear(self, worker: WorkerProcess, message: bytes, descriptors: list[int]) -> None:
        fields, payload = decode_message(message)
        if "alive" in fields:
            worker.signed = time.monotonic()
        elif "up" in fields:
            worker.up, worker.signed = True, time.monotonic()
            if not self._begun and self._kill is None and all(other.up for other in self.workers):
                self._begun = True
                invite(self.role)
                notify_systemd("READY=1")
        elif "reloaded" in fields:
            worker.reloads -= 1
            self._unreloaded += not fields["reloaded"]
            self._note_reloads()
        elif "status" in fields:
            self._asking.hear(worker.number, fields, payload)
        elif "event" in fields:
            self.tell(fields["event"], fields["fields"], worker)
        else:
            self.hear(worker, fields, payload, descriptors)

    def _bury(self, worker: WorkerProcess) -> None:
        self.selector.unregister(worker.channel)
        worker.channel.close()
        worker.intake.close()
        try:
            _, status = os.waitpid(worker.pid, 0)
        except ChildProcessError:  # it was collected elsewhere; its number may be another process's by now
            status = 0
        pid, worker.pid, was_up, worker.up = worker.pid, 0, worker.up, False
        worker.orders.clear()
        self._guard(functools.partial(self._asking.lose, worker.number))
        if worker.reloads:
            worker.reloads = 0
            self._note_reloads()
        self._reap()  # what it may have stood before
        self._guard(functools.partial(self.lost, worker))
        if self._kill is not None:
            return
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        if not (was_up or self._begun):
            self.log.error("worker %d (process %d) has ended %s before it could serve", worker.number, pid, how)
            self._status = 1
            self._obey(signal.SIGTERM)
        else:
            self.log.error("worker %d (process %d) has ended %s, with its connections; another takes its place",
                           worker.number, pid, how)  # fmt: skip


ResultT = TypeVar("ResultT")
