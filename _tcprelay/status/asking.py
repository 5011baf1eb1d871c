"""The status of a role with workers: its parent asks each of them, and puts together what it hears.

    parent to worker    "status": n, "last": …      asks, with the moment with which the histories are to end
    worker to parent    "status": n, "more": …      a piece of the answer, which is a status in JSON behind it

A worker that hangs or dies does not hold up the others: what has not been answered in `PATIENCE` is left out, and the
status says so.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ..messages import MESSAGE_ROOM, MESSAGE_SIZE, encode_message
from .report import Status, as_dict, counted, from_dict, merge
from .survey import concluded, last_slot

PATIENCE = 1.0
"""Seconds that the workers have to answer."""
PIECE = MESSAGE_SIZE - MESSAGE_ROOM
"""Bytes of an answer in one message."""


class Asking:
    """Asks workers for their status, for one question at a time.

    Parameters: how many there should be; what makes the parent's own status, with the last moment of its histories; and
    what sends a message to all workers that there are, and returns their numbers.
    """

    def __init__(self, count: int, own: Callable[[int], Status], send: Callable[[bytes], Iterable[int]]) -> None:
        self._count = count
        self._own = own
        self._send = send
        self._number = 0
        self._callback: Callable[[Status], None] | None = None
        self._until = math.inf
        self._last = 0
        self._pieces: dict[int, bytearray] = {}
        """What has come from each worker that has not answered in full."""
        self._answers: dict[int, Status] = {}
        self._known: dict[int, Status] = {}
        """The last answer of each."""
        self._gone = Status()
        """What those have counted that have died, as far as it was known."""

    def ask(self, callback: Callable[[Status], None]) -> None:
        """Have the status of the whole role made, and `callback` called with it."""
        self._number += 1
        self._callback, self._until, self._last = callback, time.monotonic() + PATIENCE, last_slot()
        living = self._send(encode_message({"status": self._number, "last": self._last}))
        self._pieces, self._answers = {number: bytearray() for number in living}, {}
        if not self._pieces:
            self._conclude()

    def hear(self, worker: int, message: dict[str, Any], payload: bytes) -> None:
        """A piece of an answer has come."""
        if message["status"] != self._number or worker not in self._pieces:
            return  # it comes too late, or from the successor of one that was asked
        self._pieces[worker] += payload
        if not message["more"]:
            self._answers[worker] = from_dict(json.loads(self._pieces.pop(worker)))
            if not self._pieces:
                self._conclude()

    def lose(self, worker: int) -> None:
        """A worker has died."""
        old = self._known.pop(worker, None)
        if (known := self._answers.pop(worker, old)) is not None:
            left = counted(known)
            services = tuple(replace(service, failures_hour=0) for service in left.services)  # an hour passes
            self._gone = merge(self._gone, replace(left, services=services))
        if self._pieces.pop(worker, None) is not None and not self._pieces:
            self._conclude()

    def look(self) -> float:
        """Conclude what has waited long enough; returns the seconds until that is due."""
        if self._callback is None:
            return math.inf
        if (left := self._until - time.monotonic()) <= 0:
            self._conclude()
            return math.inf
        return left

    def _conclude(self) -> None:
        callback, self._callback = self._callback, None
        missing = tuple(number for number in range(self._count) if number not in self._answers)
        status = merge(self._own(self._last), Status(workers=self._count, missing=missing))
        self._known |= self._answers
        silent = [counted(self._known[number]) for number in missing if number in self._known]
        for part in (*self._answers.values(), self._gone, *silent):
            status = merge(status, part)
        self._pieces, self._answers = {}, {}
        if callback is not None:
            callback(concluded(status))


def answers(number: int, status: Status) -> list[bytes]:
    """In a worker: the messages that answer a question."""
    whole = json.dumps(as_dict(status)).encode()
    pieces = [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]
    return [encode_message({"status": number, "more": at + 1 < len(pieces)}, piece) for at, piece in enumerate(pieces)]
