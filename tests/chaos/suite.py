"""What a case is, and what it tells: figures beside their bars."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..certificates import Certificates, make_all
from ..peers import Peers
from ..watch import WATCH
from ..wire import Here, Host, Way, Wire


@dataclass(frozen=True)
class Figure:
    """One measured figure, and whether it meets its bar."""

    what: str
    figure: str
    bar: str
    met: bool


class Run:
    """One run of a case: its chances, its helpers, the hosts, and the figures that it has told so far."""

    def __init__(
        self, stack: ExitStack, directory: Path, seed: int, scale: float, workers: int, round_trip: float = 0.0
    ) -> None:
        self.stack = stack
        self.directory = directory
        self.scale = scale
        self.workers = workers
        """``--workers`` of the relays: processes beside the first; 0 is none."""
        self.random = random.Random(seed)
        self.peers = Peers(stack, directory)
        self.figures: list[Figure] = []
        self._certificates: Certificates | None = None
        self.round_trip = round_trip
        """Seconds between the relays; 0 where all is on loopback."""
        self.server: Here | Host = Here()
        """Where the relay server is, and its service clients."""
        self.client: Here | Host = Here()
        """Where the relay client is, and its services, on loopback there."""
        self._wire: Wire | None = None
        if round_trip:
            self.lay_wire()

    def lay_wire(self, way: Way | None = None, nat: float | None = None) -> Wire:
        """Have two hosts with a wire between them from now on, also where the case is on loopback otherwise.

        Where nothing else is asked for its round trip is the run's, give or take a fifth by chance, and its bandwidth
        what the processor can carry.
        """
        if self._wire is None:
            usual = Way(delay=0.4 * self.round_trip, jitter=0.2 * self.round_trip)
            seed = self.random.getrandbits(32)
            self._wire = Wire(self.stack, way or usual, nat=nat, offload=way is None, seed=seed)
            self.server, self.client = self._wire.server, self._wire.client
        return self._wire

    @property
    def slack(self) -> float:
        """Seconds by which what loopback sees at once may come later: two round trips."""
        return 2 * self.round_trip

    @property
    def certificates(self) -> Certificates:
        """A CA, a foreign one, and what they have signed; made when they are first asked for."""
        if self._certificates is None:
            self._certificates = make_all(self.directory)
        return self._certificates

    def at_a_time(self, count: int) -> int:
        """So many at a time, and four times as many over a wire, where most of their time is waiting for it."""
        return 4 * count if self.round_trip else count

    def scaled(self, count: float, least: int = 1) -> int:
        """So many, times the scale of this run, and not fewer than `least`."""
        return max(least, round(count * self.scale))

    def tell(
        self, what: str, value: float, *, most: float | None = None, least: float | None = None, unit: str = ""
    ) -> bool:
        """Tell a figure and its bar: at most, at least, or (both the same) exactly so much; without a bar it is
        told for information.  Returns whether it is met."""
        met = (most is None or value <= most) and (least is None or value >= least)
        if most is not None and most == least:
            bar = show(most)
        else:
            bar = " and ".join(
                [f"at least {show(least)}"] * (least is not None) + [f"at most {show(most)}"] * (most is not None)
            )
        if not met:
            WATCH.tell(f"{what}: {show(value)} {unit}".strip())
        self.figures.append(Figure(what, f"{show(value)} {unit}".strip(), f"{bar} {unit}".strip() if bar else "", met))
        return met

    def say(self, text: str) -> None:
        """Tell what is being done, or what was odd, on the terminal."""
        print(f"    {text}", flush=True)


def show(value: float | None) -> str:
    """A figure with as many digits as matter."""
    if value is None:
        return ""
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Case:
    """A proof of one bar."""

    bar: int
    name: str
    limit: float
    """Seconds within which it must be over, at scale 1."""
    run: Callable[[Run], None]
    over_wire: bool
    """Whether it can be run over a wire as well."""


CASES: list[Case] = []


def case(
    bar: int, name: str, limit: float, over_wire: bool = False
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Register a function as the case `name`, which proves the bar with this number."""

    def register(function: Callable[[Run], None]) -> Callable[[Run], None]:
        CASES.append(Case(bar, name, limit, function, over_wire))
        return function

    return register


@contextmanager
def running(directory: Path, seed: int, scale: float, workers: int, round_trip: float) -> Iterator[Run]:
    """A run whose processes, services and connections are taken away in the end."""
    with ExitStack() as stack:
        WATCH.start()
        stack.callback(WATCH.stop)
        yield Run(stack, directory, seed, scale, workers, round_trip)


def write_figures(figures: list[Figure], path: Path) -> None:
    path.write_text(json.dumps([asdict(figure) for figure in figures]))


def read_figures(path: Path) -> list[Figure]:
    return [Figure(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
