"""Pictures for the documents: the status page, and what ``tcprelays status`` says, of a relay that carries something.

    make screenshots      or      python3 deploy/screenshots.py [--output DIR] [--seconds N]

The relay server, its relay clients and what they carry are real, on loopback and for as long as the page remembers.
All that they write is in a directory that is gone afterwards, and neither the name of this machine, nor its user, nor
its time zone is seen in the pictures.  Needs chromium and chromedriver, and the packages of the tests.
"""

from __future__ import annotations

import argparse
import html
import itertools
import math
import os
import re
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, missing  # noqa: E402
from tests.conftest import Service, connect  # noqa: E402
from tests.peers import HOST, Program, free_port, is_listening  # noqa: E402

MOST = 150_000
"""Bytes that a picture may have."""
PACE = 0.25
"""Seconds between two pieces of what is carried."""
COLUMNS = 108
"""Of the terminal."""
TERMINAL = """\
<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; background: #14191f; }}
pre {{ display: inline-block; margin: 0; padding: 18px 22px; color: #d7dee6 }}
pre {{ font: 14px/1.4 "DejaVu Sans Mono", monospace }}
.s1 {{ font-weight: bold; color: #fff }} .s2 {{ color: #8b98a6 }} .s31 {{ color: #ff8f86 }} .s32 {{ color: #63d29a }}
.s33 {{ color: #f2b861 }} .s1.s31 {{ color: #ff8f86 }} .s1.s32 {{ color: #63d29a }}
</style><pre><span class="s2">$</span> tcprelays status
{text}</pre>
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the pictures of the status page and of the status command.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", metavar="DIR", help="where to (default: docs)")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="N", help="how long there is traffic before")
    arguments = parser.parse_args()
    if programs := missing():
        print(f"screenshots: not found: {programs}; install the packages chromium and chromium-driver", file=sys.stderr)
        return 1
    # Neither the environment of whoever runs this is to decide anything, nor is it to be seen.
    for name in [name for name in os.environ if name.startswith("TCPRELAY_") or name == "RUNTIME_DIRECTORY"]:
        del os.environ[name]
    os.environ["TZ"] = "UTC"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what has been started is ended then, too
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcprelay-")))
        scene = Scene(stack, folder)
        scene.play(arguments.seconds)
        pictures = {"status-terminal.png": scene.terminal, "status.png": scene.page, "status-dark.png": scene.telephone}
        for name, take in pictures.items():
            picture = shrink(take())
            path = arguments.output / name
            path.write_bytes(picture)
            print(f"{len(picture):>9,} bytes  {path.name}")
            if len(picture) > MOST:
                print(f"screenshots: {name} is larger than {MOST:,} bytes", file=sys.stderr)
                return 1
    return 0


class Scene:
    """A relay server with three services, two of which are published, and those who use them."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        places = {f"XDG_{name}_HOME": str(folder) for name in ("CONFIG", "STATE", "CACHE")}
        (folder / "run").mkdir(mode=0o700)
        self._environment = {**places, "XDG_RUNTIME_DIR": str(folder / "run"), "COLUMNS": str(COLUMNS)}
        self._ports = {name: taken_or(port) for name, port in
                       {"relay": 10080, "ssh": 2222, "web": 8080, "backup": 8873, "status": 9090}.items()}  # fmt: skip
        self.url = f"http://{HOST}:{self._ports['status']}/"

    def play(self, seconds: float) -> None:
        """Start all, and let it run so long."""
        token = self._secret("token")
        server = self._relay(
            "server", "--hostname", HOST, "--relay-port", str(self._ports["relay"]), "--token-file", str(token),
            *(word for name in ("ssh", "web", "backup") for word in ("--service", f"{name}={self._ports[name]}")),
            "--status", str(self._ports["status"]), "--pair-timeout", "3",
        )  # fmt: skip
        server.wait_for(lambda line: "listening for relay clients" in line)
        ssh, web = (self._service(serve) for serve in (self._keep_typing, self._give_files))
        self._stack.callback(self._end)
        for name, services in {"home": {"ssh": ssh, "web": web}, "office": {"ssh": ssh}}.items():
            published = (word for name, port in services.items() for word in ("--publish", f"{name}={HOST}:{port}"))
            client = self._client(token, "--name", name, *published)
            client.wait_for(lambda line: "is published at" in line)
        wrong = self._client(self._secret("wrong"), "--name", "laptop", "--publish", f"ssh={HOST}:{ssh}")
        wrong.wait_for(lambda line: "token" in line)
        wrong.close()
        for number in range(5):
            self._use("ssh", f"127.0.1.{20 + number}", number)
        for number in range(4):
            self._use("web", f"127.0.2.{40 + number}", number)
        self._use("backup", "127.0.3.7", 0)
        self._over.wait(seconds)

    def page(self) -> bytes:
        """The page, wide and light."""
        return self._shoot("light", 1280, 1.0, "#clients")

    def telephone(self) -> bytes:
        """The page, narrow and dark."""
        return self._shoot("dark", 390, 2.0, "#picture")

    def terminal(self) -> bytes:
        """What the command writes to a terminal."""
        command = sys.executable, "-m", "tcprelay_server", "status"
        with Program(*command, env=self._environment, terminal=True) as program:
            status = program.wait()
        if status:
            raise RuntimeError(f"tcprelays status has ended with {status}: {program.output}")
        place = self._folder / "terminal.html"
        place.write_text(TERMINAL.format(text=as_html(program.lines)), encoding="utf-8")
        with self._browser() as browser:
            browser.open(place.as_uri())
            width, height = browser.run("const box = document.querySelector('pre').getBoundingClientRect();"
                              "return [Math.ceil(box.width), Math.ceil(box.height)]")  # fmt: skip
            browser.resize(width, height, 1.5)
            return browser.screenshot()

    def _shoot(self, scheme: str, width: int, scale: float, last: str) -> bytes:
        """The page down to the end of the part that a selector means."""
        with self._browser() as browser:
            browser.prefer(color_scheme=scheme)
            browser.resize(width, 900, scale)
            browser.open(self.url)
            browser.wait(r"return /[1-9][\d.]* .B\/s/.test(document.getElementById('clients').textContent)")
            end = browser.run("return document.querySelector(arguments[0]).getBoundingClientRect().bottom", last)
            browser.resize(width, math.ceil(end) + 16, scale)
            return browser.screenshot()

    def _browser(self) -> Browser:
        return Browser(Path(tempfile.mkdtemp(dir=self._folder)))

    # Relays, services and those who use them

    def _secret(self, name: str) -> Path:
        path = self._folder / name
        path.write_text(secrets.token_urlsafe(32) + "\n", encoding="ascii")
        path.chmod(0o600)
        return path

    def _relay(self, role: str, *options: str) -> Program:
        command = sys.executable, "-m", "tcprelay", role, "--config", os.devnull, "--drain-timeout", "0", *options
        return self._stack.enter_context(Program(*command, env=self._environment))

    def _client(self, token: Path, *options: str) -> Program:
        where = "--relay-host", HOST, "--relay-port", str(self._ports["relay"])
        return self._relay("client", *where, "--token-file", str(token), "--try-service", "false", *options)

    def _service(self, serve: Callable[[socket.socket], object]) -> int:
        service = Service(serve)
        self._stack.callback(service.close)
        return service.port

    def _use(self, service: str, source: str, number: int) -> None:
        thread = threading.Thread(target=self._stay, args=(service, source, number))
        self._threads.append(thread)
        thread.start()

    def _end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _stay(self, service: str, source: str, number: int) -> None:
        """A service client: it says a little, again and again, and takes what comes."""
        self._over.wait(3.0 * number)  # they do not all come at once
        for times in itertools.count():
            if self._over.is_set():
                return
            until = time.monotonic() + 30.0 * (number + 1) + times % 5
            try:
                with connect((HOST, self._port_of(service)), source=source) as sock:
                    sock.settimeout(PACE)
                    while not self._over.is_set() and time.monotonic() < until:
                        sock.sendall(bytes(40 + 30 * number))
                        if not self._take(sock):
                            break
            except OSError:
                pass
            if service == "backup" and self._over.wait(25.0):
                return

    def _take(self, sock: socket.socket) -> bool:
        try:
            while piece := sock.recv(1 << 16):
                if len(piece) < 1 << 10 and self._over.wait(PACE):
                    return False
            return False
        except TimeoutError:
            return True

    def _port_of(self, service: str) -> int:
        return self._ports[service]

    def _keep_typing(self, sock: socket.socket) -> None:
        """A service: an answer to each word, somewhat longer."""
        while data := sock.recv(1 << 16):
            sock.sendall(data * (1 + int(2 + 2 * math.sin(time.monotonic() / 9))))

    def _give_files(self, sock: socket.socket) -> None:
        """Another: much, and not always as much."""
        while sock.recv(1 << 16):
            now = time.monotonic()
            wave = max(0.05, math.sin(now / 17) + 0.5 * math.sin(now / 5) + 0.8)
            sock.sendall(bytes(int(160_000 * wave)))


