"""Short lists, made without scoring the whole catalogue, are the beginnings of long ones, bit for bit."""

import dataclasses

import numpy as np
import pytest

from calrec_jax.errors import CalrecError
from calrec_jax.rank import ordering, sources
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.first_places import FirstPlaces
from calrec_jax.rank.ordering import Scores, order
from calrec_jax.rank.round_robin import RoundRobin, RoundRobinConfig, round_robin_scores
from calrec_jax.rank.user_texts import UserTexts

NUM_ITEMS = 300


def whole_order(scores, depth):
    """`order` by sorting everything, cut afterwards."""
    lists = order(scores, None)
    beyond = (lists.scores[:, depth:] == lists.scores[:, depth - 1 : depth]).sum(axis=1)
    return lists.items[:, :depth], lists.scores[:, :depth], lists.sources[:, :depth], beyond


def assert_same(lists, expected):
    for own, theirs in zip(lists, expected, strict=True):
        np.testing.assert_array_equal(own, theirs)


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    made = ["shop " + " ".join(f"w{int(x)}" for x in rng.zipf(1.4, rng.integers(1, 9)) % 90) for _ in range(NUM_ITEMS)]
    made[7] = made[8] = made[150]
    return made


def completions(texts, seed, num_users=20):
    """Nested texts and log-probabilities: items' own texts, pieces of two, nonsense, repeats, and users without any."""
    rng = np.random.default_rng(seed)
    made = []
    for user in range(num_users):
        own = [texts[rng.integers(NUM_ITEMS)], f"{texts[rng.integers(NUM_ITEMS)][:12]} w{rng.integers(90)}", "zzz", ""]
        own += [own[0], texts[7], f"w{rng.integers(90)} w3"] if user % 3 else []
        made.append(own if user else ["zzz"])
    made.append([])
    return made, [(-rng.exponential(40, len(own))).tolist() for own in made]


@pytest.mark.parametrize("depth", [1, 10, 70])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scaling": "max", "ties": "none"},
        {"scaling": "none", "repeats": "all"},
        {"exact_text_first": True},
    ],
    ids=str,
)
def test_first_places_are_those_of_all_scores(texts, depth, settings):
    config = RoundRobinConfig(**settings)
    index, own = BM25Index(texts), UserTexts.of(*completions(texts, depth))
    users = np.arange(len(own.starts) - 1)
    rng = np.random.default_rng(1)
    left_out = [np.sort(rng.choice(NUM_ITEMS, int(size), replace=False)) for size in rng.integers(0, 30, len(users))]
    left_out[5] = np.arange(150)  # more than there is room for
    rows = np.repeat(users, [len(items) for items in left_out])
    items = np.concatenate(left_out)
    round_robin = RoundRobin(index, own, 1 / 50, config=config, texts=texts)
    expected = whole_order(round_robin.scores(users).leave_out(rows, items), depth)
    short = FirstPlaces(RoundRobin(index, own, 1 / 50, config=config, texts=texts))
    blocks = []
    for at in range(0, len(users), 8):
        inside = (rows >= at) & (rows < at + 8)
        blocks.append(short.first(users[at : at + 8], depth, rows[inside] - at, items[inside]))
    assert_same([np.concatenate(parts) for parts in zip(*blocks, strict=True)], expected)
    assert 2 <= short.num_long < len(users)  # the user without texts, the one without a match, and who leaves out much
    assert short.num_scored == len(own.texts) < len(own.codes)  # each distinct text once


def test_which_lists_are_short():
    assert sources.is_short(10, 40) and not sources.is_short(11, 40)


@pytest.mark.parametrize("secondary", [None, "shared", "own"])
def test_selecting_before_sorting_gives_the_same_lists(secondary):
    rng = np.random.default_rng(0)
    primary = rng.integers(0, 40, (6, 200)) / 40
    primary[0] = 0.5  # all tied
    primary[1, rng.random(200) < 0.95] = -np.inf
    second = {None: None, "shared": rng.integers(0, 3, (1, 200)) * 1.0, "own": rng.integers(0, 3, (6, 200)) * 1.0}
    scores = Scores(primary, second[secondary], rng.integers(0, 9, (6, 200)).astype(np.int16))
    for depth in (1, 7, 50):
        assert depth * ordering._SELECT_FIRST <= 200
        lists = order(scores, depth)
        assert_same(lists, whole_order(scores, depth))
        assert lists.items.dtype == np.int32 and lists.sources.dtype == np.int16


