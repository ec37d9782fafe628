"""The dashboard over real HTTP: what it shows, what it refuses, how it starts and ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from run_story import Story

from fedloom.protocols.config import RunConfig, build_config
from fedloom.server.dashboard import stream
from fedloom.server.dashboard.guard import Guard
from fedloom.server.dashboard.page import PARTS
from fedloom.server.dashboard.serving import Dashboard, serve
from fedloom.server.events import EventLog
from fedloom.server.units import human_bytes
from fedloom.simulations.runs import run_recipe

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    'quo"te\\ and\nnewline\rreturn\u2028',
    "{{ 7 * 7 }}{% raw %}",
    "event: state\ndata: forged",
    "half \ud800 \x00\x1b[31m",
    "n" * 5000,
)


def until(check: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, "never became true"
        time.sleep(0.02)
    return value


def shows(dashboard: Dashboard, *texts: str) -> str:
    """The page, once it holds all of the texts."""

    def look() -> str:
        page = httpx.get(dashboard.url).text
        return page if all(text in page for text in texts) else ""

    return str(until(look))


def events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Server-sent events by the rules of the HTML standard."""
    name, data = "", []
    for line in lines:
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "", []
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: ") or line == "data:":
            data.append(line[6:])


def test_it_serves_before_the_folder_is_there_and_follows_it(dashboard: Dashboard, story: Story) -> None:
    assert "Waiting for the run to begin" in shows(dashboard)
    story.recipe().begin()
    shows(dashboard, "<bdi>kitchen</bdi>", "Starting", "hospital-b", "300 examples · rank 3 · backprop")
    story.whole_round(0).ask(1).answer(1, "clinic", size=123_000)
    page = shows(dashboard, "Training, round 1 of 4", "1 of 3 answers", "124 kB")
    assert page.count("<tr role") == 4
    assert '<td role="cell" data-label="Up">124 kB</td>\n<td role="cell" data-label="Down">5.00 kB</td>' in page
    story.answer(1, "hospital-b", refused="not now: it works at 22:00-06:00 only")
    shows(dashboard, ">Not now</span><small><bdi>it works at 22:00-06:00 only</bdi></small>")
    story.end(1)
    page = shows(dashboard, "Round 1 of 4 is done", "40.0%", "+10.0 points since round 0", "2.50 MB")
    for part in ("Privacy spent", "Not measured", "Why it stopped", "hunter2"):
        assert (part in page) == (part in ("Privacy spent", "Not measured"))
    assert page.count("<svg") >= 3
    story.log.stopped("a round needs at least 2 good updates, got 0")
    shows(dashboard, "Stopped after round 1", "a round needs at least 2 good updates, got 0")


def test_the_plan_names_devices_that_have_not_come(dashboard: Dashboard, story: Story) -> None:
    plan = {"config": {"name": "from the plan"}, "wait_for": 2, "names": ["far-away", "hospital-a"]}
    (story.out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    shows(dashboard, "Waiting for 2 devices", "far-away", "Not seen yet", "from the plan")
    (story.out / "plan.json").write_text('{"torn": ', encoding="utf-8")
    story.begin()
    assert "far-away" in shows(dashboard, "kitchen")


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/healthz", "/dashboard.css", "/dashboard.js", "/icon.svg", "/nothing"]
)
def test_every_answer_is_locked_down(idle: Dashboard, path: str) -> None:
    answer = httpx.get(idle.url + path[1:])
    assert answer.status_code == (404 if path == "/nothing" else 200)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(dashboard: Dashboard, story: Story) -> None:
    story.recipe().begin().whole_round(0).whole_round(1)
    page = shows(dashboard, "Round 1 of 4")
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//", page)
    assert not re.search(r"<script(?! src=\"/dashboard.js\" defer>)", page)
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["", "events", "metrics", "nothing"])
def test_it_is_read_only(idle: Dashboard, method: str, path: str) -> None:
    answer = httpx.request(method, idle.url + path, content=b"x" if method != "TRACE" else None)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_has_headers_and_no_body(idle: Dashboard) -> None:
    for path in ("", "metrics", "healthz", "events", "dashboard.js"):
        answer = httpx.head(idle.url + path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("10.0.0.7", 421),
        ("", 421),
        ("localhost:80:80", 421),
        ("user@localhost", 421),
        ("localhost/x", 421),
    ],
)
def test_a_rebound_name_is_refused(idle: Dashboard, host: str, status: int) -> None:
    for path in ("", "healthz", "events"):
        assert httpx.head(idle.url + path, headers={"Host": host}).status_code == status


