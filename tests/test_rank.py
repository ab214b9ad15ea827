"""The verb `rank`: every source against an obvious reference, the shards read back, and every refusal."""

import dataclasses
import itertools
import json
import os
import signal

import gin
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranking_data import completion_rows, make_dataset, write_completions

from calrec_jax import artifacts
from calrec_jax.errors import CalrecError
from calrec_jax.rank.bm25 import BM25Index
from calrec_jax.rank.completions import Completions
from calrec_jax.rank.histories import Histories
from calrec_jax.rank.ordering import order
from calrec_jax.rank.parts import CompletionTexts, Job, rank_in_processes
from calrec_jax.rank.round_robin import RoundRobinConfig, round_robin_scores
from calrec_jax.rank.run import FROM_HISTORIES, rank
from calrec_jax.rank.shards import SCHEMA, RankingReader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def rows(dataset):
    return completion_rows(dataset)


@pytest.fixture
def completions(tmp_path, dataset, rows):
    return write_completions(tmp_path / "completions", dataset, rows)


def read(folder):
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return {row["user_id"]: row for row in pa.concat_tables(tables).to_pylist()}


def dense(folder, dataset):
    """[U, I] the written scores by item."""
    lists = RankingReader(folder, dataset).rows(np.arange(len(dataset.user_ids)))
    scores = np.full((len(dataset.user_ids), len(dataset.item_ids)), np.nan)
    np.put_along_axis(scores, lists.items, lists.scores, axis=1)
    return scores


def test_round_robin_shards_hold_the_contract(tmp_path, dataset, rows, completions):
    out = rank(tmp_path / "ranking", dataset, completions)
    table = pq.read_table(out / "part-00000.parquet")
    assert table.column_names == SCHEMA.names
    assert table.schema.types == SCHEMA.types
    by_user = read(out)
    assert list(by_user) == list(dataset.user_ids)
    columns = [[row[name] for row in rows] for name in ("texts", "log_probs")]
    lists = order(round_robin_scores(BM25Index(dataset.texts), *columns))
    for user, user_id in enumerate(dataset.user_ids):
        assert by_user[user_id]["item_ids"] == dataset.item_ids[lists.items[user]].tolist()
        assert by_user[user_id]["scores"] == lists.scores[user].tolist()
        assert by_user[user_id]["sources"] == lists.sources[user].tolist()
        assert by_user[user_id]["ties_beyond_depth"] == 0
    manifest = artifacts.read_manifest(out, kind="ranking")
    assert manifest["made_from"]["dataset"] == dataset.hash
    assert manifest["made_from"]["completions"] == artifacts.read_manifest(completions, kind="completions")["hash"]
    assert (manifest["users"], manifest["items"], manifest["list_depth"]) == (12, 17, 17)


