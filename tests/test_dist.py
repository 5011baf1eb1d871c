"""The executable files of ``make dist``, on a host that has Python and nothing else."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import tcprelay
from _tcprelay.addresses import Endpoint
from _tcprelay.sockets import Dialer
from _tcprelay.status.page import page, security_policy

from .conftest import PATIENCE, Bench, echo, read_exactly
from .peers import ROOT, Program

MAKE_DIST = ROOT / "deploy" / "make_dist.py"
ROLES = {"tcprelays": "tcprelay_server", "tcprelayc": "tcprelay_client"}
PROGRAMS = [*ROLES, "tcprelay"]
BARE = [sys.executable, "-I", "-S"]
"""Python isolated from its environment, and without site-packages: what is not in the archive cannot be imported."""


def make_dist(output: Path, **environment: str) -> Path:
    """Make the executable files; the wheel would need a package index."""
    subprocess.run(
        [sys.executable, str(MAKE_DIST), "--no-wheel", "--output", str(output)],
        check=True, timeout=6 * PATIENCE, stdout=subprocess.DEVNULL, env={**os.environ, **environment},
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dist(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An empty directory to run in, which must be empty afterwards too."""
    path = tmp_path / "empty"
    path.mkdir()
    yield path
    assert not list(path.iterdir())


