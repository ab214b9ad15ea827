"""The synthetic shop's catalogue: what it sells, in words.

A category is a handful of departments. A department sells one *system* (a main item such as a printer, its refills and
the accessories that fit it) and a few *staples* (goods that are used up and bought again). What fits what is
written in the titles alone: `Halden Swift 20 Black Ink Cartridge 2 Pack` fits the `Halden Swift 20 Inkjet Printer`.
All names are invented. The rules by which people buy are in `shop_purchases.py`; docs/synthetic_shop.md tells both.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np

from calrec_jax.data.shop_words import CATEGORIES, CategorySpec, System
from calrec_jax.errors import CalrecError

Role = Literal["main", "refill", "accessory", "staple"]
ROLES: tuple[Role, ...] = ("main", "refill", "accessory", "staple")
ALWAYS = 1 << 20  # `Catalogue.launch` of what has been sold since before the log begins
SYSTEM_SHARE = 0.6  # of the catalogue: main items, refills and accessories; the rest are staples
SUCCESSOR_SHARE, PACK_SHARE = 0.5, 0.3  # of the new items: successor systems, new pack sizes; the rest are new staples
ITEMS_PER_SYSTEM = 8


@dataclass(frozen=True)
class Catalogue:
    """The items of a category, ordered by department; every array is [I] unless said otherwise.

    `model` numbers the models of main items (0 … M−1; −1 for staples), `predecessor` is [M] (−1: none), `launch` is in
    days before the end of the shop's log (a large number: always sold), `goes_with` is [types, types] bool.
    """

    category: str
    titles: list[str]
    paths: list[tuple[str, ...]]
    brands: list[str]
    prices: np.ndarray
    variants: list[str]
    role: np.ndarray
    department: np.ndarray
    type: np.ndarray
    brand: np.ndarray
    variant: np.ndarray
    model: np.ndarray
    predecessor: np.ndarray
    cycle: np.ndarray
    launch: np.ndarray
    goes_with: np.ndarray
    type_names: list[str]
    popularity: np.ndarray

    def __len__(self) -> int:
        return len(self.titles)

    @property
    def is_new(self) -> np.ndarray:
        """Which items [I] are launched within the log."""
        return self.launch < ALWAYS


@dataclass
class _Item:
    title: str
    role: Role
    department: int
    type: str
    brand: str
    variant: str
    cycle: int
    price: float
    model: int = -1
    new: bool = False


@dataclass
class _Model:
    """One model of a system: `Halden Swift 20`."""

    number: int
    department: int
    brand: str
    line: str
    version: int
    predecessor: int = -1
    variants: list[str] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.brand} {self.line} {self.version}"


def price_point(dollars: float) -> float:
    """The nearest of the shop's price points from above: 4.99, 7.99, 9.99, then every 5, 10 or 50 dollars."""
    points = np.r_[4.99, 7.99, 9.99, 12.99, np.arange(15, 50, 5) - 0.01, np.arange(50, 100, 10) - 0.01]
    points = np.r_[points, np.arange(100, 1000, 50) - 0.01]
    return float(points[min(np.searchsorted(points, dollars - 1e-6), len(points) - 1)])


def _model_items(model: _Model, spec: CategorySpec, rng: np.random.Generator, *, new: bool) -> list[_Item]:
    """The main item of a model, its refills (2–3 variants in 2 of 3 pack sizes) and 2 accessories."""
    system = spec.departments[model.department].system
    model.variants = [system.variants[i] for i in sorted(rng.permutation(3)[: rng.integers(2, 4)])]
    model.packs = [system.packs[i] for i in sorted(rng.permutation(3)[:2])]

    def item(title: str, role: Role, type_: str, brand: str, price: float) -> _Item:
        return _Item(title, role, model.department, type_, brand, "", system.cycle, price, model.number, new)

    price = price_point(system.prices[0] * rng.uniform(0.7, 1.3))
    items = [item(f"{model.name} {system.main}", "main", system.main, model.brand, price)]
    for variant, pack in product(model.variants, model.packs):
        items.append(_refill_item(model, system, variant, pack, new=new))
    for accessory in rng.permutation(np.array(system.accessories, object))[:2]:
        maker = model.brand if rng.random() < 0.5 else spec.brands[rng.integers(len(spec.brands))]
        fits = f"{model.line} {model.version}" if maker == model.brand else model.name
        title = f"{maker} {accessory} for {fits}"
        items.append(item(title, "accessory", accessory, maker, price_point(system.prices[2])))
    return items


