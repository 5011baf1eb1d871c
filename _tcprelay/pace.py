"""How fast one direction of a connection may be: an allowance of bytes that grows with the time.

It is a token bucket, kept as one moment: that at which the bucket was empty, or would have been.  What has been carried
moves that moment on, by as long as it takes at the rate; an idle direction lets it fall behind, but by no more than
fills the bucket.  Where the moment lies ahead, as after an opening exchange that was larger than the bucket, the
difference is waited for.

Nobody else waits while a pump rests, and it holds nothing then: the bytes stay in the kernel, and TCP tells the sender.
"""

from __future__ import annotations

import time
from typing import Protocol

from .waiting import Deadline

BURST_TIME = 0.05
"""Seconds at the rate that may pass at once, after a pause: as late as a pump may wake up without losing any of it."""
LEAST_BURST = 1460
"""Bytes that may pass at once however low the rate: what a packet holds on Ethernet, 1,500 less two headers of 20."""
ATTENTION = 0.05
"""Seconds after which a pump that rests looks whether it is to stop: nothing wakes it, since it blocks in no call of a
socket."""


class Paced(Protocol):
    """What a pace knows of a `Flow`."""

    carried: int
    halted: bool


class Pace:
    """The allowance of one direction of a connection; used by the thread that works on it."""

    def __init__(self, rate: int) -> None:
        """So many bytes a second; the bucket is full."""
        self.rate = rate
        self.burst = max(LEAST_BURST, int(rate * BURST_TIME))
        """Bytes that the bucket holds."""
        self.resting = False
        """Its thread waits for the bucket, and for nothing else; others may read this."""
        self._filling = self.burst / rate
        """Seconds in which it fills up."""
        self._empty = time.monotonic() - self._filling
        self._seen = 0
        """So many carried bytes have been taken out of the bucket."""

    def wait(self, flow: Paced) -> int:
        """How many bytes may be taken next, now that the flow has carried what it has; 0 where it is halted.

        Rests once less than a quarter of the bucket is left, until there is half: with each drop that falls into it
        pieces would be tiny, and with a full one what falls into it while its thread is late would be lost.
        """
        filling = self._filling
        self._empty = max(self._empty, time.monotonic() - filling) + (flow.carried - self._seen) / self.rate
        self._seen = flow.carried
        if (level := time.monotonic() - self._empty) < filling / 4:
            pause = Deadline(filling / 2 - level)
            self.resting = True
            while not flow.halted and (left := pause.remaining()):
                time.sleep(min(left, ATTENTION))
            self.resting = False
            level = time.monotonic() - self._empty
        return 0 if flow.halted else max(1, int(min(level, filling) * self.rate))
