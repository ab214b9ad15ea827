"""The Amazon layouts of 2014, 2018 and 2023: lines of the real shape, and what becomes of them; hostile lines."""

import ast
import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_data import read_files

from calrec_jax.data import amazon, lines
from calrec_jax.data.quarantine import BadLineError, LineCounts
from calrec_jax.errors import CalrecError

REVIEW_2018 = {"reviewerID": "u1", "asin": "i1", "unixReviewTime": 1_529_193_600}
ITEM_2018 = {"asin": "i1", "title": "Wire"}
REVIEW_2023 = {
    "rating": 5.0, "title": "Such a lovely scent", "text": "This spray is really nice.", "images": [],
    "asin": "B00YQ6X8EO", "parent_asin": "B00YQ6X8EO", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True,
}  # fmt: skip
ITEM_2023 = {
    "main_category": "All Beauty", "title": "Howard LC0008 Leather Conditioner", "average_rating": 4.8, "features": [],
    "description": ["Soft", "leather"], "price": None, "store": "Howard Products", "categories": [],
    "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches", "UPC": "617390882781"}, "parent_asin": "B01CUPMQZE",
}  # fmt: skip
ITEM_2014 = (
    "{'asin': '0558925278', 'description': 'Mineral Powder Brush--Apply \"well\"', "
    "'title': \"Women's Brush &amp; Kit\", 'price': 9.5, 'imUrl': 'http://x/I/51L%2BzYCQWSL._SX300_.jpg', "
    "'related': {'also_viewed': ['B000052YD4', 'B0098F2BDE']}, 'salesRank': {'Beauty': 402875}, "
    "'categories': [['Beauty', 'Tools'], ['Beauty', 'Tools &amp; More', 'Brushes']]}"
)


def write(path, rows):
    data = b"".join(
        (row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()) + b"\n"
        for row in rows
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(folder, layout, reviews, items, share=0.0, reviews_name="X.json.gz", **settings):
    paths = write(folder / reviews_name, reviews), write(folder / "meta_X.json.gz", items)
    return read_files(*paths, folder / "quarantine.jsonl", share, layout, **settings)


def row(table, at=0):
    return {name: value for name, value in table.to_pylist()[at].items() if name != "line"}


def test_2014(tmp_path):
    python2 = (
        "{u'asin': u'i2', 'title': 'Caf\\xe9', 'price': -1e3, 'brand': '', 'categories': None, 'ok': (True, None)}"
    )
    raw = read(
        tmp_path, "2014", [{**REVIEW_2018, "helpful": [2, 3]}], [ITEM_2014, python2, '{"asin": "i3", "title": null}']
    )
    assert row(raw.items) == {
        "item_id": "0558925278", "title": "Women's Brush & Kit", "category": "Beauty, Tools & More, Brushes",
        "brand": None, "price": "$9.50",
    }  # fmt: skip
    assert row(raw.items, 1) == {"item_id": "i2", "title": "Café", "category": None, "brand": None, "price": None}
    assert row(raw.items, 2)["item_id"] == "i3"
    assert raw.interactions["timestamp"].to_pylist() == [1_529_193_600]


def test_2023(tmp_path):
    detailed = {
        **ITEM_2023,
        "details": {"Brand": "Howard &amp; Sons"},
        "categories": ["Beauty", "Care"],
        "price": 1234.5,
    }
    told = {**ITEM_2023, "details": json.dumps({"Brand": "Told"}), "price": "from $7.99"}
    raw = read(
        tmp_path, "2023", [REVIEW_2023], [ITEM_2023, detailed, told], attributes=("title", "description", "features")
    )
    interaction = row(raw.interactions)
    assert interaction["user_id"] == REVIEW_2023["user_id"] and interaction["item_id"] == "B00YQ6X8EO"
    assert (
        interaction["timestamp"] == 1588687728 and interaction["split"] is None and interaction["text_hash"] is not None
    )
    assert not raw.reviews.repaired  # milliseconds are what the release states
    assert row(raw.items) == {
        "item_id": "B01CUPMQZE", "title": "Howard LC0008 Leather Conditioner", "category": "All Beauty",
        "brand": "Howard Products", "price": None, "description": "Soft leather", "features": None,
    }  # fmt: skip
    second, third = row(raw.items, 1), row(raw.items, 2)
    assert (second["brand"], second["category"], second["price"]) == ("Howard & Sons", "Beauty, Care", "$1,234.50")
    assert (third["brand"], third["price"]) == ("Told", "$7.99")
    assert raw.metadata.repaired == {
        "category taken from main_category": 2, "brand taken from store": 1, "brand taken from details": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"title": '<span class="a-size-medium a-color-secondary"'}, "title", None),
        ({"title": "var aPageStart = (new Date()).getTime();"}, "title", None),
        ({"title": "Tom &amp; <b>Jerry</b>"}, "title", "Tom & Jerry"),
        ({"brand": "Visit Amazon's Paulo Coelho Page"}, "brand", "Paulo Coelho"),
        ({"brand": "", "details": {"\n Brand: \n": "Acme"}}, "brand", "Acme"),
        ({"details": "not JSON", "store": " Shop "}, "brand", "Shop"),
        ({"price": "$7.11 - $20.42"}, "price", "$7.11 - $20.42"),
        ({"price": ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{x:1}"}, "price", None),
        ({"price": float("inf")}, "price", None),
        ({"price": -3}, "price", None),
        ({"category": [], "main_cat": '<img src="a.png" alt="AMAZON FASHION"/>'}, "category", "AMAZON FASHION"),
        ({"category": [["A"], ["B", "C"], ["D", "E"]]}, "category", "B, C"),
        ({"categories": [[]], "main_category": "Books"}, "category", "Books"),
    ],
)
def test_odd_fields(tmp_path, change, field, value):
    raw = read(tmp_path, "2018", [REVIEW_2018], [{**ITEM_2018, **change}])
    assert row(raw.items)[field] == value


