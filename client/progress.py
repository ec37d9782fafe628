"""How far a task has come: tuners report each step, evaluation each batch, and whoever runs it may watch, or stop it.

    with watching(lambda step, of, loss: ...):
        device.handle(task)

Nothing is computed differently for being watched, and without a watcher a report does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

Watch = Callable[[int, int, float], None]  # steps done, steps in all, mean loss so far

_watcher: Final[ContextVar[Watch | None]] = ContextVar("watcher", default=None)


class Stopped(Exception):  # noqa: N818 - no error: the device's owner or rules ended a task between two steps
    """Raised by a watcher to end the task it watches."""


def report(step: int, of: int, loss: float) -> None:
    """Tell the watcher, if there is one, that `step` of `of` steps are done, with that mean loss so far."""
    watch = _watcher.get()
    if watch is not None:
        watch(step, of, loss)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Reports of the block's thread go to `watch`; what it raises ends the task."""
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)
