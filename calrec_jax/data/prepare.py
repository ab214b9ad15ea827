"""The verb `prepare`: raw purchase logs to a dataset and its data card.

The readers stage the raw files as Parquet (`readers.py`, kept by `staging.py`); the rules are Ibis expressions
(`relational.py`), run by an engine (`engines.py`), as are the split (`splits.py`) and what is counted (`audit.py`);
`dataset.py` writes the result. Nothing of a category's size is held in Python.
"""

import dataclasses
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin
import ibis
from ibis import _
from ibis.expr.types import Table

from calrec_jax import artifacts
from calrec_jax.data import audit, engines, readers, relational, sources, splits, staging
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data.card import made_by, read_facts
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.engines import Engine, Rows
from calrec_jax.data.splits import LEAVE_LAST_OUT, OFFICIAL, Moment, Split
from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError

MIN_LENGTH = 3  # a test target, a validation target and a purchase to learn from
CACHE = ".staged"  # beside the dataset
_NAMED = 20  # items named one by one in the card; the rest is counted
_DAY = 86_400
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_log = logging.getLogger(__name__)
Paths = str | Path | Sequence[str | Path]


@gin.configurable
def prepare(
    out: str | Path,
    *,
    name: str,
    reviews: Paths | None = None,
    metadata: Paths | None = None,
    data_dir: str | Path = ".",
    layout: str = "2018",
    columns: readers.Columns | None = None,
    keep_categories: Sequence[str] = (),
    near_duplicate_days: float | None = None,
    remove_consecutive_repeats: bool = True,
    min_length: int = MIN_LENGTH,
    core: Sequence[int] | None = None,
    split: str = LEAVE_LAST_OUT,
    split_times: Sequence[Moment] | None = None,
    max_bad_share: float = 0.01,
    keep_unbought_items: bool = True,
    template: Template | None = None,
    engine: str = engines.DUCKDB,
    memory_limit: str = "3GB",
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    cache_gib: float = 20.0,
) -> Dataset:
    """Makes a dataset folder from a category's raw files, or loads it when it is there already.

    The rules apply in the order of these arguments. The last five change how it is done, not what comes out.

    Args:
      out: the folder to make.
      name: of the category; letters, digits, `.`, `_` and `-`.
      reviews: the file of purchases, or several; a folder, a pattern or a URL as `sources.find` takes them.
        None: what the layout's files of a category are usually named, in `data_dir`.
      metadata: the same of items.
      data_dir: folder or URL that relative names start from.
      layout: of the files, one of `readers.LAYOUTS`.
      columns: of the layout "tables"; None: what gin has bound, or the defaults.
      keep_categories: keep the items alone whose category path has one of these levels, as written; empty: all.
      near_duplicate_days: drop a review of the same user, item and text as one at most so many days before; None: none.
      remove_consecutive_repeats: of an item bought several times in a row, keep the first purchase only.
      min_length: users with fewer purchases are dropped; at least 3 for leave-last-out, at least 1 otherwise.
      core: (u, i) keeps the greatest set in which every user has u purchases and every item i; None: no core. The
        catalogue then has its items alone.
      split: "leave_last_out", "global_time" or "official" (see `splits.py`).
      split_times: where validation and test begin with "global_time": two shares of the purchases, two dates (UTC) or
        two numbers of seconds; None: (0.8, 0.9).
      max_bad_share: largest share of a file's lines, in [0, 1], that may be unusable before the run stops.
      keep_unbought_items: whether metadata items that no purchase names belong to the catalogue. They compete in the
        ranking; turn this off for metadata that covers far more than the reviews do.
      template: writes the item texts; the default one when None.
      engine: "duckdb", or a URL: ``pyspark://?spark.master=local[2]``, ``bigquery://project/dataset``.
      memory_limit: what this process may hold while the rules run, such as "3GB"; what does not fit goes to a folder
        beside `out`. The finished dataset, which is read back, comes on top where it is larger.
      threads: of the reader and of DuckDB; None: all cores.
      cache_dir: where staged files are kept; None: `.staged` beside `out`.
      cache_gib: what the kept files may take, in GiB; 0: none is kept.

    Raises:
      CalrecError: if a setting is wrong, a file cannot be used, the files do not belong together, a rule leaves nothing
        or too little to split, the engine is not there, or `out` holds a dataset made from something else.
    """
    out, template = Path(out), template or Template()
    settings = {
        "name": name,
        "layout": layout,
        "keep_categories": list(keep_categories),
        "near_duplicate_days": near_duplicate_days,
        "remove_consecutive_repeats": remove_consecutive_repeats,
        "min_length": min_length,
        "core": None if core is None else list(core),
        "split": split,
        "split_times": None if split_times is None else list(split_times),
        "max_bad_share": max_bad_share,
        "keep_unbought_items": keep_unbought_items,
    }
    reader_settings: dict[str, Any] = {"layout": layout, "attributes": list(template.attributes)}
    if layout == "tables":
        reader_settings["columns"] = dataclasses.asdict(columns or readers.Columns())
        settings |= {"columns": reader_settings["columns"]}
    _check_settings(settings, cache_gib)
    engines.check_engine(engine, memory_limit, threads)
    how = readers.LAYOUTS[layout]
    files = {
        "reviews": sources.find(sources.in_folder(data_dir, how.reviews if reviews is None else reviews, name)),
        "metadata": sources.find(sources.in_folder(data_dir, how.metadata if metadata is None else metadata, name)),
    }
    made_from = {role: sources.combined_hash(found) for role, found in files.items()}
    with_template = {**made_from, "template": template.fingerprint}
    if artifacts.is_done(out, kind="dataset", made_from=with_template, settings=settings):
        _log.info("%s: already made, skipped.", out)
        return Dataset.load(out)
    _clear_unfinished(out)
    quarantine = out.with_name(out.name + ".quarantine.jsonl")
    with artifacts.disk_errors(out.parent), _quarantine_file(quarantine), artifacts.scratch_folder(out) as scratch:
        cache = Path(cache_dir).expanduser() if cache_dir is not None else out.parent / CACHE
        raw, _reused = staging.read_or_reuse(
            cache if cache_gib else scratch / CACHE,
            files,
            {**reader_settings, "max_bad_share": max_bad_share},
            quarantine=quarantine,
            limit_bytes=int(cache_gib * 2**30),
            threads=threads,
        )
        with engines.open_engine(engine, scratch, memory_limit, threads) as opened:
            category = _Category(opened, raw, settings)
            items, users, purchases = category.run()
            card = {**read_facts(name, files, raw, settings), **category.card, "made_by": made_by(opened.version)}
        return dataset_lib.save_dataset(
            out,
            name=name,
            items=items,
            sequences=dataset_lib.sequence_groups(users, purchases),
            template=template,
            card=card,
            made_from=made_from,
            settings=settings,
            split=category.card["split"],
            quarantine=quarantine,
        )


