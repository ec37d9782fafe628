"""What stands around a run: its page, its door, the files that its processes read of one another."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from file_targets import joined, mutate_text, parted, unchanged
from targets import MIB, Broken, Havoc, Target, same

from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import MatrixSpec, ModelSpec
from fedloom.server.dashboard.exposition import exposition
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.health import health
from fedloom.server.dashboard.page import Page
from fedloom.server.door import ENTER, LEAVE, POLL, Door
from fedloom.server.guestbook import GuestList, Guests, VisitLog, digests, write_guests
from fedloom.server.keys import Consortium
from fedloom.server.snapshot import ABOUT, Snapshot, from_arrays, to_arrays
from fedloom.server.standing import Stage, Standing, read_standing, write_standing
from fedloom.strategies.base import State

_FILES: Final = ("events.jsonl", "metrics.jsonl", "recipe.json", "plan.json")
_SAMPLE: Final = re.compile(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)*\})? (-?[0-9.e+-]+|NaN|\+Inf|-Inf)')
_MARK: Final = "<i>&\"'"  # in names that come from devices: must never be markup


class RunPage:
    """The page and the metrics of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "page"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._page = Page()

    def seeds(self) -> list[bytes]:
        record = {
            "round": 1,
            "train_loss": 0.5,
            "updates": 2,
            "seconds": 3.0,
            "bytes_up": 10**6,
            "bytes_down": 10**6,
            "bytes_evaluation": 5,
            "refused": 1,
            "device_seconds": 2.5,
            "device_peak_mb": 300.0,
            "evaluation": {"exact_match": 0.5, "loss": 0.25},
            "devices": {"a": {"n": 3, "exact_match_sum": 1}},
        }
        about = {"run": "r", "name": _MARK, "strategy": "fedloom", "rounds": 9, "round": -1, "devices": ["a", _MARK]}
        events: list[dict[str, Any]] = [
            {"event": "started", **about},
            {
                "event": "joined",
                "device": _MARK,
                "software": "x",
                "examples": 9,
                "rank": 8,
                "capabilities": ["backprop"],
            },
            {"event": "left_out", "device": _MARK, "reason": _MARK},
            {"event": "phase", "round": 1, "rounds": 9, "phase": "train", "devices": ["a", _MARK]},
            {"event": "answer", "round": 1, "phase": "train", "device": "a", "bytes": 5, "down": 7, "refused": ""},
            {
                "event": "answer",
                "round": 1,
                "phase": "train",
                "device": _MARK,
                "bytes": 5,
                "seconds": 0,
                "refused": _MARK,
            },
            {"event": "answer", "round": 1, "phase": "train", "device": "a", "refused": f"not now: {_MARK}"},
            {"event": "unneeded", "round": 1, "phase": "train", "device": _MARK, "down": 9},
            {"event": "quarantined", "device": "a", "until": 7, "reason": _MARK},
            {"event": "round", "round": 1, "record": record},
            {"event": "stopped", "reason": _MARK},
        ]
        lines = ["".join(json.dumps({"time": 1.7e9 + i, **event}) + "\n" for i, event in enumerate(events))]
        lines.append(json.dumps(record) + "\n")
        config = RunConfig().model_dump(mode="json")
        plan = {"config": config, "run": "r", "wait_for": 3, "wait_seconds": 600, "names": ["a", _MARK]}
        texts = [*lines, json.dumps(config), json.dumps(plan)]
        return [joined([text.encode() for text in texts]), joined([texts[0].encode(), b"", b"", texts[3].encode()])]

    def check(self, data: bytes) -> None:
        """Whatever the files hold, there is a page without foreign markup, and metrics that Prometheus reads."""
        for name, part in zip(_FILES, parted(data, len(_FILES)), strict=True):
            (self._folder / name).write_bytes(part)
        folder = RunFolder(self._folder)
        unchanged(self._folder, folder.poll)
        page = self._page.whole(self._page.parts(folder), folder.title, 1.7e9 + 100)
        if _MARK[:3] in page:
            raise Broken(f"a page must hold no markup of devices, got {page[page.index(_MARK[:3]) - 200 :][:300]}")
        for line in exposition(folder).splitlines():
            if not line.startswith("# ") and not _SAMPLE.fullmatch(line):
                raise Broken(f"a sample must be what Prometheus reads, got {line!r}")
        json.dumps(health(folder, 1.7e9 + 100)[1], allow_nan=False)

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        parts = parted(data, len(_FILES))
        place = rng.choice((0, 0, 0, 1, 1, 2, 3))
        parts[place] = mutate_text(parts[place], rng, havoc)
        return joined(parts)


