"""Finished rounds, from the records of metrics.jsonl: what curves are drawn from; thinned where there are many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.server.dashboard.fields import clean, count_of, number_of, table_of

ROUND_LIMIT = 2000
VALUE_LIMIT = 12
LATEST = 50  # rounds that are never thinned


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A finished round. Bytes and refusals are counted from the run's beginning; `values` is its evaluation, if any."""

    round: int
    up: int
    down: int
    evaluation: int
    refused: int
    updates: int | None
    train_loss: float | None
    seconds: float | None
    values: Mapping[str, float]


def read_round(record: Mapping[str, Any]) -> Round:
    """A line of metrics.jsonl.

    Raises:
        ValueError: when it has no round, or its bytes are no whole numbers.
    """
    if "round" not in record:
        raise ValueError("a record must name its round, got none")
    evaluation = table_of(record, "evaluation")
    values = {clean(key, 32): number_of(evaluation, key) for key in list(evaluation)[:VALUE_LIMIT]}
    return Round(
        round=count_of(record, "round"),
        up=count_of(record, "bytes_up"),
        down=count_of(record, "bytes_down"),
        evaluation=count_of(record, "bytes_evaluation"),
        refused=count_of(record, "refused"),
        updates=count_of(record, "updates") if "updates" in record else None,
        train_loss=number_of(record, "train_loss"),
        seconds=number_of(record, "seconds"),
        values={key: value for key, value in values.items() if value is not None},
    )


class Rounds:
    """Rounds by number, in order; a round that comes again takes the place of the first. Iterates from the oldest."""

    def __init__(self) -> None:
        self._rounds: dict[int, Round] = {}

    def __iter__(self) -> Iterator[Round]:
        return iter(sorted(self._rounds.values(), key=lambda done: done.round))

    def __len__(self) -> int:
        return len(self._rounds)

    def add(self, done: Round) -> None:
        self._rounds[done.round] = done
        if len(self._rounds) > ROUND_LIMIT:
            self._thin()

    def drop_after(self, round: int) -> None:
        """Forget rounds after `round`, which will come again."""
        self._rounds = {number: done for number, done in self._rounds.items() if number <= round}

    def over(self, other: Rounds) -> Rounds:
        """The rounds of both, with these in place of the other's."""
        both = Rounds()
        both._rounds = other._rounds | self._rounds
        return both

    def _thin(self) -> None:
        """Keep every second of the older rounds, and the first."""
        order = sorted(self._rounds)
        gone = order[1:-LATEST:2]
        for number in gone:
            del self._rounds[number]