def _refill_item(model: _Model, system: System, variant: str, pack: str, *, new: bool) -> _Item:
    title = f"{model.name} {variant} {system.refill} {pack}".strip()
    times = int(pack.split()[0]) ** 0.8 if pack else 1.0
    return _Item(title, "refill", model.department, system.refill, model.brand, variant, system.cycle,
                 price_point(system.prices[1] * times), model.number, new)  # fmt: skip


def _systems(
    spec: CategorySpec, budget: int, new_budget: int, rng: np.random.Generator
) -> tuple[list[_Item], list[_Model]]:
    """Models by turns over the departments until the budget is spent, then successors and new pack sizes."""
    items: list[_Item] = []
    models: list[_Model] = []
    brands = [list(rng.permutation(len(spec.brands))) for _ in spec.departments]
    successors = max(1, round(new_budget * SUCCESSOR_SHARE / ITEMS_PER_SYSTEM))
    packs = max(1, round(new_budget * PACK_SHARE))
    first_budget = budget - successors * ITEMS_PER_SYSTEM - packs
    while len(items) + ITEMS_PER_SYSTEM <= first_budget or len(models) < len(spec.departments):
        turn, department = divmod(len(models), len(spec.departments))
        lines = spec.departments[department].system.lines
        round_, line = divmod(turn, len(lines))
        brand = spec.brands[brands[department][(turn + round_) % len(spec.brands)]]
        model = _Model(len(models), department, brand, lines[line], 10 + 20 * round_)
        models.append(model)
        items += _model_items(model, spec, rng, new=False)
    old = rng.permutation(len(models))
    for predecessor in old[:successors]:
        before = models[predecessor]
        after = _Model(len(models), before.department, before.brand, before.line, before.version + 10, int(predecessor))
        models.append(after)
        items += _model_items(after, spec, rng, new=True)
    for number in (old[successors:] if len(old) > successors else old)[:packs]:
        model = models[number]
        system = spec.departments[model.department].system
        missing = next(pack for pack in system.packs if pack not in model.packs)
        items.append(_refill_item(model, system, model.variants[0], missing, new=True))
    return items, models


def _staples(spec: CategorySpec, count: int, new: int, rng: np.random.Generator) -> list[_Item]:
    """`count` staples by turns over the types; the last `new` of them are launched late."""
    queues = []
    for number, department in enumerate(spec.departments):
        for staple in department.staples:
            offers = list(product(spec.brands, staple.variants, staple.sizes))
            queues.append([
                _Item(f"{brand} {variant} {staple.name} {size}", "staple", number, staple.name, brand, variant,
                      staple.cycle, price_point(staple.price * (1.0 if size == staple.sizes[0] else 1.5)))
                for brand, variant, size in (offers[i] for i in rng.permutation(len(offers)))
            ])  # fmt: skip
    longest = max(map(len, queues))
    items = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)][:count]
    if len(items) < count:
        raise CalrecError(
            f"Shop.items is too large: {spec.name} has words for {len(items)} of {count} staples. Lower it."
        )
    for item in items[len(items) - new :]:
        item.new = True
    return items


