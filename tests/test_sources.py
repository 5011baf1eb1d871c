"""What is made of the text of an option, wherever it comes from: the command line, the environment, a configuration
file, a program, or the file that holds a secret.  What is empty, what does not belong to it, and whose it is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tcprelay_client
import tcprelay_server
from _tcprelay.command_line import parse_options
from _tcprelay.options import Options, options_of
from tcprelay import ClientOptions, ServerOptions

from .conftest import Bench, echo, read_exactly

MAINS = {"server": tcprelay_server.main, "client": tcprelay_client.main}
CLASSES: dict[str, type[Options]] = {"server": ServerOptions, "client": ClientOptions}
WORDS = {
    "server": ["--relay-port", "1080", "--service", "web=1081"],
    "client": ["--relay-host", "relay", "--relay-port", "1080", "--publish", "web=nas:80"],
}
NEEDED = {"relay_host", "relay_port", "service", "publish"}
"""Options that stand in `WORDS`."""


class Give:
    """Gives a role's command a value from a source, and has it parsed or checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        self._monkeypatch, self._capsys, self.path = monkeypatch, capsys, tmp_path

    def words(self, role: str, source: str, name: str, value: str) -> list[str]:
        dashed = name.replace("_", "-")
        words = [word for word in WORDS[role] if name not in NEEDED]
        if name in NEEDED:
            pairs = zip(WORDS[role][::2], WORDS[role][1::2], strict=True)
            words = [word for pair in pairs if pair[0] != f"--{dashed}" for word in pair]
        if source == "command line":
            return [*words, f"--{dashed}={value}"]
        if source == "environment":
            self._monkeypatch.setenv(f"TCPRELAY_{name.upper()}", value)
            return words
        config = self.path / "tcprelay.conf"
        config.write_bytes(f"{dashed} = {value}\n".encode())
        return [*words, "--config", str(config)]

    def parse(self, role: str, source: str, name: str, value: str) -> Any:
        """The option's value."""
        words = self.words(role, source, name, value)
        return getattr(parse_options("test", "", CLASSES[role], words).options, name)

    def check(self, role: str, words: list[str]) -> tuple[int, str]:
        """The status of ``--check``, and what it says on standard error."""
        try:
            status = MAINS[role]([*words, "--check"])
        except SystemExit as end:
            status = int(str(end.code))
        return status, self._capsys.readouterr().err


@pytest.fixture
def give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, own_logging: None
) -> Give:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    return Give(monkeypatch, capsys, tmp_path)


SOURCES = ("command line", "environment", "file")
ORIGINS = dict(zip(SOURCES, ("command line", "environment variable TCPRELAY_", "tcprelay.conf, line"), strict=True))


# --- What is empty --------------------------------------------------------------------------------------------

BOTH = """token secret token_file tls cert key pfx passphrase passphrase_file ca_file tls_min status_token
    status_token_file"""
SERVERS = """hostname clients auth max_per_address max_links_per_address service_cert service_key service_pfx state_dir
    service_alpn allow_unauthenticated allow deny deny_file allow_links deny_links accept_proxy_protocol"""
CLIENTS = """via reject_unauthorized tls_server_name pin service_ca_file service_insecure service_server_name
    service_alpn"""
SECURING = {"server": f"{BOTH} {SERVERS}".split(), "client": f"{BOTH} {CLIENTS}".split()}
OTHERS = {role: [n for n, _ in options_of(CLASSES[role]) if n not in SECURING[role]] for role in SECURING}


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(role, name) for role, names in table.items() for name in names]


