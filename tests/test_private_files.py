"""The certificate and the token of a start with --tls alone: where they are kept, who else may reach them, and what
is said where they cannot be made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import tcprelay_server

from _tcprelay.state import _make_private, _who_else, private_file
from _tcprelay.text import say_error
from tcprelay import RelayServer

from .conftest import PATIENCE, PEER_PATH, replace
from .peers import ROOT, find, no_peer

ELSEWHERE = "; --state-dir names another place"


def start(directory: Path | str) -> RelayServer:
    """A server with TLS alone that is not begun: all its files are read or made by then."""
    return RelayServer(0, 0, tls="relay", state_dir=str(directory))


def refusal(directory: Path | str) -> str:
    """The line that a command would end with."""
    with pytest.raises(OSError) as caught:
        start(directory)
    assert caught.value.filename
    return f"{caught.value.filename}: {say_error(caught.value)}"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return path


def test_they_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    """In directories that are made for them, with nothing left beside them, whatever the umask."""
    directory = tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        first = start(directory).runtime.credentials
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        "identity.pem": 0o600, "token": 0o600,
    }  # fmt: skip
    assert directory.stat().st_mode & 0o777 == 0o700
    second = start(directory).runtime.credentials
    assert (first.token, first.certificate) == (second.token, second.certificate)


def test_a_file_system_without_hard_links(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfat, some of FUSE and of containers."""

    def link(*words: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    token = start(state).runtime.credentials.token
    assert start(state).runtime.credentials.token == token


def test_those_that_start_together_have_the_same(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has found nothing and made its own; one of them is kept, and all use that."""
    count = 8
    all_have_looked = threading.Barrier(count)
    real = _make_private

    def make_private(path: str, content: bytes) -> None:
        all_have_looked.wait(PATIENCE)
        real(path, content)

    replace(monkeypatch, "_make_private", make_private)
    found = []

    def run() -> None:
        credentials = start(state).runtime.credentials
        found.append((credentials.token, credentials.certificate))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    assert len(found) == count
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["identity.pem", "token"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602])
def test_a_file_that_others_can_read_or_write(state: Path, name: str, mode: int) -> None:
    """It is refused until it is removed."""
    start(state)
    file = state / name
    file.chmod(mode)
    who = f"others (its mode is {mode:04o})"
    assert refusal(state) == f"{file}: {who} may know or have changed it: remove it, a new one is made{ELSEWHERE}"
    file.unlink()
    start(state)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
@pytest.mark.parametrize("files", ["made before", "not made yet"])
def test_a_directory_that_others_can_write(state: Path, mode: int, files: str) -> None:
    """Nothing is read or made there."""
    if files == "made before":
        start(state)
    there = set(state.iterdir())
    state.chmod(mode)
    advice = "can put files there: have it owned and written by this user alone"
    assert refusal(state) == f"{state}: others (its mode is {mode:04o}) {advice}{ELSEWHERE}"
    assert set(state.iterdir()) == there


def test_what_another_user_has_put_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of another's is not used, nor a directory of another's."""
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    if os.getuid() == 0:  # else what this user owns is another's already
        os.chown(state, 4321, -1)
        (state / "token").write_text("known\n")
        os.chown(state / "token", 1001, -1)
        identity = Path(state / "identity.pem")
        identity.write_text("x")
        identity.chmod(0o600)
        os.chown(identity, 4321, -1)
        with pytest.raises(PermissionError) as caught:
            private_file(str(state / "token"), lambda: b"")
        assert "user 1001, its owner, may know or have changed it" in str(caught.value)
        os.chown(state, 1001, -1)
    advice = "can put files there: have it owned and written by this user alone"
    assert refusal(state) == f"{state}: user {state.stat().st_uid}, its owner, {advice}{ELSEWHERE}"


def test_what_root_has_provided_for_a_group(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs as another user than root may find files of root's that its group can read."""
    start(state)
    found = os.lstat(state / "token")
    monkeypatch.setattr(os, "geteuid", lambda: 4321)

    def who(mode: int, owner: int) -> str:
        return _who_else(os.stat_result([0o100000 | mode, *found[1:4], owner, *found[5:]]), 0o077, str(state))

    assert who(0o640, 0) == who(0o440, 0) == who(0o600, 4321) == ""
    assert who(0o644, 0) and who(0o660, 0) and who(0o640, 4321)


@pytest.mark.parametrize("target", ["nothing", "a file", "a directory"])
def test_a_link_or_a_directory_in_place_of_a_file(state: Path, tmp_path: Path, target: str) -> None:
    """It is neither followed nor replaced."""
    if target == "a directory":
        (state / "token").mkdir()
    else:
        if target == "a file":
            (tmp_path / "target").write_text("known\n")
        (state / "token").symlink_to(tmp_path / "target")
    assert refusal(state) == f"{state / 'token'}: this is not a regular file: remove it{ELSEWHERE}"
    assert (tmp_path / "target").exists() == (target == "a file")


def test_a_state_directory_that_is_a_link(state: Path, tmp_path: Path) -> None:
    """As systemd makes it for DynamicUser."""
    (tmp_path / "link").symlink_to(state)
    start(tmp_path / "link")
    assert (state / "token").exists()


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'}: this is not a directory{ELSEWHERE}"
    below = tmp_path / "file" / "below"
    assert refusal(below) == f"{below}: not a directory{ELSEWHERE}"


def test_a_file_system_with_one_mode_for_all_files(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfat as it is mounted by default: a key is not left there."""
    real = os.open

    def open_wide(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = real(path, flags, mode, **more)
        if flags & os.O_CREAT:
            os.fchmod(descriptor, 0o755)
        return descriptor

    monkeypatch.setattr(os, "open", open_wide)
    reason = "the file system here cannot keep a file from others"
    assert refusal(state) == f"{state / 'identity.pem'}: {reason}{ELSEWHERE}"
    assert not list(state.iterdir())


@pytest.mark.peer("unshare", "mount", "openssl")
@pytest.mark.parametrize(("mounted", "reason"), [("ro", "read-only file system"), ("full", "no space left on device")])
def test_a_disk_that_cannot_be_written(state: Path, mounted: str, reason: str) -> None:
    """Read-only or full: one line, status 1, and nothing half-written."""
    if os.geteuid() != 0:
        no_peer("only root may mount a file system")
    spoil = "head -c 8192 /dev/zero > $STATE/fill" if mounted == "full" else "mount -o remount,ro $STATE"
    script = f'mount -t tmpfs -o size=8k,mode=700 tmpfs $STATE; {spoil} 2>&-; "$@"; echo $?; ls $STATE'
    start = "server", "--relay-port", "0", "--service-port", "0", "--tls", "--state-dir", str(state)
    command = find("unshare"), "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "tcprelay", *start
    environment = {**os.environ, "PATH": PEER_PATH, "STATE": str(state)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert f"tcprelays: {state / 'identity.pem'}: {reason}{ELSEWHERE}\n" == done.stderr
    assert done.stdout.split() == ["1", *(["fill"] if mounted == "full" else [])]


def run_without_home(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user that the system does not know, as containers have it, in an empty directory."""
    code = "import os, pwd, sys, tcprelay; from _tcprelay import state; state._is_root = lambda: False; " \
           "pwd.getpwuid = lambda uid: {}[uid]; sys.exit(tcprelay.main(sys.argv[1:]))"  # fmt: skip
    words = "server", "--relay-port", "0", "--service-port", "0", "--tls", "--check"
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_STATE_HOME")}
    place = tmp_path / "empty"
    place.mkdir()
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True, timeout=60, check=False,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("environment", [{}, {"XDG_STATE_HOME": "relative"}, {"HOME": "relative"}])
def test_without_a_home_directory(tmp_path: Path, environment: dict[str, str]) -> None:
    """The key lands nowhere; a directory that is named, or systemd's, is enough."""
    done = run_without_home(tmp_path, **environment)
    reason = "this user has no home directory to keep a certificate in: name one with --state-dir"
    assert (done.stderr, done.returncode) == (f"tcprelays: {reason}\n", 1)
    assert not list((tmp_path / "empty").iterdir())


def test_a_relative_place_counts_as_none(tmp_path: Path) -> None:
    """As XDG's rules say; the home directory is there instead."""
    done = run_without_home(tmp_path, XDG_STATE_HOME="relative", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/.local/state/tcprelay/identity.pem: it is made at the first start\n" in done.stdout
    assert not list((tmp_path / "empty").iterdir())


def test_systemd_s_directory_needs_no_home(tmp_path: Path) -> None:
    done = run_without_home(tmp_path, STATE_DIRECTORY=str(tmp_path / "state"))
    assert done.stdout.startswith("tcprelays: the configuration is valid\n")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/state/identity.pem: it is made at the first start\n" in done.stdout
    assert not (tmp_path / "state").exists(), "a check makes nothing"


def test_a_check_says_what_there_is(state: Path, capsys: pytest.CaptureFixture[str], own_logging: None) -> None:
    """After a first start: the line to paste, again, with the pin that is in force."""
    words = ["0", "0", "--tls", "--state-dir", str(state), "--check"]
    assert tcprelay_server.main(words) == 0
    assert f"{state}/identity.pem: it is made at the first start\n" in capsys.readouterr().out
    with start(state) as server:
        pin = server.runtime.credentials.certificate
    assert tcprelay_server.main(words) == 0
    said = capsys.readouterr().out
    assert "--tls --token-file FILE\n" in said
    assert f"add --pin {pin})" in said
    assert f"(certificate and token are kept in {state})" in said
    (state / "identity.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    with pytest.raises(SystemExit):
        tcprelay_server.main(words)
    assert f"{state}/identity.pem is damaged: remove it, a new one is made" in capsys.readouterr().err


def test_the_pin_is_of_the_certificate_that_is_used(state: Path) -> None:
    """Also where the file has gone since it was loaded."""
    with start(state) as server:
        before = server.invitation(with_secrets=True)
        (state / "identity.pem").unlink()
        assert server.invitation(with_secrets=True) == before
        assert not (state / "identity.pem").exists()
