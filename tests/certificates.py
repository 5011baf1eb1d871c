"""Certificates for the tests, made with the openssl command once a session."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


def openssl(directory: Path, *words: str, data: bytes = b"") -> bytes:
    """Run openssl in a directory; fails with what it said."""
    done = subprocess.run(["openssl", *words], cwd=directory, input=data, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def tls_context(server_side: bool = False, cert: str = "", key: str = "", ca: str = "") -> ssl.SSLContext:
    """The TLS context of a test's own end, with these files; a client's without `ca` accepts every certificate.

    All tests' contexts are made here: Debian 12's Python has them take a cut for an end otherwise.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if not server_side:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if ca else ssl.CERT_NONE
    if ca:
        context.load_verify_locations(ca)
    if cert:
        context.load_cert_chain(cert, key or None)
    return context


EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
RSA = ("-newkey", "rsa:2048", "-nodes")


@dataclass(frozen=True)
class Certificates:
    """A directory with two CAs and what they have signed: NAME.pem and NAME.key."""

    directory: Path

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def make_ca(self, name: str) -> None:
        words = ("req", "-x509", *EC, "-days", "30", "-subj", f"/CN={name}", "-keyout", f"{name}.key")
        openssl(self.directory, *words, "-out", f"{name}.pem")

    def make(self, name: str, ca: str, san: str = "", days: tuple[str, ...] = ("-days", "30"), kind=EC) -> None:  # type: ignore[no-untyped-def]
        """A certificate named `name`, signed by `ca`."""
        request = ("req", *kind, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(self.directory, *request)
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={san}\n" if san else "keyUsage=digitalSignature\n")
        openssl(
            self.directory, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key",
            "-CAcreateserial", *days, "-extfile", f"{name}.ext", "-out", f"{name}.pem",
        )  # fmt: skip

    def make_pfx(self, name: str, of: str, passphrase: str, *words: str) -> str:
        """NAME.pfx with the certificate and key `of`, as `words` say."""
        openssl(
            self.directory, "pkcs12", "-export", "-inkey", f"{of}.key", "-in", f"{of}.pem",
            "-passout", f"pass:{passphrase}", *words, "-out", f"{name}.pfx",
        )  # fmt: skip
        return self.path(f"{name}.pfx")


def make_all(directory: Path) -> Certificates:
    made = Certificates(directory)
    for ca in ("ca", "foreign-ca"):
        made.make_ca(ca)
    here = "DNS:localhost,IP:127.0.0.1"
    made.make("server", "ca", here)
    made.make("rsa", "ca", here, kind=RSA)
    made.make("elsewhere", "ca", "DNS:elsewhere.example")
    made.make("client", "ca")
    made.make("foreign", "foreign-ca", here)
    try:
        made.make("expired", "ca", here, ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z"))
    except AssertionError:  # OpenSSL before 3.4, which has other means
        made.make("expired", "ca", here, ("-days", "-1"))
    return made
