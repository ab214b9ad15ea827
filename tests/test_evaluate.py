"""The verb `evaluate`: numbers against a slow reference from the shards, misses, the oracle, files and refusals."""

import json
import math
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax import artifacts
from calrec_jax.data.prepare import prepare
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.baselines import BASELINES, baseline_sources
from calrec_jax.evaluate.bootstrap import holm, paired
from calrec_jax.evaluate.metrics import TIES, metric_names, per_user_metrics, ranking_metrics
from calrec_jax.evaluate.places import AS_IT_STANDS, Targets, places_of_source
from calrec_jax.evaluate.run import evaluate, ranking_places
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import written_scores
from calrec_jax.rank.round_robin import round_robin_scores
from calrec_jax.rank.run import FROM_HISTORIES, rank

NAMES = metric_names()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", num_users=30)


@pytest.fixture(scope="module")
def rows(dataset):
    return completion_rows(dataset, seed=2)


@pytest.fixture
def run(tmp_path, dataset, rows):
    """A run folder with completions and two rankings."""
    completions = write_completions(tmp_path / "completions" / "test-sample", dataset, rows)
    return {
        "calrec": rank(tmp_path / "rankings" / "test-calrec", dataset, completions),
        "short": rank(tmp_path / "rankings" / "test-short", dataset, completions, depth=3),
    }


def everybody(dataset):
    return Targets(dataset, Histories(dataset, "test"), np.arange(len(dataset.user_ids)))


def row_of(metrics, name):
    return next(row for row in metrics["rows"] if row["name"] == name)


def mean_rank_reference(folder, dataset):
    """NDCG@10, MRR and Recall@5 by mean rank, user by user from the shards."""
    values = []
    for shard in sorted(folder.glob("part-*.parquet")):
        for user in pq.read_table(shard).to_pylist():
            target = dataset.item_ids[dataset.target(list(dataset.user_ids).index(user["user_id"]), "test")]
            depth = len(user["item_ids"])
            if target not in user["item_ids"]:
                values.append([0.0, 0.0, 0.0])
                continue
            own = user["scores"][user["item_ids"].index(target)]
            equal = user["scores"].count(own) + (user["ties_beyond_depth"] if own == user["scores"][-1] else 0)
            place = sum(score > own for score in user["scores"]) + (equal + 1) / 2
            found = place <= depth
            values.append([found * (place <= 10) / math.log2(1 + place), found / place, float(found and place <= 5)])
    return np.sum(values, axis=0) / len(dataset.user_ids)


def test_numbers_are_those_of_a_slow_reference(tmp_path, dataset, run):
    metrics = evaluate(tmp_path / "report", dataset, run, resamples=50)
    for name, folder in run.items():
        own = row_of(metrics, name)["metrics"]
        expected = mean_rank_reference(folder, dataset)
        assert [own["ndcg@10"], own["mrr"], own["recall@5"]] == pytest.approx(expected.tolist(), abs=1e-12), name
    assert metrics["depth"] == 3 and row_of(metrics, "calrec")["depth"] == 17
    assert row_of(metrics, "short")["targets_not_found"] > 0
    assert [row["name"] for row in metrics["rows"]] == [
        "popularity",
        "last_item",
        "transitions",
        "bm25_last",
        "calrec",
        "short",
    ]
    for row in metrics["rows"]:
        assert set(row["ties"]) == set(TIES) and row["ties"]["mean_rank"] == row["metrics"]
        for name, (low, high) in row["interval"].items():
            assert low <= row["metrics"][name] <= high or math.isclose(low, high), (row["name"], name)


def test_files_hold_what_is_returned(tmp_path, dataset, run):
    out = tmp_path / "report"
    metrics = evaluate(out, dataset, run, resamples=20)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    table = pq.read_table(out / "per_user.parquet").to_pylist()
    assert len(table) == 30 * 6
    for row in metrics["rows"]:
        own = [user for user in table if user["name"] == row["name"]]
        assert [user["user_id"] for user in own] == list(dataset.user_ids)
        for name in NAMES:
            assert np.mean([user[name] for user in own]) == pytest.approx(row["metrics"][name], abs=1e-12)
        missed = [user for user in own if user["rank_optimistic"] is None]
        assert len(missed) == row["targets_not_found"]
        assert all(user["mrr"] == 0 and user["rank_pessimistic"] is None for user in missed)
        assert all(1 <= user["rank_optimistic"] <= user["rank_pessimistic"] for user in own if user not in missed)
    assert (out / "report.html").stat().st_size > 1000
    manifest = artifacts.read_manifest(out, kind="report")
    assert set(manifest["made_from"]) == {"dataset", "ranking calrec", "ranking short"}


