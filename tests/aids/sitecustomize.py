"""What Python runs at its start where this directory is on PYTHONPATH, as it is for the relays that the tests start:
at SIGUSR1 the process, and each that it forks, writes the stacks of all its threads to the file in TEST_STACKS."""

import contextlib
import faulthandler
import os
import signal

if path := os.environ.get("TEST_STACKS"):
    with contextlib.suppress(OSError):  # then nobody can ask
        # A bare descriptor: a file object would be told of when Python ends, as one that was not closed.
        faulthandler.register(signal.SIGUSR1, os.open(path, os.O_WRONLY | os.O_APPEND), all_threads=True)
