"""A wire for tests: two hosts with a path between them that delays, loses, queues, forgets, and can change at any time.

    client host (inside)                                               server host (outside)
    198.18.0.2, 2001:2::2 ── tun0 ──▶ forwarder ──▶ tun0 ── 198.18.0.1, 2001:2::1     "up"
                             tun0 ◀── forwarder ◀── tun0                              "down"

A host is a network namespace without a name, so that it ends with the last process or descriptor that holds it.  The
forwarder is a process: it reads packets from one TUN device and writes each to the other one when its time has come.
It hears by a pipe what each direction is to do, and ends when that closes: with its owner, however that ends.

Packets have 1,500 bytes at most, so that loss, queues and small MTUs hit single ones, as they do on a real path.  With
`offload` they come as TCP makes them, in pieces of up to 64 KiB, which takes a tenth of the work: for delay, jitter
and holes, where nothing has to hit a single packet.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from .bench.programs import absent, find_program

SERVER, CLIENT = "198.18.0.1", "198.18.0.2"
"""The two hosts' addresses, of the block that is for benchmarks; each host has a route to all of it."""
SERVER_6, CLIENT_6 = "2001:2::1", "2001:2::2"

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x1, 0x2, 0x4
_LARGEST = 70000
"""No packet is larger, with its header."""
_AT_ONCE = 64
"""So many packets are read before some are written."""


def without_wire() -> str:
    """What is missing for a `Wire`, in one line."""
    if sys.platform != "linux":
        return "a wire needs Linux"
    if os.geteuid():
        return "a wire needs root"
    if not os.path.exists("/dev/net/tun"):
        return "a wire needs /dev/net/tun"
    return absent("ip")


# --- Hosts ----------------------------------------------------------------------------------------------------


class Here:
    """The host on which the tests run, by the address that it has for itself."""

    address = "127.0.0.1"

    def inside(self) -> AbstractContextManager[None]:
        return nullcontext()


