"""A byte stream over TLS.

As with a plain one, a thread receives and another sends; here both also work on the TLS state, under a lock that is not
held while the socket is used."""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from .addresses import name_in_certificate
from .hello import Faces, HelloReader
from .streams import BULK, Stream
from .system import ignore_oserror, ssl
from .text import shown
from .waiting import Deadline, Stop, wait_for

SMALL_TLS_BUFFER = 4096
"""What a TLS connection takes from its socket at once; filled, it grows by eight times and by eight times again."""
LARGE_TLS_BUFFER = 1 << 18
"""The same for bulk traffic where TLS is in between: it is twice as fast as 16 KiB."""
MAX_ANSWERS = 65536
"""Bytes of answers that a peer may make TLS prepare while there is nothing else to send."""
MAX_FRUITLESS = 65536
"""Bytes of TLS messages without data (KeyUpdate) in a row: more than a record, which may come in pieces."""
SMALL_READS = 4
"""So many small reads in a row end bulk traffic."""
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "UNEXPECTED_MESSAGE", "NO_PROTOCOLS_AVAILABLE")
"""OpenSSL's reasons for a peer whose first bytes are no TLS handshake."""
ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""A TLS alert before the handshake: fatal, access_denied (RFC 8446, 6)."""
NO_APPLICATION_PROTOCOL = b"\x15\x03\x03\x00\x02\x02\x78"
"""Another one: no_application_protocol (RFC 7301, 3.2)."""


def tls_fault(error: ssl.SSLError) -> OSError:
    """What the receiver of a TLS stream is to be told: `error`, or that the stream was cut off."""
    # Only Pythons from 3.10.11 and 3.11.3 on have SSLEOFError for it with OpenSSL 3.
    cut = isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING"
    return ConnectionResetError("cut off without TLS close_notify") if cut else error


class TLSStream(Stream):
    """A TLS connection over one TCP socket: `ssl.SSLObject` between two memory BIOs.

    Two threads on one `ssl.SSLSocket` crash, and it cannot end one direction; so the TLS state is worked on
    under `_tls_lock`, and bytes go to and from the socket outside of it:

        receive   socket ─▶ _incoming ─▶ SSLObject.read ─▶ caller        one thread
        send      caller ─▶ SSLObject.write ─▶ _outgoing ─▶ socket       one thread, which holds _send_lock

    What reading makes the TLS state want to send (answers to KeyUpdate) stays in `_outgoing` for the next
    send, so that a receiver never waits for a peer that does not read; its amount is bounded.
    """

    spliceable = False
    secure = True

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        context: ssl.SSLContext,
        peer: Any = None,
        server_hostname: str | None = None,
        server_side: bool = False,
        faces: Faces | None = None,
    ) -> None:
        super().__init__(sock, name, peer)
        self._faces = None if faces is None or faces.is_plain else faces  # where its first message decides what it gets
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self.tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_side,
                server_hostname=server_hostname and name_in_certificate(server_hostname),
            )  # fmt: skip
        except ValueError as error:
            raise OSError(f"{shown(server_hostname)} cannot be the name in a certificate") from error
        self._tls_lock = threading.Lock()  # over tls, both BIOs, _stash, _error, _answers
        self._send_lock = threading.Lock()  # keeps records in order on their way from _outgoing to the socket
        self._unsent = b""  # taken from _outgoing, not yet by the socket; under _send_lock
        self._stash = bytearray()  # decrypted when the sending direction was ended
        self._error: OSError | None = None
        self._answers = 0  # bytes in _outgoing that receiving has put there
        self._fruitless = 0  # encrypted bytes since the last decrypted one
        self._drained = False  # nothing can be decrypted before the socket has given more
        self._peer_ended = False  # it has sent close_notify
        self._raw = memoryview(bytearray(SMALL_TLS_BUFFER))
        self._small_reads = 0

    def calls(self) -> tuple[Callable[[memoryview], int], Callable[[memoryview], int]]:
        return self.recv_into, self.send

    def handshake(self, deadline: Deadline, stop: Stop | None = None) -> None:
        """Shake hands.  Raises `ssl.SSLError` (an `OSError`), `TimeoutError`, `EOFError` and `Stopping`, and
        `ConnectionError` on a service port, where there is no protocol that both sides speak."""
        if self._faces is not None:
            self._heed(self._faces, deadline, stop)
        while True:
            try:
                with self._tls_lock:
                    self.tls.do_handshake()
                    self._fruitless = 0
                self.protocol = self.tls.selected_alpn_protocol() or ""
                return
            except ssl.SSLWantReadError:
                pass
            finally:
                self._flush_records()  # also the alert that says why it failed
            wait_for(self.fd, select.POLLIN, deadline, stop)
            count = self.sock.recv_into(self._raw, 0, socket.MSG_DONTWAIT)
            if len(self.beginning) < 16:
                self.beginning += bytes(self._raw[: min(count, 16)])
            with self._tls_lock:
                self._feed(count)
            if count == 0:
                raise EOFError("the connection was closed during the TLS handshake")

    def _heed(self, faces: Faces, deadline: Deadline, stop: Stop | None) -> None:
        """Read the client's first message, for what it asks for, and have TLS begin with it.  Raises as `handshake`."""
        reader, hello = HelloReader(), None
        while hello is None:
            wait_for(self.fd, select.POLLIN, deadline, stop)
            count = self.sock.recv_into(self._raw, 0, socket.MSG_DONTWAIT)
            if count == 0:
                raise EOFError("the connection was closed during the TLS handshake")
            if len(self.beginning) < 16:
                self.beginning += bytes(self._raw[: min(count, 16)])
            self._incoming.write(self._raw[:count])
            hello = reader.feed(self._raw[:count])
        if not faces.have_in_common(hello):
            ignore_oserror(self.sock.send, NO_APPLICATION_PROTOCOL, socket.MSG_DONTWAIT)
            self.close_normally()  # an RST might come before it has been read
            wanted, spoken = shown(", ".join(hello.protocols)), ", ".join(faces.protocols)
            raise ConnectionError(f"it would speak {wanted}, and --service-alpn has {spoken}")
        if (context := faces.choose(hello)) is not faces.first:
            self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def recv_into(self, view: memoryview) -> int:
        count = None if self._drained else self._decrypt(view)
        while count is None:
            raw = self._raw
            if len(raw) > self.room:
                raw = raw[: self.room]
            count = self._decrypt(view, self.sock.recv_into(raw))
        return count

    def believe_end(self) -> int:
        return 0  # it was a message

    def recv_now(self, view: memoryview) -> int | None:
        count = None if self._drained else self._decrypt(view)
        try:
            while count is None:
                count = self._decrypt(view, self.sock.recv_into(self._raw, 0, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        return count

    def holds_bytes(self) -> bool:
        return not self._drained

    def send(self, data: bytes | bytearray | memoryview, flags: int = 0) -> int:
        with self._send_lock:
            with self._tls_lock:
                if data:
                    self.tls.write(data)
                self._unsent, self._answers = self._unsent + self._outgoing.read(), 0
            while not self._send_records(0):
                self.keep_trying()
        return len(data)

    def send_now(self, data: bytearray, end_follows: bool = False) -> bool:
        if data:
            with self._tls_lock:
                self.tls.write(data)
            data.clear()
        return self._flush_records(socket.MSG_DONTWAIT)

    def end(self, wait: bool = True) -> bool:
        """Send close_notify and FIN.  What the peer has sent before is kept: `unwrap` would drop it."""
        with self._tls_lock:
            piece = memoryview(bytearray(BULK))
            try:
                while self._error is None and (count := self._read(piece)):
                    self._stash += piece[:count]
                    self._drained = False
                self._peer_ended = self._error is None
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._peer_ended = True
            except ssl.SSLError as error:
                self._error, self._drained = tls_fault(error), False  # for the receiver, behind the stash
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                pass  # the peer's own close_notify comes when it comes
            peer_ended = self._peer_ended
        try:
            if not self._flush_records(0 if wait else socket.MSG_DONTWAIT):
                return False
            super().end()
        except OSError as error:
            # A peer that has sent close_notify may close without waiting for ours, which its system answers with an
            # RST.
            if not peer_ended or error.errno not in (errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET):
                raise
        return True

    def _decrypt(self, view: memoryview, received: int | None = None) -> int | None:
        """Decrypted bytes that are here already, now that so many encrypted ones were received: as many records as fit;
        0 at close_notify, ``None`` for none."""
        with self._tls_lock:
            if received is not None:
                self._feed(received)
            if self._stash:
                count = min(len(self._stash), len(view))
                view[:count] = self._stash[:count]
                del self._stash[:count]
                return count
            if self._error is not None:
                raise self._error
            have, before = 0, self._outgoing.pending
            try:
                while have < len(view):
                    count = self._read(view[have:] if have else view)
                    if not count:
                        self._peer_ended = True
                        break
                    have += count
                    if not self._incoming.pending and not self.tls.pending():
                        self._drained = True  # known without an error, which would cost as much as all the rest
                        break
            except ssl.SSLWantReadError:
                self._drained = True
                if not have and self._fruitless > MAX_FRUITLESS:
                    self._error = ConnectionResetError("the peer sends TLS messages without data again and again")
                    raise self._error from None
                return have or None
            except ssl.SSLZeroReturnError:
                self._peer_ended = True
                return have
            except ssl.SSLError as error:
                # Once only: after a fatal alert OpenSSL would call the next attempt a clean end.
                self._error = tls_fault(error)
                if not have:
                    raise self._error from None  # (an error that is its own cause would be a ring of its own)
            finally:
                self._answers += self._outgoing.pending - before
                if self._answers > MAX_ANSWERS:
                    self._error = ConnectionResetError("the peer makes TLS answer again and again")
                if self._error is not None:
                    self._drained = False
            return have

    def _read(self, view: memoryview) -> int:
        """At close_notify this returns 0, or raises `ssl.SSLZeroReturnError` where ours has been sent."""
        count: int = self.tls.read(len(view), view)  # type: ignore[assignment]
        if count:
            self._fruitless = 0
        return count

    def _feed(self, count: int) -> None:
        """Have TLS take the encrypted bytes that were received into `_raw`, none at their end; under the lock."""
        self._drained = False
        if count:
            self._fruitless += count
            self._incoming.write(self._raw[:count])
        else:
            self._incoming.write_eof()
        if count == len(self._raw) < LARGE_TLS_BUFFER:
            self._raw, self._small_reads = memoryview(bytearray(8 * count)), 0
        elif count < SMALL_TLS_BUFFER < len(self._raw):
            self._small_reads += 1
            if self._small_reads == SMALL_READS:
                self.rest()

    def rest(self) -> None:
        """Give back the memory that bulk traffic took; by the receiving thread, when there is none any more."""
        self._raw = memoryview(bytearray(SMALL_TLS_BUFFER))

    def close(self) -> None:
        super().close()
        # Its traceback leads back here: such a ring waits for the collector, with all that OpenSSL has allocated.
        self._error = None

    def _flush_records(self, flags: int = 0) -> bool:
        """Send what TLS has ready; True when nothing is left of it."""
        with self._send_lock:
            while True:
                if not self._unsent:
                    with self._tls_lock:
                        self._unsent, self._answers = self._outgoing.read(), 0
                if not self._unsent:
                    return True
                if not self._send_records(flags):
                    if flags:
                        return False
                    self.keep_trying()

    def _send_records(self, flags: int) -> bool:
        """Send the records that were taken from TLS; False where the socket does not take them now.  Under the lock."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent, flags) :]
        except BlockingIOError:
            return False
        return True