def test_ratings_alone(tmp_path):
    for layout, line in (("2014", "u1,i1,5.0,1369699200"), ("2018", "i1,u1,5.0,1369699200")):
        (tmp_path / layout).mkdir()
        raw = read(tmp_path / layout, layout, [line], [json.dumps(ITEM_2018)], reviews_name="ratings_X.csv")
        assert row(raw.interactions) == {
            "user_id": "u1", "item_id": "i1", "timestamp": 1369699200, "text_hash": None, "split": None,
        }  # fmt: skip


def test_official_split_and_order_over_files(tmp_path):
    header = "user_id,parent_asin,rating,timestamp,history"
    paths = [
        write(tmp_path / f"X.{part}.csv.gz", [header, f"u1,{part},5.0,1547589356557,a b\r"])
        for part in ("train", "valid", "test")
    ]
    items = write(tmp_path / "meta_X.jsonl.gz", [ITEM_2023])
    raw = read_files(paths, items, tmp_path / "q", 0.0, "2023")
    assert raw.interactions["split"].to_pylist() == ["train", "validation", "test"]
    assert raw.interactions["line"].to_pylist() == [2, (1 << 40) + 2, (2 << 40) + 2]
    assert raw.reviews.dropped == {"header line": 3} and raw.reviews.file == "X.train.csv.gz and 2 more"
    assert [counts.kept for counts in raw.raw.review_counts] == [1, 1, 1]


def test_a_csv_without_its_columns_is_named(tmp_path):
    with pytest.raises(
        CalrecError, match=r"X\.csv: its first line names no column parent_asin, timestamp; it has user_id, item"
    ):
        read(tmp_path, "2023", ["user_id,item", "a,b"], [ITEM_2023], reviews_name="X.csv")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("i1,u1,5.0", "not 4 values"),
        ("i1,u1,5.0,1e9", "unixReviewTime is missing"),
        ("i1,,5.0,5", "reviewerID is empty"),
        (b"i1,\xff,5.0,5", "not UTF-8"),
    ],
)
def test_bad_ratings(tmp_path, line, reason):
    raw = read(tmp_path, "2018", ["i1,u1,5.0,5", line], [ITEM_2018], share=0.5, reviews_name="X.csv")
    assert raw.reviews.quarantined == {reason: 1}


