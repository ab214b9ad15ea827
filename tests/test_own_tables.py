"""One's own tables: formats, mappings, times, and that every record is kept, dropped or quarantined."""

import csv
import datetime
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_data import read_files

from calrec_jax.data.own_tables import Columns
from calrec_jax.errors import CalrecError

COLUMNS = Columns("customer", "sku", "at", text="said", split="part", attributes={"title": "name"})
PURCHASES = [
    {"customer": "u1", "sku": "7", "at": "2018-06-17", "said": "Good!", "part": "train"},
    {"customer": "u1", "sku": "8", "at": "1529193600", "said": None, "part": "dev"},
    {"customer": "u2", "sku": "8", "at": "2018-06-17T02:00:00.5+02:00", "said": "good", "part": None},
]
ITEMS = [
    {"sku": "7", "name": 'Rope, "long"', "colour": "red\nand blue"},
    {"sku": "8", "name": "Hook &amp; eye", "colour": None},
]
TIME = 1529193600


def as_csv(rows, separator=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_json(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def read(folder, name, purchases, items, *, columns=COLUMNS, share=0.0, attributes=("title", "colour")):
    (folder / f"x_purchases.{name}").write_bytes(purchases)
    (folder / f"x_items.{name}").write_bytes(items)
    paths = folder / f"x_purchases.{name}", folder / f"x_items.{name}"
    return read_files(*paths, folder / "q", share, "tables", columns=columns, attributes=attributes)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("csv", as_csv),
        ("tsv", lambda rows: as_csv(rows, "\t")),
        ("csv.gz", lambda rows: gzip.compress(as_csv(rows, ";"))),
        ("txt.zst", lambda rows: pa.compress(as_csv(rows, "|"), codec="zstd", asbytes=True)),
        ("jsonl", as_json),
        ("json.gz", lambda rows: gzip.compress(as_json(rows))),
        ("parquet", as_parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    raw = read(tmp_path, name, write(PURCHASES), write(ITEMS))
    rows = raw.interactions.drop(["line", "text_hash"]).to_pylist()
    assert rows == [
        {"user_id": "u1", "item_id": "7", "timestamp": TIME, "split": "train"},
        {"user_id": "u1", "item_id": "8", "timestamp": TIME, "split": "validation"},
        {"user_id": "u2", "item_id": "8", "timestamp": TIME, "split": None},
    ]
    first, second, third = raw.interactions["text_hash"].to_pylist()
    assert first == third is not None and second is None
    assert raw.items.drop(["line"]).to_pylist() == [
        {"item_id": "7", "title": 'Rope, "long"', "colour": "red and blue"},
        {"item_id": "8", "title": "Hook & eye", "colour": None},
    ]
    assert raw.raw.attributes == ("title", "colour")
    for counts in (raw.reviews, raw.metadata):
        assert counts.lines == counts.kept + sum(counts.dropped.values()) and not counts.quarantined


def test_typed_parquet(tmp_path):
    moments = [datetime.datetime(2018, 6, 17, 0, 0, 0, 999_999), None, datetime.datetime(1960, 1, 1)]
    purchases = pa.table(
        {
            "user_id": pa.array([1, 2, 3]),
            "item_id": pa.array(["7", "8", "8"]).dictionary_encode(),
            "timestamp": pa.array(moments, pa.timestamp("us")),
        }
    )
    items = pa.table(
        {"id": pa.array([7.0, 8.0]), "tags": [["a", "b"], []], "weight": [1.5, None], "new": [True, False]}
    )
    for name, table in (("x_purchases", purchases), ("x_items", items)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    raw = read_files(
        tmp_path / "x_purchases.parquet", tmp_path / "x_items.parquet", tmp_path / "q", 1.0, "tables",
        columns={"metadata_item_id": "id"}, attributes=("tags", "weight", "new"),
    )  # fmt: skip
    assert raw.interactions["timestamp"].to_pylist() == [TIME] and raw.interactions["user_id"].to_pylist() == ["1"]
    assert raw.reviews.quarantined == {"timestamp is missing": 1, "timestamp is negative": 1}
    assert raw.items.drop(["line"]).to_pylist() == [
        {"item_id": "7", "tags": "a, b", "weight": "1.5", "new": "True"},
        {"item_id": "8", "tags": None, "weight": None, "new": "False"},
    ]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (TIME, TIME), (TIME + 0.75, TIME), (TIME * 1000 + 999, TIME), (TIME * 10**6, TIME), (TIME * 10**9, TIME),
        (str(TIME), TIME), ("1529193600.5", TIME), ("1529193600000", TIME), ("20180617", TIME),
        ("2018-06-17 00:00:00Z", TIME), ("2018-06-17T01:00+01:00", TIME), (0, 0),
    ],
)  # fmt: skip
def test_times(tmp_path, value, seconds):
    purchases = as_json([{"user_id": "u", "item_id": "7", "timestamp": value}])
    raw = read(
        tmp_path, "jsonl", purchases, as_json([{"item_id": "7", "t": "x"}]), columns=Columns(), attributes=("t",)
    )
    assert raw.interactions["timestamp"].to_pylist() == [seconds]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"at": "yesterday"}, "at is neither a number nor a time in ISO 8601"),
        ({"at": ""}, "at is missing"),
        ({"at": -5}, "at is negative"),
        ({"at": "2150-01-01"}, "at is after the year 2100"),
        ({"at": True}, "at is neither a number nor a time in ISO 8601"),
        ({"at": "nan"}, "at is neither a number nor a time in ISO 8601"),
        ({"customer": None}, "customer is missing"),
        ({"customer": 1.5}, "customer is not a string"),
        ({"sku": " "}, "sku is empty"),
        ({"part": "holdout"}, "part is not one of train, valid, validation, dev, test"),
    ],
)
def test_bad_records_are_quarantined(tmp_path, change, reason):
    raw = read(tmp_path, "jsonl", as_json([*PURCHASES, {**PURCHASES[0], **change}]), as_json(ITEMS), share=0.3)
    assert raw.reviews.quarantined == {reason: 1}
    assert json.loads((tmp_path / "q").read_text())["line"] == 4


