"""The words of the task: what everyone says, what one household says, and what only the fleet understands.

Three layers, kept apart on purpose:

* `GENERAL` words (and invented ones, from `pseudo_word`) are all that the base model ever reads.
* `NAMES` are new words that households use. Their meaning is their spelling, so a model that copies gets them right.
* `ALIASES` are new words whose meaning is *not* their spelling ("the cave" is the basement). No model can guess
  them; they have to be learnt, and every household knows only a part of the fleet's table.
"""

import random
from collections.abc import Mapping

GENERAL: Mapping[str, tuple[str, ...]] = {
    "room": (
        "kitchen", "bedroom", "bathroom", "living room", "dining room", "hallway", "office", "garage", "basement",
        "attic", "nursery", "guest room", "laundry room", "balcony", "garden", "porch", "pantry", "library",
    ),
    "device": (
        "dishwasher", "washing machine", "dryer", "oven", "coffee maker", "kettle", "toaster", "air purifier",
        "humidifier", "robot mower", "fan", "television", "printer", "heater", "rice cooker", "bread maker",
    ),
    "playlist": (
        "road trip", "morning run", "quiet jazz", "sunday brunch", "deep focus", "dance party", "rainy day",
        "classic rock", "piano hour", "summer hits", "bedtime songs", "workout mix", "folk tales", "love songs",
    ),
    "person": (
        "mum", "dad", "grandma", "grandpa", "anna", "ben", "clara", "david", "emma", "frank", "julia", "lucas",
        "maria", "oliver", "sophie", "thomas", "the doctor", "the plumber", "the school", "the neighbour",
    ),
    "item": (
        "milk", "bread", "butter", "eggs", "cheese", "apples", "coffee", "tea", "sugar", "flour", "rice", "pasta",
        "onions", "tomatoes", "bananas", "chocolate", "toilet paper", "soap", "orange juice", "olive oil",
    ),
    "scene": (
        "movie", "dinner", "party", "reading", "sleep", "morning", "holiday", "study", "gaming", "romantic", "away",
        "relax",
    ),
    "door": (
        "front door", "back door", "side door", "garage door", "garden gate", "cellar door", "patio door",
        "shed door", "main gate", "balcony door",
    ),
    "pet": ("cat", "dog", "rabbit", "hamster", "parrot", "goldfish", "turtle", "chickens", "pony", "kitten"),
    "task": (
        "pizza", "laundry", "homework", "nap", "cake", "walk", "yoga", "potatoes", "break", "meeting", "bath", "roast",
    ),
    "text": (
        "dinner is ready", "running late", "on my way", "call me back", "happy birthday", "see you soon",
        "good night", "the bus is late", "we are home", "feed the fish", "love you", "open the window",
    ),
}  # fmt: skip

NAMES: Mapping[str, tuple[str, ...]] = {
    "room": (
        "studio", "conservatory", "snug", "mezzanine", "workshop", "veranda", "playroom", "scullery", "sauna",
        "boot room", "sunroom", "loft", "utility room", "foyer",
    ),
    "device": (
        "blender", "waffle iron", "dehumidifier", "projector", "aquarium pump", "sewing machine", "air fryer",
        "slow cooker", "jukebox", "ice maker", "juicer", "wine cooler",
    ),
    "playlist": (
        "neon nights", "bossa lounge", "viking metal", "lofi attic", "desert blues", "polka party", "harbour lights",
        "velvet soul", "sea shanties", "midnight drive", "campfire", "swing club",
    ),
    "person": (
        "aoife", "bjorn", "chidi", "dagny", "emeka", "fatima", "giulia", "hiroko", "ingrid", "jamal", "kavya",
        "leif", "mireille", "nadia", "olu", "priya", "quentin", "rosalind", "saoirse", "tariq", "umberto", "wanjiru",
        "xavier", "yusuf", "zelda",
    ),
    "item": (
        "quinoa", "halloumi", "oat flakes", "kimchi", "turmeric", "lentils", "miso paste", "dog biscuits", "capers",
        "hummus", "sourdough", "maple syrup", "chickpeas", "pistachios", "rhubarb", "tofu", "bin bags", "nutmeg",
    ),
    "scene": ("karaoke", "stargazing", "brunch", "thunderstorm", "ballet", "poker", "sunrise", "candlelight"),
    "door": ("wine cellar", "stable door", "side hatch", "roof hatch", "bike shed", "greenhouse", "barn door"),
    "pet": ("gecko", "alpaca", "ferret", "chinchilla", "budgie", "tortoise", "iguana", "llama", "koi"),
    "task": ("lasagne", "meditation", "piano practice", "sauna", "kombucha", "plank", "face mask", "risotto"),
    "text": (
        "bring the umbrella", "the train got cancelled", "save me a slice", "practice moved to friday",
        "the parcel came", "back by eight", "pick up the twins", "soup is on the stove",
    ),
}  # fmt: skip

