"""Synthetic dumps: what they hold, that the same arguments give the same bytes, and that memory stays bounded."""

import gzip
import json
import statistics
import tracemalloc

import pytest

from calrec_jax import cli
from calrec_jax.data import synth as synth_lib
from calrec_jax.data.prepare import prepare
from calrec_jax.data.synth import Synth, item_id, user_id, write_synth
from calrec_jax.errors import CalrecError


def read(path):
    rows, bad = [], 0
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            bad += 1
    return rows, bad


def test_a_dump_is_as_asked(tmp_path):
    reviews, metadata = write_synth(tmp_path, Synth(users=3000, items=500, reviews_per_user=7.5, seed=4))
    rows, bad = read(reviews)
    assert {row["reviewerID"] for row in rows} == {user_id(user) for user in range(3000)}
    assert {row["asin"] for row in rows} <= {item_id(item) for item in range(500)}
    assert 0.9 * 22_500 < len(rows) < 1.1 * 22_500 and 0 < bad < 0.003 * len(rows)
    lengths = [len(row["reviewText"]) for row in rows]
    assert 250 < statistics.fmean(lengths) < 400 and statistics.median(lengths) < statistics.fmean(lengths)
    assert all(1.2e9 < row["unixReviewTime"] < 1.9e9 and row["unixReviewTime"] % 86_400 == 0 for row in rows)
    items, _ = read(metadata)
    assert len({row["title"] for row in items}) == len({row["asin"] for row in items}) == 500
    dataset = prepare(tmp_path / "d", name="x", reviews=reviews, metadata=metadata)
    assert len(dataset.user_ids) == 3000 and dataset.card["split"]["test_users"] == 3000


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    made = [
        write_synth(tmp_path / name, Synth(users=40, items=30, seed=seed))[0].read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert made[0] == made[1] != made[2]


def test_memory_does_not_grow_with_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(synth_lib, "_CHUNK", 100)
    peaks = []
    for users in (1200, 3600):
        tracemalloc.start()
        write_synth(tmp_path / str(users), Synth(users=users, items=50))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_codes_are_distinct():
    assert len({item_id(n) for n in range(50_000)}) == len({user_id(n) for n in range(50_000)}) == 50_000
    assert len(item_id(7)) == 10 and len(user_id(7)) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 0}, "--users=0: must be a whole number from 1"),
        ({"reviews_per_user": 0.5}, "--reviews_per_user=0.5: must be from 1 to 1000"),
        ({"category": "Toys"}, r"--category=Toys: must be one of \['Home_and_Kitchen', 'Office_Products'\]"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(CalrecError, match=message):
        Synth(**{"users": 5, "items": 5, **change})


def test_the_verb(tmp_path, capsys):
    assert cli.main(["synth", "--users=20", "--items=9", f"--out={tmp_path}", "--seed=3"]) == 0
    assert "Office_Products_5.json.gz" in capsys.readouterr().out
    assert (tmp_path / "Office_Products_5.json.gz").read_bytes() == write_synth(
        tmp_path / "b", Synth(users=20, items=9, seed=3)
    )[0].read_bytes()
