"""Prepare: from raw files to the dataset: the card's arithmetic, resuming, the cache, and what is refused."""

import collections
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax import artifacts
from calrec_jax.data import engines, staging
from calrec_jax.data.card import summary
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.prepare import prepare
from calrec_jax.data.synth import Synth, write_synth
from calrec_jax.data.templates import ATTRIBUTES, Template
from calrec_jax.errors import CalrecError

# Few users, items and times, so that duplicates, repeats and ties are common. The order of the list is the file's.
LOGS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 3)), min_size=1, max_size=25)


def reference(log, remove_repeats, min_length):
    """What prepare should do, row by row: user to [(time, line, item)], and the counts after each rule."""
    counts = [len(log)]
    seen, users = set(), collections.defaultdict(list)
    for line, (user, item, time) in enumerate(log, start=1):
        if (user, item, time) not in seen:
            seen.add((user, item, time))
            users[user].append((time, line, item))
    counts.append(len(seen))
    for user in users:
        users[user].sort()
        if remove_repeats:
            rows = users[user]
            users[user] = [row for i, row in enumerate(rows) if i == 0 or row[2] != rows[i - 1][2]]
    if remove_repeats:
        counts.append(sum(map(len, users.values())))
    kept = {user: rows for user, rows in users.items() if len(rows) >= min_length}
    return kept, [*counts, sum(map(len, kept.values()))]


LOG = [
    *[("u1", f"i{k}", 10) for k in (3, 1, 2, 0)],  # one day: the order is the file's
    *[("u2", f"i{k}", 20 + t) for t, k in enumerate((0, 0, 1, 2, 2, 0))],
    ("u3", "i4", 1),  # too short
    ("u3", "i5", 2),
    ("u1", "i1", 10),  # an exact duplicate
]
ITEMS = [
    {"asin": f"i{k}", "title": f"Thing {k}", "category": ["Shop", "Things"], "brand": "Acme", "price": f"${k}"}
    for k in (0, 1, 2, 3, 4, 9)
]


def write_json_lines(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
    return path


@pytest.fixture
def raw(tmp_path):
    reviews = [{"reviewerID": user, "asin": item, "unixReviewTime": time} for user, item, time in LOG]
    return {
        "name": "toy",
        "reviews": write_json_lines(tmp_path / "X_5.json.gz", reviews),
        "metadata": write_json_lines(tmp_path / "meta_X.json.gz", ITEMS),
    }


def names(dataset, user):
    return dataset.item_ids[dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]].tolist()


def test_prepare_end_to_end(tmp_path, raw):
    dataset = prepare(tmp_path / "d", **raw)
    assert dataset.user_ids.tolist() == ["u1", "u2"]
    assert names(dataset, 0) == ["i3", "i1", "i2", "i0"] and names(dataset, 1) == ["i0", "i1", "i2", "i0"]
    assert dataset.item_ids.tolist() == ["i0", "i1", "i2", "i3", "i4", "i5", "i9"]
    assert dataset.texts[1] == "Title: Thing 1. Category: Shop, Things. Brand: Acme. Price: $1."
    assert dataset.texts[5] == "Title: Unknown. Category: Unknown. Brand: Unknown. Price: Unknown."
    card = dataset.card
    keys = ("interactions_in", "interactions_out", "users_in", "users_out")
    assert [(rule["rule"], *(rule[key] for key in keys)) for rule in card["rules"]] == [
        ("read", 13, 13, 3, 3),
        ("exact duplicates of user, item and time", 13, 12, 3, 3),
        ("consecutive repeats of an item", 12, 10, 3, 3),
        ("users with fewer than 3 purchases", 10, 8, 3, 2),
    ]
    assert card["catalogue"] == {
        "items": 7,
        "bought": 6,
        "repeated_in_metadata": 0,
        "unbought_in_metadata": 1,
        "unbought_kept": True,
        "without_metadata": 1,
        "absent": dict.fromkeys(ATTRIBUTES, 1),
        "absent_share": dict.fromkeys(ATTRIBUTES, 1 / 7),
        "without_any_attribute": {"count": 1, "first": ["i5"]},
    }
    assert card["lines"]["reviews"]["lines"] == card["lines"]["reviews"]["kept"] == card["rules"][0]["interactions_in"]
    assert card["sources"]["metadata"] == [
        {
            "file": "meta_X.json.gz",
            "bytes": raw["metadata"].stat().st_size,
            "sha256": artifacts.hash_file(raw["metadata"]),
        }
    ]
    assert card["leakage"]["test"]["tied_targets_share"] == 0.5 and card["statistics"]["first_day"] == "1970-01-01"
    assert card["split"]["kind"] == "leave_last_out" and card["split"]["test_users"] == 2
    assert card["content"] == artifacts.read_manifest(tmp_path / "d", kind="dataset")["content"]
    assert any("8 interactions" in line and "density 1.00e+00" in line for line in summary(card))
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "data_card.json",
        "items.parquet",
        "manifest.json",
        "quarantine.jsonl",
        "sequences.parquet",
    ]
    assert not list(tmp_path.glob("*.quarantine.jsonl"))


