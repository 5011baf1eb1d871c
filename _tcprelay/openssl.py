"""TLS contexts, and the openssl command."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from .system import ssl, subprocess, tempfile


def new_context(server_side: bool) -> ssl.SSLContext:
    """An empty TLS context: the only place where one is made, for what Pythons differ in must hold in all of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Pythons before 3.10.11 and 3.11.3, Debian 12's among them, set it where OpenSSL has it: a connection that is cut
    # off without close_notify would look like one that has ended.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


def run_openssl(words: list[str], *passwords: str) -> subprocess.CompletedProcess[bytes]:
    """Run the openssl command; it reads the passwords (-passin, -passout), one a line, from a pipe."""
    reader, writer = os.pipe()
    try:
        try:
            os.write(writer, "".join(f"{password}\n" for password in passwords).encode("utf-8", "surrogateescape"))
        finally:
            os.close(writer)
        asked = [f"fd:{reader}"] if passwords else []
        places = [word for flag, fd in zip(("-passin", "-passout"), asked * 2, strict=False) for word in (flag, fd)]
        return subprocess.run(
            ["openssl", *words, *places], stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[reader],
            timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "the openssl command does not come to an end") from error
    except FileNotFoundError as error:
        raise OSError(
            errno.ENOENT, "the openssl command, which reads PFX files and makes certificates, is not here: "
            "make PEM files where it is (openssl pkcs12 -in FILE -out FILE.pem) and give them with --cert and --key",
        ) from error  # fmt: skip
    finally:
        os.close(reader)


@contextlib.contextmanager
def hidden_file(content: bytes) -> Iterator[str]:
    """A path that holds `content` for a moment: in memory on Linux, elsewhere a file that others cannot read."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("tcprelay"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        yield path
    finally:
        os.unlink(path)
