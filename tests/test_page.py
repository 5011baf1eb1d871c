"""The page for people, in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from _tcprelay.status.page import page, security_policy
from _tcprelay.status.report import Status, as_dict

from .browser import PROGRAMS, Browser, missing
from .conftest import echo, no_peer, read_exactly, wait_until
from .peers import HOST, Peers, RelayProcess, free_port
from .samples import client_status, crowded_status, server_status

browsing = pytest.mark.peer(*PROGRAMS)


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # the end waits for those who are being answered


class Desk:
    """What gives out the page and a status that a test has made up; it can be ended, and begin again at its port."""

    def __init__(self, status: Status) -> None:
        self.say(status)
        self.code = 200
        """What it answers to who asks for the status."""
        self.asked = 0
        """How often that was."""
        self.at_once = self.most_at_once = 0
        """How many such questions there are, and were at most, that are not answered yet."""
        self.gate = threading.Event()
        """Closed, it keeps who asks waiting."""
        self.gate.set()
        self._lock = threading.Lock()  # over the figures
        self._port = free_port()
        self._server: _Server | None = None
        self.begin()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}/"

    def say(self, status: Status) -> None:
        self._said = json.dumps(as_dict(status)).encode()

    def begin(self) -> None:
        desk = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 2  # a browser opens connections in advance

            def do_GET(self) -> None:
                code, kind, body = 404, "text/plain", b""
                if self.path == "/":
                    code, kind, body = 200, "text/html; charset=utf-8", page("of-the-tests")
                elif self.path == "/status.json":
                    code, kind, body = desk._answer()
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", security_policy("of-the-tests"))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    pass  # the page has given up

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server((HOST, self._port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def _answer(self) -> tuple[int, str, bytes]:
        with self._lock:
            self.asked += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait()
        with self._lock:
            self.at_once -= 1
        return self.code, "application/json", self._said

    def end(self) -> None:
        self.gate.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests here: to start one takes longer than most of them."""
    if programs := missing():
        no_peer(f"program not found: {programs}")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(server_status())
    yield desk
    desk.end()


@pytest.fixture
def browser(shared_browser: Browser, desk: Desk, peers: Peers) -> Iterator[Browser]:
    """The browser on an empty page, which it leaves before those end who serve it; nothing that a script complains of
    may be left untold."""
    browser = shared_browser
    browser.open("about:blank")
    browser.resize(1300, 900)
    browser.prefer(color_scheme="light")
    browser.complaints(), browser.requests()
    yield browser
    browser.open("about:blank")
    assert browser.complaints() == []


def look(browser: Browser, url: str) -> None:
    """Open the page and wait until it shows something."""
    browser.open(url)
    browser.wait("return !document.getElementById('main').hidden")


def rows_of(browser: Browser, table: str) -> list[list[str]]:
    """What stands in the cells of a table."""
    return list(
        browser.run(
            "return [...document.querySelectorAll(`#${arguments[0]}-table tbody tr`)]"
            ".map(row => [...row.cells].map(cell => [...cell.childNodes].map(one => one.textContent).join('\\n')))",
            table,
        )
    )


def wait_for_answers(browser: Browser, desk: Desk, answers: int) -> None:
    """Wait until the page has asked so often again, and has shown what it was told before the last time."""
    asked = desk.asked
    wait_until(lambda: desk.asked > asked + answers)


def moved(status: Status, seconds: float, in_: int = 0, out: int = 0, **fields: Any) -> Status:
    """The same status so many seconds later, when each connection has carried so much more."""
    connections = tuple(
        dataclasses.replace(one, bytes_in=one.bytes_in + in_, bytes_out=one.bytes_out + out)
        for one in status.connections
    )
    return dataclasses.replace(status, time=status.time + seconds, connections=connections, **fields)


# --- The page as a file ---------------------------------------------------------------------------------------


