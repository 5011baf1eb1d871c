"""The log when nobody reads it, and whatever else can happen to standard error: serving and ending go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from _tcprelay.logs import JsonFormatter, LogWriter, log_writer

from .conftest import PATIENCE, Service, echo, read_all, read_exactly, wait_until
from .peers import HOST, ROOT, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="closes and fills standard error as Linux does")

MORE = 150
"""Connections whose records are more than a pipe and the records of both roles' starts take."""


# --- Commands whose standard error is not read ----------------------------------------------------------------


class Unheard:
    """A relay command whose standard error is made by the test; its ports are chosen before."""

    def __init__(self, stack: ExitStack, *command: str, stderr: int, closed: bool = False) -> None:
        program = [sys.executable, "-m", "tcprelay", *command]
        if closed:
            program = ["sh", "-c", 'exec "$@" 2>&-', "sh", *program]
        environment = {**os.environ, "TCPRELAY_LOG_LEVEL": "debug", "TCPRELAY_WORKERS": os.environ["TEST_WORKERS"]}
        self.process = subprocess.Popen(program, cwd=ROOT, env=environment, stderr=stderr)
        stack.callback(self._close)

    def end(self) -> int:
        """Have it end as a service manager does; returns its status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def _close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


def full_pipe(stack: ExitStack) -> int:
    """A pipe that is full, and stays so."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4096)
    return writer


def small_pipe(stack: ExitStack) -> int:
    """A pipe that nobody reads: some lines fit."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 16384)
    return writer


def broken_pipe(stack: ExitStack) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    stack.callback(os.close, writer)
    return writer


def stopped_terminal(stack: ExitStack) -> int:
    """A terminal where somebody has pressed Ctrl-S."""
    master, slave = os.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    termios.tcflow(slave, termios.TCOOFF)
    return slave


def full_disk(stack: ExitStack) -> int:
    number = os.open("/dev/full", os.O_WRONLY)
    stack.callback(os.close, number)
    return number


def unread_socket(stack: ExitStack) -> int:
    """As under systemd, where the journal's own disk may be slow."""
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return theirs.fileno()


def nothing(_: ExitStack) -> int:
    return subprocess.DEVNULL


KINDS = [full_pipe, small_pipe, broken_pipe, stopped_terminal, full_disk, unread_socket, nothing]


@pytest.mark.parametrize("kind", KINDS)
def test_serving_and_ending_go_on(workers: str, kind: Callable[[ExitStack], int]) -> None:
    """Hundreds of connections are served, and SIGTERM ends both roles in time; "nothing" is a closed descriptor."""
    with ExitStack() as stack:
        service = Service(echo)
        stack.callback(service.close)
        relay_port, service_port = free_port(), free_port()
        where = "--relay-port", str(relay_port), "--drain-timeout", "0"
        closed = kind is nothing
        server = Unheard(stack, "server", *where, "--hostname", HOST, "--service-port", str(service_port),
                         stderr=kind(stack), closed=closed)  # fmt: skip
        client = Unheard(stack, "client", *where, "--relay-host", HOST, "--host", HOST, "--port", str(service.port),
                         stderr=kind(stack), closed=closed)  # fmt: skip
        wait_until(lambda: is_served(service_port), 3 * PATIENCE)
        for _ in range(MORE):
            assert is_served(service_port)
        assert client.end() == 0
        assert server.end() == 0


def is_served(port: int) -> bool:
    """Whether a service client gets its answer."""
    try:
        with socket.create_connection((HOST, port), PATIENCE) as sock:
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock) == b"question"
    except (ConnectionRefusedError, ConnectionResetError):
        return False


@pytest.mark.parametrize("words", [["--port", "nonsense"], ["--token-file", "/nonexistent"]])
def test_a_wrong_option_ends_the_command_although_nobody_reads_it(words: list[str]) -> None:
    """With its status, too."""
    with ExitStack() as stack:
        command = [sys.executable, "-m", "tcprelay", "client", "--relay-host", HOST, "--relay-port", "1", "--port", "1"]
        process = subprocess.Popen([*command, *words], cwd=ROOT, stderr=full_pipe(stack))
        stack.callback(process.kill)
        assert process.wait(PATIENCE) == (2 if "--port" in words else 1)


