"""The words that tasks are made of. Each, with its leading space, is one token of the embedded model's tokenizer."""

from __future__ import annotations

import random
import re

WORDS: tuple[str, ...] = tuple(
    """
    acorn almond amber anchor ankle apple apron arrow attic autumn badge bagel balcony bamboo banana barley barrel basil basket
    beacon beaver berry bishop blanket blossom bonnet bottle boulder bracelet branch bread breeze brick bridge broom bucket
    butter button cabin cactus camel candle canoe canyon carpet carrot castle cedar cellar cherry chimney cinnamon circus clover
    coast cobalt cocoa comet copper coral cotton cradle crater cricket crown crystal curtain daisy dancer desert diamond dolphin
    donkey dragon drum eagle ember emerald engine falcon farmer feather fennel ferry fiddle finch flame flute forest fossil
    fountain garden garlic ginger glacier goblet granite grape guitar hammer harbor harvest hazel helmet heron hickory honey
    horizon hornet iceberg indigo island ivory jacket jaguar jasmine jelly jewel jungle kettle kitten ladder lagoon lantern
    lark lava lemon lettuce lily linen lizard lobster locket lotus lumber magnet mango maple marble meadow melon mirror mitten
    monkey moss mountain muffin needle nickel nutmeg oasis ocean olive onion orange orchard orchid otter oyster paddle palace
    panda parrot peach pearl pebble pepper pigeon pillow pirate planet plum pony poppy potato prairie prism pumpkin puzzle quartz
    quilt rabbit radish raven ribbon river robin rocket rose ruby saddle saffron salmon sandal sapphire scarf shadow shell
    silver sparrow spider spinach spruce squirrel stable statue sugar summer sunset swallow tiger timber tomato topaz tower
    trumpet tulip tunnel turtle valley vanilla velvet violet violin wagon walnut walrus whale wheat willow window winter
    wizard wolf yarn zebra
    """.split()
)

ADJECTIVES = "old quiet small tall narrow bright heavy gentle empty distant early warm".split()
NOUNS = "clock street teacher train house child letter market road doctor table crowd".split()
VERBS = "stood waited slept turned moved rested stayed fell".split()
PLACES = "near behind under beside above across".split()


def filler_sentence(rng: random.Random) -> str:
    """One line of nine words that says nothing about any pair, list or vote."""
    return (
        f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} {rng.choice(PLACES)} "
        f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.\n"
    )


def count_words(text: str) -> int:
    """Words, punctuation marks and line ends: the length of task text in tokens of the embedded model."""
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def scatter(rng: random.Random, lines: list[str], length: int) -> str:
    """The lines in the order given, at random places among filler, in about `length` words and never more."""
    room = length - sum(map(count_words, lines))
    filler = [filler_sentence(rng) for _ in range(max(0, room // count_words(filler_sentence(rng))))]
    places = sorted(rng.randrange(len(filler) + 1) for _ in lines)
    text: list[str] = []
    start = 0
    for place, line in zip(places, lines):
        text += filler[start:place] + [line]
        start = place
    return "".join(text + filler[start:])
