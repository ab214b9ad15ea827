"""Recent popularity, BM25 of the history, ItemKNN and EASE against their definitions, item by item in float64."""

import dataclasses
import math

import gin
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
from ranking_data import make_dataset

from calrec_jax import artifacts
from calrec_jax.baselines import split_name
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.baselines import BASELINES, baseline_settings, baseline_sources
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.counts import RecentPopularity, RecentPopularityConfig
from calrec_jax.rank.from_histories import FROM_HISTORIES
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.history_texts import BM25OfHistory, BM25OfHistoryConfig
from calrec_jax.rank.item_models import EASE, EASEConfig, ItemKNN, ItemKNNConfig
from calrec_jax.rank.ordering import order
from calrec_jax.rank.run import rank

DAY = 86_400
SPLITS = ("validation", "test")


@pytest.fixture(autouse=True)
def no_bindings():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    made = make_dataset(tmp_path_factory.mktemp("data") / "dataset", num_users=20, seed=3)
    rng = np.random.default_rng(4)
    times = np.concatenate([np.sort(rng.integers(0, 9, n)) for n in np.diff(made.offsets)])
    return dataclasses.replace(made, timestamps=times.astype(np.int64) * DAY)


@pytest.fixture(scope="module")
def users(dataset):
    return np.random.default_rng(5).permutation(len(dataset.user_ids))[:13]


def histories_of(dataset, split):
    return [dataset.history(user, split).tolist() for user in range(len(dataset.user_ids))]


def bought(dataset, split):
    """[U, I] who has what in the history."""
    matrix = np.zeros((len(dataset.user_ids), len(dataset.item_ids)))
    for user, history in enumerate(histories_of(dataset, split)):
        for item in history:
            matrix[user, item] = 1.0
    return matrix


def weighed(dataset, split, decay):
    """[U, I] the decay of each item since its latest purchase."""
    matrix = np.zeros((len(dataset.user_ids), len(dataset.item_ids)))
    for user, history in enumerate(histories_of(dataset, split)):
        for back, item in enumerate(reversed(history)):
            matrix[user, item] = max(matrix[user, item], decay**back)
    return matrix


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("days", [0.5, 1, 3, 100])
def test_recent_popularity_counts_the_window_before_each_users_last_purchase(dataset, users, split, days):
    scores = RecentPopularity(Histories(dataset, split), RecentPopularityConfig(days)).scores(users)
    expected = np.zeros((len(users), len(dataset.item_ids)))
    lengths = [len(history) for history in histories_of(dataset, split)]
    for row, user in enumerate(users):
        last = dataset.timestamps[dataset.offsets[user] + lengths[user] - 1]
        for other, length in enumerate(lengths):
            for at in range(dataset.offsets[other], dataset.offsets[other] + length):
                if last - days * DAY < dataset.timestamps[at] <= last:
                    expected[row, dataset.items[at]] += 1
    np.testing.assert_array_equal(scores.primary, expected)
    np.testing.assert_array_equal(scores.secondary[0], Histories(dataset, split).popularity)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_bm25_of_the_history_adds_the_decayed_scores_of_its_items(dataset, users, split, decay):
    index = BM25Index(dataset.texts)
    source = BM25OfHistory(Histories(dataset, split), index, dataset.texts, BM25OfHistoryConfig(decay))
    scores = source.scores(users).primary
    for row, user in enumerate(users):
        history = dataset.history(user, split)
        expected = np.zeros(len(dataset.item_ids))
        for back, item in enumerate(history[::-1]):
            expected += decay**back * index.scores([dataset.texts[item]])[0].astype(np.float64)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-12)


def test_bm25_of_the_history_without_decay_is_one_query_of_all_its_words(dataset, users):
    texts = [title or "" for title in dataset.attributes["title"]]
    index = BM25Index(texts)
    source = BM25OfHistory(Histories(dataset, "test"), index, texts, BM25OfHistoryConfig(1.0))
    queries = [" ".join(texts[item] for item in dataset.history(user, "test")) for user in users]
    np.testing.assert_allclose(source.scores(users).primary, index.scores(queries), rtol=1e-5)


