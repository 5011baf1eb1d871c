"""Options from the command line, the environment and files; what wrong ones get."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import tcprelay
import tcprelay_client
import tcprelay_server
from _tcprelay.command_line import parse_options
from _tcprelay.telling import Events
from _tcprelay.logs import log_writer, set_up_logging
from _tcprelay.options import Options, options_of
from tcprelay import ClientOptions, ConnectionClosed, ServerOptions

SERVER = ["--relay-port", "1080", "--service-port", "1081"]
CLIENT = ["--port", "22", "--relay-host", "relay", "--relay-port", "1080"]


def server(*words: str) -> ServerOptions:
    return parse_options("tcprelays", "", ServerOptions, words).options


def client(*words: str) -> ClientOptions:
    return parse_options("tcprelayc", "", ClientOptions, words).options


def error(capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line of a command that has ended."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip("\n")


def test_the_defaults() -> None:
    """What the issue and the README promise."""
    options = server(*SERVER)
    assert (options.pair_timeout, options.heartbeat, options.drain_timeout) == (20, 15, 10)
    assert (options.idle_timeout, options.wire, options.hostname, options.token) == (0, "v1", "", "")
    assert (client(*CLIENT).num_conn, client(*CLIENT).host) == (8, "localhost")


def test_node_tcp_relay_s_spellings() -> None:
    """Its README's command lines are understood as they stand."""
    options = server("--relayPort", "10080", "--servicePort", "10081", "--hostname", "127.0.0.1")
    assert (options.relay_port, options.service_port, options.hostname) == (10080, 10081, "127.0.0.1")
    other = client("--host", "h", "--port", "10080", "--relayHost", "r", "--relayPort", "1", "--numConn", "3")
    assert (other.host, other.port, other.relay_host, other.relay_port, other.num_conn) == ("h", 10080, "r", 1, 3)


def test_command_line_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same option from three places: each gives way to the one before it."""
    config = tmp_path / "c.conf"
    config.write_text("relay-port = 1\nservice-port = 2\nheartbeat = 3\npair-timeout = 4\n")
    monkeypatch.setenv("TCPRELAY_SERVICE_PORT", "22")
    monkeypatch.setenv("TCPRELAY_HEARTBEAT", "33")
    options = server("--config", str(config), "--heartbeat", "333")
    assert (options.relay_port, options.service_port, options.heartbeat, options.pair_timeout) == (1, 22, 333, 4)


def test_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a container needs comes from variables, lists with commas."""
    monkeypatch.setenv("TCPRELAY_RELAY_PORT", "1")
    monkeypatch.setenv("TCPRELAY_SERVICE", "web=8080, ssh=127.0.0.1:2222")
    monkeypatch.setenv("TCPRELAY_ALLOW_UNAUTHENTICATED", "true")
    options = server()
    assert [(s.name, s.host, s.port) for s in options.services] == [("web", "", 8080), ("ssh", "127.0.0.1", 2222)]
    assert options.allow_unauthenticated


def test_the_default_places_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the user's configuration directory is read, unless --config names another."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "tcprelay").mkdir()
    (tmp_path / "tcprelay" / "server.conf").write_text("heartbeat = 5\n")
    other = tmp_path / "other.conf"
    other.write_text("pair-timeout = 6\n")
    assert server(*SERVER).heartbeat == 5
    options = server(*SERVER, "--config", str(other))
    assert (options.heartbeat, options.pair_timeout) == (15, 6)


def test_repeated_keys_in_a_file_add_up(tmp_path: Path) -> None:
    """`service = …` may stand on several lines, or as a list; comments and sections are allowed."""
    config = tmp_path / "c.conf"
    config.write_text(
        "# server\n[server]\nrelay-port = 9\nservice = a=1\n; two:\nservice = b=2\nservice = [c=3, d=4]\n"
    )
    assert [s.name for s in server("--config", str(config)).services] == ["a", "b", "c", "d"]


def test_several_services_on_the_client() -> None:
    """--publish is repeatable; IPv6 in brackets, Unix sockets by path."""
    options = client("--relay-host", "r", "--relay-port", "1", "--publish", "a=[::1]:80", "--publish", "b=unix:/run/x")
    assert [str(s.target) for s in options.services] == ["[::1]:80", "unix:/run/x"]
    assert [str(s.target) for s in client(*CLIENT, "--publish", "web=nas:80").services] == ["localhost:22", "nas:80"]


