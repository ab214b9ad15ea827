"""Rankings made by others: three kinds of file, one meaning; what cannot be matched is counted, and helps nobody."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranking_data import make_dataset

from calrec_jax import artifacts, beside_line, cli
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.foreign import parse_names, read_ranking
from calrec_jax.evaluate.places import Targets, places_of_lists
from calrec_jax.evaluate.run import evaluate
from calrec_jax.pipeline import Line
from calrec_jax.rank.histories import Histories

NUM_USERS = 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("foreign") / "d", num_users=NUM_USERS)


@pytest.fixture(scope="module")
def targets(dataset):
    return Targets(dataset, Histories(dataset, "test"), np.arange(NUM_USERS))


@pytest.fixture(scope="module")
def lists(dataset):
    """User id to [(item id, score)], best first, with ties."""
    rng = np.random.default_rng(0)
    made = {}
    for user in dataset.user_ids:
        items = rng.permutation(dataset.item_ids)[: int(rng.integers(3, 15))]
        scores = np.sort(rng.integers(0, 8, len(items)))[::-1] / 4
        made[str(user)] = list(zip(map(str, items), scores.tolist(), strict=True))
    return made


def write(path, lists):
    """Writes lists as the file's name says; rows of long forms are shuffled."""
    long = [(user, item, score) for user, entries in lists.items() for item, score in entries]
    shuffled = [long[k] for k in np.random.default_rng(1).permutation(len(long))]
    nested = [
        {"user_id": user, "item_ids": [item for item, _ in entries], "scores": [score for _, score in entries]}
        for user, entries in lists.items()
    ]
    if path.name == "nested.parquet":
        pq.write_table(pa.Table.from_pylist(nested), path)
    elif path.name == "long.parquet":
        columns = zip(*shuffled, strict=True)
        pq.write_table(pa.table(dict(zip(("user_id", "item_id", "score"), map(list, columns), strict=True))), path)
    elif path.name.startswith("nested.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in nested).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    elif path.name == "long.jsonl":
        path.write_text("".join(json.dumps({"user_id": u, "item_id": i, "score": s}) + "\n" for u, i, s in shuffled))
    else:
        place = {(user, item): at for user, entries in lists.items() for at, (item, _) in enumerate(entries, 1)}
        path.write_text("".join(f"{u} Q0\t{i}  {place[u, i]} {s} tag\n" for u, i, s in shuffled))
    return path


FILES = ("nested.parquet", "long.parquet", "nested.jsonl", "nested.jsonl.gz", "long.jsonl", "x.trec", "x.run")


def reference(dataset, lists, user):
    """(before, tied, found) from the scores."""
    target = str(dataset.item_ids[dataset.target(user, "test")])
    scores = dict(lists.get(str(dataset.user_ids[user]), []))
    if target not in scores:
        return 0, 0, False
    own = scores[target]
    return sum(s > own for s in scores.values()), sum(s == own for s in scores.values()) - 1, True


def places(ranking, targets):
    return places_of_lists(ranking.blocks(), targets, ranking.depth)


def found_of(ranking):
    return {finding["what"]: (finding["count"], finding["examples"]) for finding in ranking.findings}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_ranks(tmp_path, dataset, targets, lists, name):
    ranking = read_ranking("theirs", write(tmp_path / name, lists), targets)
    ranks = places(ranking, targets).ranks
    for user in range(NUM_USERS):
        own = (ranks.n_greater[user], ranks.n_equal[user], bool(ranks.found[user]))
        assert own == reference(dataset, lists, user), user
    assert ranking.depth == ranks.depth == max(map(len, lists.values()))
    assert set(found_of(ranking)) <= {"targets that no list of the file names"}


def test_without_scores_the_order_decides(tmp_path, dataset, targets, lists):
    path = tmp_path / "order.jsonl"
    path.write_text("".join(json.dumps({"user_id": user, "item_ids": [item for item, _ in entries]}) + "\n"
                            for user, entries in lists.items()))  # fmt: skip
    ranks = places(read_ranking("theirs", path, targets), targets).ranks
    assert not ranks.n_equal.any()
    for user, (user_id, entries) in enumerate(sorted(lists.items())):
        target = str(dataset.item_ids[dataset.target(user, "test")])
        items = [item for item, _ in entries]
        assert ranks.found[user] == (target in items), user_id
        if target in items:
            assert ranks.n_greater[user] == items.index(target)


def test_whole_numbers_are_ids_and_close_scores_are_not_ties(tmp_path, dataset, targets):
    item, other = map(str, (dataset.item_ids[dataset.target(0, "test")], dataset.item_ids[0]))
    if item == other:
        other = str(dataset.item_ids[1])
    path = tmp_path / "x.jsonl"
    row = {"user_id": str(dataset.user_ids[0]), "item_ids": [other, item, 17], "scores": [1 + 1e-12, 1.0, 0.5]}
    path.write_text(json.dumps(row) + "\n")
    ranking = read_ranking("theirs", path, targets)
    ranks = places(ranking, targets).ranks
    assert (ranks.n_greater[0], ranks.n_equal[0]) == (1, 0)
    assert found_of(ranking)["items that are not in the catalogue"] == (1, ["17"])


def test_what_is_wrong_is_counted_and_moves_nothing_up(tmp_path, dataset, targets):
    users = [str(user) for user in dataset.user_ids]
    target = [str(dataset.item_ids[dataset.target(user, "test")]) for user in range(NUM_USERS)]
    other = [next(str(item) for item in dataset.item_ids if str(item) != each) for each in target]
    rows = [
        {"user_id": users[0], "item_ids": ["nothing", "naught", target[0]], "scores": [3, 2, 1]},
        {"user_id": users[1], "item_ids": [other[1], other[1], target[1]], "scores": [3, 2, 1]},
        {"user_id": users[2], "item_ids": [target[2], other[2], target[2]], "scores": [3, 2, 1]},
        {"user_id": users[3], "item_ids": [target[3], other[3]], "scores": [2, float("nan")]},
        {"user_id": users[4], "item_ids": [other[4], target[4]], "scores": [1, None]},
        {"user_id": users[5], "item_ids": [], "scores": []},
        {"user_id": "stranger", "item_ids": [target[0]], "scores": [1]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranking = read_ranking("theirs", path, targets)
    made = places(ranking, targets)
    assert made.ranks.n_greater[:5].tolist() == [2, 2, 0, 1, 0]
    assert made.ranks.found[:6].tolist() == [True, True, True, True, False, False]
    assert made.listed.tolist() == [True] * 5 + [False] * 15 and not made.ranks.found[6:].any()
    found = found_of(ranking)
    assert found["users who are not in the dataset"] == (1, ["stranger"])
    assert found["items that are not in the catalogue"] == (2, ["nothing", "naught"])
    assert found["entries whose score is not a number"] == (2, [users[3], users[4]])
    assert found["repeats of an item in one list"] == (2, [users[1], users[2]])
    assert found["lists without an entry"] == (1, [users[5]])
    assert found["users of the split without a list, who are misses"] == (15, users[5:10])
    assert found["targets that no list of the file names"][0] > 0


def test_users_without_a_target_in_the_split_are_no_misses(tmp_path, dataset, lists):
    some = Targets(dataset, Histories(dataset, "test"), np.arange(0, NUM_USERS, 2))
    ranking = read_ranking("theirs", write(tmp_path / "x.trec", lists), some)
    assert found_of(ranking)["users without a target in this split"][0] == NUM_USERS // 2
    made = places(ranking, some)
    assert made.listed.all() and len(made.listed) == NUM_USERS // 2
    assert [bool(f) for f in made.ranks.found] == [reference(dataset, lists, u)[2] for u in range(0, NUM_USERS, 2)]


def test_trec_ranks_against_the_scores_are_told(tmp_path, dataset, targets):
    first, second = map(str, dataset.item_ids[:2])
    path = tmp_path / "x.trec"
    path.write_text(f"{dataset.user_ids[0]} Q0 {first} 1 0.5 t\n{dataset.user_ids[0]} Q0 {second} 2 0.9 t\n")
    found = found_of(read_ranking("theirs", path, targets))
    assert found["entries whose rank is not in the order of the scores"] == (1, [str(dataset.user_ids[0])])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "a", r"names end in \.parquet"),
        ("x.parquet", "a", "cannot be read as Parquet"),
        ("x.jsonl", '{"user_id": "u000", "item_ids": ["a"]}\n{"user_id"', "line 2: not a row of a ranking"),
        ("x.jsonl", '{"user_id": "u000", "item_ids": ["a"], "scores": [1, 2]}', "1 item_ids and 2 scores"),
        ("x.jsonl", '{"user_id": 1.5, "item_ids": ["a"]}', "1.5 is not an id"),
        ("x.jsonl", '{"user_id": "u000"}\n', "line 1.*KeyError: 'item_id'"),
        ("x.jsonl", '{"user_id": "u0", "item_ids": []}\n' * 2, "line 2: user 'u0' has a list"),
        ("x.trec", "u000 Q0 i1 1 0.5\n", "line 1: not a line of a TREC run"),
        ("x.run", "u000 Q0 i1 1 high t\n", "line 1: not a line of a TREC run"),
        ("x.jsonl.gz", "not gzip", "cannot be read"),
        ("x.trec", "nobody Q0 i1 1 0.5 t\n", "no user of it is in the dataset Tools: it has users like 'nobody'"),
        ("x.trec", "u000 Q0 i1 1 0.5 t\n", "no item of it is in the dataset Tools: it has items like 'i1'"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, targets, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(CalrecError, match=message):
        read_ranking("theirs", tmp_path / name, targets)


def test_parquet_of_other_columns_or_types_is_named(tmp_path, targets):
    path = tmp_path / "x.parquet"
    for table, message in (
        ({"user": ["u000"]}, "has the columns"),
        ({"user_id": ["u000"], "item_ids": ["a"]}, "not a list a user"),
        ({"user_id": ["u000", "u000"], "item_ids": [["a"], ["b"]]}, "1 users in more than one row, user 'u000'"),
        ({"user_id": ["u000"], "item_ids": [["a"]], "scores": [[1.0, 2.0]]}, "differ in length"),
        ({"user_id": ["u000"], "item_id": ["a"], "score": ["high"]}, "the scores are not numbers"),
        ({"user_id": ["u000", None], "item_id": ["a", "b"], "score": [1.0, 2.0]}, "user_id is null in 1 places"),
        ({"user_id": [1.5], "item_id": ["a"], "score": [1.0]}, "numbers with a fraction"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(CalrecError, match=message):
            read_ranking("theirs", path, targets)


def test_names_come_from_the_files_unless_given(tmp_path):
    (tmp_path / "a=b.trec").touch()
    files = parse_names(["runs/sasrec.jsonl.gz", "mine=x.parquet", str(tmp_path / "a=b.trec")])
    assert list(files) == ["sasrec", "mine", "a=b"]
    with pytest.raises(CalrecError, match="two files would be the row 'x'"):
        parse_names(["a/x.trec", "b/x.jsonl"])


def test_the_report_says_what_was_not_matched(tmp_path, dataset, lists, capsys):
    path = write(tmp_path / "x.trec", {**dict(list(lists.items())[:12]), "stranger": [(str(dataset.item_ids[0]), 1.0)]})
    metrics = evaluate(tmp_path / "report", dataset, {}, files={"theirs": path}, resamples=50)
    row = next(row for row in metrics["rows"] if row["name"] == "theirs")
    assert (row["kind"], row["users_without_ranking"], row["file"]) == ("other", 8, "x.trec")
    assert {finding["what"]: finding["count"] for finding in row["findings"]}["users who are not in the dataset"] == 1
    assert {each["a"] for each in metrics["comparisons"]} == {"theirs"}
    printed = capsys.readouterr().out
    assert "1 users who are not in the dataset: stranger" in printed and "theirs against the best baseline" in printed
    assert "file theirs" in metrics["made_from"]
    path.write_text(path.read_text().replace("0.25", "0.26"))
    with pytest.raises(CalrecError, match="made from another file theirs"):
        evaluate(tmp_path / "report", dataset, {}, files={"theirs": path}, resamples=50)


def test_the_verb_scores_files_beside_the_rankings_that_are_there(tmp_path, lists, capsys):
    line = Line(run_dir=str(tmp_path), target="Tools", rankings={"calrec": "sample"})
    make_dataset(line.layout.dataset("Tools"), num_users=NUM_USERS)
    path = write(tmp_path / "x.run", lists)
    beside_line.evaluate_files(line, [f"theirs={path}"])
    printed = capsys.readouterr().out
    assert "not made yet, and left out: calrec" in printed and "report-theirs" in printed
    metrics = artifacts.read_json(tmp_path / "report-theirs" / "metrics.json")
    assert [row["name"] for row in metrics["rows"]][-1] == "theirs"
    assert not (tmp_path / "report").exists()


def test_the_split_of_a_file_must_be_said(tmp_path, capsys):
    arguments = ["evaluate", "--gin_file=runs/quickstart.gin", f"--run_dir={tmp_path}", "--rankings=x.trec"]
    assert cli.main(arguments) == 1
    assert "say which split the files rank for, by --split=" in capsys.readouterr().err
