"""TLS with services, and which protocol each is offered.

Where the relay server speaks TLS with service clients, and the relay client with the service, each end has a handshake
of its own, and what is agreed on in one must be what is spoken in the other.  The server says in START what it was, and
nothing else is offered to the service then: see `ClientOptions.protocol_for`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..certificates import Offers, make_context, trust
from ..client_options import ClientOptions
from ..runtime import Runtime
from ..streams import Stream
from ..system import ssl
from ..text import is_tls_error, say_error
from ..tls import NOT_TLS, TLSStream
from ..values import parse_protocol
from ..waiting import Deadline, Stop, Stopping
from .stock import Service

ONLY_AGREED = ("h2",)
"""Protocols that are spoken only where both sides have said so (RFC 9113, 3.2).  Of another one a service that chooses
none is believed to speak it: many do without ALPN, as those of HTTP/1.1 that are older."""


def load_offers(options: ClientOptions) -> Offers | None:
    """What TLS with services is made of, from the files that the options name; ``None`` where they speak none.  Raises
    `OSError` and `ValueError`."""

    def make() -> ssl.SSLContext:
        context = make_context(options, False)
        if options.service_insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            trust(context, options.service_ca_file)
        return context

    return Offers(make) if options.tls in ("both", "service") else None


OTHER_NAME = (62, 64)
"""What OpenSSL calls a certificate without the host name, or the address, that must stand in it
(X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH)."""


class Offer(NamedTuple):
    """How TLS with a service begins."""

    context: ssl.SSLContext
    name: str
    """That must stand in its certificate, and that it is asked for; "" for none."""
    protocol: str
    """That it is offered; "" for none."""


def choose_offer(runtime: Runtime[ClientOptions], service: Service, agreed: str) -> Offer | None:
    """How to begin with a service whose client has `agreed` with the relay server on a protocol, or on none; ``None``
    where it is to be without TLS.  Raises `ConnectionError` where that cannot be."""
    offers, options = runtime.credentials.services, runtime.options
    if offers is None:
        return None
    name = options.server_name(service.name) or service.target.host
    try:
        protocol = options.protocol_for(service.name, agreed and parse_protocol(agreed))
        context = offers.of(protocol)
    except ValueError as error:
        raise ConnectionError(str(error)) from error
    except FileNotFoundError as error:  # it was there when the others were made
        raise ConnectionError(f"{error.filename}: {say_error(error)}") from error
    if context.check_hostname and not name:
        raise ConnectionError("no host name is known that could stand in its certificate: give --service-server-name")
    return Offer(context, name, protocol)


def secure(plain: Stream, offer: Offer, deadline: Deadline, stop: Stop) -> Stream:
    """Shake hands with a service over a stream, which is another one then.  Raises `OSError`, `EOFError` and
    `Stopping`; then it is closed."""
    try:
        stream = TLSStream(plain.sock, plain.name, offer.context, server_hostname=offer.name or None)
        stream.reset_on_close()
        stream.handshake(deadline, stop)
        if offer.protocol in ONLY_AGREED and stream.protocol != offer.protocol:
            raise ConnectionError(UNSPOKEN.format(offer.protocol))
    except BaseException as error:
        plain.sock.close()
        if isinstance(error, (OSError, EOFError)) and not isinstance(error, Stopping):
            raise ConnectionError(explain_service(error, offer.protocol)) from error
        raise
    return stream


UNSPOKEN = "the service does not speak {}: leave that out of --service-alpn, here and on the relay server"


def explain_service(error: Exception, protocol: str) -> str:
    """What is wrong where a TLS handshake with a service has failed that was offered this protocol, and what to
    change."""
    if type(error) is ConnectionError:
        return str(error)
    if is_tls_error(error) and isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in OTHER_NAME:
            return f"{say_error(error)}; give --service-server-name, with a name that stands in it"
        return f"{say_error(error)}; give --service-ca-file, or --service-insecure"
    if is_tls_error(error) and error.reason in NOT_TLS:
        return "the service does not speak TLS: say --tls instead of --tls both"
    if "no application protocol" in say_error(error):  # some Pythons have no name for this reason
        wanting = "the service wants to agree on a protocol: give --service-alpn"
        return UNSPOKEN.format(protocol) if protocol else wanting
    return f"no TLS handshake with the service: {say_error(error)}; does it speak TLS?"