def knn_reference(dataset, split, config):
    matrix = bought(dataset, split)
    norms = [math.sqrt(column.sum()) for column in matrix.T]
    num_items = len(norms)
    similar = np.zeros((num_items, num_items))
    for one in range(num_items):
        for other in range(num_items):
            together = (matrix[:, one] * matrix[:, other]).sum()
            if one != other and together:
                similar[one, other] = together / (norms[one] * norms[other] + config.shrinkage)
    for row in similar:
        least = np.sort(row)[::-1][min(config.neighbours, num_items) - 1]
        row[row < least] = 0.0
    return weighed(dataset, split, config.decay) @ similar


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("neighbours, shrinkage, decay", [(2, 0.0, 1.0), (3, 5.0, 0.7), (100, 1.0, 1.0)])
def test_item_knn(dataset, users, split, neighbours, shrinkage, decay):
    config = ItemKNNConfig(neighbours, shrinkage, decay)
    scores = ItemKNN(Histories(dataset, split), config).scores(users)
    np.testing.assert_allclose(scores.primary, knn_reference(dataset, split, config)[users], atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("regularisation, decay", [(0.5, 1.0), (20.0, 0.8)])
def test_ease_is_the_closed_form(dataset, users, split, regularisation, decay):
    config = EASEConfig(regularisation, decay)
    matrix = bought(dataset, split)
    inverse = np.linalg.inv(matrix.T @ matrix + regularisation * np.eye(matrix.shape[1]))
    weights = -inverse / np.diag(inverse)[None]
    np.fill_diagonal(weights, 0.0)
    expected = (weighed(dataset, split, decay) @ weights)[users]
    scores = EASE(Histories(dataset, split), config).scores(users).primary
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_ease_minimises_the_ridge_loss_column_by_column(dataset):
    """Each column solves its own regression on the other items, which is how the objective is defined."""
    matrix, strength = bought(dataset, "test"), 3.0
    source = EASE(Histories(dataset, "test"), EASEConfig(strength))
    scores = source.scores(np.arange(len(matrix))).primary
    for item in range(matrix.shape[1]):
        others = np.delete(np.arange(matrix.shape[1]), item)
        stacked = np.vstack([matrix[:, others], math.sqrt(strength) * np.eye(len(others))])
        target = np.concatenate([matrix[:, item], np.zeros(len(others))])
        solution = np.linalg.lstsq(stacked, target, rcond=None)[0]
        np.testing.assert_allclose(scores[:, item], matrix[:, others] @ solution, atol=1e-6)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.0, 2.0]))
def test_renaming_the_items_renames_their_scores(seed, neighbours, shrinkage):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 9)
    items = rng.integers(0, 8, lengths.sum()).astype(np.int32)
    new_name = rng.permutation(8).astype(np.int32)
    users = np.arange(9)
    for make in (
        lambda histories: ItemKNN(histories, ItemKNNConfig(neighbours, shrinkage)),
        lambda histories: EASE(histories, EASEConfig(1.5)),
    ):
        plain, renamed = (make(_histories(lengths, names)).scores(users).primary for names in (items, new_name[items]))
        np.testing.assert_allclose(plain, renamed[:, new_name], atol=1e-6)


def _histories(lengths, items):
    made = Histories.__new__(Histories)
    made.num_items, made.lengths = 8, lengths
    made._items, made._begins = items, np.cumsum(lengths) - lengths
    made._ends = made._begins + lengths
    return made


def test_what_a_suffix_leaves_out(dataset, users):
    for name in FROM_HISTORIES:
        made = baseline_sources([name, name + "_removed", name + "_new"], dataset, Histories(dataset, "test"))
        plain, removed, new = (made[key].scores(users).primary for key in (name, name + "_removed", name + "_new"))
        for row, user in enumerate(users):
            history = dataset.history(user, "test")
            for scores, gone in ((removed[row], {int(history[-1])}), (new[row], set(history.tolist()))):
                assert set(np.flatnonzero(scores == -np.inf)) == gone, name
                kept = np.setdiff1d(np.arange(len(scores)), list(gone))
                np.testing.assert_array_equal(scores[kept], plain[row, kept])


