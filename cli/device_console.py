"""What `fedloom client` says while it runs: a line for each thing that happens, and on a terminal what goes on now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from fedloom.cli.console import clean
from fedloom.client.agent.agent import Agent
from fedloom.client.agent.board import Scene
from fedloom.client.agent.home import Home
from fedloom.client.settings import DeviceSettings

_DOING = {"train": "training", "evaluate": "evaluating"}
_DID = {"train": "trained", "evaluate": "evaluated"}


class DeviceNarrator:
    """Prints lines with the time before them. On a terminal its last line moves."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._status = Status(name, console=console) if console.is_terminal else None
        self._began = time.monotonic()

    def __enter__(self) -> DeviceNarrator:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, line: str) -> None:
        self._console.print(
            f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(clean(line))}", highlight=False, soft_wrap=True
        )

    def now(self, line: str) -> None:
        """What goes on at this moment, for the moving line."""
        if self._status is not None:
            self._status.update(escape(clean(f"{self._name}: {line}")))

    def begins(self, settings: DeviceSettings, home: Home) -> None:
        self.say(f"{settings.name}: loading {settings.model.path}; it keeps its state in {home.folder}")

    @contextmanager
    def follows(self, agent: Agent) -> Iterator[None]:
        """Tell what the agent does, for as long as the block runs."""
        about = agent.about
        self.say(
            f"ready after {time.monotonic() - self._began:.1f} s: {about['examples']} examples, rank {about['rank']}, "
            f"base {about['base'][:12]}"
        )
        self.now("waiting for a task")
        Thread(target=self._follow, args=(agent,), name="narrator", daemon=True).start()
        yield

    def _follow(self, agent: Agent) -> None:
        seen = agent.board.scene
        while (scene := agent.board.after(seen.number, 60.0)) is not None:
            self._tell(seen, scene)
            seen = scene

    def _tell(self, before: Scene, scene: Scene) -> None:
        if scene.busy:
            steps = f", step {scene.step}/{scene.of}, loss {scene.loss:.3f}" if scene.of else ""
            self.now(f"round {scene.round}: {_DOING[scene.kind]}{steps}")
        if scene.again > before.again:
            self.say("sent an answer once more, from the disk")
        if scene.done > before.done:
            loss = f", loss {scene.loss:.3f}" if scene.kind == "train" and scene.of else ""
            self.say(f"round {scene.round}: {_DID[scene.kind]} in {scene.seconds:.1f} s{loss}")
        elif scene.refused > before.refused:
            self.say(f"round {scene.round}: refused: {scene.outcome}")
        if not scene.busy:
            self.now("waiting for a task")
