"""The record of what each device was given, and its picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.protocols.messages import Cost, Start, Task, Update
from fedloom.server import loop
from fedloom.server.assigned import assigned
from fedloom.server.track import scalars
from fedloom.simulations.assigned import ROWS, Given, draw_assigned, rows_of
from fedloom.simulations.report import write_report

TASK = Task(device="a", round=1, rank=8, alpha=16.0, start_from=Start.PATCH)
UPDATE = Update(device="a", round=1, examples=5, cost=Cost(seconds=0.12345))


def test_a_line_holds_what_the_task_asked_and_what_it_cost() -> None:
    pruned = replace(TASK, knobs={"prune_ratio": 0.123456, "batch_size": 4})
    counted = replace(UPDATE, cost=Cost(seconds=0.12345, peak_tensor_bytes=21_340_000, out_of_memory=True))
    line = {"rank": 8, "ratio": 0.1235, "batch": 4, "seconds": 0.123, "tensor_mb": 21.3, "out_of_memory": True}
    assert assigned([pruned], [counted]) == {"a": line}
    assert Given.model_validate(line).colour == 0.1235
    unlike = replace(TASK, ranks={"q": 8, "v": 2, "o": 0}, knobs={"bits": 8})
    line = {"rank": 8, "modules": 2, "ranks": 10, "bits": 8, "batch": 8, "seconds": 0.123}
    assert assigned([unlike], [UPDATE]) == {"a": line}
    assert Given.model_validate(line).colour == 10


def test_nothing_is_recorded_of_other_strategies_or_of_devices_that_did_not_answer() -> None:
    pruned = replace(TASK, knobs={"prune_ratio": 0.1})
    assert assigned([TASK], [UPDATE]) == {}
    assert assigned([pruned, replace(pruned, device="b")], [UPDATE]).keys() == {"a"}


def test_idle_is_what_all_wait_for_the_slowest() -> None:
    times, record = [1.0, 2.5, 4.0], dict[str, Any]()
    updates = [replace(UPDATE, device=f"d{time}", cost=Cost(seconds=time)) for time in times]
    loop._add_up(record, updates)
    assert record["slowest_seconds"] == 4.0
    assert record["idle_seconds"] == sum(4.0 - time for time in times)
    assert "assigned" not in record


def test_devices_do_not_become_curves() -> None:
    record = {"round": 1, "idle_seconds": 2.0, "assigned": {"a": {"rank": 3}}, "devices": {"a": {"n": 4.0}}}
    assert scalars(record) == {"idle_seconds": 2.0}


def _given(rank: int, ratio: float, **more: Any) -> Given:
    return Given(rank=rank, ratio=ratio, batch=4, seconds=0.2, **more)


def test_rows_are_grouped_by_kind_least_memory_first() -> None:
    table = {1: {name: _given(4, 0.1) for name in "abcd"}, 2: {"b": _given(5, 0.2), "d": _given(2, 0.3)}}
    rows = rows_of(table, list("abcde"), ["big", "small"], [64.0, 16.0])
    assert [(row.device, row.kind) for row in rows] == [
        ("b", "small, 16 MB"),
        ("d", "small, 16 MB"),
        ("a", "big, 64 MB"),
        ("c", "big, 64 MB"),
    ]
    assert sorted(rows[0].rounds) == [1, 2]
    assert [row.kind for row in rows_of(table, list("abcde"), [], [])] == [""] * 4


def _texts(svg: str) -> list[str]:
    tree = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1) if "xmlns:xlink" not in svg else svg)
    return ["".join(node.itertext()).strip() for node in tree.iter() if node.tag.endswith("text")]


def test_the_picture_has_a_number_a_cell_and_marks_what_ran_out() -> None:
    table = {1: {"a": _given(11, 0.1), "b": _given(13, 0.2)}, 3: {"a": _given(17, 0.3, out_of_memory=True)}}
    plot = draw_assigned(rows_of(table, ["a", "b"], ["tx2"], [24.0]), "fedspine", key="assigned")
    texts = _texts(plot.svg)
    assert {"11", "13", "17\N{MULTIPLICATION SIGN}", "tx2, 24 MB", "a", "b"} <= set(texts)
    assert "<image" not in plot.svg  # the page's policy loads none
    assert plot.png.startswith(b"\x89PNG")
    assert plot.svg == draw_assigned(rows_of(table, ["a", "b"], ["tx2"], [24.0]), "fedspine", key="assigned").svg


def test_a_large_fleet_is_thinned_and_the_caption_says_so() -> None:
    names = [f"d{index:03d}" for index in range(3 * ROWS)]
    table = {1: {name: Given(rank=4, ranks=9, modules=3, batch=2, bits=8, seconds=1.0) for name in names}}
    plot = draw_assigned(rows_of(table, names, [], []), "fedpipe", key="assigned")
    assert f"{ROWS} of {3 * ROWS} devices, evenly chosen." in plot.caption
    assert "sum of the ranks" in plot.caption


@pytest.mark.parametrize("lost", [False, True])
def test_a_report_carries_it_only_where_something_was_recorded(tmp_path: Path, lost: bool) -> None:
    measured = {"n": 10.0, "tokens": 50.0, "loss_sum": 40.0, "exact_match_sum": 4.0, "token_hits": 30.0}
    tables = {"devices": {"device-00": measured, "device-01": measured}, "bytes_up": 10, "bytes_down": 20}
    given = {
        name: {"rank": 3, "batch": 4, "seconds": 1.0, "ratio": 0.25, "out_of_memory": lost}
        for name in tables["devices"]
    }  # type: ignore[attr-defined]
    records = [{"round": 0, **tables}, {"round": 1, **tables, "assigned": given}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"name": "fedspine", "folder": ".", "strategy": "fedspine", "metric": "exact_match", "refused": 0}
    entry |= dict.fromkeys(("before", "after", "loss_before", "loss_after", "seconds", "device_seconds"), 0.5)
    entry |= {key: [0.4, 0.6] for key in ("ci95", "ci95_before")} | {"peak_rss_mb": 300.0, "bytes_evaluation": 3}
    entry |= dict.fromkeys(("bytes_up", "bytes_down", "bytes_up_per_device", "bytes_down_per_device"), 100)
    entry |= {"virtual_seconds": 12.0, "idle_seconds": 3.5}
    summary = {"name": "x", "about": "", "model": "m", "devices": 2, "ranks": [3], "rounds": 1, "seed": 0}
    summary |= {"metric": "exact_match", "machine": {}, "profiles": ["jetson-tx2"], "memory_mb": [24.0, 28.0]}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"strategies": [entry]}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="figure-assigned"' in page
    assert "jetson-tx2, 28 MB" in page
    assert "3.5 s" in page
    assert (tmp_path / "plots" / "assigned.png").exists()
    records[1].pop("assigned")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert 'id="figure-assigned"' not in write_report(tmp_path).read_text(encoding="utf-8")
