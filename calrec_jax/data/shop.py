"""A synthetic shop: raw 2018-layout dumps with a known structure, and the probabilities behind them.

It writes, per category, `{Category}_5.json.gz` (reviews) and `meta_{Category}.json.gz` (metadata), both dirty as real
dumps are, and `oracle_{Category}.npz`: for every user the probability of every item at the moment of the last (test)
purchase, the ceiling of any recommender. The catalogue is made in `shop_catalogue.py`, the rules of buying are in
`shop_purchases.py`, and docs/synthetic_shop.md tells both in words.

Notable: the same `Shop` gives the same bytes. Dirt never changes a purchase: a cleaned dump holds exactly the simulated
sequences. No user buys the same item twice in a row or twice a day, apart from a few double orders, which are dirt.
"""

import gzip
import html
import json
import zipfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import gin
import numpy as np

from calrec_jax.artifacts import atomic_file
from calrec_jax.data.shop_catalogue import ALWAYS, ROLES, Catalogue, build_catalogue
from calrec_jax.data.shop_purchases import Purchases, simulate
from calrec_jax.errors import CalrecError

LAST_DAY = 1_538_265_600  # 2018-09-30 00:00 UTC, the end of the shop's log, in seconds
DAY = 86_400
REVIEW_DIRT = ("broken_json", "missing_field", "repeated_line", "double_order")
METADATA_DIRT = ("css_price", "absent_price", "absent_brand", "empty_category", "repeated_item", "broken_json")
CSS = ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{background-color:#fffbf3;border-color:#e77600}"
OPINIONS = (
    ("Disappointing", "It broke within a week."),
    ("Not great", "Does not fit as well as I had hoped."),
    ("It is OK", "Does what it should, no more."),
    ("Good value", "Works well and came quickly."),
    ("Five Stars", "Just what I needed, will buy again."),
)
RATINGS = (0.05, 0.05, 0.1, 0.2, 0.6)


@gin.configurable
@dataclass(frozen=True)
class Shop:
    """Sizes of the shop; its rules are fixed (`shop_purchases.Rules`).

    Attributes:
        seed: of all chance.
        users, items: of each category. `items` counts the whole catalogue, new items included.
        min_purchases, max_purchases: of a user.
        new_items: share of the catalogue launched late: successor models, new pack sizes, new varieties.
        launch_days: these are launched within the last so many days of the log.
        same_day: share of purchases made on the day of the one before.
        dirty: share of lines (items in metadata) with each kind of dirt, at least one of each; 0: a clean dump.
    """

    seed: int = 0
    users: int = 2000
    items: int = 400
    min_purchases: int = 5
    max_purchases: int = 12
    new_items: float = 0.15
    launch_days: int = 45
    same_day: float = 0.12
    dirty: float = 0.001

    def __post_init__(self) -> None:
        checks = {
            "seed": (self.seed >= 0, "at least 0"),
            "users": (self.users >= 1, "at least 1"),
            "items": (self.items >= 1, "at least 1"),
            "min_purchases": (self.min_purchases >= 3, "at least 3: a history, a validation item and a test item"),
            "max_purchases": (self.max_purchases >= self.min_purchases, "at least min_purchases"),
            "new_items": (0 <= self.new_items <= 0.3, "within [0, 0.3]"),
            "launch_days": (self.launch_days >= 6, "at least 6"),
            "same_day": (0 <= self.same_day < 1, "within [0, 1)"),
            "dirty": (0 <= self.dirty <= 0.1, "within [0, 0.1]"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise CalrecError(f"Shop.{name} = {getattr(self, name)!r} must be {wanted}.")


@dataclass(frozen=True)
class Oracle:
    """The shop's own probabilities: `probabilities[u, i]` is that of item i as user u's last purchase; rows sum to 1.

    Given all that the shop knows at that moment: the history, the items on sale that day, and the user's latent taste
    and brand affinity, which no recommender sees.
    """

    user_ids: np.ndarray  # [U] str, sorted
    item_ids: np.ndarray  # [I] str, sorted
    probabilities: np.ndarray  # [U, I] float32


@dataclass(frozen=True)
class ShopFiles:
    """What `write_shop` wrote; each dictionary is keyed by category."""

    reviews: dict[str, Path]
    metadata: dict[str, Path]
    oracles: dict[str, Path]
    dirt: dict[str, dict[str, int]]  # lines of each kind, `reviews.…` and `metadata.…`


@dataclass(frozen=True)
class Sales:
    """A category as simulated, before anything is written."""

    catalogue: Catalogue
    purchases: Purchases
    user_ids: np.ndarray  # [U] str, sorted
    item_ids: np.ndarray  # [I] str, in the catalogue's order


def _identifiers(prefix: str, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct identifiers, in random order."""
    alphabet = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    found: dict[str, None] = {}
    while len(found) < count:
        codes = alphabet[rng.integers(36, size=(count - len(found), length - len(prefix)))]
        found.update(dict.fromkeys(prefix + "".join(row) for row in codes))
    return np.array(list(found))


def simulate_category(category: str, shop: Shop) -> Sales:
    """Simulates a category; it does not depend on which others are written.

    Raises:
        CalrecError: the category is unknown, or the catalogue's size does not suit it.
    """
    sequence = np.random.SeedSequence([shop.seed, zlib.crc32(category.encode())])
    things, people, names = (np.random.default_rng(child) for child in sequence.spawn(3))
    catalogue = build_catalogue(category, shop.items, shop.new_items, shop.launch_days, things)
    purchases = simulate(catalogue, shop.users, shop.min_purchases, shop.max_purchases, shop.same_day, people)
    users = np.sort(_identifiers("A", 14, shop.users, names))
    return Sales(catalogue, purchases, users, _identifiers("B0", 10, shop.items, names))


def write_shop(
    folder: Path | str, shop: Shop, categories: tuple[str, ...] = ("Office_Products", "Home_and_Kitchen")
) -> ShopFiles:
    """Writes the dumps and oracles of `categories` into `folder`.

    Raises:
        CalrecError: a category is unknown or the sizes do not suit it.
    """
    files = ShopFiles({}, {}, {}, {})
    for category in categories:
        sales = simulate_category(category, shop)
        sequence = np.random.SeedSequence([shop.seed, zlib.crc32(category.encode()), 1])
        rng = np.random.default_rng(sequence)
        reviews, dirt = _review_lines(sales, shop.dirty, rng)
        metadata, metadata_dirt = _metadata_lines(sales, shop.dirty, rng)
        files.dirt[category] = {f"reviews.{kind}": count for kind, count in dirt.items()}
        files.dirt[category] |= {f"metadata.{kind}": count for kind, count in metadata_dirt.items()}
        files.reviews[category] = _write_lines(Path(folder) / f"{category}_5.json.gz", reviews)
        files.metadata[category] = _write_lines(Path(folder) / f"meta_{category}.json.gz", metadata)
        files.oracles[category] = _write_oracle(Path(folder) / f"oracle_{category}.npz", sales)
    return files


def load_oracle(path: Path | str) -> Oracle:
    """Reads `oracle_{Category}.npz`.

    Raises:
        CalrecError: the file is missing or is no oracle.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            oracle = Oracle(arrays["user_ids"], arrays["item_ids"], arrays["probabilities"])
    except FileNotFoundError:
        raise CalrecError(f"{path} does not exist. Write the shop again, or leave the oracle out.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CalrecError(f"{path} is not an oracle of the synthetic shop ({error}). Write the shop again.") from None
    shape = (len(oracle.user_ids), len(oracle.item_ids))
    if oracle.probabilities.shape != shape:
        raise CalrecError(f"{path}: probabilities are {oracle.probabilities.shape}, not {shape}. Write the shop again.")
    return oracle


def _write_oracle(path: Path, sales: Sales) -> Path:
    order = np.argsort(sales.item_ids)
    with atomic_file(path) as temporary, open(temporary, "wb") as sink:
        np.savez_compressed(
            sink,
            user_ids=sales.user_ids,
            item_ids=sales.item_ids[order],
            probabilities=sales.purchases.probabilities[:, order],
        )
    return path


def _write_lines(path: Path, lines: list[str]) -> Path:
    """Gzips the lines; without name and time in the header, so that the same lines give the same bytes."""
    text = "".join(line + "\n" for line in lines)
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))
    return path


def _how_many(share: float, of: int) -> int:
    return max(1, round(share * of)) if share > 0 else 0


def _review_lines(sales: Sales, dirty: float, rng: np.random.Generator) -> tuple[list[str], dict[str, int]]:
    """Review lines in order of time, a user's own in order of purchase, with dirt added beside the true ones."""
    purchases = sales.purchases
    users, positions = np.nonzero(purchases.items >= 0)
    items, times = purchases.items[users, positions], LAST_DAY - DAY * purchases.days[users, positions]
    count = _how_many(dirty, len(users))
    doubled = _double_orders(purchases, users, positions, count, rng)
    # A double order stands half a position later, a day later where the next purchase leaves room.
    next_times = np.r_[times[1:], 0][doubled]
    all_times = np.r_[times, np.minimum(times[doubled] + DAY, next_times)]
    all_positions = np.r_[positions, positions[doubled] + 0.5]
    source = np.r_[np.arange(len(users)), doubled]
    order = np.lexsort((all_positions, users[source], all_times))
    stars = rng.choice(5, len(source), p=RATINGS)
    extras = rng.random((len(source), 3))
    lines, records = [], []
    for row in order:
        record = _review(sales, users[source[row]], items[source[row]], int(all_times[row]), stars[row], extras[row])
        records.append(record)
        lines.append(json.dumps(record))
    dirt = dict.fromkeys(REVIEW_DIRT, count) | {"double_order": len(doubled)}
    chosen = rng.choice(len(lines), (3, count), replace=False)
    for row in chosen[0]:
        lines[row] += "\n" + _cut(lines[row], rng)
    for number, row in enumerate(chosen[1]):
        missing = ("asin", "reviewerID", "unixReviewTime")[number % 3]
        lines[row] += "\n" + json.dumps({key: value for key, value in records[row].items() if key != missing})
    for row in chosen[2]:
        lines[row] += "\n" + lines[row]
    return lines, dirt


def _double_orders(
    purchases: Purchases, users: np.ndarray, positions: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Purchases that are entered twice; never a user's last, whose oracle holds with and without removal of repeats."""
    candidates = np.flatnonzero(positions < purchases.lengths[users] - 1)
    return rng.choice(candidates, min(count, len(candidates)), replace=False) if count else np.zeros(0, int)


def _cut(line: str, rng: np.random.Generator) -> str:
    """The line, broken off somewhere in its middle."""
    return line[: int(len(line) * rng.uniform(0.3, 0.9))]


def _review(sales: Sales, user: int, item: int, time: int, stars: int, extras: np.ndarray) -> dict:
    """One review, with the fields of the dumps in their order; some have votes, a style or no text."""
    when = datetime.fromtimestamp(time, UTC)
    summary, text = OPINIONS[stars]
    variant = sales.catalogue.variants[sales.catalogue.variant[item]]
    return {
        "overall": float(stars + 1),
        **({"vote": str(2 + int(extras[0] * 400))} if extras[0] < 0.03 else {}),
        "verified": bool(extras[1] < 0.9),
        "reviewTime": f"{when:%m} {when.day}, {when.year}",
        "reviewerID": str(sales.user_ids[user]),
        "asin": str(sales.item_ids[item]),
        **({"style": {"Style:": f" {variant}"}} if variant else {}),
        **({"reviewText": text} if extras[2] < 0.998 else {}),
        "summary": summary,
        "unixReviewTime": time,
    }


def _metadata_lines(sales: Sales, dirty: float, rng: np.random.Generator) -> tuple[list[str], dict[str, int]]:
    """Metadata lines, in random order; each kind of dirt falls on items of its own."""
    catalogue = sales.catalogue
    count = _how_many(dirty, len(catalogue))
    if len(METADATA_DIRT) * count > len(catalogue):
        raise CalrecError(f"Shop.dirty = {dirty} leaves no item of {len(catalogue)} clean. Lower it.")
    chosen = rng.permutation(len(catalogue))[: len(METADATA_DIRT) * count].reshape(len(METADATA_DIRT), count)
    dirt_of = {int(item): kind for kind, items in zip(METADATA_DIRT, chosen, strict=True) for item in items}
    lines = []
    for item in rng.permutation(len(catalogue)):
        record, kind = _metadata(sales, item), dirt_of.get(int(item))
        if kind == "css_price":
            record["price"] = CSS
        elif kind == "absent_price":
            record["price"] = ""
        elif kind == "absent_brand":
            record["brand"] = ""
        elif kind == "empty_category":
            record["category"] = []
        lines.append(json.dumps(record))
        if kind == "broken_json":
            lines.append(_cut(lines[-1], rng))
        elif kind == "repeated_item":
            lines.append(lines[-1])
    return lines, dict.fromkeys(METADATA_DIRT, count)


def _metadata(sales: Sales, item: int) -> dict:
    """One item's metadata with the fields of the dumps; `&` is escaped in titles and main_cat, as there."""
    catalogue = sales.catalogue
    together = np.zeros(len(catalogue), bool)
    if catalogue.role[item] == ROLES.index("main"):
        together = (catalogue.model == catalogue.model[item]) & (catalogue.launch == ALWAYS)
    alike = (catalogue.type == catalogue.type[item]) & (catalogue.department == catalogue.department[item])
    related = [np.flatnonzero(mask & (np.arange(len(catalogue)) != item))[:8] for mask in (together, alike)]
    asin = str(sales.item_ids[item])
    return {
        "category": list(catalogue.paths[item]),
        "tech1": "",
        "description": [],
        "fit": "",
        "title": html.escape(catalogue.titles[item]),
        "also_buy": sales.item_ids[related[0]].tolist(),
        "tech2": "",
        "brand": catalogue.brands[item],
        "feature": [],
        "rank": [],
        "also_view": sales.item_ids[related[1]].tolist(),
        "details": {"ASIN: ": asin},
        "main_cat": html.escape(catalogue.category),
        "similar_item": "",
        "date": "",
        "price": f"${catalogue.prices[item]:.2f}",
        "asin": asin,
        "imageURL": [],
        "imageURLHighRes": [],
    }
