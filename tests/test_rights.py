"""The clients file: what it says, and what is said of one that is wrong."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

import tcprelay_server

from _tcprelay.rights import Identity, line_of, parse_rights
from _tcprelay.server.limits import Quotas
from _tcprelay.values import PortRange, parse_network
from tcprelay import RelayServer

SERVICES = ["ssh", "web"]
RANGE = (PortRange(20000, 20099),)
NAS = "[nas]\ntoken = the-token-of-nas\n"


def one(text: str) -> Identity:
    [identity] = parse_rights(text, "clients.conf", SERVICES, RANGE).values()
    return identity


def test_a_section_says_all() -> None:
    """Over several lines, with blanks and capitals where people put them."""
    text = """
        # who comes from home
        [nas]
        Token = a=b:c;d#e
        services = web,
            ssh
        ports = 20000-20009, 22022
        from = 192.0.2.0/24, 2001:db8::/32 ,198.51.100.7
        max_links = 32
        Max-Connections = 100
        limit-rate = 512Ki/s
    """
    found = one("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    networks = tuple(map(parse_network, ("192.0.2.0/24", "2001:db8::/32", "198.51.100.7/32")))
    ports = (PortRange(20000, 20009), PortRange(22022, 22022))
    assert found == Identity("nas", b"a=b:c;d#e", "", ("web", "ssh"), ports, networks, 32, 100, 512 << 10)


def test_a_star_is_all() -> None:
    found = one(f"{NAS}services = *\nports = *\n")
    assert (found.services, found.ports) == (("ssh", "web"), RANGE)


def test_a_token_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from a file\n")
    assert one(f"[nas]\ntoken-file = {tmp_path}/token\nservices = ssh\n").token == b"from a file"


def test_a_certificate_may_do_without_a_token() -> None:
    found = parse_rights("[nas]\nservices = ssh\n", "f", SERVICES, by_certificate=True)
    assert found["nas"].token == b""


WRONG = [
    ("[nas]\nservices = ssh\n", "line 1: nas has no token: give it token or token-file"),
    (f"{NAS}services = mail\n", "line 3: there is no service mail here; there is ssh, web"),
    (f"{NAS}service = ssh\n", "line 3: there is no setting service; did you mean services?"),
    (f"{NAS}services = ssh\n\n[nas]\n", "line 5: there are two sections nas"),
    (f"{NAS}services = ssh\nServices = web\n", "line 4: services stands there twice"),
    ("[nas\ntoken = x\n", "line 1: the ] is missing"),
    ("token = x\n", "line 1: a section has to begin first, as in [nas]"),
    (f"{NAS}secret words\n", "line 3: expected a line of the form key = value"),
    (NAS, "line 1: nas may publish nothing: give it services or ports"),
    (f"{NAS}services = a b\n", "line 3: services: expected names of services with commas between them, or *"),
    (f"{NAS}services = ssh\nports = 0\n", "line 4: ports: expected a port, or ports as in 20000-20099"),
    (f"{NAS}services = ssh\nports = 9-\n", "line 4: ports: expected a port, or ports as in 20000-20099"),
    (f"{NAS}services = ssh\nports = 9-8\n", "line 4: ports: expected a port, or ports as in 20000-20099"),
    (f"{NAS}services = ssh\nfrom = home\n", "line 4: from: expected a network, as in 192.0.2.0/24, or an address"),
    (f"{NAS}services = ssh\nmax-links = 0\n", "line 4: max-links: expected a whole number, 1 or more"),
    (f"{NAS}services = ssh\nlimit-rate = 1\n", "line 4: limit-rate: expected bytes a second, 1024 or more"),
    (f"{NAS}token-file = x\nservices = ssh\n", "line 2: give token or token-file, not both"),
    ("[nas]\ntoken-file = /nowhere/x\nservices = ssh\n", "line 2: token-file /nowhere/x: no such file or directory"),
    (
        f"{NAS}services = ssh\n[pi]\ntoken = the-token-of-nas\nservices = ssh\n",
        "line 4: pi has the token of nas: then each could pose as the other",
    ),
    ("[" + 65 * "x" + "]\ntoken = x\nservices = ssh\n", "line 1: a relay client's name has at most 64 characters"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_told_with_its_line(text: str, said: str) -> None:
    """And no token with it."""
    with pytest.raises(ValueError) as caught:
        parse_rights(text, "clients.conf", SERVICES)
    assert str(caught.value).startswith(f"clients.conf, {said}")
    assert "the-token" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_line_is_found_in_its_own_section() -> None:
    text = "[a]\nports = 1\n[b]\n# ports\n\nports = 2\n"
    assert (line_of(text, "b", "ports"), line_of(text, "b"), line_of(text, "b", "from")) == (6, 3, 3)


@pytest.mark.parametrize(
    ("host", "service", "port", "said"),
    [
        ("192.0.2.9", "ssh", None, ""),
        ("[2001:db8::9]", "ssh", None, ""),
        ("192.0.2.9", "web", None, "nas may not publish web: the server's clients file gives it ssh"),
        ("198.51.100.1", "ssh", None, "nas may not connect from 198.51.100.1: the server's clients file gives it 192"),
        ("192.0.2.9", "web", 20009, ""),
        ("192.0.2.9", "web", 0, ""),
        ("192.0.2.9", "web", 20010, "nas may not ask for port 20010: the server's clients file gives it 20000-20009"),
    ],
)
def test_what_an_identity_may_do(host: str, service: str, port: int | None, said: str) -> None:
    text = f"{NAS}services = ssh\nports = 20000-20009\nfrom = 192.0.2.0/24, 2001:db8::/32\n"
    assert one(text).why_not(host, service, port).startswith(said)
    assert bool(one(text).why_not(host, service, port)) == bool(said)


# The file


def test_open_files_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The clients file like others with secrets, and a token's file that it names; and a token that is short."""
    token, path = tmp_path / "token", tmp_path / "clients.conf"
    token.write_text("short\n")
    path.write_text(f"[nas]\ntoken-file = {token}\nservices = default\n")
    for file in (token, path):
        file.chmod(0o644)
    with RelayServer(0, 0, hostname="127.0.0.1", clients=str(path)):
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "the token of nas has 5 characters: it can be guessed",
        f"token-file {token}: others can read it (its mode is 0644)",
        f"--clients {path}: others can read it (its mode is 0644)",
    ]