def test_settings_do_what_they_say(tmp_path, raw):
    whole = prepare(tmp_path / "a", **raw, remove_consecutive_repeats=False, keep_unbought_items=False)
    assert names(whole, 1) == ["i0", "i0", "i1", "i2", "i2", "i0"]
    assert whole.item_ids.tolist() == ["i0", "i1", "i2", "i3", "i4", "i5"]
    assert [rule["interactions_out"] for rule in whole.card["rules"]] == [13, 12, 10]
    longer = prepare(tmp_path / "b", **raw, remove_consecutive_repeats=False, min_length=5)
    assert longer.user_ids.tolist() == ["u2"]
    titles = prepare(tmp_path / "c", **raw, template=Template(("title",)))
    assert titles.texts[0] == "Title: Thing 0." and titles.template == Template(("title",)).fingerprint


@given(LOGS, st.booleans())
@settings(deadline=None, max_examples=6)
def test_the_cards_rules_add_up(tmp_path_factory, log, remove_repeats):
    folder = tmp_path_factory.mktemp("x")
    reviews = [{"reviewerID": user, "asin": item, "unixReviewTime": time} for user, item, time in log]
    raw = {
        "reviews": write_json_lines(folder / "X.json.gz", reviews),
        "metadata": write_json_lines(folder / "meta_X.json.gz", [{"asin": item} for item in "xyz"]),
    }
    kept, counts = reference(log, remove_repeats, 3)
    if not kept:
        with pytest.raises(CalrecError, match="too small to split"):
            prepare(folder / "d", name="x", **raw, remove_consecutive_repeats=remove_repeats)
        return
    card = prepare(folder / "d", name="x", **raw, remove_consecutive_repeats=remove_repeats).card
    assert [rule["interactions_out"] for rule in card["rules"]] == counts
    for before, after in zip(card["rules"], card["rules"][1:], strict=False):
        assert (before["interactions_out"], before["users_out"]) == (after["interactions_in"], after["users_in"])
    assert card["statistics"]["interactions"] == counts[-1]


def test_run_again_skips_and_another_setting_is_refused(tmp_path, raw):
    first = prepare(tmp_path / "d", **raw)
    stamp = (tmp_path / "d" / "items.parquet").stat().st_mtime_ns
    assert prepare(tmp_path / "d", **raw).hash == first.hash
    assert (tmp_path / "d" / "items.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(CalrecError, match="setting min_length"):
        prepare(tmp_path / "d", **raw, min_length=4)
    with pytest.raises(CalrecError, match="made from another template"):
        prepare(tmp_path / "d", **raw, template=Template(("title",)))
    write_json_lines(raw["metadata"], ITEMS[:-1])
    with pytest.raises(CalrecError, match="made from another metadata"):
        prepare(tmp_path / "d", **raw)


def test_same_input_same_bytes(tmp_path, raw):
    prepare(tmp_path / "a", **raw)
    prepare(tmp_path / "b", **raw)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_half_written_folder_is_made_again_but_nothing_else_removed(tmp_path, raw):
    prepare(tmp_path / "d", **raw)
    (tmp_path / "d" / "manifest.json").unlink()
    (tmp_path / "d" / "items.parquet").write_bytes(b"half")
    assert len(prepare(tmp_path / "d", **raw).item_ids) == 7
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("precious")
    with pytest.raises(CalrecError, match="own exists and is not a dataset"):
        prepare(tmp_path / "own", **raw)
    assert (tmp_path / "own" / "thesis.txt").read_text() == "precious"


def test_metadata_of_another_category(tmp_path, raw):
    write_json_lines(raw["metadata"], [{"asin": "other", "title": "Other"}])
    with pytest.raises(CalrecError, match=r"No item of meta_X\.json\.gz is in X_5\.json\.gz.*prepare\.metadata"):
        prepare(tmp_path / "d", **raw)
    assert not (tmp_path / "d").exists()


def test_a_category_too_small_to_split(tmp_path, raw):
    with pytest.raises(CalrecError, match=r"toy is too small to split: no user has 50.*3 users, 13 interactions"):
        prepare(tmp_path / "d", **raw, min_length=50)
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob("*.quarantine.jsonl"))


