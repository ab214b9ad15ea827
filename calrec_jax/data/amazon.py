"""Records of the Amazon Reviews dumps of 2014, 2018 and 2023: which fields they have, and what becomes of odd values.

Reviews are JSON lines, or CSV where only ratings were published; metadata is JSON lines, in 2014 one Python literal a
line, which is read as a literal of bounded size and depth and never executed. The same rules hold in every release:

- title: HTML entities and tags are resolved; what is only a piece of HTML or of a page's script is absent.
- category: the levels of `category` or `categories`, repeats left out; of several paths the one with most levels, of
  equal ones the first; without a level, `main_cat` or `main_category`.
- brand: `brand`, else `details` ("Brand"), else `store`; "Visit Amazon's A. Author Page" is A. Author.
- price: an amount or a range as written; a bare number is in US dollars; style sheets and words are absent.
- description, features: their paragraphs joined, absent where there are none.
"""

import ast
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from calrec_jax.data import clean, fields
from calrec_jax.data.quarantine import BadLineError, DroppedLineError, LineCounts
from calrec_jax.errors import CalrecError

MAX_LITERAL_BYTES = 1 << 20
MAX_LITERAL_DEPTH = 32
HEADER_RULE = "header line"

Interaction = tuple[str, str, int, int | None, str | None]  # user, item, seconds, text hash, official split

_STRING = re.compile(r"'[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'|\"[^\"\\\n]*+(?:\\.[^\"\\\n]*+)*+\"", re.S)
_NUMBER = r"-?\d{1,40}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,4})?"
_LITERAL = re.compile(rf"(?:[\[\]{{}}(),:\s]++|u?S|{_NUMBER}|True|False|None)*+")  # strings replaced by S
_SPLIT_OF_NAME = re.compile(r"\.(train|valid|test)\.")
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Release:
    """What the records of a release look like.

    Attributes:
      user, item, time: fields of a review's user, item and time.
      text, summary: fields of what the user wrote.
      item_id: field of the metadata's item.
      milliseconds: times are stated in milliseconds, so that dividing them is no repair.
      literals: a line of metadata is a Python literal.
      csv: columns of the ratings alone, in their order; None where a header names them.
    """

    user: str
    item: str
    time: str
    text: str
    summary: str
    item_id: str
    milliseconds: bool = False
    literals: bool = False
    csv: tuple[str, ...] | None = None


RELEASES = {
    "2014": Release(
        *("reviewerID", "asin", "unixReviewTime", "reviewText", "summary", "asin"),
        literals=True,
        csv=("reviewerID", "asin", "overall", "unixReviewTime"),
    ),
    "2018": Release(
        *("reviewerID", "asin", "unixReviewTime", "reviewText", "summary", "asin"),
        csv=("asin", "reviewerID", "overall", "unixReviewTime"),
    ),
    "2023": Release(*("user_id", "parent_asin", "timestamp", "text", "title", "parent_asin"), milliseconds=True),
}


