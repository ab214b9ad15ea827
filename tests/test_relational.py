"""The rules, splits and audit as Ibis expressions, each against slow and obvious Python over the same rows."""

import collections
import itertools
import statistics as stdlib_statistics
from pathlib import Path

import ibis
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.data import audit, relational, splits
from calrec_jax.data.engines import Engine
from calrec_jax.data.splits import Split

# Few users, items, times and texts, so that duplicates, repeats and ties are common. The list has the file's order.
ROW = st.tuples(
    st.sampled_from("abc"), st.sampled_from("wxyz"), st.integers(0, 6), st.sampled_from([None, 1, 2]), st.integers(0, 2)
)
LOGS = st.lists(ROW, min_size=1, max_size=30)
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("line", pa.int64()),
        ("text_hash", pa.int64()),
        ("part", pa.int8()),
    ]
)
FEW = settings(deadline=None, max_examples=12)


@pytest.fixture(scope="module")
def engine():
    connection = ibis.duckdb.connect()
    yield Engine(connection, Path())
    connection.disconnect()


def rows_of(log, official=False, stretch=1):
    return [
        {"user_id": u, "item_id": i, "timestamp": t * stretch, "line": n, "text_hash": h, "part": p if official else 0}
        for n, (u, i, t, h, p) in enumerate(log, 1)
    ]


def table(rows):
    return ibis.memtable(pa.Table.from_pylist(rows, SCHEMA))


def run(expression):
    return sorted(expression.to_pyarrow().to_pylist(), key=lambda row: row["line"])


def by_user(rows):
    users = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["part"], row["timestamp"], row["line"])):
        users[row["user_id"]].append(row)
    return users


@given(LOGS)
@FEW
def test_duplicates(log):
    rows, seen, kept = rows_of(log), set(), []
    for row in rows:
        key = row["user_id"], row["item_id"], row["timestamp"]
        if key not in seen:
            seen.add(key)
            kept.append(row)
    assert run(relational.drop_duplicates(table(rows))) == kept


@given(LOGS, st.integers(0, 3))
@FEW
def test_near_duplicates(log, seconds):
    rows, last, kept = rows_of(log), {}, []
    for row in sorted(rows, key=lambda row: (row["timestamp"], row["line"])):
        key = row["user_id"], row["item_id"], row["text_hash"]
        if row["text_hash"] is None or key not in last or row["timestamp"] - last[key] > seconds:
            kept.append(row)
        last[key] = row["timestamp"]
    assert run(relational.drop_near_duplicates(table(rows), seconds)) == sorted(kept, key=lambda row: row["line"])


@given(LOGS, st.booleans(), st.integers(1, 5))
@FEW
def test_consecutive_repeats_and_short_users(log, official, least):
    rows, kept = rows_of(log, official), []
    for own in by_user(rows).values():
        kept += [row for n, row in enumerate(own) if n == 0 or row["item_id"] != own[n - 1]["item_id"]]
    kept = sorted(kept, key=lambda row: row["line"])
    assert run(relational.drop_consecutive_repeats(table(rows))) == kept
    counts = collections.Counter(row["user_id"] for row in kept)
    long = [row for row in kept if counts[row["user_id"]] >= least]
    assert run(relational.drop_rare(table(kept), "user_id", least)) == long


@given(LOGS, st.integers(1, 4), st.integers(1, 4))
@FEW
def test_the_core_is_the_fixed_point(engine, log, user_core, item_core):
    rows = kept = rows_of(log)
    while True:  # one at a time, in any order: the fixed point is the same
        users, items = (collections.Counter(row[key] for row in kept) for key in ("user_id", "item_id"))
        bad = [row for row in kept if users[row["user_id"]] < user_core or items[row["item_id"]] < item_core]
        if not bad:
            break
        kept = [row for row in kept if row is not bad[0]]
    start = engine.materialise(table(rows))
    made, _ = relational.core(start, user_core, item_core, engine.materialise, engine.drop)
    assert run(made) == kept


