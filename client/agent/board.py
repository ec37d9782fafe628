"""What the agent is at, for whoever wants to know: kept by the agent, watched by any number of others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Condition

from fedloom.client.agent.heading import Heading


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One moment. `number` grows with every change; what is about a task is about the last one when none runs."""

    number: int = 0
    busy: bool = False
    kind: str = ""
    run: str = ""
    round: int = 0
    step: int = 0
    of: int = 0
    loss: float = 0.0
    began: float = 0.0  # time.monotonic
    ended: float = 0.0
    outcome: str = ""  # of the last task: empty if it was answered, else why not
    done: int = 0  # tasks answered since the agent began
    refused: int = 0
    again: int = 0  # answers that were sent again from the disk

    @property
    def seconds(self) -> float:
        """How long the task has run, or did."""
        return (time.monotonic() if self.busy else self.ended) - self.began


class Board:
    """Holds the scene, and wakes those who watch it when it changes."""

    def __init__(self) -> None:
        self._scene, self._change, self._closed = Scene(), Condition(), False

    @property
    def scene(self) -> Scene:
        return self._scene

    def began(self, heading: Heading) -> None:
        self._set(
            lambda scene: replace(
                scene,
                busy=True,
                kind=heading.kind.value,
                run=heading.run,
                round=heading.round,
                step=0,
                of=0,
                loss=0.0,
                began=time.monotonic(),
                outcome="",
            )
        )

    def stepped(self, step: int, of: int, loss: float) -> None:
        self._set(lambda scene: replace(scene, step=step, of=of, loss=loss))

    def ended(self, outcome: str = "") -> None:
        """The task is over; with a reason, it was refused."""
        self._set(
            lambda scene: replace(
                scene,
                busy=False,
                ended=time.monotonic(),
                outcome=outcome,
                done=scene.done + (not outcome),
                refused=scene.refused + bool(outcome),
            )
        )

    def answered_again(self) -> None:
        self._set(lambda scene: replace(scene, again=scene.again + 1))

    def touch(self) -> None:
        """Something beside the task has changed."""
        self._set(lambda scene: scene)

    def close(self) -> None:
        """Send those who watch away."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def after(self, number: int, timeout: float) -> Scene | None:
        """The scene once it is newer than `number`, or as it is after `timeout` seconds; None when the board closes."""
        with self._change:
            self._change.wait_for(lambda: self._closed or self._scene.number > number, timeout)
            return None if self._closed else self._scene

    def _set(self, change: Callable[[Scene], Scene]) -> None:
        with self._change:
            self._scene = replace(change(self._scene), number=self._scene.number + 1)
            self._change.notify_all()
