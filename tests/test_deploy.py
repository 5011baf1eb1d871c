"""The demo, the example configurations, and what Docker, Compose and systemd are told."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest

from _tcprelay.command_line import parse_options
from _tcprelay.options import Options, options_of
from _tcprelay.threads import JOIN_TIMEOUT
from _tcprelay.values import Option, show_nothing
from tcprelay import ClientOptions, ServerOptions

from .conftest import PATIENCE, wait_until
from .peers import ROOT, Peers, Program, RelayProcess, find

DEPLOY = ROOT / "deploy"
DEMO = str(DEPLOY / "demo.py")
Role = Literal["server", "client"]
ROLES: tuple[Role, ...] = ("server", "client")
OPTIONS: dict[Role, type[Options]] = {"server": ServerOptions, "client": ClientOptions}
OUTSIDE = {"config"}
"""Options of the commands that are no fields of the options classes, and stand in the environment too."""

# What a relay of each role needs to start.
STARTS: dict[Role, tuple[str, ...]] = {
    "server": ("--hostname", "127.0.0.1", "--relay-port", "0", "--service-port", "0"),
    "client": ("--port", "1", "--relay-host", "127.0.0.1", "--relay-port", "1"),
}


def option_table(role: Role) -> dict[str, Option]:
    """The options of a role by their names on the command line."""
    return {name.replace("_", "-"): info for name, info in options_of(OPTIONS[role])}


def check(role: Role, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have a command check its configuration."""
    return subprocess.run(
        [sys.executable, "-m", "tcprelay", role, *options, "--check"], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=6 * PATIENCE, check=False,
    )  # fmt: skip


# --- The demo -------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended in the meantime
        if fields[1] == str(pid):
            children.append(int(stat.parent.name))
    return sorted(children)


class Demo(Program):
    """The demo without --once, in a session of its own as a terminal's, once it has shown the page."""

    def __init__(self) -> None:
        code = "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        super().__init__(sys.executable, "-c", code, DEMO)
        self.wait_for(lambda line: "Ctrl-C" in line)
        self.relays = children_of(self.process.pid)
        assert len(self.relays) == 2