def test_a_file_that_is_wrong_ends_the_start(tmp_path: Path) -> None:
    """Before anything is listened on."""
    path = tmp_path / "clients.conf"
    with pytest.raises(OSError, match=f"--clients {path}: no such file"):
        RelayServer(0, 0, clients=str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="it is not UTF-8"):
        RelayServer(0, 0, clients=str(path))
    for text in ("", "# nobody yet\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="there is no section in it, so nobody could come"):
            RelayServer(0, 0, clients=str(path))
    path.write_text(f"{NAS}services = default\nports = *\n")
    with pytest.raises(ValueError, match=r"line 4: \* stands for the ports of --client-ports, and there are none"):
        RelayServer(0, 0, clients=str(path))
    path.write_text(f"{NAS}services = web\n")
    with pytest.raises(ValueError, match="line 3: there is no service web here; there is default"):
        RelayServer(0, 0, clients=str(path))


def test_a_token_for_all_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--clients has a token for each: give no other beside it"):
        RelayServer(0, 0, clients=str(tmp_path), token="x")
    with pytest.raises(ValueError, match="--wire raw has no names of relay clients"):
        RelayServer(0, 0, clients=str(tmp_path), wire="raw")


def add(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert tcprelay_server.main(["10080", "ssh=2222", *words]) == 0
    return capsys.readouterr().out


def test_a_client_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a file that is made for this user alone, behind what is there; the line has all that the other side needs."""
    path = tmp_path / "clients.conf"
    said = add(capsys, "--clients", str(path), "--public-host", "relay.example.net", "--add-client", "nas")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = parse_rights(path.read_text(), "f", ["ssh"])["nas"]
    assert f"tcprelayc relay.example.net:10080 ssh=PORT --name nas --token {found.token.decode()}\n" in said
    assert found.services == ("ssh",)
    path.chmod(0o640)
    path.write_text("# mine\n" + path.read_text())
    said = add(capsys, "--clients", str(path), "--tls", "--state-dir", str(tmp_path / "state"), "--add-client", "a pi")
    assert " ssh=PORT --tls --name 'a pi' --token " in said
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_text().startswith("# mine\n[nas]\n")
    assert list(parse_rights(path.read_text(), "f", ["ssh"])) == ["nas", "a pi"]
    assert os.listdir(tmp_path / "state") == ["identity.pem"]
    assert {"clients.conf", "state"} <= set(os.listdir(tmp_path)) <= {"clients.conf", "state", "own-state"}


def test_a_client_that_cannot_be_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaves the file as it was."""
    path = tmp_path / "clients.conf"
    path.write_text(f"{NAS}services = ssh\n")
    for name, words in (
        ("nas", "has a section nas already"),
        ("x]\ny", "cannot be a relay client's name"),
        ("[x]", "cannot be a relay client's name"),
        ("", "expected the name of a relay client"),
    ):
        with pytest.raises(SystemExit):
            add(capsys, "--clients", str(path), "--add-client", name)
        assert words in capsys.readouterr().err
        assert path.read_text() == f"{NAS}services = ssh\n"
    assert os.listdir(tmp_path) == ["clients.conf"]


def test_without_a_file_the_section_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = add(capsys, "--add-client", "nas")
    lines = [line.strip() for line in said.splitlines()]
    assert lines[1:2] + lines[3:4] == ["[nas]", "services = *"]
    assert parse_rights("\n".join(lines[1:4]), "f", ["ssh"])["nas"].token.decode() in lines[5]


# Counts


def test_quotas_count_over_all_processes() -> None:
    """Each in its own table; one that has died has nothing any more."""
    quotas = Quotas(2)
    assert [quotas.enter("nas", 3) for _ in range(2)] == [True, True]
    quotas.process = 1
    assert [quotas.enter("nas", 3) for _ in range(3)] == [True, False, False]
    assert (quotas.count("nas"), quotas.count("pi")) == (3, 0)
    assert quotas.enter("pi", 0)
    quotas.leave("nas")
    quotas.strike(0)
    assert (quotas.count("nas"), quotas.count("pi")) == (0, 1)


def test_names_that_need_one_row_have_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quotas, "ROWS", 4)
    quotas = Quotas()
    for number in range(4):
        for _ in range(number + 1):
            assert quotas.enter(f"client {number}", number + 1)
        assert not quotas.enter(f"client {number}", number + 1)
    assert [quotas.count(f"client {number}") for number in range(4)] == [1, 2, 3, 4]
    with pytest.raises(RuntimeError):
        quotas.enter("one more", 1)
