"""`fedloom server` as a process, and what its folder tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fedloom.server.processes import processes_of

FEDLOOM = Path(sys.executable).parent / "fedloom"


class Serving:
    """One `fedloom server`; its output is in FOLDER/server.out."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.out, self._arguments = folder, folder / "run", [str(word) for word in arguments]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(FEDLOOM), "server", *self._arguments, "--out", str(self.out)]
        with (self.folder / "server.out").open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    @property
    def said(self) -> str:
        return (self.folder / "server.out").read_text(encoding="utf-8", errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        path = self.out / "events.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [event for line in lines if line and (event := json.loads(line))["event"] == name]

    def wait(self, what: Callable[[], Any], *, seconds: float = 120.0, label: str = "") -> Any:
        """Poll until `what` gives something true, and give it back."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := what():
                return found
            time.sleep(0.05)
        raise TimeoutError(f"waited {seconds:g} s for {label or what}; the server said:\n{self.said}")

    def wait_for_round(self, round: int, **limits: Any) -> None:
        self.wait(
            lambda: any(event["round"] >= round for event in self.events("round")), label=f"round {round}", **limits
        )

    def end(self, seconds: float = 240.0) -> int:
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
        return self.end(30)

    def find(self, words: str) -> list[psutil.Process]:
        """Its processes whose command line holds `words`."""
        found = []
        for process in processes_of(self.out):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in processes_of(self.out):
            try:
                process.kill()
            except psutil.Error:
                continue
