"""TLS contexts, the openssl command, and what is wrong with files of certificates and keys."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from .system import ssl, subprocess, tempfile
from .text import say_error

CERT, KEY, LOCKED, CSR = "a certificate", "a private key", "an encrypted private key", "a certificate request (CSR)"
PFX, BUNDLE, SSH_KEY, PUBLIC_KEY = "a PFX file", "a PKCS #7 bundle", "a private key in OpenSSH's form", "a public key"
CA, DER_CERT, DER_KEY = "CA certificates", "a certificate in DER form", "a private key in DER form"
UTF16, MISPLACED, NOTHING, OTHER = "UTF-16 text", "-----BEGIN within a line", "nothing", "neither PEM nor DER"
PEM_LABELS = {
    "CERTIFICATE": CERT, "X509 CERTIFICATE": CERT, "TRUSTED CERTIFICATE": CERT, "CERTIFICATE REQUEST": CSR,
    "NEW CERTIFICATE REQUEST": CSR, "PRIVATE KEY": KEY, "RSA PRIVATE KEY": KEY, "EC PRIVATE KEY": KEY,
    "ENCRYPTED PRIVATE KEY": LOCKED, "OPENSSH PRIVATE KEY": SSH_KEY, "PUBLIC KEY": PUBLIC_KEY, "PKCS7": BUNDLE,
}  # fmt: skip
"""What PEM calls the blocks of a file, and we."""
REMEDIES = {
    (CERT, CSR): "a CA makes the certificate of it",
    (CERT, PFX): "give it with {prefix}pfx",
    (CERT, DER_CERT): "openssl x509 -inform DER -in FILE -out FILE.pem",
    (CERT, BUNDLE): "openssl pkcs7 -print_certs -in FILE -out FILE.pem",
    (CA, DER_CERT): "openssl x509 -inform DER -in FILE -out FILE.pem",
    (CA, BUNDLE): "openssl pkcs7 -print_certs -in FILE -out FILE.pem",
    (KEY, DER_KEY): "openssl pkey -inform DER -in FILE -out FILE.pem",
    (KEY, SSH_KEY): "make a copy and change it by ssh-keygen -p -m PEM -f COPY",
    (PFX, CERT): "give PEM files with {prefix}cert and {prefix}key",
    (PFX, KEY): "give PEM files with {prefix}cert and {prefix}key",
}
"""What helps where the second was given and the first is wanted."""


def new_context(server_side: bool) -> ssl.SSLContext:
    """An empty TLS context: the only place where one is made, for what Pythons differ in must hold in all of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Pythons before 3.10.11 and 3.11.3, Debian 12's among them, set it where OpenSSL has it: a connection that is cut
    # off without close_notify would look like one that has ended.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


def run_openssl(words: list[str], *passwords: str, instead: str) -> subprocess.CompletedProcess[bytes]:
    """Run the openssl command; it reads the passwords (-passin, -passout), one a line, from a pipe.  Raises `OSError`;
    where there is no such command it says what to do `instead`."""
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
        raise OSError(errno.ENOENT, f"the openssl command is not here: install it, or {instead}") from error
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


def explain_pair(cert: str, key: str, password: bytes, prefix: str, error: ssl.SSLError) -> str:
    """Why a certificate and its key could not be loaded, in one line, from what the files hold."""
    key_file = key or cert
    found, held = look_into(cert), look_into(key_file)
    if CERT not in found:
        if CERT in held and (KEY in found or LOCKED in found):
            return f"{cert} holds the private key and {key} the certificate: {prefix}cert and {prefix}key are exchanged"
        return say_wrong(cert, found, CERT, prefix)
    if KEY not in held and LOCKED not in held:
        if key:
            return say_wrong(key, held, KEY, prefix)
        return f"{cert} holds a certificate without its private key: give that with {prefix}key"
    # The second is said where they are of different kinds, RSA and EC.
    if (error.reason or str(error)).endswith(("VALUES_MISMATCH", "TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")):
        if place := _place_of_own(cert, key_file, password):
            return f"{cert} is in the wrong order: the certificate of the key, number {place} in it, must be the first"
        return f"the private key in {key_file} is another one than that of the certificate in {cert}"
    if LOCKED in held and not password:
        return f"the private key in {key_file} is encrypted: give its passphrase with --passphrase-file"
    if (error.reason or "").endswith(("TOO_SMALL", "TOO_WEAK")):
        return f"{cert} is too weak for this system's openssl: {say_error(error)}"
    try:
        new_context(False).load_verify_locations(cert)
    except ssl.SSLError:
        return f"the certificate in {cert} is damaged"
    if LOCKED in held:
        return f"the passphrase of {key_file} is wrong: give it with --passphrase-file or --passphrase"
    return f"the private key in {key_file} is damaged"


