"""The relational part of `calrec prepare`: a category's rules one after the other, and what each left.

The rules are Ibis expressions (`relational.py`, `splits.py`, `audit.py`), run by an engine (`engines.py`).
"""

from typing import Any

import ibis
from ibis import _
from ibis.expr.types import Table

from calrec_jax import artifacts
from calrec_jax.data import audit, readers, relational, splits
from calrec_jax.data.engines import Engine, Rows
from calrec_jax.data.splits import OFFICIAL, Split
from calrec_jax.errors import CalrecError

_NAMED = 20  # items named one by one in the card; the rest is counted
_DAY = 86_400


class Category:
    """The relational part of one category.

    Attributes:
      card: rules, catalogue, split, statistics and leakage, filled by `run`.
    """

    def __init__(self, engine: Engine, raw: readers.RawCategory, settings: dict[str, Any]):
        self._engine, self._raw, self._settings = engine, raw, settings
        self._rules: list[dict[str, Any]] = []
        self._name = settings["name"]
        self.card: dict[str, Any] = {"rules": self._rules}

    def run(self) -> tuple[Rows, Rows, Rows]:
        """Applies the rules.

        Returns:
          The items by id; the users by id (`splits.users`); the purchases by user and order: item_id, timestamp.
        """
        engine, settings = self._engine, self._settings
        metadata = engine.materialise(
            relational.drop_repeated_items(engine.read(self._raw.items / artifacts.SHARDS), self._raw.attributes)
        )
        read = self._read()
        if settings["keep_categories"]:
            read, metadata = self._in_categories(read, metadata)
        kept = self._deduplicated(read)
        kept = self._long_enough(kept)
        items = self._items(read if settings["core"] is None else kept, metadata)
        split = Split(settings["split"])
        if split.kind == splits.GLOBAL_TIME:
            split = splits.global_time(kept, settings["split_times"])
        walked = engine.materialise(splits.walk(kept, split))
        users = engine.materialise(splits.users(walked))
        self._count_split(split, users)
        self.card["statistics"] = audit.statistics(engine, walked, users)
        self.card["leakage"] = audit.leakage(engine, walked)
        purchases = walked.order_by("user_id", "position").select("item_id", "timestamp")
        named = relational.with_names(users, self._users).order_by("user_id")
        return items, engine.export(named), engine.export(purchases)

    def _stage(self, rule: str, table: Table, before: Table | None = None, **facts: Any) -> Table:
        """Notes what a rule left; `before`, no longer needed, is dropped."""
        count = self._engine.row(
            table.agg(users=_.user_id.nunique(), items=_.item_id.nunique(), interactions=_.count())
        )
        after = {f"{what}_out": number for what, number in count.items()}
        last = self._rules[-1] if self._rules else None
        into = {f"{what}_in": last[f"{what}_out"] if last else number for what, number in count.items()}
        self._rules.append({"rule": rule, **into, **after, **facts})
        if before is not None:
            self._engine.drop(before)
        return table

    @property
    def _left(self) -> int:
        return self._rules[-1]["interactions_out"]

    def _read(self) -> Table:
        read = self._engine.read(self._raw.interactions / artifacts.SHARDS)
        official = self._settings["split"] == OFFICIAL
        part = splits.official_parts(read) if official else ibis.literal(0, "int8")
        columns = ["user_id", "item_id", "timestamp", "line", "text_hash"]
        self._users = self._engine.materialise(relational.numbered(read))
        purchases = relational.with_numbers(read.select(*columns, part=part), self._users)
        read = self._stage("read", self._engine.materialise(purchases))
        if official:
            without = self._engine.row(read.filter(_.part < 0).agg(count=_.count()))["count"]
            if without:
                raise CalrecError(
                    f"prepare.split='official': {without} of {self._left} purchases of {self._raw.reviews.file} have "
                    "no split of their own. Name the files of an official split, or choose another prepare.split."
                )
        return read

    def _in_categories(self, read: Table, metadata: Table) -> tuple[Table, Table]:
        names = self._settings["keep_categories"]
        if "category" not in metadata.columns:
            raise CalrecError(f"prepare.keep_categories={names}: the items of this layout have no category.")
        engine = self._engine
        chosen = engine.materialise(relational.in_categories(metadata, names))
        kept = self._stage(
            f"items outside the categories {names}", engine.materialise(read.semi_join(chosen, "item_id"))
        )
        if not self._left:
            raise CalrecError(
                f"prepare.keep_categories={names}: no purchase of {self._name} is of such an item. Levels are "
                "compared as they are written in the metadata."
            )
        return kept, chosen

    def _deduplicated(self, read: Table) -> Table:
        engine, days = self._engine, self._settings["near_duplicate_days"]
        kept = self._stage(
            "exact duplicates of user, item and time", engine.materialise(relational.drop_duplicates(read))
        )
        if days is not None:
            fewer = engine.materialise(relational.drop_near_duplicates(kept, int(days * _DAY)))
            kept = self._stage(f"reviews of the same user, item and text within {days:g} days", fewer, kept)
        if self._settings["remove_consecutive_repeats"]:
            fewer = engine.materialise(relational.drop_consecutive_repeats(kept))
            kept = self._stage("consecutive repeats of an item", fewer, kept)
        return kept

    def _long_enough(self, kept: Table) -> Table:
        engine, core = self._engine, self._settings["core"]
        least = max(self._settings["min_length"], core[0] if core else 1)
        if core is not None:
            smaller, rounds = relational.core(kept, least, core[1], engine.materialise, engine.drop)
            rule = f"users with fewer than {least} and items with fewer than {core[1]} purchases, again and again"
            self._stage(rule, smaller, kept if rounds else None, rounds=rounds)
            if not self._left:
                raise CalrecError(
                    f"prepare.core={tuple(core)} (with min_length={self._settings['min_length']}) empties "
                    f"{self._name}: nothing is left after {rounds} rounds of {self._rules[-1]['interactions_in']} "
                    "purchases. Lower it."
                )
            return smaller
        fewer = engine.materialise(relational.drop_rare(kept, "user_id", least))
        fewer = self._stage(f"users with fewer than {least} purchases", fewer, kept)
        if not self._left:
            first = self._rules[0]
            raise CalrecError(
                f"{self._name} is too small to split: no user has {least} purchases (read: {first['users_out']} users, "
                f"{first['interactions_out']} interactions in {self._raw.reviews.file})."
            )
        return fewer

    def _items(self, purchases: Table, metadata: Table) -> Rows:
        """The catalogue: items of any readable purchase, or those of the core, and the unbought ones where asked."""
        engine, raw = self._engine, self._raw
        keep = self._settings["keep_unbought_items"] and self._settings["core"] is None
        items = engine.materialise(relational.catalogue(purchases, metadata, raw.attributes, keep))
        facts = audit.catalogue_facts(engine, items, raw.attributes, _NAMED)
        described = engine.row(metadata.agg(count=_.count()))["count"]
        unbought = described - (facts["bought"] - facts["without_metadata"])
        if unbought == described:
            raise CalrecError(
                f"No item of {raw.metadata.file} is in {raw.reviews.file}: they are files of different categories. "
                "Correct prepare.metadata or prepare.reviews."
            )
        del facts["unbought"]
        self.card["catalogue"] = {
            **facts,
            "repeated_in_metadata": raw.metadata.kept - described,
            "unbought_in_metadata": unbought,
            "unbought_kept": keep,
        }
        if self._settings["keep_categories"]:  # the rows of other categories are no repeats
            del self.card["catalogue"]["repeated_in_metadata"]
        return engine.export(items.order_by("item_id").select("item_id", *raw.attributes))

    def _count_split(self, split: Split, users: Table) -> None:
        facts = audit.split_facts(self._engine, users)
        self.card["split"] = {**split.to_json(), **facts}
        for what in ("train_interactions", "validation_users", "test_users"):
            if not facts[what]:
                raise CalrecError(
                    f"{self._name} is too small to split: prepare.split={split.kind!r} leaves {what.replace('_', ' ')} "
                    f"empty ({facts}). A target needs a purchase before it; choose other prepare.split_times, or a "
                    "smaller prepare.min_length."
                )
