"""OUT/serverapp.json: where the ServerApp stands, said by itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from fedloom.server.disk import write_anyhow

STANDING_FILE = "serverapp.json"


class Stage(StrEnum):
    """What it does, or how it ended."""

    STARTED = "started"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A ServerApp's process (`born`: processes.birth), Flower's number of its run, and its stage.

    Attributes:
        connected, needed: while waiting, devices that are here and that it waits for.
        error, kind: of a failed one, what went wrong in one line, and the exception's name.
    """

    pid: int
    born: float
    run_id: int
    stage: Stage
    connected: int = 0
    needed: int = 0
    error: str = ""
    kind: str = ""


def write_standing(out: Path, standing: Standing) -> None:
    write_anyhow(out / STANDING_FILE, json.dumps(asdict(standing)).encode())


def read_standing(out: Path) -> Standing | None:
    """What the last ServerApp said; None where none has said anything, or nothing that can be read."""
    try:
        table = json.loads((out / STANDING_FILE).read_bytes())
        standing = Standing(**{**table, "stage": Stage(table["stage"])})
        numbers = (standing.pid, standing.run_id, standing.connected, standing.needed)
        if not (all(type(each) is int for each in numbers) and standing.pid > 0):
            return None
        if not (isinstance(standing.born, float) and isinstance(standing.error, str)):
            return None
        return standing if isinstance(standing.kind, str) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
