"""Which purchases a model may learn from, and which one it has to predict: three splits, one form.

A purchase belongs to a *part*: 0 training, 1 validation, 2 test. A user's validation target is the first purchase of
part 1, the test target the first of part 2, each provided that a purchase stands before it; everything before a target
is its history. Parts never decrease along a user's purchases.

- ``leave_last_out``: the last purchase is part 2, the one before it part 1. Every user has both targets.
- ``global_time``: parts are divided by two moments, the same for all users, so that nothing learnt is later than
  anything predicted (Meng et al., RecSys 2020, compare splits; Ji et al., TOIS 2023, measure what leaks otherwise).
- ``official``: as the raw files say (the benchmark files of Amazon Reviews 2023).
"""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import ibis
from ibis import _
from ibis.expr.types import IntegerColumn, Table

from calrec_jax.data.relational import in_order
from calrec_jax.errors import CalrecError

LEAVE_LAST_OUT, GLOBAL_TIME, OFFICIAL = "leave_last_out", "global_time", "official"
KINDS = (LEAVE_LAST_OUT, GLOBAL_TIME, OFFICIAL)
OFFICIAL_NAMES = {"train": 0, "validation": 1, "test": 2}
Moment = float | int | str


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as it was made.

    Attributes:
      kind: one of `KINDS`.
      valid_from, test_from: first second of validation and test; None but for `global_time`.
    """

    kind: str
    valid_from: int | None = None
    test_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As manifest and card hold it."""
        return dataclasses.asdict(self)


def official_parts(interactions: Table) -> IntegerColumn:
    """The part that the raw files give each purchase; −1 where they give none."""
    cases = [(_.split == name, ibis.literal(part, "int8")) for name, part in OFFICIAL_NAMES.items()]
    return ibis.cases(*cases, else_=ibis.literal(-1, "int8"))


def check_times(times: Sequence[Moment] | None, kind: str) -> None:
    """Raises a CalrecError unless `times` are two moments for a split that has them, and none for another."""
    if kind not in KINDS:
        raise CalrecError(f"prepare.split={kind!r}: one of {list(KINDS)}.")
    if times is None:
        return
    if kind != GLOBAL_TIME:
        raise CalrecError(f"prepare.split_times={times!r} has no effect with prepare.split={kind!r}; leave it out.")
    wrong = isinstance(times, str) or len(times) != 2 or len({isinstance(time, float) for time in times}) > 1
    shares = [time for time in times if isinstance(time, float)]
    if wrong or (shares and not 0 < shares[0] < shares[1] < 1):
        raise CalrecError(
            f"prepare.split_times={times!r}: two moments, where validation and where test begins: both shares of the "
            "purchases, such as (0.8, 0.9), both dates, such as ('2017-01-01', '2018-01-01'), or both seconds."
        )
    for time in times:
        if not isinstance(time, float):
            _seconds(time)


def _seconds(time: Moment) -> int:
    """Seconds since 1970 of a date (UTC) or a number of seconds."""
    if isinstance(time, int) and not isinstance(time, bool):
        return time
    try:
        moment = datetime.datetime.fromisoformat(str(time))
    except ValueError as error:
        raise CalrecError(f"prepare.split_times: {time!r} is neither seconds nor an ISO date: {error}.") from None
    return int(moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp())


def global_time(interactions: Table, times: Sequence[Moment] | None) -> Split:
    """The split of two moments; a share becomes the time of the purchase at that place of all purchases in order.

    Raises:
      CalrecError: a part would have no purchase.
    """
    facts = interactions.agg(first=_.timestamp.min(), last=_.timestamp.max(), count=_.count())
    (known,) = facts.to_pyarrow().to_pylist()
    shares = times if times is not None else (0.8, 0.9)
    if isinstance(shares[0], float):
        moments = [_time_at(interactions, int(float(share) * known["count"])) for share in shares]
    else:
        moments = [_seconds(time) for time in shares]
    valid_from, test_from = moments
    if not known["first"] < valid_from < test_from <= known["last"]:
        raise CalrecError(
            f"prepare.split_times={tuple(shares)!r}: validation from {_day(valid_from)} ({valid_from}) and test from "
            f"{_day(test_from)} ({test_from}) leave a part without purchases: they go from {_day(known['first'])} "
            f"({known['first']}) to {_day(known['last'])} ({known['last']}). Choose two moments within them, the "
            "first one earlier."
        )
    return Split(GLOBAL_TIME, valid_from, test_from)


def _day(time: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):
        return "no date"


def _time_at(interactions: Table, place: int) -> int:
    """Time of the purchase at a place, from 0, of all purchases in order of time."""
    so_far = ibis.window(order_by="timestamp", preceding=None, following=0)
    counted = interactions.group_by("timestamp").agg(here=_.count()).mutate(until=_.here.sum().over(so_far))
    return int(counted.filter(_.until > place).agg(time=_.timestamp.min()).to_pyarrow()["time"][0].as_py())


def walk(interactions: Table, split: Split) -> Table:
    """The purchases with what a split and its audit need.

    Adds position (from 0) and previous_time, previous_item (null at a user's first) in the user's order, and
    target: 1 the validation target, 2 the test target, 0 any other purchase. `part` is the split's.
    """
    if split.kind == GLOBAL_TIME:
        after = [(_.timestamp >= split.test_from, 2), (_.timestamp >= split.valid_from, 1)]
        interactions = interactions.mutate(
            part=ibis.cases(
                *((when, ibis.literal(part, "int8")) for when, part in after), else_=ibis.literal(0, "int8")
            )
        )
    ordered = interactions.mutate(
        position=ibis.row_number().over(in_order()),
        previous_time=_.timestamp.lag().over(in_order()),
        previous_item=_.item_id.lag().over(in_order()),
        previous_part=_.part.lag().over(in_order()),
        length=_.count().over(ibis.window(group_by="user_id")),
    )
    begins = _.part > _.previous_part
    if split.kind == LEAVE_LAST_OUT:
        last = [(_.position == _.length - 1, 2), (_.position == _.length - 2, 1)]
        ordered = ordered.mutate(
            part=ibis.cases(*((when, ibis.literal(part, "int8")) for when, part in last), else_=ibis.literal(0, "int8"))
        )
        begins = (_.part > 0) & (_.position > 0)
    target = ibis.ifelse(begins.fill_null(False), _.part, ibis.literal(0, "int8"))
    return ordered.mutate(target=target).drop("previous_part", "length")


def users(walked: Table) -> Table:
    """One row a user: length, train_end, valid_position, test_position (−1: no such target), all int32."""
    return walked.group_by("user_id").agg(
        length=_.count().cast("int32"),
        train_end=(_.part == 0).sum().cast("int32"),
        valid_position=_.position.max(where=_.target == 1).fill_null(-1).cast("int32"),
        test_position=_.position.max(where=_.target == 2).fill_null(-1).cast("int32"),
    )
