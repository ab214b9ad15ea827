"""Fields of raw records: identifiers, times, texts and official splits, each checked the same way in every layout."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from calrec_jax.data import hashing
from calrec_jax.data.quarantine import BadLineError

SPLITS = ("train", "validation", "test")
MILLISECONDS_REPAIR = "time in milliseconds, divided by 1000"
MILLISECONDS_FROM = 10**11
END_OF_TIME = 4_102_444_800  # 2100-01-01


def identifier(record: Mapping[str, Any], field: str) -> str:
    """A user or item id without spaces around it.

    Raises:
      BadLineError: if it is missing, not a string, blank, or has characters that do not print.
    """
    value = record.get(field)
    if type(value) is not str:
        raise BadLineError(f"{field} is missing" if value is None else f"{field} is not a string")
    return checked_identifier(value, field)


def checked_identifier(value: str, field: str) -> str:
    """The same for a value that is a string already."""
    value = value.strip()
    if not value:
        raise BadLineError(f"{field} is empty")
    if not value.isprintable():
        raise BadLineError(f"{field} has characters that do not print")
    return value


def seconds(value: Any, field: str) -> tuple[int, bool]:
    """A time in seconds since 1970, and whether it was given in milliseconds.

    A value from 10^11 on counts as milliseconds (as seconds it would be after the year 5000).

    Raises:
      BadLineError: if it is missing, not a whole number, negative or after the year 2100.
    """
    if type(value) is not int:
        if value is None:
            raise BadLineError(f"{field} is missing")
        if type(value) is not float or not value.is_integer():
            raise BadLineError(f"{field} is not a whole number")
        value = int(value)
    if value < 0:
        raise BadLineError(f"{field} is negative")
    milliseconds = value >= MILLISECONDS_FROM
    time = value // 1000 if milliseconds else value
    if time >= END_OF_TIME:
        raise BadLineError(f"{field} is after the year 2100")
    return time, milliseconds


def whole_number(value: str) -> int | None:
    """The whole number that a string of ASCII digits holds, or None; a float written as one (``1.5e9``) is none."""
    value = value.strip()
    digits = value.removeprefix("-")
    return int(value) if digits.isascii() and digits.isdigit() and len(digits) < 40 else None


def text_hash(*texts: Any) -> int | None:
    """64 bits of a review's folded words, equal for texts that differ in case, spaces and ASCII punctuation alone.

    Args:
      *texts: review and summary, in this order; what is not a string counts as absent.

    Returns:
      A signed integer (see `hashing.py`); None when no letter or digit is left.
    """
    text = "\n".join([text for text in texts if type(text) is str])
    if not text.isascii():
        text = text.casefold()
    value, there_is_one = hashing.of_bytes(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))
    return value if there_is_one else None
