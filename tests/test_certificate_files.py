"""Files of certificates and keys that are not what they should be: one line says what they are and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from _tcprelay.certificates import load_pair, load_pfx, trust
from tcprelay import RelayServer

from .certificates import Certificates, openssl, tls_context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Path:
    """A directory with a good pair, server.pem and server.key, and everything that it is taken for."""
    path = tmp_path_factory.mktemp("files")
    good = {name: Path(certificates.path(name)).read_bytes() for name in ("server.pem", "server.key", "ca.pem")}
    made = {
        **good,
        "other.key": Path(certificates.path("client.key")).read_bytes(),
        "rsa.key": Path(certificates.path("rsa.key")).read_bytes(),
        "server.csr": Path(certificates.path("server.csr")).read_bytes(),
        "both.pem": good["server.key"] + good["server.pem"],
        "reversed.pem": good["ca.pem"] + good["server.pem"],
        "empty": b"",
        "blank": b" \r\n\n",
        "text": b"Dear administrator,\n",
        "utf-16.pem": good["server.pem"].decode().encode("utf-16"),
        "utf-16-le.pem": good["server.pem"].decode().encode("utf-16-le"),
        "bom.pem": b"\xef\xbb\xbf" + good["server.pem"],
        "indented.key": b"".join(b"  " + line for line in good["server.key"].splitlines(True)),
        "cut.pem": good["server.pem"][:300],
        "one-line.pem": good["server.pem"].replace(b"\n", b"\\n"),
        "damaged.key": good["server.key"].replace(b"\nM", b"\nN", 1),
    }
    for name, content in made.items():
        (path / name).write_bytes(content)
    locked = openssl(path, "pkey", "-in", "server.key", "-aes256", "-passout", "pass:right")
    (path / "locked.key").write_bytes(locked)
    traditional = "ec", "-in", "server.key", "-aes256", "-passout", "pass:right", "-out", "locked-old.key"
    openssl(path, *traditional)
    openssl(path, "x509", "-in", "server.pem", "-outform", "DER", "-out", "cert.der")
    openssl(path, "pkey", "-in", "server.key", "-outform", "DER", "-out", "key.der")
    openssl(path, "ec", "-in", "server.key", "-outform", "DER", "-out", "old-key.der")
    openssl(path, "pkcs8", "-topk8", "-in", "server.key", "-outform", "DER", "-passout", "pass:x", "-out", "locked.der")
    openssl(path, "req", "-in", "server.csr", "-outform", "DER", "-out", "csr.der")
    openssl(path, "pkey", "-in", "server.key", "-pubout", "-out", "public.key")
    openssl(path, "crl2pkcs7", "-nocrl", "-certfile", "server.pem", "-out", "bundle.p7b")
    pair = "-inkey", "server.key", "-in", "server.pem", "-passout", "pass:right"
    openssl(path, "pkcs12", "-export", *pair, "-out", "server.pfx")
    openssl(path, "pkcs12", "-export", *pair, "-nokeys", "-out", "no-key.pfx")
    openssl(path, "pkcs12", "-export", *pair, "-nocerts", "-out", "no-certificate.pfx")
    (path / "cut.pfx").write_bytes((path / "server.pfx").read_bytes()[:500])
    weak = "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=weak", "-out", "weak.pem"
    openssl(path, *weak, "-keyout", "weak.key")
    (path / "ssh.key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n")
    return path


@dataclass(frozen=True)
class Case:
    """What is given, by the names of the files above, and the line that comes; {} is the directory."""

    line: str
    cert: str = "server.pem"
    key: str = "server.key"
    more: tuple[tuple[str, str], ...] = ()


PEM = [
    # The two files do not belong together.
    *(
        Case(f"the private key in {{}}/{key} is another one than that of the certificate in {{}}/server.pem", key=key)
        for key in ("other.key", "rsa.key")
    ),
    Case(
        "{}/server.key holds the private key and {}/server.pem the certificate: --cert and --key are exchanged",
        "server.key", "server.pem",
    ),
    Case(
        "{}/locked.key holds the private key and {}/server.pem the certificate: --cert and --key are exchanged",
        "locked.key", "server.pem",
    ),
    Case(
        "{}/reversed.pem is in the wrong order: the certificate of the key, number 2 in it, must be the first",
        "reversed.pem",
    ),
    Case("{}/server.pem holds a certificate without its private key: give that with --key", key=""),
    # Something else than a certificate.
    Case("{}/server.key holds a private key, not a certificate in PEM form", "server.key"),
    Case("{}/server.key holds a private key, not a certificate in PEM form", "server.key", ""),
    *(
        Case(
            f"{{}}/{cert} holds a certificate request (CSR), not a certificate in PEM form "
            "(a CA makes the certificate of it)", cert,
        )
        for cert in ("server.csr", "csr.der")
    ),
    Case(
        "{}/cert.der holds a certificate in DER form, not a certificate in PEM form "
        "(openssl x509 -inform DER -in FILE -out FILE.pem)",
        "cert.der",
    ),
    Case("{}/key.der holds a private key in DER form, not a certificate in PEM form", "key.der"),
    Case("{}/server.pfx holds a PFX file, not a certificate in PEM form (give it with --pfx)", "server.pfx"),
    Case(
        "{}/bundle.p7b holds a PKCS #7 bundle, not a certificate in PEM form "
        "(openssl pkcs7 -print_certs -in FILE -out FILE.pem)",
        "bundle.p7b",
    ),
    Case("{}/public.key holds a public key, not a certificate in PEM form", "public.key"),
    Case("{}/empty holds nothing, not a certificate in PEM form", "empty"),
    Case("{}/blank holds nothing, not a certificate in PEM form", "blank"),
    Case("{}/text holds neither PEM nor DER, not a certificate in PEM form", "text"),
    Case("{}/utf-16.pem holds UTF-16 text, not a certificate in PEM form (save it as UTF-8)", "utf-16.pem"),
    Case("{}/utf-16-le.pem holds UTF-16 text, not a certificate in PEM form (save it as UTF-8)", "utf-16-le.pem"),
    Case("the certificate in {}/cut.pem is damaged", "cut.pem"),
    Case("the certificate in {}/one-line.pem is damaged", "one-line.pem"),
    Case("{}/weak.pem is too weak for this system's openssl: TLS: ee key too small", "weak.pem", "weak.key"),
    # Something else than a private key.
    Case("{}/ca.pem holds a certificate, not a private key in PEM form", key="ca.pem"),
    Case("{}/server.csr holds a certificate request (CSR), not a private key in PEM form", key="server.csr"),
    Case("{}/public.key holds a public key, not a private key in PEM form", key="public.key"),
    Case(
        "{}/key.der holds a private key in DER form, not a private key in PEM form "
        "(openssl pkey -inform DER -in FILE -out FILE.pem)",
        key="key.der",
    ),
    Case(
        "{}/ssh.key holds a private key in OpenSSH's form, not a private key in PEM form "
        "(make a copy and change it by ssh-keygen -p -m PEM -f COPY)",
        key="ssh.key",
    ),
    Case("{}/empty holds nothing, not a private key in PEM form", key="empty"),
    Case("{}/text holds neither PEM nor DER, not a private key in PEM form", key="text"),
    Case(
        "{}/indented.key holds -----BEGIN within a line, not a private key in PEM form "
        "(take away what stands before it)",
        key="indented.key",
    ),
    Case("the private key in {}/damaged.key is damaged", key="damaged.key"),
    # Passphrases.
    *(
        Case(line.replace("KEY", key), key=key, more=more)
        for key in ("locked.key", "locked-old.key")
        for line, more in (
            ("the private key in {}/KEY is encrypted: give its passphrase with --passphrase-file", ()),
            (
                "the passphrase of {}/KEY is wrong: give it with --passphrase-file or --passphrase",
                (("passphrase", "wrong"),),
            ),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", PEM, ids=lambda case: f"{case.cert}-{case.key}")
def test_pem_files(files: Path, case: Case) -> None:
    """Each is a `ValueError` with one line; nobody is asked for a passphrase on the terminal."""
    names = {"cert": case.cert, "key": case.key}
    options: dict[str, Any] = {name: str(files / value) for name, value in names.items() if value}
    with pytest.raises(ValueError) as caught:
        RelayServer(0, 0, **{"tls": "relay", **options, **dict(case.more)})
    assert str(caught.value) == case.line.replace("{}", str(files))


@pytest.mark.parametrize(
    ("name", "passphrase", "line"),
    [
        ("server.pfx", "wrong", "the passphrase of {} is wrong: give it with --passphrase-file or --passphrase"),
        ("server.pfx", "", "the passphrase of {} is wrong: give it with --passphrase-file or --passphrase"),
        ("no-key.pfx", "right", "{} holds no private key: export it together with its key"),
        ("no-certificate.pfx", "right", "{} holds no certificate"),
        ("cut.pfx", "right", "{} cannot be read by openssl"),
        ("server.pem", "", "{} holds a certificate, not a PFX file (give PEM files with --cert and --key)"),
        ("server.key", "", "{} holds a private key, not a PFX file (give PEM files with --cert and --key)"),
        (
            "both.pem",
            "",
            "{} holds a private key and a certificate, not a PFX file (give PEM files with --cert and --key)",
        ),
        ("cert.der", "", "{} holds a certificate in DER form, not a PFX file"),
        ("empty", "", "{} holds nothing, not a PFX file"),
    ],
)
def test_pfx_files(files: Path, name: str, passphrase: str, line: str) -> None:
    """Likewise for --pfx."""
    with pytest.raises(ValueError) as caught:
        load_pfx(tls_context(True), str(files / name), passphrase)
    assert str(caught.value) == line.format(files / name)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("server.key", "{} holds a private key, not CA certificates in PEM form"),
        ("cert.der", "{} holds a certificate in DER form, not CA certificates in PEM form "
         "(openssl x509 -inform DER -in FILE -out FILE.pem)"),
        ("server.csr", "{} holds a certificate request (CSR), not CA certificates in PEM form"),
        ("server.pfx", "{} holds a PFX file, not CA certificates in PEM form"),
        ("bundle.p7b", "{} holds a PKCS #7 bundle, not CA certificates in PEM form "
         "(openssl pkcs7 -print_certs -in FILE -out FILE.pem)"),
        ("utf-16.pem", "{} holds UTF-16 text, not CA certificates in PEM form (save it as UTF-8)"),
        ("empty", "{} holds nothing, not CA certificates in PEM form"),
        ("cut.pem", "{} is damaged"),
    ],
)  # fmt: skip
def test_ca_files(files: Path, name: str, line: str) -> None:
    """Likewise for --ca-file."""
    with pytest.raises(ValueError) as caught:
        trust(tls_context(), str(files / name))
    assert str(caught.value) == line.format(files / name)


def test_the_service_s_own_files(files: Path) -> None:
    """The line names the options that were used."""
    own: dict[str, Any] = {"cert": str(files / "server.pem"), "key": str(files / "server.key")}
    service: dict[str, Any] = {"service_cert": str(files / "server.key"), "service_key": str(files / "server.pem")}
    with pytest.raises(ValueError, match="--service-cert and --service-key are exchanged"):
        RelayServer(0, 0, tls="both", **own, **service)


def test_files_that_are_missing_or_closed(files: Path, tmp_path: Path) -> None:
    """The system's error, with the file's name."""
    with pytest.raises(FileNotFoundError) as caught:
        RelayServer(0, 0, tls="relay", cert=str(tmp_path / "none.pem"))
    assert caught.value.filename == str(tmp_path / "none.pem")
    with pytest.raises(IsADirectoryError) as directory:
        RelayServer(0, 0, tls="relay", cert=str(files / "server.pem"), key=str(tmp_path))
    assert directory.value.filename == str(tmp_path)


def test_good_files_in_unusual_forms(files: Path) -> None:
    """Both in one file in either order, an encrypted key, old and new, Windows' line ends, a byte order mark."""
    (files / "crlf.pem").write_bytes((files / "server.pem").read_bytes().replace(b"\n", b"\r\n"))
    for cert, key in (
        ("both.pem", ""), ("server.pem", "both.pem"), ("server.pem", "locked.key"), ("server.pem", "locked-old.key"),
        ("crlf.pem", "server.key"), ("bom.pem", "server.key"),
    ):  # fmt: skip
        load_pair(tls_context(True), str(files / cert), key and str(files / key), "right")
