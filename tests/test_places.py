"""Views of a ranking, its top, slices and what lists hold: each against a slow reference, item by item."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from ranking_data import make_dataset

from calrec_jax.data.dataset import save_dataset
from calrec_jax.data.templates import Template
from calrec_jax.evaluate.beyond import Catalogue, beyond_hits
from calrec_jax.evaluate.places import TOP, VIEWS, Targets, places_of_lists, places_of_source
from calrec_jax.evaluate.slices import head_items, make_slices, training_purchases
from calrec_jax.rank.bm25 import BM25Tokenizer
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import Scores, order
from calrec_jax.rank.shards import RankedLists


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twelve items of seven texts, repeats everywhere."""
    rng = np.random.default_rng(0)
    items = [
        {"item_id": f"i{k:02}", "title": f"thing {k % 7}", "category": ["Tools", "Glue", None][k % 7 % 3],
         "brand": None, "price": None}
        for k in range(12)
    ]  # fmt: skip
    lengths = rng.integers(3, 12, 40)
    sequences = {
        "user_id": [f"u{user:02}" for user in range(40)],
        "item_ids": [[f"i{k:02}" for k in rng.integers(0, 12, length)] for length in lengths],
        "timestamps": [list(range(length)) for length in lengths],
        "valid_position": (lengths - 2).astype(np.int32),
        "test_position": (lengths - 1).astype(np.int32),
    }
    return save_dataset(
        tmp_path_factory.mktemp("places") / "d", name="Things", items=pa.Table.from_pylist(items),
        sequences=pa.table(sequences), template=Template(), card={}, made_from={}, settings={},
    )  # fmt: skip


def ask(dataset, users=None, split="test"):
    users = np.arange(len(dataset.user_ids)) if users is None else users
    return Targets(dataset, Histories(dataset, split), users)


class Given:
    """A source of given scores."""

    def __init__(self, primary, secondary=None, sources=None):
        self.all = (primary, secondary, sources)

    def scores(self, users):
        return Scores(*(part if part is None or len(part) == 1 else part[users] for part in self.all))


def scored(seed, second=False, users=40):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 4, (users, 12)).astype(float),
            rng.integers(0, 3, (users, 12)).astype(float) if second else None)  # fmt: skip


def reference(dataset, user, keys, view):
    """(items before, items tied, found) of one user's target, keys being (primary, secondary) of each item."""
    target = dataset.target(user, "test")
    history = dataset.history(user, "test").tolist()
    gone = {"as_it_stands": [], "equal_text": [], "last_left_out": history[-1:], "history_left_out": history}[view]
    if target in gone:
        return 0, 0, False
    own = [target]
    if view == "equal_text":
        own = [item for item in range(12) if dataset.texts[item] == dataset.texts[target]]
    best = max(keys[item] for item in own)
    rest = [item for item in range(12) if item not in gone and item not in own]
    return sum(keys[item] > best for item in rest), sum(keys[item] == best for item in rest), True


@pytest.mark.parametrize("second", [False, True])
def test_views_of_scores_are_those_of_the_definition(dataset, second):
    primary, secondary = scored(1, second)
    places = places_of_source(Given(primary, secondary), ask(dataset))
    seen = set()
    for user, view in itertools.product(range(40), VIEWS):
        keys = [(primary[user, k], 0.0 if secondary is None else secondary[user, k]) for k in range(12)]
        ranks = places.views[view]
        own = (ranks.n_greater[user], ranks.n_equal[user], bool(ranks.found[user]))
        assert own == reference(dataset, user, keys, view), (user, view)
        seen.add((view, own[2]))
    assert len(seen) == 6, "targets that were bought before, last or earlier, occur"


def as_lists(dataset, primary, secondary, depth, users):
    made = order(Scores(primary[users], None if secondary is None else secondary[users]), depth)
    lengths = np.full(len(users), made.items.shape[1])
    return RankedLists(users, made.items, made.scores, lengths, made.ties_beyond_depth, made.sources)


@pytest.mark.parametrize("second", [False, True])
def test_lists_of_the_whole_catalogue_give_the_places_of_the_scores(dataset, second):
    primary, secondary = scored(2, second)
    targets = ask(dataset)
    one = places_of_source(Given(primary, secondary), targets)
    halves = [np.arange(20, 40), np.arange(20)]
    other = places_of_lists((as_lists(dataset, primary, secondary, None, users) for users in halves), targets)
    for view in VIEWS:
        for name in ("n_greater", "n_equal", "found"):
            np.testing.assert_array_equal(getattr(one.views[view], name), getattr(other.views[view], name), view)
    np.testing.assert_array_equal(one.top_items, other.top_items)
    assert one.ranks.depth == other.ranks.depth == 12


def test_lists_that_are_cut_miss_what_is_beyond(dataset):
    primary, _ = scored(3)
    targets = ask(dataset)
    whole = places_of_source(Given(primary), targets)
    cut = places_of_lists([as_lists(dataset, primary, None, 4, np.arange(40))], targets)
    top4 = np.argsort(-primary, axis=1, kind="stable")[:, :4]
    reached = (top4 == targets.items[:, None]).any(axis=1)
    np.testing.assert_array_equal(cut.ranks.found, reached)
    np.testing.assert_array_equal(cut.ranks.n_greater[reached], whole.ranks.n_greater[reached])
    np.testing.assert_array_equal(cut.ranks.n_equal[reached], whole.ranks.n_equal[reached])
    left = cut.views["history_left_out"]
    np.testing.assert_array_equal(left.found, reached & ~targets.in_history)
    assert (left.n_greater <= cut.ranks.n_greater).all() and cut.ranks.depth == 4


