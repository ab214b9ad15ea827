"""The verb `prepare`: raw purchase logs to a dataset and its data card.

The readers stage the raw files as Parquet (`readers.py`, kept by `staging.py`); the rules, the split and what is
counted (`category.py`) are run by an engine (`engines.py`); `dataset.py` writes the result. Until that is read back,
nothing of a category's size is held in Python.
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

from calrec_jax import artifacts
from calrec_jax.data import dataset as dataset_lib
from calrec_jax.data import engines, readers, sources, splits, staging
from calrec_jax.data.card import made_by, read_facts
from calrec_jax.data.category import Category
from calrec_jax.data.dataset import Dataset
from calrec_jax.data.splits import LEAVE_LAST_OUT, Moment
from calrec_jax.data.templates import Template
from calrec_jax.errors import CalrecError

MIN_LENGTH = 3  # a test target, a validation target and a purchase to learn from
CACHE = ".staged"  # beside the dataset
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
            category = Category(opened, raw, settings)
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
