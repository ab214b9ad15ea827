"""Cleaning of attributes: HTML, junk prices, blank brands, category paths; and that plain text is left alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data.clean import clean_brand, clean_category, clean_price, clean_text


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("LINC Pens &ndash; Pack of 10", "LINC Pens – Pack of 10"),
        (" Maggiano&#39;s Gift Card", "Maggiano's Gift Card"),
        ("A &amp;amp; B", "A & B"),
        ("Bold <b>blue</b><br/>pen", "Bold blue pen"),
        ("&lt;b&gt;Bold&lt;/b&gt; pen", "Bold pen"),
        ("x<script>var a = '<b>';</script>y", "x y"),
        ("x <!-- a <b> --> y", "x y"),
        ('<span class="a-size-medium a-color-secondary"', None),
        ('<span class="a-size-medium a-color-secondary a-text-normal">', None),
        ("Kept <span class='cut off", "Kept"),
        ("</span></span></span>", None),
        (" \n\t\u00a0 ", None),
        ("", None),
        ("nul\x00 and bell\x07 \ud800", "nul and bell \ufffd"),
        # These look like HTML and are not.
        ("Batteries <5 V and >3 V", "Batteries <5 V and >3 V"),
        ("Lamp <Blue> a < b > c", "Lamp <Blue> a < b > c"),
        ("Black&notebook R&D; AT&T", "Black&notebook R&D; AT&T"),
    ],
)
def test_clean_text(raw, cleaned):
    assert clean_text(raw) == cleaned


@given(st.text(st.characters(codec="utf-8", exclude_characters="<&", exclude_categories=("Cc",)), max_size=40))
def test_plain_text_only_has_its_whitespace_folded(text):
    assert clean_text(text) == (" ".join(text.split()) or None)


@given(st.text(st.sampled_from("<>&;ab=\"'/ #39lgtmp!-\ud800\x00\n"), max_size=60))
def test_any_text_gives_one_clean_line(text):
    cleaned = clean_text(text)
    assert cleaned is None or (cleaned == " ".join(cleaned.split()) and cleaned.encode())


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Acme", "Acme"),
        ("  \n ", None),
        ("Unknown", "Unknown"),
        ("unknown ", "Unknown"),
        ("N/A", None),
        ("by\n    \n    Microsoft", "Microsoft"),
        ("by Terry", "by Terry"),
        ("B&amp;C Eagle", "B&C Eagle"),
    ],
)
def test_clean_brand(raw, cleaned):
    assert clean_brand(raw) == cleaned


@pytest.mark.parametrize("price", ["$25.00", "$1,250.00", "$7.11 - $20.42", "12.99", "€ 3,50", "CDN$ 5.00", "US$9"])
def test_prices_are_kept_as_written(price):
    assert clean_price(f" {price}\n") == price


@pytest.mark.parametrize(
    "junk",
    [
        ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{x:1}",
        " \n ",
        "from 3 sellers",
        "$",
        "3 for 2",
        "nan",
    ],
)
def test_junk_is_no_price(junk):
    assert clean_price(junk) is None


@pytest.mark.parametrize(
    ("levels", "main", "path"),
    [
        (["Gift Cards", "Gift Cards", "For &amp; by"], None, "Gift Cards, For & by"),
        (["Gift Cards", "</span></span></span>"], "Grocery", "Gift Cards"),
        ([], "Grocery", "Grocery"),
        (["", " "], " Grocery\n", "Grocery"),
        ([], '<img src="a.png" class="nav-categ-image" alt="AMAZON FASHION"/>', "AMAZON FASHION"),
        ([], "<img src='a.png'/>", None),
        ([], "", None),
        ([], None, None),
    ],
)
def test_clean_category(levels, main, path):
    assert clean_category(levels, main) == path