@pytest.mark.parametrize("place", ["relay.example.net:10080", "192.0.2.1:10080", "[2001:db8::1]:10080"])
def test_host_and_port_in_one_word(place: str) -> None:
    """What everybody tries; also where the port is given besides, and is the same."""
    host = place.rpartition(":")[0].strip("[]")
    for words in (["--relay-host", place], ["--relay-host", place, "--relay-port", "10080"]):
        options = client(*words, "--host", place)
        assert (options.relay_host, options.relay_port, options.host, options.port) == (host, 10080, host, 10080)
    assert client("--relay-host", host, "--relay-port", "1", "--port", "22").relay_host == host
    assert tcprelay.RelayClient("localhost:22", None, place, None).options.relay_port == 10080


def test_the_command_line_goes_before_the_file_for_host_and_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the port stands in one word with the host in one place, and alone in another."""
    config = tmp_path / "c.conf"
    config.write_text("relay-host = file:1\nport = 22\n")
    words = ["--config", str(config)]
    assert (client(*words).relay_host, client(*words).relay_port) == ("file", 1)
    assert (client(*words, "new:2", "80").relay_host, client(*words, "new:2").relay_port) == ("new", 2)
    options = client(*words, "--relay-port", "3")
    assert (options.relay_host, options.relay_port) == ("file", 3)
    monkeypatch.setenv("TCPRELAY_RELAY_PORT", "4")
    assert (client(*words).relay_port, client(*words, "new:5").relay_port) == (4, 5)
    config.write_text("relay-host = file\nrelay-port = 1\nport = 22\n")
    monkeypatch.delenv("TCPRELAY_RELAY_PORT")
    assert client(*words, "new:6").relay_port == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "http://localhost"], "expected a host and a port, not a URL: write localhost:80"),
        (["--host", "https://u:p@nas/x?y"], "not a URL: write nas:443"),
        (
            ["--relay-host", "tcp://r:10080"],
            "--relay-host 'tcp://r:10080' (from command line): expected a host and a port",
        ),
        (["--publish", "web=http://[::1]:8080/"], "not a URL: write [::1]:8080"),
        (["--host", "ssh://nas"], "not a URL: write nas:22"),
        (["--host", "HTTPS://nas"], "not a URL: write nas:443"),
        (["--host", "gopher://x"], "not a URL: write x:PORT"),
        (["--host", "nas:80", "--port", "81"], "--host nas:80 and --port 81 name two ports"),
        (["--relay-host", "r:1"], "--relay-host r:1 and --relay-port 1080 name two ports"),
        (["--host", "a:b"], "expected a port number"),
        (["--host", "a:b:c"], "expected HOST or HOST:PORT, of an IPv6 address [HOST]:PORT"),
        (["--relay-host", "unix:/x"], "expected HOST or HOST:PORT; a relay server has no Unix socket"),
    ],
)
def test_a_wrong_place_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what to write."""
    with pytest.raises(SystemExit) as ended:
        client(*CLIENT, *words)
    assert ended.value.code == 2
    assert message in error(capsys)


