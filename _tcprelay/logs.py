"""The log of the commands: a handler that never waits for its reader."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import errno
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from typing import IO, Any, NoReturn

from .events import Event
from .waiting import Deadline, wait_for


class LogWriter(logging.Handler):
    """Writes the log to standard error in a thread of its own, the only one that ever waits for its reader.

    Everybody else leaves a record or an event here, in about a microsecond, and goes on: it is made into a line in that
    thread.  Where `MOST` of them wait, further ones are dropped and counted, and the count is told when lines can be
    written again.
    """

    MOST = 8192
    """Records that wait: some 8 MiB (measured: 0.5 to 1 KiB each), the lines of a busy relay for two seconds."""
    GATHERING = 0.01
    """Seconds after a write in which lines gather for the next one: else each would wake this thread, and take the
    interpreter from those that serve connections (measured: without a log 3,400 to 3,600 of them a second, and 2,600 to
    2,800 with one that woke for each line)."""
    PIECE = 4096
    """Bytes that are written at once: so many a pipe takes whole, even if others write to it."""
    LAST_LINES = 1.0
    """Seconds that the last lines have to be written when a process ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: IO[str] | None = None
        """Where to write; ``None`` is standard error, whatever that is at the moment."""
        self._torn = False
        """A line could be written in part only."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no thread and nothing to write; also in a process that has just been forked."""
        self._queue: queue.SimpleQueue[Item | threading.Event] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._begun = False
        self._lock = threading.Lock()  # over the next
        self._dropped = 0

    def begin(self) -> None:
        """Start to write; what came before has waited.  Raises `OSError` where no thread can be had."""
        if self._begun:
            return
        try:
            _thread.start_new_thread(self._write_all, ())
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "cannot start a thread for the log") from error
        self._begun = True

    def end(self) -> None:
        """Have everything written and the thread leave, or do without both after `LAST_LINES` seconds."""
        written = threading.Event()
        self._queue.put(written)
        self._ending.set()
        with contextlib.suppress(OSError):
            self.begin()
            written.wait(self.LAST_LINES)
        self.forget()

    def handle(self, record: logging.LogRecord) -> Any:
        if record.exc_info:  # as text: it keeps alive whatever its functions had in hand, sockets too
            record.exc_text = (self.formatter or TextFormatter()).formatException(record.exc_info)
            record.exc_info = None
        self.put(record)
        return True

    def tell(self, logger: str, event: Event) -> None:
        """Have a line about an event written, in the name of that logger."""
        self.put((time.time(), logger, event))

    def put(self, line: Item) -> None:
        """Have a record, an event, or lines that are neither, written some time."""
        if self._queue.qsize() < self.MOST:
            self._queue.put(line)
        else:
            with self._lock:
                self._dropped += 1

    def _write_all(self) -> None:
        """The thread's life: what has gathered meanwhile is written in one call, as far as a piece goes."""
        lines, ending, piece, count, written = self._queue, self._ending, b"", 0, None
        while written is None:
            item = lines.get()
            if isinstance(item, threading.Event):
                written = item
            else:
                line = self._encode(item)
                if len(piece) + len(line) > self.PIECE:
                    self._write(piece, count)
                    piece, count = b"", 0
                piece, count = piece + line, count + 1
            if written or lines.empty():
                self._write(piece, count)
                piece, count = b"", 0
                self._tell_dropped()
                if not written:
                    ending.wait(self.GATHERING)
        written.set()

    def _encode(self, item: Item) -> bytes:
        try:
            if isinstance(item, tuple):
                assert isinstance(self.formatter, TextFormatter)
                line = self.formatter.format_event(*item) + "\n"
            else:
                line = item if isinstance(item, str) else self.format(item) + "\n"
            return line.encode(errors="backslashreplace")
        except Exception:
            if isinstance(item, logging.LogRecord):
                self.handleError(item)
            return b""

    def _tell_dropped(self) -> None:
        if count := self._dropped:
            text = "%d log lines were dropped: standard error did not take them"
            record = logging.LogRecord("tcprelay", logging.WARNING, "", 0, text, (count,), None)
            if self._write(self._encode(record), 0):
                with self._lock:
                    self._dropped -= count

    def _write(self, piece: bytes, count: int) -> bool:
        """Write so many lines, however long that takes; False where they are dropped because it cannot be done."""
        left = memoryview(b"\n" + piece if self._torn and piece else piece)
        whole = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except (OSError, ValueError, AttributeError):  # full or broken; or there is no standard error
            with self._lock:
                self._dropped += count
        self._torn = (self._torn and len(left) == whole) or 0 < len(left) < whole
        return not left

    def _write_some(self, piece: memoryview) -> int:
        stream = self.stream or sys.stderr
        try:
            fd = stream.fileno()
        except (OSError, ValueError):  # it is no file
            stream.write(piece.tobytes().decode())
            return len(piece)
        try:
            return os.write(fd, piece)
        except BlockingIOError:  # a program that shares it has asked for that
            wait_for(fd, select.POLLOUT, Deadline(None))
            return 0


Item = logging.LogRecord | tuple[float, str, Event] | str
"""What is to be written: a record, an event with its time and its logger's name, or lines as they are."""


log_writer = LogWriter()
"""Of the commands, for the log and for whatever else they say on standard error."""


class TextFormatter(logging.Formatter):
    """A log record as a line of text."""

    milliseconds = ",%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._second = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return self.say_time(record.created)

    def say_time(self, created: float) -> str:
        """Makes the text of a second once: that takes longer than all the rest of the line."""
        second, text = self._second
        if second != int(created):
            second = int(created)
            text = time.strftime(self.default_time_format, self.converter(second))
            self._second = second, text
        return text + self.milliseconds % (1000 * (created - second))

    def format_event(self, created: float, logger: str, event: Event) -> str:
        """The line of an event, as its record's would be."""
        return f"{self.say_time(created)} {logging.getLevelName(event.level)} {event}"


class JsonFormatter(TextFormatter):
    """A log record as a JSON object in one line; of an event, with its fields."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    milliseconds = ".%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        entry = self._entry(record.created, record.levelno, record.name, record.getMessage())
        if record.exc_text:
            entry["exception"] = record.exc_text
        return json.dumps(entry)

    def format_event(self, created: float, logger: str, event: Event) -> str:
        entry = self._entry(created, event.level, logger, str(event))
        entry["event"] = type(event).__name__
        entry |= {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        return json.dumps(entry)

    def _entry(self, created: float, level: int, logger: str, message: str) -> dict[str, Any]:
        level_name = logging.getLevelName(level).lower()
        return {"time": self.say_time(created), "level": level_name, "logger": logger, "message": message}


def set_up_logging(level: str, format: str) -> None:
    """Log to standard error; only the commands do this, a program that embeds the relay has its own way."""
    log_writer.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    # Nothing that the formats do not show: a record costs half as much without (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logger = logging.getLogger("tcprelay")
    logger.handlers[:] = [log_writer]
    logger.propagate = False
    logger.setLevel(level.upper())


def fail(prog: str, status: int, message: str) -> NoReturn:
    """End the process with one line.  Raises `SystemExit`."""
    log_writer.put(f"{prog}: {message}\n")
    log_writer.end()
    raise SystemExit(status)
