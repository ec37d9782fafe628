"""The law of imports, read from the syntax trees: imports run one way, and Flower is touched in few places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protocols", "strategies", "client", "server", "simulations", "cli")
MAY_IMPORT = {
    "protocols": set(),
    "strategies": {"protocols"},
    "client": {"protocols", "strategies"},
    "server": {"protocols", "strategies"},
    "simulations": {"protocols", "strategies", "client", "server"},
    "cli": {"protocols", "strategies", "client", "server", "simulations"},
}
FORBIDDEN = {
    "protocols": {"flwr", "torch", "transformers", "peft"},
    "strategies": {"flwr", "torch", "transformers", "peft"},
    "server": {"transformers", "peft"},
}
FLOWER_FILES = {
    "server/app.py",
    "server/control.py",
    "server/courier.py",
    "server/deployed.py",
    "server/door.py",
    "server/flower.py",
    "server/launcher.py",
    "client/app.py",
    "client/agent/launcher.py",
    "client/relay.py",
    "simulations/grid.py",
    "simulations/world.py",
    "simulations/flower.py",
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "_pb2" not in path.name)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "fedloom":
                yield from (f"fedloom.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_law(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        top, _, rest = module.partition(".")
        assert not module.startswith("."), f"{path}: relative import {module!r}"
        assert top not in ROOMS, f"{path}: bare import of a room, {module!r}; write fedloom.{module}"
        assert top not in FORBIDDEN.get(room, set()), f"{path}: {room} must not import {top}"
        if top == "fedloom" and rest:
            other = rest.split(".")[0]
            assert other == room or other in MAY_IMPORT[room], f"{path}: {room} must not import {other}"
        if top == "flwr":
            assert path.relative_to(ROOT).as_posix() in FLOWER_FILES, f"{path}: Flower belongs in {FLOWER_FILES}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_assert_outside_tests(path: Path) -> None:
    asserts = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)]
    assert not asserts, f"{path}:{asserts[0].lineno}: validation raises ValueError"


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long


def test_no_file_is_longer_than_a_sitting() -> None:
    assert [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_rooms_are_namespaces_without_a_shim() -> None:
    assert not (ROOT / "fedloom").exists()
    assert {path.name for path in ROOT.iterdir() if path.is_dir()}.isdisjoint({"utils", "common", "core", "helpers"})
