"""Messages between a parent and its worker processes: a JSON object, and sometimes bytes and a descriptor behind it.

to the parent, over the channel     "up": it serves now
                                    "alive": none of its threads hangs
                                    "reloaded": it has done what a SIGHUP asks for
                                    "event", "fields": what is about the role as a whole
                                    "look": a service has an idle link, or a waiting client
                                    "suspect", "why": a relay client that seems to be out of reach
                                    "withdraw", "back": a service that its relay client has withdrawn, or has again
                                    "withdrawn": of a relay client: a service that is down, or is back
                                    "status", "more": a piece of its status
                                    "ask", "for": a relay client wants a port
                                    "left", "address": a connection of that service (links: "") is gone
                                    "id", "failed", …: a service client comes back, with its descriptor
to a worker, over the channel       a byte: the number of a signal; "status", "give_up", "suspect": orders;
                                    "asked": the answer to "ask"; "given_back": a port that was;
                                    "withdrawn": services that are down
to a worker, over the intake        "service", "address", …: a connection, with its descriptor
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

MESSAGE_SIZE = 1 << 17
"""Bytes of the longest message between a parent and a worker."""
MESSAGE_ROOM = 4096
"""Bytes that a worker leaves free in it for what the parent adds when it passes it on."""


def encode_message(fields: dict[str, Any], payload: bytes = b"") -> bytes:
    """A message between parent and worker: JSON, and bytes behind a line feed."""
    return json.dumps(fields).encode() + b"\n" + payload


def decode_message(message: bytes) -> tuple[dict[str, Any], bytes]:
    head, _, payload = message.partition(b"\n")
    return json.loads(head), payload


def send_message(channel: socket.socket, message: bytes, descriptors: Sequence[int] = (), flags: int = 0) -> None:
    """`socket.send_fds` with its flags, which that takes and forgets: a parent would wait for its worker.  Raises
    `OSError`."""
    if len(message) > MESSAGE_SIZE:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
    channel.sendmsg([message], rights if descriptors else [], flags)


def receive_message(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message and its descriptor, or none where the kernel had no number for it; `socket.recv_fds` forgets its
    flags, too.  Raises `OSError`, and `ValueError` for a message that did not come whole."""
    message, ancillary, told, _ = channel.recvmsg(MESSAGE_SIZE, socket.CMSG_SPACE(4), flags)
    numbers = [number for *_, data in ancillary for (number,) in struct.iter_unpack("i", data[: len(data) & ~3])]
    if told & socket.MSG_TRUNC:
        for number in numbers:
            os.close(number)
        raise ValueError(f"a message of more than {MESSAGE_SIZE} bytes")
    return message, numbers


def adopt_socket(descriptor: int, address: Any) -> socket.socket:
    """The TCP socket of a descriptor that came with a message, from the address of its peer."""
    return socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)