def test_the_short_form() -> None:
    """Words without options; flags and options may stand anywhere among them."""
    options = server("10080", "--tls", "2222", "web=8080", "db=127.0.0.1:5432")
    assert (options.relay_port, options.service_port, options.tls) == (10080, 2222, "relay")
    assert [str(service) for service in options.service] == ["web=8080", "db=127.0.0.1:5432"]
    assert server("--tls", "both", "1", "2").tls == "both"
    assert [one.name for one in server("1", "web=3", "--service", "db=4").services] == ["db", "web"]
    assert client("--tls", "--", "r:1", "22").tls == client("r:1", "--tls", "unix:/x").tls == "relay"
    for word in ("localhost:22", "nas:80", "unix:/run/x=1", "unix:/a://b"):
        other = client("--tls", "relay.example.net:10080", word, "--pin", f"sha256:{'0' * 64}", "web=80")
        assert (other.relay_host, other.relay_port) == ("relay.example.net", 10080)
        assert [str(service) for service in other.services] == [
            f"default={word if ':' in word else 'localhost:22'}",
            "web=localhost:80",
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r:1", "PORT"], "PORT stands for something: put that there instead"),
        (["HOST:1", "22"], "HOST stands for something"),
        (["r:1", "22", "--token-file", "FILE"], "FILE stands for something"),
        (["r:1", "web=PORT"], "--publish 'web=PORT' (from command line): expected a port number"),
        (["r", "22"], "--relay-port is required, as in tcprelayc relay.example.net:10080 22"),
        (["r:0", "22"], "--relay-port 0 is no port of a relay server"),
        ([], "--relay-host is required, as in tcprelayc relay.example.net:10080 22"),
    ],
)
def test_what_was_left_in_the_pasted_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or left out of it."""
    with pytest.raises(SystemExit):
        client(*words)
    assert message in error(capsys)


@pytest.mark.parametrize("words", [["22"], ["web=80"], ["r:1", "22", "80"], ["r:1", "22", "x"], ["unix:/x", "r:1"]])
def test_a_stray_word_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With what such words are."""
    with pytest.raises(SystemExit):
        client(*words)
    stray = words[-1] if len(words) > 2 else words[0]
    assert f": {stray}: expected the relay server and services, as in relay.example.net:10080 22" in error(capsys)


def test_a_value_may_begin_with_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 64 tokens of `secrets.token_urlsafe` does."""
    assert server(*SERVER, "--token", "-x").token == "-x"
    assert server(*SERVER, "--token", "--x y", "--tls").token == "--x y"
    monkeypatch.setenv("TCPRELAY_TOKEN", "-y")
    assert server(*SERVER).token == "-y"


def test_short_options(capsys: pytest.CaptureFixture[str]) -> None:
    """-V says the version, -v logs more."""
    assert server(*SERVER, "-v").log_level == "debug"
    with pytest.raises(SystemExit):
        server("-V")
    assert tcprelay.main(["-V"]) == 0
    assert capsys.readouterr().out == f"tcprelays {tcprelay.__version__}\ntcprelay {tcprelay.__version__}\n"


def test_what_is_mistyped_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable and a line in a file are told with what was meant."""
    monkeypatch.setenv("TCPRELAY_TSL", "true")
    monkeypatch.setenv("TCPRELAY_QQQ", "1")
    remarks = parse_options("tcprelays", "", ServerOptions, SERVER).remarks
    assert remarks == [
        "there is no option for the environment variable TCPRELAY_QQQ",
        "there is no option for the environment variable TCPRELAY_TSL; did you mean TCPRELAY_TLS?",
    ]
    config = tmp_path / "c.conf"
    config.write_text("hearbeat = 3\n")
    with pytest.raises(SystemExit):
        server("--config", str(config))
    assert "line 1: unknown option hearbeat; did you mean heartbeat?" in error(capsys)


