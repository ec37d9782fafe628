"""Tasks that end before their end: a pause, a caller that has gone, an agent that stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from stages import LIMIT, LONG, Stage, ask, in_background, make_settings, make_task, refusal, until

from fedloom.client.agent.agent import running
from fedloom.client.agent.calls import Calls, calling
from fedloom.client.agent.home import Home, socket_uri
from fedloom.client.chunks import cut
from fedloom.client.data import Example
from fedloom.protocols.agent_pb2_grpc import AgentStub
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Kind, Refusal, Update


@pytest.fixture
def agent(stage: Stage) -> Iterator[Calls]:
    with calling(stage.home.socket) as calls:
        yield calls


def test_pause_stops_what_runs_and_lasts(stage: Stage, agent: Calls) -> None:
    thread, answers = in_background(stage, encode(make_task(round=8, knobs=LONG)))
    until(lambda: agent.status().progress.round == 8 and agent.status().progress.step > 0)
    assert agent.pause().state == "paused"
    thread.join(10)
    reason = "not now: this device is paused by its owner"
    assert decode(answers[0], Refusal, limit=LIMIT).reason == reason
    assert refusal(agent, make_task(round=8)).reason == reason
    assert decode(agent.hello(), Refusal, limit=LIMIT).reason == reason
    assert stage.home.paused.exists()  # and so it is after a restart
    assert agent.resume().state == "idle"
    assert isinstance(ask(agent, make_task(round=8)), Update)


def test_pause_stops_an_evaluation(stage: Stage, agent: Calls) -> None:
    """It is shown batch by batch, and does not go on to its end."""
    knobs = {"batch_size": 1, "rouge": 1, "max_new_tokens": 100}
    thread, answers = in_background(stage, encode(make_task(round=9, kind=Kind.EVALUATE, knobs=knobs)))
    until(lambda: agent.status().progress.round == 9 and agent.status().progress.step > 0)
    progress = agent.status().progress
    assert (progress.kind, progress.of) == ("evaluate", 8)
    assert progress.loss > 0
    agent.pause()
    thread.join(10)
    agent.resume()
    assert decode(answers[0], Refusal, limit=LIMIT).reason == "not now: this device is paused by its owner"
    assert agent.status().progress.step < 8


def test_a_task_that_nobody_waits_for_gives_way(stage: Stage, agent: Calls) -> None:
    with grpc.insecure_channel(socket_uri(stage.home.socket)) as channel:
        call = AgentStub(channel).Perform(cut(encode(make_task(round=10, knobs=LONG))))
        until(lambda: agent.status().progress.round == 10 and agent.status().progress.step > 0)
        call.cancel()
    assert isinstance(ask(agent, make_task(round=11)), Update)


def test_an_agent_that_stops_asks_for_patience(tmp_path: Path, tiny_llama: Path, examples: list[Example]) -> None:
    """What it was at counts against nobody: whoever stopped it may start it again."""
    settings = make_settings(tmp_path, tiny_llama, examples)
    home = Home(folder=settings.folder)
    with running(settings, home) as agent:
        there = Stage(settings=settings, home=home, agent=agent)
        thread, answers = in_background(there, encode(make_task(round=14, knobs=LONG)))
        until(lambda: agent.board.scene.step > 0)
        agent.close()
        thread.join(10)
    assert decode(answers[0], Refusal, limit=LIMIT).reason == "not now: this device's agent stops"
