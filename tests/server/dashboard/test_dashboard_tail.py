"""Reading a growing log: every line once, torn ones later, a new file from its beginning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.server.dashboard.tail import CHUNK, Tail


def test_a_torn_line_is_waited_for(tmp_path: Path) -> None:
    log, tail = tmp_path / "log", Tail(tmp_path / "log")
    assert tail.read().lines == ()  # there is no file yet
    log.write_bytes(b"one\ntw")
    assert tail.read().lines == (b"one",)
    assert tail.read().lines == ()
    with log.open("ab") as file:
        file.write(b"o\n\n\nthree\n")
    assert tail.read().lines == (b"two", b"three")


@given(pieces=st.lists(st.binary(max_size=20), max_size=12))
def test_any_way_of_writing_gives_the_same_lines(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    log = tmp_path_factory.mktemp("log") / "log"
    tail, seen = Tail(log), []
    for piece in pieces:
        with log.open("ab") as file:
            file.write(piece)
        seen += tail.read().lines
    assert seen == [line for line in b"".join(pieces).split(b"\n")[:-1] if line.strip()]


@pytest.mark.parametrize(
    "content", [b"x\n", b"new line\nand another\n", b"first\nsecond\nthird\nand more than there was\n"]
)
@pytest.mark.parametrize("way", ["replaced", "rewritten"])
def test_a_file_written_anew_is_read_from_its_beginning(tmp_path: Path, content: bytes, way: str) -> None:
    log, tail = tmp_path / "log", Tail(tmp_path / "log")
    log.write_bytes(b"first\nsecond\nlast line of old\n")
    assert len(tail.read().lines) == 3
    if way == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", log)
    else:
        log.write_bytes(content)
    read = tail.read()
    assert read.anew
    assert b"\n".join(read.lines) + b"\n" == content


def test_a_new_file_is_known_even_where_it_ends_like_the_old_one(tmp_path: Path) -> None:
    log, tail, same = tmp_path / "log", Tail(tmp_path / "log"), b"=" * 100
    log.write_bytes(b"old\n" + same + b"\n")
    tail.read()
    (tmp_path / "new").write_bytes(b"new\n" + same + b"\n")
    os.replace(tmp_path / "new", log)
    assert tail.read().lines == (b"new", same)


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    log, tail = tmp_path / "log", Tail(tmp_path / "log")
    log.write_bytes(b"one\n")
    tail.read()
    log.unlink()
    assert tail.read().lines == ()
    log.write_bytes(b"two\n")
    assert tail.read().lines == (b"two",)


def test_a_long_file_comes_in_chunks(tmp_path: Path) -> None:
    log, tail = tmp_path / "log", Tail(tmp_path / "log")
    lines = [f"{number:0100d}".encode() for number in range(30_000)]
    log.write_bytes(b"\n".join(lines) + b"\n")
    seen: list[bytes] = []
    reads = 0
    while True:
        read = tail.read()
        seen += read.lines
        reads += 1
        if not read.more:
            break
    assert seen == lines
    assert reads == log.stat().st_size // CHUNK + 1


def test_a_line_above_the_limit_is_left_out_and_counted(tmp_path: Path) -> None:
    log, tail = tmp_path / "log", Tail(tmp_path / "log", limit=100)
    log.write_bytes(b"a\n" + b"x" * 101 + b"\nb\n" + b"y" * 150)
    assert tail.read().lines == (b"a", b"b")
    with log.open("ab") as file:
        file.write(b"y" * 500)
    assert tail.read().lines == ()
    assert len(tail._rest) <= 100
    with log.open("ab") as file:
        file.write(b"y\nc\n")
    assert tail.read().lines == (b"c",)
    assert tail.overlong == 2
