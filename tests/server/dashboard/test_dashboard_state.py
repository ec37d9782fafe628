"""A run as its log tells it, restarts and lies included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_story import Story

from fedloom.protocols.messages import DeviceReport
from fedloom.server.dashboard.fields import DEVICE_LIMIT, clean
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.rounds import LATEST, ROUND_LIMIT, Rounds, read_round
from fedloom.server.dashboard.state import OPEN_LIMIT, REFUSAL_LIMIT, RunState, Standing, Status


def read(out: Path) -> RunFolder:
    folder = RunFolder(out)
    while folder.poll()[1]:
        continue
    return folder


def test_a_run_from_its_beginning_to_its_end(story: Story) -> None:
    folder = RunFolder(story.out)
    folder.poll()
    assert folder.run.status == Status.WAITING
    story.recipe().begin()
    folder.poll()
    assert (folder.run.status, folder.run.round, folder.run.total) == (Status.RUNNING, -1, 4)
    assert {device.standing for device in folder.run.devices.values()} == {Standing.JOINED}
    story.whole_round(0).ask(1).answer(1, "hospital-a", size=700, seconds=3.25)
    folder.poll()
    run = folder.run
    assert run.phase is not None
    assert (run.phase.round, run.phase.answered, run.phase.asked) == (1, 1, 3)
    device = run.devices["hospital-a"]
    assert (device.standing, device.seconds, device.total().up) == (Standing.ANSWERED, 3.25, 1700)
    assert run.devices["clinic"].standing == Standing.TRAINING
    story.answer(1, "hospital-b", size=0, refused="no answer within 60 s").end(1)
    folder.poll()
    assert run.devices["clinic"].standing == Standing.SILENT
    assert run.devices["hospital-b"].standing == Standing.REFUSED
    assert run.devices["hospital-b"].total().refused == 1
    assert [(i.device, i.round, i.reason) for i in run.incidents] == [("hospital-b", 1, "no answer within 60 s")]
    story.log.finished()
    folder.poll()
    assert (run.status, run.phase) == (Status.FINISHED, None)


def test_nodes_that_say_hello_are_no_devices_yet(story: Story) -> None:
    story.log.began(round=0, rounds=4, phase="hello", devices=["1", "2"])
    story.log.answered(round=0, phase="hello", device="1", size=0, down=0, seconds=0.0, refused="it holds another base")
    run = read(story.out).run
    assert run.devices == {}
    assert run.phase is not None
    assert (run.phase.answered, run.phase.asked) == (1, 2)
    assert run.incidents[0].reason == "it holds another base"


def test_who_does_not_take_part_is_named_once(story: Story) -> None:
    story.begin()
    for _ in range(3):  # before every round
        story.log.left_out(device="cellar", reason="it holds another base")
        story.log.answered(round=0, phase="hello", device="attic", size=9, down=0, seconds=0, refused="not now: paused")
    run = read(story.out).run
    assert [(incident.device, incident.reason) for incident in run.incidents] == [
        ("attic", "not now: paused"),
        ("cellar", "it holds another base"),
    ]
    assert (run.devices["cellar"].standing, run.devices["cellar"].why) == (Standing.LEFT_OUT, "it holds another base")
    story.log.joined(report=DeviceReport(device="cellar", examples=1, rank=1))
    assert (device := read(story.out).run.devices["cellar"]).standing == Standing.JOINED
    assert device.why == ""


def test_not_now_and_not_needed_are_no_failures(story: Story) -> None:
    story.begin().ask(1).answer(1, "hospital-a")
    story.answer(1, "clinic", refused="not now: it works at 22:00-06:00 only")
    story.log.unneeded(round=1, phase="train", device="hospital-b", down=300)
    folder = read(story.out)
    run = folder.run
    assert run.phase is not None
    assert (run.phase.answered, run.phase.asked, run.phase.waiting) == (2, 2, set())
    story.end(1)
    folder.poll()
    standings = {name: (device.standing, device.why) for name, device in run.devices.items()}
    assert standings["clinic"] == (Standing.NOT_NOW, "it works at 22:00-06:00 only")
    assert standings["hospital-b"] == (Standing.NOT_NEEDED, "")
    totals = {name: device.total() for name, device in run.devices.items()}
    assert {name: (total.rounds, total.refused) for name, total in totals.items()} == {
        "hospital-a": (1, 0),
        "hospital-b": (0, 0),
        "clinic": (0, 0),
    }
    assert (totals["hospital-b"].up, totals["hospital-b"].down) == (0, 300)
    assert list(run.incidents) == []


def test_a_restart_does_not_count_a_round_twice(story: Story) -> None:
    """Killed in round 2 with one answer in; the journal's answer is told again, then the round ends."""
    story.begin().whole_round(0).whole_round(1).ask(2).answer(2, "hospital-a", size=500)
    before = read(story.out)
    assert before.run.devices["hospital-a"].total().up == 2500
    story.begin(after=1).ask(2)
    for device in story.devices:
        story.answer(2, device, size=500)
    story.end(2)
    after = read(story.out).run
    total = after.devices["hospital-a"].total()
    assert (total.up, total.rounds, total.refused) == (2500, 2, 0)
    assert (after.starts, after.round) == (2, 2)


def test_a_crash_between_the_checkpoint_and_its_line_keeps_the_round(story: Story) -> None:
    story.begin().ask(1).answer(1, "hospital-a", size=500)
    story.begin(after=1)
    assert read(story.out).run.devices["hospital-a"].total().up == 500


