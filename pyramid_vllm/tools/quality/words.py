"""Words of the synthetic haystacks, and the sentences made of them."""

from collections.abc import Iterator
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Keys of needles: none of them is in a synthetic sentence.
KEYS = _words(
    "anchor badger cactus dolphin engine falcon guitar hammer igloo jacket kettle "
    "ladder mirror orchid pencil quartz rabbit saddle teapot umbrella violin "
    "walnut zipper acorn beacon candle dragon emerald feather glacier helmet insect "
    "jungle kitten lantern magnet napkin oyster parrot"
)
_PEOPLE = _words(
    "teacher farmer sailor doctor painter baker driver nurse writer gardener lawyer "
    "tailor singer mayor miller student"
)
_ADJECTIVES = _words(
    "old quiet young tired cheerful careful local busy patient clever tall friendly"
)
_VERBS = _words(
    "visited painted admired cleaned described remembered photographed left entered "
    "measured watched crossed"
)
_PLACES = _words(
    "market harbour library garden bridge station museum valley school bakery "
    "theatre river church meadow castle square"
)
_TIMES = (
    "in the morning",
    "before lunch",
    "after the rain",
    "on a cold evening",
    "last summer",
    "during the holidays",
    "at the end of the week",
    "when the bells rang",
)
_REASONS = (
    "because the weather was fine",
    "and told a friend about it",
    "and then went home",
    "while the others waited",
    "although it was getting late",
    "and wrote a short letter",
    "as everybody had hoped",
    "without saying a word",
)
#: What lists of words are made of.
PLAIN_WORDS = KEYS + _PEOPLE + _ADJECTIVES + _PLACES


def sentences(rng: Random) -> Iterator[str]:
    """Endless sentences that say nothing of importance."""
    while True:
        yield (
            f"The {rng.choice(_ADJECTIVES)} {rng.choice(_PEOPLE)} "
            f"{rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} "
            f"{rng.choice(_PLACES)} {rng.choice(_TIMES)} {rng.choice(_REASONS)}."
        )
