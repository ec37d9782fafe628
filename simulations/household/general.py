"""The text of the base model: everyday words and invented ones, never a household's."""

import random

from fedloom.simulations.household.functions import FUNCTIONS
from fedloom.simulations.household.grammar import Example, Filling, Style, draw_request, quantity, render
from fedloom.simulations.household.lexicon import GENERAL, pseudo_word

INVENTED_SHARE = 0.5


def general_examples(count: int, seed: int) -> list[Example]:
    """`count` requests of the general public; the same for the same seed on every machine.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    rng = random.Random(f"household/general/{seed}")
    style = Style()
    return [render(draw_request(rng.choice(FUNCTIONS), general_filling, rng), style, rng) for _ in range(count)]


def general_filling(slot: str, rng: random.Random) -> Filling:
    """An everyday word or quantity for a slot or, so that copying is learnt, invented words."""
    if slot not in GENERAL:
        return quantity(slot, rng)
    word = _invented(slot, rng) if rng.random() < INVENTED_SHARE else rng.choice(GENERAL[slot])
    return word, word


def _invented(slot: str, rng: random.Random) -> str:
    """One or two words, for a message two to four; at least one is invented, the others mostly too."""
    words = [pseudo_word(rng)]
    more = rng.randrange(1, 4) if slot == "text" else rng.random() < 0.4
    for _ in range(more):
        other = pseudo_word(rng) if rng.random() < 0.6 else rng.choice(_LOOSE_WORDS)
        words.insert(rng.randrange(len(words) + 1), other)
    return " ".join(words)


_LOOSE_WORDS = sorted({part for words in GENERAL.values() for phrase in words for part in phrase.split()})
