"""The SuperLink's door, by itself: who passes, who is turned away, and how a lost connection's place is freed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata
from flwr.proto.node_pb2 import Node

from fedloom.server import presence
from fedloom.server.door import HELD, OVER, Door
from fedloom.server.guestbook import LARGEST_FILE, GuestList, Guests, VisitLog, digests, sent_key, write_guests
from fedloom.server.presence import ANSWER, CONFIRM, ENTER, GET_RUN, HEARTBEAT, LEAVE, OBJECT, POLL

KEY, REVOKED, STRANGER = b"PEM of a", b"PEM of b", b"PEM of nobody"
ELSEWHERE, HERE = ("10.0.0.9", 5000), ("127.0.0.1", 5000)
PASSWORD = "known to the run's own processes"
SHOWN = {b"fedloom-password": PASSWORD.encode()}


class Links:
    """Flower's register, as far as the door asks it; the node that it deactivated."""

    def __init__(self) -> None:
        self.freed: list[int] = []

    def state(self) -> Links:
        return self

    def get_node_id_by_public_key(self, key: bytes) -> int | None:
        return 7 if key == KEY else None

    def deactivate_node(self, node: int) -> bool:
        self.freed.append(node)
        return True


class House:
    """A door with an app behind it that reads the whole request and answers with `status`."""

    def __init__(self, folder: Path, guests: Guests) -> None:
        write_guests(folder, guests)
        self.folder, self.links = folder, Links()
        self.status, self.read, self.answer = 200, 0, b""
        self.open()

    def open(self) -> None:
        """A door that nobody has come to yet."""
        guests, visits = GuestList(self.folder, every=0.0), VisitLog(self.folder)
        self.door = Door(self._app, guests=guests, visits=visits, password=PASSWORD)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.read = 0
        while (message := await receive())["type"] == "http.request":
            self.read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})

    def ask(
        self,
        path: str,
        *,
        key: bytes | None = KEY,
        body: tuple[bytes, ...] = (b"",),
        client: tuple[str, int] = ELSEWHERE,
        headers: Mapping[bytes, bytes] | None = None,
        kind: str = "http",
    ) -> int:
        """The status of the answer."""
        sent: list[Any] = []
        coming = [
            {"type": "http.request", "body": part, "more_body": at < len(body) - 1} for at, part in enumerate(body)
        ]
        listed = list((headers or {}).items())
        if key is not None:
            listed.append((b"flwr-public-key", base64.b64encode(key)))

        async def receive() -> Any:
            return coming.pop(0) if coming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": kind, "path": path, "client": client, "server": ("10.0.0.1", 9092), "headers": listed}
        scope["app"] = SimpleNamespace(state=SimpleNamespace(linkstate_factory=self.links))
        asyncio.run(self.door(scope, receive, send))
        return int(sent[0].get("status", sent[0].get("code", 0)))

    @property
    def visits(self) -> list[tuple[str, str, str]]:
        """(event, device, why) of each visit."""
        path = self.folder / "door.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(visit["event"], visit["device"], visit["why"]) for visit in map(json.loads, lines)]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, Guests(limit=1000, known=digests([("a", KEY)]), revoked=digests([("b", REVOKED)])))


def test_a_known_key_passes(house: House) -> None:
    assert house.ask(ENTER) == 200
    assert house.ask(POLL, body=(b"x" * 600, b"x" * 400)) == 200
    assert house.read == 1000
    assert house.ask(LEAVE) == 200
    assert house.visits == [("connected", "a", ""), ("left", "a", "")]


@pytest.mark.parametrize(
    ("key", "device", "why"),
    [
        (STRANGER, "", "its key is unknown"),
        (REVOKED, "b", "its key is revoked"),
        (None, "", "it shows no key"),
        (b"", "", "it shows no key"),
    ],
)
def test_other_keys_are_turned_away_before_their_request_is_read(
    house: House, key: bytes | None, device: str, why: str
) -> None:
    assert house.ask(POLL, key=key, body=(b"x" * 900,)) == 401
    assert house.read == 0
    ((event, named, told),) = house.visits
    assert (event, named) == ("refused", device)
    assert told.startswith(why)


