"""`fedloom server` as a process, and what its folder tells."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import events_of, kill, launch, of_run, wait_until

from fedloom.server.processes import processes_of


class Serving:
    """One `fedloom server`; its output is in FOLDER/server.out."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.out, self._arguments = folder, folder / "run", arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = launch(self.folder / "server.out", "server", *self._arguments, "--out", self.out)

    @property
    def said(self) -> str:
        return (self.folder / "server.out").read_text(encoding="utf-8", errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in events_of(self.out) if event["event"] == name]

    def wait(self, what: Callable[[], Any], *, seconds: float = 300.0, label: str = "") -> Any:
        """Poll until `what` gives something true, and give it back."""
        return wait_until(what, seconds=seconds, pause=0.05, label=label, said=lambda: self.said)

    def wait_for_round(self, round: int, **limits: Any) -> None:
        self.wait(
            lambda: any(event["round"] >= round for event in self.events("round")), label=f"round {round}", **limits
        )

    def end(self, seconds: float = 600.0) -> int:
        """Wait for its end; its exit code."""
        if self.process is None:
            raise ValueError("a server must be started before it ends")
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the server did not end; it said:\n{self.said}") from None

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process is not None:
            self.process.send_signal(number)
        return self.end(60)

    def find(self, words: str) -> list[psutil.Process]:
        """Its processes whose command line holds `words`."""
        return of_run(self.out, words)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill(processes_of(self.out))