@pytest.mark.parametrize("value", ["", " \r"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("role", "name"), pairs(SECURING))
def test_an_empty_value_of_what_secures_is_an_error(give: Give, role: str, name: str, source: str, value: str) -> None:
    """It never means off without a word: one line has the option, its origin and what is accepted; the status is 2."""
    status, said = give.check(role, give.words(role, source, name, value))
    assert status == 2
    assert said.count("\n") == 1, said
    assert f": --{name.replace('_', '-')}" in said
    assert f"{ORIGINS[source]}" in said
    assert "expected " in said


@pytest.mark.parametrize(("role", "name"), pairs(OTHERS))
def test_another_empty_variable_counts_as_not_given(give: Give, role: str, name: str) -> None:
    """Compose passes what is not set as empty; what is required is missing then."""
    words = give.words(role, "environment", name, "")
    if name in NEEDED:
        status, said = give.check(role, words)
        assert (status, said.count("\n")) == (2, 1)
        assert "required" in said
    else:
        default = CLASSES[role].__dataclass_fields__[name].default
        assert getattr(parse_options("test", "", CLASSES[role], words).options, name) == default


@pytest.mark.parametrize("source", ["command line", "file"])
@pytest.mark.parametrize(("role", "name"), pairs(OTHERS))
def test_another_empty_value_elsewhere_is_an_error(give: Give, role: str, name: str, source: str) -> None:
    """Somebody has written it there; but of a name, to have none is sensible."""
    words = give.words(role, source, name, "")
    if name == "name":
        assert parse_options("test", "", CLASSES[role], words).options.name == ""  # type: ignore[attr-defined]
    else:
        status, said = give.check(role, words)
        assert (status, said.count("\n")) == (2, 1)
        assert f"--{name.replace('_', '-')} '' (from " in said


@pytest.mark.parametrize("source", ["command line", "environment"])
@pytest.mark.parametrize("role", CLASSES)
def test_an_empty_name_of_the_configuration_file_is_an_error(give: Give, role: str, source: str) -> None:
    """All that secures may stand in that file."""
    status, said = give.check(role, give.words(role, source, "config", ""))
    assert (status, said.count("\n")) == (2, 1)
    assert f"--config '' (from {ORIGINS[source]}" in said


def test_the_command_line_goes_before_an_empty_variable(give: Give) -> None:
    """As before any other."""
    words = [*give.words("client", "environment", "tls", ""), "--tls"]
    assert parse_options("test", "", ClientOptions, words).options.tls == "relay"


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize(("role", "name"), pairs(SECURING))
def test_nothing_in_a_constructor_is_the_default(role: str, name: str, value: str | None) -> None:
    """`None` and, where the option is a text that may be missing, "": a program has no other way to say so.  "" for a
    switch is refused."""
    default = CLASSES[role].__dataclass_fields__[name].default
    options: dict[str, Any] = {"service_port": 1} if role == "server" else {"relay_host": "relay", "port": 1}
    options |= {"relay_port": 1080, name: value}
    if value is None or default == "":
        assert getattr(CLASSES[role](**options), name) == default
    else:
        with pytest.raises(ValueError, match=f"^{name} ''"):
            CLASSES[role](**options)


# --- What does not belong to it -------------------------------------------------------------------------------

AROUND = ["{}\n", "{}\r\n", "{}\r", " {}\t", "\ufeff{}", "\ufeff{}\r\n", "{}\n\n"]
SECRETS = ["secret", "a b  c", "a#b;c", "[a, b]", "é", "a'b", "--a=b"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("source", [*SOURCES, "program", "its file"])
def test_a_secret_is_the_same_from_everywhere(give: Give, source: str, around: str, secret: str) -> None:
    """Blanks, line ends and a byte order mark around it are left out; what is inside counts."""
    text = around.format(secret)
    path = give.path / "secret"
    path.write_bytes(text.encode())
    if source in SOURCES:
        assert give.parse("client", source, "token", text) == secret
        assert give.parse("client", source, "passphrase", text) == secret
    else:
        given: dict[str, Any] = {"token": text, "passphrase": text}
        if source == "its file":
            given = {"token_file": str(path), "passphrase_file": f"{path}\n"}
        options = ClientOptions(relay_host="relay", relay_port=1, port=1, **given)
        assert (options.read_token(), options.read_passphrase()) == (secret.encode(), secret)


def test_bytes_that_are_no_text_are_a_token_too(give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones from a file and from the environment."""
    (give.path / "token").write_bytes(b"\xff\x01a\r\n")
    monkeypatch.setitem(os.environb, b"TCPRELAY_TOKEN", b"\xff\x01a\r\n")
    from_environment = parse_options("test", "", ClientOptions, WORDS["client"]).options
    from_file = ClientOptions(relay_host="r", relay_port=1, port=1, token_file=str(give.path / "token"))
    assert from_environment.read_token() == from_file.read_token() == b"\xff\x01a"


def test_relays_whose_token_came_in_different_ways(bench: Bench, tmp_path: Path) -> None:
    """A line end on one side, a byte order mark on the other: they let each other in."""
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfthe token\r\n")
    server = bench.server(token=" the token\n")
    bench.client(server, bench.service(echo).port, token_file=str(tmp_path / "token"))
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"


@pytest.mark.parametrize("secret", ["a\nb", "a\r\nb", "a\rb"])
@pytest.mark.parametrize("source", ["command line", "environment"])
def test_a_secret_of_several_lines_is_refused(give: Give, source: str, secret: str) -> None:
    """Of a file the first line alone counts: so one side would have another token."""
    status, said = give.check("server", give.words("server", source, "token", secret))
    assert (status, said.count("\n")) == (2, 1)
    assert "expected one line" in said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["token_file", "passphrase_file"])
def test_a_secret_s_file_in_utf16_is_named_so(give: Give, name: str, encoding: str) -> None:
    """PowerShell's > writes that; it would be another secret than the other side's."""
    (give.path / "secret").write_bytes("ab12\r\n".encode(encoding))
    words = give.words("server", "command line", name, str(give.path / "secret"))
    if name == "passphrase_file":
        words += ["--tls", "--cert", str(give.path / "none")]
    status, said = give.check("server", words)
    assert (status, said.count("\n")) == (2, 1)
    assert f"--{name.replace('_', '-')} {give.path / 'secret'}: it is UTF-16" in said


def test_a_secret_that_is_too_long_is_not_cut(give: Give) -> None:
    """It is refused."""
    (give.path / "token").write_text(70_000 * "a")
    status, said = give.check("server", give.words("server", "command line", "token_file", str(give.path / "token")))
    assert status == 2
    assert "its first line is longer than 65,536 bytes" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relay_host", "re lay"), ("relay_host", "relay\tb"), ("relay_host", "relay\rb"), ("relay_host", "\u00a0relay"),
        ("relay_host", "'relay'"), ("relay_host", "tcp://relay"), ("relay_host", "re\x7flay"), ("host", "n as"),
        ("host", "unix:/run/\x01a"), ("publish", "a=n as:80"), ("publish", "a=nas\r:80"), ("publish", "a=unix:/a\x1b"),
        ("tls_server_name", "re lay"), ("cert", "/a\x07b"), ("token_file", "/a\rb"), ("ca_file", "/a\tb"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["command line", "environment"])
def test_characters_that_no_host_and_no_path_has(give: Give, source: str, name: str, value: str) -> None:
    """``--check`` refuses them, and shows them escaped."""
    status, said = give.check("client", give.words("client", source, name, value))
    assert (status, said.count("\n")) == (2, 1)
    assert f": --{name.replace('_', '-')} " in said
    assert said.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("role", "name", "value", "expected"),
    [
        ("client", "relay_host", "relay\r", "relay"),
        ("client", "relay_host", " [::1] ", "::1"),
        ("client", "relay_host", "fe80::1%eth0", "fe80::1%eth0"),
        ("client", "relay_host", "bücher.example", "bücher.example"),
        ("client", "host", "unix:/run/with blank/s\r", "unix:/run/with blank/s"),
        ("client", "token_file", "/run/with blank/token\r", "/run/with blank/token"),
        ("client", "relay_port", "80\r", 80),
        ("server", "hostname", "[::]\r", "::"),
        ("server", "tls", "both\r", "both"),
        ("server", "heartbeat", "5\r", 5.0),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_what_stands_around_any_value_is_left_out(
    give: Give, source: str, role: str, name: str, value: str, expected: object
) -> None:
    """Files with the line ends of another system are usual."""
    assert give.parse(role, source, name, value) == expected


def test_a_whole_file_with_the_line_ends_of_another_system(give: Give) -> None:
    """And a byte order mark."""
    config = give.path / "c.conf"
    config.write_bytes(b"\xef\xbb\xbfrelay-host = relay\r\nrelay-port = 1\r\n\r\npublish = a=nas:80\r\ntls\r\n")
    options = parse_options("test", "", ClientOptions, ["--config", str(config)]).options
    assert (options.relay_host, options.services[0].target.port, options.tls) == ("relay", 80, "relay")


# --- Lines of a configuration file ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("token = ab#cd", "ab#cd"), ("token = ab;cd", "ab;cd"), ("token = #cd", None), ("token =#cd", "#cd"),
        ("token = ab #cd", None), ("token = ab ;cd", None), ("token = ab\t# cd", None), ("token = ab ; cd", None),
        ("token = 'ab #cd'", "ab #cd"), ('token = "ab ;cd"', "ab ;cd"), ("token = \"'ab'\"", "'ab'"),
        ("token = 'ab' # cd", None), ("token = 'ab", None), ("token = ab'", "ab'"), ("token = '", None),
        ("token = 'a'b'", "a'b"), ("token = [ab]", "[ab]"), ('token = ["a", "b"]', '["a", "b"]'),
        ("token = a = b", "a = b"), ("token: a:b=c", "a:b=c"), ("token a b", "a b"), ("--token=ab", "ab"),
        ("token = ''", None), ("token", None), ("token =", None), ("token # ab", None), ("token = --tls", "--tls"),
        ("token = true", "true"), ("token = \\n", "\\n"), ("token = %d", "%d"), ("token = ${A}", "${A}"),
    ],
)  # fmt: skip
def test_a_value_is_taken_whole_or_not_at_all(give: Give, line: str, expected: str | None) -> None:
    """To the end of the line; quotes around it are taken off, and where a comment might be meant it is refused."""
    config = give.path / "c.conf"
    config.write_text(f"# the token\n{line}\n")
    words = [*WORDS["client"], "--config", str(config)]
    if expected is not None:
        assert parse_options("test", "", ClientOptions, words).options.token == expected
        return
    status, said = give.check("client", words)
    assert (status, said.count("\n")) == (2, 1)
    assert f"{config}, line 2" in said
    assert "ab" not in said.replace(str(config), "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("publish = a=x:1", ["a"]), ("publish = a=x:1, b=y:2", ["a", "b"]), ("publish = [a=x:1, b=y:2]", ["a", "b"]),
        ('publish = ["a=x:1", "b=y:2"]', ["a", "b"]), ("publish = 'a=x:1'", ["a"]), ("publish = a=[::1]:1", ["a"]),
    ],
)  # fmt: skip
def test_lists(give: Give, line: str, expected: list[str]) -> None:
    """With commas, in brackets, in quotes."""
    config = give.path / "c.conf"
    config.write_text(f"relay-host = [::1]\nrelay-port = 1\n{line}\n")
    options = parse_options("test", "", ClientOptions, ["--config", str(config)]).options
    assert ([item.name for item in options.publish], options.relay_host) == (expected, "::1")


def test_a_comment_behind_a_value_is_refused_for_every_option(give: Give) -> None:
    """One rule for all of them, with the way out."""
    status, said = give.check("server", give.words("server", "file", "heartbeat", "5 # seconds"))
    assert status == 2
    assert "line 1: a comment needs a line of its own, and a value with # or ; behind a blank needs quotes" in said


# --- Whose variables they are ---------------------------------------------------------------------------------


def service_links(service: str, *ports: tuple[str, int], protocol: str = "TCP") -> dict[str, str]:
    """What Kubernetes gives each container of the namespace of a Service (kubelet, envvars.FromServices)."""
    name, address = service.upper().replace("-", "_"), "10.0.0.1"
    made = {f"{name}_SERVICE_HOST": address, f"{name}_SERVICE_PORT": str(ports[0][1])}
    made[f"{name}_PORT"] = f"{protocol.lower()}://{address}:{ports[0][1]}"
    for port_name, port in ports:
        if port_name:
            made[f"{name}_SERVICE_PORT_{port_name.upper()}"] = str(port)
        link = f"{name}_PORT_{port}_{protocol}"
        made |= {link: f"{protocol.lower()}://{address}:{port}", f"{link}_PROTO": protocol.lower()}
        made |= {f"{link}_PORT": str(port), f"{link}_ADDR": address}
    return made


RELAY = service_links("tcprelay", ("relay", 10080), ("service", 10081))
ALONE = service_links("tcprelay", ("", 10081))
LINK = {
    "TCPRELAY_PORT": "tcp://172.17.0.5:10080",
    "TCPRELAY_PORT_10080_TCP": "tcp://172.17.0.5:10080",
    "TCPRELAY_PORT_10080_TCP_ADDR": "172.17.0.5",
    "TCPRELAY_PORT_10080_TCP_PORT": "10080",
    "TCPRELAY_PORT_10080_TCP_PROTO": "tcp",
    "TCPRELAY_NAME": "/web/tcprelay",
    "TCPRELAY_ENV_TCPRELAY_TOKEN": "c4nary",
}
"""What ``docker run --link relay:tcprelay`` gives."""


@pytest.mark.parametrize(
    ("role", "environment", "expected", "ignored"),
    [
        ("server", RELAY, {"service_port": None}, "TCPRELAY_PORT, TCPRELAY_SERVICE_PORT"),
        ("client", RELAY, {"port": None}, "TCPRELAY_PORT, TCPRELAY_SERVICE_PORT"),
        ("server", ALONE, {"service_port": None}, "TCPRELAY_PORT, TCPRELAY_SERVICE_PORT"),
        # What the pod sets itself replaces what is made, and differs from it.
        ("server", {**RELAY, "TCPRELAY_SERVICE_PORT": "10081"}, {"service_port": 10081}, "TCPRELAY_PORT"),
        ("client", {**RELAY, "TCPRELAY_PORT": "22"}, {"port": 22}, "TCPRELAY_SERVICE_PORT"),
        ("client", {**ALONE, "TCPRELAY_PORT": "22"}, {"port": 22}, "TCPRELAY_SERVICE_PORT"),
        ("server", {**ALONE, "TCPRELAY_PORT": "22", "TCPRELAY_SERVICE_PORT": "2222"}, {"service_port": 2222}, ""),
        # A single one of them is enough, and nothing is ignored without.
        ("client", {"TCPRELAY_PORT": "tcp://10.0.0.1:10080"}, {"port": None}, "TCPRELAY_PORT"),
        ("client", {"TCPRELAY_PORT": "tcp://[fd00::1]:10080"}, {"port": None}, "TCPRELAY_PORT"),
        ("client", {"TCPRELAY_PORT": "udp://10.0.0.1:53"}, {"port": None}, "TCPRELAY_PORT"),
        ("client", {"TCPRELAY_PORT": "22"}, {"port": 22}, ""),
        ("server", {"TCPRELAY_SERVICE_PORT": "10081"}, {"service_port": 10081}, ""),
        # Services of other names.
        ("client", service_links("tcprelay-relay", ("", 9)), {"relay_port": 1080}, "TCPRELAY_RELAY_PORT"),
        ("server", service_links("tcprelay-service", ("", 9)), {"service_port": None}, "TCPRELAY_SERVICE_PORT"),
        ("server", service_links("tcprelay-server", ("a", 9), ("b", 8)), {"service_port": None}, ""),
        ("client", {**service_links("tcprelay-client", ("", 9)), "TCPRELAY_PORT": "22"}, {"port": 22}, ""),
        ("server", service_links("tcprelay", ("dns", 53), protocol="UDP"), {}, "TCPRELAY_PORT, TCPRELAY_SERVICE_PORT"),
        ("client", LINK, {"port": None, "name": ""}, "TCPRELAY_NAME, TCPRELAY_PORT"),
        ("client", {**LINK, "TCPRELAY_NAME": "nas"}, {"port": None, "name": "nas"}, "TCPRELAY_PORT"),
    ],
)
def test_the_variables_that_kubernetes_makes_are_no_options(
    give: Give,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    environment: dict[str, str],
    expected: dict[str, object],
    ignored: str,
) -> None:
    """They are ignored, in one line that names those that look like options; what the user has set counts."""
    words = list(WORDS[role])
    if "TCPRELAY_RELAY_PORT" in environment:
        monkeypatch.setenv("TCPRELAY_CONFIG", str(give.path / "c.conf"))
        (give.path / "c.conf").write_text("relay-port = 1080\n")
        words = ["--relay-host", "relay", "--publish", "web=nas:80"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = parse_options("test", "", CLASSES[role], words).options
    assert {name: getattr(options, name) for name in expected} == expected
    status, said = give.check(role, words)
    assert status == 0
    lines = said.splitlines()
    assert len(lines) == bool(ignored), said
    if ignored:
        assert f" WARNING {ignored}: ignored, as made by Kubernetes" in lines[0]
        assert "enableServiceLinks: false" in lines[0]
    assert "c4nary" not in said


def test_what_is_missing_since_it_was_ignored(give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod's own value is the same as the one that is made: it cannot be told, and the one line says why."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    status, said = give.check("server", ["--relay-port", "1080"])
    assert (status, said.count("\n")) == (2, 1)
    assert "--service-port or --service is required, as in tcprelays 10080 2222; TCPRELAY_PORT, TCPRELAY" in said
    monkeypatch.setenv("TCPRELAY_SERVICE", "default=10081")
    assert give.check("server", ["--relay-port", "1080"])[0] == 0


def test_a_mistyped_variable_beside_a_service_s(give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is warned of all the same."""
    for name, value in {**service_links("tcprelay-server", ("", 9)), "TCPRELAY_TOKNE": "x"}.items():
        monkeypatch.setenv(name, value)
    _, said = give.check("server", WORDS["server"])
    assert [line.partition("WARNING ")[2] for line in said.splitlines()] == [
        "there is no option for the environment variable TCPRELAY_TOKNE; did you mean TCPRELAY_TOKEN?"
    ]


@pytest.mark.parametrize("quoted", ['"abc"', "'abc'"])
def test_quotes_in_the_environment(give: Give, quoted: str) -> None:
    """docker's --env-file leaves them in the value, a shell and Compose do not: they count, and are warned of."""
    words = give.words("client", "environment", "token", quoted)
    given = parse_options("test", "", ClientOptions, words)
    options, warnings = given.options, given.remarks
    assert options.token == quoted
    assert len(warnings) == 1
    assert "the quotes around the value of TCPRELAY_TOKEN" in warnings[0]
    assert "abc" not in warnings[0]


# --- Files in default places ----------------------------------------------------------------------------------


@pytest.fixture
def as_another_user() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """A context in which files of this user's alone cannot be read: root has to be somebody else for that."""

    @contextlib.contextmanager
    def become() -> Iterator[None]:
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    yield become


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, give: Give) -> Iterator[Path]:
    """The client's configuration file in a default place, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        monkeypatch.setenv("XDG_CONFIG_HOME", directory)
        os.mkdir(f"{directory}/tcprelay")
        path = Path(directory, "tcprelay", "client.conf")
        yield path
        os.chmod(path.parent, 0o755)


def parse_client(*words: str) -> tuple[Options, list[str]]:
    given = parse_options("tcprelayc", "", ClientOptions, words)
    options, warnings = given.options, given.remarks
    return options, warnings


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_file_in_a_default_place_that_may_not_be_read(
    place: Path, as_another_user: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """It, or its directory: a warning, where nobody has named it; else an error."""
    place.write_text("heartbeat = nonsense\n")
    parse_client(*WORDS["client"], "--config", "/dev/null")  # imports what another user might not be able to
    (place if what == "file" else place.parent).chmod(0)
    with as_another_user():
        _, warnings = parse_client(*WORDS["client"])
        assert warnings == [f"the configuration file {place} is left out: permission denied"]
        with pytest.raises(SystemExit) as caught:
            parse_client("--relay-port", "1")
        assert caught.value.code == 2
        assert (
            capsys.readouterr().err
            == f"tcprelayc: --relay-host is required, as in tcprelayc relay.example.net:10080 22; {warnings[0]}\n"
        )
        with pytest.raises(SystemExit) as caught:
            parse_client(*WORDS["client"], "--config", str(place))
        assert caught.value.code == 1
        assert capsys.readouterr().err == f"tcprelayc: cannot read {place}: permission denied\n"


def make_directory(path: Path) -> None:
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_latin1(path: Path) -> None:
    path.write_bytes("name = Büro\n".encode("latin-1"))


def make_utf16(path: Path) -> None:
    path.write_text("name = nas\n", encoding="utf-16")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_directory, "is a directory"), (make_dangling, "no such file or directory"),
        (make_loop, "too many levels of symbolic links"), (make_latin1, "it is not UTF-8"),
        (make_utf16, "it is not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_in_a_default_place(
    place: Path, make: Callable[[Path], None], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is meant for this command, and what it should say (a token, perhaps) would be missing: an error."""
    make(place)
    with pytest.raises(SystemExit) as caught:
        parse_client(*WORDS["client"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"tcprelayc: cannot read {place}: {reason}\n"


def test_the_name_of_a_default_place_is_no_pattern(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in it are brackets."""
    directory = place.parent.parent / "[a]"
    (directory / "tcprelay").mkdir(parents=True)
    (directory / "tcprelay" / "client.conf").write_text("name = nas\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory))
    assert parse_client(*WORDS["client"])[0].name == "nas"  # type: ignore[attr-defined]


def test_without_a_home_directory_there_is_no_default_place_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No directory named ~ is taken for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without HOME and a passwd entry
    (tmp_path / "~/.config/tcprelay").mkdir(parents=True)
    (tmp_path / "~/.config/tcprelay/client.conf").write_text("name = planted\n")
    assert parse_client(*WORDS["client"])[0].name == ""  # type: ignore[attr-defined]
