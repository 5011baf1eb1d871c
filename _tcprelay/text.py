"""What is said to people: strings made safe, errors in words, ids."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TypeGuard

from .system import ssl

for codec in ("unicode_escape", "idna"):  # the latter is what host names are encoded with
    "".encode(codec)  # imports it now: later descriptors may have run out


def shown(text: object, limit: int = 120) -> str:
    """A string from a peer, made safe for the log: escaped, and cut to `limit` characters."""
    return str(text)[: 4 * limit].encode("unicode_escape").decode("ascii")[:limit]


def say_error(error: BaseException) -> str:
    """An exception in the words of a log line: the system's sentence without numbers and class names."""
    if is_tls_error(error):
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the certificate is not accepted: {error.verify_message}"
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    # Python puts the address behind some of the system's sentences; here the caller names it.
    said = error.strerror.partition(" (while attempting")[0]
    return said[:1].lower() + said[1:] if said[1:2].islower() else said


def is_tls_error(error: BaseException) -> TypeGuard[ssl.SSLError]:
    """Whether it is an `ssl.SSLError`; without importing ssl for those that are not."""
    return type(error).__module__ == "ssl" and isinstance(error, ssl.SSLError)


def trim(text: str) -> str:
    """A value without what does not belong to it: blanks and line ends around it, and the byte order mark that some
    editors and shells put first.  The same for every option from every source, and for what a secret's file holds:
    else one side takes for a part of the token what the other leaves out."""
    return text.strip(" \t\r\n\v\f\ufeff")


def has_controls(text: str) -> bool:
    return any(c < " " or c == "\x7f" for c in text)


def random_id(count: int) -> str:
    """So many random bytes in hexadecimal."""
    return os.urandom(count).hex()


def connection_id() -> str:
    """A name for a connection in the log: eight hexadecimal digits, from a random one on."""
    with _ids_lock:
        return f"{next(_connection_ids) & 0xFFFFFFFF:08x}"


def _begin_ids() -> None:
    global _connection_ids, _ids_lock
    _connection_ids, _ids_lock = itertools.count(int.from_bytes(os.urandom(4), "big")), threading.Lock()


_connection_ids, _ids_lock = itertools.count(), threading.Lock()
_begin_ids()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_ids)  # each process from another one on