def test_the_same_inputs_give_the_same_bytes(tmp_path, dataset, completions):
    first, second = (rank(tmp_path / name, dataset, completions) for name in ("one", "two"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_depth_cuts_the_lists_and_says_how_many_tie_beyond(tmp_path, dataset, completions):
    whole = read(rank(tmp_path / "whole", dataset, completions))
    for user_id, row in read(rank(tmp_path / "cut", dataset, completions, depth=4)).items():
        scores = whole[user_id]["scores"]
        assert row["item_ids"] == whole[user_id]["item_ids"][:4]
        assert row["ties_beyond_depth"] == sum(score == scores[3] for score in scores[4:])


def test_a_done_ranking_is_skipped_and_one_made_otherwise_is_not_overwritten(tmp_path, dataset, completions):
    out = rank(tmp_path / "ranking", dataset, completions)
    before = (out / "part-00000.parquet").stat().st_mtime_ns
    rank(out, dataset, completions)
    assert (out / "part-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(CalrecError, match="epsilon"):
        rank(out, dataset, completions, epsilon=0.1)


def reference_from_histories(name, dataset, split, user):
    """(primary, secondary) of each item, from the definitions, item by item."""
    histories = [dataset.history(each, split).tolist() for each in range(len(dataset.user_ids))]
    popularity = [sum(history.count(item) for history in histories) for item in range(len(dataset.item_ids))]

    def followed(first, second):
        return sum(pair == (first, second) for history in histories for pair in itertools.pairwise(history))

    history = histories[user]
    last = history[-1]
    bm25 = BM25Index(dataset.texts).scores([dataset.texts[last]])[0].astype(np.float64)
    primary = []
    for item in range(len(dataset.item_ids)):
        if name == "popularity":
            primary.append(popularity[item])
        elif name == "last_item":
            primary.append(float(item == last))
        elif name == "transitions":
            primary.append(followed(last, item))
        elif name == "bm25_last":
            primary.append(bm25[item])
        else:
            value = 0.5 * bm25[item] / bm25.max()
            for back, earlier in enumerate(history[::-1][:10]):
                total = sum(followed(earlier, other) for other in range(len(dataset.item_ids)))
                value += 0.8**back * followed(earlier, item) / (total + 1)
            primary.append(value)
    return primary, popularity


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["popularity", "last_item", "transitions", "bm25_last", "blend"])
def test_sources_from_histories(tmp_path, dataset, name, split):
    scores = dense(rank(tmp_path / "ranking", dataset, None, split=split, source=name), dataset)
    for user in (0, 5, 11):
        primary, popularity = reference_from_histories(name, dataset, split, user)
        keys = [(round(first, 9), second) for first, second in zip(primary, popularity, strict=True)]
        for one in range(len(keys)):
            for other in range(len(keys)):
                assert (scores[user, one] > scores[user, other]) == (keys[one] > keys[other]), (user, one, other)


def test_a_history_without_items_falls_back_to_popularity(tmp_path, dataset):
    empty = dataclasses.replace(dataset, valid_position=np.zeros_like(dataset.valid_position))
    histories = Histories(empty, "validation")
    assert (histories.last(np.arange(12)) == -1).all() and not histories.popularity.any()
    for name in FROM_HISTORIES:
        out = rank(tmp_path / name, empty, None, split="validation", source=name, leave_out_history="last")
        lists = RankingReader(out, empty).rows(np.arange(12))
        assert (lists.items == np.arange(17)).all() and (lists.scores == 0).all()


def test_constrained_items_come_first_by_log_probability(tmp_path, dataset):
    rows = completion_rows(dataset, num_texts=5, constrained=True)
    completions = write_completions(tmp_path / "completions", dataset, rows)
    by_user = read(rank(tmp_path / "plain", dataset, completions, source="constrained"))
    for row in rows:
        mine = by_user[row["user_id"]]
        assert mine["item_ids"][:5] == row["item_ids"] and mine["sources"] == [0, 1, 2, 3, 4, *[-1] * 12]
        assert mine["scores"][:5] == pytest.approx(row["log_probs"])
        assert len(set(mine["scores"][5:])) == 1 and mine["scores"][5] < mine["scores"][4]
    filled = dense(rank(tmp_path / "filled", dataset, completions, source="constrained", fill="popularity"), dataset)
    popularity = Histories(dataset, "test").popularity
    for user, row in enumerate(rows):
        rest = np.flatnonzero(~np.isin(dataset.item_ids, row["item_ids"]))
        own = filled[user, rest]
        np.testing.assert_array_equal(
            own[:, None] > own[None], popularity[rest][:, None] > popularity[rest][None], err_msg=row["user_id"]
        )


def test_fill_decides_ties_after_the_first_choice_count(tmp_path, dataset, rows, completions):
    columns = [[row[name] for row in rows] for name in ("texts", "log_probs")]
    scores = round_robin_scores(BM25Index(dataset.texts), *columns)
    popularity = Histories(dataset, "test").popularity
    filled = dense(rank(tmp_path / "ranking", dataset, completions, fill="popularity"), dataset)
    for user in range(len(rows)):
        keys = list(zip(scores.primary[user], scores.secondary[user], popularity, strict=True))
        for one in range(len(keys)):
            for other in range(len(keys)):
                assert (filled[user, one] > filled[user, other]) == (keys[one] > keys[other])


def test_tower_ranks_by_the_product_of_the_vectors(tmp_path, dataset):
    rows = completion_rows(dataset, dimensions=6)
    vectors = np.random.default_rng(1).normal(size=(len(dataset.item_ids), 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[3] = vectors[4]
    completions = write_completions(tmp_path / "completions", dataset, rows, item_embeddings=vectors)
    scores = dense(rank(tmp_path / "ranking", dataset, completions, source="tower"), dataset)
    expected = np.array([row["user_embedding"] for row in rows]) @ vectors.T
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_array_equal(scores[:, 3], scores[:, 4])


@pytest.mark.parametrize("which", ["none", "last", "all"])
def test_the_history_is_left_out(tmp_path, dataset, completions, which):
    scores = dense(rank(tmp_path / "ranking", dataset, completions, leave_out_history=which), dataset)
    for user in range(len(dataset.user_ids)):
        history = dataset.history(user, "test")
        left_out = {"none": set(), "last": {history[-1]}, "all": set(history)}[which]
        assert set(np.flatnonzero(scores[user] == -np.inf)) == {int(item) for item in left_out}


def test_fusion_adds_weighted_reciprocal_ranks(tmp_path, dataset, completions):
    rank(tmp_path / "test-calrec", dataset, completions)
    rank(tmp_path / "test-last", dataset, None, source="bm25_last", depth=5)
    fused = rank(tmp_path / "test-fused", dataset, None, source="fusion", fuse={"calrec": 1.0, "last": 0.5})
    scores = dense(fused, dataset)
    for user_id in read(fused):
        expected = dict.fromkeys(dataset.item_ids, 0.0)
        for name, weight in (("calrec", 1.0), ("last", 0.5)):
            listed = read(tmp_path / f"test-{name}")[user_id]
            for item, score in zip(listed["item_ids"], listed["scores"], strict=True):
                ties = listed["scores"].count(score)
                if score == listed["scores"][-1]:
                    ties += listed["ties_beyond_depth"]
                rank_ = sum(other > score for other in listed["scores"]) + (ties + 1) / 2
                expected[item] += weight / (60 + rank_)
        user = list(dataset.user_ids).index(user_id)
        np.testing.assert_allclose(scores[user], list(expected.values()), rtol=1e-5, err_msg=user_id)
    assert set(artifacts.read_manifest(fused, kind="ranking")["made_from"]) == {
        "dataset",
        "ranking calrec",
        "ranking last",
    }


def test_users_without_completions_are_named_or_skipped(tmp_path, dataset, rows):
    completions = write_completions(tmp_path / "completions", dataset, [*rows[:3], *rows[5:]])
    with pytest.raises(CalrecError, match="lacks completions of 2 of the 12 users, user 'u003' first"):
        rank(tmp_path / "ranking", dataset, completions)
    assert not (tmp_path / "ranking").exists()
    out = rank(tmp_path / "ranking", dataset, completions, missing="skip", fill="popularity")
    assert list(read(out)) == [user for user in dataset.user_ids if user not in ("u003", "u004")]
    with pytest.raises(CalrecError, match="no list of 1 users, user 'u003' first"):
        RankingReader(out, dataset).rows(np.array([0, 3]))


def test_completions_of_another_dataset_or_split_are_refused(tmp_path, dataset, rows):
    other = write_completions(tmp_path / "other", dataset, rows, dataset_hash="0" * 64)
    with pytest.raises(CalrecError, match="made from another dataset than Tools"):
        rank(tmp_path / "ranking", dataset, other)
    validation = write_completions(tmp_path / "validation", dataset, rows, split="validation")
    with pytest.raises(CalrecError, match="are of the split 'validation', and 'test' is to be ranked"):
        rank(tmp_path / "ranking", dataset, validation)
    with pytest.raises(CalrecError, match="does not exist"):
        rank(tmp_path / "ranking", dataset, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "magic"}, "rank.source is 'magic'"),
        ({"fill": "magic"}, "rank.fill is 'magic'"),
        ({"leave_out_history": "some"}, "rank.leave_out_history is 'some'"),
        ({"depth": 0}, "rank.depth is 0"),
        ({"depth": 2.5}, "rank.depth is 2.5: it must be a whole number from 1"),
        ({"depth": "all"}, "rank.depth is 'all'"),
        ({"epsilon": "paper"}, "rank.epsilon is 'paper': it must be a number from 0"),
        ({"score": "max"}, "rank.score is 'max'"),
        ({"source": "fusion", "fuse": {"a": "high"}}, r"rank.fuse has the weights \['high'\]"),
        ({"missing": "drop"}, "rank.missing is 'drop'"),
        ({"split": "train"}, "split is 'train': choose one of"),
        ({"fuse": {"a": 1.0}}, "set both or neither"),
        ({"source": "fusion"}, "set both or neither"),
        ({"source": "constrained"}, "item_ids is null for 12 of 12 users; only a constrained decode"),
        ({"source": "tower"}, "user_embedding is null for 12 of 12 users; only a decode that writes embeddings"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_named(tmp_path, dataset, completions, change, message):
    with pytest.raises(CalrecError, match=message):
        rank(tmp_path / "ranking", dataset, completions, **change)
    assert not (tmp_path / "ranking").exists()


def test_a_source_that_needs_completions_says_so(tmp_path, dataset):
    with pytest.raises(CalrecError, match="needs completions: run `calrec decode`"):
        rank(tmp_path / "ranking", dataset, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(user_id="stranger"), "user 'stranger', who is not in the dataset"),
        (lambda rows: rows[0].update(user_id=rows[1]["user_id"]), "has user 'u001' more than once"),
        (lambda rows: rows[2]["log_probs"].pop(), "user 'u002' has log_probs of another length than texts"),
        (lambda rows: rows[2].update(texts=None), "texts is null for 1 of 12 users"),
        (lambda rows: rows[2]["texts"].__setitem__(0, None), "texts holds 1 nulls"),
        (lambda rows: rows[2]["log_probs"].__setitem__(0, float("inf")), "1 log_probs .* are NaN or infinite"),
    ],
    ids=["stranger", "twice", "lengths", "null", "null text", "infinite"],
)
def test_broken_completions_are_named(tmp_path, dataset, change, message):
    rows = json.loads(json.dumps(completion_rows(dataset)))
    change(rows)
    with pytest.raises(CalrecError, match=message):
        rank(tmp_path / "ranking", dataset, write_completions(tmp_path / "completions", dataset, rows))


def test_a_broken_shard_is_named(dataset, completions):
    columns = ["texts", "log_probs", "num_tokens"]
    (completions / "part-00001.parquet").write_bytes(b"junk")
    with pytest.raises(CalrecError, match=r"part-00001\.parquet cannot be read as Parquet"):
        Completions(completions, dataset, columns)
    pq.write_table(pa.table({"user_id": ["u000"]}), completions / "part-00001.parquet")
    with pytest.raises(CalrecError, match=r"part-00001\.parquet lacks the columns"):
        Completions(completions, dataset, columns)


def test_only_the_files_of_the_manifest_are_ranked(tmp_path, dataset, rows, completions):
    out = tmp_path / "rankings" / "test-calrec"
    other = write_completions(tmp_path / "other", dataset, completion_rows(dataset, seed=1))
    shard = completions / "part-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes((other / shard.name).read_bytes())
    with pytest.raises(
        CalrecError, match=r"part-00001\.parquet was changed after it was written; delete .*completions"
    ):
        rank(out, dataset, completions)
    shard.unlink()
    with pytest.raises(CalrecError, match=r"part-00001\.parquet is missing"):
        rank(out, dataset, completions)
    shard.write_bytes(whole)
    (completions / "part-00002.parquet").write_bytes(whole)
    with pytest.raises(CalrecError, match=r"part-00002\.parquet does not belong to it"):
        rank(out, dataset, completions)
    assert not out.exists()
    (completions / "part-00002.parquet").unlink()
    rank(out, dataset, completions)
    (out / "part-00000.parquet").write_bytes(whole)
    with pytest.raises(
        CalrecError, match=r"test-calrec are not those of its manifest: part-00000\.parquet was changed"
    ):
        rank(out.parent / "test-fused", dataset, None, source="fusion", fuse={"calrec": 1.0})


@pytest.mark.parametrize("source", ["completions", "constrained"])
def test_more_completions_than_a_ranking_can_name_are_refused(tmp_path, dataset, source):
    rows = json.loads(json.dumps(completion_rows(dataset, constrained=True)))
    setting = {"completions": "num_samples", "constrained": "num_beams"}[source]
    rows[5]["texts"][0] = dataset.texts[0]
    for count, whole in ((32_767, True), (32_768, False)):
        for name in ("texts", "log_probs", "num_tokens", "finished", "item_ids"):
            rows[5][name] = rows[5][name][:1] * count
        rows[5]["log_probs"][-1] = 0.0  # the best one is the last
        made = write_completions(tmp_path / f"{count}", dataset, rows)
        if whole:
            out = rank(tmp_path / f"ranked-{count}", dataset, made, source=source)
            assert read(out)["u005"]["sources"][0] == count - 1
        else:
            message = rf"a user has 32,768 completions, and a ranking can name 32,767 .*decode\.{setting} lower"
            with pytest.raises(CalrecError, match=message):
                rank(tmp_path / f"ranked-{count}", dataset, made, source=source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": "stranger"}, "ranks user 'stranger', who is not in the dataset"),
        ({"user_id": "u001"}, "ranks user 'u001' more than once"),
        ({"item_ids": ["i001", "nothing"]}, "ranks item 'nothing', which is not in the catalogue"),
        ({"item_ids": ["i001", "i001"]}, "the list of user 'u000' names an item twice"),
        ({"scores": [1.0, 2.0]}, "user 'u000' has scores that are not descending"),
        ({"scores": [1.0, float("nan")]}, "user 'u000' has scores that are not descending"),
        ({"scores": [1.0]}, "item_ids and scores differ in length"),
    ],
    ids=["stranger", "twice", "unknown item", "item twice", "ascending", "nan", "lengths"],
)
def test_rankings_of_others_are_checked_when_read(tmp_path, dataset, change, message):
    rows = [
        {"user_id": "u000", "item_ids": ["i001", "i002"], "scores": [2.0, 1.0], **change},
        {"user_id": "u001", "item_ids": ["i001"], "scores": [2.0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00000.parquet")
    with pytest.raises(CalrecError, match=message):
        list(RankingReader(tmp_path, dataset).blocks())


def test_lists_of_different_lengths_are_padded(tmp_path, dataset):
    rows = [
        {"user_id": "u004", "item_ids": ["i001", "i002"], "scores": [2.0, 1.0]},
        {"user_id": "u002", "item_ids": ["i005"], "scores": [3.0]},
        {"user_id": "u003", "item_ids": [], "scores": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00000.parquet", row_group_size=2)
    lists = RankingReader(tmp_path, dataset).rows(np.array([2, 3, 4]))
    assert lists.items.tolist() == [[5, -1], [-1, -1], [1, 2]] and lists.lengths.tolist() == [1, 0, 2]
    with pytest.raises(CalrecError, match="has no part-"):
        RankingReader(tmp_path / "nowhere", dataset)


def test_gin_binds_the_verb(tmp_path, dataset, completions):
    with gin.unlock_config():
        gin.parse_config("rank.depth = 3\nBM25Tokenizer.strip_accents = True")
    try:
        manifest = artifacts.read_manifest(rank(tmp_path / "ranking", dataset, completions), kind="ranking")
    finally:
        gin.clear_config()
    assert manifest["list_depth"] == 3 and manifest["settings"]["bm25"]["strip_accents"] is True


def test_several_processes_rank_as_one_does(tmp_path, dataset, completions):
    options = {"depth": 3, "leave_out_history": "last"}
    alone = rank(tmp_path / "alone" / "test-x", dataset, completions, **options)
    shared = rank(tmp_path / "shared" / "test-x", dataset, completions, processes=2, **options)
    read_back = [artifacts.read_manifest(folder, kind="ranking") for folder in (alone, shared)]
    assert read_back[0]["hash"] == read_back[1]["hash"] and read_back[0]["files"] == read_back[1]["files"]
    assert not (tmp_path / "alone" / "index").exists()
    (index,) = (tmp_path / "shared" / "index").iterdir()
    assert BM25Index.load(index, dataset.hash).num_items == len(dataset.item_ids)
    (index / "row_words.npy").write_bytes(b"")
    with pytest.raises(CalrecError, match=r"row_words\.npy"):
        rank(tmp_path / "shared" / "again", dataset, completions, processes=2, **options)
    with pytest.raises(CalrecError, match=r"rank\.processes is 0"):
        rank(tmp_path / "none", dataset, completions, processes=0)


@pytest.mark.parametrize("depth", [3, 17], ids=["short lists", "whole catalogue"])
def test_shards_are_the_same_however_many_processes_write_them(tmp_path, dataset, completions, depth):
    loaded = Completions(completions, dataset, ["texts", "log_probs", "num_tokens"])
    texts = CompletionTexts(dataset, loaded.users, loaded.user_texts("sum"), 0.01, RoundRobinConfig())
    index = tmp_path / "index"
    BM25Index(dataset.texts).save(index, dataset.hash)
    made = {}
    for processes in (1, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        job = Job(texts, index, "test", "all", np.zeros(0, np.int64), depth, out, shard_users=4)
        job.run() if processes == 1 else rank_in_processes(job, processes)
        made[processes] = artifacts.hash_files(sorted(out.iterdir()))
    assert list(made[1]) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert made[1] == made[3]


def test_a_process_that_dies_is_named(tmp_path, dataset, completions):
    loaded = Completions(completions, dataset, ["texts", "log_probs", "num_tokens"])
    texts = CompletionTexts(dataset, loaded.users, loaded.user_texts("sum"), 0.01, RoundRobinConfig())
    job = Dies(texts, tmp_path, "test", "none", np.zeros(0, np.int64), 3, tmp_path)
    with pytest.raises(CalrecError, match=r"set rank\.processes lower"):
        rank_in_processes(job, 2)


class Dies(Job):
    """A job whose process is killed."""

    def run(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_fusion_of_a_part_of_the_users(tmp_path, dataset, rows):
    part = write_completions(tmp_path / "part", dataset, rows[:7])
    rank(tmp_path / "test-a", dataset, part, missing="skip")
    rank(tmp_path / "test-b", dataset, None, source="popularity")
    fuse = {"a": 1.0, "b": 0.5}
    with pytest.raises(CalrecError, match="has no list of 5 users"):
        rank(tmp_path / "test-c", dataset, None, source="fusion", fuse=fuse)
    out = rank(tmp_path / "test-d", dataset, None, source="fusion", fuse=fuse, missing="skip")
    assert set(read(out)) == {row["user_id"] for row in rows[:7]}


def test_choices_that_the_paper_leaves_open_are_settings_of_the_ranking(tmp_path, dataset, completions):
    plain = rank(tmp_path / "plain", dataset, completions)
    with gin.unlock_config():
        gin.bind_parameter("RoundRobinConfig.scaling", "none")
    try:
        with pytest.raises(CalrecError, match="round_robin"):
            rank(tmp_path / "plain", dataset, completions)
        out = rank(tmp_path / "other", dataset, completions)
    finally:
        gin.clear_config()
    assert artifacts.read_manifest(out, kind="ranking")["settings"]["round_robin"]["scaling"] == "none"
    assert (
        max(row["scores"][0] for row in read(plain).values()) <= 1 < max(row["scores"][0] for row in read(out).values())
    )
