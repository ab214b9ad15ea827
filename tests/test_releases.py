"""Several releases in one run, their users and items kept apart; the official split from its files to a report."""

import gzip
import json

import pytest

from calrec_jax import artifacts, config
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.examples import build_examples, tokenise_catalogue
from calrec_jax.data.prepare import prepare
from calrec_jax.errors import CalrecError
from calrec_jax.evaluate.run import evaluate
from calrec_jax.pipeline import Line

ITEMS = [f"B{number:09}" for number in range(8)]
USERS = ("A1", "A2", "A3")


def write(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def log(order):
    """(user, item, day): each user buys five items, those of the second user one further, and so on."""
    return [(user, order[(place + at) % 8], at) for place, user in enumerate(USERS) for at in range(5)]


@pytest.fixture
def dumps(tmp_path):
    """The same users and items in two categories, sold under other titles and bought in another order."""
    folder = tmp_path / "dumps"
    folder.mkdir()
    write(
        folder / "Toys_5.json.gz",
        [{"reviewerID": user, "asin": item, "unixReviewTime": day * 86_400} for user, item, day in log(ITEMS)],
    )
    write(folder / "meta_Toys.json.gz", [{"asin": item, "title": f"Toy {at}"} for at, item in enumerate(ITEMS)])
    write(
        folder / "All_Games.jsonl.gz",
        [
            {"user_id": user, "asin": "variant", "parent_asin": item, "timestamp": day * 86_400_000}
            for user, item, day in log(ITEMS[::-1])
        ],
    )
    write(
        folder / "meta_Games.jsonl.gz", [{"parent_asin": item, "title": f"Game {at}"} for at, item in enumerate(ITEMS)]
    )
    return folder


RUN = """
run.run_dir = {run!r}
run.data_dir = {dumps!r}
run.target = 'Toys'
run.categories = ('Toys', 'Games')
run.reviews = {{'Games': 'All_{{category}}.jsonl.gz'}}
prepare.min_length = 4
Games/prepare.layout = '2023'
Games/prepare.min_length = 5
"""


def test_categories_of_several_releases_are_kept_apart(tmp_path, dumps, small_run):
    loaded = config.load([], bindings=RUN.format(run=str(tmp_path / "run"), dumps=str(dumps)).strip().split("\n"))
    line = Line()
    line.check(loaded)
    for category in line.all_categories:
        line.prepare(category)
    toys, games = datasets = [Dataset.load(line.layout.dataset(name)) for name in ("Toys", "Games")]
    for dataset, layout, least in ((toys, "2018", 4), (games, "2023", 5)):
        assert dataset.card["settings"]["layout"] == layout and dataset.card["settings"]["min_length"] == least
        assert dataset.user_ids.tolist() == list(USERS) and dataset.item_ids.tolist() == ITEMS
    assert games.card["lines"]["reviews"]["repaired"] == {}  # the release states milliseconds
    catalogue = tokenise_catalogue(datasets, small_run.tokenizer)
    examples = build_examples(datasets, catalogue, split="train", max_history_tokens=400)
    assert len(examples) == 6 and examples.user.tolist() == [0, 1, 2, 3, 4, 5], "one user, two numbers"
    assert examples.group.tolist() == [0, 0, 0, 1, 1, 1] and examples.group_sizes.tolist() == [3, 3]
    for example in range(6):
        bought = examples.items[examples.start[example] : examples.end[example]]
        dataset, base = datasets[example // 3], 8 * (example // 3)
        assert (bought - base).tolist() == dataset.train_items(example % 3).tolist(), (
            "no purchase of the other category"
        )
        for item in bought:
            words = small_run.tokenizer.decode(catalogue.item(item).tolist())
            assert words == dataset.texts[item - base] and ("Game" in words) == (example >= 3)
    assert len(set(catalogue.text_ids.tolist())) == 16, "one id, two items"


def test_a_scope_or_files_of_no_category_are_named(tmp_path, dumps):
    text = RUN.format(run=str(tmp_path / "run"), dumps=str(dumps))
    loaded = config.load([], bindings=[*text.strip().split("\n"), "Gmes/prepare.layout = '2014'"])
    with pytest.raises(CalrecError, match=r"nothing uses the scope Gmes/; did you mean Games\?"):
        Line().check(loaded)
    with pytest.raises(CalrecError, match=r"run\.metadata names \['Tools'\], which are none of \['Toys', 'Games'\]"):
        Line(run_dir="x", target="Toys", metadata={"Tools": "x"})


# (user, item, milliseconds) as the benchmark's files have them: c is tested alone, d trained alone; of b, the files say
# another order than the times do; a buys twice within a second.
OFFICIAL = {
    "train": [("b", "i2", 9_000), ("a", "i1", 1_200), ("a", "i0", 1_100), ("b", "i3", 9_500), ("d", "i4", 5_000),
              ("c", "i0", 100), ("d", "i5", 6_000)],
    "valid": [("a", "i3", 3_000), ("b", "i0", 7_000)],
    "test": [("b", "i1", 8_000), ("a", "i2", 4_000), ("c", "i1", 90)],
}  # fmt: skip
EXPECTED = {  # user: training purchases, validation target, test target; within a second the file's order
    "a": (["i1", "i0"], "i3", "i2"),
    "b": (["i2", "i3"], "i0", "i1"),
    "c": (["i0"], None, "i1"),
    "d": (["i4", "i5"], None, None),
}


@pytest.fixture
def official(tmp_path):
    for name, rows in OFFICIAL.items():
        history = ",history" if name != "train" else ""
        lines = [f"user_id,parent_asin,rating,timestamp{history}"]
        lines += [
            f"{user},{item},5.0,{1_600_000_000_000 + time}{',i8 i9' if history else ''}" for user, item, time in rows
        ]
        (tmp_path / f"X.{name}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    write(tmp_path / "meta.jsonl.gz", [{"parent_asin": f"i{k}", "title": f"Thing {k}"} for k in range(7)])
    files = [tmp_path / f"X.{name}.csv.gz" for name in ("test", "train", "valid")]  # in any order
    return {"name": "X", "layout": "2023", "reviews": files, "metadata": tmp_path / "meta.jsonl.gz", "min_length": 1}


def test_the_official_split_is_the_files_and_reaches_the_report(tmp_path, official):
    dataset = prepare(tmp_path / "d", **official, split="official", remove_consecutive_repeats=False)
    assert dataset.user_ids.tolist() == list(EXPECTED)
    for user, (trained, validation, test) in enumerate(EXPECTED.values()):
        assert dataset.item_ids[dataset.train_items(user)].tolist() == trained
        for split, target in (("validation", validation), ("test", test)):
            has = user in dataset.users_with(split)
            assert (dataset.item_ids[dataset.target(user, split)] if has else None) == target
    assert dataset.item_ids[dataset.history(0, "test")].tolist() == ["i1", "i0", "i3"]
    counts = {
        key: dataset.card["split"][key] for key in ("kind", "train_interactions", "validation_users", "test_users")
    }
    assert counts == {"kind": "official", "train_interactions": 7, "validation_users": 2, "test_users": 3}
    assert dataset.card["leakage"]["out_of_time_order"] == 1  # of b
    metrics = evaluate(tmp_path / "report", dataset, {}, split="test", baselines=("popularity",), resamples=20)
    # Before the tests i0 was bought three times, i3 twice, i1, i2, i4 and i5 once, i6 never: targets are 3rd to 6th.
    (row,) = [row for row in metrics["rows"] if row["name"] == "popularity"]
    assert metrics["users"] == 3
    assert (row["metrics"]["recall@1"], row["metrics"]["recall@10"]) == (0, 1)
    assert row["metrics"]["mrr"] == pytest.approx(1 / 4.5)
    assert artifacts.read_manifest(tmp_path / "d", kind="dataset")["split"]["kind"] == "official"
