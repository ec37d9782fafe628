"""An agent on its socket: it answers as its device would, once for each task, and whatever comes, it lives on."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from stages import LIMIT, LONG, Stage, ask, in_background, make_settings, make_task, refusal, until

from fedloom.client.agent import machine, warm
from fedloom.client.agent import worker as worker_module
from fedloom.client.agent.agent import running
from fedloom.client.agent.calls import Calls, calling
from fedloom.client.agent.home import Home, socket_uri
from fedloom.client.agent.outbox import entries
from fedloom.client.agent.pipe import Pipe
from fedloom.client.chunks import CHUNK
from fedloom.client.data import Example
from fedloom.client.device import Device
from fedloom.client.model import Resident
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.agent_pb2_grpc import AgentStub
from fedloom.protocols.codec import decode, decode_answer, encode
from fedloom.protocols.messages import Hello, Kind, Patch, Payload, Refusal, Update
from fedloom.server.intake import check_update


@pytest.fixture
def agent(stage: Stage) -> Iterator[Calls]:
    with calling(stage.home.socket) as calls:
        yield calls


def same(x: Payload, y: Payload) -> bool:
    assert x.factors.keys() == y.factors.keys()
    return all(
        np.array_equal(f.a, y.factors[n].a) and np.array_equal(f.b, y.factors[n].b) for n, f in x.factors.items()
    )


def test_the_answers_are_those_of_the_device(
    agent: Calls, llama: Resident, make_device: Callable[..., Device], payload_for: Callable[..., Payload]
) -> None:
    hello = decode(agent.hello(), Hello, limit=LIMIT)
    assert hello.spec == llama.spec
    assert (hello.report.device, hello.report.examples, hello.report.rank) == ("a", 4, 16)
    patch = Patch(base_hash=llama.spec.base_hash, since=0, version=1, payload=payload_for(llama.spec, 0))
    device = make_device(llama)
    for task in (make_task(patch=patch), make_task(patch=patch, kind=Kind.EVALUATE)):
        got, wanted = ask(agent, task), device.handle(task)
        assert isinstance(got, Update)
        assert same(got.payload, wanted.payload)
        assert got.metrics == wanted.metrics
        assert got.cost.peak_rss_bytes > 2**24
    assert decode(agent.hello(), Hello, limit=LIMIT).report.version == 1


def test_all_that_an_agent_writes_is_for_its_user_alone(
    tmp_path: Path, tiny_llama: Path, examples: list[Example]
) -> None:
    """Whatever the umask is: the model, the last answers, the log of what left."""
    settings = make_settings(tmp_path, tiny_llama, examples)
    home = Home(folder=settings.folder)
    mask = os.umask(0)
    try:
        with running(settings, home), calling(home.socket) as agent:
            assert isinstance(ask(agent, make_task()), Update)
        assert os.umask(0) == 0  # as it was before
    finally:
        os.umask(mask)
    made = [home.folder, *home.folder.rglob("*")]
    assert {"outbox.jsonl", "answers", "traffic.json"} <= {path.name for path in made}
    assert [path.name for path in made if path.stat().st_mode & 0o077] == []


def test_the_same_frame_gives_the_same_bytes_and_no_work(stage: Stage, agent: Calls) -> None:
    frame = encode(make_task(round=2))
    first, before = agent.perform(frame), agent.status()
    again, after = agent.perform(frame), agent.status()
    assert first == again  # seconds and memory included
    assert after.details["tasks"]["answered"] == before.details["tasks"]["answered"]
    assert after.details["tasks"]["again"] == before.details["tasks"]["again"] + 1
    assert [entry["again"] for entry in entries(stage.home.folder) if entry.get("round") == 2] == [False, True]


def test_all_that_leaves_is_logged_before_it_goes(stage: Stage, agent: Calls) -> None:
    before, traffic = len(list(entries(stage.home.folder))), agent.status().details["traffic"]
    frame = encode(make_task(round=3))
    sent = [agent.hello(), agent.perform(frame), agent.perform(b"junk")]
    noted = list(entries(stage.home.folder))[before:]
    assert [entry["bytes"] for entry in noted] == [len(answer) for answer in sent]
    hello, train, refused = noted
    assert (hello["kind"], train["kind"], refused["kind"]) == ("hello", "train", "refusal")
    assert (train["run"], train["round"], train["again"]) == ("ab" * 8, 3, False)
    tensors = train["what"]["tensors"]
    assert tensors["model.layers.0.self_attn.k_proj"] == [[16, 4], [4, 32]]
    assert len(tensors) == 14
    assert train["what"]["dtype"] == "fp32"
    assert {"loss_sum", "tokens", "n"} <= set(train["what"]["metrics"])
    assert "must begin with" in refused["what"]["refused"]
    after = agent.status().details["traffic"]
    assert after["up"] - traffic["up"] == sum(map(len, sent))
    assert after["down"] - traffic["down"] == len(frame)  # what is refused at its first chunk is not kept


def test_what_is_refused_says_why_and_what_is_held(stage: Stage, agent: Calls, llama: Resident) -> None:
    held = decode(agent.hello(), Hello, limit=LIMIT).report.version
    cases = {
        "a task must be for device 'a', got one for 'b'": make_task(device="b"),
        "this device accepts the strategies fedloom, got 'flora'": make_task(strategy="flora"),
        "a task for a must have rank <= 16, got 17": make_task(rank=17),
        "unknown tuner 'lorra': did you mean 'lora'?": make_task(tuner="lorra"),
        "training diverged": make_task(knobs={"steps": 8, "lr": 1e30, "optimizer": "sgd", "clip": 0.0}),
    }
    for reason, task in cases.items():
        refused = refusal(agent, replace(task, round=7, nonce=99))
        assert reason in refused.reason
        assert (refused.device, refused.round, refused.version) == ("a", 7, held)
        assert (refused.run, refused.nonce) == (task.run, 99)
    stale = Patch(base_hash=llama.spec.base_hash, since=5, version=6, payload=Payload())
    assert refusal(agent, make_task(patch=stale)).version == held
    assert not refusal(agent, make_task(run="cd" * 8, rank=99)).version  # of a run that this device holds nothing of


def test_another_base_is_refused(agent: Calls) -> None:
    patch = Patch(base_hash="f" * 64, since=0, version=1, payload=Payload())
    assert "got one for ffffffffffff" in refusal(agent, make_task(patch=patch)).reason


def kept(stage: Stage) -> dict[str, bytes]:
    """The state that tasks may change."""
    files = [path for folder in ("patches", "own", "answers") for path in (stage.home.folder / folder).rglob("*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def test_garbage_changes_nothing_and_kills_nothing(stage: Stage, agent: Calls) -> None:
    """Frames that are bent, cut, mixed or random: every one is refused, by the same process, over the same state."""
    good, other = encode(make_task(round=4)), encode(make_task(round=4, kind=Kind.EVALUATE))
    agent.perform(good)
    generator, before, worker = random.Random(7), kept(stage), agent.status().details["model_process"]
    for _ in range(150):
        frame = bytearray(generator.choice((good, other)))
        match generator.randrange(5):
            case 0:
                for _ in range(generator.randrange(1, 6)):
                    frame[generator.randrange(len(frame))] ^= 1 << generator.randrange(8)
            case 1:
                frame = frame[: generator.randrange(len(frame))]
            case 2:
                frame += generator.randbytes(generator.randrange(1, 64))
            case 3:
                at = generator.randrange(4, len(frame))
                frame[at:] = generator.randbytes(len(frame) - at)
            case 4:
                frame = bytearray(generator.randbytes(generator.randrange(2000)))
        answer = agent.perform(bytes(frame))
        if bytes(frame) not in (good, other):
            assert decode(answer, Refusal, limit=LIMIT).reason
    assert kept(stage) == before
    assert agent.status().details["model_process"] == worker
    assert isinstance(ask(agent, replace(make_task(), round=4)), Update)


def stream(stage: Stage, chunks: Iterator[pb.Chunk]) -> bytes:
    with grpc.insecure_channel(socket_uri(stage.home.socket)) as channel:
        return b"".join(chunk.data for chunk in AgentStub(channel).Perform(chunks, timeout=30))


def test_a_stream_that_is_too_long_is_cut_at_its_first_chunk(stage: Stage, agent: Calls) -> None:
    """The frame is not taken in: memory does not grow by what is on offer."""
    taken = 0
    block = bytes(CHUNK)

    def endless(total: int) -> Iterator[pb.Chunk]:
        nonlocal taken
        yield pb.Chunk(data=b"FDLM" + block[4:], total=total)
        for _ in range(400):
            taken += 1
            yield pb.Chunk(data=block)

    before = psutil.Process().memory_info().rss  # the agent's front is this process
    answer = decode(stream(stage, endless(2**40)), Refusal, limit=LIMIT)
    assert answer.reason == f"a frame must be <= {LIMIT} bytes, got one of {2**40}"
    answer = decode(stream(stage, endless(3 * CHUNK)), Refusal, limit=LIMIT)
    assert "got more" in answer.reason
    assert taken < 100  # what the socket's buffers took, and no more
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert agent.status().state == "idle"


def test_chunks_must_make_a_frame(stage: Stage, agent: Calls) -> None:
    frame = encode(make_task())
    cases: dict[str, list[pb.Chunk]] = {
        "chunks must add up to the 0 bytes announced": [],
        "a frame must begin with b'FDLM', got b'x": [pb.Chunk(data=b"x" * 100, total=100)],
        "got more": [pb.Chunk(data=frame, total=len(frame) - 1)],
        f"chunks must add up to the {len(frame) + 1} bytes": [pb.Chunk(data=frame, total=len(frame) + 1)],
        "must come in fewer than": [pb.Chunk(data=b"FDLM", total=9999), *(pb.Chunk() for _ in range(100))],
    }
    for reason, chunks in cases.items():
        assert reason in decode(stream(stage, iter(chunks)), Refusal, limit=LIMIT).reason
    huge = pb.Chunk(data=b"FDLM" + bytes(4 * CHUNK), total=4 * CHUNK)
    with pytest.raises(grpc.RpcError) as caught:
        stream(stage, iter([huge]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert agent.status().state == "idle"


def test_whatever_speaks_no_grpc_is_hung_up_on(stage: Stage, agent: Calls) -> None:
    import socket

    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000, random.Random(1).randbytes(5000), b"PRI * HTTP/2.0\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            line.connect(str(stage.home.socket))
            line.sendall(junk)
    assert agent.status().state == "idle"


def test_progress_streams_to_those_who_watch(stage: Stage, agent: Calls) -> None:
    seen: list[Any] = []

    def watch() -> None:
        with calling(stage.home.socket) as calls:
            for progress in calls.watch():
                seen.append(progress)
                if progress.round == 9 and progress.step == progress.of == 40:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    ask(agent, make_task(round=9, knobs={"steps": 40, "lr": 0.01, "batch_size": 4}))
    watcher.join(10)
    assert not watcher.is_alive()
    mine = [progress for progress in seen if progress.round == 9]
    assert {progress.kind for progress in mine} == {"train"}
    steps = [progress.step for progress in mine]
    assert steps == sorted(steps)
    assert 0 < mine[-1].loss < 10


def test_status_says_what_the_agent_is_at(stage: Stage, agent: Calls) -> None:
    ask(agent, make_task(round=5))
    status = agent.status()
    assert (status.device, status.state, status.progress.kind, status.progress.round) == ("a", "idle", "train", 5)
    assert status.details["process"] == os.getpid()
    assert psutil.pid_exists(status.details["model_process"])
    assert status.details["model_process"] != os.getpid()
    assert status.details["device"]["examples"] == 4
    assert status.details["rules"] == ""
    ask(agent, make_task(round=5, rank=99))
    assert "rank <= 16, got 99" in agent.status().last_error


def test_the_socket_is_its_owners_alone(stage: Stage) -> None:
    assert stat.S_IMODE(stage.home.socket.stat().st_mode) & 0o177 == 0
    assert stat.S_IMODE(stage.home.folder.stat().st_mode) == 0o700


def test_two_agents_of_one_folder_are_refused(stage: Stage) -> None:
    with (
        pytest.raises(ValueError, match=rf"^an agent of .* runs already \(process {os.getpid()}\)$"),
        running(stage.settings, stage.home),
    ):
        pass
    assert stage.home.socket.exists()  # the first one's, untouched


def together(stage: Stage, frames: list[bytes]) -> list[bytes]:
    answers: dict[int, bytes] = {}

    def call(index: int) -> None:
        with calling(stage.home.socket) as calls:
            answers[index] = calls.perform(frames[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(frames))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(frames))]


def test_who_brings_the_same_task_at_once_shares_its_answer(stage: Stage, agent: Calls) -> None:
    before = agent.status().details["tasks"]["answered"]
    frame = encode(make_task(round=6, knobs={"steps": 60, "lr": 0.01, "batch_size": 4}))
    answers = together(stage, [frame] * 3)
    assert len(set(answers)) == 1
    assert agent.status().details["tasks"]["answered"] == before + 1


def test_tasks_wait_for_each_other_and_too_many_are_sent_away(stage: Stage) -> None:
    knobs = {"steps": 60, "lr": 0.01, "batch_size": 4}
    answers = together(stage, [encode(make_task(round=20 + i, knobs=knobs)) for i in range(7)])
    got = [decode_answer(answer, (Update, Refusal), limit=LIMIT) for answer in answers]
    assert [answer.round for answer in got] == list(range(20, 27))
    sent_away = [answer.reason for answer in got if isinstance(answer, Refusal)]
    assert sent_away
    assert set(sent_away) == {"not now: this device is busy and 4 tasks wait already"}
    assert len(sent_away) <= 2


def test_a_model_process_that_dies_is_one_refusal_and_another_process(stage: Stage, agent: Calls) -> None:
    wanted = ask(agent, make_task(round=12))
    assert isinstance(wanted, Update)
    held = decode(agent.hello(), Hello, limit=LIMIT).report.version
    worker = agent.status().details["model_process"]
    thread, answers = in_background(stage, encode(make_task(round=13, knobs=LONG)))
    until(lambda: agent.status().progress.round == 13 and agent.status().progress.step > 0)
    os.kill(worker, signal.SIGKILL)
    thread.join(10)  # it is said at once, while another process loads the model
    refused = decode(answers[0], Refusal, limit=LIMIT)
    assert "was killed (signal 9)" in refused.reason
    assert refused.version == held
    got = ask(agent, make_task(round=12, nonce=1))  # waits for the model to be loaded again
    assert isinstance(got, Update)
    assert same(got.payload, wanted.payload)
    assert agent.status().details["model_process"] != worker


@pytest.mark.slow
def test_a_task_that_needs_too_much_memory_is_refused(
    stage: Stage, agent: Calls, tmp_path: Path, tiny_llama: Path, examples: list[Example]
) -> None:
    """A batch whose logits alone are beyond the limit: it ends the task, by the wall or by the watch, not the agent."""
    agent.hello()
    idle = psutil.Process(agent.status().details["model_process"]).memory_info().rss
    limit = idle // 10**6 + 200
    many = [replace(example, prompt=example.prompt * 3) for example in examples] * 1000
    settings = make_settings(tmp_path, tiny_llama, many, {"rules": {"threads": 1, "max_memory_mb": limit}})
    home = Home(folder=settings.folder)
    with running(settings, home), calling(home.socket) as calls:
        refused = refusal(calls, make_task(knobs={"steps": 1, "batch_size": 4000, "lr": 0.01}))
        assert f"this device allows {limit} MB" in refused.reason or f"{limit} MB that this device allows" in (
            refused.reason
        )
        assert isinstance(ask(calls, make_task()), Update)


def test_what_cannot_be_loaded_is_one_line_at_the_start(tmp_path: Path, tiny_llama: Path) -> None:
    bad = [Example(prompt="p", completion="c" * 300)]
    settings = make_settings(tmp_path, tiny_llama, bad)
    with (
        pytest.raises(ValueError, match=r"^a's training data, example 0: a completion must fit into 127 tokens"),
        running(settings, Home(folder=settings.folder)),
    ):
        pass
    assert not Home(folder=settings.folder).socket.exists()


def test_a_task_that_passes_the_limit_is_an_answer_where_a_server_learns_from_it(
    tmp_path: Path, tiny_llama: Path, examples: list[Example], llama: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed for its memory, a task fitted to this device comes back as out of memory; any other is refused."""
    settings = make_settings(tmp_path, tiny_llama, examples, {"rules": {"threads": 1, "max_memory_mb": 8000}})
    home = Home(folder=settings.folder)
    ranks = dict.fromkeys(list(llama.spec.matrices)[:3], 2)
    fitted = make_task(round=3, rank=2, ranks=ranks, knobs={**LONG, "need": 77, "bits": 16}, nonce=9)
    measure, swollen = machine.resident_bytes, [False]
    monkeypatch.setattr(machine, "resident_bytes", lambda pid: 9 * 10**9 if swollen[0] else measure(pid))
    with running(settings, home) as agent, calling(home.socket) as calls:
        stage = Stage(settings=settings, home=home, agent=agent)
        answers = []
        for task in (fitted, make_task(round=4, knobs=LONG)):
            thread, said = in_background(stage, encode(task))
            until(lambda round=task.round: calls.status().progress.round == round and calls.status().progress.step > 0)  # type: ignore[misc]
            swollen[0] = True
            thread.join(20)
            swollen[0] = False
            answers.append(decode_answer(said[0], (Update, Refusal), limit=LIMIT))
        update, refused = answers
        assert isinstance(update, Update)
        check_update(update, fitted, llama.spec)
        assert update.cost.out_of_memory
        assert (update.examples, update.cost.peak_rss_bytes) == (4, 9 * 10**9)
        assert 0 < update.cost.seconds < 60
        assert update.metrics == {"ratio": 0.0, "rank": 2.0, "need": 77.0, "bits": 16.0}
        assert isinstance(refused, Refusal)
        assert refused.reason == "the task needs more memory than the 8000 MB that this device allows"
        assert calls.perform(encode(fitted)) == encode(update)  # from the disk, as any answer
        assert isinstance(ask(calls, make_task(round=5)), Update)
    noted = [entry["what"] for entry in entries(home.folder) if entry.get("round") == 3]
    assert [what["out_of_memory"] for what in noted] == [True, True]