def test_bad_lines_are_kept_for_the_user(tmp_path, raw):
    reviews = gzip.decompress(raw["reviews"].read_bytes())
    raw["reviews"].write_bytes(gzip.compress(reviews + b"{\n"))
    with pytest.raises(CalrecError, match=r"1 of 14 lines.*d\.quarantine\.jsonl"):
        prepare(tmp_path / "d", **raw)
    assert json.loads((tmp_path / "d.quarantine.jsonl").read_text())["line"] == 14
    dataset = prepare(tmp_path / "d", **raw, max_bad_share=0.1)
    assert dataset.card["lines"]["reviews"]["quarantined"] == {"not JSON": 1}
    assert json.loads((tmp_path / "d" / "quarantine.jsonl").read_text())["reason"] == "not JSON"
    assert not (tmp_path / "d.quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, r"prepare\.name='a/b'"),
        ({"layout": "1999"}, r"prepare\.layout='1999': one of \['2014', '2018', '2023', 'tables'\]"),
        ({"min_length": 2}, r"prepare\.min_length=2: at least 3"),
        ({"max_bad_share": 1.5}, r"prepare\.max_bad_share=1\.5"),
        ({"reviews": Path("nowhere.json.gz")}, r"nowhere\.json\.gz does not exist"),
        ({"metadata": []}, "No raw file is named"),
        ({"split": "random"}, r"prepare\.split='random': one of \['leave_last_out', 'global_time', 'official'\]"),
        ({"split_times": (0.8, 0.9)}, r"prepare\.split_times=\[0\.8, 0\.9\] has no effect"),
        ({"split": "global_time", "split_times": (0.9, 0.8)}, r"prepare\.split_times=.*two moments"),
        ({"split": "global_time", "split_times": (0.9, 1_000)}, r"prepare\.split_times=.*two moments"),
        ({"split": "global_time", "split_times": ("soon", "later")}, "'soon' is neither seconds nor an ISO date"),
        ({"split": "global_time", "split_times": (500, 1000)}, r"leave a part without purchases.*from 1970-01-01 \(1"),
        ({"split": "official"}, r"prepare\.split='official': 13 of 13 purchases.*no split of their own"),
        ({"core": (5,)}, r"prepare\.core=\[5\]: two whole numbers"),
        ({"core": (3, 9)}, r"prepare\.core=\(3, 9\).*empties toy: nothing is left after 1 rounds of 10 purchases"),
        ({"keep_categories": ("Toys",)}, r"prepare\.keep_categories=\['Toys'\]: no purchase of toy"),
        ({"near_duplicate_days": -1}, r"prepare\.near_duplicate_days=-1"),
        ({"memory_limit": "much"}, r"prepare\.memory_limit='much'"),
        ({"threads": 0}, r"prepare\.threads=0"),
        ({"cache_gib": -1}, r"prepare\.cache_gib=-1"),
        ({"engine": "oracle://x"}, r"prepare\.engine='oracle://x': 'duckdb', or a URL"),
    ],
)
def test_wrong_settings_are_named(tmp_path, raw, change, message):
    with pytest.raises(CalrecError, match=message):
        prepare(tmp_path / "d", **{**raw, **change})
    assert not (tmp_path / "d").exists()


