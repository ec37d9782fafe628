"""What a device's agent takes in: frames by chunks, their headings, and the small files it keeps between tasks."""

from __future__ import annotations

import functools
import random
import struct
from datetime import date
from pathlib import Path
from typing import Final

import corpus
from file_targets import mutate_text, unchanged
from targets import MIB, Broken, Havoc, Target, same
from wire_targets import mutate_frame

from fedloom.client.agent.answers import Answer, Answers
from fedloom.client.agent.heading import read_heading
from fedloom.client.agent.outbox import Outbox, entries
from fedloom.client.agent.traffic import Traffic
from fedloom.client.chunks import gather
from fedloom.client.refusals import LONGEST_REASON, refusal_frame
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.codec import decode
from fedloom.protocols.messages import Refusal, Task

LIMIT: Final = 1 << 16
_HEAD: Final = struct.Struct("<QI")  # of a chunk: the total it tells, and its bytes
_TODAY: Final = date(2026, 1, 31)


def _check_heading(data: bytes) -> None:
    """What a frame's heading says is what its task says, where it holds one."""
    heading = read_heading(data, limit=LIMIT)
    try:
        task = decode(data, Task, limit=LIMIT)
    except ValueError:
        return
    told = (heading.device, heading.kind, heading.run, heading.round)
    same("a heading", told, (task.device, task.kind, task.run, task.round))


def _chunks(data: bytes) -> list[pb.Chunk]:
    made: list[pb.Chunk] = []
    while len(data) >= _HEAD.size and len(made) < 300:
        total, size = _HEAD.unpack_from(data)
        made.append(pb.Chunk(data=data[_HEAD.size : _HEAD.size + size], total=total))
        data = data[_HEAD.size + size :]
    return made


def _check_chunks(data: bytes) -> None:
    """A frame is what its chunks add up to, as long as its first one says."""
    chunks = _chunks(data)
    frame = gather(iter(chunks), limit=LIMIT)
    same("a frame", frame, b"".join(chunk.data for chunk in chunks))
    if len(frame) != chunks[0].total or len(frame) > LIMIT:
        raise Broken(f"a frame must have the {chunks[0].total} bytes that it announces, got {len(frame)}")


def _chunk_seeds() -> list[bytes]:
    made = []
    for frame in corpus.frames(corpus.tasks())[:4]:
        for size in (len(frame), 40, 1):
            parts = [frame[start : start + size] for start in range(0, len(frame), size)][:200]
            told = sum(map(len, parts))
            made.append(b"".join(_HEAD.pack(told if at == 0 else 0, len(part)) + part for at, part in enumerate(parts)))
    return made


def _mutate_chunks(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    chunks = _chunks(data)
    if not chunks or rng.random() < 0.2:
        return havoc(data)
    place = rng.randrange(len(chunks))
    match rng.randrange(5):
        case 0:
            chunks[place].total = rng.choice(
                (0, 1, LIMIT, LIMIT + 1, 2**63, 2**64 - 1, sum(len(c.data) for c in chunks))
            )
        case 1:
            chunks[place].data = havoc(chunks[place].data)[:LIMIT]
        case 2:
            chunks.insert(place, pb.Chunk(data=b"", total=rng.choice((0, 5))))
        case 3:
            del chunks[place]
        case _:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[place])
    return b"".join(_HEAD.pack(chunk.total, len(chunk.data)) + chunk.data for chunk in chunks)


class AgentFiles:
    """The files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "agent"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._answers = Answers(self._folder / "answers")
        self._kept = [Answer(frame=b"a frame\nof bytes", about={"metrics": ["loss"]}), Answer(frame=b"")]

    def seeds_of_answers(self) -> list[bytes]:
        made = []
        for answer in self._kept:
            self._answers.put("0a", answer)
            made.append((self._folder / "answers/0a").read_bytes())
        return made

    def check_answers(self, data: bytes) -> None:
        """A damaged answer is none; a frame that is sent again is the one that was kept."""
        (self._folder / "answers").mkdir(exist_ok=True)
        (self._folder / "answers/0a").write_bytes(data)
        answer = unchanged(self._folder, lambda: self._answers.get("0a"))
        if answer is None:
            raise ValueError("damaged")
        if answer.frame not in [kept.frame for kept in self._kept]:
            raise Broken(f"an answer must be one that was kept, got {answer.frame[:100]!r}")

    def seeds_of_traffic(self) -> list[bytes]:
        path = self._folder / "traffic.json"
        path.unlink(missing_ok=True)
        Traffic(path, lambda: _TODAY).add(up=5, down=7)
        return [path.read_bytes(), b""]

    def check_traffic(self, data: bytes) -> None:
        """Whatever the file says, bytes go on being counted, and none are taken off."""
        path = self._folder / "traffic.json"
        path.write_bytes(data)
        traffic = Traffic(path, lambda: _TODAY)
        before = traffic.total()
        if before < 0:
            raise Broken(f"a day's bytes must be >= 0, got {before}")
        traffic.add(up=3)
        same("bytes of a day", (traffic.total(), Traffic(path, lambda: _TODAY).total()), (before + 3, before + 3))

    def seeds_of_outbox(self) -> list[bytes]:
        (self._folder / "outbox.jsonl").unlink(missing_ok=True)
        box = Outbox(self._folder)
        for number in range(3):
            box.note({"kind": "train", "round": number, "bytes": 12345, "digest": "00"})
        whole = (self._folder / "outbox.jsonl").read_bytes()
        return [whole, whole[:-9], b""]

    def check_outbox(self, data: bytes) -> None:
        """What was half written is skipped, and does not swallow what comes after it."""
        (self._folder / "outbox.jsonl").write_bytes(data)
        before = list(unchanged(self._folder, lambda: list(entries(self._folder))))
        Outbox(self._folder).note({"kind": "hello", "bytes": 1})
        after = list(entries(self._folder))
        if len(after) != len(before) + 1 or after[-1].get("kind") != "hello":
            raise Broken(f"an entry must be there when it was noted, got {len(before)} before and {len(after)} after")

    def check_reason(self, data: bytes) -> None:
        """Any reason becomes a refusal that travels."""
        reason = data.decode("utf-8", "surrogateescape")
        frame = refusal_frame(reason, device="hospital-a", round=1, version=2)
        refusal = decode(frame, Refusal, limit=LIMIT)
        if len(refusal.reason) > LONGEST_REASON or "\n" in refusal.reason:
            raise Broken(f"a reason must be one bounded line, got {refusal.reason[:200]!r}")


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    files = AgentFiles(folder)
    made = [
        Target(
            name="heading",
            check=_check_heading,
            seeds=lambda: corpus.frames(corpus.tasks()),
            mutate=functools.partial(mutate_frame, kind=Task),
            seconds=6.0,
            memory=280 * MIB,
        ),
        Target(name="chunks", check=_check_chunks, seeds=_chunk_seeds, mutate=_mutate_chunks),
        Target(name="answers", check=files.check_answers, seeds=files.seeds_of_answers, mutate=mutate_text),
        Target(name="traffic", check=files.check_traffic, seeds=files.seeds_of_traffic, mutate=mutate_text),
        Target(name="outbox", check=files.check_outbox, seeds=files.seeds_of_outbox, mutate=mutate_text),
        Target(
            name="reason",
            check=files.check_reason,
            seeds=lambda: [b"no\nmore", b"\0\xed\xa0\x80", "\u2028\x9f\u00fc".encode()],
        ),
    ]
    return {target.name: target for target in made}