def test_the_policy_allows_what_is_on_the_page_and_nothing_else() -> None:
    """The one script and the one style by a nonce, nothing inline beside them, and nothing from elsewhere."""
    text = page("0badcafe").decode("utf-8")
    rules = dict(rule.partition(" ")[::2] for rule in security_policy("0badcafe").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert (rules["connect-src"], rules["img-src"]) == ("'self'", "data:")
    for element in ("script", "style"):
        assert re.findall(rf"<{element}[^>]*>", text) == [f'<{element} nonce="0badcafe">']
        assert rules[f"{element}-src"] == "'nonce-0badcafe'"
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\son\w+=|\sstyle=|<(img|iframe|object|embed|base|form)\b", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    links = set(re.findall(r"""(?:href|src)=["']?([^"'\s>]+)""", markup))
    assert {link for link in links if not link.startswith(("#", "data:"))} == {"status.json", "metrics"}


# --- What it shows --------------------------------------------------------------------------------------------


@browsing
def test_what_is_at_the_top(browser: Browser, desk: Desk) -> None:
    """Role, version, address, problems, and a gap where a worker is missing."""
    look(browser, desk.url)
    assert browser.text("h1") == "tcprelay relay server"
    assert browser.text("#state") == "1 problem"
    assert (browser.text("#version"), browser.text("#address")) == ("0.1.0", "[::]:10080")
    assert "(4 d 0 h)" in browser.text("#started")
    assert browser.text("#workers").split("\n") == ["0", "1 is missing"]
    assert browser.text("#problems") == "worker 1 does not answer\nWhat worker 1 does is left out here."
    assert browser.run("return document.title") == "1 problem \u00b7 tcprelay server"

    well = dataclasses.replace(server_status(), problems=(), missing=(), workers=0)
    desk.say(dataclasses.replace(well, services=well.services[:2]))
    browser.wait("return document.getElementById('state').textContent === 'All is well'")
    assert not browser.run("return document.getElementById('problems').checkVisibility()")
    assert not browser.run("return document.getElementById('workers').checkVisibility()")
    desk.say(well)
    browser.wait("return document.getElementById('state').textContent === '1 service cannot be reached'")
    lost = dataclasses.replace(client_status(), problems=(), services=client_status().services[:1])
    desk.say(lost)
    browser.wait("return document.getElementById('state').textContent === '1 relay server cannot be reached'")
    desk.say(dataclasses.replace(well, is_ending=True))
    browser.wait("return document.getElementById('state').textContent.startsWith('It is ending')")


@browsing
def test_what_is_in_the_tables_of_a_server(browser: Browser, desk: Desk) -> None:
    """Services, relay clients, connections and events, each with what is known of it."""
    look(browser, desk.url)
    [ssh, _, nas] = rows_of(browser, "services")
    assert ssh[:5] == [
        "ssh\n[::]:2222", "3 busy\n13 idle", "3\n1,041 so far", "1.2 kB/s\n10.4 MB in all", "1.8 MB/s\n5.4 GB in all",
    ]  # fmt: skip
    assert nas[0] == "backup@20001\n[::]:20001\nno relay client is connected"
    assert nas[2] == "0\n0 so far\n2 waiting"
    assert nas[6].startswith("17\n") and nas[6].endswith(
        ": no link was idle in time (--pair-timeout); no relay client is connected"
    )
    said = browser.run("return document.querySelector('#services-table .spark').getAttribute('aria-label')")
    assert said == "The last 5 minutes: at most 1.0 kB/s to and 1.9 MB/s from services."
    [home, office, script] = rows_of(browser, "clients")
    assert home[:3] == ["home\n198.51.100.23", "ssh", "the token"]
    assert home[3].endswith("\n3 d 0 h")
    assert home[4:6] == ["2 busy\n8 idle", "1,000 so far\n2 broken off"]
    assert office[0] == "office\n[2001:db8::17]\nthe service cannot be reached: connection refused"
    assert office[2] == "certificate office.example"
    assert script[2] == "nothing"
    assert browser.text("#refused") == "Links that were refused since the start, by code: token 3, timeout 1."
    assert [row[:5] for row in rows_of(browser, "connections")] == [
        ["7ae78df1", "192.0.2.1:50311", "ssh", "home at 198.51.100.23", "1 min 40 s"],
        ["7ae78df2", "192.0.2.2:50312", "ssh", "office at [2001:db8::17]", "3 min 20 s"],
        ["7ae78df3", "192.0.2.3:50313", "ssh", "home at 198.51.100.23", "5 min 0 s"],
    ]
    assert [row[9] for row in rows_of(browser, "connections")] == ["in ended", "open", "open"]
    events = rows_of(browser, "events")
    assert [row[1:3] for row in events] == [["warning", "x17"], ["info", ""], ["warning", "x3"]]
    assert events[2][3] == "link from 192.0.2.66:41000 refused: its token is not this server's"


@browsing
def test_what_a_relay_client_shows(browser: Browser, desk: Desk) -> None:
    """Where its services are and are published; it has no relay clients of its own."""
    desk.say(client_status())
    look(browser, desk.url)
    assert browser.text("h1") == "tcprelay relay client"
    [ssh, web] = rows_of(browser, "services")
    assert ssh[:2] == ["default\nlocalhost:22\npublished at relay.example.net:2222", "1 busy\n7 idle\n1 opening"]
    assert web[0] == "web\nunix:/run/web.sock\nthe relay server refuses it: nas may not publish web"
    assert not browser.run("return document.getElementById('clients').checkVisibility()")
    assert browser.text("#events-empty") == "Nothing that should be known has happened yet."
    assert boxes(browser) == ["Relay server", "default", "web"]


def boxes(browser: Browser) -> list[str]:
    """The names in the boxes of the picture."""
    return list(
        browser.run("return [...document.querySelectorAll('#drawing .node .name')].map(one => one.textContent)")
    )


def labels(browser: Browser) -> list[str]:
    """What stands on its lines."""
    return list(browser.run("return [...document.querySelectorAll('#drawing .label')].map(one => one.textContent)"))


@browsing
def test_the_picture(browser: Browser, desk: Desk) -> None:
    """Counts stand on the lines; what carries something moves, the wider the more; and a reader may have it at rest."""
    look(browser, desk.url)
    assert boxes(browser) == [
        "Service clients",
        "ssh",
        "web",
        "backup@20001",
        "home",
        "office",
        "<script>alert(1)</script>",
    ]
    assert labels(browser) == [
        "3 open \u00b7 1.8 MB/s", "0 open", "0 open, 2 waiting", "2 busy, 8 idle", "1 busy, 5 idle", "0 busy, 8 idle",
    ]  # fmt: skip
    bands = "return [...document.querySelectorAll('#drawing .edge')].map(edge => [...edge.querySelectorAll('.band')]"
    bands += ".map(band => band.getAttribute('visibility') === 'visible' && Number(band.getAttribute('stroke-width'))))"
    [[into, out], *others] = browser.run(bands)
    assert 1 < into < out <= 9
    assert others == [[False, False]] * 5
    flow = "return getComputedStyle(document.querySelector('#drawing .flow.out')).animationName"
    assert browser.run(flow) == "back"
    browser.prefer(reduced_motion="reduce")
    assert browser.run(flow) == "none"
    home, *rest = server_status().clients
    home = dataclasses.replace(home, bytes_out=home.bytes_out + 4_000_000)
    desk.say(moved(server_status(), 2.0, clients=(home, *rest)))
    wait_until(lambda: "2 busy, 8 idle \u00b7 2.0 MB/s" in labels(browser))


@browsing
@pytest.mark.parametrize("width", [360, 1600])
def test_where_there_is_more_than_can_be_shown(browser: Browser, desk: Desk, width: int) -> None:
    """Of many services, relay clients and connections it is said what is left out; all are there in time, and those
    that go leave nothing behind."""
    desk.say(crowded_status(events=1000))
    browser.resize(width, 900)
    look(browser, desk.url)
    assert browser.run("return performance.now()") < 5000
    assert browser.text("#left-out").startswith("10 of 30 services are drawn, and 12 of 100 relay clients: ")
    assert "20 other services" in boxes(browser)
    assert {"service9", "service19", "service29"} <= set(boxes(browser))
    assert ("88 other relay clients" in boxes(browser)) == (width == 1600)
    assert browser.text("#connections-note") == "200 of 10,000: the newest, and those that have carried most"
    assert [len(rows_of(browser, name)) for name in ("services", "clients", "connections", "events")] == [
        30,
        100,
        200,
        50,
    ]
    desk.say(crowded_status(services=1, clients=1, connections=0, events=0))
    browser.wait("return document.querySelectorAll('#drawing .node').length === 3")
    assert [len(rows_of(browser, name)) for name in ("services", "clients", "connections", "events")] == [1, 1, 0, 0]
    assert browser.text("#left-out") == ""
    desk.say(crowded_status(services=300, clients=300))
    browser.wait("return document.getElementById('services-note').textContent.startsWith('200 of 300: ')")
    assert [len(rows_of(browser, name)) for name in ("services", "clients")] == [200, 200]


@browsing
def test_names_from_elsewhere_are_text(browser: Browser, desk: Desk) -> None:
    """A relay client that calls itself <script> is called that, wherever it is shown; nothing of it runs."""
    evil = "<img src=x onerror='document.title=1'><script>document.title=1</script>"
    status = server_status()
    desk.say(dataclasses.replace(
        status,
        address=evil, problems=(evil,), refused={evil: 1},
        services=(dataclasses.replace(status.services[0], name=evil, address=evil, problem=evil),),
        clients=tuple(dataclasses.replace(one, name=evil, proof=evil, service=evil) for one in status.clients),
        connections=tuple(dataclasses.replace(one, id=evil, peer=evil, via=evil) for one in status.connections),
        events=tuple(dataclasses.replace(one, level=evil, text=evil, kind=evil) for one in status.events),
    ))  # fmt: skip
    look(browser, desk.url)
    wait_for_answers(browser, desk, 1)
    assert browser.run("return [document.images.length, document.scripts.length]") == [0, 1]
    assert browser.run("return document.title") == "1 problem \u00b7 tcprelay server"
    assert {row[0].split("\n")[0] for row in rows_of(browser, "clients")} == {evil}
    assert {row[3] for row in rows_of(browser, "events")} == {evil}
    assert {urlsplit(url).path for url in browser.requests() if not url.startswith("data:")} == {"/", "/status.json"}


@browsing
def test_it_asks_its_own_relay_alone(browser: Browser, desk: Desk) -> None:
    """Nothing is requested but the page and the status, from where the page came from."""
    look(browser, desk.url)
    wait_for_answers(browser, desk, 2)
    asked = {url for url in browser.requests() if not url.startswith("data:")}
    assert asked == {desk.url, f"{desk.url}status.json"}


# --- How it looks ---------------------------------------------------------------------------------------------


@browsing
@pytest.mark.parametrize("make", [server_status, client_status, crowded_status])
@pytest.mark.parametrize("width", [320, 360, 700, 800, 1100, 1600])
def test_it_fits(browser: Browser, desk: Desk, make: Callable[[], Status], width: int) -> None:
    """Nobody scrolls sideways, on a telephone either; and no text in a box of the picture is longer than the box."""
    desk.say(make())
    browser.resize(width, 800)
    look(browser, desk.url)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wider = "return [...document.querySelectorAll('.frame')].filter(one => one.scrollWidth > one.clientWidth)"
    assert browser.run(f"{wider}.map(one => one.id)") == []
    beside = browser.run("""
        return [...document.querySelectorAll('#drawing .node')].filter(node => {
            const box = node.querySelector('rect').getBoundingClientRect();
            return [...node.querySelectorAll('text')].some(text => {
                const place = text.getBoundingClientRect();
                return place.width && (place.left < box.left || place.right > box.right + 1);
            });
        }).map(node => node.textContent);
    """)
    assert beside == []


CONTRAST = """
    const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const parts = colour => {
        pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => [r, g, b].map(part => part / 255).map(part =>
        part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [.2126, .7152, .0722][place], 0);
    const behind = node => {
        for (; node; node = node.parentElement) {
            const rect = node.classList.contains('node') && node.querySelector('rect');
            const colour = parts(rect ? getComputedStyle(rect).fill : getComputedStyle(node).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return parts(getComputedStyle(document.documentElement).backgroundColor);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode, node = text.parentElement;
        if (!text.data.trim() || !node.checkVisibility() || node.closest('script, style, noscript, title')) continue;
        const style = getComputedStyle(node);
        const colours = [light(parts(node.closest('svg') ? style.fill : style.color)), light(behind(node))];
        const ratio = (Math.max(...colours) + .05) / (Math.min(...colours) + .05);
        if (ratio < 4.5) found.push(`${text.data.trim()}: ${ratio.toFixed(2)}`);
    }
    return [document.querySelectorAll('#main *').length, found];
"""
"""Texts whose colour is too near to that behind it: WCAG 2.2, success criterion 1.4.3, level AA."""


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Browser, desk: Desk, scheme: str) -> None:
    """The page follows what the reader prefers, and all of it can be read in both."""
    browser.prefer(color_scheme=scheme)
    look(browser, desk.url)
    ground = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 64) == (scheme == "dark")
    for status in (server_status(), dataclasses.replace(crowded_status(5, 5, 5, 5), is_ending=True)):
        desk.say(status)
        browser.wait(f"return document.querySelectorAll('#services-table tbody tr').length === {len(status.services)}")
        seen, unreadable = browser.run(CONTRAST)
        assert seen > 200
        assert unreadable == []