def test_names_under_which_it_is_reached() -> None:
    async def nothing(*_: Any) -> None:
        return

    open_wide = Guard(nothing, bound="0.0.0.0", names=["fl.example.org"])
    admitted = [
        open_wide.admits(host) for host in ("192.168.1.9:8080", "FL.example.org", "fl.example.org.", "other.org")
    ]
    assert admitted == [True, True, True, False]


def test_other_sites_cannot_use_it(idle: Dashboard) -> None:
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert httpx.get(idle.url + "healthz", headers=cross).status_code == 403
    cross["Sec-Fetch-Mode"] = "navigate"  # a link to it is fine
    assert httpx.get(idle.url, headers=cross).status_code == 200


def test_malformed_requests_do_not_hurt_it(idle: Dashboard) -> None:
    port = httpx.URL(idle.url).port
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"G" * 200_000,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
            wire.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                assert not wire.recv(100).startswith(b"HTTP/1.1 200")
    assert httpx.get(idle.url + "../../etc/passwd").status_code == 404
    assert httpx.get(idle.url).status_code == 200


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(dashboard: Dashboard, story: Story, name: str) -> None:
    story.devices = [name]
    story.recipe(name=name).begin().whole_round(0).ask(1).answer(1, name, refused=f"because {name}")
    page = shows(dashboard, "Merging, round 1 of 4", "1 of 1 answers")
    for piece in ("<script>alert", "<img src=x", "onerror='", "\x1b", "\x00", "\u2028", "n" * 600):
        assert piece not in page
    assert "49" not in re.findall(r"<bdi>(.*?)</bdi>", page)
    with httpx.stream("GET", dashboard.url + "events", timeout=5) as answer:
        seen = [part for part, _ in islice(events(answer.iter_lines()), len(PARTS) + 1)]
    assert seen == ["clock", *PARTS]


def test_parts_come_as_they_change(dashboard: Dashboard, story: Story) -> None:
    story.recipe().begin().whole_round(0)
    shows(dashboard, "Round 0 of 4")
    with httpx.stream("GET", dashboard.url + "events", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.iter_lines())
        first = dict(next(told) for _ in range(len(PARTS) + 1))
        assert abs(float(first["clock"]) - time.time()) < 30
        story.ask(1)
        changed = dict(next(told) for _ in range(3))
        assert set(changed) == {"clock", "state", "devices"}
        assert "Training, round 1 of 4" in changed["state"]
        story.answer(1, "clinic").end(1)
        more: dict[str, str] = {}
        until(lambda: more.update([next(told)]) or "Round 1 of 4 is done" in more.get("state", ""))
        until(lambda: more.update([next(told)]) or "rounds" in more)
        assert "recipe" not in more
        assert more["curves"].count("<figure>") == 3


def test_pages_open_at_once_are_limited(tmp_path: Path) -> None:
    with Dashboard(tmp_path, "127.0.0.1", 0, streams=2, period=0.05) as dashboard:
        address = dashboard.url + "events"
        with httpx.stream("GET", address) as one, httpx.stream("GET", address) as two:
            assert (one.status_code, two.status_code) == (200, 200)
            full = httpx.get(address)
            assert (full.status_code, full.headers["retry-after"]) == (503, "10")
            assert httpx.get(dashboard.url).status_code == 200

        def free() -> bool:
            with httpx.stream("GET", address) as again:
                return again.status_code == 200

        until(free)


def test_a_page_that_does_not_read_is_dropped(tmp_path: Path, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 0.3)
    story.devices = [f"device-{number:03d}-{'x' * 100}" for number in range(200)]
    story.begin()
    with Dashboard(story.out, "127.0.0.1", 0, streams=1, period=0.02) as dashboard, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", httpx.URL(dashboard.url).port))
        deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: httpx.head(dashboard.url + "events").status_code == 503)

        def freed() -> bool:
            story.ask(1)
            story.answer(1, story.devices[0])
            return httpx.head(dashboard.url + "events").status_code == 200

        until(freed, seconds=30)


