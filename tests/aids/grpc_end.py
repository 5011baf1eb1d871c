"""An end of gRPC, its own implementation: a service that gives back what it gets, or a client that asks it.

``serve [CERT KEY]`` says the port where it listens, with TLS where there is a certificate, and ends with its input.
``ask ADDRESS [CA NAME]`` calls it once, and once with a stream of messages both ways, and says what came back; it
verifies the certificate by CA and name, or speaks without TLS.  Bytes are its messages, so that no protocol compiler is
needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

grpc: Any = importlib.import_module("grpc")
COUNT, SIZE = 50, 20000
PATIENCE = 20.0


def reverse(message: bytes, context: Any) -> bytes:
    return message[::-1]


def reverse_all(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
    for message in messages:
        yield message[::-1]


def serve(*files: str) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    methods = {
        "One": grpc.unary_unary_rpc_method_handler(reverse),
        "Many": grpc.stream_stream_rpc_method_handler(reverse_all),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Reversal", methods)])
    if files:
        cert, key = (Path(path).read_bytes() for path in files)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0).wait()


def ask(address: str, *trust: str) -> None:
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if trust:
        ca, name = trust
        options.append(("grpc.ssl_target_name_override", name))
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes())
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, options)
    with channel:
        print(channel.unary_unary("/Reversal/One")(b"knits", timeout=PATIENCE).decode())
        messages = [bytes([number]) * SIZE for number in range(COUNT)]
        got = list(channel.stream_stream("/Reversal/Many")(iter(messages), timeout=PATIENCE))
        print(len(got), got == messages)


if __name__ == "__main__":
    (serve if sys.argv[1] == "serve" else ask)(*sys.argv[2:])
