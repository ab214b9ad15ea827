"""Raw dumps of any size, for benchmarks: `calrec synth --users 100000 --items 20000 --layout 2018 --out DIR`.

Titles are made of the words of the synthetic shop, reviews of sentences about them, as long as real ones are (median
about 190 characters, mean about 300, a tail of thousands). Items have a long-tailed popularity, half of the purchases
stay near the one before, an eighth share its day; a few lines are repeated or broken off. There is no oracle and
nothing to learn beyond that: what the shop of `shop.py` is for. The same arguments give the same bytes.

Notable: users are made a chunk at a time, each chunk by a random stream of its own, and written as they come, so
memory does not grow with the size.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calrec_jax import artifacts
from calrec_jax.data.shop_words import CATEGORIES, CategorySpec
from calrec_jax.errors import CalrecError

LAYOUTS = ("2018",)
_CHUNK = 8192  # users
_FIRST_DAY = 1_262_304_000 // 86_400  # 2010-01-01
_DAYS = 3_100
_DIRTY = 0.0005  # share of lines that are repeated, and of lines that are broken off
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SUBJECTS = (
    "The {0}",
    "This {0}",
    "My second {0}",
    "The {0} I had before",
    "Our office's {0}",
    "It",
    "The box",
    "The colour",
)
_VERBS = ("works", "looks", "feels", "arrived", "fits", "prints", "holds up", "does the job", "was packed", "smells")
_ENDS = (
    "just as described", "better than I expected", "after three weeks of daily use", "a bit cheap for the price",
    "exactly like the picture", "with everything that came in the box", "and my daughter loves it", "so far, so good",
    "but the instructions could be clearer", "and I would buy it again", "though shipping took nine days",
    "for what I paid", "without any problem at all", "a little smaller than the one I had", "until it stopped in May",
    "and the seller answered within a day",
)  # fmt: skip


@dataclass(frozen=True)
class Synth:
    """Sizes of a synthetic dump.

    Attributes:
      users, items: how many.
      reviews_per_user: their mean; at least one each, at least five each from a mean of 5 on.
      seed: of all chance.
      category: whose words are used, and how the files are named.
      layout: one of `LAYOUTS`.
    """

    users: int
    items: int
    reviews_per_user: float = 8.0
    seed: int = 0
    category: str = "Office_Products"
    layout: str = "2018"

    def __post_init__(self) -> None:
        checks = {
            "users": (1 <= self.users < 36**8, "a whole number from 1"),
            "items": (1 <= self.items < 36**6, "a whole number from 1"),
            "reviews_per_user": (1 <= self.reviews_per_user <= 1000, "from 1 to 1000"),
            "seed": (self.seed >= 0, "at least 0"),
            "category": (self.category in CATEGORIES, f"one of {sorted(CATEGORIES)}"),
            "layout": (self.layout in LAYOUTS, f"one of {list(LAYOUTS)}"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise CalrecError(f"--{name}={getattr(self, name)}: must be {wanted}.")


def write_synth(out: str | Path, synth: Synth) -> tuple[Path, Path]:
    """Writes `{category}_5.json.gz` and `meta_{category}.json.gz` into `out`; returns their paths.

    Raises:
      CalrecError: no space is left, or the folder cannot be written.
    """
    things = _Things(CATEGORIES[synth.category])
    reviews, metadata = Path(out) / f"{synth.category}_5.json.gz", Path(out) / f"meta_{synth.category}.json.gz"
    _write(metadata, (things.line(item) for item in range(synth.items)))
    _write(reviews, _reviews(synth, things))
    return reviews, metadata


def _write(path: Path, lines: Iterable[str]) -> None:
    with (
        artifacts.atomic_file(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as sink,
    ):
        block: list[str] = []
        for line in lines:
            block.append(line)
            if len(block) == 4096:
                sink.write(("\n".join(block) + "\n").encode())
                block.clear()
        if block:
            sink.write(("\n".join(block) + "\n").encode())


def _code(number: int, length: int) -> str:
    """A number below 36^(length−1) as that many letters and digits, neighbours far apart, no two alike."""
    number = number * 2_654_435_761 % 36**length  # the factor has neither 2 nor 3
    letters = []
    for _ in range(length):
        number, digit = divmod(number, 36)
        letters.append(_ALPHABET[digit])
    return "".join(letters)


def user_id(user: int) -> str:
    """The user's reviewerID."""
    return "A" + _code(user, 13)


def item_id(item: int) -> str:
    """The item's asin."""
    return "B0" + _code(item, 8)