# --- Without a mouse ------------------------------------------------------------------------------------------


@browsing
def test_sorting_with_the_keyboard_alone(browser: Browser, desk: Desk) -> None:
    """Tab leads to a column's button, Enter and the space bar sort; the focus stays while figures come in."""
    desk.say(crowded_status(connections=20))
    look(browser, desk.url)
    header = "#connections-table thead [aria-sort]"
    assert browser.text(header).strip() == "Age"
    for _ in range(40):
        browser.press("Tab")
        if browser.run("return document.activeElement.textContent") == "Bytes out":
            break
    assert browser.run("return document.activeElement.matches(':focus-visible')")
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter")
    order = sorted(crowded_status(connections=20).connections, key=lambda one: -one.bytes_out)
    assert [row[0] for row in rows_of(browser, "connections")] == [one.id for one in order]
    assert browser.run(f"return document.querySelector('{header}').getAttribute('aria-sort')") == "descending"
    browser.press("Space")
    assert [row[0] for row in rows_of(browser, "connections")] == [one.id for one in reversed(order)]
    assert browser.run(f"return document.querySelector('{header}').getAttribute('aria-sort')") == "ascending"
    wait_for_answers(browser, desk, 2)
    assert browser.run("return document.activeElement.textContent") == "Bytes out"
    assert [row[0] for row in rows_of(browser, "connections")] == [one.id for one in reversed(order)]
    assert len(browser.find_all("#connections-table thead button")) == 10


