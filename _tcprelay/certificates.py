"""TLS contexts with certificates, PFX files, self-signed certificates, pins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from .openssl import CA, CERT, PFX, explain_pair, hidden_file, look_into, new_context, run_openssl, say_wrong
from .options import Options
from .state import IDENTITY, private_file
from .streams import Stream
from .system import hashlib, ssl
from .text import random_id, say_error, shown
from .tls import TLSStream


def make_context(
    options: Options, server_side: bool, cert: str = "", key: str = "", pfx: str = "", prefix: str = "--"
) -> ssl.SSLContext:
    """A TLS context with the certificate from PEM files or a PFX file, if there is one; `options` say the rest.

    `prefix` is what the options that name the files begin with.  Raises `OSError` for files that cannot be read,
    `ValueError` for ones that do not hold what they should.
    """
    context = new_context(server_side)
    wanted = ssl.TLSVersion.TLSv1_3 if options.tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.minimum_version = max(context.minimum_version, wanted)  # the system's policy may ask for more
    passphrase = options.read_passphrase()
    if pfx:
        load_pfx(context, pfx, passphrase)
    elif cert:
        load_pair(context, cert, key, passphrase, prefix)
    return context


def load_pair(context: ssl.SSLContext, cert: str, key: str, passphrase: str, prefix: str = "--") -> None:
    """Load a certificate, its chain and its key from PEM files.  Raises `OSError` and `ValueError`."""
    for path in (cert, key):
        if path:
            check_readable(path)  # OpenSSL's own error does not name the file
    # Always a password: without one OpenSSL would ask on the terminal.
    password = passphrase.encode("utf-8", "surrogateescape")
    try:
        context.load_cert_chain(cert, key or None, password=password)
    except ssl.SSLError as error:
        raise ValueError(explain_pair(cert, key, password, prefix, error)) from error


def check_readable(path: str) -> None:
    """Whether a file can be read by this user.  Raises `OSError` that names it, and says what helps where it may not
    be."""
    try:
        with open(path, "rb"):
            pass
    except PermissionError as error:
        raise PermissionError(error.errno, NOT_OURS, path) from error


NOT_OURS = (
    "permission denied; where root alone may read it, as with what certbot keeps, have a deploy hook copy it for the "
    "user whom this runs as, or systemd hand it over (LoadCredential=)"
)


def trust(context: ssl.SSLContext, ca_file: str) -> None:
    """Have the peer's certificate verified against a file of CA certificates, or those of the system.

    Raises `OSError` and `ValueError`.
    """
    if not ca_file:
        context.load_default_certs()
        return
    with open(ca_file, "rb"):
        pass
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        found = look_into(ca_file)
        raise ValueError(f"{ca_file} is damaged" if CERT in found else say_wrong(ca_file, found, CA)) from error


class Offers:
    """TLS contexts for services, by the protocol that each offers (ALPN): Python has that be a matter of the context.

    Parameters: what makes one, from files, which raises `OSError` and `ValueError`.  The one that offers nothing is
    made at once; another when it is needed first, and kept, up to `MOST`: a relay server's service clients name them.
    """

    MOST = 16

    def __init__(self, make: Callable[[], ssl.SSLContext]) -> None:
        self._make = make
        self._made = {"": make()}

    def of(self, protocol: str) -> ssl.SSLContext:
        """The context that offers this one, "" being none.  Raises `OSError` and `ValueError`."""
        context = self._made.get(protocol)
        if context is None:
            context = self._make()
            context.set_alpn_protocols([protocol])
            if len(self._made) < self.MOST:
                self._made[protocol] = context
        return context


def load_pfx(context: ssl.SSLContext, path: str, passphrase: str) -> None:
    """Load certificate, key and chain from a PFX (PKCS #12) file, through the ``openssl`` command.

    The key leaves that command encrypted under a random password, and passphrases go through a pipe: neither
    is on the disk or in an argument list.  Raises `OSError` and `ValueError` that say what to do.
    """
    check_readable(path)
    if len(passphrase) > 1024 or "\n" in passphrase:
        raise ValueError("a passphrase has one line of at most 1024 characters")
    password = random_id(32)
    pem = b""
    for what in (["-clcerts"], ["-cacerts", "-nokeys"]):
        pem += _openssl_pkcs12(path, what, passphrase, password)
    if b"PRIVATE KEY-----" not in pem:
        raise ValueError(f"{path} holds no private key: export it together with its key")
    if b"BEGIN CERTIFICATE" not in pem:
        raise ValueError(f"{path} holds no certificate")
    with hidden_file(pem) as pem_path:
        try:
            context.load_cert_chain(pem_path, password=password)
        except ssl.SSLError as error:
            raise ValueError(f"cannot use the certificate in {path}: {say_error(error)}") from error


def _openssl_pkcs12(path: str, what: list[str], passphrase: str, password: str) -> bytes:
    command = ["pkcs12", "-in", path, *what]
    instead = "make PEM files where it is (openssl pkcs12 -in FILE -out FILE.pem), and give --cert and --key"
    answer = run_openssl(command, passphrase, password, instead=instead)
    if answer.returncode and b"unsupported" in answer.stderr.lower():
        # RC2 and 3DES, as older OpenSSL and Windows write them, are in a provider of their own since OpenSSL 3.
        answer = run_openssl([*command, "-legacy"], passphrase, password, instead=instead)
    said = answer.stderr.lower()
    if answer.returncode and (b"mac verify" in said or b"invalid password" in said or b"bad decrypt" in said):
        raise ValueError(f"the passphrase of {path} is wrong: give it with --passphrase-file or --passphrase")
    if answer.returncode:
        found = look_into(path)
        raise ValueError(f"{path} cannot be read by openssl" if found == [PFX] else say_wrong(path, found, PFX))
    return answer.stdout


def make_self_signed(directory: str) -> str:
    """The path of a self-signed certificate with its key in `directory`, made there if it is not yet.

    Raises `OSError` and `ValueError`, as `private_file` does.
    """

    def make() -> bytes:
        made = run_openssl([
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "36500",
            "-subj", "/CN=tcprelay", "-addext", "subjectAltName=DNS:tcprelay", "-keyout", "-", "-out", "-",
        ], instead="make a certificate elsewhere (openssl req -x509 …), and give --cert and --key")  # fmt: skip
        if made.returncode:
            raise ValueError(f"openssl cannot make a certificate: {shown(made.stderr.decode(errors='replace'))}")
        return made.stdout

    return private_file(os.path.join(directory, IDENTITY), make)


def pin_of(certificate: bytes) -> str:
    """The pin of a certificate in DER form: sha256: and the hexadecimal digest of all of it."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


def shown_certificate(context: ssl.SSLContext) -> str:
    """The pin of the certificate that a server with this context shows.  As `ask_for_certificate`."""
    return pin_of(ask_for_certificate(context))


def ask_for_certificate(context: ssl.SSLContext) -> bytes:
    """The certificate that a server with this context shows, in DER form.

    It is asked for in memory, as a client would: a file may hold several, and only OpenSSL knows which one it takes.
    To be called before the context asks for certificates itself.  Raises `ssl.SSLError`.
    """
    asking = new_context(False)
    asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):  # two round trips with TLS 1.2
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return client.getpeercert(binary_form=True) or b""


def certificate_name(stream: Stream) -> str:
    """The common name, or the first other name, in the verified certificate of a TLS peer, as it stands there; "" where
    there is none."""
    certificate = stream.tls.getpeercert() if isinstance(stream, TLSStream) else None
    if not certificate:
        return ""
    subject: Any = certificate.get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    others: Any = certificate.get("subjectAltName", ())
    return str((names + [value for _, value in others] or [""])[0])