@pytest.mark.parametrize("packed", ["gz", "zst", "plain"])
def test_folders_of_shards_in_any_packing(tmp_path, packed):
    folder = tmp_path / "shards"
    folder.mkdir()
    pack = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True), "plain": bytes}[
        packed
    ]
    for number in range(3):
        (folder / f"part-{number}").write_bytes(pack(json.dumps({**REVIEW_2018, "asin": f"i{number}"}).encode()))
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / "part-3").write_bytes(b"")
    (folder / ".part-0.crc").write_bytes(b"x")
    items = write(tmp_path / "meta.json", [ITEM_2018])
    for named in (folder, folder / "part-*", f"file://{folder}", [folder / f"part-{number}" for number in range(3)]):
        raw = read_files(named, items, tmp_path / "q", 0.0)
        assert raw.interactions["item_id"].to_pylist() == ["i0", "i1", "i2"]


def test_a_url_whose_package_is_missing_names_the_extra(tmp_path, monkeypatch):
    import fsspec

    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(CalrecError, match=r"gs://b/X\.json: Please install gcsfs.*pip install -e '\.\[gcs\]'"):
        read_files("gs://b/X.json", tmp_path, tmp_path / "q", 0.0)


def test_a_memory_url_is_read(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/calrec-test/X.json.gz", gzip.compress(json.dumps(REVIEW_2018).encode()))
    items = write(tmp_path / "meta.json", [ITEM_2018])
    raw = read_files("memory://calrec-test/X.json.gz", items, tmp_path / "q", 0.0)
    assert raw.reviews.kept == 1


HOSTILE = [
    ("__import__('os').system('true')", "neither a Python literal nor JSON"),
    ("{'asin': open('x')}", "neither a Python literal nor JSON"),
    ("{'asin': 'a' * 9}", "neither a Python literal nor JSON"),
    ("{'asin': 9**9**9}", "neither a Python literal nor JSON"),
    ("{'asin': b'a'}", "neither a Python literal nor JSON"),
    ("{'asin': f'{1}'}", "neither a Python literal nor JSON"),
    ("{'asin': ----1}", "neither a Python literal nor JSON"),
    ("{'asin': " + "9" * 5000 + "}", "neither a Python literal nor JSON"),
    ("[" * 33 + "]" * 33, "Python literal deeper than 32"),
    ("(" * 100_000, "Python literal deeper than 32"),
    ("{'a': '" + "x" * amazon.MAX_LITERAL_BYTES + "'}", "Python literal longer than 1,048,576 bytes"),
    ("{[]: 1}", "neither a Python literal nor JSON"),
    ("{'asin': 'cut", "neither a Python literal nor JSON"),
    ("['asin']", "not a dict"),
    ("{'a', 'b'}", "not a dict"),
]


@pytest.mark.parametrize(("line", "reason"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_literals_are_never_run(line, reason):
    with pytest.raises(BadLineError, match=reason):
        amazon.load_literal(line.encode())


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_every_literal_of_plain_values_is_read_as_python_reads_it(record):
    line = repr(record)
    try:
        line = line.encode()
    except UnicodeEncodeError:
        return
    assert amazon.load_literal(line) == ast.literal_eval(line.decode())


FIELDS = (
    "reviewerID",
    "asin",
    "unixReviewTime",
    "title",
    "price",
    "brand",
    "details",
    "category",
    "main_cat",
    "summary",
)
SHAPES = [
    json.dumps(REVIEW_2018).encode(),
    ITEM_2014.encode(),
    b"",
    b" ",
    b"\xff",
    b"i1,u1,5.0,5",
    b"a,b,c,-5",
    b"," * 5,
]
LINE = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(SHAPES),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUES)).map(lambda value: json.dumps(value).encode()),
)


