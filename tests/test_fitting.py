"""Fusion weights fitted on validation rankings: the metric against a slow reference, the search, every refusal."""

import itertools

import numpy as np
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.metrics import target_ranks
from calrec_jax.rank import fitting
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.run import rank
from calrec_jax.rank.shards import RankingReader

NAMES = {"transitions": 1.0, "bm25_last": 1.0, "popularity": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", num_users=30, seed=2)


@pytest.fixture(scope="module")
def rankings(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("rankings")
    for split, name in itertools.product(("validation", "test"), NAMES):
        rank(folder / f"{split}-{name}", dataset, None, split=split, source=name)
    return folder


def gather(rankings, dataset, **options):
    readers = {name: RankingReader(rankings / f"validation-{name}", dataset) for name in NAMES}
    histories = Histories(dataset, "validation")
    return fitting.gather(readers, histories.users, histories.targets[histories.users], **options)


def ndcg_of(folder, dataset):
    targets = Histories(dataset, "validation").targets
    scores = np.full((len(targets), len(dataset.item_ids)), -np.inf)
    for lists in RankingReader(folder, dataset).blocks():
        scores[lists.users[:, None], lists.items] = lists.scores
    ranks = target_ranks(targets, scores)
    places = 1 + ranks.n_greater + ranks.n_equal / 2
    return np.where(places <= 10, 1 / np.log2(1 + places), 0).mean()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.1, 0.0), (0.0, 0.0, 2.0)])
def test_the_searched_metric_is_that_of_the_written_fusion(tmp_path, rankings, dataset, weights):
    fuse = dict(zip(NAMES, weights, strict=True))
    for name in NAMES:
        (tmp_path / f"validation-{name}").symlink_to(rankings / f"validation-{name}")
    fused = rank(tmp_path / "validation-fused", dataset, None, split="validation", source="fusion", fuse=fuse)
    found = fitting.ndcg(gather(rankings, dataset), np.array(weights))
    assert found == pytest.approx(ndcg_of(fused, dataset), abs=1e-12)


def test_only_first_places_and_the_target_compete(rankings, dataset):
    candidates = gather(rankings, dataset, first_places=2)
    assert (np.diff(candidates.starts) <= 1 + 2 * len(NAMES)).all() and candidates.gains.max() <= 1 / 61


def test_the_fit_is_no_worse_than_a_grid_and_the_same_again(rankings, dataset):
    candidates = gather(rankings, dataset)
    weights, value = fitting.fit(candidates, np.ones(3))
    assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    assert value == fitting.ndcg(candidates, weights)
    alone = [fitting.ndcg(candidates, row) for row in np.eye(3)]
    assert value >= max(*alone, fitting.ndcg(candidates, np.ones(3)))
    again, _ = fitting.fit(candidates, np.ones(3))
    np.testing.assert_array_equal(weights, again)


def test_fitted_weights_rank_the_test_split_and_stand_in_the_manifest(rankings, dataset):
    out = rank(rankings / "test-fit", dataset, None, source="fusion", fuse=NAMES, fuse_weights="fit")
    manifest = artifacts.read_manifest(out, kind="ranking")
    weights, value = fitting.fit(gather(rankings, dataset), np.ones(3))
    assert manifest["weights"] == dict(zip(NAMES, weights.tolist(), strict=True))
    assert manifest["fit_ndcg@10"] == value
    assert set(manifest["made_from"]) == {
        "dataset",
        *(f"ranking {name}" for name in NAMES),
        *(f"validation ranking {name}" for name in NAMES),
    }
    same = rank(rankings / "test-given", dataset, None, source="fusion", fuse=manifest["weights"])
    assert (out / "part-00000.parquet").read_bytes() == (same / "part-00000.parquet").read_bytes()


def test_weights_are_fitted_on_the_users_whom_all_validation_rankings_list(tmp_path, rankings, dataset):
    rows = completion_rows(dataset)
    for split, some in (("validation", rows[4:15]), ("test", rows)):
        (tmp_path / f"{split}-popularity").symlink_to(rankings / f"{split}-popularity")
        written = write_completions(tmp_path / split, dataset, some, split=split)
        rank(tmp_path / f"{split}-texts", dataset, written, split=split, missing="skip")
    out = rank(
        tmp_path / "test-fit", dataset, None, source="fusion", fuse={"popularity": 1, "texts": 1}, fuse_weights="fit"
    )
    manifest = artifacts.read_manifest(out, kind="ranking")
    readers = {name: RankingReader(tmp_path / f"validation-{name}", dataset) for name in ("popularity", "texts")}
    users = np.sort(readers["texts"].users)
    assert manifest["fit_users"] == len(users) == 11 and manifest["users"] == len(dataset.user_ids)
    candidates = fitting.gather(readers, users, Histories(dataset, "validation").targets[users])
    weights, value = fitting.fit(candidates, np.ones(2))
    assert manifest["weights"] == dict(zip(readers, weights.tolist(), strict=True))
    assert manifest["fit_ndcg@10"] == value


def test_weights_are_never_fitted_on_test_rankings(tmp_path, rankings, dataset):
    for name in NAMES:
        for split in ("validation", "test"):
            (tmp_path / f"{split}-{name}").symlink_to(rankings / f"test-{name}")
    with pytest.raises(CalrecError, match="never on test users"):
        rank(tmp_path / "test-fused", dataset, None, source="fusion", fuse=NAMES, fuse_weights="fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fuse": {"a": 1.0}, "fuse_weights": "best"}, "rank.fuse_weights is 'best'"),
        ({"fuse": {"a": -1.0}}, r"weights \[-1\.0\]: they must be numbers from 0"),
        ({"fuse": {"a": 0.0}}, "not all 0"),
        ({"source": "popularity", "fuse_weights": "fit"}, "fuse_weights='fit' needs rank.source='fusion'"),
    ],
    ids=str,
)
def test_settings_of_the_fit_are_checked(tmp_path, dataset, settings, message):
    with pytest.raises(CalrecError, match=message):
        rank(tmp_path / "ranking", dataset, None, **{"source": "fusion", **settings})


def test_a_missing_validation_ranking_is_named(tmp_path, rankings, dataset):
    (tmp_path / "test-popularity").symlink_to(rankings / "test-popularity")
    with pytest.raises(CalrecError, match="needs the ranking popularity of the validation split.*--split=validation"):
        rank(tmp_path / "test-f", dataset, None, source="fusion", fuse={"popularity": 1.0}, fuse_weights="fit")
