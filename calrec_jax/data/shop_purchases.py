"""How people buy in the synthetic shop: the rules, the next-purchase probabilities, the simulation.

Every purchase answers one *need*: a refill for a machine at home, an accessory that fits it, a staple that ran out,
something that goes with the last item, a walk through a department, or the shop window. Each need has a strength; it is
answered with a probability in proportion to it, and has its own distribution over the items. So the probability
of every item is known in closed form at every moment: that is the oracle. The numbers are in `Rules`; they are frozen
and no settings, or results would not compare. docs/synthetic_shop.md tells the rules in words.

Vectorised over users: a step computes [users, items] at once.
"""

from dataclasses import dataclass

import numpy as np

from calrec_jax.data.shop_catalogue import ROLES, Catalogue

NEVER = -1000  # step of a purchase that has not happened: far enough that every need is at rest


@dataclass(frozen=True)
class Rules:
    """The numbers behind the rules. Gaps are counted in purchases: 1 is the very next one."""

    refill: float = 3.0  # strength of the need for a refill when it is due
    accessory: float = 2.5  # right after the main item …
    accessory_decay: float = 0.6  # … times this a purchase
    repeat: float = 1.0  # strength of the need to buy a staple again when it ran out
    companion: float = 0.9  # strength of what goes with the last item
    taste: float = 0.7
    window: float = 0.12  # the shop window: popularity alone
    rest: float = 0.04  # share of a need's strength that remains when nothing is due
    cycle_width: float = 0.8  # standard deviation of when a refill or staple is due, in purchases
    same_refill: float = 4.0  # a refill bought before is preferred by this factor
    novelty: float = 4.0  # a new item is preferred by this factor
    same_brand: float = 4.0  # companions: preference for the last item's brand …
    same_variant: float = 3.0  # … and for its colour or scent
    loyalty: float = 1.0  # taste: weight of a brand grows by this for each item of it in the history
    brand_spread: float = 0.8  # standard deviation of a user's log affinity to a brand
    second_machine: float = 0.1  # a main item of a type one has already is bought that much less
    upgrade: float = 6.0  # the successor of one's own model is preferred by this factor
    taste_spread: float = 1.3  # standard deviation of the taste for a department
    taste_memory: float = 0.9  # autocorrelation of the taste from a purchase to the next: it drifts
    window_share: tuple[float, ...] = (0.25, 0.4, 0.1, 0.25)  # of main, refill, accessory, staple


@dataclass
class State:
    """What the shop knows of its users before step `step`; arrays are [users, …]."""

    step: int
    taste: np.ndarray  # [users, departments] latent, now
    affinity: np.ndarray  # [users, brands] latent, fixed
    day: np.ndarray  # [users] days before the end of the log, of the purchase to come
    morning: np.ndarray  # [users] step of the first purchase of that day
    last: np.ndarray  # [users] item, −1: none yet
    bought: np.ndarray  # [users, I] step of an item's latest purchase
    main: np.ndarray  # [users, M] step at which the main item of a model was bought
    supplied: np.ndarray  # [users, M] latest step at which a main item or refill of a model was bought
    brand_count: np.ndarray  # [users, brands]

    @classmethod
    def start(cls, catalogue: Catalogue, taste: np.ndarray, affinity: np.ndarray, day: np.ndarray) -> "State":
        """Before the first purchase."""
        users, models = len(taste), len(catalogue.predecessor)
        return cls(
            step=0,
            taste=taste,
            affinity=affinity,
            day=day,
            morning=np.zeros(users, int),
            last=np.full(users, -1),
            bought=np.full((users, len(catalogue)), NEVER, np.int32),
            main=np.full((users, models), NEVER, np.int32),
            supplied=np.full((users, models), NEVER, np.int32),
            brand_count=np.zeros((users, affinity.shape[1])),
        )

    def buy(self, catalogue: Catalogue, items: np.ndarray) -> None:
        """Every user buys one of `items` [users]; the step is then over."""
        rows, model, role = np.arange(len(items)), catalogue.model[items], catalogue.role[items]
        self.bought[rows, items] = self.step
        self.brand_count[rows, catalogue.brand[items]] += 1
        is_main, supplies = role == ROLES.index("main"), role <= ROLES.index("refill")
        self.main[rows[is_main], model[is_main]] = self.step
        self.supplied[rows[supplies], model[supplies]] = self.step
        self.last = items
        self.step += 1

    def next_day(self, taste: np.ndarray, day: np.ndarray) -> None:
        """The purchase to come is made on `day` [users], which may be the same, with another taste."""
        self.morning = np.where(day == self.day, self.morning, self.step)
        self.taste, self.day = taste, day

    def keep(self, users: np.ndarray) -> None:
        """Goes on with those users alone."""
        for name, values in vars(self).items():
            if name != "step":
                setattr(self, name, values[users])