def _check_settings(settings: dict[str, Any], cache_gib: float) -> None:
    name, layout, share = settings["name"], settings["layout"], settings["max_bad_share"]
    if not _NAME.fullmatch(name):
        raise CalrecError(f"prepare.name={name!r}: letters, digits, '.', '_' and '-' only; it names a folder.")
    if layout not in readers.LAYOUTS:
        raise CalrecError(f"prepare.layout={layout!r}: one of {sorted(readers.LAYOUTS)}.")
    splits.check_times(settings["split_times"], settings["split"])
    if settings["split"] == LEAVE_LAST_OUT and settings["min_length"] < MIN_LENGTH:
        raise CalrecError(
            f"prepare.min_length={settings['min_length']}: at least {MIN_LENGTH}, for a test target, a validation "
            "target and a purchase before them."
        )
    if settings["min_length"] < 1:
        raise CalrecError(f"prepare.min_length={settings['min_length']}: at least 1.")
    core = settings["core"]
    if core is not None and (len(core) != 2 or not all(isinstance(k, int) and k >= 1 for k in core)):
        raise CalrecError(
            f"prepare.core={core!r}: two whole numbers from 1, purchases of a user and of an item, such as (5, 5)."
        )
    days = settings["near_duplicate_days"]
    if days is not None and not 0 <= days < 100_000:
        raise CalrecError(f"prepare.near_duplicate_days={days!r}: a number of days from 0, or None.")
    if not 0 <= share <= 1:
        raise CalrecError(f"prepare.max_bad_share={share}: a share between 0 and 1.")
    if cache_gib < 0:
        raise CalrecError(f"prepare.cache_gib={cache_gib}: GiB from 0, which keeps nothing.")


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


@contextmanager
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


class _Category:
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
