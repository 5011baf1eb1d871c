"""Where the Unix sockets are on which relay processes tell their status, and who may look there.

Each process of a command listens on one that is called ``ROLE-PID.sock``, in the runtime directory of its user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..state import check_directory, locked
from ..system import LINUX, ignore_oserror
from ..text import say_error

RUN = "/run"
"""Where systems keep what does not outlive them: root's directory is in it, and those that systemd makes."""
COMMANDS = {"server": "tcprelays", "client": "tcprelayc"}
"""The command of each role; their units have the directories of these names (RuntimeDirectory=)."""
LONGEST_PATH = 107 if LINUX else 103
"""Bytes: what has room in sun_path with the zero behind it (unix(7) of Linux; the BSDs and macOS have 104)."""
TIMEOUT = 5.0
"""Seconds that a relay has for each step of an answer."""
BACKLOG = 16
"""Connections that wait until they are accepted."""


def own_directory() -> str:
    """Where a relay of this process has its socket: systemd's runtime directory, the user's (XDG), or root's; "" where
    there is none."""
    if systemd := os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:
        return systemd
    if home := _user_directory():
        return home
    return os.path.join(RUN, "tcprelay") if _user() == 0 and os.path.isdir(RUN) else ""


def _user_directory() -> str:
    home = os.environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(home, "tcprelay") if os.path.isabs(home) and os.path.isdir(home) else ""


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else -1


def bind_socket(role: str) -> socket.socket:
    """The socket of this process, which listens; nobody but this user and root can connect to it.

    The directory is made where it is missing, and what processes of this role that are gone have left there is taken
    away.  Raises `OSError`, with the path and what to do, where there is no directory, where others could put
    something there, and for what the system refuses.
    """
    directory = own_directory()
    if not directory:
        raise OSError(errno.ENOENT, "this user has no runtime directory: set XDG_RUNTIME_DIR to one of its own")
    path = os.path.join(directory, f"{role}-{os.getpid()}.sock")
    try:
        if not hasattr(socket, "AF_UNIX"):
            raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise OSError(errno.ENAMETOOLONG, f"the path of a Unix socket has {LONGEST_PATH} bytes at most")
        with contextlib.suppress(FileExistsError):  # something else than a directory, which the check names
            os.makedirs(directory, mode=0o700, exist_ok=True)
        check_directory(directory)
        with locked(directory):  # else another process could find this socket before it listens, and take it away
            for other in _sockets_in(directory, role):
                _remove_stale(other)
            return _listen(path)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        name = "RUNTIME_DIRECTORY" if os.environ.get("RUNTIME_DIRECTORY") else "XDG_RUNTIME_DIR"
        raise OSError(error.errno, f"{say_error(error)}; {name} names another place", place) from error


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        try:
            os.chmod(path, 0o600)
            sock.listen(BACKLOG)  # only now anybody can connect
        except OSError:
            ignore_oserror(os.unlink, path)
            raise
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    try:
        connect(path).close()
    except ConnectionRefusedError:  # nobody listens, and nobody will: its process is gone
        ignore_oserror(os.unlink, path)
    except OSError:
        pass


def remove_socket(sock: socket.socket) -> None:
    """Take away the file of a socket that `bind_socket` has made.  The socket is the caller's to close, and afterwards:
    then nobody finds one that refuses."""
    ignore_oserror(lambda: os.unlink(sock.getsockname()))


def connect(path: str) -> socket.socket:
    """A connection to a relay's socket, with `TIMEOUT` for each step.  Raises `ConnectionRefusedError` where nobody
    listens on it any more, `PermissionError` where this user may not, and `OSError`."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass(frozen=True)
class Found:
    """What `find_sockets` has found."""

    connected: dict[str, socket.socket] = field(default_factory=dict)
    """By path: a connection to each relay that is there, which the caller closes."""
    busy: list[str] = field(default_factory=list)
    """Sockets on which somebody listens who does not accept."""
    stale: list[str] = field(default_factory=list)
    """Those of processes that are gone."""
    barred: list[str] = field(default_factory=list)
    """Those, and directories, that are there and into which this user may not look."""


def find_sockets(role: str) -> Found:
    """Looks wherever a relay of this role could have its socket: where this user's is, in the directories of the
    commands' units, and for root in those of all users."""
    found = Found()
    if not hasattr(socket, "AF_UNIX"):
        return found
    for directory in _directories():
        try:
            paths = _sockets_in(directory, role)
        except PermissionError:
            if os.path.basename(directory) not in {*COMMANDS.values()} - {COMMANDS[role]}:  # of the other role's unit
                found.barred.append(directory)
            continue
        except OSError:  # it is not there
            continue
        for path in paths:
            try:
                found.connected[path] = connect(path)
            except ConnectionRefusedError:
                found.stale.append(path)
            except PermissionError:
                found.barred.append(path)
            except FileNotFoundError:  # its process has just ended
                pass
            except OSError:
                found.busy.append(path)
    return found


def _directories() -> Iterator[str]:
    """Each once, whatever links lead there."""
    places = [own_directory(), _user_directory()]
    places += [os.path.join(RUN, name) for name in ("tcprelay", *COMMANDS.values())]
    users = os.path.join(RUN, "user")
    names = [str(_user())]  # also where a shell has not been told of it: after su, or from cron
    if _user() == 0:
        with contextlib.suppress(OSError):
            names += sorted(os.listdir(users))
    places += [os.path.join(users, name, "tcprelay") for name in names]
    seen = set()
    for place in filter(None, places):
        if (real := os.path.realpath(place)) not in seen:
            seen.add(real)
            yield place


def _sockets_in(directory: str, role: str) -> list[str]:
    """Raises `OSError`."""
    pattern = re.compile(rf"{role}-(\d+)\.sock")
    names = [name for name in os.listdir(directory) if pattern.fullmatch(name)]
    return [os.path.join(directory, name) for name in sorted(names, key=process_of)]


def process_of(path: str) -> int:
    """The number of the process whose socket this is."""
    return int(path.rpartition("-")[2].removesuffix(".sock"))


def owner_of(path: str) -> str:
    """The name of the user to whom it belongs, or the number where there is no name."""
    try:
        try:
            number = os.stat(path).st_uid
        except OSError:  # a link into a directory of root's, as systemd makes them (DynamicUser=)
            number = os.lstat(path).st_uid
    except OSError:
        return "another user"
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"
