"""The relay: a short start, frames carried whole, and patience with an agent that is not there yet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from stages import Stage, make_task

from fedloom.client.agent.calls import Calls, calling
from fedloom.client.relay import app, relayed
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Hello, Refusal, Update

LIMIT = 2**29
HEAVY = ("torch", "transformers", "peft", "numba", "llvmlite", "scipy", "safetensors", "pydantic", "ray", "psutil")


def context_of(socket: Path) -> Context:
    return Context(
        run_id=1,
        node_id=1,
        node_config={"agent": str(socket), "name": "a"},
        state=RecordDict(),
        run_config={},
    )


def fresh(code: str, *arguments: object) -> str:
    """The output of a program in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_relay_loads_nothing_that_it_does_not_need() -> None:
    loaded = json.loads(fresh("import json, sys; import fedloom.client.relay; print(json.dumps(sorted(sys.modules)))"))
    assert "fedloom.client.relay" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_flowers_own_process_around_the_relay_loads_no_torch() -> None:
    """All that a message's process imports, Flower's side included."""
    code = (
        "import json, sys; import flwr.supernode.cli.flwr_clientapp, fedloom.client.agent.launcher;"
        "import fedloom.client.relay;"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(fresh(code))
    assert [name for name in ("torch", "transformers", "peft", "numba", "scipy") if name in loaded] == []


RELAY = """
import sys, time
began = time.monotonic()
from fedloom.client.relay import relayed
from fedloom.client.agent.calls import Calls
from flwr.app import Context, RecordDict
loaded = time.monotonic()
node = {"agent": sys.argv[1], "name": "a"}
context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
sys.stdout.write(f"{len(relayed(context, Calls.hello))} {loaded - began:.3f} {time.monotonic() - began:.3f}")
"""


def test_a_fresh_process_relays_to_a_real_agent(stage: Stage) -> None:
    """A timing is no test; docs/benchmarks.md has it. Here: it is a process of its own, and it works."""
    size, loading, whole = map(float, fresh(RELAY, stage.home.socket).split())
    with calling(stage.home.socket) as agent:
        assert size == len(agent.hello())
    assert 0 < loading < whole


@pytest.fixture
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("_identity")
def test_frames_go_through_the_client_app_as_they_are(stage: Stage) -> None:
    def relay(kind: str, frame: bytes) -> bytes:
        message = Message(RecordDict({"fedloom": ConfigRecord({"frame": frame})}), dst_node_id=1, message_type=kind)
        message.metadata.__dict__["_message_id"] = "1"
        reply = app(message, context_of(stage.home.socket))
        return reply.content["fedloom"]["frame"]  # type: ignore[return-value]

    task = make_task(round=30)
    with calling(stage.home.socket) as agent:
        assert relay("train", encode(task)) == agent.perform(encode(task))
        assert decode(relay("query", b""), Hello, limit=LIMIT) == decode(agent.hello(), Hello, limit=LIMIT)
    assert decode(relay("train", b""), Refusal, limit=LIMIT).reason == "a frame must begin with b'FDLM', got b''"


def test_an_agent_that_stays_away_is_a_refusal(tmp_path: Path) -> None:
    began = time.monotonic()
    answer = decode(relayed(context_of(tmp_path / "none.sock"), Calls.hello, patience=0.5), Refusal, limit=LIMIT)
    assert 0.4 < time.monotonic() - began < 10
    assert answer.device == "a"
    assert answer.reason.startswith("the device's agent is not there")
    assert (answer.round, answer.run, answer.nonce) == (0, "", 0)


def test_a_refusal_of_the_relay_names_the_task(tmp_path: Path) -> None:
    context, task = context_of(tmp_path / "none.sock"), make_task(round=33, nonce=2**63 + 1)
    frame = relayed(context, lambda agent: agent.perform(b""), task=encode(task), patience=0.2)
    answer = decode(frame, Refusal, limit=LIMIT)
    assert (answer.device, answer.round, answer.run, answer.nonce) == ("a", 33, task.run, 2**63 + 1)
    bent = relayed(context, lambda agent: agent.perform(b""), task=encode(task)[:-1], patience=0.2)
    assert decode(bent, Refusal, limit=LIMIT).nonce == 0


def test_an_agent_that_comes_late_is_waited_for(stage: Stage) -> None:
    """Its socket is not there at first, as while an agent starts."""
    late = stage.home.folder / "late.sock"
    timer = threading.Timer(1.0, os.link, (stage.home.socket, late))
    timer.start()
    frame = encode(make_task(round=31))
    try:
        answer = relayed(context_of(late), lambda agent: agent.perform(frame), patience=30.0)
    finally:
        timer.join()
        late.unlink()
    assert decode(answer, Update, limit=LIMIT).round == 31


def test_a_path_with_odd_characters_is_found(stage: Stage) -> None:
    folder = stage.home.folder / "a b%20c"
    folder.mkdir()
    try:
        os.link(stage.home.socket, folder / "agent.sock")
        with calling(folder / "agent.sock") as agent:
            assert agent.status().device == "a"
    finally:
        shutil.rmtree(folder)