def test_the_same_inputs_give_the_same_bytes_and_a_done_report_is_skipped(tmp_path, dataset, run, capsys):
    one, two = tmp_path / "report", tmp_path / "report-again"
    first = evaluate(one, dataset, run, resamples=20)
    evaluate(two, dataset, run, resamples=20)
    for name in ("metrics.json", "per_user.parquet", "report.html", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    before = (one / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    assert evaluate(one, dataset, run, resamples=20) == first
    assert (one / "metrics.json").stat().st_mtime_ns == before
    assert "bm25_last" in capsys.readouterr().out
    with pytest.raises(CalrecError, match="resamples"):
        evaluate(one, dataset, run, resamples=21)


def test_the_table_shows_the_numbers(tmp_path, dataset, run, capsys):
    metrics = evaluate(tmp_path / "report", dataset, run, resamples=20)
    printed = capsys.readouterr().out
    for row in metrics["rows"]:
        line = next(line for line in printed.splitlines() if line.strip().startswith(row["name"] + " "))
        for name in ("recall@1", "recall@50", "ndcg@10", "mrr"):
            assert f"{row['metrics'][name]:.4f}".removeprefix("0") in line
        assert "–".join(f"{bound:.4f}".removeprefix("0") for bound in row["interval"]["ndcg@10"]) in line


def ranks_of(source, dataset, histories):
    """Ranks of the targets as `evaluate` finds them, nothing left out."""
    return places_of_source(source, Targets(dataset, histories, histories.users)).views[AS_IT_STANDS]


def test_ranking_metrics_of_the_written_scores_equal_the_verbs(tmp_path, dataset, rows, run):
    columns = [[row[name] for row in rows] for name in ("texts", "log_probs")]
    scores = written_scores(round_robin_scores(BM25Index(dataset.texts), *columns))
    targets = np.array([dataset.target(user, "test") for user in range(len(dataset.user_ids))])
    metrics = evaluate(tmp_path / "report", dataset, run, resamples=20)
    for ties in TIES:
        assert ranking_metrics(targets, scores, ties=ties) == row_of(metrics, "calrec")["ties"][ties]


@pytest.mark.parametrize("name", FROM_HISTORIES)
def test_a_baseline_and_the_ranking_of_the_same_source_agree(tmp_path, dataset, name):
    histories = Histories(dataset, "test")
    source = baseline_sources([name], dataset, histories, bm25_text="ranking")[name]
    folder = rank(tmp_path / "test-same", dataset, None, source=name)
    places = ranking_places(folder, everybody(dataset))
    ranks, listed = places.ranks, places.listed
    own = ranks_of(source, dataset, histories)
    np.testing.assert_array_equal(ranks.n_greater, own.n_greater)
    np.testing.assert_array_equal(ranks.n_equal, own.n_equal)
    assert listed.all() and own.found.all()
    metrics = evaluate(
        tmp_path / "report", dataset, {"same": folder}, baselines=[name], bm25_text="ranking", resamples=9
    )
    assert [row["kind"] for row in metrics["rows"]] == ["baseline", "baseline"]
    assert metrics["rows"][0]["metrics"] == metrics["rows"][1]["metrics"]


def test_removed_baselines_have_the_last_item_at_the_bottom(dataset):
    histories = Histories(dataset, "test")
    users = np.arange(len(dataset.user_ids))
    made = baseline_sources(["blend", "blend_removed"], dataset, histories)
    plain, removed = (source.scores(users).primary for source in made.values())
    for user in users:
        last = dataset.history(user, "test")[-1]
        assert removed[user, last] == -np.inf
        np.testing.assert_array_equal(np.delete(removed[user], last), np.delete(plain[user], last))


def test_users_without_a_ranking_are_misses_or_left_out_as_asked(tmp_path, dataset, rows):
    completions = write_completions(tmp_path / "completions" / "test-some", dataset, rows[:20])
    rankings = {"some": rank(tmp_path / "test-some", dataset, completions, missing="skip")}
    whole = evaluate(tmp_path / "whole", dataset, rankings, resamples=20)
    part = evaluate(tmp_path / "part", dataset, rankings, users="ranked", resamples=20)
    assert (whole["users"], part["users"]) == (30, 20)
    assert (row_of(whole, "some")["users_without_ranking"], row_of(part, "some")["users_without_ranking"]) == (10, 0)
    for name in NAMES:
        assert row_of(whole, "some")["metrics"][name] == pytest.approx(row_of(part, "some")["metrics"][name] * 20 / 30)
    assert row_of(whole, "popularity")["metrics"] != row_of(part, "popularity")["metrics"]


def test_a_target_beyond_the_depth_is_a_miss_and_ties_beyond_it_count(tmp_path, dataset):
    target = dataset.item_ids[dataset.target(0, "test")]
    other = next(item for item in dataset.item_ids if item != target)
    for items, beyond, greater, equal, found in (
        ([other, target], 3, 1, 3, True),
        ([target, other], 3, 0, 0, True),
        ([other], 16, 0, 0, False),
    ):
        scores = [2.0, 1.0][: len(items)]
        table = {"user_id": ["u000"], "item_ids": [items], "scores": [scores]}
        table["ties_beyond_depth"] = pa.array([beyond], pa.int32())
        pq.write_table(pa.table(table), tmp_path / "part-00000.parquet")
        places = ranking_places(tmp_path, everybody(dataset))
        ranks, listed = places.ranks, places.listed
        assert (ranks.n_greater[0], ranks.n_equal[0], ranks.found[0]) == (greater, equal, found), items
        assert listed.tolist() == [True, *[False] * 29]
        assert not ranks.found[1:].any()
        metrics = per_user_metrics(ranks, "mean_rank")
        assert metrics[:, -1].sum() == (1.0 if greater == 0 and found else 0.0)


def test_leaving_out_the_last_item_is_what_ranking_without_it_gives(tmp_path, dataset):
    """The view of a ranking equals a ranking made so, but for targets that are left out: there they are misses."""
    metrics = evaluate(
        tmp_path / "report",
        dataset,
        {},
        baselines=["blend", "blend_removed"],
        cutoffs=(1, 5),
        ndcg_cutoffs=(5,),
        resamples=9,
    )
    view = row_of(metrics, "blend")["views"]["last_left_out"]["metrics"]
    removed = row_of(metrics, "blend_removed")["metrics"]
    assert [view[name] for name in ("recall@1", "recall@5", "ndcg@5")] == pytest.approx(
        [removed[name] for name in ("recall@1", "recall@5", "ndcg@5")]
    )
    assert view["ndcg@5"] != row_of(metrics, "blend")["metrics"]["ndcg@5"]
    targets = everybody(dataset)
    assert metrics["targets_in_history"] == sum(
        dataset.target(user, "test") in dataset.history(user, "test") for user in range(30)
    )
    assert metrics["targets_last_item"] == targets.is_last.sum()


def test_comparisons_slices_and_generation_are_in_the_metrics(tmp_path, dataset, run):
    out = tmp_path / "report"
    metrics = evaluate(out, dataset, run, resamples=300)
    table = pq.read_table(out / "per_user.parquet").to_pylist()
    of = {
        row["name"]: np.array([user["ndcg@10"] for user in table if user["name"] == row["name"]])
        for row in metrics["rows"]
    }
    headline = [
        each for each in metrics["comparisons"] if (each["view"], each["metric"]) == ("as_it_stands", "ndcg@10")
    ]
    assert len(headline) == 2 * 4
    for each in headline:
        expected = paired(of[each["a"]], of[each["b"]], resamples=300)
        assert (each["difference"], each["p"]) == (pytest.approx(expected.difference), expected.p)
    np.testing.assert_allclose([each["p_holm"] for each in headline], holm([each["p"] for each in headline]))
    for part in metrics["slices"]:
        assert sum(group["users"] for group in part["groups"]) == 30
        for name in ("calrec", "popularity"):
            total = sum(
                group["users"] * group["rows"][name]["metrics"]["ndcg@10"] for group in part["groups"] if group["users"]
            )
            assert total / 30 == pytest.approx(row_of(metrics, name)["metrics"]["ndcg@10"]), part["name"]
    empty = [group for part in metrics["slices"] for group in part["groups"] if not group["users"]]
    assert empty and all(group["rows"] == {} for group in empty)
    (generation,) = metrics["generation"]
    assert generation["name"] == "test-sample" and set(generation["errors"]) == {"calrec", "short"}
    assert all(sum(cases.values()) == 30 for cases in generation["errors"].values())


def write_oracle(path, dataset, *, users=None, seed=0):
    """The shop's file: more items than the dataset has, and one of the dataset's fewer."""
    rng = np.random.default_rng(seed)
    items = np.array(sorted([*map(str, dataset.item_ids[1:]), "never sold"]))
    users = np.array(list(map(str, dataset.user_ids)) if users is None else users)
    probabilities = rng.dirichlet(np.ones(len(items)), len(users)).astype(np.float32)
    np.savez_compressed(path, user_ids=users, item_ids=items, probabilities=probabilities)
    return {user: dict(zip(items, row, strict=True)) for user, row in zip(users, probabilities, strict=True)}


def test_the_oracle_is_a_row_of_its_own(tmp_path, dataset):
    probabilities = write_oracle(tmp_path / "oracle.npz", dataset)
    metrics = evaluate(tmp_path / "report", dataset, {}, oracle=tmp_path / "oracle.npz", resamples=20)
    row = row_of(metrics, "oracle")
    assert row["kind"] == "oracle"
    values = []
    for user, user_id in enumerate(dataset.user_ids):
        own = [probabilities[user_id].get(item, 0.0) for item in dataset.item_ids]
        place = 1 + sum(value > own[dataset.target(user, "test")] for value in own)
        values.append(1 / math.log2(1 + place) if place <= 10 else 0.0)
    assert row["metrics"]["ndcg@10"] == pytest.approx(np.mean(values), abs=1e-9)
    assert "oracle" in metrics["made_from"]


def test_an_oracle_that_does_not_fit_is_refused(tmp_path, dataset):
    write_oracle(tmp_path / "oracle.npz", dataset, users=["u000"])
    with pytest.raises(CalrecError, match="lacks 29 users.*'u001' first"):
        evaluate(tmp_path / "report", dataset, {}, oracle=tmp_path / "oracle.npz")
    with pytest.raises(CalrecError, match="knows the test purchases, and 'validation' is evaluated"):
        evaluate(tmp_path / "report", dataset, {}, split="validation", oracle=tmp_path / "oracle.npz")
    with pytest.raises(CalrecError, match=r"nowhere\.npz does not exist"):
        evaluate(tmp_path / "report", dataset, {}, oracle=tmp_path / "nowhere.npz")


def test_rankings_of_another_dataset_or_split_are_refused(tmp_path, dataset, run):
    other = make_dataset(tmp_path / "other", num_users=30, seed=9)
    with pytest.raises(CalrecError, match="ranks another dataset than Tools"):
        evaluate(tmp_path / "report", other, run)
    with pytest.raises(CalrecError, match="ranks for the split 'test', not 'validation'"):
        evaluate(tmp_path / "report", dataset, run, split="validation")
    with pytest.raises(CalrecError, match="does not exist"):
        evaluate(tmp_path / "report", dataset, {"calrec": tmp_path / "nowhere"})
    assert not (tmp_path / "report").exists()


def test_files_that_were_changed_are_refused(tmp_path, dataset, run):
    out = tmp_path / "report"
    files = {
        "test-sample": tmp_path / "completions" / "test-sample" / "part-00001.parquet",
        "test-short": run["short"] / "part-00000.parquet",
    }
    for name, path in files.items():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"x")
        with pytest.raises(CalrecError, match=rf"{name} are not those of its manifest: {path.name} was changed"):
            evaluate(out, dataset, run, resamples=9)
        path.write_bytes(whole)
    assert not out.exists()
    metrics = evaluate(out, dataset, run, resamples=9)
    assert evaluate(out, dataset, run, resamples=9) == metrics
    for name in ("metrics.json", "per_user.parquet", "report.html"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole + b" ")
        with pytest.raises(CalrecError, match=rf"{name} was changed after it was written; delete .*report"):
            evaluate(out, dataset, run, resamples=9)
        (out / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ties": "luck"}, "evaluate.ties is 'luck'"),
        ({"users": "some"}, "users is 'some'"),
        ({"baselines": ["magic"]}, "evaluate.baselines is"),
        ({"baselines": ["popularity", "popularity"]}, "several rows named"),
        ({"baselines": []}, "nothing to evaluate"),
        ({"bm25_text": "titles"}, "evaluate.bm25_text is 'titles'"),
        ({"cutoffs": [0]}, r"cutoffs is \[0\]"),
        ({"resamples": 0}, "resamples=0"),
        ({"beyond_cutoff": 11}, "beyond_cutoff is 11"),
        ({"shown_users": 0}, "shown_users is 0"),
        ({"mrr_cutoffs": [1, 1]}, r"mrr_cutoffs is \[1, 1\]"),
        ({"level": 2.0}, "interval level is 2.0"),
        ({"split": "train"}, "split is 'train'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_named(tmp_path, dataset, change, message):
    with pytest.raises(CalrecError, match=message):
        evaluate(tmp_path / "report", dataset, {}, **change)
    assert not (tmp_path / "report" / "manifest.json").exists()


def test_validation_reads_nothing_from_its_targets_on(tmp_path, dataset):
    validation = Histories(dataset, "validation")
    for user in range(len(dataset.user_ids)):
        assert validation.targets[user] == dataset.target(user, "validation")
        assert validation.last(np.array([user]))[0] == dataset.history(user, "validation")[-1]
    total = sum(len(dataset.history(user, "validation")) for user in range(len(dataset.user_ids)))
    assert validation.popularity.sum() == total
    assert validation.transitions.totals.sum() == total - len(dataset.user_ids)
    assert evaluate(tmp_path / "report", dataset, {}, split="validation", resamples=9)["split"] == "validation"


SHARED = pathlib.Path(os.environ.get("CALREC_SHARED_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
# "No-training baselines on it", Scientific, full text: R@1, R@5, R@10, NDCG@10, R@50, MRR.
PUBLISHED = {
    "popularity": "0.0077 0.0185 0.0309 0.0172 0.0954 0.0176",
    "last_item": "0.0019 0.0188 0.0307 0.0149 0.0970 0.0146",
    "transitions": "0.0370 0.0702 0.0882 0.0596 0.1466 0.0552",
    "bm25_last": "0.0068 0.0727 0.1020 0.0522 0.1620 0.0410",
    "bm25_last_removed": "0.0381 0.0782 0.1034 0.0670 0.1609 0.0602",
    "blend_removed": "0.0489 0.0949 0.1192 0.0809 0.1902 0.0742",
}


@pytest.mark.skipif(not (SHARED / "2018").is_dir(), reason=f"the shared data set is not at {SHARED}")
def test_published_baselines_are_reproduced_to_the_fourth_digit(tmp_path):
    dataset = prepare(
        tmp_path / "dataset",
        name="Scientific",
        reviews=SHARED / "2018" / "Industrial_and_Scientific_5.json.gz",
        metadata=SHARED / "2018" / "meta_Industrial_and_Scientific.json.gz",
        remove_consecutive_repeats=False,
    )
    histories = Histories(dataset, "test")
    assert (len(dataset.user_ids), len(dataset.item_ids), len(dataset.items)) == (8442, 4385, 59427)
    columns = [NAMES.index(name) for name in ("recall@1", "recall@5", "recall@10", "ndcg@10", "recall@50", "mrr")]
    for name, source in baseline_sources(list(PUBLISHED), dataset, histories).items():
        means = per_user_metrics(ranks_of(source, dataset, histories), "mean_rank").mean(axis=0)[columns]
        assert " ".join(f"{mean:.4f}" for mean in means) == PUBLISHED[name], name
    assert set(PUBLISHED) <= set(BASELINES)
