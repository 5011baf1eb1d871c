"""How a command begins and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .command_line import Given, parse_options, read_options
from .logs import fail, log_writer, set_up_logging
from .options import OptionsT
from .life import invite, serve
from .role import Relay
from .signals import Signals
from .system import SWITCH_INTERVAL, can_fork_workers, default_workers, raise_descriptor_limit
from .state import NothingKept, looking_only
from .text import say_error
from .waiting import Stopping


def run_command(
    prog: str, usage: str, cls: type[OptionsT], make: Callable[[OptionsT], Relay[Any]], argv: Sequence[str] | None,
    add_client: Callable[[OptionsT, str], str] | None = None,
) -> int:  # fmt: skip
    """The life of a command: options, log, start, signals, end.  Returns its exit status."""
    open_standard_files()
    given = parse_options(prog, usage, cls, argv)
    set_up_logging(given.options.log_level, given.options.log_format)
    log = logging.getLogger("tcprelay")
    for remark in given.remarks:
        log.warning("%s", remark)
    try:
        if add_client is not None and given.newcomer:
            print(add_client(given.options, given.newcomer))
            return 0
        return _run_role(given, make, lambda: read_options(prog, usage, cls, argv).options, log)
    except Stopping:
        return 0  # a signal came before anything was served
    except OSError as error:
        name = f"{error.filename}: " if isinstance(error.filename, str) else ""
        fail(prog, 1, f"{name}{say_error(error)}")
    except ValueError as error:
        fail(prog, 2, str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a further Ctrl-C, now that all is over
            log_writer.end()


def _run_role(
    given: Given[OptionsT], make: Callable[[OptionsT], Relay[Any]], reread: Callable[[], OptionsT], log: logging.Logger
) -> int:
    """The same with options and log; raises `OSError`, `ValueError`, and `Stopping` where it is ended as it starts."""
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_INTERVAL)
    if given.check:
        note = _look(given, make)
        print(given.report(), *([note] if note else []), sep="\n")
        return 0
    options, role = given.options, make(given.options)
    role.runtime.emit.log = log_writer.tell
    role.reread = reread
    if summary := given.summary():
        log.info("the configuration is from %s", summary)
    count = default_workers() if options.workers is None else options.workers
    with Signals() as role.signals:
        signals = role.signals
        if count and can_fork_workers() and (workers := role.make_workers(count)) is not None:
            log_writer.begin()
            status = workers.run(signals)
            log.info("ended")
            return status
        role.choose_processor(0)
        log_writer.begin()  # behind that line, for it stays where it is started
        role.start()
        invite(role)
        signals.begin()
        status = serve(role, signals)
        log.info("ended")
        return status


def _look(given: Given[OptionsT], make: Callable[[OptionsT], Relay[Any]]) -> str:
    """Check what the options name, and make nothing.  Returns what is to be known besides; raises as `make` does."""
    try:
        with looking_only():
            return make(given.options).invitation(with_secrets=False)
    except NothingKept as error:
        return f"{error.filename}: {say_error(error)}"


def open_standard_files() -> None:
    """Open what of descriptors 0 to 2 is closed at the start: else connections would get these numbers,
    and what is said on standard error would go to one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the first free number
