"""Health of generation against counting by hand."""

import numpy as np
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax.evaluate.generation import read_generation, split_errors, summarise_generation
from calrec_jax.evaluate.metrics import TargetRanks
from calrec_jax.evaluate.places import Targets
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.histories import Histories


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("generation") / "d", num_users=30)


@pytest.fixture(scope="module")
def targets(dataset):
    return Targets(dataset, Histories(dataset, "test"), np.arange(30))


@pytest.fixture(scope="module")
def rows(dataset):
    """Users 25 to 29 have none; some reach their target, with space around it."""
    rows = completion_rows(dataset, seed=4)[:25]
    for user in range(0, 25, 4):
        rows[user]["texts"][2] = f" {dataset.texts[dataset.target(user, 'test')]}\n"
    rows[3]["texts"] = ["the same"] * 8
    rows[5]["finished"] = [False] * 8
    return rows


def test_numbers_are_counted_by_hand(tmp_path, dataset, targets, rows):
    found = read_generation(write_completions(tmp_path / "c", dataset, rows), targets)
    index = BM25Index(dataset.texts)
    catalogue = {text.strip() for text in dataset.texts}
    matches = index.scores([text for row in rows for text in row["texts"]]).any(axis=1).reshape(25, 8)
    for user, row in enumerate(rows):
        best = {}
        for text, value in zip(row["texts"], row["log_probs"], strict=True):
            best[text] = max(best.get(text, -np.inf), value)
        ordered = sorted(best.values(), reverse=True)
        target = dataset.texts[dataset.target(user, "test")].strip()
        assert found.distinct[user] == len(best)
        assert found.in_catalogue[user] == sum(text.strip() in catalogue for text in row["texts"])
        assert found.no_match[user] == (~matches[user]).sum()
        assert found.reached[user] == (target in [text.strip() for text in row["texts"]])
        if len(ordered) > 1:
            assert found.margins[user] == pytest.approx(ordered[0] - ordered[1], abs=1e-5)
        else:
            assert np.isnan(found.margins[user])
    assert found.decoded.tolist() == [True] * 25 + [False] * 5
    assert found.no_match.any() and found.in_catalogue.any() and found.reached[::4][:6].all()
    summary = summarise_generation(found, np.arange(30))
    assert (summary["users"], summary["users_without_completions"]) == (30, 5)
    assert summary["completions_a_user"] == 8 and summary["finished_share"] == pytest.approx(192 / 200)
    assert summary["catalogue_share"] == pytest.approx(found.in_catalogue.sum() / 200)
    assert summary["reached"] == pytest.approx(found.reached.sum() / 30), "of all users, decoded or not"
    assert summarise_generation(found, np.arange(25, 30))["catalogue_share"] is None


def test_a_constrained_decode_reaches_by_item(tmp_path, dataset, targets):
    rows = completion_rows(dataset, constrained=True, seed=1)
    wanted = dataset.item_ids[dataset.target(0, "test")]
    rows[0]["item_ids"][0] = wanted
    rows[0]["texts"] = ["anything"] * 8
    found = read_generation(write_completions(tmp_path / "c", dataset, rows), targets)
    for user, row in enumerate(rows):
        assert found.reached[user] == (dataset.item_ids[dataset.target(user, "test")] in row["item_ids"])


def test_errors_are_split_into_four(tmp_path, dataset, targets, rows):
    found = read_generation(write_completions(tmp_path / "c", dataset, rows), targets)
    rng = np.random.default_rng(0)
    ranks = TargetRanks(rng.integers(0, 16, 30), rng.integers(0, 3, 30), rng.random(30) < 0.8, 17)
    cases = split_errors(found, ranks, np.arange(30))
    expected = dict.fromkeys(cases, 0)
    for user in range(30):
        hit = ranks.found[user] and 1 + ranks.n_greater[user] + ranks.n_equal[user] / 2 <= 10
        expected[f"{'reached' if found.reached[user] else 'not_reached'}_{'hit' if hit else 'miss'}"] += 1
    assert cases == expected and min(cases.values()) > 0