@browsing
def test_the_order_holds_while_figures_change(browser: Browser, desk: Desk) -> None:
    """Rows keep their elements, their order follows what is sorted by, and the scroll position stays."""
    status = crowded_status(connections=200)
    desk.say(status)
    look(browser, desk.url)
    browser.click("#connections-table thead th:nth-child(6) button")
    browser.run("""
        window.first = document.querySelector('#connections-table tbody tr');
        document.getElementById('connections-frame').scrollTop = 700;
        scrollTo(0, 400);
    """)
    name = rows_of(browser, "connections")[0][0]
    last = status.connections[-1]
    desk.say(dataclasses.replace(
        moved(status, 1.0), connections=(*status.connections[:-1], dataclasses.replace(last, bytes_in=10**9))
    ))  # fmt: skip
    wait_until(lambda: rows_of(browser, "connections")[0][0] == last.id)
    assert browser.run("return document.querySelectorAll('#connections-table tbody tr')[1] === window.first")
    assert rows_of(browser, "connections")[1][0] == name
    assert browser.run("return [document.getElementById('connections-frame').scrollTop, scrollY]") == [700, 400]


@browsing
def test_structure_for_those_who_do_not_see_it(browser: Browser, desk: Desk) -> None:
    """Landmarks, headings, tables with captions and scopes, names for what can be focused, on a telephone as well."""
    for width in (360, 1300):
        browser.resize(width, 800)
        look(browser, desk.url)
        tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
        kinds = [node["role"]["value"] for node in tree if not node.get("ignored")]
        assert {"banner", "navigation", "main", "contentinfo"} <= set(kinds)
        assert kinds.count("table") == 4
        assert kinds.count("columnheader") == 7 + 8 + 10 + 4
        assert (kinds.count("rowheader"), kinds.count("row")) == (3 + 3 + 3, 4 + 4 + 4 + 4)
        assert browser.run("return [...document.querySelectorAll('table')].every(one => one.caption.textContent)")
        assert browser.run("return [...document.querySelectorAll('th')].every(one => one.scope)")
        named = [node for node in tree if node["role"]["value"] in ("button", "link", "table", "region", "image")]
        assert all(node["name"]["value"] for node in named if not node.get("ignored"))


