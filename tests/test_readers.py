"""The reader of the 2018 layout: every line is kept, dropped by a rule or quarantined with its reason."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import read_files

from calrec_jax.data import quarantine as quarantine_lib
from calrec_jax.data.fields import text_hash
from calrec_jax.errors import CalrecError

REVIEW = {"reviewerID": "u1", "asin": "i1", "unixReviewTime": 1_400_000_000}
ITEM = {"asin": "i1", "title": "Wire", "category": ["Shop", "Wire"], "brand": "Acme", "price": "$3.00"}


def as_bytes(line):
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


def write(path, lines):
    data = b"".join(as_bytes(line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def read(folder, reviews=(REVIEW,), items=(ITEM,), *, share=1.0, suffix=".json.gz"):
    """Reads lines as files; returns the raw category and the quarantined rows."""
    paths = write(folder / f"X_5{suffix}", reviews), write(folder / f"meta_X{suffix}", items)
    raw = read_files(*paths, folder / "quarantine.jsonl", share)
    quarantined = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]
    for report in (raw.reviews, raw.metadata):
        assert report.lines == report.kept + sum(report.dropped.values()) + sum(report.quarantined.values())
    assert len(quarantined) == sum((raw.reviews.quarantined + raw.metadata.quarantined).values())
    return raw, quarantined


@pytest.mark.parametrize("suffix", [".json.gz", ".json"])
def test_good_lines_are_kept(tmp_path, suffix):
    second = {**REVIEW, "asin": " i2 ", "unixReviewTime": 5.0, "reviewText": "liked it"}
    raw, quarantined = read(tmp_path, [REVIEW, second], suffix=suffix)
    liked = text_hash("Liked  it!")
    assert raw.interactions.to_pylist() == [
        {"user_id": "u1", "item_id": "i1", "timestamp": 1_400_000_000, "text_hash": None, "split": None, "line": 1},
        {"user_id": "u1", "item_id": "i2", "timestamp": 5, "text_hash": liked, "split": None, "line": 2},
    ]
    expected = {
        "item_id": "i1",
        "title": "Wire",
        "category": "Shop, Wire",
        "brand": "Acme",
        "price": "$3.00",
        "line": 1,
    }
    assert raw.items.to_pylist() == [expected]
    assert quarantined == [] and not raw.reviews.repaired and not raw.metadata.repaired


def test_zipping_is_read_from_the_content_and_a_byte_order_mark_ignored(tmp_path):
    (tmp_path / "X.json").write_bytes(gzip.compress(as_bytes(REVIEW)))
    (tmp_path / "meta.json.gz").write_bytes(b"\xef\xbb\xbf" + as_bytes(ITEM))
    raw = read_files(tmp_path / "X.json", tmp_path / "meta.json.gz", tmp_path / "q", 0.0)
    assert (raw.reviews.kept, raw.metadata.kept) == (1, 1)


BAD_REVIEWS = [
    ("{not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"reviewerID": ' + "9" * 5000 + "}", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ("null", "not a JSON object"),
    (b'{"reviewerID": "\xff"}', "not UTF-8"),
    ({"asin": "i1", "unixReviewTime": 1}, "reviewerID is missing"),
    ({**REVIEW, "reviewerID": None}, "reviewerID is missing"),
    ({**REVIEW, "reviewerID": 7}, "reviewerID is not a string"),
    ({**REVIEW, "reviewerID": " "}, "reviewerID is empty"),
    ({**REVIEW, "asin": ""}, "asin is empty"),
    ({**REVIEW, "asin": ["i1"]}, "asin is not a string"),
    ({**REVIEW, "asin": "a\u0000b"}, "asin has characters that do not print"),
    ({**REVIEW, "asin": "\ud800"}, "asin has characters that do not print"),
    ({**REVIEW, "unixReviewTime": None}, "unixReviewTime is missing"),
    ({**REVIEW, "unixReviewTime": "1400000000"}, "unixReviewTime is not a whole number"),
    ({**REVIEW, "unixReviewTime": True}, "unixReviewTime is not a whole number"),
    ({**REVIEW, "unixReviewTime": 1.5}, "unixReviewTime is not a whole number"),
    ({**REVIEW, "unixReviewTime": float("nan")}, "unixReviewTime is not a whole number"),
    ({**REVIEW, "unixReviewTime": -1}, "unixReviewTime is negative"),
    ({**REVIEW, "unixReviewTime": 4_102_444_800}, "unixReviewTime is after the year 2100"),
    ({**REVIEW, "unixReviewTime": 10**30}, "unixReviewTime is after the year 2100"),
]


def test_each_bad_review_is_quarantined_with_its_reason(tmp_path):
    raw, quarantined = read(tmp_path, [REVIEW, *(line for line, _ in BAD_REVIEWS), REVIEW])
    assert raw.reviews.kept == 2 and raw.interactions["line"].to_pylist() == [1, len(BAD_REVIEWS) + 2]
    assert [(row["line"], row["reason"]) for row in quarantined] == [
        (number, reason) for number, (_, reason) in enumerate(BAD_REVIEWS, start=2)
    ]
    assert {row["file"] for row in quarantined} == {"X_5.json.gz"}
    assert quarantined[0]["text"] == "{not json"
    assert quarantined[5]["text"] == '{"reviewerID": "\\xff"}'
    assert max(len(row["text"]) for row in quarantined) == 300  # clipped


def test_blank_lines_are_dropped_by_rule(tmp_path):
    raw, _ = read(tmp_path, ["", REVIEW, "  "], ["", ITEM])
    assert raw.reviews.dropped == {"blank line": 2} and raw.metadata.dropped == {"blank line": 1}
    assert raw.interactions["line"].to_pylist() == [2]


@pytest.mark.parametrize(
    ("value", "seconds", "milliseconds"),
    [(0, 0, 0), (4_102_444_799, 4_102_444_799, 0), (10**11, 10**8, 1), (1_400_000_000_999, 1_400_000_000, 1)],
)
def test_times_in_milliseconds_are_divided_and_counted(tmp_path, value, seconds, milliseconds):
    raw, _ = read(tmp_path, [{**REVIEW, "unixReviewTime": value}])
    assert raw.interactions["timestamp"].to_pylist() == [seconds]
    assert sum(raw.reviews.repaired.values()) == milliseconds


@pytest.mark.parametrize(
    ("change", "field", "value", "repair"),
    [
        ({"title": '<span class="a-size-medium'}, "title", None, "title without content, made absent"),
        ({"title": 3}, "title", None, "title of a wrong type, made absent"),
        ({"title": "A &amp; B"}, "title", "A & B", None),
        ({"title": None}, "title", None, None),
        ({"brand": "  "}, "brand", None, None),
        ({"brand": "N/A"}, "brand", None, "brand without content, made absent"),
        ({"brand": "Unknown"}, "brand", "Unknown", None),
        ({"price": ".a-box{}"}, "price", None, "price without content, made absent"),
        ({"price": ""}, "price", None, None),
        ({"price": 12.99}, "price", "$12.99", None),
        ({"price": True}, "price", None, "price of a wrong type, made absent"),
        ({"category": [], "main_cat": "Grocery"}, "category", "Grocery", "category taken from main_cat"),
        ({"category": "Wire"}, "category", "Wire", None),
        ({"category": ["A", 3, "A", "B"]}, "category", "A, B", None),
        ({"category": {"a": 1}}, "category", None, "category of a wrong type, made absent"),
    ],
)
def test_attributes_are_cleaned_and_repairs_counted(tmp_path, change, field, value, repair):
    raw, _ = read(tmp_path, items=[{**ITEM, **change}])
    assert raw.items[field].to_pylist() == [value]
    assert dict(raw.metadata.repaired) == ({repair: 1} if repair else {})


def test_bad_metadata_lines_are_quarantined(tmp_path):
    raw, quarantined = read(tmp_path, items=[{"title": "no asin"}, ITEM, "{'asin': 'python'}"])
    assert [row["reason"] for row in quarantined] == ["asin is missing", "not JSON"]
    assert raw.metadata.kept == 1


def test_all_rows_of_an_item_are_staged(tmp_path):
    rows = [{**ITEM, "title": ""}, {**ITEM, "title": "second"}, {**ITEM, "asin": "i2"}]
    raw, _ = read(tmp_path, items=rows)
    assert [(row["item_id"], row["title"], row["line"]) for row in raw.items.to_pylist()] == [
        ("i1", None, 1),
        ("i1", "second", 2),
        ("i2", "Wire", 3),
    ]
    assert raw.metadata.kept == 3


@given(st.lists(st.sampled_from([REVIEW, "", "{", *(line for line, _ in BAD_REVIEWS[3:])]), max_size=20))
@settings(deadline=None, max_examples=40)
def test_counts_add_up(tmp_path_factory, lines):
    raw, _ = read(tmp_path_factory.mktemp("x"), [REVIEW, *lines])
    assert raw.reviews.lines == len(lines) + 1
    assert raw.reviews.kept == raw.interactions.num_rows == 1 + sum(line is REVIEW for line in lines)


def test_too_many_bad_lines_stop_the_run_and_name_the_worst(tmp_path):
    lines = [REVIEW] * 96 + ["{"] * 3 + ["[]"]
    read(tmp_path, lines, share=0.04)
    message = r"X_5\.json\.gz: 4 of 100 lines.*max_bad_share=0\.03.*not JSON \(3 lines\), not a JSON object \(1 lines\)"
    with pytest.raises(CalrecError, match=message):
        read(tmp_path, lines, share=0.03)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 4  # to look at
    with pytest.raises(CalrecError, match=r"meta_X\.json\.gz: 1 of 2 lines.*asin is missing"):
        read(tmp_path, items=[ITEM, {}], share=0.4)


@pytest.mark.parametrize("which", ["reviews", "items"])
def test_a_file_of_bad_lines_is_not_read_to_its_end(tmp_path, monkeypatch, which):
    monkeypatch.setattr(quarantine_lib, "CHECK_EVERY", 50)
    good = {"reviews": REVIEW, "items": ITEM}[which]
    read(tmp_path, **{which: [good] * 99 + ["{"]}, share=0.01)
    with pytest.raises(CalrecError, match=r"json\.gz: 30 of the first 50 lines cannot be used.*not JSON \(30 lines\)"):
        read(tmp_path, **{which: [good] * 20 + ["{"] * 1000}, share=0.1)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 30
    with pytest.raises(CalrecError, match=r"json\.gz: 15 of the first 100 lines"):
        read(tmp_path, **{which: [good] * 85 + ["{"] * 1000}, share=0.1)
    with pytest.raises(CalrecError, match=r"json\.gz: 11 of 80 lines"):
        read(tmp_path, **{which: [good] * 69 + ["{"] * 11}, share=0.1)


@pytest.mark.parametrize("which", ["X_5.json.gz", "meta_X.json.gz"])
def test_files_that_cannot_be_read(tmp_path, which):
    read(tmp_path, [REVIEW] * 500)
    paths = tmp_path / "X_5.json.gz", tmp_path / "meta_X.json.gz"
    bad, whole = tmp_path / which, (tmp_path / which).read_bytes()

    def fails(message):
        with pytest.raises(CalrecError, match=message):
            read_files(*paths, tmp_path / "q", 1.0)

    bad.write_bytes(whole[:-9])
    fails(f"{which} is truncated or damaged.*Download it again")
    bad.write_bytes(whole[:20] + b"\0\0\0\0" + whole[24:])
    fails(f"{which} is truncated or damaged")
    bad.write_bytes(b"")
    fails(f"{which} is empty")
    bad.write_bytes(gzip.compress(b""))
    fails(f"{which} is empty")
    bad.write_bytes(gzip.compress(b"\n\n"))
    fails(f"{which} has no usable line")
    bad.write_bytes(gzip.compress(b"{\n"))
    fails(f"{which} has no usable line")
    bad.rename(tmp_path / which.replace("json", "jsonl"))
    fails(f"{which} does not exist.*Near it: .*jsonl")
    bad.mkdir()
    fails(f"{which} is a folder without a file")