def load_json(line: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      BadLineError: if the line is not UTF-8, not JSON, or not an object.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _load_odd_json(line)
    if type(record) is not dict:
        raise BadLineError("not a JSON object")
    return record


def _load_odd_json(line: bytes) -> Any:
    """What orjson is too strict for and older dumps hold: half a surrogate pair, NaN; and the reason of a bad line."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadLineError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadLineError("not JSON") from None


def load_literal(line: bytes) -> dict[str, Any]:
    """A Python literal, or a JSON object, as the metadata of 2014 has them.

    Only strings, numbers, True, False, None, and lists, tuples and dicts of them; `ast.literal_eval` reads what the
    pattern lets through, so that neither names nor operators nor deep nests reach the compiler.

    Raises:
      BadLineError: if the line is too long or too deep to be read safely, not UTF-8, no literal, or not a dict.
    """
    if line.lstrip()[:2] == b'{"':
        try:
            return load_json(line)
        except BadLineError:
            pass  # a dict may begin with a string in double quotes
    if len(line) > MAX_LITERAL_BYTES:
        raise BadLineError(f"Python literal longer than {MAX_LITERAL_BYTES:,} bytes")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadLineError("not UTF-8") from None
    _check_literal(_STRING.sub("S", text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in somebody's title
            record = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise BadLineError("neither a Python literal nor JSON") from None
    if type(record) is not dict:
        raise BadLineError("not a dict")
    return record


def _check_literal(skeleton: str) -> None:
    if not _LITERAL.fullmatch(skeleton):
        raise BadLineError("neither a Python literal nor JSON")
    depth = 0
    for character in skeleton:
        if character in "[{(":
            depth += 1
            if depth > MAX_LITERAL_DEPTH:
                raise BadLineError(f"Python literal deeper than {MAX_LITERAL_DEPTH}")
        elif character in "]})":
            depth -= 1


def review_parser(release: Release, name: str, counts: LineCounts) -> Callable[[bytes], Interaction]:
    """Parses a line of reviews.

    Args:
      release: whose.
      name: of the file: a CSV has "csv" in it, and the official split of a benchmark (``X.train.csv.gz``).
      counts: gets the repairs.

    Returns:
      The function, which raises a `BadLineError` for a line that cannot be used and a `DroppedLineError` for a header.
    """
    return _csv_parser(release, name, counts) if is_csv(name) else _json_parser(release, counts)


def is_csv(name: str) -> bool:
    """Whether a file of that name has ratings alone."""
    return ".csv" in name


def _json_parser(release: Release, counts: LineCounts) -> Callable[[bytes], Interaction]:
    user, item, time_field, text, summary = release.user, release.item, release.time, release.text, release.summary

    def parse(line: bytes) -> Interaction:
        record = load_json(line)
        get = record.get
        time, milliseconds = fields.seconds(get(time_field), time_field)
        row = (
            fields.identifier(record, user),
            fields.identifier(record, item),
            time,
            fields.text_hash(get(text), get(summary)),
            None,
        )
        if milliseconds and not release.milliseconds:
            counts.repaired[fields.MILLISECONDS_REPAIR] += 1
        return row

    return parse


def _csv_parser(release: Release, name: str, counts: LineCounts) -> Callable[[bytes], Interaction]:
    found = _SPLIT_OF_NAME.search(name)
    split = _SPLITS[found[1]] if found and release.csv is None else None
    columns = release.csv

    def parse(line: bytes) -> Interaction:
        nonlocal columns
        try:
            values = line.decode("utf-8").rstrip("\r").split(",")
        except UnicodeDecodeError:
            raise BadLineError("not UTF-8") from None
        if columns is None:
            columns = _header(values, release, name)
            raise DroppedLineError(HEADER_RULE)
        if len(values) != len(columns):
            raise BadLineError(f"not {len(columns)} values")
        record = dict(zip(columns, values, strict=True))
        time, milliseconds = fields.seconds(fields.whole_number(record[release.time]), release.time)
        row = (fields.identifier(record, release.user), fields.identifier(record, release.item), time, None, split)
        if milliseconds and not release.milliseconds:
            counts.repaired[fields.MILLISECONDS_REPAIR] += 1
        return row

    return parse


def _header(values: list[str], release: Release, name: str) -> tuple[str, ...]:
    columns = tuple(value.strip().strip('"') for value in values)
    missing = [field for field in (release.user, release.item, release.time) if field not in columns]
    if missing:
        raise CalrecError(f"{name}: its first line names no column {', '.join(missing)}; it has {', '.join(columns)}.")
    return columns


def item_parser(release: Release, attributes: Sequence[str], counts: LineCounts) -> Callable[[bytes], tuple]:
    """Parses a line of metadata to (item_id, attribute, …); raises a `BadLineError` for one that cannot be used."""
    load = load_literal if release.literals else load_json
    readers = [ATTRIBUTES[name] for name in attributes]

    def parse(line: bytes) -> tuple:
        record = load(line)
        repaired: list[str] = []
        row = (fields.identifier(record, release.item_id), *[read(record, repaired) for read in readers])
        if repaired:
            counts.repaired.update(repaired)
        return row

    return parse


def _text(record: dict, field: str, clean_value: Callable[[str], str | None], repaired: list[str]) -> str | None:
    """A cleaned string, or None; what was there and cannot be used is noted."""
    value = record.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        repaired.append(f"{field} of a wrong type, made absent")
        return None
    cleaned = clean_value(value)
    if cleaned is None:
        repaired.append(f"{field} without content, made absent")
    return cleaned


def _title(record: dict, repaired: list[str]) -> str | None:
    return _text(record, "title", clean.clean_title, repaired)


def _category(record: dict, repaired: list[str]) -> str | None:
    field = "category" if record.get("category") else "categories"
    levels = record.get(field)
    if isinstance(levels, str):
        levels = [levels]
    if levels is not None and not isinstance(levels, list):
        repaired.append(f"{field} of a wrong type, made absent")
        levels = []
    paths = [path for path in levels or [] if isinstance(path, list)]
    if paths:
        levels = max(paths, key=len)  # of equal ones max takes the first
    category = clean.clean_category([level for level in levels or [] if isinstance(level, str)])
    for main in ("main_cat", "main_category"):
        if category is None:
            category = _text(record, main, lambda value: clean.clean_category([], value), repaired)
            if category is not None:
                repaired.append(f"category taken from {main}")
    return category


def _brand(record: dict, repaired: list[str]) -> str | None:
    brand = _text(record, "brand", clean.clean_brand, repaired)
    if brand is None and (details := _details(record)):
        brand = _text(details, "brand", clean.clean_brand, repaired)
        if brand is not None:
            repaired.append("brand taken from details")
    if brand is None:
        brand = _text(record, "store", clean.clean_brand, repaired)
        if brand is not None:
            repaired.append("brand taken from store")
    return brand


def _details(record: dict) -> dict[str, Any]:
    """The details by their names in lower case, without the colon that ends them in 2018; a string of JSON is read."""
    details = record.get("details")
    if isinstance(details, str):
        try:
            details = orjson.loads(details)
        except orjson.JSONDecodeError:
            return {}
    if not isinstance(details, dict):
        return {}
    return {str(name).strip().rstrip(":").casefold(): value for name, value in details.items()}


def _price(record: dict, repaired: list[str]) -> str | None:
    value = record.get("price")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return f"${value:,.2f}"
    return _text(record, "price", clean.clean_price, repaired)


def _paragraphs(*names: str) -> Callable[[dict, list[str]], str | None]:
    def read(record: dict, repaired: list[str]) -> str | None:
        field = next((name for name in names if record.get(name)), names[0])
        value = record.get(field)
        if isinstance(value, list):
            texts = [text for text in value if isinstance(text, str)]
            return clean.clean_text("\n".join(texts)) if texts else None
        return _text(record, field, clean.clean_text, repaired)

    return read


ATTRIBUTES: dict[str, Callable[[dict, list[str]], str | None]] = {
    "title": _title,
    "category": _category,
    "brand": _brand,
    "price": _price,
    "description": _paragraphs("description"),
    "features": _paragraphs("features", "feature"),
}