# --- As time goes on ------------------------------------------------------------------------------------------


@browsing
def test_rates_of_connections(browser: Browser, desk: Desk) -> None:
    """They are the differences of two answers; where the relay is another one, nothing is compared."""
    status = server_status()
    look(browser, desk.url)
    assert [row[7:9] for row in rows_of(browser, "connections")] == [["\u2013", "\u2013"]] * 3
    desk.say(status := moved(status, 2.0, in_=3_000, out=5_000_000))
    wait_until(lambda: [row[7:9] for row in rows_of(browser, "connections")] == [["1.5 kB/s", "2.5 MB/s"]] * 3)
    wait_for_answers(browser, desk, 1)  # the same moment again: no news
    assert rows_of(browser, "connections")[0][7:9] == ["1.5 kB/s", "2.5 MB/s"]
    desk.say(moved(status, 1.0, out=10**12, pid=4712))
    wait_until(lambda: [row[7:9] for row in rows_of(browser, "connections")] == [["\u2013", "\u2013"]] * 3)


@browsing
def test_a_relay_that_is_gone_and_comes_back(browser: Browser, desk: Desk) -> None:
    """It is said since when there is no answer, what is shown is marked as old, and it comes back by itself."""
    look(browser, desk.url)
    assert not browser.run("return document.getElementById('banner').checkVisibility()")
    desk.end()
    browser.wait("return document.getElementById('banner').checkVisibility()")
    assert re.fullmatch(
        r"There has been no answer since \d\d:\d\d:\d\d. What is shown is from then; the page goes on trying.",
        browser.text("#banner"),
    )
    assert browser.run("return document.title") == "no answer \u00b7 tcprelay"
    assert "grayscale" in browser.run("return getComputedStyle(document.querySelector('main')).filter")
    assert len(rows_of(browser, "connections")) == 3
    desk.say(dataclasses.replace(server_status(), problems=(), pid=4712))
    desk.begin()
    browser.wait("return !document.getElementById('banner').checkVisibility()")
    assert browser.run("return getComputedStyle(document.querySelector('main')).filter") == "none"
    assert browser.run("return document.title") == "1 service cannot be reached \u00b7 tcprelay server"
    assert [entry for entry in browser.complaints() if "ERR_CONNECTION_REFUSED" not in entry] == []