def test_names_and_their_suffixes():
    assert split_name("ease") == ("ease", "none") and split_name("last_item") == ("last_item", "none")
    assert split_name("last_item_removed") == ("last_item", "last") and split_name("ease_new") == ("ease", "all")
    assert set(BASELINES) == {name + end for name in FROM_HISTORIES for end in ("", "_removed", "_new")}


@pytest.mark.parametrize("name", FROM_HISTORIES)
def test_the_baseline_and_the_ranking_leave_out_the_same(tmp_path, dataset, name):
    histories = Histories(dataset, "test")
    source = baseline_sources([name + "_new"], dataset, histories, bm25_text="ranking")[name + "_new"]
    lists = order(source.scores(np.arange(20)))
    out = rank(tmp_path / "ranking", dataset, None, source=name, leave_out_history="all")
    table = pq.read_table(out / "part-00000.parquet").to_pylist()
    for row in table:
        user = list(dataset.user_ids).index(row["user_id"])
        assert row["item_ids"] == dataset.item_ids[lists.items[user]].tolist()


def test_settings_of_gin_reach_the_source_and_its_manifest(tmp_path, dataset, users):
    gin.parse_config("ItemKNNConfig.neighbours = 2\nEASEConfig.regularisation = 7.0")
    assert baseline_settings(["item_knn_new", "popularity", "ease", "ease_new"]) == {
        "item_knn": {"neighbours": 2, "shrinkage": ItemKNNConfig().shrinkage, "decay": ItemKNNConfig().decay},
        "ease": dataclasses.asdict(EASEConfig(7.0)),
    }
    out = rank(tmp_path / "ranking", dataset, None, source="item_knn")
    assert artifacts.read_manifest(out, kind="ranking")["settings"]["item_knn"]["neighbours"] == 2
    gin.parse_config("ItemKNNConfig.neighbours = 3")
    with pytest.raises(CalrecError, match="setting item_knn"):
        rank(out, dataset, None, source="item_knn")


def test_titles_alone_are_what_bm25_reads_when_asked(dataset, users):
    source = baseline_sources(["bm25_last"], dataset, Histories(dataset, "test"), bm25_text="title")["bm25_last"]
    texts = [(title or "").lower() for title in dataset.attributes["title"]]
    queries = [texts[dataset.history(user, "test")[-1]] for user in users]
    np.testing.assert_array_equal(source.scores(users).primary, BM25Index(texts).scores(queries))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RecentPopularityConfig(0), "RecentPopularityConfig.window_days=0: must be above 0"),
        (lambda: BM25OfHistoryConfig(1.1), "BM25OfHistoryConfig.decay=1.1: must be above 0 and at most 1"),
        (lambda: ItemKNNConfig(neighbours=0), "ItemKNNConfig.neighbours=0"),
        (lambda: ItemKNNConfig(shrinkage=-1.0), "ItemKNNConfig.shrinkage=-1.0: must be at least 0"),
        (lambda: ItemKNNConfig(decay=0.0), "ItemKNNConfig.decay=0.0: must be above 0 and at most 1"),
        (lambda: EASEConfig(regularisation=0.0), "EASEConfig.regularisation=0.0: must be above 0"),
        (lambda: EASEConfig(decay=2.0), "EASEConfig.decay=2.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(CalrecError) as caught:
        make()
    assert message in str(caught.value)


def test_ease_refuses_a_catalogue_that_is_too_large(dataset):
    with pytest.raises(CalrecError, match="17 × 17 items.*EASEConfig.max_items is 16: raise that"):
        EASE(Histories(dataset, "test"), EASEConfig(max_items=16))
    assert EASE(Histories(dataset, "test"), EASEConfig(max_items=17)).scores(np.arange(2)).primary.shape == (2, 17)