@given(st.lists(LINE, max_size=12), st.sampled_from(["2014", "2018"]), st.sampled_from(["X.json.gz", "X.csv"]))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_every_line_is_kept_dropped_or_quarantined(tmp_path_factory, rows, layout, name):
    """Arbitrary bytes: the counts add up to the lines, and nothing else is raised."""
    folder = tmp_path_factory.mktemp("fuzz")
    good = {"X.csv": b"i1,u1,5.0,5", "X.json.gz": json.dumps(REVIEW_2018).encode()}[name]
    raw = read(folder, layout, [good, *rows], [json.dumps(ITEM_2018), *rows], share=1.0, reviews_name=name)
    expected = b"".join(line + b"\n" for line in rows).count(b"\n") + 1
    quarantined = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()]
    for counts, table in ((raw.reviews, raw.interactions), (raw.metadata, raw.items)):
        assert counts.lines == expected == counts.kept + sum(counts.dropped.values()) + counts.bad
        assert counts.kept == table.num_rows
        assert sum(entry["file"] == counts.file for entry in quarantined) == counts.bad
        numbers = table["line"].to_pylist() + [entry["line"] for entry in quarantined if entry["file"] == counts.file]
        assert len(set(numbers)) == len(numbers) and max(numbers) <= expected


@given(st.binary(max_size=3000), st.integers(1, 200), st.integers(1, 300))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_chunks_are_the_files_lines(tmp_path_factory, data, longest, block):
    """Against `bytes.split`, whatever the blocks; a line that is too long is cut and marked."""
    from calrec_jax.data import sources

    path = tmp_path_factory.mktemp("chunks") / "x"
    path.write_bytes(b"." + data)
    (source,) = sources.find(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines.sources, "blocks", lambda source, size=block: (
            (b"." + data)[at : at + size] for at in range(0, len(data) + 1, size)))  # fmt: skip
        found = list(lines.chunks(source, longest))
    expected = (b"." + data).split(b"\n")
    if not expected[-1]:
        expected.pop()
    got = [(number, line, chunk.too_long) for chunk in found for number, line in enumerate(chunk.lines, chunk.first)]
    assert [number for number, _, _ in got] == list(range(1, len(expected) + 1))
    for (_, line, too_long), whole in zip(got, expected, strict=True):
        assert too_long == (len(whole) > longest)
        assert whole.startswith(line) if too_long else line == whole


def test_a_huge_line_costs_no_memory(tmp_path):
    """100 MB without a newline, gzipped: read in a bounded part of it."""
    import tracemalloc

    path = tmp_path / "X.json.gz"
    good = json.dumps(REVIEW_2018).encode()
    path.write_bytes(gzip.compress(good + b"\n{" + b"x" * 100_000_000 + b"\n" + good, compresslevel=1))
    items = write(tmp_path / "meta.json", [ITEM_2018])
    tracemalloc.start()
    raw = read_files(path, items, tmp_path / "q", 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert raw.reviews.kept == 2 and raw.reviews.quarantined == {"longer than 8,388,608 bytes": 1}
    assert raw.interactions["line"].to_pylist() == [1, 3]
    assert peak < 48_000_000


def test_unknown_attributes_of_a_layout_are_named(tmp_path):
    with pytest.raises(CalrecError, match=r"Template\.attributes has \['colour'\].*'title'.*'features'"):
        read(tmp_path, "2018", [REVIEW_2018], [ITEM_2018], attributes=("title", "colour"))


def test_counts_of_several_files_add_up():
    parts = [LineCounts("a", 3, 2), LineCounts("b", 4, 4)]
    parts[0].quarantined["x"] += 1
    whole = LineCounts.total(parts)
    assert (whole.file, whole.lines, whole.kept, whole.bad) == ("a and 1 more", 7, 6, 1)