@browsing
def test_an_answer_that_is_none(browser: Browser, desk: Desk) -> None:
    """A status that is refused, or is no status, is said to be that; the page goes on."""
    desk.code = 503
    browser.open(desk.url)
    browser.wait("return document.getElementById('banner').checkVisibility()")
    assert browser.text("#banner") == (
        "The relay answers with status 503, and has not told what it does yet; the page goes on trying."
    )
    assert browser.text("#state") == "Nothing is known yet"
    desk.code = 200
    browser.wait("return document.getElementById('state').textContent === '1 problem'")
    assert not browser.run("return document.getElementById('banner').checkVisibility()")
    desk.say(dataclasses.replace(server_status(), version="9.9"))
    browser.wait("return document.getElementById('again').checkVisibility()")
    assert browser.text("#banner-text") == "The relay is version 9.9 now, and this page is of 0.1.0."
    browser.click("#again")
    browser.wait("return document.getElementById('version').textContent === '9.9'")
    assert not browser.run("return document.getElementById('banner').checkVisibility()")
    assert [entry for entry in browser.complaints() if "503" not in entry] == []


@browsing
def test_one_question_at_a_time(browser: Browser, desk: Desk) -> None:
    """A relay that does not answer is not asked again before the page has given up, and then less often."""
    look(browser, desk.url)
    wait_for_answers(browser, desk, 0)
    desk.gate.clear()
    asked = desk.asked
    wait_until(lambda: desk.at_once == 1)
    browser.wait("return document.getElementById('banner').checkVisibility()")
    assert desk.asked <= asked + 2
    assert "no answer since" in browser.text("#banner")
    desk.gate.set()
    browser.wait("return !document.getElementById('banner').checkVisibility()")


