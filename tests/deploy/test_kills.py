"""A server, a SuperLink or a ServerApp is killed with -9 in every phase of a round, again and again: the same bytes.

Each round of a long run is cut once; at the end the state must equal that of a run which was left alone. Run with `-s`
to see every trial: `make test-deploy` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from stand import Stand, answers

pytestmark = pytest.mark.deploy

TARGETS = ("server", "superlink", "serverapp")
PHASES = ("before tasks", "tasks out", "half the updates in", "aggregating", "writing the checkpoint")
DEVICES = 3


def reached(stand: Stand, round: int, phase: str) -> Callable[[], bool]:
    """Whether a run is in this phase of this round, as far as its files tell."""
    drafts = stand.out / "checkpoints" / f".draft-{round:06d}"
    done = stand.out / "checkpoints" / f"round-{round:06d}"

    def now() -> bool:
        if phase == "writing the checkpoint":
            return drafts.exists() or done.exists()
        if phase == "before tasks":
            return (stand.out / "checkpoints" / f"round-{round - 1:06d}").exists()
        events = stand.events()
        if phase == "tasks out":
            return any(e["event"] == "phase" and (e["round"], e["phase"]) == (round, "train") for e in events)
        wanted = DEVICES if phase == "aggregating" else 1
        return len(list(answers(events, round, "train"))) >= wanted

    return now


def trials() -> Iterator[tuple[str, str]]:
    for phase in PHASES:
        for target in TARGETS:
            yield target, phase


@pytest.mark.parametrize("strategy", ["fedloom", "sketch", "flora"])
def test_a_run_that_is_killed_in_every_phase_ends_in_the_same_bytes(
    strategy: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cuts = list(trials())
    changes = {"server": {"rounds": len(cuts)}}
    whole = Stand(tmp_path_factory.mktemp("whole"), devices=DEVICES, strategy=strategy, changes=changes)
    with whole:
        whole.start()
        whole.wait_to_finish(600)
    stand = Stand(tmp_path_factory.mktemp("cut"), devices=DEVICES, strategy=strategy, changes=changes)
    seconds = []
    with stand:
        stand.start()
        for round, (target, phase) in enumerate(cuts, start=1):
            stand.wait(reached(stand, round, phase), seconds=240, pause=0.0005, label=f"round {round}, {phase}")
            killed = stand.kill(target)
            began = time.monotonic()
            checkpoint = stand.out / "checkpoints" / f"round-{round:06d}"
            stand.wait(checkpoint.exists, seconds=240, label=f"round {round} after the kill of {target}, {phase}")
            seconds.append(time.monotonic() - began)
            print(
                f"{strategy:8} round {round:2}: killed {target:9} {phase:24} {killed} processes, {seconds[-1]:5.1f} s"
            )
            assert killed >= 1
        stand.wait_to_finish(300)
    rounds = [record["round"] for record in stand.records()]
    assert rounds == list(range(len(cuts) + 1))
    assert [record.get("updates") for record in stand.records()[1:]] == [DEVICES] * len(cuts)
    assert stand.records()[-1]["refused"] == 0
    same = stand.final_state() == whole.final_state()
    print(
        f"{strategy}: {len(cuts)} kills, 0 lost rounds, {'the same bytes' if same else 'OTHER BYTES'}, "
        f"{sorted(seconds)[len(seconds) // 2]:.1f} s to the end of the round (median)"
    )
    assert same


def test_devices_that_are_killed_come_back(tmp_path: Path) -> None:
    """The round goes on with the others, and the device answers again with the state it had on disk."""
    targets = [f"{name}{part}" for part in ("", "/supernode") for name in ("clinic-a", "clinic-b")]
    cuts = [(target, phase) for phase in ("tasks out", "half the updates in") for target in targets]
    with Stand(tmp_path, devices=DEVICES, changes={"server": {"rounds": 200}}) as stand:
        stand.start()
        round = 0
        for target, phase in cuts:
            round = max((event.get("round", 0) for event in stand.events()), default=0) + 1
            stand.wait(reached(stand, round, phase), seconds=240, pause=0.005, label=f"round {round}, {phase}")
            killed, began, name = stand.kill(target), time.monotonic(), target.partition("/")[0]
            stand.wait((stand.out / "checkpoints" / f"round-{round:06d}").exists, seconds=240, label=f"round {round}")
            ended = time.monotonic() - began
            back = stand.wait(partial(_first_answer, stand, name, round), seconds=240, label=f"{name} to be back")
            seconds = time.monotonic() - began
            print(
                f"round {round:2}: killed {target:18} {phase:20} ({killed}); it ended {ended:.1f} s later; "
                f"{name} answered again in round {back}, after {seconds:.0f} s"
            )
            assert killed >= 1
        rounds = [record["round"] for record in stand.records()]
        assert rounds == list(range(len(rounds)))
        assert min(record["updates"] for record in stand.records()[1:]) >= DEVICES - 1
        assert "lost its model" not in stand.log("server", 10_000)


def _first_answer(stand: Stand, name: str, after: int) -> int:
    """The first round after one in which a device gave a good answer; 0 for none yet."""
    found = [e["round"] for e in stand.events() if e["event"] == "answer" and e["device"] == name and not e["refused"]]
    return min((round for round in found if round > after), default=0)