def test_entry_is_refused_by_flower_and_noted_by_the_door(house: House) -> None:
    house.status = HELD
    assert house.ask(ENTER, key=STRANGER) == HELD
    assert house.visits[0][0] == "refused"
    assert house.links.freed == []


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet", "/"])
def test_what_is_not_for_devices_is_for_this_machine_alone(house: House, path: str) -> None:
    assert house.ask(path) == 403
    assert house.visits == [("refused", "", f"{path} is for this machine alone")]
    assert house.ask(path, headers=SHOWN) == 403  # the password is not for others to try
    assert house.ask(path, client=HERE, key=None, headers=SHOWN) == 200
    assert house.ask(path, client=("10.0.0.1", 1), key=None, headers=SHOWN) == 200  # from the address that it came to
    assert house.ask(path, kind="websocket") == 1008


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/"])
@pytest.mark.parametrize(
    "headers", [{}, {b"fedloom-password": b""}, {b"fedloom-password": b"guess"}, {b"password": PASSWORD.encode()}]
)
def test_another_user_of_this_machine_gets_nothing_without_the_runs_password(
    house: House, path: str, headers: dict[bytes, bytes]
) -> None:
    assert house.ask(path, client=HERE, key=None, headers=headers, body=(b"x" * 100,)) == 401
    assert house.read == 0
    assert house.visits == [("refused", "", f"{path} is for this run's own processes alone")]
    assert house.ask(path, client=HERE, kind="websocket", headers=headers) == 1008


def test_health_is_for_everyone(house: House) -> None:
    assert house.ask("/health", key=None) == 200
    assert house.visits == []


def test_a_request_past_the_limit_is_cut(house: House) -> None:
    assert house.ask(POLL, headers={b"content-length": b"1001"}) == 413
    assert house.ask(POLL, headers={b"content-length": b"-1"}) == 413
    assert house.ask(POLL, headers={b"content-length": b"9" * 400}) == 413
    house.ask(POLL, body=(b"x" * 999, b"x", b"x"))
    assert house.read == 1000  # the rest was not handed on
    assert house.ask(ENTER, headers={b"content-length": b"65537"}) == 413
    assert house.visits == [
        ("refused", "a", "it sent more than 1000 bytes"),
        ("refused", "a", "it sent more than 65536 bytes"),
    ]


class Clock:
    """A clock for the door, and a house whose door goes by it."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(presence.time, "monotonic", lambda: self.now)
        house.open()


def test_a_lost_connection_gives_its_place_to_the_device_that_comes_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(house, monkeypatch)
    house.ask(ENTER)
    house.ask(POLL)
    house.status, clock.now = HELD, 107.0
    assert house.ask(ENTER) == 503
    assert house.links.freed == []  # it polled a moment ago: two processes with one key
    assert house.visits[-1] == ("waits", "a", "it has another connection, still in use")
    house.status, clock.now = 401, 109.0
    assert house.ask(ENTER) == 401
    assert house.links.freed == []  # Flower found the signature bad
    house.status = HELD
    assert house.ask(ENTER) == 503
    assert house.links.freed == [7]
    assert house.visits[-1] == ("taken over", "a", "its last connection was lost")
    house.status, clock.now = 200, 111.0
    assert house.ask(ENTER) == 503  # its place stays free, so that whoever waits for it learns of the loss
    clock.now = 112.5
    assert house.ask(ENTER) == 200
    assert house.visits[-1] == ("connected", "a", "")


def test_a_device_at_work_is_given_the_time_between_two_heartbeats(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(house, monkeypatch)
    house.ask(POLL)
    house.ask(CONFIRM)
    house.ask(HEARTBEAT)
    house.status, clock.now = HELD, 130.0
    house.ask(ENTER)
    assert house.links.freed == []
    clock.now = 133.0
    house.ask(ENTER)
    assert house.links.freed == [7]


def test_a_key_that_is_not_registered_yet_is_asked_to_wait(tmp_path: Path) -> None:
    house = House(tmp_path, Guests(limit=1000, known=digests([("new", STRANGER)])))
    house.status = HELD
    assert house.ask(ENTER, key=STRANGER) == 503
    assert house.links.freed == []
    assert house.visits == []


def pull(house: House) -> int:
    """A poll that gets a message."""
    house.answer = b"a message"
    status, house.answer = house.ask(POLL), b""
    return status


def test_a_device_that_answers_what_it_pulled_is_let_be(house: House) -> None:
    for _ in range(3):
        assert house.ask(POLL) == 200  # nothing there
        assert pull(house) == 200
        for path in (GET_RUN, OBJECT, CONFIRM, HEARTBEAT, ANSWER):
            assert house.ask(path) == 200
    assert house.visits == []


def test_a_device_that_polls_while_it_owes_an_answer_has_to_connect_again(house: House) -> None:
    """Flower's SuperNode would hold every answer back from now on, until the next message comes."""
    pull(house)
    assert house.ask(POLL) == 401
    assert house.ask(POLL) == 401
    assert house.visits == [("sent back", "a", "it lost count of its messages")]
    assert house.ask(LEAVE) == 200
    assert house.ask(ENTER) == 200
    assert house.ask(POLL) == 200


def test_a_message_whose_run_ends_while_it_is_fetched_sends_the_device_back(house: House) -> None:
    pull(house)
    house.answer = b"a part"
    assert house.ask(OBJECT) == 200
    house.status = OVER
    assert house.ask(OBJECT) == 401
    assert house.visits == [("sent back", "a", "it lost count of its messages")]