def walked(engine, rows, split):
    """The engine's walk and users, and by Python: user to purchases with part, position, target."""
    walk = engine.materialise(splits.walk(table(rows), split))
    expected = by_user(rows)
    for own in expected.values():
        for n, row in enumerate(own):
            if split.kind == splits.LEAVE_LAST_OUT:
                row["part"] = max(0, n - len(own) + 3)
            elif split.kind == splits.GLOBAL_TIME:
                row["part"] = (row["timestamp"] >= split.valid_from) + (row["timestamp"] >= split.test_from)
        parts = [row["part"] for row in own]
        for n, row in enumerate(own):
            row["position"] = n
            row["target"] = row["part"] if row["part"] and n and row["part"] not in parts[:n] else 0
    return walk, engine.materialise(splits.users(walk)), expected


SPLITS = st.sampled_from([Split("leave_last_out"), Split("global_time", 2, 4), Split("official")])


@given(LOGS, SPLITS)
@settings(deadline=None, max_examples=20)
def test_splits(engine, log, split):
    rows = rows_of(log, split.kind == "official")
    walk, users, expected = walked(engine, rows, split)
    got = {(row["user_id"], row["position"]): row for row in walk.to_pyarrow().to_pylist()}
    assert len(got) == len(rows)
    for user, own in expected.items():
        for n, row in enumerate(own):
            one = got[user, n]
            assert (one["line"], one["part"], one["target"]) == (row["line"], row["part"], row["target"]), split
            assert one["previous_item"] == (own[n - 1]["item_id"] if n else None)
    for row in users.to_pyarrow().to_pylist():
        own = expected[row["user_id"]]
        at = {p["target"]: p["position"] for p in own if p["target"]}
        assert row == {
            "user_id": row["user_id"],
            "length": len(own),
            "train_end": sum(p["part"] == 0 for p in own),
            "valid_position": at.get(1, -1),
            "test_position": at.get(2, -1),
        }


