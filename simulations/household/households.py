"""Devices: each a household with its own words, its own habits and its own amount of data."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.simulations.household.functions import FUNCTIONS
from fedloom.simulations.household.grammar import Example, Filling, Request, Style, draw_request, quantity, render
from fedloom.simulations.household.lexicon import ALIASES, GENERAL, NAMES

ALIAS_RATE = 0.6
ALIAS_SHARE = 0.5
WORDS_PER_SLOT = 4
MEDIAN_TRAIN, MIN_TRAIN, MAX_TRAIN = 80, 30, 300


@dataclass(frozen=True, kw_only=True)
class Household:
    """One device's data. No request of `test` occurs in `train`, whatever its typing."""

    index: int
    train: list[Example]
    test: list[Example]


def household(index: int, *, seed: int, train_scale: float = 1.0, test_size: int = 30) -> Household:
    """The `index`-th device of the fleet `seed`; it does not depend on how many others are made.

    In `train` a household favours few of its aliases; `test` asks for all of them alike, so it holds words that this
    device has hardly met but others have. The amount of data is log-normal.

    Args:
        index: which device, from 0.
        seed: which fleet.
        train_scale: multiplies the number of training examples.
        test_size: the number of held-out examples.

    Raises:
        ValueError: an argument is out of its range.
    """
    if index < 0 or train_scale <= 0 or test_size < 0:
        raise ValueError(f"need index >= 0, train_scale > 0, test_size >= 0, got {index}, {train_scale}, {test_size}")
    rng = random.Random(f"household/{seed}/{index}")
    people = _move_in(rng)
    size = min(max(rng.lognormvariate(0.0, 0.6) * MEDIAN_TRAIN, MIN_TRAIN), MAX_TRAIN)

    # Held-out requests have a stream of their own, so that they stay the same at every `train_scale`.
    asked = random.Random(f"household/{seed}/{index}/test")
    held_out: list[Request] = []
    test: list[Example] = []
    while len(test) < test_size:
        request = people.ask(asked, by_habit=False)
        if request not in held_out:
            held_out.append(request)
            test.append(render(request, people.style, asked))

    train: list[Example] = []
    while len(train) < max(1, round(size * train_scale)):
        request = people.ask(rng, by_habit=True)
        if request not in held_out:
            train.append(render(request, people.style, rng))
    return Household(index=index, train=train, test=test)


@dataclass(frozen=True, kw_only=True)
class _People:
    """Who lives there: the words and aliases they know for each slot, what they ask for and how they type."""

    words: Mapping[str, Sequence[str]]
    aliases: Mapping[str, Sequence[str]]
    habits: Mapping[str, float]
    mix: Sequence[float]
    style: Style

    def ask(self, rng: random.Random, *, by_habit: bool) -> Request:
        """One request, its aliases drawn by habit or all alike."""
        [function] = rng.choices(FUNCTIONS, self.mix)
        return draw_request(function, lambda slot, stream: self._fill(slot, stream, by_habit), rng)

    def _fill(self, slot: str, rng: random.Random, by_habit: bool) -> Filling:
        known = self.aliases.get(slot)
        if known and rng.random() < ALIAS_RATE:
            [alias] = rng.choices(known, [self.habits[word] for word in known] if by_habit else None)
            return alias, ALIASES[slot][alias]
        if slot in self.words:
            word = rng.choice(self.words[slot])
            return word, word
        return quantity(slot, rng)


def _move_in(rng: random.Random) -> _People:
    """Draw a household: half of the fleet's aliases, and a Dirichlet mix of functions (unnormalised gammas)."""
    words = {
        slot: [*rng.sample(NAMES[slot], WORDS_PER_SLOT), *rng.sample(GENERAL[slot], WORDS_PER_SLOT)] for slot in NAMES
    }
    aliases = {slot: rng.sample(sorted(table), round(len(table) * ALIAS_SHARE)) for slot, table in ALIASES.items()}
    return _People(
        words=words,
        aliases=aliases,
        habits={alias: rng.gammavariate(0.5, 1.0) + 1e-3 for known in aliases.values() for alias in known},
        mix=[rng.gammavariate(0.7, 1.0) + 1e-3 for _ in FUNCTIONS],
        style=Style(
            politeness=rng.uniform(0, 0.6),
            ellipsis=rng.uniform(0, 0.5),
            typo=rng.uniform(0, 0.3),
            capitals=rng.uniform(0, 0.6),
        ),
    )
