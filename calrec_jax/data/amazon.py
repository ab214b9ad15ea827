"""Records of the Amazon Reviews dumps of 2014, 2018 and 2023: which fields they have, and what becomes of odd values.

Reviews are JSON lines, or CSV where only ratings were published; metadata is JSON lines, in 2014 one Python literal a
line, which is read as a literal of bounded depth and never executed.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from calrec_jax.data import clean, fields
from calrec_jax.data.quarantine import BadLineError, LineCounts

Interaction = tuple[str, str, int, int | None, str | None]  # user, item, seconds, text hash, official split


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields of a release.

    Attributes:
      user, item, time: of a review's user, item and time.
      text, summary: of what the user wrote.
      item_id: of the metadata.
    """

    user: str
    item: str
    time: str
    text: str
    summary: str
    item_id: str


FIELDS_2018 = Fields("reviewerID", "asin", "unixReviewTime", "reviewText", "summary", "asin")


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


def review_parser(names: Fields, counts: LineCounts) -> Callable[[bytes], Interaction]:
    """Parses a line of reviews in JSON; raises a `BadLineError` for one that cannot be used."""
    user, item, time_field, text, summary = names.user, names.item, names.time, names.text, names.summary

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
        if milliseconds:
            counts.repaired[fields.MILLISECONDS_REPAIR] += 1
        return row

    return parse


def item_parser(names: Fields, attributes: Iterable[str], counts: LineCounts) -> Callable[[bytes], tuple]:
    """Parses a line of metadata to (item_id, attribute, …); raises a `BadLineError` for one that cannot be used."""
    readers = [ATTRIBUTES[name] for name in attributes]

    def parse(line: bytes) -> tuple:
        record = load_json(line)
        repaired: list[str] = []
        row = (fields.identifier(record, names.item_id), *[read(record, repaired) for read in readers])
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
    return _text(record, "title", clean.clean_text, repaired)


def _category(record: dict, repaired: list[str]) -> str | None:
    levels = record.get("category")
    if isinstance(levels, str):
        levels = [levels]
    if levels is not None and not isinstance(levels, list):
        repaired.append("category of a wrong type, made absent")
        levels = []
    category = clean.clean_category([level for level in levels or [] if isinstance(level, str)])
    if category is None:
        category = _text(record, "main_cat", lambda main: clean.clean_category([], main), repaired)
        if category is not None:
            repaired.append("category taken from main_cat")
    return category


def _brand(record: dict, repaired: list[str]) -> str | None:
    return _text(record, "brand", clean.clean_brand, repaired)


def _price(record: dict, repaired: list[str]) -> str | None:
    value = record.get("price")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return clean.clean_price(str(value))
    return _text(record, "price", clean.clean_price, repaired)


ATTRIBUTES: dict[str, Callable[[dict, list[str]], str | None]] = {
    "title": _title,
    "category": _category,
    "brand": _brand,
    "price": _price,
}