@given(LOGS, SPLITS, st.sampled_from([1, 50_000]))
@settings(deadline=None, max_examples=20)
def test_statistics_and_leakage(engine, log, split, stretch):
    if split.kind == "global_time":
        split = Split("global_time", 2 * stretch, 4 * stretch)
    rows = rows_of(log, split.kind == "official", stretch)
    walk, users, expected = walked(engine, rows, split)
    stats, leaks = audit.statistics(engine, walk, users), audit.leakage(engine, walk)
    lengths = [len(own) for own in expected.values()]
    pairs = [pair for own in expected.values() for pair in itertools.pairwise(own)]
    n, items = len(rows), len({row["item_id"] for row in rows})
    assert (stats["users"], stats["items"], stats["interactions"]) == (len(expected), items, n)
    assert stats["density"] == pytest.approx(n / items / len(expected))
    assert stats["length_median"] == stdlib_statistics.median(lengths)
    assert stats["length_mean"] == pytest.approx(stdlib_statistics.fmean(lengths))
    assert (stats["length_min"], stats["length_max"]) == (min(lengths), max(lengths))
    assert stats["length_counts"] == {str(k): v for k, v in collections.Counter(lengths).items()}
    assert stats["repeats"] == n - len({(row["user_id"], row["item_id"]) for row in rows})
    assert stats["consecutive_repeats"] == sum(a["item_id"] == b["item_id"] for a, b in pairs)
    assert stats["tied"] == sum(a["timestamp"] == b["timestamp"] for a, b in pairs)
    assert leaks["out_of_time_order"] == sum(a["timestamp"] > b["timestamp"] for a, b in pairs)
    everything = [row for own in expected.values() for row in own]
    for number, name in ((1, "validation"), (2, "test")):
        targets = [(row, expected[row["user_id"]]) for row in everything if row["target"] == number]
        assert (name in leaks) == bool(targets)
        if not targets:
            continue
        before = [(row, own[row["position"] - 1]) for row, own in targets]
        train = [(row, [p for p in own if p["part"] == 0]) for row, own in targets]
        text = "text_hash"
        counts = {
            "targets": len(targets),
            "tied_targets": sum(a["timestamp"] == b["timestamp"] for a, b in before),
            "same_day_targets": sum(a["timestamp"] // 86_400 == b["timestamp"] // 86_400 for a, b in before),
            "repeated_targets": sum(
                row["item_id"] in [p["item_id"] for p in own[: row["position"]]] for row, own in targets
            ),
            "targets_in_training": sum(row["item_id"] in [p["item_id"] for p in seen] for row, seen in train),
            "texts_in_training": sum(
                row[text] is not None and row[text] in [p[text] for p in seen] for row, seen in train
            ),
        }
        assert {key: leaks[name][key] for key in counts} == counts
    train = [row["timestamp"] for row in everything if row["part"] == 0]
    test = [row["timestamp"] for row in everything if row["target"] == 2]
    later = [a > b for a in train for b in test]
    overlap = leaks["global_time"]
    assert overlap["later_pairs_share"] == pytest.approx(sum(later) / len(later) if later else 0)
    assert overlap["later_than_a_test_target"] == (sum(time > min(test) for time in train) if test else 0)
    if split.kind == "global_time":
        assert overlap["later_than_a_test_target"] == 0


def test_shares_become_the_times_of_purchases():
    rows = rows_of([("a", "x", time, None, 0) for time in (5, 1, 4, 4, 2, 9, 7, 8, 6, 3)])
    assert splits.global_time(table(rows), (0.5, 0.8)) == Split("global_time", 5, 8)
    assert splits.global_time(table(rows), None) == Split("global_time", 8, 9)
    assert splits.global_time(table(rows), ("1970-01-01T00:00:03", "1970-01-01T00:00:09+00:00")).valid_from == 3


def test_metadata_rows_and_catalogue():
    columns = {"item_id": pa.string(), "title": pa.string(), "brand": pa.string(), "line": pa.int64()}
    rows = [("i1", None, "b", 1), ("i1", "t", None, 2), ("i1", "t", "b", 4), ("i1", "u", "c", 3), ("i2", None, None, 5)]
    raw = [dict(zip(columns, row, strict=True)) for row in rows]
    raw = ibis.memtable(pa.Table.from_pylist(raw, pa.schema(columns)))
    best = relational.drop_repeated_items(raw, ("title", "brand"))
    assert sorted(best.to_pyarrow().to_pylist(), key=lambda row: row["item_id"]) == [
        {"item_id": "i1", "title": "u", "brand": "c"},
        {"item_id": "i2", "title": None, "brand": None},
    ]
    bought = table(rows_of([("a", "i1", 1, None, 0), ("a", "i3", 2, None, 0)]))
    both = relational.catalogue(bought, best, ("title", "brand"), keep_unbought=True).order_by("item_id")
    assert [tuple(row.values()) for row in both.to_pyarrow().to_pylist()] == [
        ("i1", "u", "c", True, True),
        ("i2", None, None, False, True),
        ("i3", None, None, True, False),
    ]
    assert relational.catalogue(bought, best, ("title",), keep_unbought=False).count().to_pyarrow().as_py() == 2


@pytest.mark.parametrize("dialect", ["pyspark", "bigquery"])
def test_the_same_expressions_compile_for_other_engines(dialect):
    bought = ibis.table(ibis.Schema.from_pyarrow(SCHEMA), name="interactions")
    kept = relational.drop_rare(relational.drop_consecutive_repeats(relational.drop_duplicates(bought)), "user_id", 3)
    kept = relational.core_round(relational.drop_near_duplicates(kept, 5), 5, 5)
    for kind in (Split("leave_last_out"), Split("global_time", 1, 2)):
        assert "interactions" in ibis.to_sql(splits.users(splits.walk(kept, kind)), dialect=dialect)