@browsing
def test_nobody_is_asked_while_nobody_looks(browser: Browser, desk: Desk) -> None:
    """A page that is hidden asks nothing; once it is seen it asks at once."""
    look(browser, desk.url)
    hide = "Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });"
    hide += "document.dispatchEvent(new Event('visibilitychange'));"
    browser.run(
        hide + "window.fetched = 0; const ask = fetch; window.fetch = (...one) => (fetched += 1, ask(...one));", True
    )
    browser.devtools("Runtime.evaluate", expression="new Promise(then => setTimeout(then, 2500))", awaitPromise=True)
    assert browser.run("return fetched") == 0
    browser.run(hide, False)
    browser.wait("return fetched", timeout=0.9)


@browsing
def test_a_page_that_is_left_open_does_not_grow(browser: Browser, desk: Desk) -> None:
    """After many answers, each with other connections, clients and events, there is as much on it as before."""
    look(browser, desk.url)
    browser.run("""
        window.answers = 0;
        window.fetch = async () => {
            answers += 1;
            const said = structuredClone(window.sample);
            said.time += answers;
            said.connections.forEach((one, place) => { one.id = `${answers}-${place}`; });
            said.clients.forEach((one, place) => { one.name = one.id = `${answers}-${place}`; });
            said.events.forEach((one, place) => { one.time += answers; one.text += answers; });
            return new Response(JSON.stringify(said));
        };
        window.sample = arguments[0];
        window.setTimeout = (then => (todo, wait) => then(todo, wait > 3000 ? wait : 0))(window.setTimeout);
    """, as_dict(crowded_status()))  # fmt: skip
    counting = "return document.querySelectorAll('*').length"
    browser.wait("return answers > 3")
    before = browser.run(counting)
    browser.wait("return answers > 30", timeout=60)
    assert abs(browser.run(counting) - before) < before / 20
    assert len(rows_of(browser, "connections")) == 200


# --- Of real relays -------------------------------------------------------------------------------------------