def test_check_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each value with its origin, of files and variables all that were read; and no secret."""
    config = tmp_path / "c.conf"
    config.write_text("# mine\nrelay-host = relay:10080\ntls = yes\npublish = web=80\n")
    monkeypatch.setenv("TCPRELAY_TOKEN", "hunter2-hunter2-hunter2")
    words = ["--config", str(config), "--keepalive", "6.0", "--try-service", "no", "--check"]
    assert tcprelay_client.main([*words, "--host", "unix:/x"]) == 0
    assert "  host = unix:/x    command line\n  publish" in capsys.readouterr().out
    assert tcprelay_client.main([*words, "--host", "10.0.0.0:22"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tcprelayc: the configuration is valid",
        f"read: {config}, TCPRELAY_TOKEN",
        "  keepalive = 6    command line",
        "  token = (not shown)    environment variable TCPRELAY_TOKEN",
        f"  tls = true    {config}, line 3",
        f"  relay-host = relay    {config}, line 2",
        f"  relay-port = 10080    {config}, line 2",
        "  host = 10.0.0.0    command line",
        "  port = 22    command line",
        f"  publish = web=localhost:80    {config}, line 4",
        "  try-service = false    command line",
        "everything else has its default",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--relay-port", "99999"], "--relay-port '99999' (from command line): expected a port number from 0 to 65535"),
        (["--heartbeat", "soon"], "--heartbeat 'soon' (from command line): expected a number of seconds from 0.05"),
        (["--pair-timeout", "-1"], "--pair-timeout '-1' (from command line): expected a number of seconds, 0 or"),
        (["--pair-timeout", "nan"], "expected a number of seconds"),
        (["--hostname", "root@host"], "expected a host name or an address"),
        (["--relayport", "1"], "did you mean --relay-port?"),
        (["--hostname", "localhost:80"], "expected a host name or an address, without a port"),
        (["--public-host", "http://relay"], "--public-host 'http://relay' (from command line): expected a host name"),
        (["--wire", "v2"], "--wire 'v2' (from command line): expected v1 or raw"),
        (["--service", "web"], "expected NAME=PORT or NAME=ADDRESS:PORT"),
        (["--service", "w b=1"], "expected a name of 1 to 64 letters"),
        (["--service", "a=::1:80"], "of an IPv6 address [HOST]:PORT"),
        (["--service", "default=1"], "two services are named default"),
        (["--max-pending", "٣"], "expected a whole number"),
        (["--allow-unauthenticated", "maybe"], "expected true or false"),
        (["--log-level", "loud"], "expected debug or info or warning or error"),
        (["--token", ""], "--token (from command line): expected something that is not empty"),
        (["--token", "a", "--token-file", "b"], "give --token or --token-file, not both"),
        (["--token", "a", "--wire", "raw"], "--wire raw cannot check a token"),
        (["--secret", "a"], "--secret is for --wire raw"),
        (["--token-file", "a", "--wire", "raw"], "--wire raw cannot check a token"),
        (["--service", "web=1", "--wire", "raw"], "--wire raw carries one service"),
        (["--passphrase", "a", "--passphrase-file", "b"], "give --passphrase or --passphrase-file, not both"),
        (["--tls", "--cert", "a", "--pfx", "b"], "give --cert or --pfx, not both"),
        (["--tls", "--key", "a"], "--key is of no use without --cert"),
        (["--pair-timeout", "0"], "--pair-timeout must be more than 0"),
        (["--hostname", "::1", "--service", "web=[::1]:1081"], "two ports are 1081"),
        (
            ["--tls", "both", "--service-cert", "a", "--service-pfx", "b"],
            "give --service-cert or --service-pfx, not both",
        ),
        (["--tls", "--service-key", "a"], "--service-key is of no use without --tls both or --tls service"),
        (["--ca-file", "a"], "--ca-file is of no use without --auth"),
        (["--no-such", "x"], "unknown option: --no-such"),
        (["--tokn=hunter2"], "unknown option: --tokn"),
        (["--tokn=hunter2"], "did you mean --token?"),
        (["-relay_port", "1"], "unknown option: -relay_port; did you mean --relay-port?"),
        (["--num-conn", "1"], "unknown option: --num-conn (--num-conn is an option of tcprelayc)"),
        (["word"], "word: expected the relay port and services, as in 10080 2222 web=8080"),
        (["--", "--tls"], "--tls: expected the relay port and services"),
        (["-"], "-: expected the relay port and services"),
        (["web=80"], "web=80: expected the relay port and services"),
        (["--heartbeat", "--tls=both"], "--heartbeat needs a value"),
        (["1", "2", "3"], "3: expected the relay port and services"),
        (["stat"], "stat: expected the relay port and services, as in 10080 2222 web=8080; did you mean status?"),
        (["1", "2"], "1: without an option it is the --relay-port, which is given, too"),
        (["--tls", "maybe"], "--tls 'maybe' (from command line): expected true (or yes, on, relay), both, service, or"),
        (["--token", "a", "b"], "a word without an option (not shown: it may be a secret): expected the relay port"),
        (["x" * 40], "a word without an option (not shown: it may be a secret): expected the relay port and services"),
        (["--heartbeat"], "--heartbeat needs a value"),
        (["--heartbeat", "--check"], "--heartbeat needs a value"),
        (["--heartbeat", "--tls"], "--heartbeat needs a value"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the option, the value, where it came from and what is accepted; the status is 2."""
    with pytest.raises(SystemExit) as caught:
        server(*SERVER, *words)
    assert caught.value.code == 2
    line = error(capsys)
    assert line.startswith("tcprelays: ")
    assert message in line
    assert "hunter2" not in line


