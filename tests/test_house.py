"""The structure of the product: doors, rooms, and which of them may use which."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import _tcprelay
import tcprelay
from _tcprelay import events

from .peers import ROOT

DOORS = ("tcprelay_server", "tcprelay_client", "tcprelay")
"""In the order in which they may use each other."""
ROOMS = re.findall(r"^    ([a-z_.]+)  ", _tcprelay.__doc__ or "", re.MULTILINE)
"""In the order of the list, which is that of who may use whom."""


def path_of(room: str) -> Path:
    if room in DOORS:
        return ROOT / f"{room}.py"
    return ROOT / "_tcprelay" / f"{room.replace('.', '/')}.py"


def imported(path: Path) -> Iterator[str]:
    """The rooms and doors that a file imports, wherever in it that stands, and where for its types alone."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("_tcprelay.") for name in node.names if "tcprelay" in name.name)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            words = [*origin, *(node.module.split(".") if node.module else [])]
            if words and words[0] == "_tcprelay" and len(words) > 1:
                yield ".".join(words[1:])
            elif words == ["_tcprelay"]:
                yield from (name.name for name in node.names if name.name in ROOMS)
            elif words[0] in DOORS:
                yield words[0]


def wrong_arrows(order: list[str], arrows: dict[str, list[str]]) -> list[str]:
    """The imports that do not lead to a room further up in the order."""
    place = {room: number for number, room in enumerate(order)}
    return [
        f"{room} imports {other}, which does not stand above it"
        for room, others in arrows.items()
        for other in others
        if place.get(other, len(order)) >= place[room]
    ]


def test_the_list_of_rooms_is_whole() -> None:
    """Each file of the package stands in the list once."""
    rooms = [path.relative_to(ROOT / "_tcprelay") for path in (ROOT / "_tcprelay").rglob("*.py")]
    assert sorted(ROOMS) == sorted(".".join(room.with_suffix("").parts) for room in rooms if room.name != "__init__.py")


def test_rooms_use_only_what_stands_above_them() -> None:
    """Doors stand on rooms; nobody uses `tcprelay`, and the two roles do not know each other."""
    arrows = {room: list(imported(path_of(room))) for room in [*ROOMS, *DOORS]}
    assert wrong_arrows([*ROOMS, *DOORS], arrows) == []
    assert {room for room in arrows if {"tcprelay_server", "tcprelay_client"} & set(arrows[room])} == {"tcprelay"}
    for role, other in (("server", "client"), ("client", "server")):
        own = [room for room in arrows if room.startswith(f"{role}.") or room == f"tcprelay_{role}"]
        assert not [room for room in own if any(used.startswith(f"{other}.") for used in arrows[room])]


def test_packages_import_nothing_themselves() -> None:
    """What stands in an `__init__.py` is in no list of rooms."""
    for path in (ROOT / "_tcprelay").rglob("__init__.py"):
        assert not list(imported(path)), path


def test_a_wrong_arrow_is_named() -> None:
    """Downwards, to itself, and to what is in no list."""
    arrows = {"a": ["b", "a"], "b": ["a"], "c": ["x"]}
    assert wrong_arrows(["a", "b", "c"], arrows) == [
        "a imports b, which does not stand above it",
        "a imports a, which does not stand above it",
        "c imports x, which does not stand above it",
    ]


@pytest.mark.parametrize("room", [*ROOMS, *DOORS])
def test_the_size_of_a_room(room: str) -> None:
    """One reads it from top to bottom."""
    lines = len(path_of(room).read_text(encoding="utf-8").splitlines())
    assert 60 <= lines <= (250 if room in DOORS else 450)


@pytest.mark.parametrize("room", [*ROOMS, *DOORS])
def test_rooms_use_public_names_alone(room: str) -> None:
    """What begins with an underscore is the room's own affair."""
    nodes = list(ast.walk(ast.parse(path_of(room).read_text(encoding="utf-8"))))
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    taken = [node for node in taken if node.level or (node.module or "").startswith("_tcprelay")]
    names = {name.asname or name.name for node in taken for name in node.names}
    assert not [name for name in names if re.match("_(?!_version)", name)]
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names & set(ROOMS):
            assert not re.match("_(?!_)", node.attr)


def test_the_public_names() -> None:
    """All that is public is listed, and hardly anything else is there."""
    assert sorted(tcprelay.__all__, key=str.lower) == sorted(set(tcprelay.__all__), key=str.lower)
    beside = {name for name in dir(tcprelay) if not name.startswith("__")} - set(tcprelay.__all__)
    assert beside == {"Sequence", "annotations", "fail", "main", "shown", "sys", "tcprelay_client", "tcprelay_server"}
    for name in tcprelay.__all__:
        value = getattr(tcprelay, name)
        assert isinstance(value, str) or (value.__doc__ and not value.__doc__.startswith(f"{name}("))


def test_names_in_the_internals_are_there() -> None:
    """Each room, class, method and function that docs/internals.md speaks of."""
    rooms = {room: importlib.import_module(room if room in DOORS else f"_tcprelay.{room}") for room in [*ROOMS, *DOORS]}
    text = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])((?:[a-z_]+\.)*)([A-Z]\w+)\.(\w+)(?![\w(])", text)
    assert len(named) > 50
    for room, owner, name in named:
        places = [place for place in rooms if f".{place}.".endswith(f".{room}")]
        holders = [vars(rooms[place])[owner] for place in places if owner in vars(rooms[place])]
        assert holders, f"{room}{owner}"
        assert any(hasattr(one, name) or name in one.__annotations__ for one in holders), f"{room}{owner}.{name}"
    for room, function in re.findall(r"`((?:[a-z_]+\.)*[a-z_]+)\.([a-z_]+)`", text):
        if room in rooms and function != "py":
            assert hasattr(rooms[room], function), f"{room}.{function}"


def test_every_event_is_public() -> None:
    """In the list of names, and in the docstring that explains them."""
    for name, value in vars(events).items():
        if isinstance(value, type) and issubclass(value, tcprelay.Event):
            assert name in tcprelay.__all__, name
            assert re.search(rf"\b{name}\b", tcprelay.__doc__ or ""), name
