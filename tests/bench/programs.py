"""Other programs: where they are, and which version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess


def find_program(name: str) -> str:
    """The path of a program, "" where there is none; daemons are often outside a user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])) or ""


def absent(*names: str) -> str:
    """Which of these programs are not installed, in one line; "" where all are."""
    return ", ".join(f"{name} is not installed" for name in names if not find_program(name))


def say(name: str, *arguments: str) -> str:
    """What a program says, on both of its outputs; "" where it is not there."""
    try:
        command = [find_program(name) or name, *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def version_of(called: str, name: str, option: str = "--version") -> str:
    """What a program is called, and its version, where it tells one."""
    found = re.search(r"\d+\.\d+[\w.]*", say(name, option))
    version = found[0] if found else ""
    if version.startswith("0.0.0") and find_program("go"):
        # A program in Go that was not built by its makers does not know it, but its modules are written in it.
        built = re.search(r"\smod\s+\S+\s+v([\w.-]+)", say("go", "version", "-m", find_program(name)))
        version = built[1] if built else version
    return f"{called} {version}".strip()
