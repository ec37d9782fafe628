"""Our strategies in Flower's own loop: the bits of our own loop, and bad weather that costs no round."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Result,
)

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.config import RunConfig, build_config, override, read_recipe
from fedloom.protocols.messages import Kind, Payload, Task, Update
from fedloom.server import flower
from fedloom.server.app import Plan, coordinate
from fedloom.server.flower import FlowerStrategy
from fedloom.server.loop import Outcome
from fedloom.server.snapshot import ABOUT
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.world import pretend_app
from fedloom.strategies.flora import Flora
from fedloom.strategies.registry import build, names, options

SMALL = ("server.rounds=2", "train.steps=1", "train.batch_size=4", "data.test_size=4", "data.train_scale=0.3")
RUN = "the-run"
IN_QUICK = ("fedloom", "flora", "sketch")  # run on the embedded recipe; the others on a tiny model


@pytest.fixture
def quick() -> RunConfig:
    """The embedded recipe of four devices, made small."""
    return read_recipe(find_recipe("quick"), SMALL)


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """Four devices on a model of two layers."""
    rows = [f'{{"prompt": "lamp {n}\\n", "completion": "lamp({n % 2})"}}\n' for n in range(40)]
    (tmp_path / "requests.jsonl").write_text("".join(rows))
    return {
        "model": {"path": str(tiny_llama)},
        "data": {"source": str(tmp_path / "requests.jsonl"), "max_length": 64},
        "fleet": {"devices": 4, "ranks": [8, 4, 2, 2], "partition": "iid"},
        "train": {"steps": 1, "batch_size": 4, "lr": 0.01},
        "server": {"rounds": 2},
        "track": {"tensorboard": False},
    }


@pytest.fixture
def recipe(table: dict[str, Any]) -> RunConfig:
    return build_config(table)


class Weather(InProcessGrid):
    """Pretend devices; replies pass `bend` on their way back, which may change, drop, double or shuffle them."""

    def __init__(self, config: RunConfig, work: Path, factory: Callable[..., ClientApp] = pretend_app) -> None:
        super().__init__(pretend_nodes(config.fleet.devices), factory, (config, work))
        self.away: set[int] = set()
        self.sent: list[Message] = []
        self.bend: Callable[[list[Message]], Iterable[Message]] = list

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        list(messages)  # as Flower's loop and its grids do, more than once
        some = list(messages)
        self.sent += some
        return list(self.bend(list(super().send_and_receive(some, timeout=timeout))))

    def tasks(self, kind: Kind) -> list[Task]:
        asked = [message for message in self.sent if message.metadata.message_type == kind]
        return [decode(message.content["fedloom"]["frame"], Task, limit=2**30) for message in asked]


def here(config: RunConfig, work: Path) -> Outcome:
    """What our own loop makes of a recipe."""
    with InProcessGrid(pretend_nodes(config.fleet.devices), pretend_app, (config, work / "devices")) as grid:
        return coordinate(grid, Plan(config=config, out=work, run=RUN))


def under_flower(config: RunConfig, work: Path, grid: Weather | None = None, **more: Any) -> tuple[Result, Weather]:
    grid = grid or Weather(config, work)
    return FlowerStrategy(recipe=config, run=RUN).start(grid=grid, **more), grid


def assert_equal(result: Result, outcome: Outcome) -> None:
    """The same state, bit for bit."""
    assert set(result.arrays) - {ABOUT} == set(outcome.state.tensors)
    for name, tensor in outcome.state.tensors.items():
        got = result.arrays[name].numpy()
        assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes()), name


def same_bits(one: Payload, other: Payload) -> bool:
    if one.coefficients is not None and other.coefficients is not None:
        return (
            np.array_equal(one.coefficients.steps, other.coefficients.steps)
            and one.coefficients.exponent == other.coefficients.exponent
            and one.coefficients.subspace == other.coefficients.subspace
        )
    terms = [(one.factors[name], other.factors[name]) for name in other.factors]
    return (
        one.factors.keys() == other.factors.keys()
        and one.dense.keys() == other.dense.keys()
        and all(a.b.tobytes() == b.b.tobytes() and a.a.tobytes() == b.a.tobytes() for a, b in terms)
        and all(one.dense[name].tobytes() == other.dense[name].tobytes() for name in other.dense)
    )


@pytest.mark.parametrize("name", IN_QUICK)
def test_flowers_loop_ends_in_the_bits_of_ours(quick: RunConfig, tmp_path: Path, name: str) -> None:
    config = build_config(override(quick.model_dump(exclude_unset=True), {"strategy.name": name}))
    outcome = here(config, tmp_path / "ours")
    strategy = FlowerStrategy(name, recipe=quick, run=RUN)
    grid = Weather(config, tmp_path / "flower")
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(), num_rounds=2)

    assert_equal(result, outcome)
    payload = strategy.payload(result.arrays)
    assert payload
    assert same_bits(payload, build(name, {}, strategy._strategy.scaling).adapter(outcome.state))
    ours = {record["round"]: record for record in outcome.history}
    for round in (1, 2):
        assert dict(result.evaluate_metrics_clientapp[round]) == ours[round]["evaluation"]
        metrics = result.train_metrics_clientapp[round]
        assert metrics["loss"] == ours[round]["train_loss"]
        assert (metrics["updates"], metrics["refused"]) == (4, 0)
    last, base = ours[2], ours[0]
    run = strategy._run
    assert run is not None
    assert run.ledger.up == last["bytes_up"] - base["bytes_up"]  # only our own loop judges the base first
    assert run.ledger.down == last["bytes_down"] - base["bytes_down"]


@pytest.mark.parametrize("name", [name for name in names() if name not in IN_QUICK])
def test_so_does_every_other_strategy(table: dict[str, Any], tmp_path: Path, name: str) -> None:
    table["strategy"] = {"name": name} | ({"k": 64} if "k" in [option for option, _, _ in options(name)] else {})
    if name in ("fedspine", "fedpipe"):  # they learn from seconds, which are the same twice on a virtual clock alone
        table["model"] = {**table.get("model", {}), "describe": "units"}
        table["fleet"] = {**table["fleet"], "profiles": ["jetson-tx2", "jetson-agx-xavier"]}
    if name == "fedspine":
        table["strategy"]["target"] = 0.2  # most of so small a model is spared
    config = build_config(table)
    result, _ = under_flower(config, tmp_path / "flower")
    assert_equal(result, here(config, tmp_path / "ours"))
    assert set(result.evaluate_metrics_clientapp) == {1, 2}


def test_replies_in_any_order_and_twice_change_no_bit(recipe: RunConfig, tmp_path: Path) -> None:
    def mixed(replies: list[Message]) -> list[Message]:
        many = replies * 2
        random.Random(1).shuffle(many)
        return many

    grid = Weather(recipe, tmp_path / "flower")
    grid.bend = mixed
    result, _ = under_flower(recipe, tmp_path, grid)
    assert_equal(result, here(recipe, tmp_path / "ours"))


def forged(message: Message, change: Callable[[Update], Update]) -> Message:
    """The reply with its update changed, as a hostile but well-spoken device would write it."""
    update = decode(message.content["fedloom"]["frame"], Update, limit=2**30)
    message.content["fedloom"] = ConfigRecord({"frame": encode(change(update))})
    return message


def changed(update: Update, **fields: Any) -> Update:
    return Update(**{**{name: getattr(update, name) for name in update.__dataclass_fields__}, **fields})


def garble(message: Message) -> Message:
    frame = bytearray(message.content["fedloom"]["frame"])
    frame[len(frame) // 2] ^= 1
    message.content["fedloom"] = ConfigRecord({"frame": bytes(frame)})
    return message


def fail(message: Message) -> Message:
    """As Flower reports a node that died: with another node as the source."""
    reply = Message(Error(code=5, reason="node unavailable"), reply_to=message)
    reply.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


def other_record(message: Message) -> Message:
    message.content.clear()
    message.content["arrays"] = ArrayRecord({"w": Array(np.ones(3))})
    message.content["metrics"] = MetricRecord({"num-examples": 9})
    return message


HOSTILE: dict[str, tuple[Callable[[Message], Message], str]] = {
    "garbled": (garble, "checksum"),
    "replayed": (lambda m: forged(m, lambda u: changed(u, nonce=u.nonce ^ 1)), "nonce must be its task's"),
    "of another round": (lambda m: forged(m, lambda u: changed(u, round=7)), "round must be its task's 1, got 7"),
    "another device": (lambda m: forged(m, lambda u: changed(u, device="device-00")), "device must be its task's"),
    "no tensors": (lambda m: forged(m, lambda u: changed(u, payload=Payload())), "must carry each adapted module once"),
    "dead": (fail, "Flower error 5: node unavailable"),
    "a stock client": (other_record, "must carry the record 'fedloom'"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_client_is_refused_and_the_round_goes_on(
    recipe: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, attack: str
) -> None:
    strike, why = HOSTILE[attack]
    grid = Weather(recipe, tmp_path / "flower")

    def bend(replies: list[Message]) -> list[Message]:
        first = len([m for m in grid.sent if m.metadata.message_type == "train"]) == 4
        train = replies[0].metadata.message_type == "train"
        return [strike(m) if first and train and m.metadata.src_node_id == 2 else m for m in replies]

    grid.bend = bend
    with caplog.at_level(logging.WARNING, "fedloom.server"):
        result, _ = under_flower(recipe, tmp_path, grid)
    first, second = result.train_metrics_clientapp[1], result.train_metrics_clientapp[2]
    assert (first["updates"], first["refused"]) == (3, 1)
    assert (second["updates"], second["refused"]) == (4, 0)
    (line,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert line.startswith("round 1: refused device-01: ")
    assert re.search(why, line), line
    assert all(np.isfinite(array.numpy()).all() for name, array in result.arrays.items())


def test_a_missing_reply_costs_no_round(recipe: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = Weather(recipe, tmp_path / "flower")
    grid.bend = lambda replies: [m for m in replies if m.metadata.src_node_id != 3]
    with caplog.at_level(logging.WARNING, "fedloom.server"):
        result, _ = under_flower(recipe, tmp_path, grid)
    for round in (1, 2):
        metrics = result.train_metrics_clientapp[round]
        assert (metrics["updates"], metrics["refused"]) == (3, 1)
    assert "round 1: refused device-02: no answer came in time" in caplog.text


def test_a_round_with_too_few_updates_leaves_the_model_as_it_was(
    table: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_config(override(table, {"server.min_updates": 4, "server.rounds": 3}))
    grid = Weather(config, tmp_path / "flower")

    def bend(replies: list[Message]) -> list[Message]:
        trained = len(grid.tasks(Kind.TRAIN))
        return replies[1:] if trained == 8 and len(grid.tasks(Kind.EVALUATE)) == 4 else replies

    grid.bend = bend
    seen: dict[int, bytes] = {}

    def look(round: int, arrays: ArrayRecord) -> None:
        seen[round] = b"".join(array.data for name, array in arrays.items() if name != ABOUT)

    with caplog.at_level(logging.ERROR, "fedloom.server"):
        result, _ = under_flower(config, tmp_path, grid, evaluate_fn=look)
    assert set(result.train_metrics_clientapp) == {1, 3}
    assert seen[0] == b""
    assert seen[1] == seen[2] != seen[3]
    assert "round 2 changes nothing: a round needs at least 4 good updates, got 3" in caplog.text


def test_a_device_that_comes_late_is_brought_up_to_date(recipe: RunConfig, tmp_path: Path) -> None:
    grid = Weather(recipe, tmp_path / "flower")
    grid.away = {4}

    def arrive(replies: list[Message]) -> list[Message]:
        grid.away.clear()
        return replies

    grid.bend = arrive
    result, _ = under_flower(recipe, tmp_path, grid)
    assert [result.train_metrics_clientapp[round]["updates"] for round in (1, 2)] == [3, 4]
    late = [task for task in grid.tasks(Kind.TRAIN) if task.device == "device-03"]
    assert [task.round for task in late] == [2]
    assert result.train_metrics_clientapp[2]["refused"] == 0


def test_it_waits_for_enough_nodes(
    recipe: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Weather(recipe, tmp_path / "flower")
    grid.away = {2, 3, 4}
    monkeypatch.setattr(flower.time, "sleep", lambda seconds: grid.away.pop())
    with caplog.at_level(logging.INFO, "flwr"):
        FlowerStrategy(recipe=recipe, min_available_nodes=3).start(grid=grid, num_rounds=1)
    assert len(grid.tasks(Kind.TRAIN)) == 3
    assert "Waiting for nodes to connect: 2 of 3" in caplog.text


def test_train_and_evaluate_configs_are_keys_of_the_recipe(recipe: RunConfig, tmp_path: Path) -> None:
    _, grid = under_flower(
        recipe,
        tmp_path / "one",
        num_rounds=1,
        train_config=ConfigRecord({"lr": 0.5, "steps": 2}),
        evaluate_config=ConfigRecord({"batch_size": 3}),
    )
    assert all((task.knobs["lr"], task.knobs["steps"]) == (0.5, 2) for task in grid.tasks(Kind.TRAIN))
    assert all(task.knobs["batch_size"] == 3 for task in grid.tasks(Kind.EVALUATE))
    with pytest.raises(ValueError, match=r"unknown recipe key 'learning_rate' in \[train\]"):
        under_flower(recipe, tmp_path / "two", train_config=ConfigRecord({"learning_rate": 0.5}))


def test_the_number_of_rounds_is_the_schedules(table: dict[str, Any], tmp_path: Path) -> None:
    config = build_config(override(table, {"train.schedule": "linear", "server.rounds": 9, "eval.every": 0}))
    result, grid = under_flower(config, tmp_path, num_rounds=2)
    rates = {task.round: task.knobs["lr"] for task in grid.tasks(Kind.TRAIN)}
    assert rates == {1: pytest.approx(0.01), 2: pytest.approx(0.005)}
    assert set(result.evaluate_metrics_clientapp) == {2}


def test_a_cohort_is_drawn_as_our_own_loop_draws_it(table: dict[str, Any], tmp_path: Path) -> None:
    config = build_config(override(table, {"server.cohort": 2, "server.rounds": 3}))
    result, grid = under_flower(config, tmp_path / "flower")
    assert_equal(result, here(config, tmp_path / "ours"))
    assert len(grid.tasks(Kind.TRAIN)) == 6


def test_a_start_goes_on_from_an_earlier_results_arrays(recipe: RunConfig, tmp_path: Path) -> None:
    grid = Weather(recipe, tmp_path / "flower")
    strategy = FlowerStrategy(recipe=recipe)
    first = strategy.start(grid=grid, num_rounds=1)
    grid.sent.clear()
    second = strategy.start(grid=grid, initial_arrays=first.arrays, num_rounds=1)
    tasks = grid.tasks(Kind.TRAIN)
    assert [(task.patch.since, task.patch.version) for task in tasks if task.patch] == [(0, 1)] * 4
    assert second.train_metrics_clientapp[1]["refused"] == 0
    assert second.train_metrics_clientapp[1]["loss"] < first.train_metrics_clientapp[1]["loss"]
    grid.sent.clear()
    strategy.start(grid=grid, num_rounds=1)  # from the base again
    assert [task.patch for task in grid.tasks(Kind.TRAIN)] == [None] * 4


def test_other_arrays_are_refused_in_one_line(recipe: RunConfig, table: dict[str, Any], tmp_path: Path) -> None:
    arrays = under_flower(recipe, tmp_path / "first", num_rounds=1)[0].arrays
    weights = ArrayRecord({"model.embed.weight": Array(np.ones((2, 2)))})
    with pytest.raises(ValueError, match="initial_arrays must be empty, for the base that the devices hold") as caught:
        under_flower(recipe, tmp_path / "weights", initial_arrays=weights)
    assert "\n" not in str(caught.value)
    other = build_config(override(table, {"strategy.name": "flora"}))
    with pytest.raises(ValueError, match="arrays to begin with must be of strategy 'flora', got 'fedloom'"):
        under_flower(other, tmp_path / "flora", initial_arrays=arrays)
    narrow = build_config(override(table, {"lora.targets": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"arrays to begin with are for base \w{12}, the devices hold"):
        under_flower(narrow, tmp_path / "narrow", initial_arrays=arrays)
    torn = ArrayRecord({**arrays, ABOUT: Array(np.frombuffer(b'{"version": 1}', np.uint8))})
    with pytest.raises(ValueError, match="must hold what a state has beside its tensors"):
        FlowerStrategy(recipe=recipe).payload(torn)


def test_devices_that_all_decline_are_one_clear_error(recipe: RunConfig, tmp_path: Path) -> None:
    broken = build_config(override(recipe.model_dump(exclude_unset=True), {"model.path": "nobody/nothing"}))
    with pytest.raises(ValueError, match="nobody/nothing"):
        under_flower(broken, tmp_path)


def test_a_stock_client_app_is_one_clear_error(recipe: RunConfig, tmp_path: Path) -> None:
    def stock(config: RunConfig, work: Path) -> ClientApp:
        app = ClientApp()

        @app.query()
        def query(message: Message, context: Context) -> Message:
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

        return app

    with pytest.raises(ValueError, match="must carry the record 'fedloom'"):
        under_flower(recipe, tmp_path, Weather(recipe, tmp_path, stock))


def test_messages_are_a_list_and_a_phase_answers_what_it_asked(recipe: RunConfig, tmp_path: Path) -> None:
    grid = Weather(recipe, tmp_path)
    strategy = FlowerStrategy(recipe=recipe)
    with pytest.raises(ValueError, match="nothing was sent for"):
        strategy.aggregate_train(1, [])
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    assert isinstance(messages, list)
    assert len({message.metadata.dst_node_id for message in messages}) == 4
    arrays, metrics = strategy.aggregate_train(1, [])
    assert (arrays, metrics) == (None, None)
    assert isinstance(strategy, type(FedAvg()).__mro__[1])


def test_privacy_that_would_not_be_is_refused(recipe: RunConfig, tmp_path: Path) -> None:
    """Flower's wrappers change arrays that our tasks are not made of: no run must pass for private that is not."""
    grid = Weather(recipe, tmp_path / "server")
    with pytest.raises(ValueError, match="arrays must be those of the round before as they were"):
        DifferentialPrivacyServerSideFixedClipping(FlowerStrategy(recipe=recipe), 1.0, 1.0, 4).start(
            grid, ArrayRecord()
        )
    assert {task.round for task in grid.tasks(Kind.TRAIN)} == {1}
    grid = Weather(recipe, tmp_path / "client")
    with pytest.raises(ValueError, match="unknown recipe key 'clipping_norm'"):
        DifferentialPrivacyClientSideFixedClipping(FlowerStrategy(recipe=recipe), 1.0, 1.0, 4).start(
            grid, ArrayRecord()
        )
    assert grid.sent == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: FlowerStrategy("florra"), "unknown strategy 'florra': did you mean 'flora'"),
        (lambda: FlowerStrategy("flora", {"rank_cap": 3}), "unknown option 'rank_cap' of strategy flora"),
        (lambda: FlowerStrategy("fedloom", {"rank_cap": 0}), "rank_cap must be >= 1"),
        (lambda: FlowerStrategy(Flora(), {"momentum": 1}), "options must come with a strategy's name"),
        (lambda: FlowerStrategy(FedAvg()), "must be a name or answer the Strategy protocol"),
        (lambda: FlowerStrategy(recipe={"trian": {}}), "unknown recipe key 'trian': did you mean 'train'"),
        (lambda: FlowerStrategy(recipe="nowhere.toml"), "nowhere.toml cannot be read"),
        (lambda: FlowerStrategy(recipe={"compare": [{"label": "a"}]}), "must be one run, got a comparison of 1"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(make: Callable[[], FlowerStrategy], why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_strategy_may_be_named_built_or_the_recipes(recipe: RunConfig, table: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for number, strategy in enumerate(
        (
            FlowerStrategy("flora", recipe=table, run=RUN),
            FlowerStrategy(Flora(), recipe=table, run=RUN),
            FlowerStrategy(recipe={**table, "strategy": {"name": "flora"}}, run=RUN),
        )
    ):
        grid = Weather(recipe, tmp_path / str(number))
        results.append(strategy.start(grid=grid, num_rounds=1))
        assert {task.strategy for task in grid.tasks(Kind.TRAIN)} == {"flora"}
    first, *others = results
    for other in others:
        assert {name: array.data for name, array in other.arrays.items()} == {
            name: array.data for name, array in first.arrays.items()
        }


def test_it_says_what_flowers_loop_has_no_place_for(table: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        FlowerStrategy(recipe=override(table, {"server.over_select": 1.5, "server.retries": 2})).summary()
    assert "Flower's loop has no place for these keys of [server]: over_select, retries" in caplog.text
    assert "Begins at round 1: nothing is resumed" in caplog.text