def test_bad_lines_of_a_csv(tmp_path):
    header = b"customer,sku,at,said,part\n"
    body = b'u1,7,5,ok,\n\nu1,7,5\nu1,"7"x,5,ok,\nu1,\xff,5,ok,\n"u\n1",7,5,"two\nlines",\nu2,7,6,,test\n'
    raw = read(tmp_path, "csv", header + body, as_csv(ITEMS), share=0.9)
    assert raw.interactions.select(["user_id", "timestamp", "line"]).to_pylist() == [
        {"user_id": "u1", "timestamp": 5, "line": 2},
        {"user_id": "u2", "timestamp": 6, "line": 10},
    ]
    assert raw.reviews.dropped == {"header line": 1, "blank line": 1}
    assert set(raw.reviews.quarantined) == {
        "3 values for 5 columns", "not CSV (',' expected after '\"')", "not UTF-8",
        "customer has characters that do not print",
    }  # fmt: skip
    assert raw.reviews.lines == 8 == raw.reviews.kept + 2 + raw.reviews.bad


@pytest.mark.parametrize(("name", "write"), [("csv", as_csv), ("parquet", as_parquet)])
def test_a_missing_column_is_named_with_the_near_ones(tmp_path, name, write):
    there = r"it has customer, sku, at, said, part\. Near them: customer\. Columns"
    message = rf"x_purchases\.{name} has no column customers; {there}"
    with pytest.raises(CalrecError, match=message):
        read(tmp_path, name, write(PURCHASES), write(ITEMS), columns=Columns("customers", "sku", "at"))
    with pytest.raises(CalrecError, match=rf"x_items\.{name} has no column shade; .*Template\.attributes"):
        read(tmp_path, name, write(PURCHASES), write(ITEMS), attributes=("title", "shade"))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(CalrecError, match=r"x_purchases\.xlsx: the end of its name says no format; one of \.csv"):
        read(tmp_path, "xlsx", b"x", b"y")
    with pytest.raises(CalrecError, match=r"x_purchases\.parquet cannot be read as Parquet"):
        read(tmp_path, "parquet", b"PAR1 not really", b"y")
    with pytest.raises(CalrecError, match="has the column 'sku' more than once"):
        read(tmp_path, "csv", b"customer,sku,at,said,part,sku\n", b"y")


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b"u1,7,5,ok,", b'"u1","7",5,,test', b'"', b"u1,7,5,ok"]), max_size=12
    )
)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_every_record_is_kept_dropped_or_quarantined(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fuzz")
    data = b"\n".join([b"customer,sku,at,said,part", b"u1,7,5,ok,", *rows])
    raw = read(folder, "csv", data, as_csv(ITEMS), share=1.0)
    counts = raw.reviews
    assert counts.lines == counts.kept + sum(counts.dropped.values()) + counts.bad
    assert counts.kept == raw.interactions.num_rows >= 1
    assert len((folder / "q").read_text("utf-8").splitlines()) == counts.bad
