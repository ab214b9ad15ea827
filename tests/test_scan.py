"""The compiled loop over reviews against the exact parser, line by line; the hash of a text against a slow one."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calrec_jax.data import amazon, fields, lines, readers, scan, sources
from calrec_jax.data import quarantine as quarantine_lib
from calrec_jax.data.quarantine import BadLineError, LineCounts, Quarantine
from calrec_jax.errors import CalrecError

REVIEW = {
    "overall": 5.0, "verified": True, "reviewTime": "09 1, 2016", "reviewerID": "A3NSN9WOX8470M",
    "asin": "B00005Q6DZ", "style": {"Size:": " 10\" \\ \u00e9", "of": [[], {}, [1, {"a": [None, False, -0.5]}]]},
    "reviewerName": "J. D\t",
    "reviewText": "Works \"well\",\nand it's {cheap}: [10/10]\\ \b\f\r", "summary": "Good/bad",
    "unixReviewTime": 1472688000, "vote": "3", "image": ["https://x.invalid/a.jpg"],
}  # fmt: skip
REVIEW_2023 = {
    "rating": 4.0, "title": "Nice", "text": "Soft &#34;hands&#34;<br />again", "images": [], "asin": "B00YQ6X8EO",
    "parent_asin": "B00YQ6X8EO", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923,
    "helpful_vote": 0, "verified_purchase": True,
}  # fmt: skip
DEEP = '{"reviewerID": "u", "asin": "i", "unixReviewTime": 1, "x": %s}'
ODD = [
    *(DEEP % value for value in ("[" * 60 + "]" * 60, "[" * 61 + "]" * 61, "[" * 900 + "]" * 900, "[}", "{]", "[1 2]")),
    *(DEEP % value for value in ("01", "-", "1.", ".5", "1e5", "1e999", "-0", "9" * 40, "0.1", "tru", "nulls", "NaN")),
    *(DEEP % value for value in ('"\\ud800"', '"\\u12G4"', '"\\x"', '"\t"', '"\x7f"', '"é"', '"\\', "{1:2}")),
    DEEP % '{"a" 1}',
    *(DEEP % value for value in ('{"a": 1,}', "[1,]", "", "{}", '{"a":{"a":[]},"b":[{}]}', '"u", "asin": "again"')),
    *((DEEP % 1).replace('"u"', value) for value in ('" u"', '"u v"', '"\\u0041"', '"é"', '""', "1", "null")),
    (DEEP % 1).replace('"u"', '"a\\"b"'),
    *((DEEP % 1).replace(": 1,", f": {value},") for value in (
        "0", "-1", "1.0", "1e3", '"1"', "null", "01", "99999999999", "100000000000", "1472688000123", "4102444799",
        "4102444800", "4102444800000", "999999999999999", "1000000000000000", "9" * 30, "-0", "1.5", "true",
    )),
    *((DEEP % value).replace('"x"', '"reviewText"') for value in (
        '"a\\u0041"', '"ÄÖ"', '"\\n"', "1", "null", "[1, 2]", '{"a": "b"}', '"!"', '"Ab c"', '"\\\\"', '"\\\\n"',
    )),
    (DEEP % 1).replace('"asin"', '"\\u0061sin"'), "  " + DEEP % 1 + " \r", DEEP % 1 + "x", DEEP % 1 + DEEP % 1, "{}",
    "[]", "{", "", " ", "\r", "null", '{"asin": "i"}', "\ufeff" + DEEP % 1, '{"x": {"asin": "y"}, ' + (DEEP % 1)[1:],
]  # fmt: skip


def both(folder, data, layout="2018", block=None, max_bytes=2000):
    """(rows, counts, quarantined rows) of the loop and of the exact parser, and how many lines the loop left to it."""
    path = folder / "X.json"
    path.write_bytes(data)
    (source,) = sources.find(path)
    release = amazon.RELEASES[layout]
    made, asked = [], 0
    for way in ("scan", "parse"):
        counts = [LineCounts("X.json")]
        parse = amazon.review_parser(release, "X.json", counts[0])

        def counted(line, parse=parse, way=way):
            nonlocal asked
            asked += way == "scan"
            return parse(line)

        with Quarantine.opened(folder / way, 1.0) as bad_lines, pytest.MonkeyPatch.context() as patch:
            if block:
                cuts = [data[at : at + block] for at in range(0, len(data), block)]
                patch.setattr(lines.sources, "blocks", lambda _: iter(cuts))  # noqa: B023
            reading = lines.Reading(source, counts, bad_lines, counted, max_bytes)
            if way == "scan":
                schema = readers.INTERACTIONS_SCHEMA
                found = scan.batches(
                    reading, readers.wanted(release), schema, milliseconds=release.milliseconds, threads=2
                )
                rows = [tuple(row.values()) for batch in found for row in batch.to_pylist()]
            else:
                rows = [(*row, number) for number, row in lines.records(reading)]
        made.append((rows, counts[0].to_json(), (folder / way).read_text("utf-8")))
    return *made, asked


@pytest.mark.parametrize("line", ODD)
def test_odd_lines_are_read_as_the_exact_parser_reads_them(tmp_path, line):
    data = "\n".join([json.dumps(REVIEW), line, line, json.dumps(REVIEW)]).encode()
    scanned, parsed, _ = both(tmp_path, data)
    assert scanned == parsed


PIECES = [b"", *(bytes([code]) for code in b'"\\{}[],:01e.- \r\n\xc3\xff\x00ut'), b"null"]
MUTATION = st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(PIECES))


@given(
    st.lists(st.tuples(st.sampled_from([REVIEW, REVIEW_2023, *ODD]), st.lists(MUTATION, max_size=3)), max_size=8),
    st.sampled_from(["2018", "2023"]),
    st.sampled_from([None, 7, 64, 600]),
    st.sampled_from([40, 300, 2000]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
def test_mutated_lines_are_read_as_the_exact_parser_reads_them(tmp_path_factory, rows, layout, block, max_bytes):
    written = []
    for row, mutations in rows:
        line = row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for share, removed, added in mutations:
            at = int(share * len(line))
            line = line[:at] + added + line[at + removed :]
        written.append(line)
    scanned, parsed, _ = both(tmp_path_factory.mktemp("scan"), b"\n".join(written) or b"\n", layout, block, max_bytes)
    assert scanned == parsed


@pytest.mark.parametrize(("layout", "review"), [("2018", REVIEW), ("2014", REVIEW), ("2023", REVIEW_2023)])
def test_lines_of_the_real_shape_need_no_exact_parser(tmp_path, layout, review):
    data = (json.dumps(review) + "\n").encode() * 1000
    scanned, parsed, asked = both(tmp_path, data, layout, block=4096)
    assert scanned == parsed and len(scanned[0]) == 1000 and asked == 0
    user, item, time, text_hash, split, number = scanned[0][-1]
    wanted = readers.wanted(amazon.RELEASES[layout])
    assert (user, item, split, number) == (review[wanted[0]], review[wanted[1]], None, 1000)
    assert time == review[wanted[2]] // (1000 if layout == "2023" else 1)
    assert text_hash == fields.text_hash(review[wanted[3]], review[wanted[4]]) is not None


def test_too_many_bad_lines_stop_at_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine_lib, "CHECK_EVERY", 50)
    (tmp_path / "X.json.gz").write_bytes(gzip.compress((json.dumps(REVIEW) + "\n{\n").encode() * 500))
    (source,) = sources.find(tmp_path / "X.json.gz")
    release = amazon.RELEASES["2018"]
    with Quarantine.opened(tmp_path / "q", 0.1) as bad_lines:
        counts = [LineCounts("X.json.gz")]
        reading = lines.Reading(source, counts, bad_lines, amazon.review_parser(release, "X", counts[0]))
        found = scan.batches(
            reading, readers.wanted(release), readers.INTERACTIONS_SCHEMA, milliseconds=False, threads=1
        )
        with pytest.raises(CalrecError, match=r"25 of the first 50 lines cannot be used"):
            list(found)
        assert counts[0].lines == 50


def slow_hash(*texts):
    """Of letters and digits in lower case, words of eight bytes mixed one after the other, the length last."""
    kept = "".join(
        character for text in texts for character in text.casefold() if not character.isascii() or character.isalnum()
    )
    data, factor, most = kept.encode(), 0xC6A4A7935BD1E995, 2**64
    value = 0
    for begin in range(0, len(data), 8):
        word = int.from_bytes(data[begin : begin + 8], "little") * factor % most
        word = (word ^ (word >> 47)) * factor % most
        value = (value ^ word) * factor % most
    value = (value ^ len(data)) * factor % most
    value = (value ^ (value >> 47)) * factor % most
    value ^= value >> 47
    return (value if value < 2**63 else value - most) if data else None


@given(st.lists(st.text(max_size=40), max_size=2))
@settings(deadline=None)
def test_text_hash(texts):
    assert fields.text_hash(*texts) == slow_hash(*texts)


def test_text_hash_of_words():
    assert fields.text_hash("Liked  it!", None) == fields.text_hash("liked", "IT") == slow_hash("likedit")
    assert fields.text_hash("!?", "") is None and fields.text_hash(None, 3) is None
    assert len({fields.text_hash(text) for text in ("a", "b", "ab", "ba", "a" * 8, "a" * 9, "a" * 16)}) == 7


def test_bad_lines_keep_their_reasons():
    parse = amazon.review_parser(amazon.RELEASES["2018"], "X", LineCounts("X"))
    with pytest.raises(BadLineError, match="unixReviewTime is after the year 2100"):
        parse((DEEP % 1).replace(": 1,", ": 4102444800,").encode())