def test_no_space_left(tmp_path, raw, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calrec_jax.data.dataset.pq.ParquetWriter", full)
    with pytest.raises(CalrecError, match="no space left to write in"):
        prepare(tmp_path / "d", **raw)
    assert not (tmp_path / "d").exists()


def test_rules_that_are_off_by_default(tmp_path, raw):
    core = prepare(tmp_path / "a", **raw, core=(3, 2))
    assert core.item_ids.tolist() == ["i0", "i1", "i2"] and not core.card["catalogue"]["unbought_kept"]
    assert core.card["rules"][-1]["rounds"] == 1
    bought = [("x", 0), ("y", 1), ("x", 2), ("y", 3), ("z", 4), ("x", 10**6)]
    rows = [{"reviewerID": "u9", "asin": i, "unixReviewTime": t, "reviewText": "Fine."} for i, t in bought]
    write_json_lines(raw["reviews"], rows)
    write_json_lines(raw["metadata"], [{"asin": "x", "category": ["Shop", "Toys"]}, {"asin": "q"}])
    near = prepare(tmp_path / "b", **raw, near_duplicate_days=1)
    assert names(near, 0) == ["x", "y", "z", "x"]
    assert near.card["rules"][2]["rule"] == "reviews of the same user, item and text within 1 days"
    toys = prepare(tmp_path / "c", **raw, keep_categories=("Toys",), remove_consecutive_repeats=False)
    assert toys.item_ids.tolist() == ["x"] and len(toys.items) == 3


def test_a_global_split_is_a_fact_of_manifest_and_card(tmp_path, raw):
    rows = [("a", 1), ("a", 2), ("a", 25), ("a", 35), ("b", 21), ("b", 31), ("c", 1), ("c", 22), ("d", 5), ("e", 33)]
    reviews = [{"reviewerID": user, "asin": f"i{time % 5}", "unixReviewTime": time} for user, time in rows]
    write_json_lines(raw["reviews"], reviews)
    rules = {"min_length": 1, "remove_consecutive_repeats": False}
    dataset = prepare(tmp_path / "d", **raw, split="global_time", split_times=(20, 30), **rules)
    assert dataset.user_ids.tolist() == list("abcde")
    assert dataset.train_end.tolist() == [2, 0, 1, 1, 0]
    assert dataset.valid_position.tolist() == [2, -1, 1, -1, -1]  # b and e have nothing before their first purchase
    assert dataset.test_position.tolist() == [3, 1, -1, -1, -1]
    split = artifacts.read_manifest(tmp_path / "d", kind="dataset")["split"]
    assert split == dataset.card["split"]
    assert (split["kind"], split["valid_from"], split["test_from"]) == ("global_time", 20, 30)
    assert (split["train_interactions"], split["validation_users"], split["test_users"]) == (4, 2, 2)
    assert split["users_without_target"] == 2 and dataset.card["leakage"]["global_time"]["later_pairs_share"] == 0


def test_staged_files_are_reused_until_the_raw_ones_change(tmp_path, raw, monkeypatch):
    first = prepare(tmp_path / "a", **raw)
    read = staging.readers.read

    def refuse(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(staging.readers, "read", refuse)
    again = prepare(tmp_path / "b", **raw)  # the same, elsewhere
    other = prepare(tmp_path / "c", **raw, min_length=5, remove_consecutive_repeats=False)  # another rule
    assert again.hash == first.hash and other.user_ids.tolist() == ["u2"]
    assert again.card == first.card
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path / "e", **raw, cache_gib=0)
    (entry,) = (tmp_path / ".staged").iterdir()
    part = next((entry / "items").iterdir())
    part.write_bytes(part.read_bytes()[:-1])  # damaged: read again
    with pytest.raises(AssertionError, match="read again"):
        prepare(tmp_path / "f", **raw)
    monkeypatch.setattr(staging.readers, "read", read)
    assert prepare(tmp_path / "g", **raw).hash == first.hash


def test_the_cache_is_bounded(tmp_path, raw):
    cache = {"cache_dir": tmp_path / "cache", "cache_gib": 1e-9}
    prepare(tmp_path / "a", **raw, **cache)
    (old,) = cache["cache_dir"].iterdir()
    write_json_lines(raw["metadata"], ITEMS[:-1])
    prepare(tmp_path / "b", **raw, **cache)
    assert len(list(cache["cache_dir"].iterdir())) == 2  # used within the hour
    os.utime(old / artifacts.MANIFEST, (0, 0))
    write_json_lines(raw["metadata"], ITEMS[:-2])
    prepare(tmp_path / "c", **raw, **cache)
    left = list(cache["cache_dir"].iterdir())
    assert old not in left and len(left) == 2


KILLED = """
import sys, time
from calrec_jax.data import dataset, prepare
write = dataset._write
def slow(path, *arguments):
    done = write(path, *arguments)
    print("written", path.name, flush=True)
    time.sleep(60)
    return done
dataset._write = slow
prepare.prepare(sys.argv[1], name="toy", reviews=sys.argv[2], metadata=sys.argv[3])
"""


def test_a_killed_run_leaves_no_half_dataset(tmp_path, raw):
    command = [sys.executable, "-c", KILLED, tmp_path / "d", raw["reviews"], raw["metadata"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written items.parquet\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "d").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    assert len(left) == 2  # the unfinished folder and the scratch folder
    assert len(prepare(tmp_path / "d", **raw).user_ids) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    assert not list(tmp_path.glob("*.quarantine.jsonl"))


def test_what_an_engine_lacks_is_named(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(engines, "_is_installed", lambda module: False)
    with pytest.raises(CalrecError, match=r"pip install -e '\.\[spark\]'.*prepare\.engine at 'duckdb'"):
        prepare(tmp_path / "d", **raw, engine="pyspark://")
    with pytest.raises(CalrecError, match=r"bigquery://shop/logs.*pip install -e '\.\[bigquery\]'"):
        prepare(tmp_path / "d", **raw, engine="bigquery://shop/logs")
    with pytest.raises(CalrecError, match=r"prepare\.engine='mysql://x': 'duckdb', or a URL such as"):
        prepare(tmp_path / "d", **raw, engine="mysql://x")
    monkeypatch.setattr(engines, "_is_installed", lambda module: True)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CalrecError, match=r"needs Java 17 or later.*JAVA_HOME"):
        prepare(tmp_path / "d", **raw, engine="pyspark://?spark.master=local[2]")


def test_too_little_memory_is_named(tmp_path, raw):
    with pytest.raises(CalrecError, match=r"prepare\.memory_limit='1KB' is too small for this category: raise it"):
        prepare(tmp_path / "d", **raw, memory_limit="1KB")
    assert not (tmp_path / "d").exists()


WATCHED = """
import pathlib, sys, threading, time
from calrec_jax.data.prepare import prepare
out, reviews, metadata, limit = sys.argv[1:]
spilled = [0]
def watch():
    while True:
        spilled.append(sum(1 for _ in pathlib.Path(out).parent.glob(".tmp-*/spill/*")))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
dataset = prepare(out, name="x", reviews=reviews, metadata=metadata, memory_limit=limit, threads=1)
print(dataset.hash, max(spilled) > 0)
"""


@pytest.mark.slow
def test_what_does_not_fit_the_memory_spills_and_changes_nothing(tmp_path):
    reviews, metadata = write_synth(tmp_path, Synth(users=60_000, items=5_000, reviews_per_user=8, seed=2))
    made = {}
    for limit in ("240MB", "3GB"):
        command = [sys.executable, "-c", WATCHED, tmp_path / limit, reviews, metadata, limit]
        made[limit] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert made["240MB"][0] == made["3GB"][0]
    assert (made["240MB"][1], made["3GB"][1]) == ("True", "False")


SHARED = Path(os.environ.get("CALREC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(
    not (SHARED / "2018").is_dir(), reason=f"real data not there: {SHARED / '2018'} (CALREC_SHARED_DATA)"
)
@pytest.mark.parametrize(
    ("category", "settings", "users", "items", "interactions"),
    [
        ("Industrial_and_Scientific", {"remove_consecutive_repeats": False}, 8442, 4385, 59427),
        # 59,286 after the repeats; one user has a single purchase left and cannot be split.
        ("Industrial_and_Scientific", {}, 8441, 4385, 59285),
        ("Office_Products", {"remove_consecutive_repeats": False}, 3231, 3459, 22447),
        ("Gift_Cards", {"remove_consecutive_repeats": False, "keep_unbought_items": False}, 458, 148, 2969),
    ],
)
def test_real_categories_have_the_known_counts(tmp_path, category, settings, users, items, interactions):
    files = (SHARED / "2018" / f"{category}_5.json.gz", SHARED / "2018" / f"meta_{category}.json.gz")
    dataset = prepare(tmp_path / "d", name=category, reviews=files[0], metadata=files[1], **settings)
    assert (len(dataset.user_ids), len(dataset.item_ids), len(dataset.items)) == (users, items, interactions)
    assert Dataset.load(tmp_path / "d").hash == dataset.hash