def test_where_a_wrong_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variable, or the file, stands in the message."""
    monkeypatch.setenv("TCPRELAY_HEARTBEAT", "x")
    with pytest.raises(SystemExit):
        server(*SERVER)
    assert "--heartbeat 'x' (from environment variable TCPRELAY_HEARTBEAT)" in error(capsys)
    monkeypatch.delenv("TCPRELAY_HEARTBEAT")
    config = tmp_path / "c.conf"
    config.write_text("heartbeat = y\n")
    with pytest.raises(SystemExit):
        server(*SERVER, "--config", str(config))
    assert f"--heartbeat 'y' (from {config}, line 1)" in error(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heartbeat = 5\nheartbeat = 6", "line 2: heartbeat stands there twice"),
        ("hearbeat = 5", "line 1: unknown option hearbeat"),
        ("\n= hunter2", "line 2: not a line of the form key = value"),
    ],
)
def test_a_wrong_line_in_a_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File and line are named, the line itself (it may hold a secret) is not shown."""
    config = tmp_path / "c.conf"
    config.write_text(text)
    with pytest.raises(SystemExit) as caught:
        server(*SERVER, "--config", str(config))
    assert caught.value.code == 2
    line = error(capsys)
    assert f"{config}, {message}" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("missing", [["--config", "/no/such/file"], ["--token-file", "/no/such/file"]])
