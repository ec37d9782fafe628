"""From a function to a typed request and the call that answers it.

A `Request` is the meaning and the wording, before noise; two requests with the same meaning and wording are the same
however they are typed. `render` then types it: with manners, dropped words, slips of the keyboard and casing. Slots
are never damaged, so every call can be recovered from its prompt.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedloom.simulations.household.functions import Function

SEPARATOR = "\n"

Filling = tuple[str, str | int]
"""What is typed for a slot, and what it means in the call."""
Speaker = Callable[[str, random.Random], Filling]
"""Draws the filling of a named slot from somebody's vocabulary."""

_BEFORE = ("please", "could you", "can you", "hey", "ok", "would you please", "hi there ,", "quick ,")
_AFTER = ("please", "thanks", "now", "for me", "if you can", "would you", "thank you")
# Not "in", "on" or "that": they part two slots, and without them nobody could tell where the first one ends.
_DROPPABLE = frozenset({"the", "a", "an", "to", "at", "for", "of", "is", "are", "by"})
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "tomorrow")
_COUNTS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One typed request and its answer; the model reads `prompt` and writes `completion`, a JSON call."""

    prompt: str
    completion: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Style:
    """How somebody types: the chance, per request, of each habit."""

    politeness: float = 0.3
    ellipsis: float = 0.25
    typo: float = 0.2
    capitals: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Request:
    """A function, the wording that asks for it and what its slots hold."""

    function: Function
    wording: str
    fillings: tuple[tuple[str, Filling], ...]

    @property
    def call(self) -> str:
        """The canonical JSON of the call, slots in the function's order."""
        said: Mapping[str, Filling] = dict(self.fillings)
        arguments = {slot: said[slot][1] for slot in self.function.slots if slot in said}
        return json.dumps({"call": self.function.name, **arguments})


def draw_request(function: Function, speaker: Speaker, rng: random.Random) -> Request:
    """Choose a phrasing, decide which optional parts are said and fill its slots."""
    wording = re.sub(r"\[(.*?)\]", lambda part: part[1] if rng.random() < 0.5 else "", rng.choice(function.phrasings))
    fillings = tuple((slot, speaker(slot, rng)) for slot in re.findall(r"{(\w+)}", wording))
    return Request(function=function, wording=wording, fillings=fillings)


def render(request: Request, style: Style, rng: random.Random) -> Example:
    """Type a request in somebody's style."""
    said = dict(request.fillings)
    drops, shouts = rng.random() < style.ellipsis, rng.random() < style.capitals / 5
    words = [word for word in request.wording.split() if not (drops and word in _DROPPABLE and rng.random() < 0.6)]
    literal = [place for place, word in enumerate(words) if len(word) > 3 and word[0] != "{"]
    if literal and rng.random() < style.typo:
        place = rng.choice(literal)
        words[place] = _slip(words[place], rng)
    if rng.random() < style.politeness:
        words = [rng.choice(_BEFORE), *words] if rng.random() < 0.5 else [*words, rng.choice(_AFTER)]
    if shouts:
        words = [word if word[0] == "{" else word.upper() for word in words]
    elif words[0][0] != "{" and rng.random() < style.capitals:
        words[0] = words[0].capitalize()
    text = " ".join(said[word[1:-1]][0] if word[0] == "{" else word for word in words)
    return Example(prompt=text + SEPARATOR, completion=request.call, label=request.function.name)


def quantity(slot: str, rng: random.Random) -> Filling:
    """A number, time or day as most people write it.

    Raises:
        KeyError: the slot takes words, not quantities.
    """
    return _QUANTITIES[slot](rng)


def _slip(word: str, rng: random.Random) -> str:
    """Swap two neighbours, lose a letter or press one twice."""
    at = rng.randrange(1, len(word) - 1)
    before, after = word[:at], word[at + 1 :]
    return rng.choice((before + after[0] + word[at] + after[1:], before + after, before + word[at - 1 :]))


def _number(low: int, high: int, step: int, *units: str) -> Callable[[random.Random], Filling]:
    def draw(rng: random.Random) -> Filling:
        value = rng.randrange(low, high + 1, step)
        return f"{value}{rng.choice(units)}", value

    return draw


def _count(rng: random.Random) -> Filling:
    value = rng.randrange(1, 7)
    return rng.choice((str(value), _COUNTS[value - 1])), value


def _time(rng: random.Random) -> Filling:
    hour, minute = rng.randrange(24), rng.choice((0, 0, 15, 30, 45))
    if rng.random() < 0.4 or minute:
        return f"{hour}:{minute:02d}", f"{hour:02d}:{minute:02d}"
    return f"{hour % 12 or 12} {'am' if hour < 12 else 'pm'}", f"{hour:02d}:00"


def _day(rng: random.Random) -> Filling:
    day = rng.choice(_DAYS)
    return day, day


_QUANTITIES: Mapping[str, Callable[[random.Random], Filling]] = {
    "level": _number(5, 100, 5, "%", " percent", ""),
    "degrees": _number(15, 28, 1, " degrees", "", " c"),
    "minutes": _number(1, 90, 1, " minutes", " min"),
    "count": _count,
    "time": _time,
    "day": _day,
}
