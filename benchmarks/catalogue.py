"""A catalogue of any size that reads like a shop's, and strings like those a model writes: for benchmarks/rank.py.

Words come from the synthetic shop and, since it has only some hundred, from invented ones behind them, with
frequencies that fall as in Zipf's law. Items come in families (one brand, one kind, one line of words; model numbers,
sizes and colours differ), every item's category starts with the same two words, and more than half of all words occur
once, as in Industrial and Scientific.
"""

import dataclasses
import math
import random
import string

import numpy as np

from calrec_jax.data.shop_words import CATEGORIES, COLOURS, SCENTS
from calrec_jax.data.templates import Template

ROOT = "Industrial & Scientific"
UNITS = ("Inch", "oz", "mm", "ft", "Pack", "Count", "cm", "lb", "Length", "Width")
JOINTS = ("x", "by", "with", "for", "of", "and")
SYLLABLES = tuple(c + v for c in "bcdfghklmnprstvwz" for v in "aeiou")


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a catalogue, the frequent ones first."""

    brands: list[str]
    kinds: list[str]
    features: list[str]


def _invent(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of two to four syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        picked = rng.integers(0, len(SYLLABLES), (count, 4))
        sizes = rng.integers(2, 5, count)
        for row, size in zip(picked.tolist(), sizes.tolist(), strict=True):
            words["".join(SYLLABLES[place] for place in row[:size])] = None
    return list(words)[:count]


def words_of(num_items: int, rng: np.random.Generator) -> Words:
    """The shop's words, and invented ones as far as a catalogue of this size needs them."""
    specs = list(CATEGORIES.values())
    brands = [brand for spec in specs for brand in spec.brands]
    kinds: list[str] = []
    features = [*COLOURS, *SCENTS]
    for spec in specs:
        for department in spec.departments:
            system = department.system
            kinds += [system.main, system.refill, *system.accessories, *(staple.name for staple in department.staples)]
            features += [*system.lines, *system.variants]
            for staple in department.staples:
                features += [*staple.variants, *staple.sizes]
    invented = _invent(rng, 1000 + num_items // 2)
    cut = 100 + num_items // 15
    brands = [*dict.fromkeys(brands), *(word.capitalize() for word in invented[:cut])]
    kinds = list(dict.fromkeys(kinds))
    extra = [word.capitalize() for word in invented[cut : cut + 400]]
    kinds += [f"{one} {kinds[row % len(kinds)].split()[-1]}" for row, one in enumerate(extra)]
    return Words(brands, kinds, [*dict.fromkeys(features), *(word.capitalize() for word in invented[cut:])])


class Zipf:
    """Draws from words with probability in proportion to (place + 3)^−exponent; draws are made in bulk."""

    def __init__(self, rng: np.random.Generator, words: list[str], exponent: float):
        self._rng = rng
        self._words = words
        self._weights = np.cumsum((np.arange(len(words)) + 3.0) ** -exponent)
        self._drawn: list[int] = []

    def draw(self) -> str:
        """One word."""
        if not self._drawn:
            values = self._rng.random(20_000) * self._weights[-1]
            self._drawn = np.searchsorted(self._weights, values).tolist()
        return self._words[self._drawn.pop()]


class Shop:
    """What items are made of: kinds in a tree of categories, brands, features, numbers."""

    def __init__(self, num_items: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.random = random.Random(seed)  # a tenth of NumPy's cost for single numbers
        words = words_of(num_items, self.rng)
        levels = [f"{self.random.choice(words.kinds)} & {self.random.choice(words.kinds)}" for _ in range(40)]
        levels = [level + " Products" if row % 3 == 0 else level for row, level in enumerate(levels)]
        level = Zipf(self.rng, levels, 1.0)
        self.category = Zipf(self.rng, [f"{level.draw()}|{kind}" for kind in words.kinds], 0.8)
        self.brand = Zipf(self.rng, words.brands, 0.9)
        self.feature = Zipf(self.rng, words.features, 0.8)
        self.unit = Zipf(self.rng, list(UNITS), 1.0)
        self.joint = Zipf(self.rng, list(JOINTS), 1.0)

    def number(self, share: float) -> int:
        """Geometric: 1, 2, … with mean 1 / `share`."""
        return 1 + int(math.log(1.0 - self.random.random()) / math.log(1.0 - share))

    def features(self, least: int, most: int) -> list[str]:
        """Some features."""
        return [self.feature.draw() for _ in range(self.random.randint(least, most))]

    def model(self) -> str:
        """A model number, most often one that no other item has."""
        letters = "".join(self.random.choices(string.ascii_uppercase, k=self.random.randint(1, 3)))
        return f"{letters}{self.random.randint(10, 100_000)}"


def make_catalogue(num_items: int, seed: int = 0) -> list[str]:
    """[I] item texts in the template's form, in random order."""
    shop, template = Shop(num_items, seed), Template()
    texts: list[str] = []
    while len(texts) < num_items:
        category, brand, line = shop.category.draw().split("|"), shop.brand.draw(), shop.features(1, 4)
        for _ in range(min(num_items - len(texts), shop.number(0.3))):
            title = [brand, *line, category[1], *shop.features(0, 5)]
            if shop.random.random() < 0.7:
                title.insert(1, shop.model())
            for _ in range(shop.random.choice((0, 0, 1, 1, 2, 3))):
                title += [str(shop.number(0.12)), shop.unit.draw(), shop.joint.draw(), str(shop.number(0.2))]
            if shop.random.random() < 0.2:
                title.append(f"(Pack of {shop.number(0.2)})")
            path = f"{ROOT}, {category[0]} {category[1]}"
            texts.append(template.item_text({"title": " ".join(title), "category": path, "brand": brand}))
    order = shop.rng.permutation(num_items)
    return [texts[row] for row in order]


def make_strings(texts: list[str], count: int, seed: int = 1) -> list[str]:
    """Strings as a model that knows the catalogue writes them: parts of two items joined, words lost or swapped.

    One in five is an item's own text; of the others the head of the title comes from one item, the rest from
    another, and each word is dropped with probability 0.05 or exchanged for one of a third item with 0.1.
    """
    rng = np.random.default_rng(seed)
    strings = []
    for first, second, third in rng.integers(0, len(texts), (count, 3)):
        if rng.random() < 0.2:
            strings.append(texts[first])
            continue
        head, tail = texts[first].split(), texts[second].split()
        cut = rng.random()
        joined = head[: 1 + int(cut * len(head))] + tail[1 + int(cut * len(tail)) :]
        other = texts[third].split()
        kept = [other[rng.integers(len(other))] if rng.random() < 0.1 else word for word in joined]
        strings.append(" ".join(word for word in kept if rng.random() > 0.05))
    return strings
