"""The in-process grid behaves as Flower's grids do, in order, a window at a time, here or in workers."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedloom.server.courier import Courier, Parcel
from fedloom.simulations.grid import InProcessGrid, pretend_nodes


def echo_app(tag: str) -> ClientApp:
    """Answers with its tag, its partition and what it was sent; dies on request."""
    app = ClientApp()
    app.seen = 0  # type: ignore[attr-defined]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        app.seen += 1  # type: ignore[attr-defined]
        frame = message.content["fedloom"]["frame"]
        if frame == b"die":
            os._exit(9)
        answer = f"{tag} {context.node_config['partition-id']} ".encode() + frame
        return Message(RecordDict({"fedloom": ConfigRecord({"frame": answer})}), reply_to=message)

    return app


def parcels(count: int) -> list[Parcel]:
    return [Parcel(node=node, kind="train", frame=str(node).encode()) for node in range(1, count + 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_message_is_answered_once_in_order(workers: int) -> None:
    with InProcessGrid(pretend_nodes(5), echo_app, ("t",), workers=workers) as grid:
        courier = Courier(grid, timeout=60)
        assert courier.nodes() == [1, 2, 3, 4, 5]
        for _ in range(2):
            replies = list(courier.exchange(parcels(5), "1"))
            assert [reply.frame for reply in replies] == [f"t {n - 1} {n}".encode() for n in range(1, 6)]
            assert [reply.node for reply in replies] == [1, 2, 3, 4, 5]


def test_a_message_runs_when_its_answer_is_pulled() -> None:
    app = echo_app("t")
    with InProcessGrid(pretend_nodes(3), lambda: app) as grid:
        answers = Courier(grid, timeout=60).exchange(parcels(3), "1")
        next(answers)
        assert app.seen == 1  # type: ignore[attr-defined]


def test_a_window_bounds_what_is_under_way() -> None:
    made = []

    def coming() -> Iterable[Parcel]:
        for parcel in parcels(7):
            made.append(parcel.node)
            yield parcel

    with InProcessGrid(pretend_nodes(7), echo_app, ("t",)) as grid:
        for answered, _ in enumerate(Courier(grid, timeout=60, window=2).exchange(coming(), "1")):
            assert len(made) <= answered + 2
    assert made == [1, 2, 3, 4, 5, 6, 7]


def test_send_and_receive_gives_all() -> None:
    with InProcessGrid(pretend_nodes(3), echo_app, ("t",)) as grid:
        messages = [
            grid.create_message(RecordDict({"fedloom": ConfigRecord({"frame": b"x"})}), "train", node, "1")
            for node in grid.get_node_ids()
        ]
        assert len(list(grid.send_and_receive(messages))) == 3


def test_a_dead_worker_is_one_clear_error() -> None:
    with InProcessGrid(pretend_nodes(1), echo_app, ("t",), workers=1) as grid:
        deadly = [Parcel(node=1, kind="train", frame=b"die")]
        with pytest.raises(ValueError, match="a simulation worker died: most often the machine ran out of memory"):
            list(Courier(grid, timeout=60).exchange(deadly, "1"))


def test_replies_come_as_they_arrive() -> None:
    class Hasty(InProcessGrid):
        """Hands over all that it is asked for at once, last first, after an empty poll."""

        polls = 0

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            self.polls += 1
            if self.polls % 2:
                return []
            asked = list(message_ids)
            return [message for _ in asked for message in InProcessGrid.pull_messages(self, asked)][::-1]

    with Hasty(pretend_nodes(5), echo_app, ("t",)) as grid:
        replies = list(Courier(grid, timeout=60, window=3, pause=0.001).exchange(parcels(5), "1"))
    assert [reply.node for reply in replies] == [3, 2, 1, 5, 4]
    assert not any(reply.error for reply in replies)


def test_a_silent_node_is_reported_after_the_timeout() -> None:
    class Deaf(InProcessGrid):
        def pull_messages(self, message_ids: object) -> list[Message]:
            return []

    with Deaf(pretend_nodes(2), echo_app, ("t",)) as grid:
        replies = list(Courier(grid, timeout=0.05, pause=0.01).exchange(parcels(2), "1"))
    assert [reply.error for reply in replies] == ["no answer within 0.05 s"] * 2


def test_an_answer_without_a_frame_is_an_error() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"other": ConfigRecord({"frame": b""})}), reply_to=message)

    with InProcessGrid(pretend_nodes(1), lambda: app) as grid:
        (reply,) = Courier(grid, timeout=60).exchange(parcels(1), "1")
    assert "must carry the record 'fedloom'" in reply.error
