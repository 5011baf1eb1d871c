"""Sleep again and again, and note how late each sleep ends; for each line of input tell of the worst of the last
minute, as a JSON list of pairs: seconds late, seconds ago.  Ends with its input."""

from __future__ import annotations

import json
import os
import select
import signal
import time

SLEEP, KEPT, TOLD = 0.05, 60.0, 3


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it, or has ended
    late: list[tuple[float, float]] = []
    now = time.monotonic()
    while True:
        due = now + SLEEP  # so what holds it up between two sleeps counts as well
        asked, _, _ = select.select([0], [], [], SLEEP)
        now = time.monotonic()
        if asked and not os.read(0, 100):
            return
        late = [one for one in late if now - one[1] < KEPT]
        if now - due > 0.01:
            late.append((now - due, now))
        if asked:
            worst = sorted(late, reverse=True)[:TOLD]
            print(json.dumps([(seconds, now - since) for seconds, since in worst]), flush=True)


if __name__ == "__main__":
    main()
