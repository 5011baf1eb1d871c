"""Makes what is handed out: dist/tcprelays, dist/tcprelayc and dist/tcprelay, one executable file each, and the wheel.

    make dist      or      python3 deploy/make_dist.py [--output DIR] [--no-wheel]

An executable file is a zip archive with a line for the kernel before it; python3 runs it as it is.  It holds a role, or
both, with the rooms that it stands on and ConfigArgParse, so that a host needs nothing but Python 3.10.  The same
sources and the same ConfigArgParse give the same bytes, whenever and wherever they are packed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOORS = {
    "tcprelays": ["tcprelay_server"],
    "tcprelayc": ["tcprelay_client"],
    "tcprelay": ["tcprelay", "tcprelay_server", "tcprelay_client"],
}
"""The files, and the modules that each holds beside its rooms."""
LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the first that a zip archive can say."""

# Pythons back to 2.7 have to read this file far enough to say that they are too old.
MAIN = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("{prog}: Python 3.10 or later is needed, and this is Python %d.%d" % tuple(sys.version_info[:2]))

import _tcprelay.status.looking

sys.exit(_tcprelay.status.looking.{prog}())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the executable files of the commands, and the wheel.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="where to (default: dist)")
    parser.add_argument("--no-wheel", action="store_true", help="the executable files alone")
    arguments = parser.parse_args()
    output: Path = arguments.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        shared = {**dict(find_configargparse()), "LICENSE": ROOT / "LICENSE"}
        made = [make_executable(output / prog, doors, shared) for prog, doors in DOORS.items()]
        if not arguments.no_wheel:
            made.append(make_wheel(output))
    except (OSError, LookupError) as error:
        print(f"make_dist: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"make_dist: pip could not build the wheel (status {error.returncode})", file=sys.stderr)
        return 1
    for path in made:
        print(f"{path.stat().st_size:>9,} bytes  {path}")
    return 0


def make_executable(path: Path, doors: list[str], shared: dict[str, Path]) -> Path:
    """Write one executable file, as a whole or not at all."""
    others = {role for role in ("server", "client") if f"tcprelay_{role}" not in doors}
    sources = [ROOT / f"{door}.py" for door in doors] + sorted((ROOT / "_tcprelay").rglob("*.py"))
    sources.append(ROOT / "_tcprelay" / "status" / "page.html")
    files = {file.relative_to(ROOT).as_posix(): file for file in sources if file.parent.name not in others}
    entries = {name: file.read_bytes() for name, file in {**shared, **files}.items()}
    entries["__main__.py"] = MAIN.format(prog=path.name).encode("ascii")
    archive = io.BytesIO()
    archive.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(archive, "w") as file:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, LONG_AGO)
            info.create_system = 3  # Unix, wherever it is packed
            info.external_attr = 0o100644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, entries[name], compresslevel=9)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(archive.getvalue())
    unfinished.chmod(0o755)
    return unfinished.replace(path)


def find_configargparse() -> Iterator[tuple[str, Path]]:
    """ConfigArgParse's code and licence, as pairs of name in the archive and file.  Raises `LookupError`."""
    spec = importlib.util.find_spec("configargparse")
    if spec is None or spec.origin is None:
        raise LookupError("ConfigArgParse is not installed for this Python")
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        yield "configargparse.py", origin
    else:
        for file in origin.parent.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield f"configargparse/{file.relative_to(origin.parent).as_posix()}", file
    try:
        distribution = importlib.metadata.distribution("ConfigArgParse")
    except importlib.metadata.PackageNotFoundError as error:
        raise LookupError(f"{origin} came without its licence text") from error
    licences = [f for f in distribution.files or () if f.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
    if not licences:
        raise LookupError(f"ConfigArgParse {distribution.version} came without its licence text")
    for licence in licences:
        yield f"ConfigArgParse-{licence.name}", Path(str(licence.locate()))


def make_wheel(output: Path) -> Path:
    """Build the wheel from a copy of the sources, so that the checkout is left as it was."""
    with tempfile.TemporaryDirectory() as scratch:
        source, built = Path(scratch, "source"), Path(scratch, "built")
        source.mkdir()
        for pattern in ("pyproject.toml", "README.md", "LICENSE", "tcprelay*.py"):
            for file in ROOT.glob(pattern):
                shutil.copy(file, source)
        for folder in ("_tcprelay", "deploy/stubs"):
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--wheel-dir", str(built), str(source)],
            check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},
        )  # fmt: skip
        [wheel] = built.glob("*.whl")
        return Path(shutil.copy(wheel, output))


if __name__ == "__main__":
    sys.exit(main())