def test_the_invitation_waits_for_nobody() -> None:
    """A start with --tls alone says a command for the other side; where nobody reads it, the server serves."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_WORKERS", "0")
        port = free_port()
        directory = stack.enter_context(temporary_directory())
        server = Unheard(stack, "server", "--relay-port", str(port), "--hostname", HOST, "--service-port", "0", "--tls",
                         "--state-dir", directory, stderr=full_pipe(stack))  # fmt: skip
        sock = wait_until(lambda: dial(port), 3 * PATIENCE)
        stack.callback(sock.close)
        assert server.end() == 0


def test_the_invitation_is_a_record_in_json(tmp_path: Path) -> None:
    """Where each line is an object, this one is, too."""
    words = ["server", "0", "0", "--hostname", HOST, "--tls", "--state-dir", str(tmp_path / "state"), "--log-format",
             "json", "--workers", "0"]  # fmt: skip
    command = [sys.executable, "-m", "tcprelay", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            messages = (json.loads(line)["message"] for line in lines)
            said = next(message for message in messages if "on the other side" in message)
        finally:
            process.kill()
    assert re.fullmatch(rf"on the other side, run: tcprelayc {HOST}:\d+ PORT --tls --token-file .*", said)


def dial(port: int) -> socket.socket | None:
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection((HOST, port), PATIENCE)
    return None


@contextlib.contextmanager
def temporary_directory() -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        yield path


# --- The writer -----------------------------------------------------------------------------------------------


class Lines:
    """A writer whose lines go into a pipe that the test reads when it likes."""

    def __init__(self, stack: ExitStack, most: int = 100) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        stack.callback(os.close, self.reader)
        self.stream = stack.enter_context(os.fdopen(writer, "w"))
        self.writer = LogWriter()
        self.writer.MOST = most
        self.writer.stream = self.stream
        self.writer.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def read_all(self) -> list[str]:
        """The lines to the end of the pipe, which is when the writer has ended."""
        data = b""
        ender = threading.Thread(target=self._end)
        ender.start()
        while piece := os.read(self.reader, 65536):
            data += piece
        ender.join(PATIENCE)
        return data.decode().splitlines()

    def _end(self) -> None:
        self.writer.LAST_LINES = PATIENCE
        self.writer.end()
        self.stream.close()


@pytest.fixture
def lines() -> Iterator[Lines]:
    with ExitStack() as stack:
        yield Lines(stack)


def test_what_nobody_reads_is_dropped_and_counted(lines: Lines) -> None:
    """The first lines are there, whole and in order, then how many are not, and what comes later."""
    for number in range(2000):
        lines.writer.put(f"{number} {'x' * 92}\n")
    lines.writer.begin()
    first = os.read(lines.reader, 4096)
    wait_until(lambda: not lines.writer._queue.qsize())
    lines.writer.put("later\n")
    said = (first.decode() + "\n".join(lines.read_all())).splitlines()
    notices = [line for line in said if "dropped" in line]
    kept = [line for line in said if "dropped" not in line]
    dropped = sum(int(line.split()[1]) for line in notices)
    assert notices and notices[0].startswith("WARNING ")
    assert kept[-1] == "later" and len(kept) - 1 + dropped == 2000
    assert kept[:-1] == [f"{number} {'x' * 92}" for number in range(len(kept) - 1)]


def test_lines_of_one_writer_leave_together(lines: Lines) -> None:
    """What has gathered is one write of no more than a pipe takes as a whole."""
    for number in range(60):
        lines.writer.put(f"{number} {'x' * 92}\n")
    lines.writer.begin()
    wait_until(lambda: select.select([lines.reader], [], [], 0)[0])
    first = os.read(lines.reader, 65536)
    assert first.endswith(b"\n") and first.count(b"\n") > 30
    assert first.decode().splitlines() + lines.read_all() == [f"{number} {'x' * 92}" for number in range(60)]


def test_a_traceback_keeps_nothing_alive(lines: Lines) -> None:
    """While it waits to be written, it is text."""
    record = logging.LogRecord("tcprelay", logging.ERROR, "", 0, "it failed", (), None)
    try:
        raise ZeroDivisionError("canary")
    except ZeroDivisionError:
        record.exc_info = sys.exc_info()
    lines.writer.handle(record)
    assert record.exc_info is None
    said = lines.read_all()
    assert said[0] == "ERROR it failed" and said[-1] == "ZeroDivisionError: canary"


def test_a_descriptor_that_does_not_block_is_waited_for(lines: Lines) -> None:
    """Another program that shares it may have asked for O_NONBLOCK."""
    os.set_blocking(lines.stream.fileno(), False)
    lines.writer.begin()
    for number in range(90):
        lines.writer.put(f"{number} {'x' * 92}\n")
    assert lines.read_all() == [f"{number} {'x' * 92}" for number in range(90)]


def test_a_disk_that_has_room_again_gets_the_count(lines: Lines) -> None:
    """And the lines that come then."""
    with open("/dev/full", "w") as full:
        lines.writer.stream = full
        lines.writer.begin()
        for _ in range(3):
            lines.writer.put("lost\n")
        wait_until(lambda: lines.writer._dropped == 3)
        lines.writer.stream = lines.stream
        lines.writer.put("there\n")
        said = lines.read_all()
    assert said == ["there", "WARNING 3 log lines were dropped: standard error did not take them"]


def test_a_line_that_was_torn_is_ended_before_the_next(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk was full in its midst: what comes later stands in a line of its own."""
    real, written = LogWriter._write_some, []

    def write_some(writer: LogWriter, piece: memoryview) -> int:
        written.append(piece)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(writer, piece[:3] if len(written) == 1 else piece)

    monkeypatch.setattr(LogWriter, "_write_some", write_some)
    lines.writer.begin()
    lines.writer.put("first\n")
    wait_until(lambda: len(written) == 3 and not lines.writer._dropped)
    lines.writer.put("second\n")
    notice = "WARNING 1 log lines were dropped: standard error did not take them"
    assert lines.read_all() == ["fir", notice, "second"]