def run_bare(
    command: list[str], empty: Path, path: str = os.defpath, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in an empty directory, with nothing but PATH, and what is given, in its environment."""
    return subprocess.run(
        command, cwd=empty, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=6 * PATIENCE,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("prog", ROLES)
def test_version_and_help(dist: Path, empty: Path, prog: str) -> None:
    """Both are said on standard output, with status 0."""
    version = run_bare([*BARE, str(dist / prog), "--version"], empty)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{prog} {tcprelay.__version__}\n", "")
    help = run_bare([*BARE, str(dist / prog), "--help"], empty)
    assert (help.returncode, help.stderr) == (0, "")
    assert help.stdout.startswith(f"usage: {prog} ")
    assert "--relay-port PORT" in help.stdout


@pytest.mark.parametrize("prog", ROLES)
def test_one_file_holds_both_roles(dist: Path, empty: Path, prog: str) -> None:
    """tcprelay server is tcprelays, and tcprelay client is tcprelayc."""
    role = ROLES[prog].removeprefix("tcprelay_")
    version = run_bare([*BARE, str(dist / "tcprelay"), role, "--version"], empty)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{prog} {tcprelay.__version__}\n", "")
    for words, said in (([], "say server"), (["servr"], "unknown word servr: say server")):
        neither = run_bare([*BARE, str(dist / "tcprelay"), *words], empty)
        assert (neither.returncode, neither.stdout) == (2, "")
        assert neither.stderr == f"tcprelay: {said}, client or status, as in tcprelay server --help\n"
    version = run_bare([*BARE, str(dist / "tcprelay"), "--version"], empty)
    assert (version.returncode, version.stdout) == (0, f"tcprelay {tcprelay.__version__}\n")


@pytest.mark.parametrize("prog", PROGRAMS)
def test_the_status_is_in_the_file(dist: Path, empty: Path, tmp_path: Path, prog: str) -> None:
    """With nothing of a relay but what it takes to ask for it."""
    help = run_bare([*BARE, str(dist / prog), "status", "--help"], empty)
    assert (help.returncode, help.stderr) == (0, "")
    assert help.stdout.startswith(f"usage: {prog} status ")
    none = run_bare([*BARE, str(dist / prog), "status", "999999999"], empty, XDG_RUNTIME_DIR=str(tmp_path))
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr.startswith(f"{prog}: no tcprelay")


@pytest.mark.parametrize("prog", ROLES)
def test_a_wrong_option_is_one_line_and_status_2(dist: Path, empty: Path, prog: str) -> None:
    """There is no traceback out of the archive."""
    result = run_bare([*BARE, str(dist / prog), "--no-such-option"], empty)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{prog}: unknown option: --no-such-option\n"


def test_what_is_mistyped_is_told_there_too(dist: Path, empty: Path) -> None:
    """An option, and a variable: that one silently meant no TLS once."""
    result = run_bare([*BARE, str(dist / "tcprelays"), "1", "2", "--tsl"], empty)
    assert result.stderr == "tcprelays: unknown option: --tsl; did you mean --tls?\n"
    result = run_bare([*BARE, str(dist / "tcprelays"), "1", "2", "--check"], empty, TCPRELAY_TSL="true")
    assert "WARNING there is no option for the environment variable TCPRELAY_TSL; did you mean TCPRELAY_TLS?" in (
        result.stderr
    )


@pytest.mark.parametrize("prog", ROLES)
def test_the_file_is_executable_by_itself(dist: Path, empty: Path, tmp_path: Path, prog: str) -> None:
    """The kernel finds python3 by the first line."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    result = run_bare([str(dist / prog), "--version"], empty, path=f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    assert (result.returncode, result.stdout) == (0, f"{prog} {tcprelay.__version__}\n")


@pytest.mark.parametrize("prog", ROLES)
def test_everything_is_imported_from_the_archive(dist: Path, empty: Path, prog: str) -> None:
    """ConfigArgParse too, although this Python may have it installed."""
    archive = str(dist / prog)
    names = "configargparse", "_tcprelay.role", ROLES[prog]
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import {', '.join(names)}\n"
    code += f"for module in ({', '.join(names)}): print(module.__file__)"
    for command in ([sys.executable, "-I"], BARE):
        result = run_bare([*command, "-c", code, archive], empty)
        assert result.stderr == ""
        assert [line.startswith(archive + os.sep) for line in result.stdout.splitlines()] == [True] * 3


@pytest.mark.parametrize("prog", PROGRAMS)
def test_the_page_is_read_from_the_archive(dist: Path, empty: Path, prog: str) -> None:
    """What is no module, too: the page for people, and what a browser may do with it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from _tcprelay.status.page import page, security_policy\n"
    code += "sys.stdout.buffer.write(security_policy('1').encode() + b'\\n' + page('1'))"
    result = subprocess.run(
        [*BARE, "-c", code, str(dist / prog)], cwd=empty, capture_output=True, timeout=6 * PATIENCE, check=True
    )
    policy, _, text = result.stdout.partition(b"\n")
    assert (policy.decode(), text) == (security_policy("1"), page("1"))


def test_the_wheel_holds_every_package() -> None:
    """And what lies in them beside their modules."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [packages] = re.findall(r"^packages = \[(.*)\]$", project, re.MULTILINE)
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "_tcprelay").rglob("__init__.py")]
    assert {".".join(folder.parts) for folder in folders} <= set(re.findall(r'"([^"]+)"', packages))
    data = dict(re.findall(r'^"?([\w.]+)"? = \["(.*)"\]$', project.partition("package-data]")[2], re.MULTILINE))
    others = {
        path for path in (ROOT / "_tcprelay").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {(".".join(path.parent.relative_to(ROOT).parts), path.name) for path in others} <= set(data.items())


def test_what_is_in_an_archive(dist: Path) -> None:
    """The role and its rooms, ConfigArgParse, both licences, and no room of the other role; or both."""
    for prog in PROGRAMS:
        assert (dist / prog).stat().st_mode & 0o777 == 0o755
        with zipfile.ZipFile(dist / prog) as archive:
            assert archive.testzip() is None
            names = set(archive.namelist())
            assert {"__main__.py", "LICENSE", "_tcprelay/role.py", "_tcprelay/status/page.html"} <= names
            assert ("tcprelay.py" in names) == (prog == "tcprelay")
            for other, module in ROLES.items():
                room = f"_tcprelay/{module.removeprefix('tcprelay_')}/__init__.py"
                assert ({f"{module}.py", room} <= names) == (prog in ("tcprelay", other))
                assert bool({f"{module}.py", room} & names) == (prog in ("tcprelay", other))
            assert archive.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
            [licence] = [name for name in names if name.startswith("ConfigArgParse-")]
            assert b"Permission is hereby granted" in archive.read(licence)


def test_the_same_sources_give_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    """Neither the time, the place nor the settings of the host that packs them shows."""
    again = make_dist(tmp_path / "again", TZ="Asia/Tokyo", PYTHONHASHSEED="7", LC_ALL="C")
    for prog in PROGRAMS:
        assert (again / prog).read_bytes() == (dist / prog).read_bytes()
    assert sorted(path.name for path in again.iterdir()) == sorted(PROGRAMS)


@pytest.mark.parametrize("prog", PROGRAMS)
def test_an_old_python_is_told_so(dist: Path, empty: Path, prog: str) -> None:
    """The check comes before everything else, in words that Python 2.7 can read."""
    with zipfile.ZipFile(dist / prog) as archive:
        tree = ast.parse(archive.read("__main__.py").decode("ascii"))
    assert ast.unparse(tree.body[0]) == "import sys"
    assert ast.unparse(tree.body[1]).startswith("if sys.version_info < (3, 10):")
    old = ast.Module | ast.Import | ast.alias | ast.If | ast.Compare | ast.Lt | ast.Attribute | ast.Name | ast.Load
    old |= ast.Tuple | ast.Constant | ast.Expr | ast.Call | ast.BinOp | ast.Mod | ast.Subscript | ast.Slice
    assert [node for node in ast.walk(tree) if not isinstance(node, old)] == []

    code = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path(sys.argv[1], run_name='__main__')"
    result = run_bare([*BARE, "-c", code, str(dist / prog)], empty)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"{prog}: Python 3.10 or later is needed, and this is Python 3.9\n"


def test_bytes_pass_through_the_two_files(dist: Path, empty: Path, tmp_path: Path, bench: Bench) -> None:
    """A relay of the two executable files, in an empty directory with an empty environment, carries a connection."""
    token = tmp_path / "token"
    token.write_text("a token of the tests\n")

    def start(prog: str, *options: str) -> Program:
        bare = ["env", "-i", f"PATH={os.defpath}", *BARE, str(dist / prog), "--config", os.devnull]
        return stack.enter_context(
            Program("sh", "-c", 'cd "$0" && exec "$@"', str(empty), *bare, "--token-file", str(token), *options)
        )

    def port(line: str, words: str) -> int:
        return int(line.rpartition(":")[2]) if words in line else 0

    with ExitStack() as stack:
        server = start("tcprelays", "--hostname", "127.0.0.1", "--relay-port", "0", "--service-port", "0")
        relay_port = server.wait_for(lambda line: port(line, "listening for relay clients"))
        service_port = server.wait_for(lambda line: port(line, "listening for clients of default"))
        service = bench.service(echo)
        client = start(
            "tcprelayc", "--host", "127.0.0.1", "--port", str(service.port),
            "--relay-host", "127.0.0.1", "--relay-port", str(relay_port),
        )  # fmt: skip
        client.wait_for(lambda line: "is published at" in line)
        with Dialer(Endpoint("127.0.0.1", service_port), PATIENCE).dial() as sock:
            sock.settimeout(PATIENCE)
            sock.sendall(b"through the archives")
            assert read_exactly(sock, 20) == b"through the archives"
        for program in (client, server):
            program.signal(signal.SIGTERM)
            assert program.wait() == 0, program.output


def test_without_configargparse_nothing_is_made(tmp_path: Path, empty: Path) -> None:
    """The maker says in one line what it lacks."""
    result = run_bare([*BARE, str(MAKE_DIST), "--no-wheel", "--output", str(tmp_path / "none")], empty)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "make_dist: ConfigArgParse is not installed for this Python\n"
    assert not list((tmp_path / "none").iterdir())


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        known = {*sys.stdlib_module_names, "_tcprelay", "tcprelay", "tcprelay_server", "tcprelay_client"}
        if name.partition(".")[0] not in known:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import tcprelay
assert not {"argparse", "ssl", "hashlib", "hmac", "subprocess", "tempfile"} & set(sys.modules), "too much is loaded"
with tcprelay.RelayServer(0, 0, hostname="127.0.0.1") as server:
    with tcprelay.RelayClient("127.0.0.1", 1, "127.0.0.1", server.relay_address[1], try_service=False):
        print("both run")
"""


def test_a_program_that_embeds_the_relay_needs_the_standard_library_alone(empty: Path) -> None:
    """Neither the import nor the running of both roles loads anything else; nor does the import what few need."""
    result = run_bare([*BARE, "-B", "-c", BLOCKED, str(ROOT)], empty)
    assert (result.returncode, result.stdout, result.stderr) == (0, "both run\n", "")


def test_a_checkout_without_configargparse_says_what_it_needs(empty: Path) -> None:
    """In one line, as everything that goes wrong."""
    for role, prog in (("server", "tcprelays"), ("client", "tcprelayc")):
        code = f"import sys; sys.path.insert(0, sys.argv[1]); import tcprelay_{role}; tcprelay_{role}.main(['--help'])"
        result = run_bare([*BARE, "-B", "-c", code, str(ROOT)], empty)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"{prog}: ConfigArgParse is not installed: pip install ConfigArgParse")
        assert result.stderr.count("\n") == 1
