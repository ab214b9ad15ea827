"""Cleaning of item attributes as shops publish them: HTML entities and tags, CSS for a price, blank brands.

A cleaned attribute is one line of text, or None where nothing is left; the reader counts what became absent.
"""

import functools
import html
import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MARKED = re.compile(r"[&<\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")  # a text without any of these is plain
# Only with a semicolon: "black&notebook" is no "¬ebook".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_REMEMBERED = 4096  # values: paths, brands and prices are few
_UNESCAPES = 3  # some dumps are escaped more than once: "&amp;amp;#39;"

# Only HTML's own names: "<5 V", "a < b" and "Lamp <Blue>" stay as they are.
_NAMES = (
    "a|abbr|b|big|body|br|button|center|code|dd|del|div|dl|dt|em|font|form|h[1-6]|head|hr|html|i|iframe|img|input|ins|"
    "label|li|link|meta|noscript|ol|option|p|pre|s|script|select|small|span|strike|strong|style|sub|sup|table|tbody|td|"
    "th|thead|tr|tt|u|ul"
)
_TAG = re.compile(rf"<!--.*?-->|</?(?:{_NAMES})(?:\s[^<>]*|/)?>", re.S | re.I)
_CUT_TAG = re.compile(rf"</?(?:{_NAMES})\s+[\w:-]+\s*=[^<>]*$", re.S | re.I)  # the dump ends it before its ">"
_CODE = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.S | re.I)
_ALT = re.compile(r"<img\b[^<>]*\balt\s*=\s*[\"']([^\"'<>]+)[\"']", re.I)

_AMOUNT = r"(?:[$€£¥₹]|[A-Z]{2,3}\$?)?\s?\d[\d,.]*"
_PRICE = re.compile(rf"{_AMOUNT}(?:\s?[-–]\s?{_AMOUNT})?")
# "Unknown" stays, and reads as the template writes an absent brand: published baselines index it as a word.
_NO_BRAND = {"n/a": None, "unknown": "Unknown"}
_FROM = re.compile(r"from\s+", re.I)  # "from $7.99": the lowest of several offers
_SCRIPT = "getTime()"
_AUTHOR_PAGE = re.compile(r"Visit Amazon's (.+) Page")
_BY_LINE = re.compile(r"\s*by\s*\n\s*")  # "by\n    \n    Microsoft"


def clean_text(value: str) -> str | None:
    """One line of plain text: entities resolved, tags removed, whitespace folded; None when nothing is left."""
    if not _MARKED.search(value):
        return " ".join(value.split()) or None
    for _ in range(_UNESCAPES):
        value = _without_tags(value)
        unescaped = _ENTITY.sub(lambda entity: html.unescape(entity[0]), value)
        if unescaped == value:
            break
        value = unescaped
    value = _SURROGATE.sub("\ufffd", _CONTROL.sub("", _without_tags(value)))
    return " ".join(value.split()) or None


def clean_title(value: str) -> str | None:
    """A title as `clean_text` leaves it; None for a piece of the page's script, which some dumps hold instead."""
    return None if _SCRIPT in value else clean_text(value)


def _without_tags(value: str) -> str:
    if "<" not in value:
        return value
    return _CUT_TAG.sub(" ", _TAG.sub(" ", _CODE.sub(" ", value)))


def clean_category(levels: Sequence[str], main: str | None = None) -> str | None:
    """A category path: cleaned levels joined by a comma, repeats left out; `main` where no level is left.

    Some dumps give the main category as an image; its alternative text is taken.
    """
    path = _path(tuple(levels))
    if path or not main:
        return path or None
    image = _ALT.search(main)
    return clean_text(image.group(1) if image else main)


@functools.lru_cache(maxsize=_REMEMBERED)
def _path(levels: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(text for text in map(clean_text, levels) if text))


@functools.lru_cache(maxsize=_REMEMBERED)
def clean_brand(value: str) -> str | None:
    """The brand, or None for blanks and words that say that there is none."""
    text = clean_text(_BY_LINE.sub("", value, count=1) if _BY_LINE.match(value) else value)
    if text is None:
        return None
    if author := _AUTHOR_PAGE.fullmatch(text):
        text = author[1]
    return _NO_BRAND.get(text.casefold(), text)


@functools.lru_cache(maxsize=_REMEMBERED)
def clean_price(value: str) -> str | None:
    """A price or a range of prices as written, or None for anything else (style sheets, words)."""
    text = clean_text(value)
    if text is not None and "." in text:  # not "from 3"
        text = _FROM.sub("", text, count=1)
    return text if text is not None and _PRICE.fullmatch(text) else None