def taken_or(port: int) -> int:
    """This port, or a free one where somebody listens on it."""
    return free_port() if is_listening(port) else port


# --- Pictures -------------------------------------------------------------------------------------------------


def as_html(lines: list[str]) -> str:
    """Lines for a terminal, with their styles as classes: SGR (ECMA-48, 8.3.117), of which few are used."""
    pieces = []
    for line in lines:
        style = ""
        for number, part in enumerate(re.split(r"\x1b\[([\d;]*)m", line)):
            if number % 2:
                style = " ".join(f"s{code}" for code in part.split(";") if code.strip("0"))
            elif part:
                text = html.escape(part)
                pieces.append(f'<span class="{style}">{text}</span>' if style else text)
        pieces.append("\n")
    return "".join(pieces).rstrip("\n")


def shrink(picture: bytes) -> bytes:
    """A PNG (W3C, Portable Network Graphics, third edition) of the same, with 256 colours at most: those that are most
    frequent, and for the others the nearest of them."""
    width, height, pixels = read_png(picture)
    colours = Counter(zip(pixels[0::3], pixels[1::3], pixels[2::3], strict=True))
    palette = [colour for colour, _ in colours.most_common(256)]
    nearest = {colour: number for number, colour in enumerate(palette)}
    for colour in colours:
        if colour not in nearest:
            nearest[colour] = min(range(len(palette)), key=lambda n: math.dist(palette[n], colour))
    indices = bytes(nearest[colour] for colour in zip(pixels[0::3], pixels[1::3], pixels[2::3], strict=True))
    rows = b"".join(b"\0" + indices[start : start + width] for start in range(0, width * height, width))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(itertools.chain.from_iterable(palette)),
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    return picture[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def read_png(picture: bytes) -> tuple[int, int, bytes]:
    """Width, height and the RGB of all pixels of a PNG as browsers make it: 8 bits, no palette, not interlaced."""
    place, packed = 8, []
    width = height = size = 0
    while place < len(picture):
        (length,), kind = struct.unpack_from(">I", picture, place), picture[place + 4 : place + 8]
        data = picture[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", data)
            if depth != 8 or colours not in (2, 6) or interlaced:
                raise ValueError("the browser has made another kind of PNG")
            size = 4 if colours == 6 else 3
        elif kind == b"IDAT":
            packed.append(data)
        place += 12 + length
    raw = zlib.decompress(b"".join(packed))
    stride = width * size
    before, whole = bytearray(stride), bytearray()
    for start in range(0, height * (stride + 1), stride + 1):
        row = bytearray(raw[start + 1 : start + 1 + stride])
        unfilter(raw[start], row, before, size)
        whole += bytes(itertools.chain.from_iterable(row[n : n + 3] for n in range(0, stride, size)))
        before = row
    return width, height, bytes(whole)


def unfilter(kind: int, row: bytearray, above: bytearray, size: int) -> None:
    """Undo a row's filter, in place (section 9)."""
    for n in range(len(row)):
        left, up, corner = (row[n - size], above[n], above[n - size]) if n >= size else (0, above[n], 0)
        if kind == 1:
            row[n] = (row[n] + left) & 255
        elif kind == 2:
            row[n] = (row[n] + up) & 255
        elif kind == 3:
            row[n] = (row[n] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            distances = abs(guess - left), abs(guess - up), abs(guess - corner)
            row[n] = (row[n] + (left, up, corner)[distances.index(min(distances))]) & 255


if __name__ == "__main__":
    sys.exit(main())