class _Things:
    """What is sold: item i by its number alone."""

    def __init__(self, words: CategorySpec):
        self._words = words
        # (path, name, variants, sizes, price) of each kind of goods
        self.kinds: list[tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...], float]] = []
        for department in words.departments:
            path, system = (words.name, department.name), department.system
            self.kinds.append(((*path, system.main), system.main, ("",), ("",), system.prices[0]))
            self.kinds.append(((*path, system.refill), system.refill, system.variants, system.packs, system.prices[1]))
            self.kinds += [((*path, name), name, ("",), ("",), system.prices[2]) for name in system.accessories]
            self.kinds += [((*path, s.name), s.name, s.variants, s.sizes, s.price) for s in department.staples]

    def name(self, item: int) -> str:
        """What the item is, in a review."""
        return self.kinds[item % len(self.kinds)][1].lower()

    def line(self, item: int) -> str:
        """The item's metadata."""
        rest, kind = divmod(item, len(self.kinds))
        path, name, variants, sizes, price = self.kinds[kind]
        rest, brand = divmod(rest, len(self._words.brands))
        rest, variant = divmod(rest, len(variants))
        rest, size = divmod(rest, len(sizes))
        words = (
            self._words.brands[brand],
            f"No. {rest * len(self.kinds) + kind + 1}",
            name,
            variants[variant],
            sizes[size],
        )
        return json.dumps(
            {
                "category": list(path),
                "description": [],
                "title": " ".join(word for word in words if word),
                "brand": self._words.brands[brand],
                "main_cat": self._words.name,
                "price": f"${price + rest % 50:.2f}" if item % 10 else "",
                "asin": item_id(item),
            }
        )


def _reviews(synth: Synth, things: _Things) -> Iterator[str]:
    sentences = [f"{s} {v} {e}." for s in _SUBJECTS for v in _VERBS for e in _ENDS]
    of_kind = [[sentence.replace("{0}", kind[1].lower()) for sentence in sentences] for kind in things.kinds]
    for chunk, first in enumerate(range(0, synth.users, _CHUNK)):
        rng = np.random.default_rng([synth.seed, chunk])
        users, items, days = _purchases(synth, min(_CHUNK, synth.users - first), rng)
        # Log-normal numbers of sentences of 45 characters: most reviews are short, some are long.
        counts = np.clip(np.round(np.exp(rng.normal(1.45, 0.95, len(users)))), 1, 200).astype(np.int64)
        ends = np.cumsum(counts)
        drawn = rng.integers(0, len(sentences), int(ends[-1])).tolist()
        stars = rng.choice(5, len(users), p=(0.05, 0.05, 0.1, 0.2, 0.6)) + 1
        dirt = rng.random(len(users))
        order = np.lexsort((np.arange(len(users)), days))
        names = [user_id(first + user) for user in range(int(users[-1]) + 1)]
        for row in order.tolist():
            own, item = of_kind[items[row] % len(of_kind)], int(items[row])
            text = " ".join([own[which] for which in drawn[ends[row] - counts[row] : ends[row]]])
            line = (
                f'{{"overall": {stars[row]}.0, "verified": true, "reviewerID": "{names[users[row]]}", '
                f'"asin": "{item_id(item)}", "reviewText": "{text}", "summary": "{own[drawn[ends[row] - 1]][:40]}", '
                f'"unixReviewTime": {days[row] * 86_400}}}'
            )
            yield line
            if dirt[row] < 2 * _DIRTY:
                yield line if dirt[row] < _DIRTY else line[: len(line) // 2]


def _purchases(synth: Synth, users: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and day of each purchase, users one after the other, in their order."""
    least = min(5, int(synth.reviews_per_user))
    more = synth.reviews_per_user - least
    lengths = least + rng.geometric(1 / (1 + more), users) - 1
    total = int(lengths.sum())
    user = np.repeat(np.arange(users), lengths)
    position = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # A power law by rank: half of the purchases go to the first tenth of the items.
    popular = np.minimum((synth.items * rng.random(total) ** 3.3).astype(np.int64), synth.items - 1)
    step = rng.integers(1, 6, total)
    near = rng.random(total) < 0.5
    items = np.where(near & (position > 0), (np.roll(popular, 1) + step) % synth.items, popular)
    gaps = np.where(rng.random(total) < 0.12, 0, rng.geometric(1 / 60, total))
    start = rng.integers(0, _DAYS, users)
    since = np.cumsum(gaps) - np.repeat((np.cumsum(gaps) - gaps)[np.cumsum(lengths) - lengths], lengths)
    return user, items, _FIRST_DAY + start[user] + since
