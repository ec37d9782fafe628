"""Links that are cut for a minute, lose a fifth of their packets, or are slow: rounds end by their rules.

Where all updates arrive in the end, the model has the same bytes as that of a run which was left alone. Run with `-s`
to see the seconds: `make test-deploy` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from links import LinkedStand, Network, unable
from stand import NAMES, answers

WHY_NOT = unable()
pytestmark = [pytest.mark.deploy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

DEVICES = NAMES[:3]
ROUNDS, CUT_ROUND, CUT_SECONDS = 9, 3, 60.0
ALL_OF_THEM = {"rounds": ROUNDS, "min_updates": 3, "timeout": 240.0}


@contextmanager
def on_links(folder: Path, rules: dict[str, Any]) -> Iterator[tuple[LinkedStand, Network]]:
    with (
        Network(DEVICES) as network,
        LinkedStand(folder, devices=len(DEVICES), changes={"server": rules}, network=network) as stand,
    ):
        yield stand, network


def finish(folder: Path, **how: float) -> tuple[bytes, dict[bool, list[float]], dict[str, int]]:
    """A whole run whose links are as told at the start, and in every second round from then on.

    Returns its final state, the seconds of good rounds (False) and of bad ones (True), and what became of packets.
    Good and bad rounds take turns, so that a machine which is busy with other work is so for both.
    """
    with on_links(folder, ALL_OF_THEM) as (stand, network):
        lost = {"passed": 0, "lost": 0, "cut": 0}
        before = network.set(**how)
        stand.start()
        for round in range(ROUNDS):
            stand.wait(partial(done_at, stand, round), seconds=600, pause=0.01, label=f"round {round}")
            bad = round % 2 == 0  # what this round was
            now = network.set(**(dict.fromkeys(how, 0.0) if bad else how))
            lost = {fate: lost[fate] + bad * (now[fate] - before[fate]) for fate in now}
            before = now
        stand.wait_to_finish(600)
        check_rounds(stand)
        seconds = [record["seconds"] for record in stand.records()[1:-1]]  # the first and last one evaluate, too
        return stand.final_state(), {False: seconds[::2], True: seconds[1::2]}, lost


def done_at(stand: LinkedStand, round: int) -> float:
    """When a round was done (Unix seconds); 0 while it is not."""
    return next((e["time"] for e in stand.events() if e["event"] == "round" and e["round"] == round), 0.0)


def check_rounds(stand: LinkedStand) -> None:
    """No round is missing or there twice, and each counts every device whose answer was taken once."""
    records, events = stand.records(), stand.events()
    assert [record["round"] for record in records] == list(range(len(records)))
    for record in records[1:]:
        assert record["updates"] == len({event["device"] for event in answers(events, record["round"], "train")})


def told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):5.1f} s a round ({min(seconds):.1f} to {max(seconds):.1f})"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state, seconds, counts = finish(tmp_path_factory.mktemp("undisturbed"))
    print(f"\nundisturbed: {told(seconds[False] + seconds[True])}")
    assert counts["lost"] == counts["cut"] == 0
    return state


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("300 ms round trip", {"delay": 0.15}),
        ("20% of packets lost, each way", {"loss": 0.2}),
    ],
)
def test_a_bad_link_gives_the_same_bytes(name: str, how: dict[str, float], undisturbed: bytes, tmp_path: Path) -> None:
    state, seconds, counts = finish(tmp_path, **how)
    share = counts["lost"] / (counts["lost"] + counts["passed"])
    print(f"\n{name}: {told(seconds[True])}, beside {told(seconds[False])}; {share:.1%} of packets lost, {counts}")
    assert share == pytest.approx(how.get("loss", 0.0), abs=0.03)
    assert state == undisturbed


def in_round(stand: LinkedStand, round: int, least: int) -> Callable[[], bool]:
    """Whether a round's tasks are out, and at least so many of its updates in."""

    def now() -> bool:
        events = stand.events()
        began = any(e["event"] == "phase" and (e["round"], e["phase"]) == (round, "train") for e in events)
        return began and len(list(answers(events, round, "train"))) >= least

    return now


def cut(stand: LinkedStand, network: Network, names: tuple[str, ...], least: int = 0) -> float:
    """Cut links in the middle of a round, for a minute; returns when they were good again (Unix seconds)."""
    stand.wait(in_round(stand, CUT_ROUND, least), pause=0.01, label=f"round {CUT_ROUND} with {least} updates")
    network.set(*names, up=False)
    time.sleep(CUT_SECONDS)
    counts = network.set(*names, up=True)
    assert counts["cut"] > 0  # somebody tried
    return time.time()


def first_answer(stand: LinkedStand, name: str, since: float) -> Callable[[], float]:
    """Seconds from `since` to the device's next answer that was taken; 0 while there is none."""

    def now() -> float:
        taken = (e for e in stand.events() if e["event"] == "answer" and e["device"] == name and not e["refused"])
        return next((e["time"] - since for e in taken if e["phase"] != "hello" and e["time"] > since), 0.0)

    return now


@pytest.mark.parametrize(
    ("names", "least"), [(DEVICES[2:], 0), (DEVICES, 0), (DEVICES, 1)], ids=["one", "all", "all, an update in"]
)
def test_a_round_that_needs_all_waits_for_the_cut_and_has_the_same_bytes(
    names: tuple[str, ...], least: int, undisturbed: bytes, tmp_path: Path
) -> None:
    with on_links(tmp_path, ALL_OF_THEM) as (stand, network):
        stand.start()
        mended = cut(stand, network, names, least)
        stand.wait_to_finish(600)
        check_rounds(stand)
        back = [first_answer(stand, name, mended)() for name in names]
        took = done_at(stand, CUT_ROUND) - done_at(stand, CUT_ROUND - 1)  # its record counts from the last start alone
        good = [record["seconds"] for record in stand.records()[CUT_ROUND + 1 : -1]]
        print(
            f"\n{len(names)} of {len(DEVICES)} cut for {CUT_SECONDS:g} s with {least} updates in: that round took "
            f"{took:.1f} s, beside {told(good)}; the next answers came "
            f"{', '.join(f'{each:.1f}' for each in sorted(back))} s after the links were good"
        )
        assert min(back) > 0
        assert stand.final_state() == undisturbed


def test_a_round_goes_on_without_a_device_whose_link_is_cut(tmp_path: Path) -> None:
    rules = {"rounds": 200, "min_updates": 2, "timeout": 20.0}
    with on_links(tmp_path, rules) as (stand, network):
        stand.start()
        lost = DEVICES[-1]
        mended = cut(stand, network, (lost,))
        ahead = stand.records()
        back = stand.wait(first_answer(stand, lost, mended), seconds=240, label=f"{lost} to be back")
        whole = len(stand.records()) + 1  # a round that it is asked in from the start
        stand.wait(lambda: len(stand.records()) > whole + 1, label="two more rounds")
        check_rounds(stand)
        records = stand.records()
        meanwhile = [(r["updates"], f"{r['seconds']:.1f}") for r in ahead[CUT_ROUND:]]
        print(
            f"\n1 of 3 cut for {CUT_SECONDS:g} s, 2 are enough: (updates, seconds) of rounds {meanwhile}; "
            f"its next answer {back:.1f} s after the link was good"
        )
        assert len(ahead) > CUT_ROUND  # rounds went on
        assert all(record["updates"] >= 2 for record in records[1:])
        assert records[whole + 1]["updates"] == 3
