"""Files that a server reads back: torn, damaged, or rewritten with right checksums.

A damaged checkpoint is refused, or still says exactly what was written: never something else. Reading changes no file.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import corpus
import numpy as np
from mutation import mutate_json
from safetensors.numpy import save
from targets import MIB, Broken, Havoc, Target, same

from fedloom.protocols.messages import DeviceReport
from fedloom.server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedloom.server.journal import Entry, Journal
from fedloom.server.track import JsonlTracker
from fedloom.strategies.base import State

_TENSORS, _ABOUT = "state.safetensors", "run.json"


def joined(parts: Sequence[bytes]) -> bytes:
    """Files as one input: the length of each but the last, then all."""
    return b"".join(struct.pack("<I", len(part)) for part in parts[:-1]) + b"".join(parts)


def parted(data: bytes, count: int) -> list[bytes]:
    """What `joined` joined, as far as it goes."""
    place, parts = 4 * (count - 1), []
    for number in range(count - 1):
        size = int.from_bytes(data[4 * number : 4 * number + 4], "little")
        parts.append(data[place : place + size])
        place += size
    return [*parts, data[place:]]


def listing(folder: Path) -> list[tuple[str, int, int, int]]:
    """Every file with what changes when it is written."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return [(path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in files]


def unchanged(folder: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; Broken when it changed a file, whether it succeeded or not."""
    before = listing(folder)
    try:
        return read()
    finally:
        same("files after reading", listing(folder), before)


def _checkpoints() -> list[Checkpoint]:
    tensors: dict[str, Any] = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float64)}
    first = Checkpoint(
        run="0123abcd",
        round=3,
        state=State(version=3, tensors=tensors, meta={"rank": 3, "log": {"recent": 1}, "share": 0.1}),
        spec=corpus.SPEC,
        roster={"hospital-a": [3, 2, 0, 0], "hospital-b": [0, 0, 1, 4]},
        ledger={"hospital-a": [10, 20, 0]},
        refused=1,
    )
    return [first, replace(first, round=4, state=State(version=4), roster={}, ledger={})]


def plain(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """All that a checkpoint says, to be compared."""
    state = checkpoint.state
    tensors = {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in state.tensors.items()}
    rest = [checkpoint.run, checkpoint.round, state.version, state.meta, checkpoint.roster, checkpoint.ledger]
    return tensors, checkpoint.spec, json.dumps([*rest, checkpoint.refused], sort_keys=True)


class Checkpoints:
    """The targets of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "checkpoints"
        self._round = self._folder / "round-000003"
        self._written = [plain(checkpoint) for checkpoint in _checkpoints()]

    def seeds(self) -> list[bytes]:
        made = []
        for checkpoint in _checkpoints():
            shutil.rmtree(self._folder, ignore_errors=True)
            path = write_checkpoint(self._folder, checkpoint)
            made.append(joined([(path / _ABOUT).read_bytes(), (path / _TENSORS).read_bytes()]))
        return made

    def _read(self, data: bytes) -> Checkpoint:
        about, tensors = parted(data, 2)
        self._round.mkdir(parents=True, exist_ok=True)
        (self._round / _ABOUT).write_bytes(about)
        (self._round / _TENSORS).write_bytes(tensors)
        checkpoint: Checkpoint = unchanged(self._folder, lambda: read_checkpoint(self._round))
        return checkpoint

    def check_torn(self, data: bytes) -> None:
        """Damaged anyhow: what is accepted is what was written."""
        if plain(self._read(data)) not in self._written:
            raise Broken("a damaged checkpoint must not be taken for another")

    def check_forged(self, data: bytes) -> None:
        """With right checksums: what is accepted can be written and read again."""
        checkpoint = self._read(data)
        again = read_checkpoint(write_checkpoint(self._folder / "again", checkpoint))
        if plain(again) != plain(checkpoint):
            raise Broken("a checkpoint must come back as it went")

    def mutate_torn(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        """Bytes of one file changed, or the files of two checkpoints side by side."""
        parts = parted(data, 2)
        if rng.random() < 0.02:
            parts[1] = save({"b": np.ones(2, np.float32)})
        place = rng.randrange(2)
        if place == 0 and rng.random() < 0.4:  # a digit, where it means most
            digits = [at for at, byte in enumerate(parts[0]) if 48 <= byte <= 57]
            if digits:
                at = rng.choice(digits)
                parts[0] = parts[0][:at] + bytes([rng.randrange(48, 58)]) + parts[0][at + 1 :]
                return joined(parts)
        parts[place] = havoc(parts[place])
        return joined(parts)

    def mutate_forged(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        """The JSON tree or the tensors changed; then the sums are made right."""
        about, tensors = parted(data, 2)
        if rng.random() < 0.3:
            tensors = havoc(tensors) if rng.random() < 0.5 else mutate_header(tensors, rng)
        try:
            table = json.loads(about)
        except (ValueError, RecursionError):
            return joined([havoc(about), tensors])
        table = mutate_json(table, rng)
        if isinstance(table, dict):
            table["sha256"] = hashlib.sha256(tensors).hexdigest()
            if "seal" in table:
                rest = {name: value for name, value in table.items() if name != "seal"}
                table["seal"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        about = json.dumps(table).encode()
        return joined([havoc(about) if rng.random() < 0.05 else nested(about, rng), tensors])


def nested(text: bytes, rng: random.Random) -> bytes:
    """The text; seldom, something that costs a careless parser its stack."""
    if rng.random() < 0.01:
        return rng.choice((b"[" * 60_000, b'{"a":' * 20_000, b"[" * 500 + b"]" * 500))
    return text


def mutate_header(file: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its JSON header changed and its length made right."""
    size = int.from_bytes(file[:8], "little")
    try:
        header = mutate_json(json.loads(file[8 : 8 + size]), rng)
    except (ValueError, RecursionError):
        return file
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def mutate_text(data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
    """JSON, one tree or one a line, changed along its structure."""
    if rng.random() < 0.3:
        return nested(havoc(data), rng)
    lines = data.split(b"\n") if b"\n{" in data else [data]
    place = rng.randrange(len(lines))
    try:
        lines[place] = json.dumps(mutate_json(json.loads(lines[place]), rng)).encode()
    except (ValueError, RecursionError):
        lines[place] = havoc(lines[place])
    return nested(b"\n".join(lines), rng)


class JournalFiles:
    """The plan of a phase, and one accepted answer."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "journal"
        self._journal = Journal(self._root, round=7, kind="train")
        self._phase = self._root / "round-000007-train"
        report = DeviceReport(device="hospital-a", examples=12, rank=8, capabilities=("forward",), software="x")
        self._written = [[report], [report, replace(report, device="b", version=3)], []]

    def seeds(self) -> list[bytes]:
        made = []
        for reports in self._written:
            self._journal.plan(reports)
            made.append((self._phase / "plan.json").read_bytes())
        return made

    def check(self, data: bytes) -> None:
        """What is taken for a plan is what was written: a round goes on with the devices that it began with."""
        self._phase.mkdir(parents=True, exist_ok=True)
        (self._phase / "plan.json").write_bytes(data)
        self._journal.put("hospital-a", Entry(down=5, frame=data))
        entry = self._journal.get("hospital-a")
        if entry is None or (entry.down, entry.frame) != (5, data):
            raise Broken(f"an answer must come back as it went, got {entry}")
        reports = unchanged(self._root, self._journal.planned)
        if reports not in self._written:
            raise Broken(f"a damaged plan must not be taken for another, got {reports}")


class Metrics:
    """metrics.jsonl, taken up again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "metrics"
        self._folder.mkdir(parents=True, exist_ok=True)

    def seeds(self) -> list[bytes]:
        lines = [{"round": round, "train_loss": 0.5, "devices": {"a": {"n": 3}}} for round in range(4)]
        whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return [whole, whole[:-7], b""]

    def check(self, data: bytes) -> None:
        """Rounds up to the last finished one stay, line by line; what a crash cut short goes."""
        path = self._folder / "metrics.jsonl"
        path.write_bytes(data)
        JsonlTracker(path, after_round=2).close()
        for line in path.read_text(encoding="utf-8").splitlines():
            if not float(json.loads(line)["round"]) <= 2:
                raise Broken(f"lines that stay must be of rounds up to 2, got {line[:200]!r}")


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    checkpoints, journal, metrics = Checkpoints(folder), JournalFiles(folder), Metrics(folder)
    limits: Final[dict[str, Any]] = {"max_len": 1 << 16, "memory": 16 * MIB}
    made = [
        Target(
            name="checkpoint",
            check=checkpoints.check_forged,
            seeds=checkpoints.seeds,
            mutate=checkpoints.mutate_forged,
            **limits,
        ),
        Target(
            name="checkpoint-torn",
            check=checkpoints.check_torn,
            seeds=checkpoints.seeds,
            mutate=checkpoints.mutate_torn,
            **limits,
        ),
        Target(name="journal", check=journal.check, seeds=journal.seeds, mutate=mutate_text, **limits),
        Target(name="metrics", check=metrics.check, seeds=metrics.seeds, mutate=mutate_text, **limits),
    ]
    return {target.name: target for target in made}