def test_a_missing_file_is_one_line(missing: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The file and the reason, with status 1."""
    with pytest.raises(SystemExit) as caught:
        tcprelay_server.main([*SERVER, *missing, "--check"])
    assert caught.value.code == 1
    assert "/no/such/file: no such file or directory" in error(capsys)


def test_what_is_required_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a port or a relay there is one line for it."""
    for main, words, message in (
        (tcprelay_server.main, [], "--relay-port is required"),
        (tcprelay_server.main, ["--relay-port", "1"], "--service-port or --service is required"),
        (tcprelay_client.main, [], "--relay-host is required"),
        (tcprelay_client.main, ["--relay-host", "x"], "--relay-port is required"),
        (tcprelay_client.main, ["--relay-host", "x", "--relay-port", "1"], "--port (with --host) or --publish"),
        (
            tcprelay_client.main,
            [*CLIENT, "--num-conn", "0"],
            "--num-conn '0' (from command line): expected a whole number, 1 or more",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert message in error(capsys)


@pytest.mark.parametrize("source", ["option", "environment", "config", "file", "empty file", "empty variable"])
def test_each_source_of_the_token_is_enforced(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From wherever it comes it is the token; one that is empty is an error, never no token."""
    words = []
    file = tmp_path / "file"
    if source == "option":
        words = ["--token", "the-token"]
    elif source == "environment":
        monkeypatch.setenv("TCPRELAY_TOKEN", "the-token")
    elif source == "empty variable":
        monkeypatch.setenv("TCPRELAY_TOKEN", "")
    elif source == "config":
        file.write_text("token = the-token\n")
        words = ["--config", str(file)]
    else:
        file.write_text("the-token\nmore\n" if source == "file" else "\n")
        words = ["--token-file", str(file)]
    if source.startswith("empty"):
        with pytest.raises(SystemExit) as caught:
            tcprelay_server.main([*SERVER, *words, "--check"])
        assert caught.value.code == 2
        assert "empty" in error(capsys)
    else:
        assert server(*SERVER, *words).read_token() == b"the-token"


def test_check_says_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    """--check ends with status 0 and binds nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert tcprelay_server.main(["--relay-port", port, "--service-port", "0", "--check"]) == 0
    assert capsys.readouterr().out.startswith("tcprelays: the configuration is valid\n")
    assert tcprelay_client.main([*CLIENT, "--check"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version says the command and the version."""
    with pytest.raises(SystemExit) as caught:
        client("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tcprelayc {tcprelay.__version__}\n"


@pytest.mark.parametrize(
    ("main", "cls"), [(tcprelay_server.main, ServerOptions), (tcprelay_client.main, ClientOptions)]
)
def test_help(main: Any, cls: type[Options], capsys: pytest.CaptureFixture[str]) -> None:
    """Each option stands in --help with its help and default, in groups, and no value of a secret does."""
    with pytest.raises(SystemExit) as caught:
        main(["--token", "hunter2", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flat = re.sub(r"\s+", "", text)  # --help breaks lines, also at hyphens
    for name, info in options_of(cls):
        assert f"--{name.replace('_', '-')}" in text
        assert re.sub(r"\s+", "", info.help) in flat
        if info.default:
            assert re.sub(r"\s+", "", f"(default: {info.default})") in flat
    for group in ("Addresses", "Connections", "Links", "Trust", "Running"):
        assert f"\n{group}:\n" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(("role", "words"), [("server", SERVER), ("client", CLIENT)])
def test_both_roles_from_the_core(role: str, words: list[str]) -> None:
    """`python3 -m tcprelay server` and `… client` are the two commands."""
    for command in ([sys.executable, "-m", "tcprelay", role], [sys.executable, "-m", f"tcprelay_{role}"]):
        done = subprocess.run([*command, *words, "--check"], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([sys.executable, "-m", "tcprelay"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line() -> None:
    """The command ends with status 1 and names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["--relay-port", port, "--service-port", "0", "--hostname", "127.0.0.1", "--log-level", "error"]
        done = subprocess.run(
            [sys.executable, "-m", "tcprelay", "server", *words],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    said = f"cannot listen on 127.0.0.1:{port}: address already in use; another program has it, or another tcprelays"
    assert done.stderr == f"tcprelays: {said}\n"


def test_an_unknown_host_is_one_line() -> None:
    """A --hostname that is no address of this host: status 1."""
    words = ["--relay-port", "0", "--service-port", "0", "--hostname", "192.0.2.1", "--log-level", "error"]
    done = subprocess.run(
        [sys.executable, "-m", "tcprelay", "server", *words], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    said = "cannot listen on 192.0.2.1:0: cannot assign requested address; this host does not have that address"
    assert done.stderr == f"tcprelays: {said}\n"


@pytest.mark.parametrize("format", ["text", "json"])
def test_log_lines_of_many_threads(format: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is whole, with its own time, although no lock is held around writing one."""
    set_up_logging("info", format)
    logger = logging.getLogger("tcprelay")
    try:

        def log(number: int) -> None:
            for _ in range(100):
                logger.warning("%d %s", number, "x" * 500)

        threads = [threading.Thread(target=log, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        logger.warning("a surrogate: \udc80")
        log_writer.end()
        *lines, last = capfd.readouterr().err.splitlines()
    finally:
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    shape = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING (\d x{500})"
    said = [
        json.loads(line)["message"] if format == "json" else re.fullmatch(shape, line)[1]  # type: ignore[index]
        for line in lines
    ]
    assert sorted(said) == sorted(f"{n} {'x' * 500}" for n in range(8) for _ in range(100))
    assert "a surrogate: \\udc80" in last
    if format == "json":
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", json.loads(last)["time"])


def test_connections_have_names_of_their_own() -> None:
    """In one process one after the other, in each process from another one on."""
    script = "import os; from _tcprelay.text import connection_id as name; os.fork() and os.wait();"
    script += "print(*[name() for _ in range(500)])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True).stdout
    assert len(set(said.split())) == 1000
    assert all(re.fullmatch("[0-9a-f]{8}", name) for name in said.split())


def test_json_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each record is a JSON object in one line; an event has its name and its fields."""
    set_up_logging("info", "json")
    logger = logging.getLogger("tcprelay")
    try:
        events = Events(logging.getLogger("tcprelay.server"), None)
        events.log = log_writer.tell
        closed = ConnectionClosed(
            id="1", service="web", peer="192.0.2.1:5", bytes_in=1, bytes_out=2, seconds=3.0, reason=""
        )
        events(closed)
        logger.warning("a line\nwith a break")
        log_writer.end()
        first, second = capsys.readouterr().err.splitlines()
    finally:
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    entry = json.loads(first)
    assert entry["event"] == "ConnectionClosed"
    assert (entry["level"], entry["logger"]) == ("info", "tcprelay.server")
    assert dataclasses.asdict(closed).items() <= entry.items()
    assert json.loads(second)["message"] == "a line\nwith a break"


def test_an_api_option_that_does_not_fit(tmp_path: Path) -> None:
    """The constructors raise `ValueError` for what the commands refuse."""
    with pytest.raises(ValueError, match="--wire raw cannot check a token"):
        tcprelay.RelayServer(0, 0, wire="raw", token="x")
    for several in (["x"], "x"):
        with pytest.raises(ValueError, match=r"^service 'x': expected NAME=PORT or NAME=ADDRESS:PORT$"):
            tcprelay.RelayServer(0, service=several)
    assert tcprelay.RelayServer(0, service="web=0").options.services == [tcprelay.ServicePort("web", "", 0)]
    with pytest.raises(ValueError, match=r"^there is no option tokn$"):
        tcprelay.RelayServer(0, 0, tokn="x")
    with pytest.raises(FileNotFoundError):
        tcprelay.RelayServer(0, 0, token_file=str(tmp_path / "none"))


def test_a_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 1; a byte order mark is no fault."""
    config = tmp_path / "c.conf"
    config.write_bytes("# Schlüssel\nheartbeat = 5\n".encode("latin-1"))
    with pytest.raises(SystemExit) as caught:
        server(*SERVER, "--config", str(config))
    assert caught.value.code == 1
    assert f"cannot read {config}: it is not UTF-8" in error(capsys)
    config.write_text("heartbeat = 5\n", encoding="utf-8-sig")
    assert server(*SERVER, "--config", str(config)).heartbeat == 5


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (tcprelay_server.main, ["--relay-port", "1080", "--service-port", "1080"], "two ports are 1080"),
        (tcprelay_server.main, [*SERVER, "--service", "a=1082", "--service", "b=1082"], "two ports are 1082"),
        (tcprelay_client.main, [*CLIENT, "--port", "0"], "nothing can be reached at port 0: localhost:0"),
        (tcprelay_client.main, [*CLIENT, "--host", "unix:/x"], "--port is of no use where --host is a Unix socket"),
        (tcprelay_client.main, [*CLIENT, "--max-conn", "4"], "--max-conn is less than the idle links"),
        (tcprelay_client.main, [*CLIENT, "--publish", "a=h:1", "--max-conn", "8"], "--max-conn is less"),
        (tcprelay_client.main, [*CLIENT, "--tls-server-name", "x"], "--tls-server-name is of no use without --tls"),
        (tcprelay_client.main, [*CLIENT, "--pin", "sha256:" + "0" * 64], "--pin is of no use without --tls"),
        (tcprelay_server.main, [*SERVER, "--auth"], "--auth needs --ca-file"),
    ],
)
def test_what_cannot_work_is_no_valid_configuration(
    main: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check finds what would fail later."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--check"])
    assert caught.value.code == 2
    assert message in error(capsys)


def test_a_mistyped_variable_is_warned_of(tmp_path: Path) -> None:
    """A variable that looks like an option and is none, of either role, is named in the log."""
    done = subprocess.run(
        [sys.executable, "-m", "tcprelay", "server", *SERVER, "--check"],
        env={**os.environ, "TCPRELAY_TOKENFILE": "x", "TCPRELAY_NUM_CONN": "3"},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "there is no option for the environment variable TCPRELAY_TOKENFILE" in done.stderr
    assert "NUM_CONN" not in done.stderr


@pytest.mark.parametrize(
    "options", [{"wire": "x"}, {"heartbeat": 0}, {"idle_timeout": -1}, {"heartbeat": "soon"}, {"relay_port": -1}]
)
def test_the_constructors_judge_as_the_commands_do(options: dict[str, Any]) -> None:
    """A value that the command line would refuse is a `ValueError` that names it."""
    with pytest.raises(ValueError, match=next(iter(options))):
        tcprelay.RelayServer(**{"relay_port": 0, "service_port": 0, **options})


def test_none_is_the_default_in_the_constructors() -> None:
    """As `os.environ.get` gives it; text is taken as on the command line."""
    made = tcprelay.RelayClient("[::1]", 22, "relay", 1080, token=None, idle_timeout="5")
    assert (made.options.token, made.options.idle_timeout, made.options.host) == ("", 5.0, "::1")
