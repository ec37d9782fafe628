"""The log of what left the device: complete, append-only, and whole again after a kill in the middle of a line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.agent.answers import KEPT, Answer, Answers
from fedloom.client.agent.describe import describe_update
from fedloom.client.agent.outbox import Outbox, entries
from fedloom.protocols.messages import LowRank, Over, Payload, Scalars, Update


def test_entries_come_back_in_order_over_rotations(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, rotate=2000)
    for number in range(100):
        outbox.note({"kind": "train", "round": number, "bytes": number})
    assert [entry["round"] for entry in entries(tmp_path)] == list(range(100))
    files = sorted(tmp_path.glob("outbox*.jsonl"))
    assert len(files) > 3
    assert all(path.stat().st_size <= 2000 for path in files)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert all(entry["time"][:2] == "20" for entry in entries(tmp_path))


def test_half_a_line_is_skipped_and_the_next_entry_is_whole(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.note({"round": 1})
    path = tmp_path / "outbox.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "2026", "round": 2, "wh')  # killed here
    Outbox(tmp_path).note({"round": 3})
    assert [entry["round"] for entry in entries(tmp_path)] == [1, 3]
    assert b'"round": 2, "wh\n' in path.read_bytes()  # nothing is taken away


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, rotate=20_000)
    threads = [
        threading.Thread(target=lambda who=who: [outbox.note({"who": who, "pad": "x" * 200}) for _ in range(40)])
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [entry["who"] for entry in entries(tmp_path)]
    assert sorted(found) == sorted(list(range(4)) * 40)


def test_a_disk_that_fails_is_an_error(tmp_path: Path) -> None:
    """What cannot be logged must not leave, so whoever sends has to hear of it."""
    (tmp_path / "outbox.jsonl").mkdir()
    with pytest.raises(OSError, match="outbox"):
        Outbox(tmp_path).note({"round": 1})


def test_an_update_is_described_without_its_values() -> None:
    factor = LowRank(b=np.full((8, 2), 0.1234567, np.float32), a=np.ones((2, 4), np.float32), alpha=4.0)
    update = Update(
        device="a",
        round=1,
        examples=9,
        metrics={"tokens": 4.0, "loss_sum": 0.7654321},
        payload=Payload(factors={"m": factor}, dense={"head.bias": np.zeros(3, np.float32)}),
    )
    what = describe_update(update, "bf16")
    assert what == {
        "examples": 9,
        "metrics": ["loss_sum", "tokens"],
        "tensors": {"m": [[8, 2], [2, 4]], "head.bias": [[3]]},
        "dtype": "bf16",
    }
    scalars = Scalars(over=Over.POOL, k=64, values=np.zeros(5, np.float32), indices=np.arange(5))
    what = describe_update(Update(device="a", round=1, examples=9, payload=Payload(scalars=scalars)), "fp32")
    assert (what["scalars"], what["of"], what["k"]) == (5, "pool", 64)
    assert "1234" not in json.dumps(what)


def test_the_last_answers_are_kept(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    digests = [answers.digest(b"task %d" % number, "me") for number in range(KEPT + 3)]
    assert len(set(digests)) == len(digests)
    assert answers.digest(b"task 1", "another") != digests[1]
    for number, digest in enumerate(digests):
        answers.put(digest, Answer(frame=b"line\n%d" % number, about={"n": number}))
    found = [Answers(tmp_path).get(digest) for digest in digests]
    assert found[:3] == [None] * 3
    assert [answer.frame for answer in found[3:] if answer] == [b"line\n%d" % n for n in range(3, KEPT + 3)]
    assert found[-1] is not None
    assert found[-1].about == {"n": KEPT + 2}


def test_a_damaged_answer_is_none(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.put("ab", Answer(frame=b"x" * 100))
    whole = (tmp_path / "ab").read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", b"\n", whole.replace(b"xxx", b"xyx", 1), b"[]\nx", b"{}\n"):
        (tmp_path / "ab").write_bytes(damaged)
        assert answers.get("ab") is None
    assert answers.get("absent") is None
