"""The users that the report shows: drawn by seed, half hits and half misses, each with all that the line made of them.

Only the drawn users' rows are kept in memory. The place of a target is computed from the ranking's scores, so that ties
are seen: a target that shares its score stands at ranks ``first`` to ``last``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from calrec_jax import artifacts
from calrec_jax.data.dataset import Dataset
from calrec_jax.errors import CalrecError
from calrec_jax.rank.shards import RankedLists, RankingReader

HIT_CUT = 10  # a hit has its target among the first ten (mean rank)
TOP = 10  # items of a ranking that are shown
HISTORY_CAP = 50  # latest purchases of a history that are shown
TITLE_CAP = 240  # characters
COMPLETION_CAP = 400  # characters


def _rows(
    folder: Path, columns: list[str], dataset: Dataset, users: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (user, row) of the shards' rows of `users`."""
    files = sorted(str(file) for file in Path(folder).glob(artifacts.SHARDS))
    if not files:
        raise CalrecError(f"{folder} has no part-*.parquet; run the step that makes it again")
    wanted = pc.field("user_id").isin(pa.array(dataset.user_ids[users], pa.string()))
    index = {dataset.user_ids[user]: user for user in users.tolist()}
    try:
        shards = pads.dataset(files, format="parquet")
        missing = [name for name in columns if name not in shards.schema.names]
        if missing:
            raise CalrecError(f"{folder}: the shards lack the columns {missing}; run the step that makes them again")
        for batch in shards.scanner(columns=["user_id", *columns], filter=wanted).to_batches():
            for row in batch.to_pylist():
                yield index[row["user_id"]], row
    except (pa.ArrowInvalid, OSError) as error:
        raise CalrecError(f"{folder}: a shard cannot be read as Parquet ({error}); run the step again") from error


def target_places(block: RankedLists, targets: np.ndarray) -> np.ndarray:
    """First and last rank of each target among the items of its score.

    Args:
      block: B ranked lists.
      targets: [B] item indices.

    Returns:
      [B, 2] int64; 0 where the list does not reach the target.
    """
    is_target = block.items == targets[:, None]
    found = is_target.any(axis=1)
    score = np.where(found, np.where(is_target, block.scores, -np.inf).max(axis=1, initial=-np.inf), np.nan)[:, None]
    above = (block.scores > score).sum(axis=1)
    same = (block.scores == score).sum(axis=1)
    lowest = block.scores[np.arange(len(targets)), np.maximum(block.lengths - 1, 0)]
    same = same + np.where(lowest == score[:, 0], block.ties_beyond_depth, 0)
    return np.where(found[:, None], np.stack([above + 1, above + same], axis=1), 0)


