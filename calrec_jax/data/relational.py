"""The rules of `calrec prepare` as Ibis expressions: repeated lines and reviews, order, cores, the catalogue.

Written once; DuckDB, Spark and BigQuery run them and give the same rows. Tables: *interactions* have the columns
`user_id`, `item_id`, `timestamp` (seconds), `line` (place in the raw files, unique), `text_hash` (of the review's text,
null without one) and `part` (see `splits.py`); *metadata* have `item_id`, one string column an attribute, and `line`.

Notable: each user's purchases are in total order by part, time and line, so purchases of one second keep the order in
which they were logged, and no rule depends on chance or on the engine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ibis
from ibis import _
from ibis.expr.types import Table

ORDER = ("part", "timestamp", "line")


def in_order() -> Any:
    """The window of a user's purchases, oldest first."""
    return ibis.window(group_by="user_id", order_by=list(ORDER))


def numbered(interactions: Table) -> Table:
    """The users, a row each: `user_id`, and `number` from 0 (int32), which is in the order of the ids."""
    number = ibis.row_number().over(ibis.window(order_by="user_id")).cast("int32")
    return interactions.select("user_id").distinct().mutate(number=number)


def with_numbers(interactions: Table, users: Table) -> Table:
    """The purchases with their users' numbers for `user_id`: the rules run several times as fast on them as on text."""
    named = users.select(name=_.user_id, number=_.number)  # engines name a doubled column differently
    columns = {column: _[column] for column in interactions.columns if column != "user_id"}
    return interactions.join(named, [interactions.user_id == named.name]).select(user_id=_.number, **columns)


def with_names(rows: Table, users: Table) -> Table:
    """Rows with the users' ids for their numbers again."""
    named = users.select(name=_.user_id, number=_.number)
    columns = {column: _[column] for column in rows.columns if column != "user_id"}
    return rows.join(named, [rows.user_id == named.number]).select(user_id=_.name, **columns)


def drop_duplicates(interactions: Table) -> Table:
    """Keeps the first line of each (user, item, time): dumps repeat whole reviews."""
    keys = ("user_id", "item_id", "timestamp")
    several = interactions.group_by(*keys).agg(first=_.line.min(), count=_.count()).filter(_["count"] > 1)
    right = several.select(**{f"same_{key}": _[key] for key in keys}, first=_.first)
    same = [interactions[key] == right[f"same_{key}"] for key in keys]
    later = interactions.join(right, [*same, interactions.line > right.first])
    return interactions.anti_join(later.select("line"), "line")


def drop_near_duplicates(interactions: Table, seconds: int) -> Table:
    """Drops a review of the same user, item and text as the one before it, at most `seconds` later.

    Each is compared with the one before it, dropped or not, so a chain of them keeps its first. Reviews without a text
    are never near-duplicates.
    """
    same = ibis.window(group_by=["user_id", "item_id", "text_hash"], order_by=["timestamp", "line"])
    previous = interactions.mutate(previous=_.timestamp.lag().over(same))
    near = _.text_hash.notnull() & _.previous.notnull() & (_.timestamp - _.previous <= seconds)
    return previous.filter(~near).drop("previous")


def drop_consecutive_repeats(interactions: Table) -> Table:
    """Of an item bought several times in a row, keeps the first purchase (paper, section "Evaluation")."""
    previous = interactions.mutate(previous=_.item_id.lag().over(in_order()))
    return previous.filter(_.previous.isnull() | (_.previous != _.item_id)).drop("previous")


def drop_rare(interactions: Table, column: str, at_least: int) -> Table:
    """Drops the users or items (`column`) with fewer than `at_least` purchases."""
    frequent = interactions.group_by(column).agg(count=_.count()).filter(_["count"] >= at_least)
    return interactions.semi_join(frequent, column)


def core_round(interactions: Table, user_core: int, item_core: int) -> Table:
    """Drops users and items that are too rare, both counted before: one step towards the core."""
    kept = drop_rare(interactions, "user_id", user_core) if user_core > 1 else interactions
    if item_core <= 1:
        return kept
    frequent = interactions.group_by("item_id").agg(count=_.count()).filter(_["count"] >= item_core)
    return kept.semi_join(frequent, "item_id")


def core(
    interactions: Table,
    user_core: int,
    item_core: int,
    materialise: Callable[[Table], Table],
    drop: Callable[[Table], None],
) -> tuple[Table, int]:
    """The greatest set in which every user has `user_core` purchases and every item `item_core` (its fixed point).

    Args:
      interactions: a table of the engine.
      user_core: least purchases of a user; at most 1: no condition.
      item_core: the same of an item.
      materialise: runs an expression into a table.
      drop: drops such a table.

    Returns:
      A table of the engine (`interactions` itself where nothing is to drop), and the number of rounds that dropped.
    """
    kept, rounds = interactions, 0
    count = _count(kept)
    while count:
        smaller = materialise(core_round(kept, user_core, item_core))
        left = _count(smaller)
        if left == count:
            drop(smaller)
            break
        if rounds:
            drop(kept)
        kept, count, rounds = smaller, left, rounds + 1
    return kept, rounds


def _count(table: Table) -> int:
    return int(table.count().to_pyarrow().as_py())


def drop_repeated_items(metadata: Table, attributes: Sequence[str]) -> Table:
    """Of an item's rows of metadata, keeps the one with the fewest absent attributes, of several the first line."""
    absent = sum((metadata[name].isnull().cast("int64") for name in attributes), start=ibis.literal(0))
    best = ibis.window(group_by="item_id", order_by=["absent", "line"])
    ranked = metadata.mutate(absent=absent).mutate(place=ibis.row_number().over(best))
    return ranked.filter(_.place == 0).drop("absent", "place", "line")


def in_categories(metadata: Table, categories: Sequence[str]) -> Table:
    """Keeps the items whose category path has one of these levels (or several in a row, as written)."""
    path = ibis.literal(", ") + metadata.category + ibis.literal(", ")
    found = [path.contains(f", {name}, ") for name in categories]
    return metadata.filter(ibis.or_(*found).fill_null(False))


def catalogue(interactions: Table, metadata: Table, attributes: Sequence[str], keep_unbought: bool) -> Table:
    """The catalogue: every item of a purchase, with its metadata where there is some, and the unbought ones if asked.

    Args:
      interactions: purchases.
      metadata: one row an item.
      attributes: columns of it.
      keep_unbought: whether items that only the metadata name belong to it.

    Returns:
      Columns item_id, the attributes, and `bought`, `described` (bool).
    """
    bought = interactions.select("item_id").distinct()
    columns = {name: _[name] for name in attributes}
    described = metadata.select("item_id", **columns, described=ibis.literal(True))
    # The right side's key gets a name of its own, since engines name a doubled column differently.
    right = described.rename(described_id="item_id")
    joined = bought.left_join(right, [bought.item_id == right.described_id])
    items = joined.select("item_id", **columns, bought=ibis.literal(True), described=_.described.fill_null(False))
    if not keep_unbought:
        return items
    unbought = described.anti_join(bought, "item_id")
    return items.union(unbought.select("item_id", **columns, bought=ibis.literal(False), described=_.described))