def _popularity(items: list[_Item], rng: np.random.Generator) -> np.ndarray:
    """Long-tailed popularity [I]: log-normal per brand, model and item; main items and staples halve a department."""
    brand = {name: rng.normal(0, 0.4) for name in sorted({item.brand for item in items})}
    models = rng.normal(0, 0.7, max(item.model for item in items) + 1)
    own = rng.normal(0, [0.3 if item.role == "main" else 0.8 for item in items])
    log = own + [brand[item.brand] + (models[item.model] if item.model >= 0 else 0.0) for item in items]
    weights = np.exp(log)
    for department in {item.department for item in items}:
        for role in ROLES:
            rows = [i for i, item in enumerate(items) if (item.department, item.role) == (department, role)]
            weights[rows] /= weights[rows].sum()
    return weights


def _tables(spec: CategorySpec) -> tuple[list[str], np.ndarray]:
    """Type names, and which type goes with which [types, types]; a staple goes with other varieties of itself, too."""
    names: list[str] = []
    pairs: list[tuple[str, str]] = []
    for department in spec.departments:
        system = department.system
        names += [system.main, system.refill, *system.accessories, *(staple.name for staple in department.staples)]
        pairs += [(source, target) for source in (system.main, system.refill) for target in department.goes_with]
        pairs += [(staple.name, target) for staple in department.staples for target in (staple.name, *staple.goes_with)]
    names = list(dict.fromkeys(names))
    table = np.zeros((len(names), len(names)), bool)
    for source, target in pairs:
        if target in names:
            table[names.index(source), names.index(target)] = True
    return names, table


def build_catalogue(
    category: str, items: int, new_items: float, launch_days: int, rng: np.random.Generator
) -> Catalogue:
    """Builds a category's catalogue of exactly `items` items.

    Args:
        category: a key of `CATEGORIES`.
        items: catalogue size I.
        new_items: share of the catalogue that is launched during the last `launch_days` of the log.
        launch_days: length of that last stretch, in days.
        rng: the only source of chance.

    Raises:
        CalrecError: the category is unknown, or `items` is too small or too large for its words.
    """
    if category not in CATEGORIES:
        raise CalrecError(f"The shop has no category {category!r}. It has: {', '.join(CATEGORIES)}.")
    spec = CATEGORIES[category]
    new = round(items * new_items)
    system_items, models = _systems(spec, round(items * SYSTEM_SHARE), new, rng)
    types = sum(len(department.staples) for department in spec.departments)
    staples = items - len(system_items)
    if staples < 3 * types:
        least = len(system_items) + 3 * types
        raise CalrecError(f"Shop.items = {items} is too small for {category}. Use at least {least}.")
    new_staples = min(max(1, round(new * (1 - SUCCESSOR_SHARE - PACK_SHARE))), staples - 2 * types) if new else 0
    rows = system_items + _staples(spec, staples, new_staples, rng)
    rows.sort(key=lambda item: (item.department, item.model, ROLES.index(item.role)))  # a model's items lie together
    launches = dict(zip([-1, *range(len(models))], rng.integers(5, launch_days, len(models) + 1), strict=True))
    names, goes_with = _tables(spec)
    brands = sorted(set(spec.brands))
    variants = sorted({item.variant for item in rows})
    departments = [department.name for department in spec.departments]
    integers = {
        "role": [ROLES.index(item.role) for item in rows],
        "department": [item.department for item in rows],
        "type": [names.index(item.type) for item in rows],
        "brand": [brands.index(item.brand) for item in rows],
        "variant": [variants.index(item.variant) for item in rows],
        "model": [item.model for item in rows],
        "cycle": [item.cycle for item in rows],
        "launch": [
            (launches[item.model] if item.role != "staple" else rng.integers(5, launch_days)) if item.new else ALWAYS
            for item in rows
        ],
    }
    return Catalogue(
        category=spec.name,
        titles=[item.title for item in rows],
        paths=[(spec.name, departments[item.department], item.type) for item in rows],
        brands=[item.brand for item in rows],
        prices=np.array([item.price for item in rows]),
        variants=variants,
        predecessor=np.array([model.predecessor for model in models]),
        goes_with=goes_with,
        type_names=names,
        popularity=_popularity(rows, rng),
        **{name: np.array(values) for name, values in integers.items()},
    )
