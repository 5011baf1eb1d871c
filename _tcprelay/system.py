"""What systems and Pythons differ in, and modules that are imported when they are used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import fcntl as fcntl
    import termios as termios
except ImportError:  # not a Unix: then nothing here asks for them
    fcntl = termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import hashlib as hashlib
    import hmac as hmac
    import ssl as ssl
    import subprocess as subprocess
    import tempfile as tempfile
else:

    class Lazy:
        """A module that is imported when it is used: these five take 6 MiB (measured), which a small host that
        relays without token and TLS need not spend."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)
            return value

    hashlib, hmac, ssl = Lazy("hashlib"), Lazy("hmac"), Lazy("ssl")
    subprocess, tempfile = Lazy("subprocess"), Lazy("tempfile")


LINUX = sys.platform == "linux"


def ignore_oserror(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except OSError:
        pass


def random_fraction() -> float:
    """A random number from 0 to 1.  (The module random would cost 1 MiB.)"""
    return int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF
