"""A new relay client: its section in the clients file, and the line to paste on the other side.

The file is not locked against the server, which reads it at a signal: it is replaced as a whole, and never half there.
The token stands in what is said, as that is what it is for; it is in no log.
"""

from __future__ import annotations

import dataclasses
import os

from ..rights import ALL, parse_rights
from ..server_options import ServerOptions
from ..state import rewrite
from ..text import random_id, shown, trim
from .trust import load_credentials, say_line


def add_client(options: ServerOptions, name: str) -> str:
    """For ``tcprelays --add-client NAME``: make a section with a fresh token, write it into the clients file where one
    is given, and return what to say: the section, and the command for the other side.

    Raises `OSError`, and `ValueError` for a name that is there already or cannot be one.
    """
    token, path = random_id(32), options.clients
    section = f"[{name}]\ntoken = {token}\n{say_rights(options)}\n"
    services = [service.name for service in options.services]

    if not name.isprintable() or len(name) > 64 or set(name) & set("[]") or name != trim(name):
        raise ValueError(f"{shown(name)} cannot be a relay client's name: up to 64 characters, without brackets")

    def add(text: str) -> str:
        if name in parse_rights(text, path, services, options.client_ports, options.auth):
            raise ValueError(f"{path} has a section {name} already: take that out, or choose another name")
        return f"{text.rstrip()}\n\n{section}".lstrip("\n")

    if path:
        rewrite(path, add)
        where = f"written to {os.path.abspath(path)}, where rights can be changed; SIGHUP has the server read it"
    else:
        add("")
        where = "for the file that --clients is to name; nothing is written"
        options = dataclasses.replace(options, allow_unauthenticated=True)  # no token for all need be made
    credentials = load_credentials(options)
    notes = ["a file with the token, named by --token-file, keeps it out of ps"]
    if options.auth:
        notes.append(f"add --cert and --key: of a certificate for {name}")
    line = say_line(options, credentials, options.relay_port or 0, ["--name", name, "--token", token], notes)
    return "\n".join([f"the section of {name} ({where}):", *(f"  {one}" for one in section.splitlines()), line])


def say_rights(options: ServerOptions) -> str:
    """What a new relay client may do: all that others may, until somebody takes some of it away."""
    lines = []
    if options.services:
        lines.append(f"services = {ALL}")
    if options.client_ports:
        lines.append(f"ports = {ALL}")
    if not lines:
        raise ValueError("there is nothing that a relay client could publish: give --service or --client-ports, too")
    return "\n".join(lines)
