"""Signals as bytes on a socket, children, and the service manager."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Collection

from .text import say_error


class Signals:
    """SIGINT, SIGTERM and SIGHUP, and later SIGCHLD, as bytes on a socket: the handlers themselves do nothing.

    SIGHUP says two things.  Where the terminal that this process was started from has gone, it says so, and is an end;
    from ``kill`` or a service manager it asks for a reload.  Under ``nohup``, which ignores it, it never is an end.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    status = 0
    """What the process is to end with."""
    _ends = False
    """The end has been asked for."""

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and not is_terminal_gone()
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `begin`: there is nothing to reload yet
        return self

    def fileno(self) -> int:
        return self._reader.fileno()

    def leave_to_parent(self) -> None:
        """In a worker: a Ctrl-C or a service manager may reach all processes; the parent passes on what counts."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self.HANDLED:
            signal.signal(number, signal.SIG_IGN)
        self._reader.close()
        self._writer.close()

    def wait(self) -> int:
        """Wait for a signal: SIGINT or SIGTERM to end, SIGHUP to reload, SIGCHLD; 0 when `done` was called first."""
        while True:
            number = self._reader.recv(1)[0]
            if number == signal.SIGHUP and self._ends_with_terminal and is_terminal_gone():
                self._ends_with_terminal = False  # it may be told twice, by the kernel and by a shell
                return signal.SIGTERM
            if number in (signal.SIGTERM, signal.SIGINT):
                self._ends = True
            if number in (*self.HANDLED, signal.SIGCHLD, 0):
                return number

    def begin(self) -> None:
        """Tell of SIGHUP and of children that have ended, too: until serving begins any signal is an end."""
        signal.signal(signal.SIGHUP, lambda *_: None)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        self._writer.send(bytes([signal.SIGCHLD]))  # some may have ended before
        if self._ends_with_terminal and is_terminal_gone():
            self._writer.send(bytes([signal.SIGHUP]))

    def give_up(self, status: int) -> None:
        """End as at SIGTERM, with this status, unless the end has begun; any thread.  (A further SIGTERM would not let
        connections finish.)"""
        if self._ends or self.status:
            return
        self.status = status
        self._writer.send(bytes([signal.SIGTERM]))

    def done(self) -> None:
        self._writer.send(b"\0")

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def is_terminal_gone() -> bool:
    """Whether this process has no controlling terminal: none from the start, or not any more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno in (errno.ENXIO, errno.EIO, errno.ENOENT)
    return False


def reap(own: Collection[int] = ()) -> None:
    """Collect the children that have ended, but for `own`, which are waited for elsewhere.

    Process 1 of a container inherits orphans; another process, what the shell that it replaced had started.
    """
    if not hasattr(os, "waitid"):
        return  # on macOS, where this is never process 1
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
            os.waitpid(ended.si_pid, 0)


def watchdog_seconds() -> float:
    """How often the service manager wants to hear from this process, at least (sd_watchdog_enabled(3)); 0 is never."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdigit() and pid == str(os.getpid()) and "NOTIFY_SOCKET" in os.environ else 0.0


def notify_systemd(state: str) -> None:
    """Tell the service manager, if one started us (sd_notify(3)); no news to it is no reason to fail."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        logging.getLogger("tcprelay").warning("cannot notify systemd: %s", say_error(error))