def test_the_demo_shows_the_page_and_ends(scratch: Path) -> None:
    """With --once the status is 0, the page is there, and nothing is left over."""
    result = subprocess.run(
        [sys.executable, DEMO, "--once"], capture_output=True, encoding="utf-8", timeout=6 * PATIENCE, check=False,
        env={**os.environ, "TCPRELAY_RELAY_PORT": "nonsense", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "It came through the relay." in result.stdout
    for party in ("web service", "relay server", "relay client"):
        assert re.search(rf"^    {party} +listens ", result.stdout, re.MULTILINE)
    assert not list(scratch.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_ends_when_it_is_told_to(scratch: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches the relays as well; whoever is first, the demo ends with status 0 and takes all with it."""
    with closing(Demo()) as demo:
        if number == signal.SIGINT:
            os.killpg(demo.process.pid, number)
        else:
            demo.signal(number)
        assert demo.wait(2 * PATIENCE) == 0, demo.output
        assert "Traceback" not in demo.output
        assert demo.lines[-1] == "Ended."
        assert not list(scratch.iterdir())
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in demo.relays))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="finds processes in /proc")
def test_the_demo_tells_that_a_relay_has_died(scratch: Path) -> None:
    """One line, status 1, and the other relay is ended too."""
    with closing(Demo()) as demo:
        os.kill(demo.relays[0], signal.SIGKILL)
        assert demo.wait(2 * PATIENCE) == 1, demo.output
        assert demo.lines[-1].startswith("demo: the relay server has ended by signal 9, and its last line was: ")
        assert not list(scratch.iterdir())
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in demo.relays))


# --- Example configurations -----------------------------------------------------------------------------------

COMMENTED = re.compile(r"^#([a-z][a-z-]*) = (.*)$", re.MULTILINE)
GIVEN = re.compile(r"^([a-z][a-z-]*) = (.*)$", re.MULTILINE)


@pytest.mark.parametrize("role", ROLES)
def test_an_example_configuration_is_valid(role: Role) -> None:
    """As it is, the required options are there and nothing else."""
    result = check(role, "--config", str(DEPLOY / f"{role}.conf"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"tcprelay{role[0]}: the configuration is valid\nread: {DEPLOY / role}.conf\n")


@pytest.mark.parametrize("role", ROLES)
def test_an_example_configuration_is_valid_with_all_that_it_shows(role: Role, tmp_path: Path) -> None:
    """Every line of the form "#option = value" can be made an option by removing the first character; of a PFX
    file and a certificate with its key, and of a token and a clients file, one or the other."""
    text = (
        COMMENTED.sub(r"\1 = \2", (DEPLOY / f"{role}.conf").read_text())
        .replace("tls = true", "tls = both")
        .replace("auth = false", "auth = true")
    )
    config = tmp_path / "all.conf"
    for left_out in ("pfx|service-pfx|token-file", "cert|key|service-cert|service-key|clients"):
        config.write_text(re.sub(rf"(?m)^({left_out}) = .*$", "", text))
        options = parse_options(f"tcprelay{role[0]}", "", OPTIONS[role], ["--config", str(config)]).options
        assert (options.tls, bool(options.pfx)) == ("both", "service-pfx" not in left_out)


@pytest.mark.parametrize("role", ROLES)
def test_an_example_configuration_shows_every_option(role: Role) -> None:
    """All but secrets, which do not belong into it; and beside examples, which it calls so, the defaults."""
    text = (DEPLOY / f"{role}.conf").read_text()
    table = option_table(role)
    shown = dict([*GIVEN.findall(text), *COMMENTED.findall(text)])
    assert set(shown) == {name for name, info in table.items() if info.public is not show_nothing or not info.secret}
    examples = set()
    for paragraph in text.split("\n\n"):
        if "xample" in paragraph:
            examples |= {name for name, _ in COMMENTED.findall(paragraph)}
    fields = {field.replace("_", "-"): default for field, default in defaults_of(role).items()}
    for name, value in COMMENTED.findall(text):
        if name not in examples:
            assert table[name].parse(value) == fields[name], name


def defaults_of(role: Role) -> dict[str, object]:
    return {name: field.default for name, field in OPTIONS[role].__dataclass_fields__.items()}


# --- Docker and Compose ---------------------------------------------------------------------------------------


def variables_in(text: str) -> set[str]:
    return set(re.findall(r"\bTCPRELAY_[A-Z_]*[A-Z]\b", text))


@pytest.mark.parametrize(
    "name", ["Dockerfile", "compose.yaml", "compose.tls.yaml", "tcprelays.service", "tcprelayc.service"]
)
def test_environment_variables_are_options(name: str) -> None:
    """Each TCPRELAY_... that is named is an option of one of the commands."""
    known = {f"TCPRELAY_{option.upper()}" for role in ROLES for option, _ in options_of(OPTIONS[role])}
    known |= {f"TCPRELAY_{option.upper()}" for option in OUTSIDE}
    assert variables_in((DEPLOY / name).read_text()) - known == set()


def compose_service(name: str, file: str = "compose.yaml") -> str:
    """The lines of one service in a Compose file."""
    found = re.search(rf"^  {name}:\n((?:    .*\n|\n)+)", (DEPLOY / file).read_text(), re.MULTILINE)
    assert found
    return found[1]


def compose_environment(role: Role, file: str = "compose.yaml") -> dict[str, str]:
    """What such a file gives a relay."""
    return dict(re.findall(r'^      (TCPRELAY_\w+): "?(.*?)"?$', compose_service(role, file), re.MULTILINE))


@pytest.mark.peer("openssl")
def test_compose_with_tls(peers: Peers, tmp_path: Path) -> None:
    """The certificate is made as the file says, and with its variables server and client find each other."""
    text = (DEPLOY / "compose.tls.yaml").read_text()
    command = re.search(r"^#   (openssl (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert command
    made = re.sub(r"\\\n#", " ", command[1])
    subprocess.run(shlex.split(made), cwd=tmp_path, capture_output=True, check=True, timeout=6 * PATIENCE)
    (tmp_path / "token").write_text("a token of the tests\n")
    files = {"tcprelay_cert": "cert.pem", "tcprelay_key": "key.pem", "tcprelay_token": "token"}

    def environment(role: Role) -> dict[str, str]:
        given = {**compose_environment(role), **compose_environment(role, "compose.tls.yaml")}
        for secret, file in files.items():
            given = {
                name: value.replace(f"/run/secrets/{secret}", str(tmp_path / file)) for name, value in given.items()
            }
        return given

    free = {"TCPRELAY_RELAY_PORT": "0", "TCPRELAY_SERVICE_PORT": "0"}
    server = peers.relay_process("server", "--hostname", "127.0.0.1", env={**environment("server"), **free})
    words = "--relay-host", "127.0.0.1", "--tls-server-name", environment("client")["TCPRELAY_RELAY_HOST"]
    at = {"TCPRELAY_RELAY_PORT": str(server.relay_port), "TCPRELAY_HOST": "127.0.0.1"}
    client = peers.relay_process("client", *words, env={**environment("client"), **at})
    client.wait_event("Published")


@pytest.mark.parametrize("role", ROLES)
def test_a_relay_in_compose_is_configured_by_its_environment(role: Role, tmp_path: Path) -> None:
    """The command is the role alone, and the variables are all that it needs."""
    service = compose_service(role)
    assert f'command: ["{role}"]' in service
    environment = compose_environment(role)
    assert environment.pop("TCPRELAY_TOKEN_FILE") == "/run/secrets/tcprelay_token"
    token = tmp_path / "token"
    token.write_text("a token of the tests\n")
    result = check(role, **environment, TCPRELAY_TOKEN_FILE=str(token))
    assert (result.returncode, result.stderr) == (0, "")


def test_the_web_service_in_compose_is_reached_by_the_client_alone() -> None:
    """It publishes no port, and the relay client alone is in its network."""
    networks = {name: set(networks_of(compose_service(name))) for name in ("server", "client", "web")}
    assert networks == {"server": {"links"}, "client": {"links", "private"}, "web": {"private"}}
    assert "ports:" not in compose_service("web") + compose_service("client")
    assert re.search(r"^  private:\n    internal: true$", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)


def networks_of(service: str) -> list[str]:
    found = re.search(r"^    networks: \[(.*)\]$", service, re.MULTILINE)
    assert found
    return found[1].split(", ")


def test_the_image_has_what_the_wheel_needs() -> None:
    """Each file that the image copies is there, and all modules, rooms and stubs, of which pip is told as well."""
    dockerfile, project = (DEPLOY / "Dockerfile").read_text(), (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^COPY (.*) /src/$", dockerfile, re.MULTILINE)
    assert found
    copied = found[1].split()
    assert [name for name in copied if not (ROOT / name).is_file()] == []
    doors = {path.name for path in ROOT.glob("tcprelay*.py")}
    assert doors <= set(copied)
    assert "\nCOPY _tcprelay /src/_tcprelay\nCOPY deploy/stubs /src/deploy/stubs\n" in dockerfile
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("_tcprelay/**/__init__.py")}
    assert {f"{name}.py" for name in listed(project, "py-modules")} == doors
    assert set(listed(project, "packages")) == rooms | {f"{path.name}-stubs" for path in (DEPLOY / "stubs").iterdir()}
    for path in ROOT.glob("tcprelay*.py"):
        assert (DEPLOY / "stubs" / path.stem / "__init__.pyi").resolve() == path


def listed(project: str, key: str) -> list[str]:
    """A list of strings in pyproject.toml."""
    found = re.search(rf"^{key} = (\[.*\])$", project, re.MULTILINE)
    assert found
    return list(json.loads(found[1]))


# --- systemd --------------------------------------------------------------------------------------------------


def unit_of(role: Role) -> Path:
    return DEPLOY / f"tcprelay{role[0]}.service"


def settings_of(role: Role) -> dict[str, str]:
    """The settings of a unit; of one that is there several times, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", unit_of(role).read_text(), re.MULTILINE))


@pytest.mark.parametrize(("role", "own_token"), [("server", False), ("server", True), ("client", True)])
def test_a_unit_starts_its_command_with_valid_options(role: Role, own_token: bool, tmp_path: Path) -> None:
    """The options and the environment pass the command's own check; a server's without a credential, too, and with the
    one that the unit can load."""
    text = unit_of(role).read_text()
    if own_token:
        text = re.sub("^#(LoadCredential|Environment)=", r"\1=", text, flags=re.MULTILINE)
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    program, *options = shlex.split(settings["ExecStart"])
    assert program == f"/usr/local/bin/tcprelay{role[0]}"
    environment = {"STATE_DIRECTORY": str(tmp_path / "state")}
    if own_token:
        credential, _, _ = settings["LoadCredential"].partition(":")
        (tmp_path / credential).write_text("a token of the tests\n")
        name, _, value = settings["Environment"].partition("=")
        environment[name] = value.replace("%d", str(tmp_path))
    options = [option.replace("/etc/tcprelay", str(DEPLOY)) for option in options]
    result = check(role, *options, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("state/identity.pem: it is made at the first start" in result.stdout) == (role == "server")


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_has_patience_for_the_drain(role: Role) -> None:
    """systemd kills what has not ended in time, so it must wait longer than the drain and all joins take."""
    settings = settings_of(role)
    drain = defaults_of(role)["drain_timeout"]
    assert isinstance(drain, float)
    assert float(settings["TimeoutStopSec"]) > drain + 3 * JOIN_TIMEOUT
    assert settings["Type"] == "notify"


@pytest.mark.peer("systemd-analyze")
@pytest.mark.parametrize("role", ROLES)
def test_systemd_accepts_a_unit(role: Role, tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say about it."""
    unit = tmp_path / unit_of(role).name
    program = tmp_path / f"tcprelay{role[0]}"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit.write_text(unit_of(role).read_text().replace(f"/usr/local/bin/{program.name}", str(program)))
    result = subprocess.run(
        [find("systemd-analyze"), "verify", "--man=no", str(unit)],
        capture_output=True, text=True, timeout=6 * PATIENCE, check=False,
    )  # fmt: skip
    about_it = [line for line in result.stderr.splitlines() if unit.name in line]
    assert (result.returncode, about_it) == (0, [])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_service_manager_is_notified(role: Role, kind: str, tmp_path: Path) -> None:
    """READY=1 when it serves, STOPPING=1 at SIGTERM, and nothing else."""
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract socket names are Linux's")
    address = str(tmp_path / "notify") if kind == "path" else f"@tcprelay-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if kind == "abstract" else address)
        manager.settimeout(PATIENCE)
        with RelayProcess(role, *STARTS[role], env={"NOTIFY_SOCKET": address}) as relay:
            assert manager.recv(1000) == b"READY=1"
            relay.signal(signal.SIGTERM)
            assert manager.recv(1000) == b"STOPPING=1"
            assert relay.wait() == 0
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(1000)


def test_no_service_manager_is_no_fault() -> None:
    """A notification that cannot be delivered is a warning in the log, and the relay runs."""
    with RelayProcess("server", *STARTS["server"], env={"NOTIFY_SOCKET": "/nonexistent/notify"}) as relay:
        relay.wait_for(lambda line: "cannot notify systemd" in line)
        relay.signal(signal.SIGTERM)
        assert relay.wait() == 0


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_leaves_no_core_file(role: Role) -> None:
    """There would be tokens and keys in it."""
    assert settings_of(role)["LimitCORE"] == "0"