ALIASES: Mapping[str, Mapping[str, str | int]] = {
    "room": {
        "cave": "basement", "bridge": "office", "dreamland": "bedroom", "galley": "kitchen", "splash zone": "bathroom",
        "nest": "nursery", "jungle": "garden", "crow tower": "attic", "pit stop": "garage", "runway": "hallway",
        "embassy": "guest room", "sock mine": "laundry room", "vault": "pantry", "banquet": "dining room",
        "couch kingdom": "living room", "eyrie": "balcony",
    },
    "device": {
        "big blue": "dishwasher", "spin doctor": "washing machine", "dragon": "oven", "wake up juice": "coffee maker",
        "old smokey": "toaster", "whistler": "kettle", "tumbleweed": "dryer", "gary": "robot mower",
        "goggle box": "television", "cloud nine": "humidifier", "paper muncher": "printer", "sumo": "rice cooker",
        "blowhard": "fan", "hot stuff": "heater",
    },
    "playlist": {
        "our jam": "road trip", "sweatbox": "workout mix", "grown up noise": "quiet jazz", "pancake tunes":
        "sunday brunch", "brain fuel": "deep focus", "boogie time": "dance party", "puddles": "rainy day",
        "air guitar": "classic rock", "lullabyland": "bedtime songs", "mushy stuff": "love songs",
        "ivories": "piano hour", "beach ball": "summer hits",
    },
    "person": {
        "the boss": "mum", "chief": "dad", "nana bear": "grandma", "captain": "grandpa", "sunshine": "anna",
        "bigfoot": "ben", "doc": "the doctor", "pipes": "the plumber", "professor": "thomas", "twinkle": "emma",
        "her majesty": "sophie", "rascal": "lucas", "over the fence": "the neighbour", "bookworm": "julia",
    },
    "item": {
        "moo juice": "milk", "cluckers": "eggs", "fuel beans": "coffee", "white gold": "sugar", "monkey food":
        "bananas", "rabbit bribe": "apples", "tear makers": "onions", "bubbles": "soap", "loo gold": "toilet paper",
        "happy squares": "chocolate", "mouse bait": "cheese", "noodly bits": "pasta", "leaf water": "tea",
        "toast base": "bread",
    },
    "scene": {
        "popcorn": "movie", "feast": "dinner", "zzz": "sleep", "bookish": "reading", "rise and shine": "morning",
        "ghost house": "away", "smooch": "romantic", "button mash": "gaming", "exam panic": "study", "chillax": "relax",
    },
    "door": {
        "drawbridge": "front door", "escape hatch": "back door", "big shutter": "garage door", "hobbit hole":
        "cellar door", "moon gate": "garden gate", "toolbox": "shed door", "portcullis": "main gate",
    },
    "pet": {
        "lordship": "cat", "fuzzball": "dog", "bun bun": "rabbit", "wheel racer": "hamster", "squawker": "parrot",
        "bubble boy": "goldfish", "ladies": "chickens", "speedy": "turtle",
    },
    "level": {"a smidge": 10, "cosy glow": 20, "half mast": 50, "cinema style": 30, "stadium": 90, "the works": 100},
    "degrees": {"penguin": 16, "sweater weather": 18, "just right": 21, "toasty": 23, "sauna mode": 26},
    "minutes": {"a jiffy": 5, "one song": 4, "a sitcom": 25, "half time": 45, "a blockbuster": 90},
}  # fmt: skip

_ONSETS = ("", "b", "br", "c", "ch", "d", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s",
           "sh", "st", "t", "th", "tr", "v", "w", "x", "y", "z")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "io", "oo", "ou", "y")
_CODAS = ("", "", "", "", "", "ck", "d", "g", "k", "l", "lm", "m", "n", "nd", "ng", "p", "r", "rn", "s", "sk", "t", "z")

_RESERVED = frozenset(word for table in ALIASES.values() for surface in table for word in surface.split())


def pseudo_word(rng: random.Random) -> str:
    """An invented, pronounceable word such as `stovend` that no alias contains.

    The base model meets thousands of them, each with itself as meaning, and so learns to copy what it never saw.
    """
    while True:
        syllables = rng.choice((1, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        if len(word) > 2 and word not in _RESERVED:
            return word
