"""Runs a target on inputs, one by one, and keeps count: what was accepted, how long it took, how much memory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import sys
import time
import traceback
import tracemalloc
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
from targets import MIB, Broken, Target, one_line

_SAMPLE: Final = 64  # of so many inputs, one is run with its memory traced
_SLOW: Final = 0.02  # seconds from which an input's memory is looked at too
_LOOK: Final = 4096  # inputs between two looks at what must not change
_FAILURES: Final = 20  # kinds of failure that are kept
_HYPOTHESIS: Final = ("the generator of random", "the generator of numpy", "the recursion limit")
_HEADROOM: Final = 2048 * MIB  # of address space, above what the process has when it begins


@dataclass(kw_only=True)
class Tally:
    """What came of a target's inputs: seconds of processor time, bytes, and a line for each kind of failure."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    wall: float = 0.0
    slowest: float = 0.0
    peak: int = 0
    peak_input: int = 0  # bytes of the input that took the most memory
    amplification: float = 0.0  # bytes a byte of input, where an input took more than 2 MiB
    failures: dict[str, str] = field(default_factory=dict)  # the file of an input, by what it broke
    done: bool = False


class Meter:
    """A target with a tally; called with an input, it never raises."""

    def __init__(self, target: Target, engine: str, folder: Path) -> None:
        self._target, self._folder = target, folder
        self.tally = Tally(target=target.name, engine=engine)
        self._began = time.monotonic()
        self._world = world()

    def __call__(self, data: bytes) -> None:
        tally = self.tally
        tally.inputs += 1
        traced = tally.inputs % _SAMPLE == 0
        taken = self._run(data, traced=traced)
        if not traced:
            tally.slowest = max(tally.slowest, taken)
            if taken > _SLOW:
                self._run(data, traced=True, again=True)
        if tally.inputs % _LOOK == 0:
            self.look(data)

    def look(self, data: bytes = b"") -> None:
        """Count it as a failure when something outside the target has changed; hypothesis seeds generators itself."""
        now = world()
        for name, value in self._world.items():  # what was imported since is new, not changed
            if value != now.get(name) and not (self.tally.engine == "hypothesis" and name in _HYPOTHESIS):
                self._fail(data, Broken(f"{name} must not change"))
        self._world = now

    def write(self, *, done: bool) -> None:
        """Put the tally down, for whoever started this process."""
        self.tally.wall, self.tally.done = time.monotonic() - self._began, done
        (self._folder / "tally.json").write_text(json.dumps(asdict(self.tally)), encoding="utf-8")

    def _run(self, data: bytes, *, traced: bool, again: bool = False) -> float:
        tally, target = self.tally, self._target
        if traced:
            tracemalloc.start()
        began = time.thread_time()
        try:
            target.check(data)
            tally.accepted += not again
        except ValueError as error:
            tally.refused += not again
            try:
                one_line(error)
            except Broken as broken:
                self._fail(data, broken)
        except Exception as error:
            self._fail(data, error)
        taken = time.thread_time() - began
        if traced:
            self._weigh(data)
        elif taken > target.seconds:
            self._fail(data, Broken(f"an input must take <= {target.seconds:g} s, got {taken:.2f} s"))
        return taken

    def _weigh(self, data: bytes) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tally = self.tally
        if peak > tally.peak:
            tally.peak, tally.peak_input = peak, len(data)
        if peak > 2 * MIB:
            tally.amplification = max(tally.amplification, peak / max(len(data), 1))
        if peak > self._target.memory:
            self._fail(data, Broken(f"an input must take <= {self._target.memory} bytes, got {peak}"))

    def _fail(self, data: bytes, error: BaseException) -> None:
        """Keep the first input of each kind of failure, and how it went."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"
        said = " ".join(str(error).split())
        kind = f"{type(error).__name__} at {where}"
        if isinstance(error, Broken):
            kind = f"Broken: {re.sub('[0-9]+', 'N', said)[:60]}"
        failures = self.tally.failures
        if kind in failures or len(failures) >= _FAILURES:
            return
        name = f"{self._target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        (self._folder / f"{name}.bin").write_bytes(data)
        lines = "".join(traceback.format_exception(error))
        (self._folder / f"{name}.txt").write_text(f"{kind}\n\n{lines}", encoding="utf-8", errors="replace")
        failures[kind] = str(self._folder / f"{name}.bin")


def bound_memory() -> None:
    """Let this process have so much more address space, and no more: past it, a decoder gets MemoryError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # no Linux
        return
    pages = int(statm.read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def world() -> dict[str, str]:
    """What no decoder may touch, by name, as text."""
    told = {
        "the generator of random": _brief(random.getstate()),
        "the generator of numpy": _brief(np.random.get_state(legacy=True)),
        "numpy's error handling": repr(np.geterr()),
        "the environment": _brief(sorted(os.environ.items())),
        "the working directory": os.getcwd(),
        "the recursion limit": str(sys.getrecursionlimit()),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("fedloom."):
            told[f"constants of {name}"] = _brief([(key, repr(x)[:2000]) for key, x in _constants(module)])
    return told


def _constants(module: ModuleType) -> list[tuple[str, object]]:
    plain = (int, float, str, bytes, tuple, frozenset, dict)
    return [(key, value) for key, value in sorted(vars(module).items()) if key.isupper() and isinstance(value, plain)]


def _brief(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()