def test_a_process_that_memory_breaks_leaves_word(
    tmp_path: Path, tiny_llama: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said beforehand is the answer, unless the owner had told the task to end."""

    class Broken:
        examples = 4

        def handle(self, task: Any) -> Update:
            raise MemoryError

    class Exited(BaseException):
        pass

    def leave(status: int) -> None:
        raise Exited

    monkeypatch.setattr(worker_module.os, "_exit", leave)
    settings = make_settings(tmp_path, tiny_llama, examples)
    home = Home(folder=settings.folder)
    fitted = make_task(rank=2, ranks={"q": 2})
    ours, theirs = (Pipe(end.detach()) for end in socket.socketpair())
    with pytest.raises(Exited):
        worker_module.Worker(theirs, Broken(), settings, home)._perform(7, encode(fitted))  # type: ignore[arg-type]
    said = [ours.receive(), ours.receive()]
    assert [message["say"] for message, _ in said] == ["if out of memory", "refused"]

    class Gone:
        over, pid = threading.Event(), 0

        def ask(self, message: Any, frame: bytes) -> Any:
            queue: SimpleQueue[Any] = SimpleQueue()
            for each in said:
                queue.put(each)
            return 7, queue

        def forget(self, number: int) -> None:
            self.over.set()

    model = warm.WarmModel(settings, home)
    monkeypatch.setattr(model, "_model", Gone)
    answer = model.perform(b"", lambda step, of, loss: None, lambda: "")
    update = decode(answer.frame, Update, limit=LIMIT)
    assert update.cost.out_of_memory
    assert answer.about["out_of_memory"]
    said[1][0]["memory"] = False
    with pytest.raises(warm.Refused, match="more memory than there is"):
        model.perform(b"", lambda step, of, loss: None, lambda: "")