def url_of(relay: RelayProcess) -> str:
    """Where the status of a relay is, which has a port for it."""
    found = relay.wait_for(lambda line: re.search(r"the status is at (http://[0-9.:]+/)", line))
    return str(found[1])


@browsing
def test_a_connection_that_lives(browser: Browser, peers: Peers, workers: str) -> None:
    """It appears by itself, its bytes move, and it goes; the relay client's page tells of the same one."""
    server = peers.server("--status", "0")
    client = peers.client(server.relay_port, peers.service(echo).port, "--status", "0", "--name", "home")
    look(browser, url_of(server))
    assert browser.text("h1") == "tcprelay relay server"
    wait_until(lambda: browser.text("#state") == "All is well")
    wait_until(lambda: boxes(browser) == ["Service clients", "default", "home"])
    assert len(browser.find_all("#workers li")) == int(workers)
    sock = peers.connect(server.service_port)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    opened = server.wait_event("ConnectionOpened")
    wait_until(lambda: [row[0] for row in rows_of(browser, "connections")] == [opened["id"]])
    [row] = rows_of(browser, "connections")
    assert (row[1], row[2]) == (f"{HOST}:{sock.getsockname()[1]}", "default")
    assert row[3].startswith("home at ")
    wait_until(lambda: rows_of(browser, "connections")[0][5:7] == ["5 B", "5 B"])
    data = bytes(100_000)
    for _ in range(20):
        sock.sendall(data)
        read_exactly(sock, len(data))
    wait_until(lambda: rows_of(browser, "connections")[0][5:7] == ["2.0 MB", "2.0 MB"])
    wait_until(lambda: rows_of(browser, "services")[0][3].endswith("2.0 MB in all"))
    look(browser, url_of(client))
    assert browser.text("h1") == "tcprelay relay client"
    wait_until(lambda: [row[0] for row in rows_of(browser, "connections")] == [opened["id"]])
    assert rows_of(browser, "connections")[0][5:7] == ["2.0 MB", "2.0 MB"]
    sock.close()
    wait_until(lambda: rows_of(browser, "connections") == [])
    assert {urlsplit(url).path for url in browser.requests() if not url.startswith("data:")} == {"/", "/status.json"}


@browsing
def test_a_refused_service_client_and_its_reason(browser: Browser, peers: Peers, workers: str) -> None:
    """They stand beside the service and among the events."""
    server = peers.server("--status", "0", "--pair-timeout", "0.2")
    look(browser, url_of(server))
    with pytest.raises(OSError):
        read_exactly(peers.connect(server.service_port), 1)
    reason = server.wait_event("ConnectionFailed")["reason"]
    wait_until(lambda: rows_of(browser, "services")[0][6].partition("\n")[0] == "1")
    assert reason in rows_of(browser, "services")[0][6]
    wait_until(lambda: [row for row in rows_of(browser, "events") if row[1] == "warning" and reason in row[3]])
    assert browser.text("#state") != "All is well"


@browsing
def test_a_real_relay_that_is_started_again(browser: Browser, peers: Peers, workers: str) -> None:
    """The page says that it is gone, and shows the new one, with a token that only the first request was given."""
    token = peers.path / "status-token"
    token.write_text("a token of the tests\n")
    options = "--status-token-file", str(token)
    first = peers.server("--status", "0", *options)
    place = urlsplit(url_of(first))
    browser.open(f"http://any:a%20token%20of%20the%20tests@{place.netloc}/")
    browser.wait("return !document.getElementById('main').hidden")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    browser.wait("return document.getElementById('banner').checkVisibility()")
    started = browser.text("#started")
    second = peers.server("--status", str(place.port), *options)
    assert url_of(second) == f"http://{place.netloc}/"
    browser.wait("return !document.getElementById('banner').checkVisibility()")
    assert browser.text("#started") != started
    assert [entry for entry in browser.complaints() if "ERR_CONNECTION_REFUSED" not in entry] == []
