"""A real browser for the tests: Chromium, driven by chromedriver over the WebDriver protocol (W3C WebDriver)."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .conftest import PATIENCE, wait_until
from .peers import HOST, Program, find

PROGRAMS = "chromium", "chromedriver"
"""What a test that uses a browser needs: it bears the mark `peer` with these."""
START = 60.0
"""Seconds within which a browser must be there, and any command of it done, on a machine that is busy."""
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The name under which an element's reference stands in JSON (W3C WebDriver, section 12)."""
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Space": "\ue00d", "Shift": "\ue008", "Down": "\ue015", "End": "\ue010"}
"""Keys that are no characters, as WebDriver has them (section 17.4.2)."""
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-breakpad", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
"""No sandbox, for the tests may run as root, and nothing that a browser does of its own accord."""


def missing() -> str:
    """Which programs are not there: "" where a browser can be started."""
    from .conftest import PEER_PATH

    return ", ".join(program for program in PROGRAMS if not shutil.which(program, path=PEER_PATH))


class BrowserError(Exception):
    """What the browser has refused to do, in its own words."""


class Browser:
    """One window of a browser, with a profile of its own in an empty directory.  As a context manager it is ended, with
    all that it has started, on the way out.
    """

    def __init__(self, profile: Path) -> None:
        home = {"HOME": str(profile), "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)}
        self._driver = Program(find("chromedriver"), "--port=0", env=home)
        self._path = ""
        try:
            said = "started successfully on port "
            self._port = int(self._driver.wait_for(lambda line: line.partition(said)[2].rstrip("."), timeout=START))
            arguments = [*FLAGS, f"--user-data-dir={profile / 'profile'}"]
            logs = {"browser": "ALL", "performance": "ALL"}
            options = {"binary": find("chromium"), "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._path = f"/session/{session['sessionId']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser, then its driver, and what is left of either."""
        started = _descendants(self._driver.process.pid)
        if self._path:
            try:
                self._ask("DELETE", self._path)
            except (OSError, http.client.HTTPException, BrowserError):
                pass  # it is ended the hard way
            self._path = ""
        self._driver.close()
        for pid, born in started.items():
            if _born(pid) == born:  # the number may be another process's by now
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    # Pages

    def open(self, url: str) -> None:
        """Go to a page and wait until it is loaded."""
        self._command("/url", url=url)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Have a page be so large, in CSS pixels: also narrower than a window can be."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, **features: str) -> None:
        """Have the reader prefer something: ``color_scheme="dark"``, ``reduced_motion="reduce"``; "" for nothing."""
        listed = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=listed)

    def devtools(self, name: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools Protocol, which chromedriver passes on."""
        return self._command("/goog/cdp/execute", cmd=name, params=parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns that runs in the page, with these `arguments`; elements are passed as they came."""
        return self._command("/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, *arguments: Any, timeout: float = PATIENCE) -> Any:
        """The first true value that a script returns in the page."""
        return wait_until(lambda: self.run(script, *arguments), timeout)

    def screenshot(self) -> bytes:
        """What is seen of the page now, as PNG."""
        return base64.b64decode(self._command("/screenshot", "GET"))

    # What is on them

    def find_all(self, selector: str) -> list[Mapping[str, str]]:
        """References to the elements that a CSS selector matches."""
        return list(self._command("/elements", using="css selector", value=selector))

    def find(self, selector: str) -> Mapping[str, str]:
        """The first of them; the test fails where there is none."""
        found = self.find_all(selector)
        assert found, f"nothing on the page is {selector}"
        return found[0]

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return str(self._command(f"/element/{self.find(selector)[ELEMENT]}/text", "GET"))

    def click(self, selector: str) -> None:
        self._command(f"/element/{self.find(selector)[ELEMENT]}/click")

    def press(self, *keys: str) -> None:
        """Press keys one after another, each a character or a name in `KEYS`; they go to what has the focus."""
        strokes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": key} for key in strokes for kind in ("keyDown", "keyUp")]
        self._command("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    # What it has done

    def complaints(self) -> list[str]:
        """What stands in its console since the last call: errors of scripts and of the network, and what a policy has
        forbidden."""
        return [str(entry["message"]) for entry in self._command("/se/log", type="browser")]

    def requests(self) -> list[str]:
        """The URLs that have been asked for since the last call, whoever asked for them in the page."""
        entries = [json.loads(entry["message"])["message"] for entry in self._command("/se/log", type="performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [str(params["request"]["url"]) for params in sent]

    # The protocol

    def _command(self, path: str, method: str = "POST", **body: Any) -> Any:
        return self._ask(method, self._path + path, body if method == "POST" else None)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=START)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer and "stacktrace" in answer:
            raise BrowserError(f"{answer['error']}: {answer.get('message', '')}")
        return answer


def _born(pid: int) -> str:
    """When a process was started, as the kernel counts; "" where there is none, or it is dead."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == "Z" else words[19]


def _descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those have started, and when."""
    found: dict[int, str] = {}
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return found
    for child in children:
        found |= {child: _born(child), **_descendants(child)}
    return found