def test_a_message_of_a_run_that_is_over_is_put_down_before_it_counts(house: House) -> None:
    pull(house)
    house.status = OVER
    assert house.ask(GET_RUN) == OVER
    house.status = 200
    assert house.ask(POLL) == 200


def test_a_receipt_is_taken_also_when_its_run_is_over(house: House) -> None:
    pull(house)
    house.status = OVER
    assert house.ask(CONFIRM) == 200
    assert house.ask(ANSWER) == OVER  # the answer finds no run
    house.status = 200
    assert house.ask(POLL) == 200


def test_another_with_the_devices_key_but_not_its_signature_changes_nothing(house: House) -> None:
    house.status = 401
    assert house.ask(CONFIRM) == 401
    house.status = 200
    assert house.ask(POLL) == 200
    pull(house)
    house.status = 401
    house.ask(ANSWER)
    house.status = 200
    assert house.ask(POLL) == 401  # it still owes


def push(node: int, *sources: int) -> bytes:
    """A push of answers as Flower's SuperNode makes it: the node that pushes, and in whose name each answer is."""
    messages = [ProtoMessage(metadata=Metadata(src_node_id=source)) for source in sources]
    return PushMessagesRequest(node=Node(node_id=node), messages_list=messages).SerializeToString()


def test_nobody_answers_in_anothers_name(house: House) -> None:
    """Flower 1.41 holds a push's node against the key, and not the node that its answers name."""
    assert house.ask(ANSWER, body=(push(7, 7),)) == 200
    whole = push(7, 7)
    assert house.ask(ANSWER, body=(whole[:3], whole[3:])) == 200
    assert house.read == len(whole)
    house.read = 0
    for body in (push(7, 8), push(7, 7, 8)):
        assert house.ask(ANSWER, body=(body,)) == 403
    assert house.read == 0
    assert house.visits == [("refused", "a", "it answers in another device's name")]
    assert house.ask(ANSWER, body=(b"no protobuf",)) == 200  # Flower refuses it by itself
    assert house.ask(ANSWER, body=(b"x" * 999, b"x", b"x")) == 413
    assert house.visits[-1] == ("refused", "a", "it sent more than 1000 bytes")


@pytest.mark.parametrize(
    ("seconds", "why"),
    [(4, ""), (-300, ""), (43, "its clock is 43 s ahead"), (-1000, "its clock is 1000 s behind")],
)
def test_a_clock_that_is_wrong_is_named(house: House, seconds: int, why: str) -> None:
    """To Flower a wrong time is a bad signature, 401."""
    house.status = 401
    signed = datetime.now(UTC) + timedelta(seconds=seconds)
    house.ask(ENTER, headers={b"flwr-timestamp": signed.isoformat().encode()})
    assert house.visits == ([("refused", "a", why)] if why else [])
    house.status = 200
    house.ask(POLL, headers={b"flwr-timestamp": signed.isoformat().encode()})
    assert len(house.visits) == bool(why)


@pytest.mark.parametrize("header", [b"", b"now", b"\xff", b"0001-01-01T00:00:00+23:59", b"9" * 500])
def test_no_time_is_too_strange(house: House, header: bytes) -> None:
    house.status = 401
    assert house.ask(ENTER, headers={b"flwr-timestamp": header}) == 401


def test_the_list_may_change_while_the_door_is_open(house: House) -> None:
    assert house.ask(POLL) == 200
    write_guests(house.folder, Guests(limit=1000, known={}, revoked=digests([("a", KEY)])))
    assert house.ask(POLL) == 401
    assert house.visits[-1] == ("refused", "a", "its key is revoked")


def test_without_keys_everyone_may_come(tmp_path: Path) -> None:
    house = House(tmp_path, Guests(limit=1000))
    assert house.ask(POLL, key=None) == 200
    assert house.ask("/v1/control/start-run") == 403


def test_a_stranger_cannot_fill_the_disk(house: House) -> None:
    for _ in range(50):
        house.ask(POLL, key=STRANGER)
    assert len(house.visits) == 1
    for number in range(3):
        house.ask(POLL, key=f"key {number}".encode())
    assert len(house.visits) == 4
    log = VisitLog(house.folder)
    (house.folder / "door.jsonl").write_bytes(b"x" * (LARGEST_FILE + 1))
    log("connected", device="a")
    assert (house.folder / "door.jsonl").stat().st_size < 200
    for seconds in range(50):  # whoever knows a device's public key may sign with any time
        log("refused", device="a", why=f"its clock is {seconds} s ahead", alike="clock")
    assert len((house.folder / "door.jsonl").read_text().splitlines()) == 2


def test_no_key_header_is_too_strange() -> None:
    assert sent_key(base64.b64encode(KEY)) == KEY
    for header in (b"", b"%%%", b"A" * 2001, b"\xff\xfe", b"AAA"):
        assert sent_key(header) == b""
    for _ in range(200):
        sent_key(os.urandom(40))
