"""The template: the paper's words, absent and untidy attributes, segments, fingerprints."""

import dataclasses

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data import templates
from calrec_jax.data.templates import ATTRIBUTES, Template
from calrec_jax.errors import CalrecError

ITEM = {"title": "Steel Wire", "category": "Industrial, Wire", "brand": "Acme", "price": "$7.11"}
OPTIONAL_TEXT = st.none() | st.text(st.characters(codec="utf-8"), max_size=30)


def test_item_text_is_the_papers():
    assert Template().item_text(ITEM) == "Title: Steel Wire. Category: Industrial, Wire. Brand: Acme. Price: $7.11."


def test_absent_blank_and_missing_attributes_are_unknown():
    text = Template().item_text({"title": None, "category": " \n", "brand": "Acme"})
    assert text == "Title: Unknown. Category: Unknown. Brand: Acme. Price: Unknown."


def test_whitespace_is_folded_and_no_full_stop_doubled():
    text = Template(("title", "brand")).item_text({"title": "  Two\n\tlines \u00a0here", "brand": "Tools Inc."})
    assert text == "Title: Two lines here. Brand: Tools Inc."


def test_prompt_is_the_papers():
    assert Template().prompt(["A.", "B."]) == (
        "This is the summary of a user's purchase history.\n"
        "The first item bought is as follows.\n"
        "A."
        "\nThe next item bought is as follows.\n"
        "B."
        "\nThe next item bought is as follows.\n"
    )


def test_segments_keep_items_apart():
    template = Template()
    assert template.segments(["A.", "B."]) == [
        templates.INTRO,
        templates.FIRST,
        "A.",
        templates.NEXT,
        "B.",
        templates.NEXT,
    ]
    assert template.segments([]) == [templates.INTRO, templates.FIRST]


def test_field_names_and_prefixes_are_those_of_the_text():
    template = Template(("brand", "title"))
    assert template.field_names == ("Brand", "Title")
    assert template.field_prefixes == ("Brand: ", " Title: ")
    assert template.item_text(ITEM) == "Brand: Acme. Title: Steel Wire."
    own = Template(("name", "shelf_life", "isbnCode"))
    assert own.field_names == ("Name", "Shelf life", "IsbnCode")
    assert own.item_text({"name": "Milk", "shelf_life": "6 days"}) == (
        "Name: Milk. Shelf life: 6 days. IsbnCode: Unknown."
    )


@given(st.fixed_dictionaries(dict.fromkeys(ATTRIBUTES, OPTIONAL_TEXT)), st.permutations(ATTRIBUTES))
def test_sentences_join_to_the_text_on_one_line(item, order):
    template = Template(tuple(order))
    sentences = template.attribute_sentences(item)
    text = template.item_text(item)
    assert "".join(sentences) == text
    assert text.splitlines() == [text] and "  " not in text
    for sentence, prefix in zip(sentences, template.field_prefixes, strict=True):
        assert sentence.startswith(prefix) and sentence.endswith(".") and len(sentence) > len(prefix)
        assert not sentence.endswith("..") or (item[prefix.strip(": ").lower()] or "").rstrip().endswith("..")


def test_fingerprint_follows_version_and_settings(monkeypatch):
    default = Template().fingerprint
    assert default == Template().fingerprint
    assert default != Template(("title",)).fingerprint
    assert Template(("title", "brand")).fingerprint != Template(("brand", "title")).fingerprint
    monkeypatch.setattr(templates, "VERSION", "calrec-2")
    assert Template().fingerprint != default


@pytest.mark.parametrize("attributes", [(), ("title", "a b"), ("title", "title"), ("text",)])
def test_wrong_attributes_are_named(attributes):
    with pytest.raises(CalrecError, match=r"Template\.attributes.*title.*category.*brand.*price"):
        Template(attributes)


def test_template_is_frozen_and_takes_gin_bindings():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Template().attributes = ("title",)
    with gin.unlock_config():
        gin.parse_config("Template.attributes = ['title', 'brand']")
    try:
        assert Template().attributes == ("title", "brand")
    finally:
        gin.clear_config()
