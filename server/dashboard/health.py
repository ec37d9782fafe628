"""Whether a run is well, for whoever restarts it or sends an alarm."""

from __future__ import annotations

from typing import Any

from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.state import Status


def health(folder: RunFolder, silence: float | None) -> tuple[bool, dict[str, Any]]:
    """Whether all is well, and the facts; `silence` is seconds since the last event, None before any.

    It is well while it waits, runs or is finished. It is not well when
      - it has stopped with a reason ("stopped");
      - it runs, and nothing was heard for longer than its recipe waits for answers ("stale"): the server is gone;
      - its folder cannot be read ("unreadable").
    """
    run, limit = folder.run, folder.stale_after
    status = str(run.status)
    if folder.problem:
        status = "unreadable"
    elif run.status == Status.RUNNING and silence is not None and silence > limit:
        status = "stale"
    facts = {
        "status": status,
        "round": run.round,
        "rounds": run.total,
        "phase": run.phase.name if run.phase else None,
        "devices": len(run.devices),
        "seconds_since_event": None if silence is None else round(silence, 3),
        "stale_after_seconds": limit,
        "unreadable_lines": folder.unreadable,
    }
    return status in (Status.WAITING, Status.RUNNING, Status.FINISHED), facts
