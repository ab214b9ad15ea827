"""Raw purchase logs to a dataset: repeats, order, minimum length, leave-last-out, statistics and the data card.

The relational part is written once, as Ibis expressions over a table of interactions (`user_id`, `item_id`,
`timestamp`, `line`); DuckDB runs it in process. Every expression is deterministic: purchases are in total order by
time and then by their line in the file, so that purchases of one day keep the order in which they were logged.
"""

import contextlib
import datetime
import functools
import logging
import operator
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import ibis
import pyarrow as pa
from ibis import _
from ibis.expr.types import Table

from calrec_jax import artifacts
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data import readers, sources
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError

MIN_LENGTH = 3  # a test target, a validation target and a purchase to learn from
_NAMED = 20  # items named one by one in the card; the rest is counted
_DAY = 86_400
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_log = logging.getLogger(__name__)


def drop_duplicates(interactions: Table) -> Table:
    """Keeps the first line of each (user, item, time): dumps repeat whole reviews."""
    return interactions.group_by("user_id", "item_id", "timestamp").agg(line=_.line.min())


def drop_consecutive_repeats(interactions: Table) -> Table:
    """Of an item bought several times in a row, keeps the first purchase (paper, section "Evaluation")."""
    previous = interactions.mutate(previous=_.item_id.lag().over(_in_order()))
    return previous.filter(_.previous.isnull() | (_.previous != _.item_id)).drop("previous")


def drop_short(interactions: Table, min_length: int) -> Table:
    """Drops users with fewer than `min_length` purchases."""
    counted = interactions.mutate(length=_.count().over(ibis.window(group_by="user_id")))
    return counted.filter(_.length >= min_length).drop("length")


def _in_order() -> Any:
    return ibis.window(group_by="user_id", order_by=["timestamp", "line"])


def split_sequences(interactions: Table) -> Table:
    """One row a user: purchases in order, and the positions of the two targets (leave-last-out).

    Structs are collected and then sorted: that is the same on every backend, an ordered collect is not.
    """
    purchase = ibis.struct({"timestamp": _.timestamp, "line": _.line, "item_id": _.item_id})
    collected = interactions.mutate(purchase=purchase).group_by("user_id").agg(purchases=_.purchase.collect())
    ordered = collected.mutate(purchases=_.purchases.sort())
    return ordered.select(
        "user_id",
        item_ids=_.purchases.map(lambda row: row.item_id),
        timestamps=_.purchases.map(lambda row: row.timestamp),
        valid_position=(_.purchases.length() - 2).cast("int32"),
        test_position=(_.purchases.length() - 1).cast("int32"),
    )