def draw_users(dataset: Dataset, split: str, ranking: Path | None, users: int, seed: int) -> np.ndarray:
    """Draws the users to show: half of them hits of `ranking` where there are that many, the others misses.

    Returns:
      Ascending indices of at most `users` users of the dataset.
    """
    there = dataset.users_with(split)
    order = there[np.random.default_rng(seed).permutation(len(there))]
    if ranking is None:
        return np.sort(order[:users])
    is_hit = np.zeros(len(dataset.user_ids), bool)
    targets = all_targets(dataset, split)
    for block in RankingReader(ranking, dataset).blocks():
        places = target_places(block, targets[block.users])
        is_hit[block.users] = (places[:, 0] > 0) & (places.mean(axis=1) <= HIT_CUT)
    hits, misses = order[is_hit[order]], order[~is_hit[order]]
    from_hits = min(len(hits), max(users // 2, users - len(misses)))
    return np.sort(np.concatenate([hits[:from_hits], misses[: users - from_hits]]))


def all_targets(dataset: Dataset, split: str) -> np.ndarray:
    """Every user's target: [U] item indices, −1 where the user has none."""
    positions = dataset.target_positions(split)
    return np.where(positions >= 0, dataset.items[dataset.offsets[:-1] + np.maximum(positions, 0)], -1)


class _ItemStore:
    """Numbers the items that the page names, so that each is written once."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._numbers: dict[int, int] = {}

    def number(self, item: int) -> int:
        return self._numbers.setdefault(int(item), len(self._numbers))

    def rows(self) -> list[list[str | None]]:
        """[title, brand, category, price, item_id] of each, in the order of their numbers.

        Of items with other attributes, the first stands for the title, and the next three that are left fill the gaps.
        """
        attributes = self._dataset.attributes
        shown: list[str | None] = [
            name if name in attributes else None for name in ("title", "brand", "category", "price")
        ]
        others = iter([name for name in attributes if name not in shown])
        shown = [name if name is not None else next(others, None) for name in shown]
        nothing = [None] * len(self._dataset.item_ids)
        columns = [attributes[name] if name is not None else nothing for name in shown]
        return [
            [*(_cut(column[item], TITLE_CAP) for column in columns), str(self._dataset.item_ids[item])]
            for item in self._numbers
        ]


def _cut(text: str | None, cap: int) -> str | None:
    return text if text is None or len(text) <= cap else text[: cap - 1].rstrip() + "…"


def _dates(timestamps: np.ndarray) -> list[str]:
    return np.datetime_as_string(timestamps.astype("datetime64[s]"), unit="D").tolist()


def _history(dataset: Dataset, user: int, split: str, store: _ItemStore) -> dict[str, Any]:
    items = dataset.history(user, split)
    begin = dataset.offsets[user]
    earlier = max(0, len(items) - HISTORY_CAP)
    dates = _dates(dataset.timestamps[begin + earlier : begin + len(items)])
    shown = [[store.number(item), date] for item, date in zip(items[earlier:], dates, strict=True)]
    return {"items": shown, "earlier": earlier}


def _tops(
    folder: Path, dataset: Dataset, split: str, users: np.ndarray, store: _ItemStore, with_sources: bool
) -> dict[int, Any]:
    """The shown part of one ranking for each drawn user who has a row in it; an item: number, score, source."""
    reader = RankingReader(folder, dataset)
    targets = all_targets(dataset, split)
    rows: dict[int, Any] = {}
    for block in reader.blocks():
        block = block.take(np.flatnonzero(np.isin(block.users, users)))
        places = target_places(block, targets[block.users])
        for row, user in enumerate(block.users.tolist()):
            length = int(block.lengths[row])
            shown = zip(block.items[row, : min(TOP, length)], block.scores[row, :length], strict=False)
            rows[user] = {
                "rank": places[row].tolist() if places[row, 0] else None,
                "depth": length,
                "top": [[store.number(item), float(f"{score:.6g}"), -1] for item, score in shown],
            }
    if with_sources:
        for user, row_of in _rows(folder, ["sources"], dataset, users):
            for entry, source in zip(rows[user]["top"], row_of["sources"], strict=False):
                entry[2] = source
    return rows


def _fold(row: Mapping[str, Any], target_id: str, target_text: str) -> list[dict[str, Any]]:
    """A user's completions without repeats, most probable first; `indices` are their places in the shard's row."""
    groups: dict[str, dict[str, Any]] = {}
    item_ids = row["item_ids"] or [None] * len(row["texts"])
    columns = (row["texts"], row["log_probs"], row["num_tokens"], row["finished"], item_ids)
    for index, (text, log_prob, tokens, finished, item_id) in enumerate(zip(*columns, strict=True)):
        is_target = item_id == target_id if item_id is not None else text.strip() == target_text.strip()
        fresh = {
            "text": _cut(text, COMPLETION_CAP),
            "log_prob": log_prob,
            "tokens": tokens,
            "finished": finished,
            "target": is_target,
            "indices": [],
        }
        group = groups.setdefault(text, fresh)
        group["log_prob"] = max(group["log_prob"], log_prob)
        group["finished"] = group["finished"] or finished
        group["target"] = group["target"] or is_target
        group["indices"].append(index)
    for group in groups.values():
        group["log_prob"] = round(group["log_prob"], 3)
    return sorted(groups.values(), key=lambda group: (-group["log_prob"], group["text"]))


def _completions(folder: Path, dataset: Dataset, split: str, users: np.ndarray) -> dict[int, list[dict[str, Any]]]:
    targets = all_targets(dataset, split)
    rows: dict[int, list[dict[str, Any]]] = {}
    for user, row in _rows(folder, ["texts", "log_probs", "num_tokens", "finished", "item_ids"], dataset, users):
        rows[user] = _fold(row, str(dataset.item_ids[targets[user]]), dataset.texts[targets[user]])
    return rows


def link_completions(rankings: Mapping[str, Path], completions: Mapping[str, Path]) -> dict[str, str]:
    """Which completions each ranking was made from: by the hash in its manifest, else by an equal name."""

    def manifest(folder: Path) -> dict[str, Any]:
        path = Path(folder) / "manifest.json"
        return artifacts.read_json(path) if path.exists() else {}

    by_hash = {manifest(folder).get("hash"): name for name, folder in completions.items()}
    links = {}
    for name, folder in rankings.items():
        made_from = manifest(folder).get("made_from", {}).get("completions")
        linked = by_hash.get(made_from) if made_from else (name if name in completions else None)
        if linked:
            links[name] = linked
    return links


def show_users(
    dataset: Dataset,
    split: str,
    users: np.ndarray,
    rankings: Mapping[str, Path],
    completions: Mapping[str, Path],
) -> dict[str, Any]:
    """Everything that the page shows of the drawn users, ready for JSON.

    Args:
      dataset: what rankings and completions were made from.
      split: "validation" or "test".
      users: ascending user indices.
      rankings: folder of shards by name.
      completions: folder of shards by name.

    Returns:
      ``items`` (a row each: title, brand, category, price, item_id), ``users``, which name items by row, and
      ``completions_of``: the completions' name by ranking.

    Raises:
      CalrecError: if shards are missing or broken, or name users or items that the dataset does not have.
    """
    store = _ItemStore(dataset)
    links = link_completions(rankings, completions)
    tops = {
        name: _tops(folder, dataset, split, users, store, with_sources=name in links)
        for name, folder in rankings.items()
    }
    made = {name: _completions(folder, dataset, split, users) for name, folder in completions.items()}
    shown = []
    for user in users.tolist():
        position = len(dataset.history(user, split))
        when = dataset.timestamps[dataset.offsets[user] + position]
        shown.append(
            {
                "id": str(dataset.user_ids[user]),
                "target": store.number(dataset.target(user, split)),
                "target_date": _dates(np.array([when]))[0],
                "history": _history(dataset, user, split, store),
                "rankings": {name: rows[user] for name, rows in tops.items() if user in rows},
                "completions": {name: rows[user] for name, rows in made.items() if user in rows},
            }
        )
    return {"items": store.rows(), "users": shown, "completions_of": links}