def test_a_server_that_starts_again(dashboard: Dashboard, story: Story) -> None:
    story.begin().whole_round(0).whole_round(1).ask(2).answer(2, "clinic")
    with (story.out / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "event": "answ')  # kill -9
    shows(dashboard, "Training, round 2 of 4")
    again = Story(story.out, story.devices)
    again.begin(after=1).ask(2)
    shows(dashboard, "Training, round 2 of 4", "0 of 3 answers", "Started 2 times", "1 unreadable line ")
    again.end(2)
    shows(dashboard, "Round 2 of 4 is done")


def test_a_log_that_is_replaced_starts_over(dashboard: Dashboard, story: Story, tmp_path: Path) -> None:
    story.begin().whole_round(0).whole_round(1)
    shows(dashboard, "Round 1 of 4 is done", "hospital-a")
    other = Story(tmp_path / "other", ["someone-else"], rounds=9)
    other.begin()
    os.replace(other.out / "events.jsonl", story.out / "events.jsonl")
    (story.out / "metrics.jsonl").unlink()
    assert "hospital-a" not in shows(dashboard, "Starting", "someone-else")


def test_health(dashboard: Dashboard, story: Story) -> None:
    def health(status: str) -> httpx.Response:
        def look() -> httpx.Response | None:
            answer = httpx.get(dashboard.url + "healthz")
            return answer if answer.json()["status"] == status else None

        found: httpx.Response = until(look)
        return found

    assert health("waiting").status_code == 200
    story.recipe().begin().ask(1)
    running = health("running")
    assert running.status_code == 200
    facts = running.json()
    assert (facts["rounds"], facts["phase"], facts["devices"], facts["stale_after_seconds"]) == (4, "train", 3, 660.0)
    story.ask(2)
    assert health("running").status_code == 200
    story.log.finished()
    assert health("finished").status_code == 200
    story.begin(after=2).log.stopped("no room on the disk")
    assert health("stopped").status_code == 503


def test_a_folder_that_cannot_be_read_is_said(dashboard: Dashboard, story: Story) -> None:
    story.begin().ask(1)
    shows(dashboard, "Training, round 1")
    (story.out / "events.jsonl").unlink()
    (story.out / "events.jsonl").mkdir()
    shows(dashboard, "Training, round 1", "Not up to date:", "Is a directory")
    assert httpx.get(dashboard.url + "healthz").json()["status"] == "unreadable"
    assert httpx.get(dashboard.url + "healthz").status_code == 503


def test_it_writes_nothing(dashboard: Dashboard, story: Story) -> None:
    story.recipe().begin().whole_round(0)
    before = {path: path.stat().st_mtime_ns for path in story.out.rglob("*")}
    shows(dashboard, "Round 0 of 4")
    for path in ("metrics", "healthz", "dashboard.css"):
        httpx.get(dashboard.url + path)
    assert {path: path.stat().st_mtime_ns for path in story.out.rglob("*")} == before


def test_a_taken_port_is_one_clear_line(idle: Dashboard, tmp_path: Path) -> None:
    port = httpx.URL(idle.url).port or 0
    with pytest.raises(
        ValueError, match=f"address 127.0.0.1:{port} must be free to listen on, got: Address already in use"
    ):
        serve(tmp_path, "127.0.0.1", port)
    with pytest.raises(ValueError, match="must be free to listen on, got: "):
        serve(tmp_path, "no-such-host.invalid", 0)


def test_it_stops_with_a_page_open_and_starts_again(tmp_path: Path) -> None:
    threads = threading.active_count()
    dashboard = serve(tmp_path, "127.0.0.1", 0)
    port = httpx.URL(dashboard.url).port or 0
    with httpx.stream("GET", dashboard.url + "events", timeout=10) as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        dashboard.stop()
        assert time.monotonic() - began < 3
        assert list(lines)[-1:] in ([""], [])  # the stream came to its end
    dashboard.stop()
    until(lambda: threading.active_count() <= threads)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")
    with serve(tmp_path, "127.0.0.1", port) as again:
        assert httpx.get(again.url).status_code == 200
        with pytest.raises(ValueError, match="starts once"):
            again.start()


def test_it_listens_on_version_six(tmp_path: Path) -> None:
    try:
        dashboard = serve(tmp_path, "::1", 0)
    except ValueError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with dashboard:
        assert httpx.get(dashboard.url).status_code == 200


def test_a_real_run(tmp_path: Path) -> None:
    """Two devices, one round of real training: the page shows what the run's own files say."""
    table = {
        "model": {"path": "embedded"},
        "fleet": {"devices": 2, "ranks": [2]},
        "server": {"rounds": 1},
        "name": "tiny",
    }
    table |= {"data": {"test_size": 2}, "train": {"steps": 1}, "track": {"tensorboard": False}}
    out, logs = tmp_path / "out", []

    def watch(label: str, config: RunConfig) -> EventLog:
        logs.append(EventLog(out / "events.jsonl"))
        return logs[-1]

    with Dashboard(out, "127.0.0.1", 0, period=0.05) as dashboard:
        summary = run_recipe(build_config(table), out, watch=watch)
        logs[0].finished()
        entry = summary["strategies"][0]
        texts = (human_bytes(entry["bytes_up"]), human_bytes(entry["bytes_down"]), f"{100 * entry['after']:.1f}%")
        page = shows(dashboard, "Finished, 1 round", "device-00", "device-01", "rank 2", *texts)
        assert "unreadable" not in page
        assert httpx.get(dashboard.url + "healthz").json()["status"] == "finished"
