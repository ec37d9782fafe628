"""The model, kept warm: a process that holds it, started again whenever it ends, and asked for one thing at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from queue import Empty
from threading import Condition, Event, Thread
from typing import Any, Final

from fedloom.client.agent import machine
from fedloom.client.agent.answers import Answer
from fedloom.client.agent.home import Home
from fedloom.client.agent.model_process import ModelProcess, Ready
from fedloom.client.progress import Watch
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import NOT_NOW, Update

STOPS: Final = f"{NOT_NOW}this device's agent stops"
_LOADING: Final = 600.0  # seconds that a request waits for the model
_QUICK: Final = 30.0  # seconds for what needs no model
_GRACE: Final = 15.0  # seconds in which a stopped task must reach its next step
_LOOK: Final = 0.2  # seconds between two looks at a task that runs
_DELAYS: Final = (1.0, 60.0)  # seconds before a process is started again: at first, and at most


class Refused(ValueError):  # noqa: N818 - an answer like any other, named for what it is
    """The device says no; `version` is what it holds, where it was said."""

    def __init__(self, reason: str, version: int | None = None) -> None:
        super().__init__(reason)
        self.version = version


class WarmModel:
    """Hands tasks to the process that holds the model, and sees to it that there is one."""

    def __init__(self, settings: DeviceSettings, home: Home) -> None:
        self._settings, self._home = settings, home
        self._change, self._closing = Condition(), Event()
        self._process: ModelProcess | None = None
        self._ready = Ready()
        self._failure = ""
        self._held = ("", 0)  # a run, and the version of its model that the device last said it holds
        self._keeper = Thread(target=self._keep, name="keep-model", daemon=True)

    def start(self) -> Ready:
        """Start the process and wait until the model is there.

        Raises:
            ValueError: when it cannot be loaded, and why.
        """
        self._keeper.start()
        with self._change:
            self._change.wait_for(lambda: bool(self._ready.identity or self._failure) or self._closing.is_set())
            if self._failure:
                self._closing.set()
                raise ValueError(self._failure)
            return self._ready

    def close(self) -> None:
        """End the process."""
        self._closing.set()
        with self._change:
            self._change.notify_all()
            process = self._process
        if process is not None:
            process.kill(STOPS)
        if self._keeper.is_alive():
            self._keeper.join(timeout=10)

    @property
    def pid(self) -> int:
        """The process that holds the model, or held it last; 0 before the first."""
        return self._process.pid if self._process else 0

    @property
    def failure(self) -> str:
        """Why there is no model, in one line; empty while there is one, or one is being loaded."""
        return self._failure

    @property
    def loading(self) -> bool:
        return self._process is None or not self._process.said_ready.is_set()

    def identity(self) -> str:
        """A hash of what the answers depend on beside their tasks; waits for the model.

        Raises:
            Refused: when there is none.
        """
        self._model()
        return self._ready.identity

    def hello(self) -> Answer:
        """The device's hello.

        Raises:
            Refused: when it cannot say it now.
        """
        return _quick(self._model(), {"ask": "hello"})

    def version(self, run: str) -> int:
        """The version of a run's model that the device holds; while no model is there, the one that it last said."""
        process = self._process
        if process is not None and process.said_ready.is_set() and not process.over.is_set() and not self._failure:
            with suppress(Refused):
                self._held = (run, int(_quick(process, {"ask": "version", "run": run}).about["version"]))
        return self._held[1] if self._held[0] == run else 0

    def perform(self, frame: bytes, watch: Watch, halt: Callable[[], str]) -> Answer:
        """Do a task.

        Args:
            watch: is told of every step.
            halt: is asked now and then whether the task must end, and why.

        Raises:
            Refused: with the reason, whoever's it is: the device's, the rules', or that of a process that broke down.
        """
        process, began = self._model(), time.monotonic()
        number, said = process.ask({"ask": "task"}, frame)
        del frame
        guard = _Guard(process, number, self._settings.rules.max_memory_mb, halt)
        word: Answer | None = None  # what to say if memory ends the task, where that is an answer
        while True:
            try:
                message, answer = said.get(timeout=_LOOK)
            except Empty:
                guard.look()
                continue
            if message["say"] == "progress":
                watch(message["step"], message["of"], message["loss"])
                guard.look()
                continue
            if message["say"] == "if out of memory":
                word = Answer(frame=answer, about=message["about"])
                continue
            process.forget(number)
            if message["say"] == "done":
                self._held = (message["held"][0], message["held"][1])
                return Answer(frame=answer, about=message["about"])
            if message.get("last"):
                process.over.wait(_GRACE)  # so that the next request meets the process after it
            if word is not None and guard.ran_out(message):
                return _costed(word, seconds=time.monotonic() - began, peak_bytes=guard.too_many)
            raise Refused(guard.halted or message["reason"], message.get("version"))

    def _model(self) -> ModelProcess:
        """The process, once its model is there."""

        def settled() -> bool:
            process = self._process
            there = process is not None and process.said_ready.is_set() and not process.over.is_set()
            return there or bool(self._failure) or self._closing.is_set()

        with self._change:
            if not self._change.wait_for(settled, _LOADING):
                raise Refused(f"this device has not loaded its model within {_LOADING:g} s")
            if self._closing.is_set() or self._process is None:
                raise Refused(STOPS)
            if self._failure:
                raise Refused("this device cannot load its model; its owner was told why")
            return self._process

    def _keep(self) -> None:
        """See to it that there is a process with the model in it."""
        first, most = _DELAYS
        delay = first
        while not self._closing.is_set():
            process = ModelProcess(self._settings, self._home)
            with self._change:
                self._process = process
            ready = process.ready() or Ready()
            with self._change:
                self._failure = "" if ready.identity else ready.reason
                self._ready = ready
                self._change.notify_all()
            delay = first if ready.identity else min(2 * delay, most)
            if self._closing.is_set():
                process.kill(STOPS)
            process.over.wait()
            self._closing.wait(delay)


