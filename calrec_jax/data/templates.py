"""Every text of the project is made here: items, prompts and the text BM25 sees.

A prompt is a list of *segments*, and each segment is tokenised alone: an item
then has the same ids wherever it stands, so the catalogue is tokenised once and
prompts are joined as ids. The format is the paper's (section "Text"): attributes
in the order title, category, brand, price, an absent one is ``Unknown``.

A change of any word below must change ``VERSION``: models, tokenizers and
datasets carry the template's fingerprint and refuse one another when it differs.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence

import gin

from calrec_jax.errors import CalrecError

VERSION = "calrec-1"

INTRO = "This is the summary of a user's purchase history.\n"
FIRST = "The first item bought is as follows.\n"
NEXT = "\nThe next item bought is as follows.\n"
UNKNOWN = "Unknown"

ATTRIBUTES = ("title", "category", "brand", "price")  # the paper's
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("item_id", "text", "line")


def _fold(value: str | None) -> str:
    """Folds runs of whitespace (newlines too) to one space, strips, and drops a final full stop's double."""
    text = " ".join((value or "").split())
    return text if text.endswith(".") else f"{text or UNKNOWN}."


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Template:
    """How an item and a history of purchases are written.

    Attributes:
      attributes: an item's attributes in the order in which they are written; each needs a column of that name in the
        items. Letters, digits and underscores, a letter first; ``item_id`` and ``text`` are taken.

    Raises:
      CalrecError: if ``attributes`` is empty, or a name is none, taken, or given twice.
    """

    attributes: tuple[str, ...] = ATTRIBUTES

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", tuple(self.attributes))  # gin gives lists
        wrong = [name for name in self.attributes if not _NAME.fullmatch(name) or name in _TAKEN]
        if wrong or not self.attributes or len({name.lower() for name in self.attributes}) != len(self.attributes):
            raise CalrecError(
                f"Template.attributes is {list(self.attributes)}: name at least one, each once, of letters, digits and "
                f"underscores, not {' or '.join(_TAKEN)}; the paper's are {list(ATTRIBUTES)}."
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the version and the settings; part of every artefact made from text."""
        settings = {"version": VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def field_names(self) -> tuple[str, ...]:
        """The words before the colons: ``Title``, ``Shelf life`` of ``shelf_life``. BM25's index has none of them."""
        return tuple(name[0].upper() + name[1:].replace("_", " ") for name in self.attributes)

    @functools.cached_property
    def field_prefixes(self) -> tuple[str, ...]:
        """The field names as they stand in the text: ``"Title: "``, ``" Category: "``, …"""
        return tuple(f"{' ' if i else ''}{name}: " for i, name in enumerate(self.field_names))

    def attribute_sentences(self, item: Mapping[str, str | None]) -> list[str]:
        """The sentences of an item in order; joined without a separator they are ``item_text(item)``."""
        values = (item.get(name) for name in self.attributes)
        return [prefix + _fold(value) for prefix, value in zip(self.field_prefixes, values, strict=True)]

    def item_text(self, item: Mapping[str, str | None]) -> str:
        """Writes an item: ``Title: T. Category: C. Brand: B. Price: P.``

        Args:
          item: attribute name to value; a missing key, None and blank text are absent.
        """
        return "".join(self.attribute_sentences(item))

    def segments(self, texts: Sequence[str]) -> list[str]:
        """The segments of a prompt for these item texts, oldest first.

        Args:
          texts: item texts of a history.

        Returns:
          ``[INTRO, FIRST, text 1, NEXT, text 2, …, NEXT]``; the target's text follows.
          An empty history gives ``[INTRO, FIRST]``: the target is the first item.
        """
        segments = [INTRO, FIRST]
        for text in texts:
            segments += [text, NEXT]
        return segments

    def prompt(self, texts: Sequence[str]) -> str:
        """The segments joined as one string, for people and for outside models to read."""
        return "".join(self.segments(texts))