def statistics(interactions: Table) -> Table:
    """One row of statistics of sequences that are ready to be split.

    Tied: as old as the purchase before it. A repeat: the user bought the item earlier, at whatever distance.
    """
    earlier = ibis.window(group_by=["user_id", "item_id"], order_by=["timestamp", "line"])
    length = _.count().over(ibis.window(group_by="user_id"))
    marked = interactions.mutate(
        previous_time=_.timestamp.lag().over(_in_order()),
        previous_item=_.item_id.lag().over(_in_order()),
        position=ibis.row_number().over(_in_order()),
        occurrence=ibis.row_number().over(earlier),
        length=length,
    ).mutate(is_test=_.position == _.length - 1, is_first=_.position == 0)
    same_day = (_.previous_time // _DAY == _.timestamp // _DAY).fill_null(False)
    return marked.agg(
        users=_.is_first.sum(),
        items=_.item_id.nunique(),
        interactions=_.count(),
        first_time=_.timestamp.min(),
        last_time=_.timestamp.max(),
        length_min=_.length.min(where=_.is_first),
        length_median=_.length.median(where=_.is_first),
        length_mean=_.length.mean(where=_.is_first),
        length_max=_.length.max(where=_.is_first),
        repeats=(_.occurrence > 0).sum(),
        consecutive_repeats=(_.previous_item == _.item_id).fill_null(False).sum(),
        tied=(_.previous_time == _.timestamp).fill_null(False).sum(),
        tied_test_targets=(_.is_test & (_.previous_time == _.timestamp).fill_null(False)).sum(),
        same_day_test_targets=(_.is_test & same_day).sum(),
        repeated_test_targets=(_.is_test & (_.occurrence > 0)).sum(),
    )


@gin.configurable
def prepare(
    out: str | Path,
    *,
    name: str,
    reviews: str | Path | Sequence[str | Path],
    metadata: str | Path | Sequence[str | Path],
    layout: str = "2018",
    remove_consecutive_repeats: bool = True,
    min_length: int = MIN_LENGTH,
    max_bad_share: float = 0.01,
    keep_unbought_items: bool = True,
    template: Template | None = None,
) -> Dataset:
    """Makes a dataset folder from a category's raw files, or loads it when it is there already.

    Args:
      out: the folder to make.
      name: of the category; letters, digits, `.`, `_` and `-`.
      reviews: the file of purchases, or several; a folder, a pattern or a URL as `sources.find` takes them.
      metadata: the same of items.
      layout: of the files, one of `readers.LAYOUTS`.
      remove_consecutive_repeats: of an item bought several times in a row, keep the first purchase only.
      min_length: users with fewer purchases are dropped; at least 3.
      max_bad_share: largest share of a file's lines, in [0, 1], that may be unusable before the run stops.
      keep_unbought_items: whether metadata items that no purchase names belong to the catalogue. They compete in the
        ranking; turn this off for metadata that covers far more than the reviews do.
      template: writes the item texts; the default one when None.

    Raises:
      CalrecError: if a setting is wrong, a file cannot be used, the files do not belong together, no user is long
        enough to split, or `out` holds a dataset made from something else.
    """
    out, template = Path(out), template or Template()
    settings = {
        "name": name,
        "layout": layout,
        "remove_consecutive_repeats": remove_consecutive_repeats,
        "min_length": min_length,
        "max_bad_share": max_bad_share,
        "keep_unbought_items": keep_unbought_items,
    }
    _check_settings(settings)
    files = {"reviews": sources.find(reviews), "metadata": sources.find(metadata)}
    made_from = {role: sources.combined_hash(found) for role, found in files.items()}
    with_template = {**made_from, "template": template.fingerprint}
    if artifacts.is_done(out, kind="dataset", made_from=with_template, settings=settings):
        _log.info("%s: already made, skipped.", out)
        return Dataset.load(out)
    _clear_unfinished(out)
    quarantine = out.with_name(out.name + ".quarantine.jsonl")
    with artifacts.disk_errors(out.parent), _quarantine_file(quarantine):
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-staged-", dir=out.parent) as staged:
            raw = readers.read(
                staged,
                files["reviews"],
                files["metadata"],
                layout=layout,
                attributes=template.attributes,
                quarantine=quarantine,
                max_bad_share=max_bad_share,
            )
            with _connection() as connection:
                items, sequences, card = _relate(connection, raw, settings)
        card["sources"] = {
            role: [{"file": source.name, "bytes": source.size, "sha256": source.sha256} for source in found]
            for role, found in files.items()
        }
        return dataset_lib.save_dataset(
            out,
            name=name,
            items=items,
            sequences=sequences,
            template=template,
            card=card,
            made_from=made_from,
            settings=settings,
            quarantine=quarantine,
        )


def _check_settings(settings: dict[str, Any]) -> None:
    name, layout, share = settings["name"], settings["layout"], settings["max_bad_share"]
    if not _NAME.fullmatch(name):
        raise CalrecError(f"prepare.name={name!r}: letters, digits, '.', '_' and '-' only; it names a folder.")
    if layout not in readers.LAYOUTS:
        raise CalrecError(f"prepare.layout={layout!r}: one of {sorted(readers.LAYOUTS)}.")
    if settings["min_length"] < MIN_LENGTH:
        raise CalrecError(
            f"prepare.min_length={settings['min_length']}: at least {MIN_LENGTH}, for a test target, a validation "
            "target and a purchase before them."
        )
    if not 0 <= share <= 1:
        raise CalrecError(f"prepare.max_bad_share={share}: a share between 0 and 1.")


def _clear_unfinished(out: Path) -> None:
    """Removes a dataset folder without a manifest, and nothing that might be somebody's own."""
    if not out.exists():
        return
    ours = {
        dataset_lib.ITEMS_FILE,
        dataset_lib.SEQUENCES_FILE,
        dataset_lib.CARD_FILE,
        dataset_lib.QUARANTINE_FILE,
    }
    if not out.is_dir() or not ours.issuperset(path.name for path in out.iterdir()):
        raise CalrecError(f"{out} exists and is not a dataset; name another folder, or move it away.")
    shutil.rmtree(out)


@contextlib.contextmanager
def _quarantine_file(path: Path) -> Iterator[None]:
    """The file beside the dataset folder while it is made; it stays only when the run fails and it has lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if path.exists() and not path.stat().st_size:
            path.unlink()
        raise
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _connection() -> Iterator[Any]:
    """DuckDB in memory."""
    connection = ibis.duckdb.connect()
    try:
        yield connection
    finally:
        connection.disconnect()


def _relate(connection: Any, raw: readers.RawCategory, settings: dict[str, Any]) -> tuple[pa.Table, pa.Table, dict]:
    """Runs the relational part. Returns the items, the sequences and the card (sources not yet in it)."""
    rules: list[dict[str, Any]] = []

    def stage(rule: str, table: Table) -> Table:
        """Materialises a step, so that the next ones do not run it again, and notes what it left."""
        made = connection.create_table(f"stage_{len(rules)}", table)
        count = made.agg(users=_.user_id.nunique(), interactions=_.count()).to_pyarrow().to_pylist()[0]
        after = {f"{what}_out": number for what, number in count.items()}
        before = {f"{what}_in": rules[-1][f"{what}_out"] if rules else number for what, number in count.items()}
        rules.append({"rule": rule, **before, **after})
        return made

    read = stage("read", connection.read_parquet(str(raw.interactions / artifacts.SHARDS)))
    described = connection.read_parquet(str(raw.items / artifacts.SHARDS))
    items, catalogue = _catalogue(read, described, raw, settings["keep_unbought_items"])
    kept = stage("exact duplicates of user, item and time", drop_duplicates(read))
    if settings["remove_consecutive_repeats"]:
        kept = stage("consecutive repeats of an item", drop_consecutive_repeats(kept))
    kept = stage(f"users with fewer than {settings['min_length']} purchases", drop_short(kept, settings["min_length"]))
    if not rules[-1]["users_out"]:
        raise CalrecError(
            f"{settings['name']} is too small to split: no user has {settings['min_length']} purchases "
            f"(read: {rules[0]['users_out']} users, {rules[0]['interactions_out']} interactions in {raw.reviews.file})."
        )
    card = {
        "name": settings["name"],
        "lines": {"reviews": raw.reviews.to_json(), "metadata": raw.metadata.to_json()},
        "rules": rules,
        "catalogue": catalogue,
        "statistics": _shares(statistics(kept).to_pyarrow().to_pylist()[0]),
    }
    return items, split_sequences(kept).to_pyarrow(), card


def drop_repeated_items(items: Table, attributes: Sequence[str]) -> Table:
    """Of an item's rows of metadata, keeps the one with the fewest absent attributes, of several the first line."""
    absent = functools.reduce(operator.add, [items[name].isnull().cast("int32") for name in attributes])
    best = ibis.window(group_by="item_id", order_by=["absent", "line"])
    ranked = items.mutate(absent=absent).mutate(place=ibis.row_number().over(best))
    return ranked.filter(_.place == 0).drop("absent", "place", "line")


def _catalogue(
    read: Table, described: Table, raw: readers.RawCategory, keep_unbought: bool
) -> tuple[pa.Table, dict[str, Any]]:
    """The catalogue: items of any readable purchase, with their metadata where there is some, and the unbought ones."""
    names = raw.attributes
    bought = set(read.select("item_id").distinct().to_pyarrow()["item_id"].to_pylist())
    rows = drop_repeated_items(described, names).to_pyarrow().to_pylist()
    repeated = raw.metadata.kept - len(rows)
    unbought = [row for row in rows if row["item_id"] not in bought]
    if len(unbought) == len(rows):
        raise CalrecError(
            f"No item of {raw.metadata.file} is in {raw.reviews.file}: they are files of different categories. Correct "
            "prepare.metadata or prepare.reviews."
        )
    undescribed = sorted(bought - {row["item_id"] for row in rows})
    if not keep_unbought:
        rows = [row for row in rows if row["item_id"] in bought]
    rows += [{"item_id": item_id, **dict.fromkeys(names)} for item_id in undescribed]
    blank = sorted(row["item_id"] for row in rows if not any(row[name] for name in names))
    facts = {
        "items": len(rows),
        "bought": len(bought),
        "repeated_in_metadata": repeated,
        "unbought_in_metadata": len(unbought),
        "unbought_kept": keep_unbought,
        "without_metadata": len(undescribed),
        "absent": {name: sum(not row[name] for row in rows) for name in names},
        "without_any_attribute": {"count": len(blank), "first": blank[:_NAMED]},
    }
    schema = pa.schema([(name, pa.string()) for name in ("item_id", *names)])
    return pa.Table.from_pylist(rows, schema), facts


def _shares(counts: dict[str, Any]) -> dict[str, Any]:
    """Adds dates, and shares to the counts that want one."""

    def day(time: int) -> str:
        return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()

    per_interaction = ("repeats", "consecutive_repeats", "tied")
    per_user = ("tied_test_targets", "same_day_test_targets", "repeated_test_targets")
    return {
        **counts,
        "first_day": day(counts["first_time"]),
        "last_day": day(counts["last_time"]),
        **{f"{name}_share": counts[name] / counts["interactions"] for name in per_interaction},
        **{f"{name}_share": counts[name] / counts["users"] for name in per_user},
    }
