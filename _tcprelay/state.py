"""Files that this user alone can read, made at the first start."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

from .system import fcntl, ignore_oserror
from .text import random_id, say_error


SYSTEM_STATE = "/var/lib/tcprelay"
"""Where root keeps things, in a shell as under systemd (StateDirectory=): the same identity in both."""
SYSTEM_PRIVATE = "/var/lib/private/"
"""Where systemd keeps the state of services with a user of their own (DynamicUser=); root alone can enter it."""


def state_directory() -> str:
    """Where things are kept by default: systemd's state directory, root's, or the user's (XDG).  Raises `OSError`."""
    if systemd := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return systemd
    home = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(home):
        if _is_root() and os.path.isdir(os.path.dirname(SYSTEM_STATE)):
            return SYSTEM_STATE
        home = os.path.expanduser("~/.local/state")
    if not os.path.isabs(home):
        raise OSError(
            errno.ENOENT, "this user has no home directory to keep a certificate in: name one with --state-dir"
        )
    return os.path.join(home, "tcprelay")


def other_states(directory: str) -> list[str]:
    """The other default places, as far as this user can look there, that hold a certificate: what was tried in a shell
    and what a service manager starts may be two."""
    homes = ["~", "~" + os.environ.get("SUDO_USER", "")]
    places = [SYSTEM_STATE, *(os.path.join(os.path.expanduser(home), ".local/state/tcprelay") for home in homes)]
    found = [os.path.realpath(place) for place in places if os.path.exists(os.path.join(place, IDENTITY))]
    return [place for place in dict.fromkeys(found) if place != os.path.realpath(directory)]


IDENTITY = "identity.pem"
"""The file of a certificate that was made, with its key."""


def say_open(path: str) -> str:
    """What others may do with a file that holds a secret; "" for nothing, and where the system keeps them out.

    Docker and Podman put a container's secrets into /run/secrets with modes that let everybody read, and nobody else is
    there; the same goes for systemd's credentials.
    """
    try:
        found = os.stat(path)
    except OSError:
        return ""
    places = ("/run/secrets/", os.path.join(os.environ.get("CREDENTIALS_DIRECTORY") or "/run/secrets", ""))
    mode = stat.S_IMODE(found.st_mode)
    if os.path.realpath(path).startswith(places) or not stat.S_ISREG(found.st_mode) or not hasattr(os, "geteuid"):
        return ""
    may = "read and write" if mode & 0o004 and mode & 0o022 else "write to" if mode & 0o022 else "read"
    return f"others can {may} it (its mode is {mode:04o})" if mode & 0o026 else ""


def _is_closed(directory: str) -> bool:
    """Whether root alone can enter it."""
    found = os.lstat(directory)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and not stat.S_IMODE(found.st_mode) & 0o077


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def private_file(path: str, make: Callable[[], bytes]) -> str:
    """The path of a file that this user alone can read, with what `make` returns if it is not there yet.

    Several that start together end up with one file.  Raises `OSError`, with the path and what to do, for what
    cannot be made, and for what others could have put there or read.
    """
    is_there = os.path.lexists(path)
    if _looking.only and not is_there:
        raise NothingKept(errno.ENOENT, "it is made at the first start", path)
    content = None if is_there else make()
    try:
        if content is not None:
            _make_private(path, content)
        check_directory(os.path.dirname(path))
        _check_file(path)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise OSError(error.errno, f"{say_error(error)}; --state-dir names another place", place) from error
    return path


class NothingKept(OSError):
    """While `looking_only`: there is no such file yet."""


class _Looking(threading.local):
    only = False


_looking = _Looking()


@contextlib.contextmanager
def looking_only() -> Iterator[None]:
    """Meanwhile this thread makes no files: raises `NothingKept` instead."""
    _looking.only = True
    try:
        yield
    finally:
        _looking.only = False


def _make_private(path: str, content: bytes) -> None:
    """Write a new file, all of it at once; one that is there already stays.  Raises `OSError`."""
    directory = os.path.dirname(path)
    with contextlib.suppress(FileExistsError):  # something else than a directory, which the check names
        os.makedirs(directory, mode=0o700, exist_ok=True)
    check_directory(directory)
    with locked(directory):
        if os.path.lexists(path):
            return
        with _replacing(path) as file:
            if _who_else(os.fstat(file.fileno()), 0o077, path):
                raise PermissionError(errno.EPERM, "the file system here cannot keep a file from others")
            file.write(content)


def rewrite(path: str, change: Callable[[str], str]) -> None:
    """Replace a file's text by what `change` makes of it, all at once; where there is none yet that is "".

    A new one is for this user alone, an old one keeps its owner and mode.  Raises `OSError`, and what `change` raises;
    then nothing is changed.
    """
    path = os.path.realpath(path)
    with locked(os.path.dirname(path)):
        text, found = "", None
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8-sig") as file:
            text, found = file.read(), os.fstat(file.fileno())
        content = change(text).encode()
        with _replacing(path) as written:
            if found is not None and hasattr(os, "fchown"):
                os.fchown(written.fileno(), found.st_uid, found.st_gid)
                os.fchmod(written.fileno(), stat.S_IMODE(found.st_mode))
            written.write(content)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file, for this user alone, which takes the place of the one at this path when the block has ended well.
    Raises `OSError` with the path; then nothing is left of it."""
    new = f"{path}.{random_id(8)}"
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        ignore_oserror(os.unlink, new)
        raise OSError(error.errno, say_error(error), path) from error


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Alone among the processes of this host.  Not by a hard link: some file systems have none, but all have this,
    as the kernel keeps the locks of directories itself."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for no longer than it takes to write a small file
        yield
    finally:
        os.close(descriptor)


def check_directory(path: str) -> None:
    """Raises `OSError` where others could put files there."""
    found = os.stat(path)  # follows links: systemd's state directory may be one
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "this is not a directory", path)
    if who := _who_else(found, 0o022, path):
        raise PermissionError(
            errno.EPERM, f"{who} can put files there: have it owned and written by this user alone", path
        )


def _check_file(path: str) -> None:
    """Raises `OSError` where others could know or have changed what is in it."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "this is not a regular file: remove it", path)
    if who := _who_else(found, 0o077, path):
        raise PermissionError(errno.EPERM, f"{who} may know or have changed it: remove it, a new one is made", path)


def _who_else(found: os.stat_result, forbidden: int, path: str) -> str:
    """Who beside this user and root may do to a file what the bits of its mode in `forbidden` allow; "" is nobody.  The
    user whom systemd has made for the service is none to root: nobody else can be it."""
    if not hasattr(os, "geteuid"):
        return ""
    is_service = _is_root() and os.path.realpath(path).startswith(SYSTEM_PRIVATE) and _is_closed(SYSTEM_PRIVATE)
    if found.st_uid not in (os.geteuid(), 0) and not is_service:
        return f"user {found.st_uid}, its owner,"
    if found.st_uid != os.geteuid():
        forbidden &= ~0o040  # what root has put there for a service is read by its group
    mode = stat.S_IMODE(found.st_mode)
    return f"others (its mode is {mode:04o})" if mode & forbidden else ""