def test_users_who_are_not_evaluated_are_passed_over(dataset):
    primary, _ = scored(4)
    some = np.array([3, 7, 8, 31])
    everybody, few = ask(dataset), ask(dataset, some)
    whole = places_of_source(Given(primary), everybody)
    part = places_of_lists([as_lists(dataset, primary, None, None, np.arange(40))], few)
    for view in VIEWS:
        np.testing.assert_array_equal(part.views[view].n_greater, whole.views[view].n_greater[some])
        np.testing.assert_array_equal(part.views[view].found, whole.views[view].found[some])
    assert part.listed.all() and len(part.listed) == 4


def test_the_top_is_ordered_by_both_keys_and_keeps_sources(dataset):
    primary, secondary = scored(5, True)
    sources = np.random.default_rng(0).integers(0, 9, (40, 12)).astype(np.int16)
    places = places_of_source(Given(primary, secondary, sources), ask(dataset))
    for user in range(40):
        expected = sorted(range(12), key=lambda k: (-primary[user, k], -secondary[user, k], k))[:TOP]
        assert places.top_items[user].tolist() == expected
        assert places.top_sources[user].tolist() == sources[user, expected].tolist()


def test_a_catalogue_smaller_than_the_top(tmp_path):
    small = make_dataset(tmp_path / "d", num_users=5)
    few = np.random.default_rng(0).random((5, len(small.item_ids)))
    targets = Targets(small, Histories(small, "test"), np.arange(5))
    places = places_of_source(Given(few), targets)
    kept = min(TOP, few.shape[1])
    np.testing.assert_array_equal(places.top_items[:, :kept], np.argsort(-few, axis=1)[:, :kept])


def test_training_purchases_are_those_before_the_validation_target(dataset):
    users, items = training_purchases(dataset)
    expected = [(user, item) for user in range(40) for item in dataset.train_items(user).tolist()]
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == expected


def test_slices_divide_everybody(dataset):
    targets = ask(dataset)
    slices = {each.name: each for each in make_slices(targets)}
    assert list(slices) == ["history_length", "target_frequency", "repeat", "category", "equal_text"]
    for each in slices.values():
        np.testing.assert_array_equal(np.sum(list(each.groups.values()), axis=0), np.ones(40), each.name)
    counts = np.zeros(12, int)
    for user in range(40):
        for item in dataset.train_items(user):
            counts[item] += 1
    for user in range(40):
        target, history = dataset.target(user, "test"), dataset.history(user, "test")
        own = {
            name: next(group for group, inside in each.groups.items() if inside[user]) for name, each in slices.items()
        }
        low, _, high = own["history_length"].partition(" to ")
        assert int(low.rstrip("+")) <= len(history) <= int(high or 999 if "+" in low else high or low)
        assert (own["repeat"] == "repeat") == (target in history)
        assert (own["target_frequency"] == "never seen") == (counts[target] == 0)
        assert (own["target_frequency"] == "rare") == (1 <= counts[target] <= 5)
        assert own["category"] == (dataset.attributes["category"][target] or "none")
        assert (own["equal_text"] == "shared text") == (dataset.texts.count(dataset.texts[target]) > 1)


def test_the_head_is_half_of_the_purchases():
    assert head_items(np.array([50, 20, 20, 10])).tolist() == [True, False, False, False]
    assert head_items(np.array([40, 30, 30, 0])).tolist() == [True, True, True, False], "as often as the last: in, too"
    assert not head_items(np.zeros(3, int)).any()


def test_many_categories_are_joined_and_an_empty_table_has_none(dataset):
    import dataclasses

    renamed = dataclasses.replace(
        dataset, attributes={**dataset.attributes, "category": [f"c{k}" for k in range(11)] + ["other"]}
    )
    groups = next(each for each in make_slices(ask(renamed)) if each.name == "category").groups
    assert len(groups) == 11 and np.sum(list(groups.values()), axis=0).tolist() == [1] * 40
    without = dataclasses.replace(dataset, attributes={})
    assert list(next(each for each in make_slices(ask(without)) if each.name == "category").groups) == ["none"]


def test_what_lists_hold_equals_a_slow_reference(dataset):
    primary, _ = scored(6)
    places = places_of_source(Given(primary), ask(dataset))
    rows = np.array([0, 4, 5, 17, 30])
    own = beyond_hits(places, rows, Catalogue(dataset), 4)
    lists = np.argsort(-primary[rows], axis=1, kind="stable")[:, :4]
    bought = [dataset.train_items(user).tolist() for user in range(40)]
    count = [sum(items.count(k) for items in bought) for k in range(12)]
    buyers = [sum(k in items for items in bought) for k in range(12)]
    words = [set(BM25Tokenizer()(text)) for text in dataset.texts]
    distances = [
        np.mean([1 - len(words[a] & words[b]) / len(words[a] | words[b]) for a, b in itertools.combinations(row, 2)])
        for row in lists
    ]
    flat = lists.ravel()
    usual = sum(c * c for c in count) / sum(count)
    expected = {
        "coverage": len(set(flat.tolist())) / 12,
        "popularity": np.mean([count[k] for k in flat]),
        "popularity_lift": np.mean([count[k] for k in flat]) / usual,
        "novelty": np.mean([-math.log2(max(buyers[k], 1) / 40) for k in flat]),
        "diversity": np.mean(distances),
    }
    assert own == pytest.approx(expected, abs=1e-12)
    assert 0 < own["diversity"] < 1


def test_lists_of_nobody_hold_nothing(dataset):
    places = places_of_lists([], ask(dataset))
    assert set(beyond_hits(places, np.arange(40), Catalogue(dataset), 5).values()) == {None}
    with pytest.raises(ValueError, match="k=11"):
        beyond_hits(places, np.arange(40), Catalogue(dataset), 11)
