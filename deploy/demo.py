"""A web service, a relay server and a relay client on this machine, to see what goes where.

    make demo      or      python3 deploy/demo.py [--once]

The two relays are real processes, with a token and on free ports.  The page is fetched through them, shown, and
everything stays until Ctrl-C (with --once: ends).  The exit status is 0 if the page came through as it was sent.

All that happens is put into one queue: log lines and ends of the relays, the fetched page, signals.  The main
thread waits for that queue and for nothing else, so an interrupt is noticed wherever it comes, and never in the
middle of a step.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import secrets
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_TIMEOUT = 20.0
"""Seconds until the page must be here, over everything that has to start for it."""
END_TIMEOUT = 10.0
"""Seconds that a relay has to end after SIGTERM; it gets one for its open connections."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>tcprelay demo</title>
<style>
body {{ margin: 12vh auto; max-width: 34em; padding: 0 1em; font: 1.1em/1.6 system-ui, sans-serif;
        color: #1d2733; background: #f6f8fa }}
main {{ padding: 1.5em 2em; background: #fff; border: 1px solid #d8dee4; border-radius: 12px }}
h1 {{ margin-top: 0; font-size: 1.4em; color: #0b6e4f }}
code {{ padding: .1em .3em; background: #eef1f4; border-radius: 4px }}
</style>
</head>
<body>
<main>
<h1>It came through the relay.</h1>
<p>This page was served by a web service on port <code>{port}</code> that only this machine can reach.</p>
<p>No port of a NAT was opened for it: a relay client dialled out.</p>
<p>The mark of this run is <code>{mark}</code>.</p>
</main>
</body>
</html>
"""

PICTURE = """\
    you ──▶ service port {service:5} ┐                                        ┌──▶ web service, port {web}
                               ├ relay server ◀══ links ══ relay client ┘
              relay port {relay:5} ┘

    web service    listens on port {web}; it stands for what is behind a NAT, where nobody can dial in
    relay server   listens on port {service} for you and on port {relay} for relay clients; its place is a public host
    relay client   listens nowhere: it dials the relay server, and the web service when you connect
"""


class Problem(Exception):
    """Why there is no page, in a sentence."""


class Interrupted(Exception):
    """Somebody wants the demo to end."""


Happenings = queue.SimpleQueue[tuple[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Show a web service through a relay, on this machine.")
    parser.add_argument("--once", action="store_true", help="end after the page has come through")
    once: bool = parser.parse_args().once
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    happenings: Happenings = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: happenings.put(("interrupt", None)))
    came_through = False
    try:
        with ExitStack() as stack:
            demo = Demo(happenings, stack)
            demo.start()
            demo.show_page()
            came_through = True
            if not once:
                demo.stay()
    except Interrupted:
        print("\nEnded.")
        return 0 if came_through else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads: let the interpreter's last flush succeed
        return 1
    except (Problem, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """The parties, and what happens between them."""

    def __init__(self, happenings: Happenings, stack: ExitStack) -> None:
        self._happenings = happenings
        self._stack = stack
        self._relays: dict[str, RelayProcess] = {}
        self._give_up_at: float | None = time.monotonic() + START_TIMEOUT
        self._page = b""
        self._url = ""

    def start(self) -> None:
        """Start the web service, the relay server and the relay client, and draw them."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tcprelay-demo-")))
        token = folder / "token"
        with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        web = WebService()
        self._stack.callback(web.end)
        self._page = web.page

        self._run(
            "relay server", "server", "--hostname", HOST, "--relay-port", "0", "--service-port", "0",
            "--token-file", str(token),
        )  # fmt: skip
        relay_port = port_of(self._wait("relay server", "Listening", service="")["address"])
        service_port = port_of(self._wait("relay server", "Listening", service="default")["address"])
        self._run(
            "relay client", "client", "--host", HOST, "--port", str(web.port), "--relay-host", HOST,
            "--relay-port", str(relay_port), "--token-file", str(token),
        )  # fmt: skip
        self._wait("relay client", "Published")
        self._url = f"http://{HOST}:{service_port}/"
        print(f"\n{PICTURE.format(service=service_port, relay=relay_port, web=web.port)}")

    def _run(self, name: str, *arguments: str) -> None:
        relay = RelayProcess(name, arguments, self._happenings)
        self._relays[name] = relay
        self._stack.callback(relay.end)

    def show_page(self) -> None:
        """Fetch the page through the relay and show it.  Raises `Problem` where it is not the one that was sent."""
        fetcher = threading.Thread(target=self._fetch, daemon=True)
        fetcher.start()
        page = self._next("page")
        fetcher.join()
        if isinstance(page, Exception):
            raise Problem(f"the page did not come through: {page}")
        if page != self._page:
            raise Problem(f"another page came through: {page[:80]!r}")
        print(f"{self._url} was fetched through the relay, {len(page)} bytes, every one as it was sent:\n")
        for line in text_of(page.decode()):
            print(f"    | {line}")
        print()

    def _fetch(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        result: bytes | Exception
        try:
            with opener.open(self._url, timeout=START_TIMEOUT) as answer:
                result = answer.read()
        except (OSError, http.client.HTTPException) as error:
            result = error
        self._happenings.put(("page", result))

    def stay(self) -> None:
        """Tell of each connection until somebody interrupts.  Raises `Interrupted`, and `Problem` if a relay ends."""
        print(f"Open {self._url} in a browser and watch; Ctrl-C ends it all.\n")
        self._give_up_at = None
        while True:
            entry = self._next("relay server")
            if entry.get("event") in ("ConnectionOpened", "ConnectionClosed", "ConnectionFailed"):
                print(f"    relay server: {entry['message']}")

    def _wait(self, name: str, event: str, **fields: str) -> dict[str, Any]:
        """The log line of a relay for an event, once it is there."""
        while True:
            entry: dict[str, Any] = self._next(name)
            if entry.get("event") == event and all(entry[key] == value for key, value in fields.items()):
                return entry

    def _next(self, wanted: str) -> Any:
        """What comes next from somebody.  Raises `Interrupted`, and `Problem` where it can no longer come."""
        while True:
            left = None if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())
            try:
                name, what = self._happenings.get(timeout=left)
            except queue.Empty:
                raise Problem(f"nothing from the {wanted} within {START_TIMEOUT:g} s") from None
            if name == "interrupt":
                raise Interrupted
            if what is None:
                raise self._explain_end(self._relays[name])
            if name == wanted:
                return what

    def _explain_end(self, relay: RelayProcess) -> Exception:
        """Why a relay has ended: Ctrl-C reaches the relays too, and their end may be known before it is."""
        deadline = time.monotonic() + 0.5
        while (left := deadline - time.monotonic()) > 0:
            try:
                if self._happenings.get(timeout=left)[0] == "interrupt":
                    return Interrupted()
            except queue.Empty:
                break
        return Problem(f"the {relay.name} has ended {relay.wait()}, and its last line was: {relay.last_words or '-'}")


class WebService(socketserver.ThreadingTCPServer):
    """One page, on a free port of this machine's loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), WebHandler)
        self.port: int = self.server_address[1]
        self.page = PAGE.format(port=self.port, mark=secrets.token_hex(4)).encode()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class WebHandler(BaseHTTPRequestHandler):
    """Answers every GET of ``/`` with the page."""

    server: WebService
    timeout = 10

    def do_GET(self) -> None:
        if self.path != "/":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.server.page)))
        self.end_headers()
        self.wfile.write(self.server.page)

    def log_message(self, *_: Any) -> None:
        pass


class RelayProcess:
    """A relay as a process of its own; a thread puts its log, and then ``None``, into the queue."""

    def __init__(self, name: str, arguments: tuple[str, ...], happenings: Happenings) -> None:
        self.name = name
        self.last_words = ""
        """Its last log line."""
        self._happenings = happenings
        # Neither the environment nor a configuration file of whoever runs this is to decide anything.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TCPRELAY_")}
        environment.pop("NOTIFY_SOCKET", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tcprelay", *arguments, "--config", os.devnull,
             "--log-format", "json", "--drain-timeout", "1"],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            line = raw.decode("utf-8", "replace").strip()
            try:
                entry = json.loads(line)
                self.last_words = entry["message"]
            except (ValueError, KeyError, TypeError):
                entry, self.last_words = {}, line  # not a log line: a wrong option, or a missing module
            self._happenings.put((self.name, entry))
        self._happenings.put((self.name, None))

    def wait(self) -> str:
        """Wait for its end, and the hard way if that does not come; returns how it ended."""
        try:
            status = self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"by signal {-status}" if status < 0 else f"with status {status}"

    def end(self) -> None:
        """SIGTERM; then nothing of it is left."""
        self._process.terminate()
        self.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def text_of(page: str) -> list[str]:
    """The lines of an HTML page's body that a reader would see."""
    parser = _TextParser()
    parser.feed(page)
    parser.close()
    return [line for line in map(str.strip, "".join(parser.pieces).splitlines()) if line]


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside = self._inside or tag == "body"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.pieces.append(data)


if __name__ == "__main__":
    sys.exit(main())
