"""What a prepared category is like, and what its split lets a model see: statistics and the leakage audit.

Everything is counted in whole numbers by the engine, on the purchases as `splits.walk` gives them; shares, means and
quantiles are made of these counts here, so they are the same on every engine.

Tied: as old as the purchase before it. A repeat: the user bought the item earlier, at whatever distance.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import ibis
from ibis import _
from ibis.expr.types import Table

from calrec_jax.data.engines import Engine

_DAY = 86_400
_NAMES = {1: "validation", 2: "test"}


def statistics(engine: Engine, walked: Table, users: Table) -> dict[str, Any]:
    """Counts, lengths, repeats and ties of the purchases.

    Args:
      engine: runs the expressions.
      walked: as `splits.walk` gives it.
      users: as `splits.users` gives it.
    """
    tied = _.previous_time == _.timestamp
    counts = engine.row(
        walked.agg(
            users=_.user_id.nunique(),
            items=_.item_id.nunique(),
            interactions=_.count(),
            first_time=_.timestamp.min(),
            last_time=_.timestamp.max(),
            consecutive_repeats=_count(_.previous_item == _.item_id),
            tied=_count(tied),
        )
    )
    pairs = engine.row(walked.select("user_id", "item_id").distinct().agg(pairs=_.count()))["pairs"]
    counts["repeats"] = counts["interactions"] - pairs
    lengths = {row["length"]: row["users"] for row in engine.rows(users.group_by("length").agg(users=_.count()))}
    interactions = counts["interactions"]
    return {
        **counts,
        "density": interactions / (counts["users"] * counts["items"]),
        "first_day": _day(counts["first_time"]),
        "last_day": _day(counts["last_time"]),
        **_lengths(lengths),
        **{f"{name}_share": counts[name] / interactions for name in ("repeats", "consecutive_repeats", "tied")},
    }


def _count(condition: Any) -> Any:
    return condition.fill_null(False).cast("int64").sum()


def _day(time: int) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()


def _lengths(users_of: dict[int, int]) -> dict[str, Any]:
    """Distribution of the users' numbers of purchases: `length_counts` has up to 50 of them, longer ones together."""
    lengths = sorted(users_of)
    total = sum(users_of.values())

    def at(place: int) -> int:
        for length in lengths:
            place -= users_of[length]
            if place < 0:
                return length
        raise IndexError

    longer = sum(users_of[length] for length in lengths if length > 50)
    return {
        "length_min": lengths[0],
        "length_median": (at((total - 1) // 2) + at(total // 2)) / 2,
        "length_mean": sum(length * count for length, count in users_of.items()) / total,
        "length_p90": at(9 * total // 10),
        "length_p99": at(99 * total // 100),
        "length_max": lengths[-1],
        "length_counts": {
            **{str(length): users_of[length] for length in lengths if length <= 50},
            **({"more": longer} if longer else {}),
        },
    }


def split_facts(engine: Engine, users: Table) -> dict[str, int]:
    """How many users and purchases each split has.

    Returns:
      train_interactions; train_users (two training purchases or more: an example); validation_users, test_users (a
      target); users_without_target (neither: they serve training and popularity alone).
    """
    return engine.row(
        users.agg(
            train_interactions=_.train_end.cast("int64").sum(),
            train_users=_count(_.train_end >= 2),
            validation_users=_count(_.valid_position >= 0),
            test_users=_count(_.test_position >= 0),
            users_without_target=_count((_.valid_position < 0) & (_.test_position < 0)),
        )
    )


def leakage(engine: Engine, walked: Table) -> dict[str, Any]:
    """What of a target a model can have seen, and what it has seen that happened later.

    Returns:
      For each of "validation" and "test": targets; tied_targets (the order of target and history is the file's);
      same_day_targets; repeated_targets (the item is in the history); targets_in_training (in the user's own training
      purchases); texts_in_training (the target's review has the text of one of the user's training reviews).
      Besides, `out_of_time_order` (purchases older than the one before them: an official split against its times) and
      `global_time`, see `_overlap`.
    """
    facts: dict[str, Any] = {}
    targets = walked.filter(_.target > 0)
    train = walked.filter(_.part == 0)
    counted = targets.group_by("target").agg(
        targets=_.count(),
        tied_targets=_count(_.previous_time == _.timestamp),
        same_day_targets=_count(_.previous_time // _DAY == _.timestamp // _DAY),
    )
    by_split = {_NAMES[row.pop("target")]: row for row in engine.rows(counted)}
    earlier = walked.select(earlier_user=_.user_id, earlier_item=_.item_id, earlier_position=_.position)
    of_user = [targets.user_id == earlier.earlier_user, targets.item_id == earlier.earlier_item]
    repeated = targets.semi_join(earlier, [*of_user, targets.position > earlier.earlier_position])
    with_text = targets.filter(_.text_hash.notnull())
    found = {
        "repeated_targets": repeated,
        "targets_in_training": targets.semi_join(train, ["user_id", "item_id"]),
        "texts_in_training": with_text.semi_join(train, ["user_id", "text_hash"]),
    }
    for name, rows in found.items():
        there = {row["target"]: row["count"] for row in engine.rows(rows.group_by("target").agg(count=_.count()))}
        for number, split in _NAMES.items():
            if split in by_split:
                by_split[split][name] = there.get(number, 0)
    for split, counts in by_split.items():
        shares = {f"{name}_share": count / counts["targets"] for name, count in counts.items() if name != "targets"}
        facts[split] = {**counts, **shares}
    order = engine.row(walked.agg(count=_count(_.previous_time > _.timestamp)))
    return {**facts, "out_of_time_order": order["count"], "global_time": _overlap(engine, walked)}


def _overlap(engine: Engine, walked: Table) -> dict[str, Any]:
    """What training sees of the time after the test targets: with leave-last-out much, with a global split nothing.

    Returns:
      later_than_a_test_target: training purchases later than the earliest test target, and their share of all training
      purchases; later_pairs_share: the mean over test targets of the share of training purchases that are later (all
      of other users: a user's own are never later).
    """
    by_time = walked.group_by("timestamp").agg(train=_count(_.part == 0), test=_count(_.target == 2))
    so_far = ibis.window(order_by="timestamp", preceding=None, following=0)
    times = by_time.mutate(until=_.train.sum().over(so_far).cast("int64"))
    sums = engine.row(
        times.agg(
            train=_.train.sum(),
            test=_.test.sum(),
            not_later=(_.test * _.until).sum().cast("int64"),
            first_test=_.timestamp.min(where=_.test > 0),
        )
    )
    if not sums["train"] or not sums["test"]:
        return {"later_than_a_test_target": 0, "later_than_a_test_target_share": 0.0, "later_pairs_share": 0.0}
    later = engine.row(times.filter(_.timestamp > sums["first_test"]).agg(count=_.train.sum().fill_null(0)))["count"]
    return {
        "later_than_a_test_target": later,
        "later_than_a_test_target_share": later / sums["train"],
        "later_pairs_share": 1 - sums["not_later"] / (sums["train"] * sums["test"]),
    }


def catalogue_facts(engine: Engine, items: Table, attributes: Sequence[str], named: int) -> dict[str, Any]:
    """Counts of the catalogue: bought, described, absent attributes; the first `named` items without any attribute."""
    blank = ibis.and_(*(_[name].isnull() for name in attributes))
    counts = engine.row(
        items.agg(
            items=_.count(),
            bought=_count(_.bought),
            unbought=_count(~_.bought),
            without_metadata=_count(~_.described),
            without_any_attribute=_count(blank),
            **{f"absent_{name}": _count(_[name].isnull()) for name in attributes},
        )
    )
    first = engine.rows(items.filter(blank).select("item_id").order_by("item_id").limit(named))
    count = counts.pop("without_any_attribute")
    absent = {name: counts.pop(f"absent_{name}") for name in attributes}
    return {
        **counts,
        "absent": absent,
        "absent_share": {name: number / counts["items"] for name, number in absent.items()},
        "without_any_attribute": {"count": count, "first": [row["item_id"] for row in first]},
    }