class _Guard:
    """Looks after one task: its memory, and whether it may go on."""

    def __init__(self, process: ModelProcess, number: int, limit_mb: int, halt: Callable[[], str]) -> None:
        self._process, self._number, self._limit_mb, self._halt = process, number, limit_mb, halt
        self.halted = ""  # why the task was told to end
        self.too_many = 0  # bytes that the process held when it was ended for holding too many
        self._next, self._until = 0.0, 0.0

    def look(self) -> None:
        """Look, if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK
        held = machine.resident_bytes(self._process.pid) if self._limit_mb else 0
        if held > self._limit_mb * 10**6:
            self.too_many = held
            self._process.kill(f"the task needs more memory than the {self._limit_mb} MB that this device allows")
        if not self.halted and (reason := self._halt()):
            self.halted, self._until = reason, now + _GRACE
            self._process.stop(self._number)
        elif self.halted and now > self._until:
            self._process.kill(self.halted)

    def ran_out(self, last: Mapping[str, Any]) -> bool:
        """Whether memory ended the task, by the last that was said of it: the process's own word, or its death."""
        ended = bool(last.get("memory")) or (last["say"] == "died" and self.too_many > 0)
        return ended and not self.halted


def _costed(word: Answer, *, seconds: float, peak_bytes: int) -> Answer:
    """An answer whose task took so long, in a process of so many bytes (0: not known)."""
    update = decode(word.frame, Update, limit=len(word.frame))
    cost = replace(update.cost, seconds=seconds, peak_rss_bytes=peak_bytes)
    return replace(word, frame=encode(replace(update, cost=cost)))


def _quick(process: ModelProcess, message: dict[str, str]) -> Answer:
    """What a process answers to something that needs no model."""
    number, said = process.ask(dict(message))
    try:
        found, frame = said.get(timeout=_QUICK)
    except Empty:
        raise Refused("this device is too busy to answer") from None
    finally:
        process.forget(number)
    if found["say"] != "done":
        raise Refused(found["reason"])
    return Answer(frame=frame, about=found["about"])