def _by_model(catalogue: Catalogue, role: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of a role, ordered by model; where each model's begin; the models that have any."""
    items = np.flatnonzero(catalogue.role == ROLES.index(role))
    items = items[np.argsort(catalogue.model[items], kind="stable")]
    models, starts = np.unique(catalogue.model[items], return_index=True)
    return items, starts, models


def _share(weights: np.ndarray) -> np.ndarray:
    """Normalises over the last axis; rows without any weight stay zero."""
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


class Shopper:
    """The rules applied to one catalogue."""

    def __init__(self, catalogue: Catalogue, rules: Rules = Rules()) -> None:
        self.catalogue, self.rules = catalogue, rules
        self.refills, self.accessories = _by_model(catalogue, "refill"), _by_model(catalogue, "accessory")
        self.mains, self.staples = (np.flatnonzero(catalogue.role == ROLES.index(role)) for role in ("main", "staple"))
        self.departments = np.unique(catalogue.department, return_index=True)[1]
        self.durable = np.isin(catalogue.role, [ROLES.index("main"), ROLES.index("accessory")])
        self.cycle_of_model = np.zeros(len(catalogue.predecessor), int)
        self.cycle_of_model[catalogue.model[self.mains]] = catalogue.cycle[self.mains]
        self.window = catalogue.popularity * np.array(rules.window_share)[catalogue.role]

    def due(self, gap: np.ndarray, cycle: np.ndarray) -> np.ndarray:
        """How due something is `gap` purchases after it was last bought: a bell around its cycle, over a small rest."""
        bell = np.exp(-0.5 * ((gap - cycle) / self.rules.cycle_width) ** 2)
        return np.where(gap < -NEVER // 2, self.rules.rest + (1 - self.rules.rest) * bell, 0.0)

    def probabilities(self, state: State) -> np.ndarray:
        """Probability [users, I] of every item as the next purchase; rows sum to 1.

        Items not yet launched, the item just bought, items bought that day and durables that the user has are never
        bought.
        """
        catalogue = self.catalogue
        on_sale = catalogue.launch[None, :] >= state.day[:, None]
        on_sale &= ~((state.bought > NEVER) & self.durable) & (state.bought < state.morning[:, None])
        rows = np.flatnonzero(state.last >= 0)
        on_sale[rows, state.last[rows]] = False
        base = on_sale * catalogue.popularity * np.where(catalogue.is_new, self.rules.novelty, 1.0)
        needs = _share(on_sale * self.window) * self.rules.window
        needs += self._taste(state, base)
        needs += self._companion(state, base)
        needs[:, self.staples] += self._repeat(state, on_sale[:, self.staples])
        needs[:, self.refills[0]] += self._refill(state, base)
        needs[:, self.accessories[0]] += self._accessory(state, base)
        return _share(needs)

    def _per_model(self, weights: np.ndarray, layout: tuple, strength: np.ndarray) -> np.ndarray:
        """Spreads strengths per model [users, M] over the models' items in proportion to `weights` [users, items]."""
        items, starts, models = layout
        total = np.add.reduceat(weights, starts, axis=1)
        per_weight = np.divide(strength[:, models], total, out=np.zeros_like(total), where=total > 0)
        return weights * np.repeat(per_weight, np.diff(np.r_[starts, len(items)]), axis=1)

    def _refill(self, state: State, base: np.ndarray) -> np.ndarray:
        """For each model at home, known by its main item or a refill of it: its refills, the accustomed one first."""
        strength = self.rules.refill * self.due(state.step - state.supplied, self.cycle_of_model)
        items = self.refills[0]
        weights = base[:, items] * np.where(state.bought[:, items] > NEVER, self.rules.same_refill, 1.0)
        return self._per_model(weights, self.refills, strength)

    def _accessory(self, state: State, base: np.ndarray) -> np.ndarray:
        """For each main item at home: the accessories that fit and are not there yet."""
        gap = state.step - state.main
        strength = self.rules.accessory * self.rules.accessory_decay ** np.minimum(gap - 1, 60)
        strength = np.where(gap < -NEVER // 2, strength, 0.0)
        return self._per_model(base[:, self.accessories[0]], self.accessories, strength)

    def _repeat(self, state: State, on_sale: np.ndarray) -> np.ndarray:
        """Each staple bought before, the very same item, when it ran out."""
        gap = state.step - state.bought[:, self.staples]
        return self.rules.repeat * self.due(gap, self.catalogue.cycle[self.staples]) * on_sale

    def _companion(self, state: State, base: np.ndarray) -> np.ndarray:
        """What goes with the last item: by type, rather of its brand, rather in its colour or scent."""
        catalogue, last = self.catalogue, np.maximum(state.last, 0)
        fits = catalogue.goes_with[catalogue.type[last]][:, catalogue.type] & (state.last >= 0)[:, None]
        brand = np.where(catalogue.brand[last][:, None] == catalogue.brand, self.rules.same_brand, 1.0)
        variant = np.where(catalogue.variant[last][:, None] == catalogue.variant, self.rules.same_variant, 1.0)
        return _share(base * fits * brand * variant) * self.rules.companion

    def _taste(self, state: State, base: np.ndarray) -> np.ndarray:
        """A department by the day's taste; in it a main item or staple by popularity, brand and what is at home."""
        catalogue, rules = self.catalogue, self.rules
        loyal = np.exp(state.affinity) * (1 + rules.loyalty * state.brand_count)
        wanted = np.isin(catalogue.role, [ROLES.index("main"), ROLES.index("staple")])
        weights = base * wanted * loyal[:, catalogue.brand]
        owned = state.main > NEVER
        has_type = np.zeros((len(weights), len(catalogue.type_names)), bool)
        for model, item in zip(catalogue.model[self.mains], self.mains, strict=True):
            has_type[:, catalogue.type[item]] |= owned[:, model]
        second = np.where(has_type[:, catalogue.type[self.mains]], rules.second_machine, 1.0)
        before = catalogue.predecessor[catalogue.model[self.mains]]
        second = np.where(owned[:, before] & (before >= 0), rules.upgrade, second)
        weights[:, self.mains] *= second
        total = np.add.reduceat(weights, self.departments, axis=1)
        strength = _share(np.exp(state.taste) * (total > 0)) * rules.taste
        per_weight = np.divide(strength, total, out=np.zeros_like(total), where=total > 0)
        return weights * per_weight[:, catalogue.department]


@dataclass(frozen=True)
class Purchases:
    """What the users of a category bought; user u's are row u's first `lengths[u]`, oldest first.

    Attributes:
        items, days: [users, steps] item row and day (days before the end of the log; falls along a row).
        lengths: [users].
        probabilities: [users, I] float32, at the moment of the last purchase.
        taste, affinity: the latent taste [users, departments] at that moment and brand affinity [users, brands].
    """

    items: np.ndarray
    days: np.ndarray
    lengths: np.ndarray
    probabilities: np.ndarray
    taste: np.ndarray
    affinity: np.ndarray


def draw(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One item a row [users] by inverse transform of `uniform` [users] in [0, 1)."""
    cumulative = np.cumsum(probabilities, axis=1)
    return np.argmax(cumulative > (uniform * cumulative[:, -1])[:, None], axis=1)


def purchase_days(lengths: np.ndarray, same_day: float, rng: np.random.Generator) -> np.ndarray:
    """Days before the end of the log [users, steps]: most users are active late, gaps are log-normal, some are 0."""
    users, steps = len(lengths), lengths.max()
    end = np.minimum(rng.exponential(25.0, users), 700).astype(int)
    gaps = np.ceil(rng.lognormal(3.2, 0.8, (users, steps))).astype(int)
    gaps[rng.random(gaps.shape) < same_day] = 0
    gaps[np.arange(steps) >= lengths[:, None] - 1] = 0  # gap s lies between purchases s and s + 1
    return end[:, None] + np.cumsum(gaps[:, ::-1], axis=1)[:, ::-1]


def simulate(
    catalogue: Catalogue,
    users: int,
    min_purchases: int,
    max_purchases: int,
    same_day: float,
    rng: np.random.Generator,
    rules: Rules = Rules(),
    chunk: int = 2048,
) -> Purchases:
    """Lets `users` users buy between `min_purchases` and `max_purchases` items each.

    Results do not depend on `chunk`, the number of users computed at once: all chance is drawn beforehand.
    """
    shopper, memory = Shopper(catalogue, rules), rules.taste_memory
    lengths = np.minimum(min_purchases + rng.geometric(0.3, users) - 1, max_purchases)
    days = purchase_days(lengths, same_day, rng)
    steps, departments, brands = days.shape[1], len(shopper.departments), catalogue.brand.max() + 1
    liked = rng.normal(0, 0.5, departments)  # departments that everybody likes
    noise = rng.normal(0, rules.taste_spread, (steps, users, departments))
    affinity = rng.normal(0, rules.brand_spread, (users, brands))
    uniform = rng.random((steps, users))
    items = np.full((users, steps), -1)
    oracle = np.zeros((users, len(catalogue)), np.float32)
    final_taste = np.zeros((users, departments))
    for start in range(0, users, chunk):
        active = np.arange(start, min(start + chunk, users))
        drift = noise[0, active]
        state = State.start(catalogue, liked + drift, affinity[active], days[active, 0])
        for step in range(lengths[active].max()):
            probabilities = shopper.probabilities(state)
            items[active, step] = draw(probabilities, uniform[step, active])
            ends = lengths[active] == step + 1
            oracle[active[ends]] = probabilities[ends]
            final_taste[active[ends]] = state.taste[ends]
            state.buy(catalogue, items[active, step])
            state.keep(~ends)
            active, drift = active[~ends], drift[~ends]
            if active.size:
                drift = memory * drift + np.sqrt(1 - memory**2) * noise[step + 1, active]
                state.next_day(liked + drift, days[active, step + 1])
    return Purchases(items, days, lengths, oracle, final_taste, affinity)