def test_rounds_that_are_done_again_are_forgotten(story: Story) -> None:
    story.begin().whole_round(0).whole_round(1).whole_round(2)
    (story.out / "metrics.jsonl").write_text("", encoding="utf-8")
    story.begin(after=0)
    assert [done.round for done in read(story.out).rounds()] == [0]


def test_metrics_that_a_restart_cut_back(story: Story) -> None:
    story.begin().whole_round(0).whole_round(1).whole_round(2)
    folder = read(story.out)
    metrics = story.out / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    story.begin(after=1)
    metrics.write_text("".join(lines[:2]), encoding="utf-8")
    folder.poll()
    assert [done.round for done in folder.rounds()] == [0, 1]
    story.end(2, train_loss=0.5)
    folder.poll()
    assert [done.train_loss for done in folder.rounds()] == [None, 1.7, 0.5]


def test_curves_come_from_metrics_alone_where_there_are_no_events(story: Story) -> None:
    metrics = "".join(json.dumps(story.record(round)) + "\n" for round in range(3))
    (story.out / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    assert [done.values["exact_match"] for done in read(story.out).rounds()] == pytest.approx([0.3, 0.4, 0.5])


def test_quarantine_is_up_to_and_including_its_last_round(story: Story) -> None:
    story.begin().whole_round(0).whole_round(1)
    story.log.rested(device="clinic", until=3, reason="no answer three times")
    folder = read(story.out)
    clinic = folder.run.devices["clinic"]
    resting = []
    for round in (2, 3, 4):
        resting.append(folder.run.is_resting(clinic))  # while `round` runs
        story.end(round)
        folder.poll()
    assert resting == [True, True, False]
    assert (folder.run.incidents[0].device, folder.run.incidents[0].until) == ("clinic", 3)


def test_stopped_with_its_reason_and_taken_up_again(story: Story) -> None:
    story.begin().log.stopped("a round needs at least 2 good updates, got 0")
    folder = read(story.out)
    assert (folder.run.status, folder.run.reason) == (Status.STOPPED, "a round needs at least 2 good updates, got 0")
    story.begin(after=0)
    folder.poll()
    assert (folder.run.status, folder.run.reason) == (Status.RUNNING, "")


def test_torn_and_foreign_lines_are_passed_over_and_counted(story: Story) -> None:
    story.begin()
    with (story.out / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "event": "pha\n\xff\xfe\n[1, 2]\n"text"\n' + b"[" * 200_000 + b"\n")
        file.write(b'{"event": "answer", "device": 7}\n{"event": "from the future", "x": 1}\n' + b"9" * 5000 + b"\n")
    story.ask(1)
    folder = read(story.out)
    assert folder.unreadable == 7
    assert folder.run.phase is not None
    assert folder.run.phase.round == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "time",
    "round",
    "rounds",
    "device",
    "devices",
    "phase",
    "bytes",
    "down",
    "seconds",
    "refused",
    "until",
    "record",
    "rank",
)
EVENTS = (
    "started",
    "joined",
    "left_out",
    "phase",
    "answer",
    "unneeded",
    "quarantined",
    "round",
    "finished",
    "stopped",
)


@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.dictionaries(st.sampled_from(KEYS), JSON)), max_size=8))
def test_whatever_a_line_holds_it_is_taken_or_refused(events: list[tuple[str, dict[str, Any]]]) -> None:
    run = RunState()
    for kind, fields in events:
        try:
            run.apply({**fields, "event": kind})
        except ValueError:
            continue
    assert all(device.total().up >= 0 for device in run.devices.values())


def test_memory_is_bounded() -> None:
    run = RunState()
    for number in range(DEVICE_LIMIT + 50):
        run.apply({"event": "answer", "device": f"d{number}", "round": 1, "phase": "train", "refused": "no"})
    for round in range(OPEN_LIMIT + 50):
        run.apply({"event": "answer", "device": "d0", "round": round, "phase": "train", "bytes": 2})
    assert (len(run.devices), run.crowded, len(run.incidents)) == (DEVICE_LIMIT, True, REFUSAL_LIMIT)
    assert len(run.devices["d0"].open) == OPEN_LIMIT
    assert run.devices["d0"].total().up == 2 * (OPEN_LIMIT + 50)


def test_many_rounds_are_thinned_but_for_the_first_and_the_last() -> None:
    rounds = Rounds()
    for number in range(5 * ROUND_LIMIT):
        rounds.add(read_round({"round": number}))
    kept = [done.round for done in rounds]
    last = 5 * ROUND_LIMIT - 1
    assert len(kept) <= ROUND_LIMIT
    assert kept[0] == 0
    assert kept[-LATEST:] == list(range(last - LATEST + 1, last + 1))
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("日本の端末 é", "日本の端末 é"),
        ("two\nlines\r\x00", "two\ufffdlines\ufffd\ufffd"),
        ("right\u202eto left", "right\ufffdto left"),
        ("half \ud800", "half \ufffd"),
        ("x" * 40, "x" * 19 + "…"),
    ],
)
def test_names_are_one_visible_line(text: str, shown: str) -> None:
    assert clean(text, 20) == shown
    clean(text).encode("utf-8")


def test_what_is_no_number_is_no_point() -> None:
    line = '{"round": 3, "train_loss": NaN, "seconds": 1e999, "evaluation": {"loss": Infinity, "exact_match": 0.5}}'
    done = read_round(json.loads(line))
    assert (done.train_loss, done.seconds, dict(done.values)) == (None, None, {"exact_match": 0.5})
    for wrong in ({}, {"round": -1}, {"round": True}, {"round": 1, "bytes_up": "many"}):
        with pytest.raises(ValueError, match="must"):
            read_round(wrong)
