"""What a relay server trusts, and what it shows: certificates, token, and the line to paste on the other side."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable
from typing import Any

from ..addresses import Endpoint, is_loopback
from ..certificates import make_context, make_self_signed, shown_certificate, trust
from ..options import read_secret
from ..server_options import ServerOptions
from ..rights import load_rights
from ..runtime import SHORTEST_TOKEN, Credentials, Runtime
from ..sockets import public_address
from ..state import other_states, private_file, state_directory
from ..streams import Stream
from ..system import ssl
from ..text import is_tls_error, random_id, say_error
from ..tls import NOT_TLS
from .clients import Refusal
from .faces import load_faces

REJECTIONS = ("TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
              "SSLV3_ALERT_CERTIFICATE_EXPIRED")  # fmt: skip
"""OpenSSL's reasons for a peer that says that it does not accept our certificate."""


def load_credentials(options: ServerOptions) -> Credentials:
    """Read what the options name; with TLS and without a certificate, what was made at the first start.

    Raises `OSError` and `ValueError`.
    """
    token, rights = options.read_token(), None
    if options.clients:
        services = [service.name for service in options.services]
        rights = load_rights(options.clients, services, options.client_ports, options.auth)
    on_links = options.tls in ("relay", "both") or options.auth
    on_services = options.tls in ("both", "service")
    if not (on_links or on_services):
        return Credentials(token, rights=rights)
    cert, key = options.cert, options.key
    if options.is_improvised:
        directory = options.state_dir or state_directory()
        cert, key = make_self_signed(directory), ""
        with open(cert) as file:
            certificate = file.read().partition("-----BEGIN CERTIFICATE")[1:]
        try:
            ssl.PEM_cert_to_DER_cert("".join(certificate))
        except ValueError:
            raise ValueError(
                f"{cert} is damaged: remove it, a new one is made, and relay clients need the new pin"
            ) from None
        open_to_all = (
            options.auth or options.clients or options.allow_unauthenticated or options.wire == "raw" or not on_links
        )
        if not (token or open_to_all):
            path = private_file(os.path.join(directory, "token"), lambda: random_id(32).encode() + b"\n")
            token = read_secret("--state-dir", path)
    links, shown = None, ""
    if on_links:
        links = make_context(options, True, cert, key, options.pfx)
        shown = shown_certificate(links)
    if links is not None and options.auth:
        trust(links, options.ca_file)
        links.verify_mode = ssl.CERT_REQUIRED
    ports, digests = load_faces(options, cert, key) if on_services else (None, ())
    return Credentials(token, links, ports, rights=rights, certificate=shown, service_certificates=digests)


def invitation(options: ServerOptions, credentials: Credentials, port: int, with_secrets: bool) -> str:
    """After a start with ``--tls`` alone: the command for the other side, which connects to this relay port.  With a
    clients file each has one of its own: see `enrolling.add_client`."""
    if not options.is_improvised or credentials.links is None or options.clients:
        return ""
    words, notes = list[str](), list[str]()
    if len(credentials.token) < SHORTEST_TOKEN:  # it does not vouch for the certificate
        words += ["--pin", credentials.certificate]
    else:
        notes.append(f"where the certificate shall be known by itself, add --pin {credentials.certificate}")
    copied = options.token_file
    if not copied and credentials.token and with_secrets:
        words += ["--token", credentials.token.decode(errors="replace")]
    elif not copied and credentials.token and not options.token:
        copied = os.path.join(options.state_dir or state_directory(), "token")
    if copied:
        words += ["--token-file", "FILE"]
        notes.append(f"FILE: a copy of {os.path.abspath(copied)}")
    kept = "certificate is" if options.token_file or options.token else "certificate and token are"
    notes.append(f"{kept} kept in {os.path.abspath(options.state_dir or state_directory())}")
    return say_line(options, credentials, port, words, notes)


def say_line(options: ServerOptions, credentials: Credentials, port: int, words: list[str], notes: list[str]) -> str:
    """The command for the other side, which connects to this relay port, with these further words, and notes below."""
    listens_at = "" if options.hostname in ("::", "0.0.0.0") else options.hostname
    host = options.public_host or listens_at or public_address()
    line = ["tcprelayc", str(Endpoint(host or "HOST", port))]
    line += ["PORT" if service.name == "default" else f"{service.name}=PORT" for service in options.services]
    line += [] if options.services else ["PORT@0"]
    line += ["--tls"] if credentials.links else []
    line += words
    line += ["--wire", "raw"] if options.wire == "raw" else []
    where = "HOST: a name or address at which this host is reached from there; --public-host sets it"
    what = "PORT: of the service on that side, or HOST:PORT, or unix:PATH"
    said = [f"({note})" for note in ([] if host else [where]) + [what] + notes]
    return "\n  ".join(["on the other side, run:", shlex.join(line), *said])


def warn_about_trust(runtime: Runtime[ServerOptions], addresses: Iterable[Any]) -> None:
    """Say at the start whether another certificate and token may be meant; and who can become a relay client, where
    neither a token nor certificates are asked for.  The relay port listens at these `addresses`, which are looked at
    where that counts."""
    options, log = runtime.options, runtime.log
    if options.is_improvised and not options.state_dir:
        for place in other_states(own := state_directory()):
            log.warning(
                "certificate and token are those in %s, and there are others in %s: relay clients that have the pin of "
                "those do not accept these; --state-dir says which", own, place,
            )  # fmt: skip
    if runtime.credentials.token or options.clients or options.auth:
        return
    if options.secret:
        log.warning("--secret crosses the wire readable: whoever can listen in can become a relay client")
    elif options.allow_unauthenticated:
        log.warning("--allow-unauthenticated: any host that reaches the relay port can become a relay client")
    else:
        level = logging.INFO if all(is_loopback(address) for address in addresses) else logging.WARNING
        log.log(level, "no token is set: links are accepted from this machine alone; others need --token-file")


def check_protected_mode(runtime: Runtime[ServerOptions], stream: Stream) -> None:
    """Without token and certificates only this machine may have links.  Raises `Refusal`.

    To be asked before a byte is read, and before TLS, whose handshake costs the most.
    """
    options = runtime.options
    guarded = runtime.credentials.token or options.clients or options.auth
    guarded = guarded or options.secret or options.allow_unauthenticated
    if not (guarded or is_loopback(stream.peer)):
        raise Refusal(
            "this relay server asks for neither a token nor certificates, so it accepts links from its own machine "
            "alone; set --token-file on both sides (or --allow-unauthenticated on the server)", "protected",
        )  # fmt: skip


def explain_tls(error: ssl.SSLError) -> str:
    """What a failed TLS handshake with a relay client means for whoever reads the log."""
    if error.reason in NOT_TLS:
        return "it does not speak TLS; if it is a tcprelayc, add --tls there"
    if error.reason in REJECTIONS:
        return "it does not accept this server's certificate; does it have the --pin, or the --ca-file, of another one?"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate, which --auth asks for; give the client --cert and --key, or --pfx"
    return say_error(error)


def explain_service_tls(error: Exception) -> str:
    """The same with a service client, of any error."""
    if is_tls_error(error) and error.reason in NOT_TLS:
        return "it does not speak TLS, and this service port does (--tls both); with --tls the links alone would"
    if isinstance(error, TimeoutError):
        return "it said nothing; does it speak TLS, as this service port does (--tls both)?"
    return say_error(error)