class Host:
    """A network namespace; what is started, and what sockets are made, in its `inside` block are there."""

    def __init__(self, stack: ExitStack, address: str) -> None:
        """A new one, with nothing but loopback, which `stack` gives up; its `address` is for others to use."""
        self.address = address
        with open("/proc/thread-self/ns/net") as home:
            if _LIBC.unshare(_CLONE_NEWNET):  # `os.unshare` came with Python 3.12
                raise OSError(ctypes.get_errno(), "unshare")
            try:
                self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            finally:
                _enter(home.fileno())
        stack.callback(os.close, self._namespace)
        self.path = f"/proc/{os.getpid()}/fd/{self._namespace}"
        """By which nsenter(1) finds it."""
        self.ip("link set lo up")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Move the calling thread there; threads and processes that it starts stay there."""
        with open("/proc/thread-self/ns/net") as home:
            _enter(self._namespace)
            try:
                yield
            finally:
                _enter(home.fileno())

    def ip(self, *commands: str) -> None:
        """Carry out commands of ip(8) there."""
        with self.inside():
            done = subprocess.run([find_program("ip"), "-batch", "-"], input="\n".join(commands), text=True,
                                  capture_output=True, timeout=30)  # fmt: skip
        assert done.returncode == 0, f"ip: {', '.join(commands)}: {done.stderr}"

    def sysctl(self, name: str, value: object) -> None:
        """Set a parameter of the kernel's that is the host's own, as ``net.ipv4.tcp_congestion_control``."""
        with self.inside():
            Path("/proc/sys", *name.split(".")).write_text(str(value))

    def device(self, addresses: list[str], offload: bool) -> int:
        """A TUN device there, up and with these addresses; returns its descriptor."""
        with self.inside():
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            try:
                flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if offload else 0)
                fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"tun0", flags))
                if offload:
                    fcntl.ioctl(tun, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
                self.ip(
                    "link set tun0 txqueuelen 10000 addrgenmode none up",
                    *(f"address add {address} dev tun0 {'nodad' * (':' in address)}" for address in addresses),
                )
            except BaseException:
                os.close(tun)
                raise
        return tun


def _enter(namespace: int) -> None:
    """`os.setns`, which came with Python 3.12, of the calling thread."""
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


# --- The wire -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """What one direction of a wire does to its packets."""

    delay: float = 0.0
    """Seconds that each packet takes."""
    jitter: float = 0.0
    """Seconds that a packet takes longer at most, by chance."""
    reorder: bool = False
    """Whether a packet may overtake others by that."""
    loss: float = 0.0
    """The share of packets that are lost, by chance."""
    rate: float | None = None
    """Bits a second; without, as many as come."""
    queue: float = 1.0
    """Seconds that a packet may have to wait for its turn at that rate; what comes when it is longer is lost."""
    mtu: int = 65535
    """Bytes; larger packets are lost without a word."""
    hole: bool = False
    """Whether all are lost."""


class Wire:
    """Two hosts and the path between them.  All that it does can be changed while it is in use."""

    def __init__(
        self, stack: ExitStack, up: Way, down: Way | None = None, *, nat: float | None = None, offload: bool = False,
        seed: int = 1,
    ) -> None:  # fmt: skip
        """A wire that `stack` takes away; it is the same in both directions where `down` is not given.

        With `nat` only the client host can begin connections, and one on which there was no packet for so many seconds
        is forgotten: what comes on it from either side is lost without a word.  `seed` is for the chances.
        """
        self.up, self.down, self.nat = up, down or up, nat
        self.server, self.client = Host(stack, SERVER), Host(stack, CLIENT)
        self._talking = threading.Lock()  # a command and its answer belong together
        with ExitStack() as tuns:
            numbers = []
            for host, addresses in ((self.client, (CLIENT, CLIENT_6)), (self.server, (SERVER, SERVER_6))):
                numbers.append(host.device([f"{addresses[0]}/16", f"{addresses[1]}/64"][: 1 + _has_ipv6()], offload))
                tuns.callback(os.close, numbers[-1])
            command = [sys.executable, "-m", __name__, *map(str, numbers), str(int(offload)), str(seed)]
            self._forwarder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                               pass_fds=numbers, cwd=Path(__file__).parents[1])  # fmt: skip
        stack.callback(self._end)
        self.change()

    def change(self, *, both: Way | None = None, up: Way | None = None, down: Way | None = None,
               nat: float | None = None) -> dict[str, Any]:  # fmt: skip
        """Have it do something else from now on, when this returns; what is not given stays.

        Packets that are under way arrive as they would have.  Returns what became of packets so far, by direction.
        """
        with self._talking:
            self.up, self.down = up or both or self.up, down or both or self.down
            self.nat = self.nat if nat is None else nat
            return self._tell({"up": asdict(self.up), "down": asdict(self.down), "nat": self.nat})

    def counts(self) -> dict[str, Any]:
        """What became of packets so far: for "up" and "down" how many were ``passed``, and how many dropped, by the
        names of `Way` and ``nat``.  And ``late``, the most seconds that a packet left after its time."""
        with self._talking:
            return self._tell({})

    def forget(self) -> None:
        """Have the NAT forget all connections, as if it was switched off and on."""
        with self._talking:
            self._tell({"forget": True})

    @contextmanager
    def hole(self) -> Iterator[None]:
        """A black hole in both directions, for the time of a `with` block."""
        self.change(up=replace(self.up, hole=True), down=replace(self.down, hole=True))
        try:
            yield
        finally:
            self.change(up=replace(self.up, hole=False), down=replace(self.down, hole=False))

    def _tell(self, command: dict[str, object]) -> dict[str, Any]:
        assert self._forwarder.stdin and self._forwarder.stdout
        self._forwarder.stdin.write(json.dumps(command).encode() + b"\n")
        answer = self._forwarder.stdout.readline()
        assert answer, "the wire's forwarder has ended"
        return dict(json.loads(answer))

    def _end(self) -> None:
        self._forwarder.kill()
        with self._forwarder:
            self._forwarder.wait()


def _has_ipv6() -> bool:
    return os.path.exists("/proc/sys/net/ipv6")


# --- The forwarder --------------------------------------------------------------------------------------------


class Direction:
    """One direction in the forwarder: from a device, to a device, in its way."""

    def __init__(self, source: int, sink: int, chances: random.Random) -> None:
        self.source, self.sink = source, sink
        self.way = Way()
        self.counts = dict.fromkeys(("passed", "hole", "mtu", "nat", "loss", "queue"), 0)
        self._random = chances
        self._free = 0.0
        """When the last packet has gone out at the rate of this way."""
        self._last = 0.0
        """When the last packet arrives."""

    def schedule(self, size: int, now: float) -> float | None:
        """When a packet is to arrive; None if it never does."""
        way, begins = self.way, max(now, self._free)
        if why := self._refuse(size, begins - now):
            self.counts[why] += 1
            return None
        if way.rate:
            begins = self._free = begins + 8 * size / way.rate
        arrives = begins + way.delay + way.jitter * self._random.random()
        if not way.reorder:
            arrives = self._last = max(arrives, self._last)
        self.counts["passed"] += 1
        return arrives

    def _refuse(self, size: int, wait: float) -> str:
        """Why a packet never arrives, by the name of what makes that; "" if it does."""
        way = self.way
        if way.hole:
            return "hole"
        if size > way.mtu:
            return "mtu"
        if way.loss and self._random.random() < way.loss:
            return "loss"
        return "queue" if way.rate and wait > way.queue else ""


class NAT:
    """Which TCP connections a NAT knows; whatever is not TCP it lets pass."""

    TCP, SYN, ACK = 6, 0x02, 0x10

    def __init__(self) -> None:
        self.patience: float | None = None
        """Seconds after which it forgets a silent one; None is no NAT."""
        self._seen: dict[bytes, float] = {}
        """When the last packet came, by addresses and ports, those of the inside first."""

    def knows(self, packet: bytes, from_inside: bool, now: float) -> bool:
        """Whether a packet may pass; and if so, its connection is remembered anew."""
        if self.patience is None:
            return True
        if packet[0] >> 4 == 4:
            protocol, length, start, tcp = packet[9], 4, 12, 4 * (packet[0] & 15)
        else:
            protocol, length, start, tcp = packet[6], 16, 8, 40
        if protocol != self.TCP:
            return True
        sender = packet[start : start + length] + packet[tcp : tcp + 2]
        receiver = packet[start + length : start + 2 * length] + packet[tcp + 2 : tcp + 4]
        connection = sender + receiver if from_inside else receiver + sender
        begins = from_inside and packet[tcp + 13] & (self.SYN | self.ACK) == self.SYN
        if not begins and now - self._seen.get(connection, -inf) > self.patience:
            return False
        self._seen[connection] = now
        return True

    def forget(self) -> None:
        self._seen.clear()


class Forwarder:
    """Carries packets between two devices, until its owner has gone."""

    def __init__(self, client: int, server: int, offload: bool, seed: int) -> None:
        chances = random.Random(seed)
        self._up, self._down = Direction(client, server, chances), Direction(server, client, chances)
        self._nat = NAT()
        self._header = 10 if offload else 0  # bytes that the kernel puts before a packet
        self._waiting: list[tuple[float, int, int, bytes]] = []
        """A heap of packets: when each is to arrive, its number, at which device, and itself."""
        self._number = 0
        self._late = 0.0
        self._words = b""

    def run(self) -> None:
        directions = {self._up.source: self._up, self._down.source: self._down}
        sources = [sys.stdin.fileno(), *directions]
        while True:
            timeout = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            for ready in select.select(sources, (), (), timeout)[0]:
                if ready in directions:
                    self._take(directions[ready])
                elif not self._listen():
                    return
            self._pass_on()

    def _take(self, direction: Direction) -> None:
        """Take packets from a device."""
        now, from_inside = time.monotonic(), direction is self._up
        try:
            for _ in range(_AT_ONCE):
                packet = os.read(direction.source, _LARGEST)
                if not self._nat.knows(packet[self._header :], from_inside, now):
                    direction.counts["nat"] += 1
                elif arrives := direction.schedule(len(packet) - self._header, now):
                    self._number += 1
                    heapq.heappush(self._waiting, (arrives, self._number, direction.sink, packet))
        except BlockingIOError:
            pass  # no more for now

    def _pass_on(self) -> None:
        """Write the packets whose time has come."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            arrives, _, sink, packet = heapq.heappop(self._waiting)
            self._late = max(self._late, now - arrives)
            os.write(sink, packet)

    def _listen(self) -> bool:
        """Carry out what the owner says; whether it is still there."""
        words = os.read(sys.stdin.fileno(), 65536)
        *lines, self._words = (self._words + words).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
            counts = {"up": self._up.counts, "down": self._down.counts, "late": self._late}
            print(json.dumps(counts), flush=True)
        return bool(words)

    def _obey(self, command: dict[str, Any]) -> None:
        if command.get("forget"):
            self._nat.forget()
        if "up" in command:
            self._up.way, self._down.way = Way(**command["up"]), Way(**command["down"])
            self._nat.patience = command["nat"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it, or has ended
    Forwarder(int(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])), int(sys.argv[4])).run()