def say_wrong(path: str, found: list[str], wanted: str, prefix: str = "--") -> str:
    """One line about a file in which something else stands than what is wanted."""
    remedies = [REMEDIES[wanted, kind] for kind in found if (wanted, kind) in REMEDIES]
    if UTF16 in found:
        remedies = ["save it as UTF-8"]
    elif MISPLACED in found:
        remedies = ["take away what stands before it"]
    remedy = f" ({remedies[0].format(prefix=prefix)})" if remedies else ""
    form = "" if wanted == PFX else " in PEM form"
    return f"{path} holds {' and '.join(dict.fromkeys(found))}, not {wanted}{form}{remedy}"


def look_into(path: str) -> list[str]:
    """What a file of certificates or keys holds: the PEM blocks in it, or the one thing that it is otherwise."""
    if not os.path.isfile(path):
        return ["what openssl cannot use"]  # a pipe, which is empty by now
    with open(path, "rb") as file:
        content = file.read(1 << 20)
    if not content.strip():
        return [NOTHING]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"-\0-\0" in content:
        return [UTF16]
    labels = re.findall(r"^-----BEGIN ([A-Z0-9 ]+)-----", content.decode("latin-1"), re.MULTILINE)
    if labels:
        locked = b"\nProc-Type: 4,ENCRYPTED" in content
        kinds = [PEM_LABELS.get(label, f"a PEM block named {label}") for label in labels if "PARAMETERS" not in label]
        return [LOCKED if kind == KEY and locked else kind for kind in kinds] or [OTHER]
    return [MISPLACED if b"-----BEGIN " in content else _look_into_der(content)]


def _look_into_der(content: bytes) -> str:
    """Told by how its first elements begin: each is a tag, a length of one or more bytes, and what it holds."""
    first = content[_header_size(content) :]
    second = first[_header_size(first) :]
    if content[0] != 0x30 or first[:1] not in (b"\x02", b"\x30"):
        return OTHER
    if first[0] == 0x02:  # a version
        return PFX if first[:3] == b"\x02\x01\x03" else DER_KEY
    if second[:1] == b"\x06":  # the name of a cipher
        return DER_KEY
    return CSR if second[:3] == b"\x02\x01\x00" else DER_CERT


def _header_size(element: bytes) -> int:
    return 2 + (element[1] & 0x7F if element[1:2] > b"\x80" else 0)


SUBJECT_ALT_NAME = b"\x06\x03\x55\x1d\x11"
"""The object identifier 2.5.29.17 in DER form, as it begins that extension."""
DNS_NAME, EXTENSIONS = 0x82, 0xA3
"""Tags in DER: [2] of a GeneralName, and [3] of a TBSCertificate (RFC 5280, 4.1 and 4.2.1.6)."""


def host_names(certificate: bytes) -> list[str]:
    """The host names in a certificate in DER form, those with ``*`` among them.  (Python shows them of certificates
    alone that are verified, and there one that has expired is none.)"""
    names = list[str]()
    [(_, whole)] = _elements(certificate)
    for tag, field in _elements(next(content for _, content in _elements(whole))):
        for _, extension in _elements(next(_elements(field))[1]) if tag == EXTENSIONS else ():
            if extension.startswith(SUBJECT_ALT_NAME):
                *_, (_, value) = _elements(extension)  # behind it may stand that it is critical
                general = _elements(next(_elements(value))[1])
                names += [name.decode("ascii", "replace") for kind, name in general if kind == DNS_NAME]
    return names


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements one after the other, each with its tag."""
    while content:
        size = _header_size(content)
        length = int.from_bytes(content[2:size], "big") if size > 2 else content[1]
        yield content[0], content[size : size + length]
        content = content[size + length :]


def _place_of_own(cert: str, key_file: str, password: bytes) -> int:
    """Which certificate of a file the key belongs to; 0 is none."""
    with open(cert, "rb") as file:
        blocks = re.findall(rb"^-----BEGIN CERTIFICATE-----.*?^-----END CERTIFICATE-----", file.read(), re.M | re.S)
    for number, block in enumerate(blocks, 1):
        with hidden_file(block + b"\n") as path, contextlib.suppress(ssl.SSLError):
            new_context(True).load_cert_chain(path, key_file, password=password)
            return number
    return 0