def test_selecting_refuses_nan():
    scores = np.zeros((1, 200))
    scores[0, 150] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        order(Scores(scores), 3)


@pytest.mark.parametrize("with_popularity", [False, True])
def test_the_tower_multiplies_the_catalogue_in_blocks(monkeypatch, with_popularity):
    rng = np.random.default_rng(0)
    items = rng.integers(-2, 3, (NUM_ITEMS, 4)).astype(np.float32)  # many ties
    vectors = rng.integers(-2, 3, (9, 4)).astype(np.float32)
    popularity = rng.integers(0, 4, NUM_ITEMS) * 1.0 if with_popularity else None
    tower = sources.Tower(vectors, items, popularity)
    users = np.array([8, 0, 3, 4])
    rows, left_out = np.array([0, 0, 2]), np.array([5, 250, 17])
    expected = whole_order(tower.scores(users).leave_out(rows, left_out), 11)
    for size in (7, 64, 1000):
        monkeypatch.setattr(sources, "ITEMS_A_BLOCK", size)
        assert_same(tower.first(users, 11, rows, left_out), expected)
    everything = np.repeat(np.arange(4), NUM_ITEMS), np.tile(np.arange(NUM_ITEMS), 4)
    assert_same(tower.first(users, 11, *everything), whole_order(tower.scores(users).leave_out(*everything), 11))


def reference(index, texts, own_texts, log_probs, epsilon, config):
    """Scores and first choices of one user in plain NumPy, text by text, as the settings say."""
    best, firsts = np.zeros(len(texts)), np.zeros(len(texts))
    for text in dict.fromkeys(own_texts):
        scores = index.scores([text])[0].astype(np.float64)
        exact = [item for item, other in enumerate(texts) if other == text]
        if config.exact_text_first and exact:
            scores[exact] = np.nextafter(np.float32(scores.max()), np.float32(np.inf))
        low = scores.min() if config.scaling == "min_max" else 0.0
        span = {"min_max": scores.max() - low, "max": scores.max(), "none": 1.0}[config.scaling]
        if scores.max() - low <= 0:
            continue
        times = own_texts.count(text)
        most = max(p for other, p in zip(own_texts, log_probs, strict=True) if other == text)
        best = np.maximum(best, np.exp(epsilon * most) * (scores - low) / span)
        firsts += (scores == scores.max()) * (times if config.repeats == "all" else 1)
    return best, firsts if config.ties == "first_choices" else np.zeros(len(texts))


@pytest.mark.parametrize("field", dataclasses.fields(RoundRobinConfig), ids=lambda field: field.name)
def test_each_choice_that_the_paper_leaves_open(texts, field):
    other = {"scaling": "none", "ties": "none", "repeats": "all", "exact_text_first": True}
    config = RoundRobinConfig(**{field.name: other[field.name]})
    nested, log_probs = completions(texts, 3)
    index, own = BM25Index(texts), UserTexts.of(nested, log_probs)
    scores = RoundRobin(index, own, 0.01, config=config, texts=texts).scores(np.arange(len(nested)))
    plain = round_robin_scores(index, nested, log_probs, epsilon=0.01)
    changed = (scores.primary != plain.primary).any() or scores.secondary is None
    assert changed or (scores.secondary != plain.secondary).any()
    for user, (own_texts, own_probs) in enumerate(zip(nested, log_probs, strict=True)):
        best, firsts = reference(index, texts, own_texts, own_probs, 0.01, config)
        np.testing.assert_allclose(scores.primary[user], best, rtol=1e-12)
        if scores.secondary is not None:
            np.testing.assert_array_equal(scores.secondary[user], firsts)


def test_an_unknown_choice_is_named():
    with pytest.raises(CalrecError, match=r"RoundRobinConfig\.scaling is 'softmax': choose one of"):
        RoundRobinConfig(scaling="softmax")
