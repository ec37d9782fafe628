"""Devices: each a household with its own words, its own habits and its own amount of data."""

import random
from dataclasses import dataclass

from fedloom.simulations.household.functions import FUNCTIONS, Function
from fedloom.simulations.household.grammar import Example, Filling, Request, Style, draw_request, quantity, render
from fedloom.simulations.household.lexicon import ALIASES, GENERAL, NAMES

ALIAS_RATE = 0.6
ALIAS_SHARE = 0.5
MEDIAN_TRAIN, MIN_TRAIN, MAX_TRAIN = 80, 30, 300


@dataclass(frozen=True, kw_only=True)
class Household:
    """One device's data. No request of `test` occurs in `train`, whatever its typing."""

    index: int
    train: list[Example]
    test: list[Example]


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The words a household uses; `habits` weighs each alias, `None` uses all alike."""

    names: dict[str, list[str]]
    aliases: dict[str, list[str]]
    habits: dict[str, float] | None

    def __call__(self, slot: str, rng: random.Random) -> Filling:
        aliases = self.aliases.get(slot)
        if aliases and rng.random() < ALIAS_RATE:
            weights = [self.habits[alias] for alias in aliases] if self.habits else None
            alias = rng.choices(aliases, weights)[0]
            return alias, ALIASES[slot][alias]
        if slot in self.names:
            word = rng.choice(self.names[slot])
            return word, word
        return quantity(slot, rng)


def household(index: int, *, seed: int, train_scale: float = 1.0, test_size: int = 30) -> Household:
    """The `index`-th device of the fleet `seed`; it does not depend on how many others are made.

    The mix of functions is a Dirichlet draw and the amount of data a log-normal one, so devices differ in both.
    In `train` a household favours few of its aliases; `test` asks for all of them alike, so it holds words that this
    device has hardly met but others have.

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
    names = {slot: [*rng.sample(words, 4), *rng.sample(GENERAL[slot], 4)] for slot, words in NAMES.items()}
    aliases = {slot: rng.sample(sorted(table), round(len(table) * ALIAS_SHARE)) for slot, table in ALIASES.items()}
    habits = {alias: rng.gammavariate(0.5, 1.0) + 1e-3 for known in aliases.values() for alias in known}
    mix = [rng.gammavariate(0.7, 1.0) + 1e-3 for _ in FUNCTIONS]
    style = Style(politeness=rng.uniform(0, 0.6), ellipsis=rng.uniform(0, 0.5), typo=rng.uniform(0, 0.3),
                  capitals=rng.uniform(0, 0.6))  # fmt: skip
    size = min(max(rng.lognormvariate(0.0, 0.6) * MEDIAN_TRAIN, MIN_TRAIN), MAX_TRAIN)

    # Held-out requests have their own stream, so that they stay the same at every `train_scale`.
    asked = random.Random(f"household/{seed}/{index}/test")
    speak = _Vocabulary(names=names, aliases=aliases, habits=None)
    held_out: list[Request] = []
    while len(held_out) < test_size:
        request = _ask(mix, speak, asked)
        if request not in held_out:
            held_out.append(request)
    test = [render(request, style, asked) for request in held_out]

    speak = _Vocabulary(names=names, aliases=aliases, habits=habits)
    train: list[Example] = []
    while len(train) < max(1, round(size * train_scale)):
        request = _ask(mix, speak, rng)
        if request not in held_out:
            train.append(render(request, style, rng))
    return Household(index=index, train=train, test=test)


def _ask(mix: list[float], speaker: _Vocabulary, rng: random.Random) -> Request:
    function: Function = rng.choices(FUNCTIONS, mix)[0]
    return draw_request(function, speaker, rng)
