"""Small bodies get smaller, and none can grow beyond its bound."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols import framing
from fedloom.protocols.deflate import INFLATED_LIMIT, deflate, inflate


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=300), kind=st.integers(1, 4), data=st.binary(max_size=40))
def test_any_body_survives_its_frame(body: bytes, kind: int, data: bytes) -> None:
    frame = framing.pack(kind, body, [data])
    assert framing.pack(kind, body, [data]) == frame
    assert len(frame) <= 16 + len(body) + len(data)
    got, rest = framing.unpack(frame, kind, [""] * 5, limit=1000)
    assert (got, bytes(rest)) == (body, data)


@settings(max_examples=50, deadline=None)
@given(body=st.binary(min_size=1, max_size=8), times=st.integers(20, 200))
def test_what_repeats_shrinks(body: bytes, times: int) -> None:
    small = deflate(body * times)
    assert len(small) < len(body) + 20
    assert inflate(small) == body * times


def test_words_that_messages_hold_are_known_beforehand() -> None:
    assert len(deflate(b"exact_match, token_accuracy, weight_decay")) < 14


def raw(body: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return stream.compress(body) + stream.flush()


def test_a_bomb_is_refused_before_it_grows() -> None:
    bomb = raw(bytes(100 << 20))
    tracemalloc.start()
    try:
        for body in (bomb, raw(bytes(INFLATED_LIMIT + 1))):
            with pytest.raises(ValueError, match="a deflated body must stand for <= 65536 bytes, got more"):
                inflate(body)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # the body so far, and what is left of the stream
    finally:
        tracemalloc.stop()
    assert inflate(raw(bytes(INFLATED_LIMIT))) == bytes(INFLATED_LIMIT)


def test_larger_bodies_travel_as_they_are() -> None:
    frame = framing.pack(1, bytes(INFLATED_LIMIT + 1), [])
    assert len(frame) == 16 + INFLATED_LIMIT + 1
    assert framing.unpack(frame, 1, ["", "Task"], limit=1 << 20)[0] == bytes(INFLATED_LIMIT + 1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (raw(bytes(99))[:-1], "a deflated body must be one whole stream and nothing else"),
        (raw(bytes(99)) + b"\0", "a deflated body must be one whole stream and nothing else"),
        (b"", "a deflated body must be one whole stream and nothing else"),
        (b"\xff" * 9, "a deflated body must be a stream of RFC 1951: Error -3"),
        (b"\1\5\0\xfa\xffabcde", "a deflated body must be shorter than the 5 bytes it stands for, got 10"),
    ],
)
def test_only_whole_streams_are_read(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        inflate(data)
