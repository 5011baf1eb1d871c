"""Nonces that are handed out ahead, so that a relay client can prove itself with its first frame.

A handshake with CHALLENGE takes one more round trip, which a service client waits for when no link is idle.  So WELCOME
and PING bring nonces for the links to come, each of them good once, for `LIFETIME` seconds, and for one relay client at
one address.

The address matters where links are plain.  CHALLENGE's nonce belongs to one connection; with one of these, whoever
listens could send a copy of HELLO and be there before it.  From that very address only those can who share it, and they
could as well put their bytes into the plain connection itself.

Nothing is kept of one that is handed out: it has its time in it, and a code over all of it by which it is known again.
Kept is which were used, in memory that worker processes share, where each has a table of its own: it marks a nonce in
that first, and then looks into the others'.  Of two that have the same one at the same time at most one takes it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time

from ..protocol import is_same
from ..system import hashlib, hmac


class Nonces:
    """Hands nonces out, and takes each back once."""

    LIFETIME = 60
    """Seconds."""
    SLOTS = 1 << 14
    """So many used ones a process can keep; where two need the same place the later one is refused, which costs its
    link that round trip."""

    def __init__(self, processes: int = 1) -> None:
        """For so many worker processes; made before they are forked."""
        self._secret = os.urandom(32)
        self._processes = processes
        self._used = memoryview(mmap.mmap(-1, 8 * processes * self.SLOTS)).cast("Q")  # untouched it takes no memory
        self._lock = threading.Lock()  # over this process's table, and a barrier between writing it and reading others'
        self.process = 0
        """Which of the processes this is."""

    def hand_out(self, client: str, host: str, count: int) -> list[str]:
        """So many new ones for the relay client of that id, at that host."""
        return [self._seal(f"{int(time.monotonic()):08x}{os.urandom(8).hex()}", client, host) for _ in range(count)]

    def take(self, nonce: str, client: str, host: str) -> bool:
        """Whether that is one of them, handed out to this relay client a short time ago, and was not taken before."""
        body = nonce[:24]
        sealed = self._seal(body, client, host)
        if len(nonce) != len(sealed) or not is_same(nonce.encode(errors="replace"), sealed.encode(errors="replace")):
            return False
        now, made = int(time.monotonic()), int(body[:8], 16)
        if now - made > self.LIFETIME:
            return False
        slot, mark = int(body[8:16], 16) % self.SLOTS, made << 32 | int(body[16:], 16)
        with self._lock:
            place = self.process * self.SLOTS + slot
            if self._used[place] and now - (self._used[place] >> 32) <= self.LIFETIME:
                return False
            self._used[place] = mark
        with self._lock:
            others = [self._used[one * self.SLOTS + slot] for one in range(self._processes) if one != self.process]
        # What another process used at the last moment may be gone from its table by now; but then it is too late.
        return mark not in others and int(time.monotonic()) - made <= self.LIFETIME

    def _seal(self, body: str, client: str, host: str) -> str:
        """A nonce's body with its code behind it: HMAC-SHA256 (RFC 2104), of which 128 bits are enough."""
        message = f"{body} {host} {client}".encode(errors="replace")
        return body + hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:32]
