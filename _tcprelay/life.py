"""The life of a role in a process: from its start, by what signals or its parent ask for, to the exit status."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from typing import Any

from .logs import log_writer
from .messages import MESSAGE_SIZE, decode_message
from .role import Relay
from .signals import Signals, notify_systemd, reap, watchdog_seconds
from .status.asking import answers


def serve(role: Relay[Any], signals: Signals | Orders) -> int:
    """The life of a role in this process, from its start to the exit status."""
    if (every := watchdog_seconds()) and not role.runtime.is_worker:
        role.runtime.pulse.have_signed(lambda: notify_systemd("WATCHDOG=1"), every / 4)
    stragglers: list[str] = []
    ending = threading.Event()

    def end() -> None:
        ending.wait()
        try:
            stragglers.extend(role.end())
        finally:
            signals.done()

    ender = threading.Thread(target=end, name="end", daemon=True)
    ender.start()  # while there are threads to be had
    notify_systemd("READY=1")
    while (number := signals.wait()) in (signal.SIGHUP, signal.SIGCHLD):
        if number == signal.SIGHUP:
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            role.reload()
            notify_systemd("READY=1")
        else:
            reap()
    notify_systemd("STOPPING=1")
    ending.set()
    while number := signals.wait():
        if number == signal.SIGCHLD:
            reap()
        elif number != signal.SIGHUP:  # a further SIGTERM or SIGINT: at once
            role.end(0.0)
    ender.join()
    if stragglers:
        log_writer.end()
        os._exit(signals.status)  # their stacks may hold locks that the interpreter's own end would wait for
    return signals.status


def invite(role: Relay[Any]) -> None:
    """Say what the other side is to do, with secrets on a terminal only."""
    if not (invitation := role.invitation(with_secrets=os.isatty(2))):
        return
    if role.options.log_format == "json":
        role.runtime.log.info("%s", " ".join(invitation.split()))
    else:
        log_writer.put(f"{invitation}\n")


class Orders:
    """What a worker hears from its parent: signals that are passed on, and orders for the role."""

    status = 0

    def __init__(self, role: Relay[Any], channel: socket.socket) -> None:
        self._role = role
        self._channel = channel
        self._over = False

    def wait(self) -> int:
        """Wait for a signal; 0 when `done` was called first."""
        while True:
            try:
                message = self._channel.recv(MESSAGE_SIZE)
            except ConnectionResetError:  # the parent was killed before it had heard all
                message = b""
            if self._over:
                return 0
            if not message:
                log_writer.end()
                os._exit(1)  # the parent was killed: what is open is reset, as if it had been this process
            if len(message) == 1:
                return message[0]
            try:
                order, _ = decode_message(message)
                if "status" in order:
                    self._tell_status(order)
                else:
                    self._role.obey(order)
            except Exception:
                logging.getLogger("tcprelay").exception("unexpected error in what the parent asks for")

    def _tell_status(self, question: dict[str, Any]) -> None:
        for message in answers(question["status"], self._role.survey(question["last"])):
            self._role.runtime.send_to_parent(message)

    def done(self) -> None:
        self._over = True
        self._channel.shutdown(socket.SHUT_RD)
