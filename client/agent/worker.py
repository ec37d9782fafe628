"""The process that holds the model: it loads it once, and then does the tasks that its agent hands it.

    python -m fedloom.client.agent.worker HANDLE          (started by warm.py, with an open socket)

It is a process of its own so that whatever a task does to it (memory that runs out, a crash in native code) ends a task
and not the agent. A task that is refused leaves the model as it was; after any other failure the process ends, and the
agent starts another, whose model is as good as new.

Where a server learns from hearing that its task was too much (adjusting.py), the agent is told beforehand what to
answer should memory end the task: this process may not live to say it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Final

import torch

from fedloom.client.adjusting import adjusts, surrendered, too_much
from fedloom.client.agent.accept import check_task
from fedloom.client.agent.describe import describe_hello, describe_update
from fedloom.client.agent.home import Home
from fedloom.client.agent.limits import memory_wall
from fedloom.client.agent.owned import own_device
from fedloom.client.agent.pipe import Pipe
from fedloom.client.cost import out_of_memory
from fedloom.client.device import Device, NoRoom
from fedloom.client.memory import peak_rss
from fedloom.client.progress import Stopped, watching
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Task

_BETWEEN: Final = 0.1  # seconds between two reports of progress
_BROKEN: Final = 70  # exit status: the process is no good any more


class Worker:
    """A device behind a pipe."""

    def __init__(self, pipe: Pipe, device: Device, settings: DeviceSettings, home: Home) -> None:
        self._pipe, self._device, self._settings, self._home = pipe, device, settings, home
        self._wall = settings.rules.max_memory_mb * 10**6
        self._tasks: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        self._current, self._stop = -1, Event()

    def run(self) -> None:
        """Do tasks, one after another, until the agent is gone."""
        Thread(target=self._listen, name="listen", daemon=True).start()
        while True:
            self._perform(*self._tasks.get())  # by no name of its own, so that a large frame can go

    def _listen(self) -> None:
        """Take requests, and answer at once those that need no model."""
        try:
            while True:
                self._take(*self._pipe.receive())
        except (EOFError, OSError):
            os._exit(0)  # the agent is gone; files are written whole or not at all

    def _take(self, message: dict[str, Any], frame: bytes) -> None:
        if message["ask"] == "task":
            self._tasks.put((message["number"], frame))
        elif message["ask"] == "stop":
            if message["number"] == self._current:
                self._stop.set()
        else:
            self._say(message)

    def _say(self, message: dict[str, Any]) -> None:
        number = message["number"]
        try:
            if message["ask"] == "hello":
                hello = self._device.hello()
                self._pipe.send({"number": number, "say": "done", "about": describe_hello(hello)}, encode(hello))
            else:
                version = self._device.version(message["run"])
                self._pipe.send({"number": number, "say": "done", "about": {"version": version}})
        except ValueError as error:
            self._refuse(number, str(error))

    def _perform(self, number: int, frame: bytes) -> None:
        self._current = number
        self._stop.clear()
        try:
            task = decode(frame, Task, limit=self._settings.limit)
            del frame
            check_task(task, self._settings.accept)
            if adjusts(task):
                self._leave_word(number, task)
            with watching(self._watch(number)), memory_wall(self._wall):
                update = self._device.handle(task)
            if self._wall and peak_rss() > self._wall:
                if not adjusts(task):
                    raise ValueError(f"the task took {peak_rss() / 1e6:.0f} MB, {self._allowed()}")
                update = surrendered(update, task)
            answer = encode(update, wire=task.wire, seed=task.seed)
            held = [task.run, self._device.version(task.run)]
            about = describe_update(update, task.wire)
            self._pipe.send({"number": number, "say": "done", "about": about, "held": held}, answer)
        except Stopped:
            self._refuse(number, "stopped")
        except NoRoom as error:
            self._refuse(number, f"{error}, {self._allowed()}")
        except ValueError as error:
            self._refuse(number, str(error), version=getattr(error, "version", None))
        except OSError as error:
            self._refuse(number, f"this device's disk or data fails: {error.strerror or error}")
        except BaseException as error:
            traceback.print_exc()
            self._refuse(number, self._failure(error), last=True, memory=out_of_memory(error))
            os._exit(_BROKEN)

    def _leave_word(self, number: int, task: Task) -> None:
        """Tell the agent what the task's answer is if memory ends it."""
        update = too_much(task, self._device.examples)
        about = describe_update(update, task.wire)
        self._pipe.send({"number": number, "say": "if out of memory", "about": about}, encode(update))

    def _failure(self, error: BaseException) -> str:
        """One line, without anything that might be private, for a failure nobody foresaw."""
        if out_of_memory(error):
            return f"the task needs more memory than there is, {self._allowed()}"
        return f"the task failed on this device ({type(error).__name__}); its log says more"

    def _allowed(self) -> str:
        limit = self._settings.rules.max_memory_mb
        return f"this device allows {limit} MB" if limit else "this device sets no limit of its own"

    def _refuse(
        self, number: int, reason: str, *, version: int | None = None, last: bool = False, memory: bool = False
    ) -> None:
        """`last`: this process answers nothing more; `memory`: it has run out."""
        message = {"number": number, "say": "refused", "reason": reason, "version": version}
        self._pipe.send({**message, "last": last, "memory": memory})

    def _watch(self, number: int) -> Callable[[int, int, float], None]:
        last = 0.0

        def watch(step: int, of: int, loss: float) -> None:
            nonlocal last
            if self._stop.is_set():
                raise Stopped
            now = time.monotonic()
            if step == of or now - last >= _BETWEEN:
                last = now
                self._pipe.send({"number": number, "say": "progress", "step": step, "of": of, "loss": loss})

        return watch


def main(handle: int) -> int:
    """Load the device that the agent describes, say so, and work; the exit status."""
    pipe = Pipe(handle)
    told, _ = pipe.receive()
    settings, home = DeviceSettings.model_validate(told["settings"]), Home(folder=Path(told["home"]))
    torch.set_num_threads(settings.rules.threads or os.cpu_count() or 1)
    try:
        device, identity = own_device(settings, home)
        limit = settings.rules.max_memory_mb
        if limit and peak_rss() > limit * 10**6:
            needs = f"the model and the data take {peak_rss() / 1e6:.0f} MB"
            raise ValueError(f"rules.max_memory_mb must leave room for training: {needs}, got {limit}")
        hello = device.hello()
    except (ValueError, MemoryError) as error:
        pipe.send({"say": "failed", "reason": str(error) or "the model does not fit into memory"})
        return _BROKEN
    pipe.send({"say": "ready", "identity": identity, "about": describe_hello(hello)})
    Worker(pipe, device, settings, home).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