def test_without_a_standard_error_lines_are_dropped(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, or a closed one; the thread lives on."""
    closed = io.StringIO()
    closed.close()
    lines.writer.stream = closed
    lines.writer.begin()
    lines.writer.put("lost\n")
    wait_until(lambda: lines.writer._dropped == 1)
    lines.writer.stream = None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        lines.writer.put("lost, too\n")
        wait_until(lambda: lines.writer._dropped == 2)
    lines.writer.stream = lines.stream
    lines.writer.put("there\n")
    assert "there" in lines.read_all()


def test_an_exception_is_in_a_json_line(lines: Lines) -> None:
    lines.writer.setFormatter(JsonFormatter())
    record = logging.LogRecord("tcprelay", logging.ERROR, "", 0, "it failed", (), None)
    try:
        raise ZeroDivisionError("canary")
    except ZeroDivisionError:
        record.exc_info = sys.exc_info()
    lines.writer.handle(record)
    [said] = map(json.loads, lines.read_all())
    assert said["message"] == "it failed"
    assert said["exception"].splitlines()[-1] == "ZeroDivisionError: canary"


def test_closed_standard_descriptors_are_no_connections(workers: str) -> None:
    """What some library says on them would go to a peer: they are opened on /dev/null, in workers too."""
    port = free_port()
    words = "server", "--relay-port", str(port), "--service-port", "0", "--hostname", HOST, "--workers", workers
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "tcprelay", *words]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_until(lambda: dial(port), 3 * PATIENCE).close()
        children = wait_until(
            lambda: len(found := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            == int(workers) and [*found, ""]
        )  # fmt: skip
        for pid in (process.pid, *children[:-1]):
            assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait(PATIENCE)


def test_the_end_does_not_wait_for_whoever_reads(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the last lines `LAST_LINES` seconds."""
    monkeypatch.setattr(LogWriter, "LAST_LINES", 0.05)
    lines.writer.begin()
    for _ in range(90):
        lines.writer.put("x" * 100 + "\n")
    lines.writer.end()
    lines.writer.end()  # again, as who ends a command with an error
    while os.read(lines.reader, 65536).count(b"\n") < 5 or select.select([lines.reader], [], [], 0.2)[0]:
        pass  # let the thread go


def test_the_records_of_the_drain_are_in_the_log(workers: str) -> None:
    """Where it is read, nothing is missing at the end."""
    with ExitStack() as stack:
        service = Service(echo)
        stack.callback(service.close)
        relay_port, service_port = free_port(), free_port()
        where = "--relay-port", str(relay_port), "--drain-timeout", "0"
        server = Unheard(stack, "server", *where, "--hostname", HOST, "--service-port", str(service_port),
                         stderr=subprocess.PIPE)  # fmt: skip
        client = Unheard(stack, "client", *where, "--relay-host", HOST, "--host", HOST, "--port", str(service.port),
                         stderr=subprocess.DEVNULL)  # fmt: skip
        assert server.process.stderr is not None
        stack.callback(server.process.stderr.close)
        wait_until(lambda: is_served(service_port), 3 * PATIENCE)
        socks = [stack.enter_context(socket.create_connection((HOST, service_port), PATIENCE)) for _ in range(50)]
        for sock in socks:
            sock.sendall(b"x")
            assert read_exactly(sock, 1) == b"x"
        server.process.send_signal(signal.SIGTERM)
        said = server.process.stderr.read().decode()
        assert server.process.wait(PATIENCE) == 0
        assert said.count("broken off (this relay is ending)") == 50
        assert client.end() == 0


def test_the_log_of_the_module_is_the_commands_alone() -> None:
    """Who embeds a relay has no thread and no handler of ours."""
    assert log_writer not in logging.getLogger("tcprelay").handlers
    assert not log_writer._begun