class Doorway:
    """The door of a SuperLink, with nothing behind it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "door"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._loop = asyncio.new_event_loop()
        self._reached: list[str] = []

    def seeds(self) -> list[bytes]:
        write_guests(self._folder, Guests(limit=99, known=digests([("a", b"KEY")]), revoked=digests([("b", b"OLD")])))
        guests = (self._folder / "door.json").read_bytes()
        keys = [base64.b64encode(key) for key in (b"KEY", b"OLD", b"NONE")]
        paths = [ENTER, POLL, LEAVE, "/health", "/v1/control/x"]
        made = [[guests, path.encode(), key, b"10", b"x" * 10] for path in paths for key in keys]
        return [joined(parts) for parts in [*made, [guests, POLL.encode(), keys[0], b"x", b"y" * 200]]]

    def check(self, data: bytes) -> None:
        """door.json, path, key, content length, body: only a key that is let in is heard, and only so much of it."""
        text, path, key, length, body = parted(data, 5)
        (self._folder / "door.json").write_bytes(text)
        (self._folder / "door.jsonl").unlink(missing_ok=True)
        guests = GuestList(self._folder)
        self._reached.clear()
        headers = [(b"flwr-public-key", key), (b"content-length", length)]
        status = self._loop.run_until_complete(self._ask(guests, path.decode("latin-1"), headers, body))
        known = guests().known
        if self._reached and not self._reached[0].startswith("/v1/fleet/") and self._reached[0] != "/health":
            raise Broken(f"a path must need the password, got {status} for {self._reached[0]!r}")
        if self._reached and known is not None and path.decode("latin-1").startswith("/v1/fleet/"):
            shown = _digest(key)
            if shown not in known and self._reached[0] != ENTER:
                raise Broken(f"a key that is not let in must not be heard, got {status} for {key!r}")
        if status >= 400:
            raise ValueError(f"status {status}")

    async def _ask(self, guests: GuestList, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> int:
        sent: list[Any] = []
        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return coming.pop(0) if coming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        async def behind(scope: Any, receive: Any, send: Any) -> None:
            self._reached.append(scope["path"])
            read = len((await receive()).get("body", b""))
            if path.startswith("/v1/fleet/") and read > max(guests().limit, 1 << 16):
                raise Broken(f"no more must be read than may be, got {read}")
            await send({"type": "http.response.start", "status": 200, "headers": []})

        scope: dict[str, Any] = {
            "type": "http",
            "path": path,
            "client": ("10.0.0.9", 1),
            "server": ("10.0.0.1", 2),
            "headers": headers,
        }
        scope["app"] = SimpleNamespace()
        await Door(behind, guests=guests, visits=VisitLog(self._folder), password="never shown")(scope, receive, send)
        return int(sent[0]["status"])

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        parts = parted(data, 5)
        place = rng.randrange(5)
        if place == 0:
            parts[0] = mutate_text(parts[0], rng, havoc)
        elif place == 3:
            parts[3] = rng.choice(
                (b"", b"0", b"-1", b"99", b"100", b"65537", b"9" * 30, b"\xb2", b"1_0", havoc(parts[3]))
            )
        else:
            parts[place] = havoc(parts[place])
        return joined(parts)


def _digest(key: bytes) -> str:
    return next(iter(digests([("", _sent(key))])))


def _sent(key: bytes) -> bytes:
    try:
        return base64.b64decode(key, validate=True)
    except ValueError:
        return b""


class Notes:
    """Small JSON files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "notes"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keys = Consortium(self._folder / "keys")

    def seeds_of_standing(self) -> list[bytes]:
        write_standing(self._folder, Standing(pid=5, born=1.5, run_id=7, stage=Stage.WAITING, connected=1, needed=2))
        return [(self._folder / "serverapp.json").read_bytes()]

    def check_standing(self, data: bytes) -> None:
        (self._folder / "serverapp.json").write_bytes(data)
        standing = unchanged(self._folder, lambda: read_standing(self._folder))
        if standing is None:
            raise ValueError("nothing that can be read")
        for name, kind in (("pid", int), ("run_id", int), ("connected", int), ("error", str), ("stage", Stage)):
            if not isinstance(getattr(standing, name), kind):
                raise Broken(f"{name} must be {kind.__name__}, got {standing!r:.300}")

    def seeds_of_keys(self) -> list[bytes]:
        self._keys.init(["fl.example.org"], force=True)
        for name in ("a", "b"):
            if name not in {key.name for key in self._keys.devices()}:
                self._keys.add_device(name, "fl.example.org:9092")
        self._keys.revoke("b")
        return [(self._folder / "keys/devices.json").read_bytes()]

    def check_keys(self, data: bytes) -> None:
        """devices.json: a list of keys whose fingerprints are those of the files, or one line."""
        (self._folder / "keys/devices.json").write_bytes(data)
        for key in unchanged(self._folder, self._keys.devices):
            if key.public_key.parent != (self._folder / "keys/devices").absolute():
                raise Broken(f"a key must lie in its folder, got {key.public_key}")

    def seeds_of_snapshots(self) -> list[bytes]:
        spec = ModelSpec(base_hash="h", matrices={"q": MatrixSpec(d_out=2, d_in=3)}, dense={"head": (2,)})
        state = State(version=3, tensors={"b": np.ones(2, np.float32)}, meta={"rank": 2})
        return [to_arrays(Snapshot(strategy="fedloom", spec=spec, state=state))[ABOUT].tobytes()]

    def check_snapshot(self, data: bytes) -> None:
        snapshot = from_arrays({ABOUT: np.frombuffer(data, np.uint8), "b": np.ones(2, np.float32)})
        again = from_arrays(to_arrays(snapshot))
        told = [(s.strategy, s.spec, s.state.version, json.dumps(s.state.meta)) for s in (again, snapshot)]
        same("a snapshot", told[0], told[1])


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    page, door, notes = RunPage(folder), Doorway(folder), Notes(folder)
    small: list[tuple[str, Callable[[bytes], None], Callable[[], list[bytes]]]] = [
        ("standing", notes.check_standing, notes.seeds_of_standing),
        ("device-keys", notes.check_keys, notes.seeds_of_keys),
        ("snapshot", notes.check_snapshot, notes.seeds_of_snapshots),
    ]
    made = [
        Target(name="page", check=page.check, seeds=page.seeds, mutate=page.mutate, max_len=1 << 17, memory=32 * MIB),
        Target(name="door", check=door.check, seeds=door.seeds, mutate=door.mutate),
        *(Target(name=name, check=check, seeds=seeds, mutate=mutate_text) for name, check, seeds in small),
    ]
    return {target.name: target for target in made}
