"""The text of the base model: everyday words and invented ones, never a household's."""

import random

from fedloom.simulations.household.functions import FUNCTIONS
from fedloom.simulations.household.grammar import Example, Filling, Style, draw_request, quantity, render
from fedloom.simulations.household.lexicon import GENERAL, pseudo_word

INVENTED_SHARE = 0.4


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
    if rng.random() >= INVENTED_SHARE:
        word = rng.choice(GENERAL[slot])
    else:
        parts = [pseudo_word(rng)]
        if rng.random() < 0.4:
            # Half of the second words are everyday ones ("zorvel room"), so that copies may mix both.
            parts.insert(rng.randrange(2), pseudo_word(rng) if rng.random() < 0.5 else rng.choice(_LOOSE_WORDS))
        word = " ".join(parts)
    return word, word


_LOOSE_WORDS = sorted({part for words in GENERAL.values() for phrase in words for part in phrase.split()})
